//! `min_max` on CUDA. The kernels are in `csrc/cuda/min_max.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels, Tensors};
use super::Failure;
use crate::encoding::BlockGeometry;
use crate::kernels::ffi::for_compute;
use std::ffi::c_void;

#[repr(C)]
struct MinMaxArgs<C> {
    tensors: Tensors<1>,
    min: *mut C,
    max: *mut C,
}

fn reduce_kernels<C>(stored: Stored) -> ReduceKernels {
    ReduceKernels::new::<MinMaxArgs<C>>(
        "min_max.cu",
        ("MinMax", [stored.name, stored.compute, ""]),
        ("MinMaxRange", stored.compute),
        2 * size_of::<C>() as u64,
    )
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    skeleton::distinct(Stored::ALL.into_iter().flat_map(
        |stored| for_compute!(stored.is_double(), C => reduce_kernels::<C>(stored).all()),
    ))
}

/// Smallest and largest element of each block; NaN wins.
///
/// # Safety
/// `input` is device memory of the geometry's size, of dtype `stored`; `min` and `max` hold one element for each
/// group.
pub unsafe fn min_max<C>(
    launcher: &Launcher<'_>,
    stored: Stored,
    geometry: &BlockGeometry,
    input: *mut c_void,
    [min, max]: [*mut C; 2],
) -> Result<(), Failure> {
    let width = stored.width();
    let plan = ReducePlan::new(geometry, width);
    let args = MinMaxArgs {
        tensors: Tensors::planned([input], &plan, width),
        min,
        max,
    };
    // SAFETY: by the contract.
    unsafe { skeleton::reduce(launcher, &reduce_kernels::<C>(stored), args, plan) }
}
