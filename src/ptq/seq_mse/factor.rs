//! Quadratic forms of a Gram matrix, part by part.
//!
//! With the Cholesky factorization `G = R^T R`, `R` upper triangular \[golub2013, 4.2.5\]
//!
//! ```text
//! e^T G e = |R e|^2 = sum over blocks of rows |R_b e|^2
//! ```
//!
//! No term is negative, so that what has been added up is a lower bound of the whole. From the last block to the first,
//! each needs more of `e` than the one before: all of them take half of the products of `G e`, and those that show
//! which vectors' forms are large a small part of these.

use crate::error::Result;
use crate::ops::row_dot;
use tch::{Kind, Tensor};

/// Rows of a block.
const BLOCK: i64 = 128;

/// A factor `R` by blocks of rows.
pub(super) struct Factor {
    /// The first column that is not zero, and the block's columns from there on; the last block first.
    blocks: Vec<(i64, Tensor)>,
}

impl Factor {
    /// Whether matrices of this size have blocks to stop after.
    pub fn is_worthwhile(size: i64) -> bool {
        size >= 2 * BLOCK
    }

    /// Factorizes `gram`, `[K, K]`, in float64. `None` if it is not positive definite by float64.
    pub fn new(gram: &Tensor) -> Result<Option<Self>> {
        let size = gram.size()[0];
        let (factor, info) = gram
            .f_to_kind(Kind::Double)?
            .f_linalg_cholesky_ex(true, false)?;
        if i64::try_from(info)? != 0 {
            return Ok(None);
        }
        let factor = factor.f_to_kind(gram.kind())?;
        let block = |start: i64| -> Result<(i64, Tensor)> {
            let rows = factor.f_narrow(0, start, BLOCK.min(size - start))?;
            let rows = rows.f_narrow(1, start, size - start)?.f_contiguous()?;
            Ok((start, rows))
        };
        let mut blocks = vec![];
        for start in (0..size).step_by(BLOCK as usize) {
            blocks.push(block(start)?);
        }
        blocks.reverse();
        Ok(Some(Self { blocks }))
    }

    /// `e^T G e` of the rows of `vectors`, `[n, K]`: float64, `[n]`. After each block `stay` is told the rows that are
    /// left and the sums so far, and names (by their places among these) the rows to go on with, if not all. The sums
    /// of the others stay as they are.
    pub fn squares(
        &self,
        vectors: &Tensor,
        mut stay: impl FnMut(&[usize], &[f64]) -> Result<Option<Vec<usize>>>,
    ) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; vectors.size()[0] as usize];
        let mut rows: Vec<usize> = (0..sums.len()).collect();
        let mut vectors = vectors.shallow_clone();
        for (start, block) in &self.blocks {
            let size = vectors.size()[1];
            let product = vectors
                .f_narrow(1, *start, size - start)?
                .f_matmul(&block.f_transpose(0, 1)?)?;
            let squares: Vec<f64> = row_dot(&product, &product)?.try_into()?;
            for (&row, square) in rows.iter().zip(squares) {
                sums[row] += square;
            }
            if *start == 0 {
                break;
            }
            let so_far: Vec<f64> = rows.iter().map(|&row| sums[row]).collect();
            if let Some(places) = stay(&rows, &so_far)? {
                if places.is_empty() {
                    break;
                }
                let index: Vec<i64> = places.iter().map(|&place| place as i64).collect();
                let index = Tensor::f_from_slice(&index)?.f_to_device(vectors.device())?;
                vectors = vectors.f_index_select(0, &index)?;
                rows = places.iter().map(|&place| rows[place]).collect();
            }
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn sums_grow_to_the_quadratic_form_and_rows_can_be_left() {
        tch::manual_seed(0);
        let size = 2 * BLOCK + 40;
        let x = Tensor::randn([400, size], (Kind::Double, Device::Cpu));
        let gram = x.transpose(0, 1).matmul(&x);
        let e = Tensor::randn([30, size], (Kind::Double, Device::Cpu));
        let expected: Vec<f64> = row_dot(&e.matmul(&gram), &e).unwrap().try_into().unwrap();
        let factor = Factor::new(&gram).unwrap().unwrap();
        let mut seen = vec![];
        let got = factor
            .squares(&e, |rows, sums| {
                seen.push(rows.len());
                for (&row, &sum) in rows.iter().zip(sums) {
                    assert!(sum <= expected[row]);
                }
                // Every second row, once.
                Ok((rows.len() == 30).then(|| (0..30).step_by(2).collect()))
            })
            .unwrap();
        assert_eq!(seen, [30, 15]);
        for (row, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
            if row % 2 == 0 {
                assert!((got - expected).abs() < 1e-9 * expected, "{row}");
            } else {
                assert!(got < 0.5 * expected, "{row}");
            }
        }
        assert!(Factor::new(&(&gram - 1e6)).unwrap().is_none());
    }
}
