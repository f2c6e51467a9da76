//! The kernels of the PTQ techniques: AdaRound's rounding and step, Sequential MSE's errors.

use super::{integers, status, Affine, View, BFLOAT16, FLOAT16, FLOAT32, FLOAT64};
use crate::encoding::BlockGeometry;
use crate::error::{Error, Result};
use crate::kernels::cpu::adaround::{self, StepSettings, StepTensors};
use crate::kernels::cpu::seq_mse::{row_sums, RowSum};
use crate::kernels::cpu::{Compute, Element, Transcendental};
use half::{bf16, f16};
use std::ffi::c_void;

/// Soft-rounds (or, if `soft` is 0, rounds) `input` by `alpha` into `output`.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_adaround_forward(
    affine: *const Affine,
    input: *const View,
    alpha: *const c_void,
    soft: i32,
    output: *mut c_void,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Transcendental>(
        affine: &Affine,
        input: &View,
        alpha: *const c_void,
        soft: bool,
        output: *mut c_void,
    ) -> Result<()> {
        let grid = affine.grid()?;
        // SAFETY: by the contract of the caller.
        unsafe {
            let geometry = affine.geometry(input)?;
            affine.with_encodings::<C, _>(&grid, geometry.num_groups(), |encodings| {
                adaround::forward::<T, C>(
                    &geometry,
                    encodings,
                    &grid,
                    soft,
                    input.data.cast::<T>(),
                    alpha.cast::<T>(),
                    output.cast::<T>(),
                );
            });
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let (affine, input) = (&*affine, &*input);
        for_types!(
            input.dtype,
            affine.double_compute,
            run(affine, input, alpha, soft != 0, output)
        )
    })
}

/// The gradient of the soft rounding with respect to `alpha`.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_adaround_backward(
    affine: *const Affine,
    input: *const View,
    alpha: *const c_void,
    grad: *const c_void,
    grad_alpha: *mut c_void,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Transcendental>(
        affine: &Affine,
        input: &View,
        alpha: *const c_void,
        grad: *const c_void,
        grad_alpha: *mut c_void,
    ) -> Result<()> {
        let grid = affine.grid()?;
        // SAFETY: by the contract of the caller.
        unsafe {
            let geometry = affine.geometry(input)?;
            affine.with_encodings::<C, _>(&grid, geometry.num_groups(), |encodings| {
                adaround::backward::<T, C>(
                    &geometry,
                    encodings,
                    &grid,
                    grad.cast::<T>(),
                    input.data.cast::<T>(),
                    alpha.cast::<T>(),
                    grad_alpha.cast::<T>(),
                );
            });
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let (affine, input) = (&*affine, &*input);
        for_types!(
            input.dtype,
            affine.double_compute,
            run(affine, input, alpha, grad, grad_alpha)
        )
    })
}

/// `sum(1 - |2 h(alpha) - 1|^beta)` over the `n` elements of a dense tensor.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_adaround_regularizer(
    alpha: *const c_void,
    dtype: i32,
    n: i64,
    beta: f64,
    result: *mut f64,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Transcendental>(
        alpha: *const c_void,
        n: usize,
        beta: f64,
        result: *mut f64,
    ) -> Result<()> {
        // SAFETY: by the contract of the caller.
        unsafe { result.write(adaround::regularizer::<T, C>(alpha.cast::<T>(), n, beta)) };
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe { for_types!(dtype, 0, run(alpha, n as usize, beta, result)) })
}

/// The gradient of `rimet_adaround_regularizer`, where `grad` comes in.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_adaround_regularizer_backward(
    alpha: *const c_void,
    dtype: i32,
    n: i64,
    beta: f64,
    grad: f64,
    grad_alpha: *mut c_void,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Transcendental>(
        alpha: *const c_void,
        n: usize,
        beta: f64,
        grad: f64,
        grad_alpha: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the contract of the caller.
        unsafe {
            adaround::regularizer_backward::<T, C>(
                alpha.cast::<T>(),
                n,
                beta,
                grad,
                grad_alpha.cast::<T>(),
            );
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe { for_types!(dtype, 0, run(alpha, n as usize, beta, grad, grad_alpha)) })
}

/// What one optimization step reads and writes beside the weights; twin of `RimetAdaroundStep`.
#[repr(C)]
pub struct AdaroundStep {
    alpha: *mut c_void,
    exp_avg: *mut c_void,
    exp_avg_sq: *mut c_void,
    output: *mut c_void,
    grad: *const c_void,
    step: i64,
    learning_rate: f64,
    reg_param: f64,
    beta: f64,
}

impl AdaroundStep {
    pub(in crate::kernels) fn settings(&self) -> StepSettings {
        StepSettings {
            step: self.step.max(1) as u64,
            learning_rate: self.learning_rate,
            reg_param: self.reg_param,
            beta: self.beta,
        }
    }

    /// The tensors of the step over these weights.
    pub(in crate::kernels) fn tensors<T>(&self, input: &View) -> StepTensors<T> {
        StepTensors {
            alpha: self.alpha.cast(),
            exp_avg: self.exp_avg.cast(),
            exp_avg_sq: self.exp_avg_sq.cast(),
            output: self.output.cast(),
            grad: self.grad.cast(),
            input: input.data.cast(),
        }
    }
}

/// What is summed along rows, by its number in `csrc/engine.h`.
pub(in crate::kernels) fn row_sum(kind: i32) -> Result<RowSum> {
    let found = usize::try_from(kind).ok().and_then(|k| RowSum::ALL.get(k));
    found
        .copied()
        .ok_or_else(|| Error::value("kind", "0, 1 or 2", kind.to_string()))
}

/// One step of AdaRound's optimization, in one pass.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_adaround_step(
    affine: *const Affine,
    input: *const View,
    step: *const AdaroundStep,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Transcendental>(
        affine: &Affine,
        input: &View,
        step: &AdaroundStep,
    ) -> Result<()> {
        let grid = affine.grid()?;
        let (settings, tensors) = (step.settings(), step.tensors::<T>(input));
        // SAFETY: by the contract of the caller.
        unsafe {
            let geometry: BlockGeometry = affine.geometry(input)?;
            affine.with_encodings::<C, _>(&grid, geometry.num_groups(), |encodings| {
                adaround::step::<T, C>(&geometry, encodings, &grid, &settings, tensors);
            });
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let (affine, input, step) = (&*affine, &*input, &*step);
        for_types!(input.dtype, affine.double_compute, run(affine, input, step))
    })
}

/// The gradient of `factor / 2 * |f(output) - f(target)|^2` with respect to `output`, in its place: `n` samples of
/// `len` elements, each with its number among the target's; `f` is ReLU if `relu`, else nothing.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_reconstruction_gradient(
    output: *mut c_void,
    target: *const c_void,
    dtype: i32,
    samples: *const i64,
    n: i64,
    len: i64,
    factor: f64,
    relu: i32,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Compute>(
        (output, target): (*mut c_void, *const c_void),
        samples: &[i64],
        len: usize,
        factor: f64,
        relu: bool,
    ) -> Result<()> {
        let (output, target) = (output.cast::<T>(), target.cast::<T>());
        // SAFETY: by the contract of the caller.
        unsafe {
            adaround::reconstruction_gradient::<T, C>(output, target, samples, len, factor, relu)
        };
        Ok(())
    }
    let tensors = (output, target);
    // SAFETY: by the contract.
    status(|| unsafe {
        let (samples, len) = (integers(samples, n), len.max(0) as usize);
        for_types!(dtype, 0, run(tensors, samples, len, factor, relu != 0))
    })
}

/// One sum per row of two contiguous arrays: of `(a - b)^2` (`kind` 0), `|a - b|` (1) or `a * b` (2).
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_row_sums(
    kind: i32,
    a: *const c_void,
    b: *const c_void,
    dtype: i32,
    rows: i64,
    columns: i64,
    sums: *mut f64,
) -> i32 {
    unsafe fn run<T: Element<C>, C: Compute>(
        kind: RowSum,
        a: *const c_void,
        b: *const c_void,
        size: (usize, usize),
        sums: *mut f64,
    ) -> Result<()> {
        // SAFETY: by the contract of the caller.
        unsafe {
            let found = row_sums::<T, C>(kind, a.cast::<T>(), b.cast::<T>(), size.0, size.1);
            std::ptr::copy_nonoverlapping(found.as_ptr(), sums, found.len());
        }
        Ok(())
    }
    let size = (rows.max(0) as usize, columns.max(0) as usize);
    // SAFETY: by the contract.
    status(|| unsafe {
        let kind = row_sum(kind)?;
        for_types!(dtype, 0, run(kind, a, b, size, sums))
    })
}
