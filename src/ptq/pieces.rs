//! Inputs of a layer in pieces of bounded size.

use crate::error::Result;
use std::ops::Range;
use tch::Tensor;

/// Loads what belongs to one batch, each tensor with a dimension for samples in front.
type Load<'a> = dyn Fn(usize) -> Result<Vec<Tensor>> + 'a;
/// Makes of a piece what is handed on.
type Prepare<'a> = dyn Fn(Vec<Tensor>) -> Result<Vec<Tensor>> + 'a;

/// Samples of a batch.
struct Part {
    batch: usize,
    samples: Range<i64>,
}

/// Batches joined along their samples where their samples are of one shape, and cut where they are large. If all
/// fit into one piece they are loaded once and held; if not, each walk loads them anew.
pub struct Pieces<'a> {
    load: Box<Load<'a>>,
    prepare: Box<Prepare<'a>>,
    pieces: Vec<Vec<Part>>,
    held: Option<Vec<Vec<Tensor>>>,
}

impl<'a> Pieces<'a> {
    /// `most`: elements of a piece, though never less than a sample.
    ///
    /// # Errors
    /// Whatever `load` and `prepare` give.
    pub fn new(
        num_batches: usize,
        most: usize,
        load: impl Fn(usize) -> Result<Vec<Tensor>> + 'a,
        prepare: impl Fn(Vec<Tensor>) -> Result<Vec<Tensor>> + 'a,
    ) -> Result<Self> {
        let mut pieces: Vec<Vec<Part>> = vec![];
        let (mut shape, mut in_piece, mut total) = (vec![], 0, 0);
        for batch in 0..num_batches {
            let tensors = load(batch)?;
            let samples = tensors[0].size()[0];
            let numel: usize = tensors.iter().map(Tensor::numel).sum();
            let of_sample = (numel / samples.max(1) as usize).max(1);
            let new_shape = tensors[0].size()[1..].to_vec();
            let is_other = new_shape != shape;
            shape = new_shape;
            let mut begin = 0;
            while begin < samples {
                let room = most.saturating_sub(in_piece) / of_sample;
                let starts = pieces.is_empty() || (is_other && begin == 0) || room == 0;
                if starts {
                    pieces.push(vec![]);
                    in_piece = 0;
                }
                let room = if starts {
                    (most / of_sample).max(1)
                } else {
                    room
                };
                let end = samples.min(begin + room as i64);
                if let Some(piece) = pieces.last_mut() {
                    piece.push(Part {
                        batch,
                        samples: begin..end,
                    });
                }
                in_piece += (end - begin) as usize * of_sample;
                begin = end;
            }
            total += numel;
        }
        let mut all = Self {
            load: Box::new(load),
            prepare: Box::new(prepare),
            pieces,
            held: None,
        };
        if total <= most {
            let held = all.pieces.iter().map(|piece| all.make(piece));
            all.held = Some(held.collect::<Result<_>>()?);
        }
        Ok(all)
    }

    /// All pieces, if they are held.
    pub fn held(&self) -> Option<&[Vec<Tensor>]> {
        self.held.as_deref()
    }

    /// Calls `body` with each piece.
    ///
    /// # Errors
    /// Whatever loading and `body` give.
    pub fn for_each(&self, mut body: impl FnMut(&[Tensor]) -> Result<()>) -> Result<()> {
        if let Some(held) = &self.held {
            return held.iter().try_for_each(|piece| body(piece));
        }
        for piece in &self.pieces {
            body(&self.make(piece)?)?;
        }
        Ok(())
    }

    fn make(&self, piece: &[Part]) -> Result<Vec<Tensor>> {
        let parts = piece.iter().map(|part| {
            let count = part.samples.end - part.samples.start;
            let tensors = (self.load)(part.batch)?;
            let narrow = |t: &Tensor| Ok(t.f_narrow(0, part.samples.start, count)?);
            tensors.iter().map(narrow).collect::<Result<Vec<_>>>()
        });
        (self.prepare)(join(parts.collect::<Result<_>>()?)?)
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

    fn walked(batches: &[Tensor], most: usize) -> Vec<Tensor> {
        let load = |i: usize| Ok(vec![batches[i].shallow_clone()]);
        let pieces = Pieces::new(batches.len(), most, load, Ok).unwrap();
        let walk = || {
            let mut seen = vec![];
            pieces
                .for_each(|piece| {
                    seen.push(piece[0].shallow_clone());
                    Ok(())
                })
                .unwrap();
            seen
        };
        assert_eq!(walk(), walk());
        walk()
    }

    #[test]
    fn batches_of_one_shape_are_joined_in_order() {
        let options = (Kind::Float, Device::Cpu);
        let batches: Vec<Tensor> = [[2, 3], [5, 3], [1, 4], [2, 3]]
            .iter()
            .map(|size| Tensor::randn(size, options))
            .collect();
        let seen = walked(&batches, 1000);
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0], Tensor::cat(&batches[..2], 0));
        assert_eq!(
            seen[1..],
            [&batches[2], &batches[3]].map(Tensor::shallow_clone)
        );
    }

    #[test]
    fn large_batches_are_cut_and_small_ones_fill_up() {
        let all = Tensor::arange(60, (Kind::Float, Device::Cpu)).reshape([20, 3]);
        let mut from = 0;
        let batches = [1, 9, 2, 8].map(|n| {
            from += n;
            all.narrow(0, from - n, n)
        });
        let seen = walked(&batches, 14);
        let sizes: Vec<i64> = seen.iter().map(|p| p.size()[0]).collect();
        assert_eq!(sizes, [4, 4, 4, 4, 4]);
        assert_eq!(Tensor::cat(&seen, 0), all);
        // A sample is never cut.
        assert_eq!(walked(&batches, 1).len(), 20);
    }
}
