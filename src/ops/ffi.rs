//! Calls into `csrc/rust_api.cpp`.

use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::kernels::ffi::Affine;
use std::ffi::{c_char, CStr};
use tch::Tensor;
use torch_sys::C_tensor;

extern "C" {
    fn rimet_op_error() -> *const c_char;
    fn rimet_op_affine(
        affine: *const Affine,
        input: *const C_tensor,
        first: *const C_tensor,
        second: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_range_to_scale_offset(
        min: *const C_tensor,
        max: *const C_tensor,
        qmin: i64,
        qmax: i64,
        symmetric: i32,
        scale: *mut *mut C_tensor,
        offset: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_min_max(
        input: *const C_tensor,
        shape: *const i64,
        ndim: i64,
        block: *const i64,
        block_len: i64,
        min: *mut *mut C_tensor,
        max: *mut *mut C_tensor,
    ) -> i32;
}

/// Numbers as in `csrc/engine.h`.
#[derive(Clone, Copy)]
pub(super) enum Op {
    Quantize = 0,
    Dequantize = 1,
    QuantizeDequantize = 2,
}

/// The error of a failed call, from its message ("rimet::op: argument: expected e, got g").
fn check(status: i32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the string lives until this thread's next failure.
    let message = unsafe { CStr::from_ptr(rimet_op_error()) }
        .to_string_lossy()
        .into_owned();
    let parts = message
        .split_once(": expected ")
        .and_then(|(argument, rest)| rest.rsplit_once(", got ").map(|(e, g)| (argument, e, g)));
    Err(match (status, parts) {
        (1, Some((argument, expected, got))) => Error::value(argument, expected, got),
        (2, Some((argument, expected, got))) => Error::type_(argument, expected, got),
        _ => Error::State(message),
    })
}

/// # Safety
/// `pointer` owns a tensor.
unsafe fn own(pointer: *mut C_tensor) -> Tensor {
    // SAFETY: by the contract.
    unsafe { Tensor::from_ptr(pointer) }
}

pub(super) fn affine(
    op: Op,
    input: &Tensor,
    first: &Tensor,
    second: &Tensor,
    grid: Option<&AffineGrid>,
    symmetric_range: Option<bool>,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    let arguments = Affine::plain(op as i32, grid, symmetric_range, block_size);
    let mut output = std::ptr::null_mut();
    // SAFETY: the tensors are alive; `output` is written if the call succeeds.
    unsafe {
        check(rimet_op_affine(
            &arguments,
            input.as_ptr(),
            first.as_ptr(),
            second.as_ptr(),
            &mut output,
        ))?;
        Ok(own(output))
    }
}

pub(super) fn range_to_scale_offset(
    min: &Tensor,
    max: &Tensor,
    grid: &AffineGrid,
    symmetric: bool,
) -> Result<(Tensor, Tensor)> {
    let (mut scale, mut offset) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_range_to_scale_offset(
            min.as_ptr(),
            max.as_ptr(),
            grid.qmin(),
            grid.qmax(),
            i32::from(symmetric),
            &mut scale,
            &mut offset,
        ))?;
        Ok((own(scale), own(offset)))
    }
}

pub(super) fn min_max(
    input: &Tensor,
    shape: &[i64],
    block_size: Option<&[i64]>,
) -> Result<(Tensor, Tensor)> {
    let (mut min, mut max) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_min_max(
            input.as_ptr(),
            shape.as_ptr(),
            shape.len() as i64,
            block_size.map_or(std::ptr::null(), <[i64]>::as_ptr),
            block_size.map_or(-1, |b| b.len() as i64),
            &mut min,
            &mut max,
        ))?;
        Ok((own(min), own(max)))
    }
}
