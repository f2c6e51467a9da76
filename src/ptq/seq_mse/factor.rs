//! Quadratic forms of a Gram matrix, part by part.
//!
//! With the Cholesky factorization `G + r I = R^T R`, `R` upper triangular \[golub2013, 4.2.5\]
//!
//! ```text
//! e^T G e = |R e|^2 - r |e|^2,   |R e|^2 = sum over blocks of rows |R_b e|^2
//! ```
//!
//! No block's term is negative, so that what has been added up is a lower bound of the whole. `r` is a little more than
//! rounding did to `G`, which is singular for inputs of which each row sums to zero, as behind a layer norm.
//! From the last block to the first,
//! each needs more of `e` than the one before: all of them take half of the products of `G e`, and those that show
//! which vectors' forms are large a small part of these.

use crate::error::Result;
use crate::ops::row_dot;
use tch::{Kind, Tensor};

/// Rows of a block.
const BLOCK: i64 = 128;
/// `r` as a share of the mean of `G`'s diagonal, for each unit of the square root of its size: float32 has `6e-8` of every
/// element, and a random symmetric matrix's norm grows with that root.
const ROUNDING: f64 = 4e-7;

/// A factor `R` by blocks of rows.
pub(super) struct Factor {
    /// The first column that is not zero, and the block's columns from there on; the last block first.
    blocks: Vec<(i64, Tensor)>,
    /// `r`
    added: f64,
}

impl Factor {
    /// Whether matrices of this size have blocks to stop after.
    pub fn is_worthwhile(size: i64) -> bool {
        size >= 2 * BLOCK
    }

    /// Factorizes `gram`, `[K, K]`, in float64. `None` if it is further from positive definite than by rounding.
    pub fn new(gram: &Tensor) -> Result<Option<Self>> {
        let size = gram.size()[0];
        let mean = f64::try_from(gram.f_trace()?)? / size as f64;
        let added = mean * ROUNDING * (size as f64).sqrt();
        let exact = gram.f_to_dtype(Kind::Double, false, true)?;
        let _ = exact.f_diagonal(0, 0, 1)?.f_add_scalar_(added)?;
        let (factor, info) = exact.f_linalg_cholesky_ex(true, false)?;
        drop(exact);
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
        Ok(Some(Self { blocks, added }))
    }

    /// `e^T G e` of the rows of `vectors`, `[n, K]`: float64, `[n]`. After each block `stay` is told the rows that are
    /// left and the sums so far, and names (by their places among these) the rows to go on with, if not all. The sums
    /// of the others stay as they are.
    pub fn squares(
        &self,
        vectors: &Tensor,
        mut stay: impl FnMut(&[usize], &[f64]) -> Result<Option<Vec<usize>>>,
    ) -> Result<Vec<f64>> {
        let mut sums: Vec<f64> = (row_dot(vectors, vectors)? * -self.added).try_into()?;
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

    /// Rows that sum to zero, in float32.
    #[test]
    fn a_singular_matrix_has_a_factor() {
        tch::manual_seed(0);
        let size = 2 * BLOCK;
        let x = Tensor::randn([900, size], (Kind::Float, Device::Cpu)) + 3.0;
        let x = &x - x.mean_dim([1_i64].as_slice(), true, None);
        let gram = x.transpose(0, 1).matmul(&x);
        let factor = Factor::new(&gram).unwrap().unwrap();
        let e = Tensor::randn([5, size], (Kind::Float, Device::Cpu));
        let found = Tensor::from_slice(&factor.squares(&e, |_, _| Ok(None)).unwrap());
        let outputs = e.matmul(&x.transpose(0, 1));
        let expected = row_dot(&outputs, &outputs).unwrap();
        assert!(found.allclose(&expected, 1e-5, 0.0, false));
    }

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
