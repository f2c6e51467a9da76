//! Batch-norm folding: a batch normalization with fixed statistics is an affine map per channel, which the
//! layer before or behind it can do as well [jacob2018, section 3.2].
//!
//! With `scale = weight / sqrt(running_var + eps)` and `shift = bias - running_mean * scale`:
//!
//! - backward, the normalization follows the layer: `W' = scale[out] * W`, `b' = scale * b + shift`;
//! - forward, it precedes the layer: `W' = W * scale[in]`, `b' = b + sum over inputs and taps of W * shift[in]`.

use super::layer_parameters::{Channels, LayerParameters};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// Parameters and statistics of a batch normalization, each `[channels]`.
#[derive(Debug)]
pub struct BatchNorm {
    /// gamma; 1 where there is none.
    pub weight: Option<Tensor>,
    /// beta; 0 where there is none.
    pub bias: Option<Tensor>,
    pub running_mean: Tensor,
    pub running_var: Tensor,
    pub eps: f64,
}

impl BatchNorm {
    /// `(scale, shift)`, float64, `[channels]`: what the normalization does in evaluation mode.
    pub fn affine(&self) -> Result<(Tensor, Tensor)> {
        let scale = (self.running_var.f_to_kind(Kind::Double)? + self.eps)
            .f_sqrt()?
            .f_reciprocal()?;
        let scale = match &self.weight {
            Some(weight) => scale.f_mul(&weight.f_to_kind(Kind::Double)?)?,
            None => scale,
        };
        let shift = -self.running_mean.f_to_kind(Kind::Double)?.f_mul(&scale)?;
        let shift = match &self.bias {
            Some(bias) => shift.f_add(&bias.f_to_kind(Kind::Double)?)?,
            None => shift,
        };
        Ok((scale, shift))
    }
}

/// On which side of the normalization the layer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// layer, then normalization.
    Backward,
    /// normalization, then layer. Exact only if the layer pads nothing.
    Forward,
}

/// Weight and bias with which `layer` alone computes what it and `norm` compute together.
///
/// # Errors
/// [`Error::Value`] if the numbers of channels differ.
pub fn fold(
    layer: &LayerParameters,
    norm: &BatchNorm,
    direction: Direction,
) -> Result<(Tensor, Tensor)> {
    let expected = match direction {
        Direction::Backward => layer.out_channels(),
        Direction::Forward => layer.in_channels(),
    };
    let channels = norm.running_mean.size();
    if channels != [expected] {
        return Err(Error::value(
            "batch norm",
            format!("{expected} channels, as the layer has on that side"),
            format!("{channels:?}"),
        ));
    }
    let (scale, shift) = norm.affine()?;
    let (scale, shift) = (
        scale.f_to_device(layer.weight.device())?,
        shift.f_to_device(layer.weight.device())?,
    );
    let bias = layer.bias_or_zeros()?;
    let (side, bias) = match direction {
        Direction::Backward => (Channels::Output, bias.f_mul(&scale)?.f_add(&shift)?),
        Direction::Forward => (Channels::Input, bias.f_add(&layer.response(&shift)?)?),
    };
    let weight = layer.scaled(side, &scale)?;
    let kind = layer
        .bias
        .as_ref()
        .map_or(layer.weight.kind(), Tensor::kind);
    Ok((weight, bias.f_to_kind(kind)?))
}

/// `min` and `max` of a weight's quantizer once the weight has been multiplied by `scale` (shapes that
/// broadcast): the grid keeps its levels, so an integer weight stays what it was. Where `scale` is negative
/// the ends change places.
pub fn scale_range(min: &Tensor, max: &Tensor, scale: &Tensor) -> Result<(Tensor, Tensor)> {
    let ends =
        [min, max].map(|end| -> Result<Tensor> { Ok(end.f_to_kind(Kind::Double)?.f_mul(scale)?) });
    let [a, b] = ends;
    let (a, b) = (a?, b?);
    Ok((
        a.f_minimum(&b)?.f_to_kind(min.kind())?,
        a.f_maximum(&b)?.f_to_kind(max.kind())?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn norm(channels: i64) -> BatchNorm {
        BatchNorm {
            weight: Some(Tensor::randn([channels], OPTIONS)),
            bias: Some(Tensor::randn([channels], OPTIONS)),
            running_mean: Tensor::randn([channels], OPTIONS),
            running_var: Tensor::rand([channels], OPTIONS) + 0.1,
            eps: 1e-5,
        }
    }

    fn apply(norm: &BatchNorm, x: &Tensor) -> Tensor {
        x.batch_norm(
            norm.weight.as_ref(),
            norm.bias.as_ref(),
            Some(&norm.running_mean),
            Some(&norm.running_var),
            false,
            0.1,
            norm.eps,
            false,
        )
    }

    /// A convolution without padding: both directions are exact.
    #[test]
    fn folded_convolutions_compute_the_same() {
        for (transposed, groups, shape) in [
            (false, 1, [6, 4, 3, 2]),
            (false, 2, [6, 2, 3, 2]),
            (false, 4, [4, 1, 3, 2]),
            (true, 1, [4, 6, 3, 2]),
            (true, 2, [4, 3, 3, 2]),
        ] {
            let layer =
                LayerParameters::new(Tensor::randn(shape, OPTIONS), None, groups, transposed)
                    .unwrap();
            let x = Tensor::randn([2, 4, 7, 7], OPTIONS);
            let run = |x: &Tensor, w: &Tensor, b: Option<&Tensor>| {
                if transposed {
                    x.conv_transpose2d(w, b, 1, 0, 0, groups, 1)
                } else {
                    x.conv2d(w, b, 1, 0, 1, groups)
                }
            };
            let bn = norm(layer.out_channels());
            let (w, b) = fold(&layer, &bn, Direction::Backward).unwrap();
            let expected = apply(&bn, &run(&x, &layer.weight, None));
            assert!(run(&x, &w, Some(&b)).allclose(&expected, 1e-10, 1e-10, false));
            if transposed {
                continue; // at the border fewer taps meet the input, and the shift is not constant
            }
            let bn = norm(layer.in_channels());
            let (w, b) = fold(&layer, &bn, Direction::Forward).unwrap();
            let expected = run(&apply(&bn, &x), &layer.weight, None);
            assert!(run(&x, &w, Some(&b)).allclose(&expected, 1e-10, 1e-10, false));
        }
    }

    #[test]
    fn by_hand_without_gamma_and_beta() {
        let layer = LayerParameters::new(
            Tensor::from_slice(&[2.0_f32, 3.0]).reshape([1, 2]),
            Some(Tensor::from_slice(&[1.0_f32])),
            1,
            false,
        )
        .unwrap();
        let bn = BatchNorm {
            weight: None,
            bias: None,
            running_mean: Tensor::from_slice(&[5.0_f32]),
            running_var: Tensor::from_slice(&[3.0_f32]),
            eps: 1.0,
        };
        let (w, b) = fold(&layer, &bn, Direction::Backward).unwrap();
        assert_eq!(Vec::<f32>::try_from(w.reshape([2])).unwrap(), [1.0, 1.5]);
        assert_eq!(Vec::<f32>::try_from(b).unwrap(), [-2.0]);
        assert!(fold(&layer, &bn, Direction::Forward).is_err());
    }

    #[test]
    fn negative_factors_swap_the_ends_of_a_range() {
        let of = |v: f32| Tensor::from_slice(&[v]);
        let (min, max) = scale_range(&of(-1.0), &of(2.0), &of(-3.0)).unwrap();
        assert_eq!(Vec::<f32>::try_from(min).unwrap(), [-6.0]);
        assert_eq!(Vec::<f32>::try_from(max).unwrap(), [3.0]);
    }
}
