//! The weight's gradient of a convolution, which tch does not offer by itself.

use super::ffi;
use crate::error::Result;
use tch::Tensor;

/// Geometry of a convolution of any number of spatial dimensions; every list has one entry for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Convolution {
    pub stride: Vec<i64>,
    pub padding: Vec<i64>,
    pub dilation: Vec<i64>,
    /// Zeros unless `transposed`.
    pub output_padding: Vec<i64>,
    pub transposed: bool,
    pub groups: i64,
}

/// Gradient of `sum(grad * convolution(input, weight))` with respect to `weight`, in its shape.
///
/// # Errors
/// [`crate::Error::Value`] for lists of different lengths, [`crate::Error::State`] for what torch refuses.
pub fn convolution_weight_gradient(
    grad: &Tensor,
    input: &Tensor,
    weight: &Tensor,
    convolution: &Convolution,
) -> Result<Tensor> {
    ffi::convolution_weight_gradient(grad, input, weight, convolution)
}
