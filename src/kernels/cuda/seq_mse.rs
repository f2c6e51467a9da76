//! Reconstruction errors of Sequential MSE on CUDA. The kernels are in `csrc/cuda/seq_mse.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels, Tensors};
use super::Failure;
use crate::encoding::BlockGeometry;
use crate::kernels::cpu::seq_mse::RowSum;
use std::ffi::c_void;

#[repr(C)]
struct RowSumArgs {
    tensors: Tensors<2>,
    sums: *mut f64,
}

fn reduce_kernels(kind: RowSum, stored: Stored) -> ReduceKernels {
    let operation = match kind {
        RowSum::SquaredDifference => "SquaredDifference",
        RowSum::AbsoluteDifference => "AbsoluteDifference",
        RowSum::Product => "Product",
    };
    ReduceKernels::of_sums::<RowSumArgs>("seq_mse.cu", operation, stored, ("RowSums", 1))
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    let every = RowSum::ALL
        .into_iter()
        .flat_map(|kind| Stored::ALL.map(|stored| reduce_kernels(kind, stored).all()));
    skeleton::distinct(every.flatten())
}

/// One sum for each of `rows` rows of `columns` elements.
///
/// # Safety
/// `a` and, unless it is null (zeros), `b` are device memory of `rows * columns` elements of dtype
/// `stored`; `sums` holds one element for each row.
pub unsafe fn row_sums(
    launcher: &Launcher<'_>,
    kind: RowSum,
    stored: Stored,
    [a, b]: [*const c_void; 2],
    [rows, columns]: [i64; 2],
    sums: *mut f64,
) -> Result<(), Failure> {
    let geometry = BlockGeometry::new(&[rows, columns], &[columns, 1], &[rows, 1], None)?;
    let width = stored.width();
    let plan = ReducePlan::new(&geometry, width);
    let args = RowSumArgs {
        tensors: Tensors::planned([a, b].map(<*const _>::cast_mut), &plan, width),
        sums,
    };
    // SAFETY: by the contract.
    unsafe { skeleton::reduce(launcher, &reduce_kernels(kind, stored), args, plan) }
}
