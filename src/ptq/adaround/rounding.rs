//! The weight between the levels of its grid, in the order of dimensions that steps compute with.

use super::Layer;
use crate::encoding::AffineGrid;
use crate::error::Result;
use crate::ops::{
    adaround_quantize_dequantize, adaround_step, AdaroundState, AdaroundStep, GAMMA, ZETA,
};
use tch::Tensor;

/// A weight and its encodings.
pub(super) struct Rounding<'a> {
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    block_size: Option<Vec<i64>>,
    grid: &'a AffineGrid,
    /// Where each dimension of the layer's weight is; `None`: in its place.
    places: Option<Vec<i64>>,
}

impl<'a> Rounding<'a> {
    /// Of the layer's weight with its dimensions in another order.
    pub(super) fn new(layer: &Layer<'a>, order: Option<Vec<i64>>) -> Result<Self> {
        let (scale, offset) = layer.problem.scale_offset;
        let grid = &layer.problem.grid;
        let block_size = layer.problem.block_size.map(<[i64]>::to_vec);
        let Some(order) = order else {
            return Ok(Self {
                weight: layer.weight.shallow_clone(),
                scale: scale.shallow_clone(),
                offset: offset.shallow_clone(),
                block_size,
                grid,
                places: None,
            });
        };
        let dims = order.len();
        // Encodings and blocks stand beside the last dimensions.
        let encoding = |encoding: &Tensor| -> Result<Tensor> {
            let mut size = vec![1; dims - encoding.dim()];
            size.extend(encoding.size());
            Ok(encoding
                .f_reshape(&size)?
                .f_permute(&order)?
                .f_contiguous()?)
        };
        let blocks = |blocks: Vec<i64>| -> Vec<i64> {
            let ahead = dims - blocks.len();
            let block = |&d: &i64| {
                (d as usize)
                    .checked_sub(ahead)
                    .map_or(-1, |place| blocks[place])
            };
            order.iter().map(block).collect()
        };
        let mut places = vec![0; dims];
        for (place, &d) in order.iter().enumerate() {
            places[d as usize] = place as i64;
        }
        Ok(Self {
            weight: layer.weight.f_permute(&order)?.f_contiguous()?,
            scale: encoding(scale)?,
            offset: encoding(offset)?,
            block_size: block_size.map(blocks),
            grid,
            places: Some(places),
        })
    }

    /// A tensor beside the weight, in the order of the layer's weight.
    pub(super) fn in_place(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match &self.places {
            Some(places) => tensor.f_permute(places)?.f_contiguous()?,
            None => tensor.shallow_clone(),
        })
    }

    /// The weights at `h(alpha)` between their levels, or, if not `soft`, on one of them.
    pub(super) fn rounded(&self, alpha: &Tensor, soft: bool) -> Result<Tensor> {
        adaround_quantize_dequantize(
            &self.weight,
            alpha,
            (&self.scale, &self.offset),
            self.grid,
            soft,
            self.block_size.as_deref(),
        )
    }

    /// Rounding variables whose soft rounding gives the weights themselves: `h(alpha) = frac(W / scale)`.
    pub(super) fn initial_state(&self) -> Result<AdaroundState> {
        let spread = crate::ops::dequantize(
            &self.weight.f_ones_like()?,
            &self.scale,
            &self.offset.f_zeros_like()?,
            self.block_size.as_deref(),
        )?;
        let position = &self.weight / &spread;
        let fraction = &position - position.f_floor()?;
        let ratio = (fraction - GAMMA).f_reciprocal()? * (ZETA - GAMMA);
        let alpha = (ratio - 1.0).f_log()?.f_neg()?;
        let output = self.rounded(&alpha, true)?;
        Ok(AdaroundState {
            exp_avg: alpha.f_zeros_like()?,
            exp_avg_sq: alpha.f_zeros_like()?,
            alpha,
            output,
        })
    }

    /// One step of the optimization, for the gradient with respect to `state.output`.
    pub(super) fn step(
        &self,
        state: &mut AdaroundState,
        grad: &Tensor,
        settings: AdaroundStep,
    ) -> Result<()> {
        adaround_step(
            state,
            grad,
            &self.weight,
            (&self.scale, &self.offset),
            self.grid,
            self.block_size.as_deref(),
            settings,
        )
    }
}
