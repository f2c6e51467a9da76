//! Parameters of convolutions and linear layers under one view. Their geometry is a [`LinearMap`](super::linear_map::LinearMap).

use crate::error::{Error, Result};
use crate::ops;
use tch::{Kind, Tensor};

/// Elements that are worked on at a time.
const CHUNK: i64 = 1 << 16;

/// The channels on one side of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channels {
    Input,
    Output,
}

/// Parameters of a convolution (1d, 2d, 3d), a transposed convolution or a linear layer.
#[derive(Debug)]
pub struct LayerParameters {
    /// `[out_channels, in_channels / groups, ...]`; `[in_channels, out_channels / groups, ...]` if transposed.
    pub weight: Tensor,
    /// `[out_channels]`.
    pub bias: Option<Tensor>,
    pub groups: i64,
    pub transposed: bool,
}

impl LayerParameters {
    /// Checks that the groups divide the channels.
    ///
    /// # Errors
    /// [`Error::Value`] if the weight has fewer than two dimensions, or the groups do not divide its first.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        groups: i64,
        transposed: bool,
    ) -> Result<Self> {
        let size = weight.size();
        if size.len() < 2 || groups < 1 || size[0] % groups != 0 {
            return Err(Error::value(
                "weight",
                format!(
                    "at least two dimensions, the first a multiple of the number of groups, {groups}"
                ),
                format!("shape {size:?}"),
            ));
        }
        Ok(LayerParameters {
            weight,
            bias,
            groups,
            transposed,
        })
    }

    pub fn out_channels(&self) -> i64 {
        let size = self.weight.size();
        if self.transposed {
            size[1] * self.groups
        } else {
            size[0]
        }
    }

    pub fn in_channels(&self) -> i64 {
        let size = self.weight.size();
        if self.transposed {
            size[0]
        } else {
            size[1] * self.groups
        }
    }

    /// One channel in, one out, for each group.
    pub fn is_depthwise(&self) -> bool {
        self.groups == self.in_channels() && self.groups == self.out_channels()
    }

    /// The weight as `[groups, out_channels / groups, in_channels / groups, taps]`, whatever the kind of layer.
    pub(super) fn grouped(&self) -> Result<Tensor> {
        let size = self.weight.size();
        let view = self.weight.f_reshape([
            self.groups,
            size[0] / self.groups,
            size[1],
            size[2..].iter().product(),
        ])?;
        Ok(if self.transposed {
            view.f_transpose(1, 2)?
        } else {
            view
        })
    }

    /// Largest magnitude among the weights of each channel, float64: `[out_channels]` or `[in_channels]`.
    pub(super) fn range(&self, channels: Channels) -> Result<Tensor> {
        let size = self.weight.size();
        let shape = [
            self.groups,
            size[0] / self.groups,
            size[1],
            size[2..].iter().product(),
        ];
        let view = self.weight.f_reshape(shape)?;
        let per_channel = if (channels == Channels::Output) != self.transposed {
            [shape[0], shape[1], 1, 1]
        } else {
            [shape[0], 1, shape[2], 1]
        };
        let (low, high) = ops::min_max(&view, &per_channel, None)?;
        Ok(high
            .f_maximum(&low.f_neg()?)?
            .f_flatten(0, -1)?
            .f_to_kind(Kind::Double)?)
    }

    /// The weight times one factor per output or input channel, computed in float64 and rounded once, in the
    /// weight's dtype and layout.
    pub(super) fn scaled(&self, channels: Channels, factors: &Tensor) -> Result<Tensor> {
        let size = self.weight.size();
        let mut shape = vec![1; size.len()];
        shape[0] = size[0];
        // Dimension 0 of the weight runs over the channels of one side, all groups; dimension 1 over those of
        // the other side, within a group.
        let factors = factors.f_to_kind(Kind::Double)?;
        let factors = if (channels == Channels::Output) != self.transposed {
            factors.f_reshape(shape)?
        } else {
            shape[1] = size[1];
            factors
                .f_reshape([self.groups, size[1]])?
                .f_repeat_interleave_self_int(size[0] / self.groups, 0, None)?
                .f_reshape(shape)?
        };
        let scaled = self.weight.f_empty_like()?;
        let mut start = 0;
        in_chunks(&self.weight, |rows| {
            let length = rows.size()[0];
            let factors = factors.f_narrow(0, start, length)?;
            let product = rows.f_to_kind(Kind::Double)?.f_mul(&factors)?;
            scaled.f_narrow(0, start, length)?.f_copy_(&product)?;
            start += length;
            Ok(())
        })?;
        Ok(scaled)
    }

    /// The bias in float64, zeros if there is none: `[out_channels]`.
    pub(super) fn bias_or_zeros(&self) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => bias.f_to_kind(Kind::Double)?,
            None => Tensor::f_zeros([self.out_channels()], (Kind::Double, self.weight.device()))?,
        })
    }

    /// What the layer puts out where every input element of channel `i` is `input[i]`, without the bias:
    /// `[out_channels]`. True at the border only if nothing is padded.
    pub(super) fn response(&self, input: &Tensor) -> Result<Tensor> {
        let weight = self.grouped()?;
        let [groups, out, inputs, taps] = weight.size()[..] else {
            unreachable!("four dimensions")
        };
        let weight = weight.f_reshape([groups * out, inputs, taps])?;
        let sums = in_chunks(&weight, |rows| {
            Ok(rows.f_to_kind(Kind::Double)?.f_sum_dim_intlist(
                [2_i64].as_slice(),
                false,
                Kind::Double,
            )?)
        })?;
        Ok(Tensor::f_cat(&sums, 0)?
            .f_reshape([groups, out, inputs])?
            .f_matmul(
                &input
                    .f_to_kind(Kind::Double)?
                    .f_reshape([groups, inputs, 1])?,
            )?
            .f_reshape([self.out_channels()])?)
    }
}

/// `run` on a few rows of `tensor` at a time, so that float64 copies of them stay in the cache.
fn in_chunks<R>(tensor: &Tensor, mut run: impl FnMut(Tensor) -> Result<R>) -> Result<Vec<R>> {
    let size = tensor.size();
    let rows = (CHUNK / size[1..].iter().product::<i64>().max(1)).max(1);
    (0..size[0])
        .step_by(rows as usize)
        .map(|start| run(tensor.f_narrow(0, start, rows.min(size[0] - start))?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn grouped_view_holds_for_every_kind_of_layer() {
        let options = (Kind::Double, Device::Cpu);
        let x = Tensor::randn([1, 4, 1, 1], options);
        let conv =
            LayerParameters::new(Tensor::randn([6, 2, 1, 1], options), None, 2, false).unwrap();
        let expected = x
            .conv2d::<Tensor>(&conv.weight, None, 1, 0, 1, 2)
            .reshape([6]);
        assert!(conv
            .response(&x.reshape([4]))
            .unwrap()
            .allclose(&expected, 1e-12, 1e-12, false));
        let transposed =
            LayerParameters::new(Tensor::randn([4, 3, 1, 1], options), None, 2, true).unwrap();
        let expected = x
            .conv_transpose2d::<Tensor>(&transposed.weight, None, 1, 0, 0, 2, 1)
            .reshape([6]);
        assert!(transposed
            .response(&x.reshape([4]))
            .unwrap()
            .allclose(&expected, 1e-12, 1e-12, false));
        for layer in [conv, transposed] {
            assert_eq!((layer.in_channels(), layer.out_channels()), (4, 6));
            let input = x.reshape([4]);
            let factors = Tensor::randn([6], options);
            let expected = layer.response(&input).unwrap() * &factors;
            let weight = layer.scaled(Channels::Output, &factors).unwrap();
            let layer = LayerParameters { weight, ..layer };
            let found = layer.response(&input).unwrap();
            assert!(found.allclose(&expected, 1e-12, 1e-12, false));
            let factors = Tensor::rand([4], options) + 0.5;
            let weight = layer.scaled(Channels::Input, &factors).unwrap();
            let layer = LayerParameters { weight, ..layer };
            let found = layer.response(&(input / &factors)).unwrap();
            assert!(found.allclose(&expected, 1e-12, 1e-12, false));
        }
    }

    #[test]
    fn large_weights_are_scaled_in_pieces() {
        let weight = Tensor::randn([100, 100, 3, 3], (Kind::Float, Device::Cpu));
        let factors = Tensor::randn([100], (Kind::Double, Device::Cpu));
        let layer = LayerParameters::new(weight.shallow_clone(), None, 1, false).unwrap();
        let expected =
            (weight.to_kind(Kind::Double) * factors.reshape([100, 1, 1, 1])).to_kind(Kind::Float);
        assert!(layer
            .scaled(Channels::Output, &factors)
            .unwrap()
            .equal(&expected));
    }

    #[test]
    fn groups_that_do_not_divide_are_refused() {
        let weight = || Tensor::zeros([6, 2], (Kind::Float, Device::Cpu));
        assert!(LayerParameters::new(weight(), None, 4, false).is_err());
        assert!(LayerParameters::new(weight().reshape([12]), None, 1, false).is_err());
    }
}
