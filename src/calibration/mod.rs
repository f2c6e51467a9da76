//! Encoding analyzers: from observed data to the range of a quantization grid.
//!
//! Data comes as a slice in memory order plus the [`BlockGeometry`] that says which encoding each
//! element belongs to; the elements of one encoding are a *group*. Two kinds of statistics exist,
//! the observed range ([`MinMax`]) and the histogram ([`HistogramStatistics`]). Both merge, in any
//! order and with the same result, so that they can be gathered from many batches and many
//! processes. From the statistics, [`fit_range`], [`Percentile`], [`SqnrSearch`] and [`MseSearch`]
//! derive the `(min, max)` of a grid with a given number of steps.
//!
//! Work is spread over rayon's threads: calibration does not run inside a torch operator. Results do
//! not depend on the number of threads, nor on the instruction set.

pub mod histogram;
pub mod min_max;
pub mod mse;
pub mod percentile;
mod simd;
pub mod sqnr;
mod tensor;
mod walk;

pub use histogram::{Bins, GroupHistogram, HistogramStatistics};
pub use min_max::{fit_range, fit_range_min_max, MinMax};
pub use mse::MseSearch;
pub use percentile::Percentile;
pub use sqnr::SqnrSearch;
pub use tensor::with_values;

use crate::encoding::BlockGeometry;
use crate::error::{Error, Result};
use half::{bf16, f16};

/// The elements of a dense tensor in memory order, in one of the dtypes that calibration reads.
///
/// Statistics are computed in float32; float64 data is rounded to it (as AIMET's histograms do).
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::F64(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::Bf16(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn check(&self, geometry: &BlockGeometry) -> Result<()> {
        if self.len() != geometry.numel() {
            return Err(Error::value(
                "input",
                format!("{} elements, as its shape says", geometry.numel()),
                self.len(),
            ));
        }
        if self.is_empty() {
            return Err(Error::value(
                "input",
                "at least one element",
                "an empty tensor",
            ));
        }
        Ok(())
    }
}

/// Number of steps of a grid, checked.
pub(crate) fn check_num_steps(num_steps: f64) -> Result<()> {
    if num_steps > 0.0 && num_steps.is_finite() {
        Ok(())
    } else {
        Err(Error::value(
            "num_steps",
            "a number greater than 0",
            num_steps,
        ))
    }
}

/// The smallest scale an observed range may lead to, for a grid of `num_steps` steps.
pub(crate) fn minimum_scale(num_steps: f64) -> f64 {
    f64::from(f32::EPSILON).min(0.01 / num_steps)
}
