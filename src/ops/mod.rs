//! The ops for programs written in Rust, over [`tch::Tensor`].
//!
//! They go through torch's dispatcher, so gradients, CUDA tensors and autocast work as they do for
//! `torch.ops.rimet.*` in Python. Shapes, dtypes and block sizes follow `docs/architecture.md`; the
//! formulas are in `docs/numerics.md`.

mod adaround;
mod convolution;
mod ffi;
mod row_combinations;
mod seq_mse;

pub use adaround::{
    adaround_quantize_dequantize, adaround_regularizer, adaround_step, reconstruction_gradient,
    AdaroundState, AdaroundStep, GAMMA, ZETA,
};
pub use convolution::{convolution_weight_gradient, Convolution};
pub use row_combinations::RowCombinations;
pub use seq_mse::{reconstruction_error, row_dot};

use crate::encoding::AffineGrid;
use crate::error::Result;
use tch::Tensor;

/// `clamp(round(x / scale) - offset, qmin, qmax)`, in the dtype of `x`.
///
/// `scale` and `offset` have one shape, which broadcasts against `x`; with `block_size` (one entry per
/// dimension of `scale`, -1 for whatever divides) each entry serves a block.
///
/// # Errors
/// [`crate::Error::Value`] for shapes that do not fit, [`crate::Error::Type`] for dtypes that are not
/// floating point.
///
/// ```
/// use rimet::encoding::AffineGrid;
/// use tch::Tensor;
/// let grid = AffineGrid::from_bitwidth(8, true).unwrap();
/// let x = Tensor::from_slice(&[0.24_f32, 0.26, 100.0]);
/// let (scale, offset) = (Tensor::from(0.1_f32), Tensor::from(0.0_f32));
/// let q = rimet::ops::quantize(&x, &scale, &offset, &grid, None).unwrap();
/// assert_eq!(Vec::<f32>::try_from(q).unwrap(), [2.0, 3.0, 127.0]);
/// ```
pub fn quantize(
    x: &Tensor,
    scale: &Tensor,
    offset: &Tensor,
    grid: &AffineGrid,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    ffi::affine(
        ffi::Op::Quantize,
        x,
        scale,
        offset,
        Some(grid),
        None,
        block_size,
    )
}

/// `(x + offset) * scale`; the inverse of [`quantize`] on the grid. Arguments and errors as there.
pub fn dequantize(
    x: &Tensor,
    scale: &Tensor,
    offset: &Tensor,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    ffi::affine(
        ffi::Op::Dequantize,
        x,
        scale,
        offset,
        None,
        None,
        block_size,
    )
}

/// [`quantize`] and [`dequantize`] in one pass. Differentiable in `x`, `scale` and `offset`:
/// straight-through inside the grid.
pub fn quantize_dequantize(
    x: &Tensor,
    scale: &Tensor,
    offset: &Tensor,
    grid: &AffineGrid,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    ffi::affine(
        ffi::Op::QuantizeDequantize,
        x,
        scale,
        offset,
        Some(grid),
        None,
        block_size,
    )
}

/// [`quantize_dequantize`] from a range: scale and offset are computed from `min` and `max`
/// ([`range_to_scale_offset`]) inside the op. Differentiable in `x`, `min` and `max`.
pub fn quantize_dequantize_range(
    x: &Tensor,
    min: &Tensor,
    max: &Tensor,
    grid: &AffineGrid,
    symmetric: bool,
    block_size: Option<&[i64]>,
) -> Result<Tensor> {
    ffi::affine(
        ffi::Op::QuantizeDequantize,
        x,
        min,
        max,
        Some(grid),
        Some(symmetric),
        block_size,
    )
}

/// Scale and offset of the ranges `min..max`: `scale = max(|max - min| / num_steps, minimum_scale)`,
/// `offset = clamp(round(min / scale) - qmin, -qmax, -qmin)`, or the grid's constant if `symmetric`.
pub fn range_to_scale_offset(
    min: &Tensor,
    max: &Tensor,
    grid: &AffineGrid,
    symmetric: bool,
) -> Result<(Tensor, Tensor)> {
    ffi::range_to_scale_offset(min, max, grid, symmetric)
}

/// Smallest and largest element of each block; `shape` is the encoding's.
///
/// # Errors
/// [`crate::Error::Value`] for a tensor without elements, or shapes that do not fit.
pub fn min_max(x: &Tensor, shape: &[i64], block_size: Option<&[i64]>) -> Result<(Tensor, Tensor)> {
    ffi::min_max(x, shape, block_size)
}
