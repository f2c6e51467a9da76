//! `range_to_scale_offset` on CUDA. The kernels are in `csrc/cuda/range.cu`.

use super::affine::Grid;
use super::device::Launcher;
use super::kernel::{Kernel, THREADS};
use super::Failure;

#[repr(C)]
struct RangeArgs<C> {
    min: *const C,
    max: *const C,
    grad_scale: *const C,
    grad_offset: *const C,
    first: *mut C,
    second: *mut C,
    n: u64,
    grid: Grid<C>,
}

fn kernel<C: 'static>(function: &'static str) -> Kernel {
    let is_double = std::any::TypeId::of::<C>() == std::any::TypeId::of::<f64>();
    Kernel {
        file: "range.cu",
        function,
        functor: "",
        types: [if is_double { "double" } else { "float" }, "", ""],
        argument_bytes: size_of::<RangeArgs<C>>(),
    }
}

const FORWARD: &str = "range_to_scale_offset";
const BACKWARD: &str = "range_to_scale_offset_backward";

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    [FORWARD, BACKWARD]
        .into_iter()
        .flat_map(|function| [kernel::<f32>(function), kernel::<f64>(function)])
        .collect()
}

/// Scale and offset of `n` ranges (min and max).
///
/// # Safety
/// Every pointer is to device memory of `n` elements.
pub unsafe fn to_scale_offset<C: 'static>(
    launcher: &Launcher<'_>,
    grid: Grid<C>,
    n: u64,
    [min, max]: [*const C; 2],
    [first, second]: [*mut C; 2],
) -> Result<(), Failure> {
    let args = RangeArgs {
        min,
        max,
        grad_scale: std::ptr::null(),
        grad_offset: std::ptr::null(),
        first,
        second,
        n,
        grid,
    };
    // SAFETY: by the contract.
    unsafe { launcher.launch(&kernel::<C>(FORWARD), n.div_ceil(THREADS), &args) }
}

/// Gradients of min and max from those of scale and offset.
///
/// # Safety
/// Every pointer is to device memory of `n` elements.
pub unsafe fn to_scale_offset_backward<C: 'static>(
    launcher: &Launcher<'_>,
    grid: Grid<C>,
    n: u64,
    [min, max]: [*const C; 2],
    [grad_scale, grad_offset]: [*const C; 2],
    [first, second]: [*mut C; 2],
) -> Result<(), Failure> {
    let args = RangeArgs {
        min,
        max,
        grad_scale,
        grad_offset,
        first,
        second,
        n,
        grid,
    };
    // SAFETY: by the contract.
    unsafe { launcher.launch(&kernel::<C>(BACKWARD), n.div_ceil(THREADS), &args) }
}
