//! Errors that changes of a layer's weights make at its outputs, by forward passes of the changes.

use super::super::linear_map::LinearMap;
use super::super::matrix_products::{layer_operations, MatrixProducts, Reused};
use super::super::pieces::Pieces;
use crate::error::Result;
use crate::ops::reconstruction_error;
use tch::{Kind, Tensor};

/// Forward passes through the layer, or as matrix products.
pub(super) struct ForwardPasses<'a> {
    map: &'a LinearMap,
    /// Inputs; behind them, where outputs are compared with those of other inputs, the difference that
    /// these make (see [`outputs`]).
    pieces: &'a Pieces<'a>,
    filtering: Option<Filtering<'a>>,
}

/// A convolution by minimal filtering. Inputs are prepared once, so that it pays where several passes meet them.
struct Filtering<'a> {
    products: MatrixProducts<'a>,
    /// As the products take them.
    inputs: Tensor,
    kernels: Reused,
    outputs: [Reused; 2],
}

impl<'a> ForwardPasses<'a> {
    /// Of changes of `weight`. `num_rows` changed rows of it are expected in all, and so many `bytes` may be held.
    ///
    /// # Errors
    /// What loading the inputs and torch give, as in all that follow.
    pub(super) fn new(
        map: &'a LinearMap,
        pieces: &'a Pieces<'a>,
        weight: &Tensor,
        num_rows: f64,
        bytes: u64,
    ) -> Result<Self> {
        Ok(Self {
            map,
            pieces,
            filtering: Filtering::new(map, pieces, weight, num_rows, bytes)?,
        })
    }

    /// Squared errors of changed rows, float64: `change` is like the weight, but for the number of output channels;
    /// `channels` says which one each of them is.
    pub(super) fn errors(&mut self, change: &Tensor, channels: &Tensor) -> Result<Tensor> {
        if let Some(filtering) = &mut self.filtering {
            return filtering.errors(change);
        }
        let mut errors = Tensor::f_zeros(channels.size(), (Kind::Double, change.device()))?;
        self.pieces.for_each(|piece| {
            let target = match piece.get(1) {
                Some(shift) => Some(shift.f_index_select(-2, channels)?),
                None => None,
            };
            let output = outputs(self.map, &piece[0], change)?;
            let _ = errors.f_add_(&channel_errors(&output, target.as_ref())?)?;
            Ok(())
        })?;
        Ok(errors)
    }
}

impl<'a> Filtering<'a> {
    /// `None` where the layer's own passes cost less, where inputs are not held in one piece, or have other
    /// outputs to be compared with.
    fn new(
        map: &'a LinearMap,
        pieces: &Pieces<'_>,
        weight: &Tensor,
        num_rows: f64,
        bytes: u64,
    ) -> Result<Option<Self>> {
        let Some([piece]) = pieces.held() else {
            return Ok(None);
        };
        let ([input], LinearMap::Convolution { .. }) = (piece.as_slice(), map) else {
            return Ok(None);
        };
        let places = map.output_places(&input.size()[2..], weight);
        let (samples, out) = (input.size()[0], weight.size()[0]);
        let passes = num_rows / out as f64;
        let rows = (samples * places.iter().product::<i64>()) as f64;
        let mut least = passes * layer_operations(map, weight, rows);
        let mut found = None;
        let bytes_of = |elements: i64| elements as u64 * weight.kind().elt_size_in_bytes() as u64;
        for products in MatrixProducts::filtering(map, weight, &places)? {
            let operations = products.preparing_operations(samples)
                + passes * products.forward_operations(samples, out as f64);
            let fits = bytes_of(products.forward_elements(samples, out)) <= bytes;
            if fits && operations < least {
                least = operations;
                found = Some(products);
            }
        }
        found
            .map(|products| {
                Ok(Self {
                    inputs: products.inputs(input, weight)?,
                    products,
                    kernels: Reused::default(),
                    outputs: Default::default(),
                })
            })
            .transpose()
    }

    fn errors(&mut self, change: &Tensor) -> Result<Tensor> {
        let arranged = change.f_permute(self.products.weight_order())?;
        let kernels = self.products.kernels(&arranged, &mut self.kernels)?;
        let output = self
            .products
            .output_by_channel(&kernels, &self.inputs, &mut self.outputs)?;
        let errors = reconstruction_error(&output, None, "mse")?;
        Ok(errors.f_sum_dim_intlist([0_i64].as_slice(), false, Kind::Double)?)
    }
}

/// Outputs with the channels ahead of the places: `[out, n]` of a linear layer, `[samples, out, places]` of a convolution.
pub(super) fn outputs(map: &LinearMap, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(match map {
        LinearMap::Linear => {
            let rows = input.f_reshape([-1, weight.size()[1]])?;
            weight.f_matmul(&rows.f_transpose(0, 1)?)?
        }
        LinearMap::Convolution { .. } => map.forward(input, weight, None)?.f_flatten(2, -1)?,
    })
}

/// Squared errors of each channel of [`outputs`]: float64, `[out]`.
pub(super) fn channel_errors(output: &Tensor, target: Option<&Tensor>) -> Result<Tensor> {
    let errors = reconstruction_error(output, target, "mse")?;
    Ok(match errors.dim() {
        2 => errors.f_sum_dim_intlist([0_i64].as_slice(), false, Kind::Double)?,
        _ => errors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Convolution;
    use tch::Device;

    fn convolution(padding: i64) -> LinearMap {
        LinearMap::Convolution {
            convolution: Convolution {
                stride: vec![1, 1],
                padding: vec![padding; 2],
                dilation: vec![1, 1],
                output_padding: vec![0, 0],
                transposed: false,
                groups: 1,
            },
            pad: None,
        }
    }

    fn pieces_of<'a>(input: &'a Tensor, shift: Option<&'a Tensor>) -> Pieces<'a> {
        let load = move |_| {
            let all = [Some(input), shift].into_iter().flatten();
            Ok(all.map(Tensor::shallow_clone).collect())
        };
        Pieces::new(1, usize::MAX, load, Ok).unwrap()
    }

    #[test]
    fn filtering_gives_the_errors_of_the_convolution() {
        tch::manual_seed(0);
        let options = (Kind::Float, Device::Cpu);
        // Tiles that fit, that reach beyond the places, and a place alone in its tile.
        for (padding, size) in [(1, [16, 16]), (1, [9, 7]), (0, [6, 11]), (1, [2, 5])] {
            let map = convolution(padding);
            let input = Tensor::randn([4, 64, size[0], size[1]], options);
            let weight = Tensor::randn([64, 64, 3, 3], options);
            let pieces = pieces_of(&input, None);
            let mut passes = ForwardPasses::new(&map, &pieces, &weight, 1e4, 1 << 30).unwrap();
            assert!(passes.filtering.is_some(), "{size:?}");
            // More rows than the weight, then fewer.
            for rows in [80, 3] {
                let change = Tensor::randn([rows, 64, 3, 3], options);
                let channels = Tensor::arange(rows, (Kind::Int64, Device::Cpu));
                let errors = passes.errors(&change, &channels).unwrap();
                let (input, change) = (input.to_kind(Kind::Double), change.to_kind(Kind::Double));
                let output = map.forward(&input, &change, None).unwrap();
                let dims: &[i64] = &[0, 2, 3];
                let expected = output
                    .square()
                    .sum_dim_intlist(dims, false, Some(Kind::Double));
                assert!(errors.allclose(&expected, 1e-5, 0.0, false), "{size:?}");
            }
        }
    }

    #[test]
    fn filtering_is_left_where_it_cannot_pay_or_be() {
        let options = (Kind::Float, Device::Cpu);
        let (map, input) = (convolution(1), Tensor::randn([4, 64, 16, 16], options));
        let weight = Tensor::randn([64, 64, 3, 3], options);
        let pieces = pieces_of(&input, None);
        let filters = |pieces: &Pieces<'_>, map: &LinearMap, num_rows: f64, bytes: u64| {
            let passes = ForwardPasses::new(map, pieces, &weight, num_rows, bytes).unwrap();
            passes.filtering.is_some()
        };
        assert!(filters(&pieces, &map, 1e4, 1 << 30));
        assert!(!filters(&pieces, &map, 1.0, 1 << 30), "one row");
        assert!(!filters(&pieces, &map, 1e4, 1 << 20), "1 MiB");
        let shift = Tensor::randn([4, 64, 256], options);
        let compared = pieces_of(&input, Some(&shift));
        assert!(!filters(&compared, &map, 1e4, 1 << 30), "other outputs");
        let mut strided = convolution(1);
        if let LinearMap::Convolution { convolution, .. } = &mut strided {
            convolution.stride = vec![2, 2];
        }
        assert!(!filters(&pieces, &strided, 1e4, 1 << 30), "a stride");
    }
}
