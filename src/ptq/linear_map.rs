//! A layer as a linear map of its weights: `output rows = input rows x weight matrix`.
//!
//! Linear layers, convolutions and transposed convolutions of any number of dimensions, grouped or not,
//! all become, per group, rows of `K` inputs times a matrix `[out_channels / groups, K]`, where `K`
//! counts the input channels of the group, and within a channel the taps of the kernel.

use crate::error::{Error, Result};
use crate::ops::{convolution_weight_gradient, Convolution};
use tch::{Kind, Tensor};

/// How a layer turns inputs into outputs, apart from the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinearMap {
    /// `[..., in] -> [..., out]`, weight `[out, in]`.
    Linear,
    /// A convolution, after the input was padded.
    Convolution {
        /// The geometry without padding that `pad` has done.
        convolution: Convolution,
        /// Padding ahead of the convolution, last dimension first as torch's `pad` takes it, and its mode.
        pad: Option<(Vec<i64>, String)>,
    },
}

impl LinearMap {
    /// Number of groups.
    pub fn groups(&self) -> i64 {
        match self {
            LinearMap::Linear => 1,
            LinearMap::Convolution { convolution, .. } => convolution.groups,
        }
    }

    /// Whether the weight is `[in, out / groups, ...]` instead of `[out, in / groups, ...]`.
    pub fn transposed(&self) -> bool {
        matches!(self, LinearMap::Convolution { convolution, .. } if convolution.transposed)
    }

    /// Checks that a weight suits the map.
    ///
    /// # Errors
    /// [`Error::Value`] naming what does not fit.
    pub fn check(&self, weight: &Tensor) -> Result<()> {
        let size = weight.size();
        let dims = match self {
            LinearMap::Linear => 2,
            LinearMap::Convolution { convolution, .. } => 2 + convolution.stride.len(),
        };
        if size.len() != dims || size[0] % self.groups().max(1) != 0 || self.groups() < 1 {
            return Err(Error::value(
                "weight",
                format!(
                    "{dims} dimensions, the first divided by {} groups",
                    self.groups()
                ),
                format!("shape {size:?}"),
            ));
        }
        Ok(())
    }

    /// An input or output with a dimension for samples in front.
    pub fn batched(&self, tensor: &Tensor) -> Result<Tensor> {
        let least = match self {
            LinearMap::Linear => 2,
            LinearMap::Convolution { convolution, .. } => convolution.stride.len() + 2,
        };
        Ok(if tensor.dim() < least {
            tensor.f_unsqueeze(0)?
        } else {
            tensor.shallow_clone()
        })
    }

    /// A [batched](Self::batched) input as the convolution itself takes it.
    pub fn padded(&self, input: &Tensor) -> Result<Tensor> {
        Ok(match self {
            LinearMap::Convolution {
                pad: Some((sizes, mode)),
                ..
            } => input.f_pad(sizes, mode, None)?,
            _ => input.shallow_clone(),
        })
    }

    /// The layer's output for a [padded](Self::padded) input.
    pub fn forward(
        &self,
        input: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(match self {
            LinearMap::Linear => input.f_linear(weight, bias)?,
            LinearMap::Convolution { convolution: c, .. } => input.f_convolution(
                weight,
                bias,
                &c.stride,
                &c.padding,
                &c.dilation,
                c.transposed,
                &c.output_padding,
                c.groups,
            )?,
        })
    }

    /// Gradient of `sum(grad * forward(input, weight))` with respect to the weight.
    pub fn weight_gradient(
        &self,
        grad: &Tensor,
        input: &Tensor,
        weight: &Tensor,
    ) -> Result<Tensor> {
        match self {
            LinearMap::Linear => {
                let (out, columns) = (weight.size()[0], weight.size()[1]);
                let grad = grad.f_reshape([-1, out])?;
                Ok(grad
                    .f_transpose(0, 1)?
                    .f_mm(&input.f_reshape([-1, columns])?)?)
            }
            LinearMap::Convolution { convolution, .. } => {
                convolution_weight_gradient(grad, input, weight, convolution)
            }
        }
    }

    /// The weight as `[groups, out / groups, K]`.
    pub fn matrix(&self, weight: &Tensor) -> Result<Tensor> {
        let size = weight.size();
        let groups = self.groups();
        if !self.transposed() {
            return Ok(weight.f_reshape([groups, size[0] / groups, -1])?);
        }
        let mut split = vec![groups, size[0] / groups];
        split.extend(&size[1..]);
        let taps: Vec<i64> = (3..split.len() as i64).collect();
        Ok(weight
            .f_reshape(&split)?
            .f_transpose(1, 2)?
            .f_flip(&taps)?
            .f_reshape([groups, size[1], -1])?)
    }

    /// The inverse of [`matrix`](Self::matrix), for a weight of shape `size`.
    pub fn from_matrix(&self, matrix: &Tensor, size: &[i64]) -> Result<Tensor> {
        if !self.transposed() {
            return Ok(matrix.f_reshape(size)?);
        }
        let groups = self.groups();
        let mut split = vec![groups, size[1], size[0] / groups];
        split.extend(&size[2..]);
        let taps: Vec<i64> = (3..split.len() as i64).collect();
        Ok(matrix
            .f_reshape(&split)?
            .f_flip(&taps)?
            .f_transpose(1, 2)?
            .f_reshape(size)?)
    }

    /// The rows that the weight matrix is applied to: `[groups, N, K]` of a [padded](Self::padded)
    /// input; `N` counts samples, and within a sample the places of the output.
    pub fn rows(&self, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let LinearMap::Convolution { convolution: c, .. } = self else {
            return Ok(input.f_reshape([1, -1, weight.size()[1]])?);
        };
        let kernel = &weight.size()[2..];
        let dims = kernel.len();
        let mut stride = c.stride.clone();
        let mut pad = Vec::with_capacity(2 * dims);
        let mut input = input.shallow_clone();
        if c.transposed {
            // An ordinary convolution over the input with zeros between its elements.
            let mut size = input.size();
            for d in 0..dims {
                size[2 + d] = (size[2 + d] - 1) * c.stride[d] + 1;
            }
            let spread = Tensor::f_zeros(&size, (input.kind(), input.device()))?;
            let mut view = spread.shallow_clone();
            for d in 0..dims {
                view = view.f_slice(2 + d as i64, None, None, c.stride[d])?;
            }
            view.f_copy_(&input)?;
            input = spread;
            stride = vec![1; dims];
            for d in (0..dims).rev() {
                let reach = c.dilation[d] * (kernel[d] - 1) - c.padding[d];
                pad.extend([reach, reach + c.output_padding[d]]);
            }
        } else {
            for d in (0..dims).rev() {
                pad.extend([c.padding[d]; 2]);
            }
        }
        if pad.iter().any(|&p| p != 0) {
            input = input.f_constant_pad_nd(&pad)?;
        }
        let input = input.f_contiguous()?;
        let (size, step) = (input.size(), input.stride());
        let channels = size[1] / c.groups;
        // [groups, samples, places.., channels, taps..] of the same memory, then copied into rows.
        let mut view_size = vec![c.groups, size[0]];
        let mut view_step = vec![channels * step[1], step[0]];
        for d in 0..dims {
            let reach = c.dilation[d] * (kernel[d] - 1);
            view_size.push((size[2 + d] - reach - 1).div_euclid(stride[d]) + 1);
            view_step.push(stride[d] * step[2 + d]);
        }
        view_size.push(channels);
        view_step.push(step[1]);
        for d in 0..dims {
            view_size.push(kernel[d]);
            view_step.push(c.dilation[d] * step[2 + d]);
        }
        let columns = channels * kernel.iter().product::<i64>();
        Ok(input
            .f_as_strided(&view_size, &view_step, None)?
            .f_reshape([c.groups, -1, columns])?)
    }

    /// Outputs in the order of [`rows`](Self::rows): `[groups, N, out / groups]`.
    pub fn output_rows(&self, output: &Tensor) -> Result<Tensor> {
        let size = output.size();
        match self {
            LinearMap::Linear => {
                Ok(output.f_reshape([1, -1, size.last().copied().unwrap_or(1)])?)
            }
            LinearMap::Convolution { convolution: c, .. } => Ok(output
                .f_reshape([size[0], c.groups, size[1] / c.groups, -1])?
                .f_permute([1, 0, 3, 2])?
                .f_reshape([c.groups, -1, size[1] / c.groups])?),
        }
    }

    /// Number of rows that a [batched](Self::batched) input becomes.
    pub fn num_rows_of_input(&self, input: &Tensor, weight: &Tensor) -> i64 {
        let size = input.size();
        let LinearMap::Convolution {
            convolution: c,
            pad,
        } = self
        else {
            let numel: i64 = size.iter().product();
            return numel / weight.size()[1].max(1);
        };
        let dims = c.stride.len();
        let padded: Vec<i64> = (0..dims)
            .map(|d| {
                // torch lists paddings from the last dimension on, two each.
                let added = pad.as_ref().map_or(0, |(sizes, _)| {
                    let at = 2 * (dims - 1 - d);
                    sizes.get(at..at + 2).map_or(0, |p| p.iter().sum())
                });
                size[2 + d] + added
            })
            .collect();
        size[0] * self.output_places(&padded, weight).iter().product::<i64>()
    }

    /// Places of a convolution's output for those of a [padded](Self::padded) input; none for a linear layer.
    pub fn output_places(&self, places: &[i64], weight: &Tensor) -> Vec<i64> {
        let LinearMap::Convolution { convolution: c, .. } = self else {
            return vec![];
        };
        let kernel = &weight.size()[2..];
        let along = |(d, &length): (usize, &i64)| {
            let reach = c.dilation[d] * (kernel[d] - 1);
            let padding = 2 * c.padding[d];
            if c.transposed {
                (length - 1) * c.stride[d] - padding + reach + c.output_padding[d] + 1
            } else {
                (length + padding - reach - 1).div_euclid(c.stride[d]) + 1
            }
        };
        places.iter().enumerate().map(along).collect()
    }

    /// Number of rows that one output tensor stands for.
    pub fn num_rows(&self, output: &Tensor) -> i64 {
        let size = output.size();
        let numel: i64 = size.iter().product();
        match self {
            LinearMap::Linear => numel / size.last().copied().unwrap_or(1).max(1),
            LinearMap::Convolution { .. } => numel / size[1].max(1),
        }
    }
}

/// The type that sums over rows are computed in.
pub fn compute_kind(tensor: &Tensor) -> Kind {
    if tensor.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn convolution(dims: usize, groups: i64, transposed: bool) -> LinearMap {
        LinearMap::Convolution {
            convolution: Convolution {
                stride: vec![2; dims],
                padding: vec![1; dims],
                dilation: vec![if transposed { 1 } else { 2 }; dims],
                output_padding: vec![i64::from(transposed); dims],
                transposed,
                groups,
            },
            pad: None,
        }
    }

    /// Rows times matrix are the outputs, and the weight's gradient is that of the matrix.
    #[test]
    fn every_layer_is_its_rows_times_its_matrix() {
        tch::manual_seed(0);
        let options = (Kind::Double, Device::Cpu);
        let mut cases = vec![(
            LinearMap::Linear,
            Tensor::randn([5, 4, 6], options),
            Tensor::randn([3, 6], options),
        )];
        for dims in 1..=3 {
            for transposed in [false, true] {
                let mut input = vec![2, 4];
                input.extend([7, 6, 5].iter().take(dims));
                let mut weight = if transposed { vec![4, 3] } else { vec![6, 2] };
                weight.extend([3, 2, 3].iter().take(dims));
                cases.push((
                    convolution(dims, 2, transposed),
                    Tensor::randn(&input, options),
                    Tensor::randn(&weight, options),
                ));
            }
        }
        for (map, input, weight) in cases {
            map.check(&weight).unwrap();
            let output = map.forward(&input, &weight, None).unwrap();
            let rows = map.rows(&input, &weight).unwrap();
            let matrix = map.matrix(&weight).unwrap();
            let got = rows.matmul(&matrix.transpose(1, 2));
            let expected = map.output_rows(&output).unwrap();
            assert!(got.allclose(&expected, 1e-10, 1e-10, false), "{map:?}");
            assert_eq!(rows.size()[1], map.num_rows(&output));
            assert_eq!(rows.size()[1], map.num_rows_of_input(&input, &weight));
            let padded = map.padded(&input).unwrap().size();
            if matches!(map, LinearMap::Convolution { .. }) {
                let places = map.output_places(&padded[2..], &weight);
                assert_eq!(places, output.size()[2..]);
            }
            let back = map.from_matrix(&matrix, &weight.size()).unwrap();
            assert_eq!(back, weight);

            let grad = Tensor::randn_like(&output);
            let got = map.weight_gradient(&grad, &input, &weight).unwrap();
            let grad_rows = map.output_rows(&grad).unwrap();
            let of_matrix = grad_rows.transpose(1, 2).matmul(&rows);
            let expected = map.from_matrix(&of_matrix, &weight.size()).unwrap();
            assert!(got.allclose(&expected, 1e-10, 1e-10, false), "{map:?}");
        }
    }
}
