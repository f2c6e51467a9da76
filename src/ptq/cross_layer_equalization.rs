//! Cross-layer equalization and high-bias absorption [nagel2019, sections 4.1.1 and 4.1.3].
//!
//! Where only positively homogeneous functions stand between two layers, dividing the output channels of the
//! first by `s > 0` and multiplying the input channels of the second by it changes nothing. Channel by
//! channel, `s` is chosen so that the ranges of all layers become equal: with `r_k` the largest magnitude of
//! the channel's weights in layer `k` of `n` and `m = (r_1 ... r_n)^(1/n)`, the factor between the layers `k`
//! and `k + 1` is `s_k = r_1 ... r_k / m^k`. For two layers that is `sqrt(r_1 r_2) / r_2`.

use super::layer_parameters::{Channels, LayerParameters};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// Layers with one another's channels equalized, and the factors.
#[derive(Debug)]
pub struct Equalized {
    /// Weight and bias of each layer, `last` at the end.
    pub layers: Vec<(Tensor, Option<Tensor>)>,
    /// `s_k`, float64, `[channels]`: one for each layer of `chain`.
    pub factors: Vec<Tensor>,
}

/// Equalizes the layers of `chain`, each feeding the next, and the layers `last`, all fed by the end of the
/// chain. All layers of the chain but the first are depthwise. A channel with a range of 0 anywhere (or
/// without a finite one) keeps its scale.
///
/// # Errors
/// [`Error::Value`] for an empty chain or `last`, channels that do not fit, or a layer in the middle that is not
/// depthwise.
pub fn equalize(chain: &[LayerParameters], last: &[LayerParameters]) -> Result<Equalized> {
    let (Some(first), false) = (chain.first(), last.is_empty()) else {
        return Err(Error::value(
            "cls_set",
            "at least two layers",
            chain.len() + last.len(),
        ));
    };
    let channels = first.out_channels();
    for layer in &chain[1..] {
        if !layer.is_depthwise() || layer.in_channels() != channels {
            return Err(Error::value(
                "cls_set",
                format!("a depthwise layer of {channels} channels between the first and the last"),
                format!(
                    "weight {:?} in {} groups",
                    layer.weight.size(),
                    layer.groups
                ),
            ));
        }
    }
    if let Some(layer) = last.iter().find(|l| l.in_channels() != channels) {
        return Err(Error::value(
            "cls_set",
            format!("a last layer of {channels} input channels, as the first one puts out"),
            layer.in_channels(),
        ));
    }

    let mut ranges = Vec::with_capacity(chain.len() + 1);
    for layer in chain {
        ranges.push(layer.range(Channels::Output)?);
    }
    let mut of_last = last[0].range(Channels::Input)?;
    for layer in &last[1..] {
        of_last = of_last.f_maximum(&layer.range(Channels::Input)?)?;
    }
    ranges.push(of_last);
    // The mean of logarithms: a product would overflow before the ranges do.
    let logarithms = Tensor::f_stack(&ranges, 0)?.f_log()?;
    let mean = logarithms.f_mean_dim([0_i64].as_slice(), false, Kind::Double)?;
    let usable = logarithms.f_isfinite()?.f_all_dim(0, false)?;
    let above_mean = logarithms.f_sub(&mean)?.f_cumsum(0, Kind::Double)?;
    let one = Tensor::f_ones([channels], (Kind::Double, above_mean.device()))?;
    let mut factors = Vec::with_capacity(chain.len());
    for k in 0..chain.len() as i64 {
        factors.push(above_mean.f_get(k)?.f_exp()?.f_where_self(&usable, &one)?);
    }

    let mut layers = Vec::with_capacity(chain.len() + last.len());
    let mut before: Option<&Tensor> = None;
    for (layer, factor) in chain.iter().zip(&factors) {
        let down = factor.f_reciprocal()?;
        let scale = match before {
            Some(before) => down.f_mul(before)?,
            None => down.shallow_clone(),
        };
        let weight = layer.scaled(Channels::Output, &scale)?;
        let bias = match &layer.bias {
            Some(bias) => Some(
                bias.f_to_kind(Kind::Double)?
                    .f_mul(&down)?
                    .f_to_kind(bias.kind())?,
            ),
            None => None,
        };
        layers.push((weight, bias));
        before = Some(factor);
    }
    for layer in last {
        let weight = layer.scaled(Channels::Input, &factors[factors.len() - 1])?;
        layers.push((weight, layer.bias.as_ref().map(Tensor::shallow_clone)));
    }
    Ok(Equalized { layers, factors })
}

/// The biases of two layers after the part of the first one's output that is (almost) always there has moved
/// into the second one's bias.
///
/// The output of `first` before the activation has, by the batch normalization once folded into it, the mean
/// `beta` and the standard deviation `gamma`, both divided by `factor` since. Behind a ReLU the part
/// `max(0, beta - 3 |gamma|)` passes unchanged with a probability of 99.9% and is moved; without activation
/// all of `beta` is. Where `second` pads its input with zeros, its border changes.
///
/// # Errors
/// [`Error::Value`] if a bias is missing or channels do not fit.
pub fn absorb_high_bias(
    first: &LayerParameters,
    second: &LayerParameters,
    (gamma, beta): (&Tensor, &Tensor),
    factor: &Tensor,
    activation: bool,
) -> Result<(Tensor, Tensor)> {
    let (Some(bias1), Some(bias2)) = (&first.bias, &second.bias) else {
        return Err(Error::value("cls_set_info", "layers with a bias", "none"));
    };
    let channels = first.out_channels();
    for (name, tensor) in [("batch norm", beta), ("scale_factor", factor)] {
        if tensor.size() != [channels] || second.in_channels() != channels {
            return Err(Error::value(
                name,
                format!("{channels} channels, as the first layer puts out"),
                format!(
                    "shape {:?}, second layer of {} input channels",
                    tensor.size(),
                    second.in_channels()
                ),
            ));
        }
    }
    let factor = factor.f_to_kind(Kind::Double)?.f_to_device(beta.device())?;
    let beta = beta.f_to_kind(Kind::Double)?.f_div(&factor)?;
    let absorbed = if activation {
        let spread = gamma.f_to_kind(Kind::Double)?.f_div(&factor)?.f_abs()?;
        beta.f_sub(&(spread * 3.0))?.f_clamp_min(0.0)?
    } else {
        beta
    };
    let moved = |bias: &Tensor, by: &Tensor| -> Result<Tensor> {
        Ok(bias
            .f_to_kind(Kind::Double)?
            .f_add(by)?
            .f_to_kind(bias.kind())?)
    };
    Ok((
        moved(bias1, &absorbed.f_neg()?)?,
        moved(bias2, &second.response(&absorbed)?)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn layer(shape: &[i64], groups: i64) -> LayerParameters {
        let bias = Tensor::randn([shape[0]], OPTIONS);
        LayerParameters::new(Tensor::randn(shape, OPTIONS), Some(bias), groups, false).unwrap()
    }

    fn run(layers: &[(Tensor, Option<Tensor>)], groups: &[i64], x: &Tensor) -> Tensor {
        let mut x = x.shallow_clone();
        for (i, ((weight, bias), groups)) in layers.iter().zip(groups).enumerate() {
            x = if i == 0 { x } else { x.relu() };
            x = x.conv2d(weight, bias.as_ref(), 1, 1, 1, *groups);
        }
        x
    }

    #[test]
    fn by_hand() {
        let of = |w: &[f64], shape: [i64; 2]| {
            LayerParameters::new(Tensor::from_slice(w).reshape(shape), None, 1, false).unwrap()
        };
        // Ranges 8 and 2 in channel 0, 1 and 4 in channel 1, 0 and 1 in channel 2.
        let first = of(&[8.0, -1.0, 0.0], [3, 1]);
        let last = of(&[2.0, -4.0, 1.0], [1, 3]);
        let done = equalize(&[first], &[last]).unwrap();
        assert!(done.factors[0].allclose(&Tensor::from_slice(&[2.0, 0.5, 1.0]), 1e-14, 0.0, false));
        let weight = Tensor::from_slice(&[4.0, -2.0, 0.0]);
        assert!(done.layers[0]
            .0
            .reshape([3])
            .allclose(&weight, 1e-14, 0.0, false));
    }

    #[test]
    fn depthwise_chains_keep_their_function_and_equalize_ranges() {
        let groups = [1, 5, 1];
        let layers = [
            layer(&[5, 3, 3, 3], 1),
            layer(&[5, 1, 3, 3], 5),
            layer(&[2, 5, 3, 3], 1),
        ];
        let x = Tensor::randn([1, 3, 8, 8], OPTIONS);
        let before: Vec<_> = layers
            .iter()
            .map(|l| (l.weight.copy(), l.bias.as_ref().map(Tensor::copy)))
            .collect();
        let done = equalize(&layers[..2], &layers[2..]).unwrap();
        let expected = run(&before, &groups, &x);
        assert!(run(&done.layers, &groups, &x).allclose(&expected, 1e-10, 1e-10, false));
        let mut ranges = Vec::new();
        for ((weight, _), (groups, side)) in done.layers.into_iter().zip([
            (1, Channels::Output),
            (5, Channels::Output),
            (1, Channels::Input),
        ]) {
            ranges.push(
                LayerParameters::new(weight, None, groups, false)
                    .unwrap()
                    .range(side)
                    .unwrap(),
            );
        }
        assert!(ranges[0].allclose(&ranges[1], 1e-10, 0.0, false));
        assert!(ranges[1].allclose(&ranges[2], 1e-10, 0.0, false));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, b) = (layer(&[4, 3, 1, 1], 1), layer(&[2, 5, 1, 1], 1));
        assert!(equalize(&[a], &[b]).is_err());
        let chain = [layer(&[4, 3, 1, 1], 1), layer(&[4, 4, 1, 1], 1)];
        assert!(equalize(&chain, &[layer(&[2, 4, 1, 1], 1)]).is_err());
        assert!(equalize(&chain[..1], &[]).is_err());
    }

    #[test]
    fn absorbed_bias_changes_nothing_without_padding_and_clipping() {
        let (first, second) = (layer(&[4, 3, 1, 1], 1), layer(&[2, 4, 3, 3], 1));
        let gamma = Tensor::from_slice(&[0.1, -0.1, 0.2, 1.0]);
        let beta = Tensor::from_slice(&[2.0, 1.0, -3.0, 1.0]);
        let factor = Tensor::from_slice(&[1.0, 2.0, 1.0, 0.5]);
        let (b1, b2) = absorb_high_bias(&first, &second, (&gamma, &beta), &factor, true).unwrap();
        let moved = first.bias.as_ref().unwrap() - &b1;
        assert!(moved.allclose(
            &Tensor::from_slice(&[1.7, 0.35, 0.0, 0.0]),
            1e-12,
            1e-12,
            false
        ));
        let x = Tensor::randn([1, 3, 6, 6], OPTIONS);
        let (b1n, b2n) =
            absorb_high_bias(&first, &second, (&gamma, &beta), &factor, false).unwrap();
        let run = |b1: &Tensor, b2: &Tensor| {
            let hidden = x.conv2d(&first.weight, Some(b1), 1, 0, 1, 1);
            hidden.conv2d(&second.weight, Some(b2), 1, 0, 1, 1)
        };
        let expected = run(first.bias.as_ref().unwrap(), second.bias.as_ref().unwrap());
        assert!(run(&b1, &b2).allclose(&expected, 1e-10, 1e-10, false));
        assert!(run(&b1n, &b2n).allclose(&expected, 1e-10, 1e-10, false));
    }
}
