//! The grouped-block op's side of the C boundary.

use super::{for_compute, integers, slice, slice_mut, status, View, FLOAT64};
use crate::encoding::BlockGeometry;
use crate::error::Result;
use crate::kernels::cpu::grouped_block;
use std::ffi::c_void;

/// Block scales, and the groups they are put in: how many along each dimension.
///
/// # Safety
/// As `csrc/engine.h` says; `scale` is contiguous, float32 or float64.
unsafe fn groups(scale: &View, shape: *const i64) -> Result<BlockGeometry> {
    // SAFETY: by the contract; there is one number for each dimension of the scale.
    unsafe {
        let shape = integers(shape, scale.ndim);
        scale.geometry(shape, Some(&vec![-1; shape.len()]))
    }
}

/// Block scales as multiples of their group's: `output` like `scale`, `group_scale` an array.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_grouped_block_scale(
    scale: *const View,
    shape: *const i64,
    levels: i64,
    output: *mut c_void,
    group_scale: *mut c_void,
) -> i32 {
    // SAFETY: by the contract.
    status(|| unsafe {
        let scale = &*scale;
        let geometry = groups(scale, shape)?;
        let n = geometry.numel();
        for_compute!(scale.dtype == FLOAT64, C => {
            let (scale, output) = (slice::<C>(scale.data, n), slice_mut(output, n));
            let of_groups = grouped_block::forward(&geometry, levels, scale, output)?;
            slice_mut(group_scale, of_groups.len()).copy_from_slice(&of_groups);
        });
        Ok(())
    })
}

/// The gradient of `rimet_grouped_block_scale` to the block scales.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_grouped_block_scale_backward(
    scale: *const View,
    shape: *const i64,
    levels: i64,
    grad: *const c_void,
    grad_group: *const c_void,
    output: *mut c_void,
) -> i32 {
    // SAFETY: by the contract.
    status(|| unsafe {
        let scale = &*scale;
        let geometry = groups(scale, shape)?;
        let n = geometry.numel();
        for_compute!(scale.dtype == FLOAT64, C => {
            let (scale, grad) = (slice::<C>(scale.data, n), slice(grad, n));
            let grad_group = slice(grad_group, geometry.num_groups());
            let output = slice_mut(output, n);
            grouped_block::backward(&geometry, levels, scale, grad, grad_group, output)
        })
    })
}
