//! The grouped-block op's side of the C boundary.

use super::{integers, slice, slice_mut, status, View, FLOAT64};
use crate::encoding::BlockGeometry;
use crate::error::Result;
use crate::kernels::cpu::{grouped_block, Compute};
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
    unsafe fn write<C: Compute>(
        scale: &View,
        shape: *const i64,
        levels: i64,
        output: *mut c_void,
        group_scale: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the contract.
        unsafe {
            let geometry = groups(scale, shape)?;
            let n = geometry.numel();
            let of_groups = grouped_block::forward::<C>(
                &geometry,
                levels,
                slice(scale.data, n),
                slice_mut(output, n),
            )?;
            slice_mut(group_scale, of_groups.len()).copy_from_slice(&of_groups);
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let scale = &*scale;
        if scale.dtype == FLOAT64 {
            write::<f64>(scale, shape, levels, output, group_scale)
        } else {
            write::<f32>(scale, shape, levels, output, group_scale)
        }
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
    unsafe fn write<C: Compute>(
        scale: &View,
        shape: *const i64,
        levels: i64,
        incoming: [*const c_void; 2],
        output: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the contract.
        unsafe {
            let geometry = groups(scale, shape)?;
            let n = geometry.numel();
            grouped_block::backward::<C>(
                &geometry,
                levels,
                slice(scale.data, n),
                slice(incoming[0], n),
                slice(incoming[1], geometry.num_groups()),
                slice_mut(output, n),
            )
        }
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let scale = &*scale;
        let incoming = [grad, grad_group];
        if scale.dtype == FLOAT64 {
            write::<f64>(scale, shape, levels, incoming, output)
        } else {
            write::<f32>(scale, shape, levels, incoming, output)
        }
    })
}
