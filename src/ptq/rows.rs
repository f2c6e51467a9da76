//! Input rows in pieces of bounded size, and their Gram matrices.

use super::linear_map::{compute_kind, LinearMap};
use crate::error::Result;
use tch::{Kind, Tensor};

/// Elements of the rows held at a time: 64 MB of float32.
const PIECE: i64 = 1 << 24;
/// Columns of a Gram matrix computed at a time, from the diagonal on: half the products.
const PANEL: i64 = 128;

/// One tensor per batch, asked for when its turn comes.
pub type Batches<'a> = dyn Fn(usize) -> Result<Tensor> + 'a;

/// Calls `body` with the rows `[groups, n, K]` of all batches, small batches joined and large ones cut, so
/// that `n` is large enough for matrix products and bounded in memory.
///
/// `load` gives the rows of batch `i`, one or several tensors of as many rows, which stay aligned.
///
/// # Errors
/// Whatever `load` and `body` give.
pub fn for_each_piece(
    num_batches: usize,
    load: impl Fn(usize) -> Result<Vec<Tensor>>,
    mut body: impl FnMut(&[Tensor]) -> Result<()>,
) -> Result<()> {
    let mut waiting: Vec<Vec<Tensor>> = vec![];
    let mut held = 0;
    for batch in 0..num_batches {
        let rows = load(batch)?;
        let n = rows[0].size()[1];
        let row_size: i64 = rows.iter().map(|r| r.size()[0] * r.size()[2]).sum();
        let most = (PIECE / row_size.max(1)).max(1);
        let mut start = 0;
        while start < n {
            let take = (n - start).min((most - held).max(1));
            waiting.push(
                rows.iter()
                    .map(|r| r.f_narrow(1, start, take))
                    .collect::<Result<_, _>>()?,
            );
            held += take;
            start += take;
            if held >= most {
                body(&joined(&mut waiting)?)?;
                held = 0;
            }
        }
    }
    if held > 0 {
        body(&joined(&mut waiting)?)?;
    }
    Ok(())
}

fn joined(waiting: &mut Vec<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let parts = std::mem::take(waiting);
    (0..parts[0].len())
        .map(|i| {
            let column: Vec<&Tensor> = parts.iter().map(|p| &p[i]).collect();
            Ok(match column.as_slice() {
                [one] => one.f_contiguous()?,
                many => Tensor::f_cat(many, 1)?,
            })
        })
        .collect()
}

/// The rows of a batch in the type that sums are computed in.
pub fn rows_of(map: &LinearMap, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let input = map.batched(&input.f_detach()?.f_to_kind(compute_kind(weight))?)?;
    map.rows(&map.padded(&input)?, weight)
}

/// A sum of Gram matrices: products in the rows' type over one piece, added up in float64.
pub struct Gram(Tensor);

impl Gram {
    /// Zero: `batch` matrices `[size, size]`.
    pub fn new(batch: i64, size: i64, like: &Tensor) -> Result<Self> {
        Ok(Self(Tensor::f_zeros(
            [batch, size, size],
            (Kind::Double, like.device()),
        )?))
    }

    /// Adds `rows^T rows` for `rows` of shape `[batch, n, size]`. Only the panels from the diagonal on are
    /// computed; [`finish`](Self::finish) mirrors them.
    pub fn add(&mut self, rows: &Tensor) -> Result<()> {
        let size = rows.size()[2];
        for start in (0..size).step_by(PANEL as usize) {
            let width = PANEL.min(size - start);
            let rest = rows.f_narrow(2, start, size - start)?;
            let panel = rest
                .f_narrow(2, 0, width)?
                .f_transpose(1, 2)?
                .f_matmul(&rest)?;
            let _ = self
                .0
                .f_narrow(1, start, width)?
                .f_narrow(2, start, size - start)?
                .f_add_(&panel)?;
        }
        Ok(())
    }

    /// The matrices, symmetric, in `kind`.
    pub fn finish(self, kind: Kind) -> Result<Tensor> {
        let upper = self.0.f_triu(0)?;
        let mirrored = upper.f_triu(1)?.f_transpose(1, 2)?;
        Ok((upper + mirrored).f_to_kind(kind)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn pieces_hold_every_row_once_and_the_gram_matrix_is_whole() {
        tch::manual_seed(0);
        // More columns than a panel, batches of unequal size, one without rows.
        let options = (Kind::Double, Device::Cpu);
        let batches: Vec<Tensor> = [3, 40, 0, 1]
            .iter()
            .map(|&n| Tensor::randn([2, n, 700], options))
            .collect();
        let mut seen = vec![];
        let mut gram = Gram::new(2, 700, &batches[0]).unwrap();
        for_each_piece(
            batches.len(),
            |i| Ok(vec![batches[i].shallow_clone()]),
            |piece| {
                seen.push(piece[0].shallow_clone());
                gram.add(&piece[0])
            },
        )
        .unwrap();
        let all = Tensor::cat(&batches, 1);
        assert_eq!(Tensor::cat(&seen, 1), all);
        let expected = all.transpose(1, 2).matmul(&all);
        let got = gram.finish(Kind::Double).unwrap();
        assert!(got.allclose(&expected, 1e-10, 1e-10, false));
    }

    #[test]
    fn a_large_batch_is_cut() {
        let rows = Tensor::zeros([1, 10, PIECE / 4], (Kind::Int8, Device::Cpu));
        let mut sizes = vec![];
        for_each_piece(
            1,
            |_| Ok(vec![rows.shallow_clone()]),
            |piece| {
                sizes.push(piece[0].size()[1]);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(sizes, [4, 4, 2]);
    }
}
