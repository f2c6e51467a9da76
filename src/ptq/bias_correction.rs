//! Bias correction: quantizing a weight shifts the mean of what its layer puts out; the bias takes the shift
//! back [nagel2019, section 4.2].
//!
//! With `e = W_q - W` the shift of output channel `o` is `sum over inputs and taps of e * E[x]`. Analytic: `E[x]`
//! follows from the batch normalization (and activation) in front. Empirical: the shift is the difference of
//! mean outputs on data, activation quantization included.

use super::LayerParameters;
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// What stands between a batch normalization and the layer behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Identity,
    Relu,
    Relu6,
}

/// `E[f(x)]` for `x` normal with mean `beta` and standard deviation `|gamma|`: what a batch normalization and an
/// activation put out on average. float64, `[channels]`.
///
/// For clipping to `[a, b]`, with `A = (a - beta) / |gamma|` and `B` alike:
/// `|gamma| (phi(A) - phi(B)) + beta (Phi(B) - Phi(A)) + a Phi(A) + b (1 - Phi(B))` [nagel2019, appendix C].
pub fn expected_activation(
    gamma: &Tensor,
    beta: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let mean = beta.f_to_kind(Kind::Double)?;
    let spread = gamma.f_to_kind(Kind::Double)?.f_abs()?;
    let upper = match activation {
        Activation::Identity => return Ok(mean),
        Activation::Relu => f64::INFINITY,
        Activation::Relu6 => 6.0,
    };
    // A constant channel has no density; its value is set below.
    let constant = spread.f_eq(0.0)?;
    let spread = spread.f_masked_fill(&constant, 1.0)?;
    let density = |x: &Tensor| -> Result<Tensor> {
        let root = (2.0 * std::f64::consts::PI).sqrt();
        Ok((x.f_square()? * -0.5).f_exp()? / root)
    };
    let cumulative = |x: &Tensor| -> Result<Tensor> {
        Ok(((x / std::f64::consts::SQRT_2).f_erf()? + 1.0) * 0.5)
    };
    let low = mean.f_neg()?.f_div(&spread)?;
    let mut expected = &spread * density(&low)? + &mean * (1.0 - cumulative(&low)?);
    if upper.is_finite() {
        let high = (upper - &mean).f_div(&spread)?;
        let above = 1.0 - cumulative(&high)?;
        expected = expected - &spread * density(&high)? + (upper - &mean) * above;
    }
    Ok(mean
        .f_clamp(0.0, upper)?
        .f_where_self(&constant, &expected)?)
}

/// The bias with which `layer`, its weight replaced by `quantized`, puts out the same mean as before, if
/// its inputs have the means `input`, `[in_channels]`. Zero padding is not taken into account.
///
/// # Errors
/// [`Error::Value`] if shapes differ.
pub fn analytic(layer: &LayerParameters, quantized: &Tensor, input: &Tensor) -> Result<Tensor> {
    if quantized.size() != layer.weight.size() || input.size() != [layer.in_channels()] {
        return Err(Error::value(
            "conv_bn_dict",
            format!(
                "a quantized weight of shape {:?} and {} input channels",
                layer.weight.size(),
                layer.in_channels()
            ),
            format!("{:?} and {:?}", quantized.size(), input.size()),
        ));
    }
    let noise = LayerParameters::new(
        quantized.f_to_kind(Kind::Double)?.f_sub(&layer.weight)?,
        None,
        layer.groups,
        layer.transposed,
    )?;
    corrected(layer, &noise.response(input)?)
}

/// The bias that takes a `shift` of the mean output, `[out_channels]`, back.
///
/// # Errors
/// [`Error::Value`] if shapes differ.
pub fn corrected(layer: &LayerParameters, shift: &Tensor) -> Result<Tensor> {
    if shift.size() != [layer.out_channels()] {
        return Err(Error::value(
            "shift",
            format!("{} output channels", layer.out_channels()),
            format!("{:?}", shift.size()),
        ));
    }
    let kind = layer
        .bias
        .as_ref()
        .map_or(layer.weight.kind(), Tensor::kind);
    Ok(layer
        .bias_or_zeros()?
        .f_sub(&shift.f_to_kind(Kind::Double)?)?
        .f_to_kind(kind)?)
}

/// Mean of each channel over any number of tensors, in float64.
#[derive(Debug, Default)]
pub struct ChannelMean {
    sums: Vec<f64>,
    count: i64,
}

impl ChannelMean {
    /// Takes in a tensor whose channels are in dimension `dim`.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such dimension, or the channels differ from what came before.
    pub fn update(&mut self, tensor: &Tensor, dim: i64) -> Result<()> {
        let size = tensor.size();
        let rank = size.len() as i64;
        if dim < -rank || dim >= rank {
            return Err(Error::value("dim", format!("a dimension of {size:?}"), dim));
        }
        let dim = dim.rem_euclid(rank);
        let others: Vec<i64> = (0..rank).filter(|&d| d != dim).collect();
        let sum = if others.is_empty() {
            tensor.f_to_kind(Kind::Double)?
        } else {
            tensor.f_sum_dim_intlist(others.as_slice(), false, Kind::Double)?
        };
        let sums = Vec::<f64>::try_from(sum)?;
        if self.sums.is_empty() {
            self.sums = vec![0.0; sums.len()];
        }
        if self.sums.len() != sums.len() {
            return Err(Error::value(
                "tensor",
                format!("{} channels, as before", self.sums.len()),
                sums.len(),
            ));
        }
        for (total, sum) in self.sums.iter_mut().zip(sums) {
            *total += sum;
        }
        self.count += others.iter().map(|&d| size[d as usize]).product::<i64>();
        Ok(())
    }

    /// The mean so far, `[channels]`, on the CPU.
    ///
    /// # Errors
    /// [`Error::State`] before any data.
    pub fn mean(&self) -> Result<Tensor> {
        if self.count == 0 {
            return Err(Error::State("mean of a channel: no data".to_owned()));
        }
        Ok(Tensor::f_from_slice(&self.sums)? / self.count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// Against the integral of the clipped value over the density.
    #[test]
    fn expectations_of_clipped_normals() {
        let gamma = Tensor::from_slice(&[1.0, -0.5, 3.0, 2.0]);
        let beta = Tensor::from_slice(&[0.0, 1.0, -2.0, 7.0]);
        let z = Tensor::linspace(-12.0, 12.0, 200_001, OPTIONS);
        let weight = (z.square() * -0.5).exp();
        let weight = &weight / weight.sum(Kind::Double);
        let x = gamma.abs().unsqueeze(1) * &z + beta.unsqueeze(1);
        for (activation, high) in [(Activation::Relu, f64::INFINITY), (Activation::Relu6, 6.0)] {
            let expected = (x.clamp(0.0, high) * &weight).sum_dim_intlist(1, false, Kind::Double);
            let found = expected_activation(&gamma, &beta, activation).unwrap();
            // The error of the sum is of the order of its step squared, 1e-8.
            assert!(
                found.allclose(&expected, 1e-7, 1e-7, false),
                "{activation:?}"
            );
        }
        let constant = Tensor::zeros([4], OPTIONS);
        let found = expected_activation(&constant, &beta, Activation::Relu6).unwrap();
        assert_eq!(Vec::<f64>::try_from(found).unwrap(), [0.0, 1.0, 0.0, 6.0]);
        let found = expected_activation(&gamma, &beta, Activation::Identity).unwrap();
        assert!(found.equal(&beta));
    }

    #[test]
    fn analytic_correction_restores_the_mean() {
        let bias = Tensor::randn([6], OPTIONS);
        let weight = Tensor::randn([6, 2, 3, 3], OPTIONS);
        let quantized = (&weight * 2.0).round() / 2.0;
        let layer = LayerParameters::new(weight, Some(bias.shallow_clone()), 2, false).unwrap();
        let x = Tensor::randn([4, 4, 9, 9], OPTIONS);
        // The mean that every tap sees is that of the whole only for constant channels.
        let means = x.mean_dim([0_i64, 2, 3].as_slice(), true, Kind::Double);
        let x = means.expand([4, 4, 9, 9], true);
        let corrected = analytic(&layer, &quantized, &means.flatten(0, -1)).unwrap();
        let mut before = ChannelMean::default();
        before
            .update(&x.conv2d(&layer.weight, Some(&bias), 1, 0, 1, 2), 1)
            .unwrap();
        let mut after = ChannelMean::default();
        after
            .update(&x.conv2d(&quantized, Some(&corrected), 1, 0, 1, 2), 1)
            .unwrap();
        let (before, after) = (before.mean().unwrap(), after.mean().unwrap());
        assert!(after.allclose(&before, 1e-10, 1e-10, false));
        assert!(analytic(&layer, &quantized, &Tensor::zeros([3], OPTIONS)).is_err());
        assert!(self::corrected(&layer, &Tensor::zeros([3], OPTIONS)).is_err());
    }

    #[test]
    fn means_of_uneven_batches() {
        let mut mean = ChannelMean::default();
        assert!(mean.mean().is_err());
        let x = Tensor::randn([5, 3, 2], OPTIONS);
        mean.update(&x.narrow(0, 0, 4), 1).unwrap();
        mean.update(&x.narrow(0, 4, 1), -2).unwrap();
        let expected = x.mean_dim([0_i64, 2].as_slice(), false, Kind::Double);
        assert!(mean
            .mean()
            .unwrap()
            .allclose(&expected, 1e-12, 1e-12, false));
        assert!(mean.update(&x, 2).is_err() && mean.update(&x, 3).is_err());
    }
}
