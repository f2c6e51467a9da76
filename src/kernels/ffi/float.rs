//! The float ops' side of the C boundary.

use super::{for_types, integers, slice, status, View};
use super::{BFLOAT16, FLOAT16, FLOAT32, FLOAT64};
use crate::encoding::{BlockGeometry, FloatFormat};
use crate::error::{Error, Result};
use crate::kernels::cpu::float::{self, FloatOp, FloatQuantize, FloatQuantizeDequantize};
use crate::kernels::cpu::{elementwise, Compute, Element};
use half::{bf16, f16};
use std::ffi::c_void;

/// How a tensor is quantized to a format. `scale` is a contiguous array of the compute type.
#[repr(C)]
pub struct Float {
    pub(in super::super) scale: *const c_void,
    encoding: *const i64,
    encoding_ndim: i64,
    block: *const i64,
    /// Negative: no block size.
    block_len: i64,
    exponent_bits: i64,
    mantissa_bits: i64,
    finite: i32,
    unsigned_zero: i32,
    /// 0: quantize, 1: quantize-dequantize.
    pub(in super::super) dequantize: i32,
    /// 0: float32, 1: float64.
    pub(in super::super) double_compute: i32,
}

impl Float {
    pub(in super::super) fn format(&self) -> Result<FloatFormat> {
        FloatFormat::new(
            self.exponent_bits,
            self.mantissa_bits,
            self.finite != 0,
            self.unsigned_zero != 0,
        )
    }

    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    pub(in super::super) unsafe fn geometry(&self, input: &View) -> Result<BlockGeometry> {
        // SAFETY: by the contract.
        unsafe {
            let encoding = integers(self.encoding, self.encoding_ndim);
            let block = (self.block_len >= 0).then(|| integers(self.block, self.block_len));
            input.geometry(encoding, block)
        }
    }
}

/// A format's largest value, the exponent of its smallest normal value, and whether float32 holds its
/// values.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_float_format(
    float: *const Float,
    max: *mut f64,
    min_exponent: *mut i32,
    fits_f32: *mut i32,
) -> i32 {
    // SAFETY: by the contract.
    status(|| unsafe {
        let format = (*float).format()?;
        max.write(format.max());
        min_exponent.write(format.min_exponent());
        fits_f32.write(i32::from(format.fits_f32()));
        Ok(())
    })
}

/// Quantizes `input` to a format into `output`, a tensor of the same dtype and layout, or `input` itself.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_float_forward(
    float: *const Float,
    input: *const View,
    output: *mut c_void,
) -> i32 {
    unsafe fn forward<T: Element<C>, C: Compute>(
        float: &Float,
        input: &View,
        output: *mut c_void,
    ) -> Result<()> {
        unsafe fn apply<O: FloatOp, T: Element<C>, C: Compute>(
            float: &Float,
            geometry: &BlockGeometry,
            format: &FloatFormat,
            input: *const T,
            output: *mut T,
        ) {
            // SAFETY: handed on.
            unsafe {
                let scale = slice::<C>(float.scale, geometry.num_groups());
                float::forward::<O, T, C>(geometry, scale, format, input, output);
            }
        }
        let format = float.format()?;
        // SAFETY: by the contract; `output` has the layout of `input`, which is dense.
        unsafe {
            let geometry = float.geometry(input)?;
            let (x, y) = (input.data.cast::<T>().cast_const(), output.cast::<T>());
            if float.dequantize != 0 {
                apply::<FloatQuantizeDequantize, T, C>(float, &geometry, &format, x, y);
            } else {
                apply::<FloatQuantize, T, C>(float, &geometry, &format, x, y);
            }
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let (float, input) = (&*float, &*input);
        for_types!(
            input.dtype,
            float.double_compute,
            forward(float, input, output)
        )
    })
}

/// The gradients of `rimet_float_forward`. Null pointers stand for gradients that are not wanted;
/// `grad_scale` is an array of the compute type.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_float_backward(
    float: *const Float,
    input: *const View,
    grad: *const c_void,
    grad_input: *mut c_void,
    grad_scale: *mut c_void,
) -> i32 {
    unsafe fn backward<T: Element<C>, C: Compute>(
        float: &Float,
        input: &View,
        grad: *const c_void,
        grad_input: *mut c_void,
        grad_scale: *mut c_void,
    ) -> Result<()> {
        let format = float.format()?;
        // SAFETY: by the contract; all tensors have the layout of `input`, which is dense.
        unsafe {
            let geometry = float.geometry(input)?;
            let scale = slice::<C>(float.scale, geometry.num_groups());
            let backward = if float.dequantize != 0 {
                float::backward::<FloatQuantizeDequantize, T, C>
            } else {
                float::backward::<FloatQuantize, T, C>
            };
            let sums = backward(
                &geometry,
                scale,
                &format,
                grad.cast(),
                input.data.cast::<T>().cast_const(),
                grad_input.cast(),
            );
            elementwise::write_sums::<C, 1>(&sums, &[grad_scale.cast()]);
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let (float, input) = (&*float, &*input);
        for_types!(
            input.dtype,
            float.double_compute,
            backward(float, input, grad, grad_input, grad_scale)
        )
    })
}

/// Checks format and block geometry without touching data (for the Meta key).
///
/// # Safety
/// As `csrc/engine.h` says; the data pointers are not read.
#[no_mangle]
pub unsafe extern "C" fn rimet_float_check(float: *const Float, input: *const View) -> i32 {
    // SAFETY: by the contract.
    status(|| unsafe {
        (*float).format()?;
        (*float).geometry(&*input).map(drop)
    })
}
