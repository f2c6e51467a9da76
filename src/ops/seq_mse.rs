//! Sequential MSE's ops: errors of many candidates, read once.

use super::ffi;
use crate::error::Result;
use tch::Tensor;

/// Error of each row (along the last dimension) of `output` against `target`, or against zero:
/// `sum((output - target)^2)` for the loss `"mse"`, `sum(|output - target|)` for `"l1"`.
///
/// Terms in float32 (float64 for float64 tensors), summed in float64. The result is float64, of the
/// shape of `output` without its last dimension.
///
/// # Errors
/// [`crate::Error::Value`] for shapes that differ or another loss.
pub fn reconstruction_error(
    output: &Tensor,
    target: Option<&Tensor>,
    loss: &str,
) -> Result<Tensor> {
    ffi::reconstruction_error(output, target, loss)
}

/// Dot product of each row of `a` with the same row of `b`. Precision and shape as for
/// [`reconstruction_error`].
///
/// # Errors
/// [`crate::Error::Value`] for shapes that differ.
pub fn row_dot(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    ffi::row_dot(a, b)
}
