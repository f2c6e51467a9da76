//! Inputs of a layer in pieces of bounded size, for forward passes and weight gradients.

use crate::error::Result;
use std::ops::Range;
use tch::Tensor;

/// Elements of the inputs held at a time: 64 MB of float32.
const PIECE: usize = 1 << 24;

/// Loads what belongs to one batch, each tensor with a dimension for samples in front.
type Load<'a> = dyn Fn(usize) -> Result<Vec<Tensor>> + 'a;
/// Makes of a piece what is handed on.
type Prepare<'a> = dyn Fn(Vec<Tensor>) -> Result<Vec<Tensor>> + 'a;

/// Batches of one shape, joined along their samples. If all fit into one piece they are loaded once and held; if
/// not, each walk loads them anew.
pub struct Pieces<'a> {
    load: Box<Load<'a>>,
    prepare: Box<Prepare<'a>>,
    batches: Vec<Range<usize>>,
    held: Option<Vec<Vec<Tensor>>>,
}

impl<'a> Pieces<'a> {
    /// # Errors
    /// Whatever `load` and `prepare` give.
    pub fn new(
        num_batches: usize,
        load: impl Fn(usize) -> Result<Vec<Tensor>> + 'a,
        prepare: impl Fn(Vec<Tensor>) -> Result<Vec<Tensor>> + 'a,
    ) -> Result<Self> {
        let mut batches: Vec<Range<usize>> = vec![];
        let mut loaded: Vec<Vec<Tensor>> = vec![];
        let (mut shape, mut in_piece, mut total) = (vec![], 0, 0);
        for batch in 0..num_batches {
            let tensors = load(batch)?;
            let numel: usize = tensors.iter().map(Tensor::numel).sum();
            let of_sample = tensors[0].size()[1..].to_vec();
            match batches.last_mut() {
                Some(piece) if shape == of_sample && in_piece + numel <= PIECE => {
                    piece.end += 1;
                    in_piece += numel;
                }
                _ => {
                    batches.push(batch..batch + 1);
                    (shape, in_piece) = (of_sample, numel);
                }
            }
            total += numel;
            if total <= PIECE {
                loaded.push(tensors);
            } else {
                loaded.clear();
            }
        }
        let mut held = None;
        if total <= PIECE {
            let mut loaded = loaded.into_iter();
            let joined = batches
                .iter()
                .map(|piece| prepare(join(loaded.by_ref().take(piece.len()).collect())?))
                .collect::<Result<_>>()?;
            held = Some(joined);
        }
        Ok(Self {
            load: Box::new(load),
            prepare: Box::new(prepare),
            batches,
            held,
        })
    }

    /// Calls `body` with each piece.
    ///
    /// # Errors
    /// Whatever loading and `body` give.
    pub fn for_each(&self, mut body: impl FnMut(&[Tensor]) -> Result<()>) -> Result<()> {
        if let Some(held) = &self.held {
            return held.iter().try_for_each(|piece| body(piece));
        }
        for piece in &self.batches {
            let loaded = piece.clone().map(&self.load).collect::<Result<_>>()?;
            body(&(self.prepare)(join(loaded)?)?)?;
        }
        Ok(())
    }
}

fn join(parts: Vec<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    (0..parts[0].len())
        .map(|i| {
            let column: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
            Ok(match column.as_slice() {
                [one] => one.shallow_clone(),
                many => Tensor::f_cat(many, 0)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn walked(batches: &[Tensor]) -> Vec<Tensor> {
        let pieces = Pieces::new(batches.len(), |i| Ok(vec![batches[i].shallow_clone()]), Ok);
        let mut seen = vec![];
        pieces
            .unwrap()
            .for_each(|piece| {
                seen.push(piece[0].shallow_clone());
                Ok(())
            })
            .unwrap();
        seen
    }

    #[test]
    fn batches_of_one_shape_are_joined_in_order() {
        let options = (Kind::Float, Device::Cpu);
        let batches: Vec<Tensor> = [[2, 3], [5, 3], [1, 4], [2, 3]]
            .iter()
            .map(|size| Tensor::randn(size, options))
            .collect();
        let seen = walked(&batches);
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0], Tensor::cat(&batches[..2], 0));
        assert_eq!(
            seen[1..],
            [&batches[2], &batches[3]].map(Tensor::shallow_clone)
        );
    }

    #[test]
    fn what_is_too_large_is_loaded_anew() {
        let row = PIECE as i64 / 4;
        let batches: Vec<Tensor> = (0..3)
            .map(|i| Tensor::full([2, row], i, (Kind::Int8, Device::Cpu)))
            .collect();
        let sizes: Vec<i64> = walked(&batches).iter().map(|p| p.size()[0]).collect();
        assert_eq!(sizes, [4, 2]);
    }
}
