//! Calls into `csrc/rust_api.cpp`.

use super::Convolution;
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::kernels::ffi::Affine;
use std::ffi::{c_char, CStr, CString};
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
    fn rimet_op_adaround_quantize_dequantize(
        affine: *const Affine,
        input: *const C_tensor,
        alpha: *const C_tensor,
        scale: *const C_tensor,
        offset: *const C_tensor,
        soft_rounding: i32,
        output: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_adaround_regularizer(
        alpha: *const C_tensor,
        beta: f64,
        output: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_adaround_step(
        affine: *const Affine,
        tensors: *const *mut C_tensor,
        step: i64,
        learning_rate: f64,
        reg_param: f64,
        beta: f64,
    ) -> i32;
    fn rimet_op_reconstruction_gradient(
        output: *mut C_tensor,
        target: *const C_tensor,
        samples: *const C_tensor,
        factor: f64,
        relu: i32,
    ) -> i32;
    fn rimet_op_convolution_weight_gradient(
        grad: *const C_tensor,
        input: *const C_tensor,
        weight: *const C_tensor,
        stride: *const i64,
        padding: *const i64,
        dilation: *const i64,
        output_padding: *const i64,
        dims: i64,
        transposed: i32,
        groups: i64,
        grad_weight: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_reconstruction_error(
        output: *const C_tensor,
        target: *const C_tensor,
        loss: *const c_char,
        errors: *mut *mut C_tensor,
    ) -> i32;
    fn rimet_op_row_dot(a: *const C_tensor, b: *const C_tensor, dots: *mut *mut C_tensor) -> i32;
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

/// Number of the affine op whose grid the AdaRound ops share.
const GRID_OP: i32 = Op::QuantizeDequantize as i32;

pub(super) fn adaround_quantize_dequantize(
    input: &Tensor,
    alpha: &Tensor,
    (scale, offset): (&Tensor, &Tensor),
    grid: &AffineGrid,
    soft_rounding: bool,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    let arguments = Affine::plain(GRID_OP, Some(grid), None, block_size);
    let mut output = std::ptr::null_mut();
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_adaround_quantize_dequantize(
            &arguments,
            input.as_ptr(),
            alpha.as_ptr(),
            scale.as_ptr(),
            offset.as_ptr(),
            i32::from(soft_rounding),
            &mut output,
        ))?;
        Ok(own(output))
    }
}

pub(super) fn adaround_regularizer(alpha: &Tensor, beta: f64) -> Result<Tensor> {
    let mut output = std::ptr::null_mut();
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_adaround_regularizer(
            alpha.as_ptr(),
            beta,
            &mut output,
        ))?;
        Ok(own(output))
    }
}

pub(super) fn adaround_step(
    tensors: [&Tensor; 8],
    grid: &AffineGrid,
    block_size: Option<&[i64]>,
    step: i64,
    learning_rate: f64,
    (reg_param, beta): (f64, f64),
) -> Result<()> {
    let arguments = Affine::plain(GRID_OP, Some(grid), None, block_size);
    let tensors = tensors.map(|t| t.as_ptr().cast_mut());
    // SAFETY: the tensors are alive; the op writes the first four in place, which the caller of
    // `adaround_step` owns mutably.
    check(unsafe {
        rimet_op_adaround_step(
            &arguments,
            tensors.as_ptr(),
            step,
            learning_rate,
            reg_param,
            beta,
        )
    })
}

pub(super) fn reconstruction_gradient(
    output: &mut Tensor,
    target: &Tensor,
    samples: Option<&Tensor>,
    factor: f64,
    relu: bool,
) -> Result<()> {
    // SAFETY: the tensors are alive; the op writes the first in place.
    check(unsafe {
        rimet_op_reconstruction_gradient(
            output.as_mut_ptr(),
            target.as_ptr(),
            samples.map_or(std::ptr::null(), Tensor::as_ptr),
            factor,
            i32::from(relu),
        )
    })
}

pub(super) fn convolution_weight_gradient(
    grad: &Tensor,
    input: &Tensor,
    weight: &Tensor,
    convolution: &Convolution,
) -> Result<Tensor> {
    let dims = convolution.stride.len();
    for list in [
        &convolution.padding,
        &convolution.dilation,
        &convolution.output_padding,
    ] {
        if list.len() != dims {
            return Err(Error::value(
                "padding, dilation, output_padding",
                format!("{dims} entries, as stride"),
                format!("{list:?}"),
            ));
        }
    }
    let mut grad_weight = std::ptr::null_mut();
    // SAFETY: as in `affine`; every list has `dims` entries.
    unsafe {
        check(rimet_op_convolution_weight_gradient(
            grad.as_ptr(),
            input.as_ptr(),
            weight.as_ptr(),
            convolution.stride.as_ptr(),
            convolution.padding.as_ptr(),
            convolution.dilation.as_ptr(),
            convolution.output_padding.as_ptr(),
            dims as i64,
            i32::from(convolution.transposed),
            convolution.groups,
            &mut grad_weight,
        ))?;
        Ok(own(grad_weight))
    }
}

pub(super) fn reconstruction_error(
    output: &Tensor,
    target: Option<&Tensor>,
    loss: &str,
) -> Result<Tensor> {
    let loss =
        CString::new(loss).map_err(|_| Error::value("loss", "a word", format!("{loss:?}")))?;
    let mut errors = std::ptr::null_mut();
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_reconstruction_error(
            output.as_ptr(),
            target.map_or(std::ptr::null(), Tensor::as_ptr),
            loss.as_ptr(),
            &mut errors,
        ))?;
        Ok(own(errors))
    }
}

pub(super) fn row_dot(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut dots = std::ptr::null_mut();
    // SAFETY: as in `affine`.
    unsafe {
        check(rimet_op_row_dot(a.as_ptr(), b.as_ptr(), &mut dots))?;
        Ok(own(dots))
    }
}
