//! `min_max` on CUDA. The kernels are in `csrc/cuda/min_max.cu`.

use super::affine::is_aligned;
use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels};
use super::Failure;
use crate::encoding::BlockGeometry;
use std::ffi::c_void;

#[repr(C)]
struct MinMaxArgs<C> {
    input: *const c_void,
    min: *mut C,
    max: *mut C,
    vectorized: u64,
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
    skeleton::distinct(Stored::ALL.into_iter().flat_map(|stored| {
        let kernels = if stored.is_double() {
            reduce_kernels::<f64>(stored)
        } else {
            reduce_kernels::<f32>(stored)
        };
        kernels.all()
    }))
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
    input: *const c_void,
    [min, max]: [*mut C; 2],
) -> Result<(), Failure> {
    let width = stored.width();
    let plan = ReducePlan::new(geometry, width);
    let args = MinMaxArgs {
        input,
        min,
        max,
        vectorized: u64::from(is_aligned(&[input]) && plan.is_aligned(width)),
    };
    // SAFETY: by the contract.
    unsafe { skeleton::reduce(launcher, &reduce_kernels::<C>(stored), args, plan) }
}
