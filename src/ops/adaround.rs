//! AdaRound's ops: soft rounding, the rounding regularizer, one fused optimization step.

use super::ffi;
use crate::encoding::AffineGrid;
use crate::error::Result;
use tch::Tensor;

pub use crate::kernels::cpu::adaround::{GAMMA, ZETA};

/// Weights `x` rounded as `alpha` says \[nagel2020\]:
/// `(clamp(floor(x / scale) + h(alpha) - offset, qmin, qmax) + offset) * scale` with
/// `h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)`, or, unless `soft_rounding`, with 1 where
/// `alpha >= 0` and 0 elsewhere in place of `h`.
///
/// `alpha` has the shape and dtype of `x`; scale, offset and `block_size` are as for
/// [`quantize_dequantize`](super::quantize_dequantize). Differentiable in `alpha` alone.
///
/// # Errors
/// [`crate::Error::Value`] for shapes that do not fit, [`crate::Error::Type`] for dtypes.
pub fn adaround_quantize_dequantize(
    x: &Tensor,
    alpha: &Tensor,
    scale_offset: (&Tensor, &Tensor),
    grid: &AffineGrid,
    soft_rounding: bool,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    ffi::adaround_quantize_dequantize(x, alpha, scale_offset, grid, soft_rounding, block_size)
}

/// `sum(1 - |2 h(alpha) - 1|^beta)`: how far the rounding is from decided. A scalar, float32 (float64
/// for a float64 `alpha`); differentiable.
///
/// # Errors
/// [`crate::Error::Value`] for a `beta` below 1.
pub fn adaround_regularizer(alpha: &Tensor, beta: f64) -> Result<Tensor> {
    ffi::adaround_regularizer(alpha, beta)
}

/// What [`adaround_step`] updates in place; all of the weights' shape, dtype and layout.
#[derive(Debug)]
pub struct AdaroundState {
    /// Rounding variables.
    pub alpha: Tensor,
    /// Adam's running mean of the gradient; zeros at first.
    pub exp_avg: Tensor,
    /// Adam's running mean of the squared gradient; zeros at first.
    pub exp_avg_sq: Tensor,
    /// The weights, soft-rounded by `alpha`.
    pub output: Tensor,
}

/// Settings of one [`adaround_step`].
#[derive(Clone, Copy, Debug)]
pub struct AdaroundStep {
    /// Number of the step, from 1.
    pub step: i64,
    /// Adam's learning rate (decay rates 0.9 and 0.999).
    pub learning_rate: f64,
    /// Weight of the regularizer; 0 leaves it out.
    pub reg_param: f64,
    /// The regularizer's exponent.
    pub beta: f64,
}

/// One optimization step in one pass over the weights: the gradient with respect to `alpha` of the
/// reconstruction loss (whose gradient with respect to `state.output` is `grad`) plus the weighted
/// regularizer, Adam's update of `alpha`, and the new `state.output`.
///
/// # Errors
/// As [`adaround_quantize_dequantize`].
pub fn adaround_step(
    state: &mut AdaroundState,
    grad: &Tensor,
    x: &Tensor,
    (scale, offset): (&Tensor, &Tensor),
    grid: &AffineGrid,
    block_size: Option<&[i64]>,
    settings: AdaroundStep,
) -> Result<()> {
    let tensors = [
        &state.alpha,
        &state.exp_avg,
        &state.exp_avg_sq,
        &state.output,
        grad,
        x,
        scale,
        offset,
    ];
    ffi::adaround_step(
        tensors,
        grid,
        block_size,
        settings.step,
        settings.learning_rate,
        (settings.reg_param, settings.beta),
    )
}

/// The gradient of `factor / 2 * |f(output) - f(target)|^2` with respect to a layer's `output`, in its place;
/// `f` is ReLU if `relu`, else nothing.
///
/// `output` is contiguous, samples first. `samples` (int64) says which of the target's samples they are
/// compared with, so that nobody copies those out; `None`: all of them, in order.
///
/// # Errors
/// [`crate::Error::Value`] for shapes that do not fit, [`crate::Error::Type`] for dtypes.
pub fn reconstruction_gradient(
    output: &mut Tensor,
    target: &Tensor,
    samples: Option<&Tensor>,
    factor: f64,
    relu: bool,
) -> Result<()> {
    ffi::reconstruction_gradient(output, target, samples, factor, relu)
}
