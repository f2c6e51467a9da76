//! Products of a small matrix with long rows.

use crate::error::{Error, Result};
use crate::kernels::cpu::row_combinations::{combine_rows, Terms, MOST_ROWS};
use crate::kernels::cpu::Compute;
use tch::{Device, Kind, Tensor};

/// A small matrix without its zeros, for products with rows on the CPU.
#[derive(Clone, Debug)]
pub struct RowCombinations {
    columns: usize,
    single: Vec<Terms<f32>>,
    double: Vec<Terms<f64>>,
}

impl RowCombinations {
    /// Columns of the matrix at the most.
    pub const MOST_COLUMNS: usize = MOST_ROWS;

    /// Of a matrix given row by row, with so many columns.
    ///
    /// # Errors
    /// [`Error::Value`] if they do not divide the number of elements, or are more than 64.
    pub fn new(matrix: &[f64], columns: usize) -> Result<Self> {
        if columns == 0 || columns > MOST_ROWS || !matrix.len().is_multiple_of(columns) {
            return Err(Error::value(
                "columns",
                format!(
                    "1 to {MOST_ROWS}, dividing the {} elements of the matrix",
                    matrix.len()
                ),
                columns,
            ));
        }
        let double: Vec<Terms<f64>> = matrix
            .chunks(columns)
            .map(|row| {
                row.iter()
                    .copied()
                    .enumerate()
                    .filter(|t| t.1 != 0.0)
                    .collect()
            })
            .collect();
        let narrow = |terms: &Terms<f64>| terms.iter().map(|&(i, f)| (i, f as f32)).collect();
        Ok(Self {
            columns,
            single: double.iter().map(narrow).collect(),
            double,
        })
    }

    /// Number of rows of the matrix.
    pub fn rows(&self) -> usize {
        self.double.len()
    }

    /// Number of columns of the matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// `matrix x input`, for `input` with as many rows as the matrix has columns: of shape `[rows, n]` where the
    /// input, flattened behind its first dimension, is `[columns, n]`.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of rows, [`Error::Type`] for anything but float32 and float64 on the
    /// CPU.
    pub fn apply(&self, input: &Tensor) -> Result<Tensor> {
        let len = input.numel() / self.columns;
        let options = (input.kind(), input.device());
        let output = Tensor::f_empty([self.rows() as i64, len as i64], options)?;
        self.apply_into(input, &output)?;
        Ok(output)
    }

    /// The same into a contiguous `output` of as many elements, whatever its shape.
    ///
    /// # Errors
    /// Also [`Error::Value`] for another output.
    pub fn apply_into(&self, input: &Tensor, output: &Tensor) -> Result<()> {
        let size = input.size();
        if size.first() != Some(&(self.columns as i64)) {
            return Err(Error::value(
                "input",
                format!("{} rows", self.columns),
                format!("shape {size:?}"),
            ));
        }
        let kind = input.kind();
        if input.device() != Device::Cpu || !matches!(kind, Kind::Float | Kind::Double) {
            return Err(Error::type_(
                "input",
                "a float32 or float64 tensor on the CPU",
                format!("{kind:?} on {:?}", input.device()),
            ));
        }
        let input = input.f_contiguous()?;
        let len = input.numel() / self.columns;
        let bytes = |tensor: &Tensor| {
            let begin = tensor.data_ptr() as usize;
            begin..begin + tensor.numel() * kind.elt_size_in_bytes()
        };
        let (read, written) = (bytes(&input), bytes(output));
        if (output.device(), output.kind(), output.numel())
            != (Device::Cpu, kind, self.rows() * len)
            || !output.is_contiguous()
            || read.start < written.end && written.start < read.end
        {
            return Err(Error::value(
                "output",
                format!(
                    "contiguous, {} elements of {kind:?}, apart from the input",
                    self.rows() * len
                ),
                format!("{:?}, shape {:?}", output.kind(), output.size()),
            ));
        }
        // SAFETY: both tensors are contiguous and of this type, `input` of `columns` rows of `len` elements,
        // `output` of as many as there are lists of terms, and they do not overlap.
        unsafe {
            match kind {
                Kind::Double => combine(&self.double, self.columns, len, &input, output),
                _ => combine(&self.single, self.columns, len, &input, output),
            }
        }
        Ok(())
    }
}

/// # Safety
/// As for [`combine_rows`], with the tensors' data of type `C`.
unsafe fn combine<C: Compute>(
    terms: &[Terms<C>],
    rows: usize,
    len: usize,
    input: &Tensor,
    output: &Tensor,
) {
    // SAFETY: by the contract.
    unsafe {
        combine_rows::<C>(
            terms,
            rows,
            len,
            input.data_ptr().cast_const().cast(),
            output.data_ptr().cast(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_product_of_matrices() {
        let matrix = [1.0, 0.0, -0.5, 0.0, 2.0, 0.0];
        let combinations = RowCombinations::new(&matrix, 3).unwrap();
        for kind in [Kind::Float, Kind::Double] {
            let input = Tensor::randn([5, 4, 3], (kind, Device::Cpu)).permute([2, 0, 1]);
            let expected = Tensor::from_slice(&matrix)
                .to_kind(kind)
                .reshape([2, 3])
                .matmul(&input.reshape([3, 20]));
            let found = combinations.apply(&input).unwrap();
            assert!(found.allclose(&expected, 1e-6, 1e-6, false));
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert!(RowCombinations::new(&[1.0; 6], 4).is_err());
        assert!(RowCombinations::new(&[1.0; 65], 65).is_err());
        let combinations = RowCombinations::new(&[1.0; 6], 3).unwrap();
        let rows = |n, kind| Tensor::zeros([n, 2], (kind, Device::Cpu));
        assert!(matches!(
            combinations.apply(&rows(2, Kind::Float)),
            Err(Error::Value { .. })
        ));
        assert!(matches!(
            combinations.apply(&rows(3, Kind::Half)),
            Err(Error::Type { .. })
        ));
        let input = rows(3, Kind::Float);
        for output in [
            rows(3, Kind::Float),
            rows(2, Kind::Double),
            rows(2, Kind::Float).transpose(0, 1),
            input.narrow(0, 1, 2),
        ] {
            assert!(combinations.apply_into(&input, &output).is_err());
        }
        combinations
            .apply_into(&input, &rows(2, Kind::Float))
            .unwrap();
    }
}
