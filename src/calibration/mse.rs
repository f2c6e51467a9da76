//! MSE: the grid with the least mean squared error.
//!
//! As [`SqnrSearch`](super::SqnrSearch) with clipping noise not weighted, and then closer: around
//! the best candidate, scales and offsets are tried at ever smaller distances. So the result is
//! never worse, on the histogram, than that of the SQNR search with `gamma = 1`.

use super::histogram::HistogramStatistics;
use super::minimum_scale;
use super::simd::Candidate;
use super::sqnr::{for_each_group, SqnrSearch};
use crate::error::{Error, Result};

/// Settings of the search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MseSearch {
    coarse: SqnrSearch,
    rounds: u32,
}

impl Default for MseSearch {
    fn default() -> Self {
        Self {
            coarse: SqnrSearch::default().with_gamma(1.0),
            rounds: 3,
        }
    }
}

impl MseSearch {
    /// - `rounds`: how many times the distance between the scales tried is made four times smaller,
    ///   `0..=8`.
    ///
    /// # Errors
    /// [`Error::Value`] naming the setting.
    pub fn new(rounds: u32) -> Result<Self> {
        if rounds > 8 {
            return Err(Error::value("refinement_rounds", "0 to 8", rounds));
        }
        Ok(Self {
            rounds,
            ..Self::default()
        })
    }

    /// The range of the best grid with `num_steps` steps for each group.
    ///
    /// # Errors
    /// [`Error::State`] before any data, [`Error::Value`] if `num_steps` is not positive.
    pub fn encodings(
        self,
        statistics: &HistogramStatistics,
        num_steps: f64,
        symmetric: bool,
    ) -> Result<Vec<(f32, f32)>> {
        let steps = num_steps as f32;
        let smallest = minimum_scale(num_steps) as f32;
        for_each_group(statistics, num_steps, false, |group, search| {
            let coarse = self.coarse.candidates(group, num_steps, symmetric);
            let mut best = search.best(&coarse, steps, 1.0, None);
            // Neighbours of the coarse search are this far apart.
            let mut distance = if symmetric { 1.0 / 100.0 } else { 1.0 / 16.0 };
            for _ in 0..self.rounds {
                distance /= 4.0;
                let centre = best.0;
                let mut candidates = Vec::with_capacity(7 * 5);
                for i in -3_i8..=3 {
                    let delta = (centre.delta * (1.0 + distance * f32::from(i))).max(smallest);
                    if symmetric {
                        candidates.push(Candidate {
                            delta,
                            offset: centre.offset,
                        });
                        continue;
                    }
                    for shift in -2_i8..=2 {
                        // The grid keeps zero.
                        let offset = (centre.offset + f32::from(shift)).clamp(-steps, 0.0);
                        candidates.push(Candidate { delta, offset });
                    }
                }
                best = search.best(&candidates, steps, 1.0, Some(best));
            }
            best
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SqnrSearch, Values};
    use super::*;
    use crate::encoding::BlockGeometry;
    use proptest::prelude::*;

    fn error(x: &[f32], (min, max): (f32, f32), steps: f64) -> f64 {
        let delta = f64::from(max - min) / steps;
        let offset = (f64::from(min) / delta).round();
        x.iter()
            .map(|&v| {
                let q = (f64::from(v) / delta - offset)
                    .round_ties_even()
                    .clamp(0.0, steps);
                ((q + offset) * delta - f64::from(v)).powi(2)
            })
            .sum()
    }

    proptest! {
        #[test]
        fn not_worse_than_the_coarse_search(
            x in proptest::collection::vec(-2.0_f32..3.0, 50..400),
            outlier in -9_f32..9.0, bits in 2_u32..7, symmetric: bool,
        ) {
            let mut x = x;
            x.push(outlier);
            let geometry = BlockGeometry::new(&[x.len() as i64], &[1], &[], None).unwrap();
            // Many bins: the histogram's error is nearly that of the values.
            let mut s = HistogramStatistics::new(1 << 16, None).unwrap();
            s.update(Values::F32(&x), &geometry).unwrap();
            let steps = f64::from(2_u32.pow(bits) - 1);
            let coarse = SqnrSearch::new(17, 101, 21, 1.0).unwrap().encodings(&s, steps, symmetric).unwrap()[0];
            let fine = MseSearch::default().encodings(&s, steps, symmetric).unwrap()[0];
            // A value stands up to half a bin from the middle of its bin.
            let slack = (x.len() as f64).sqrt() * 12.0 / f64::from(1 << 16);
            let (fine, coarse) = (error(&x, fine, steps), error(&x, coarse, steps));
            prop_assert!(fine.sqrt() <= coarse.sqrt() + slack, "{} {}", fine, coarse);
        }
    }

    #[test]
    fn finds_the_scale_of_data_on_a_grid() {
        // Values on the grid k * 0.37 for k = -8..=7, and one far away that is better clipped.
        let mut x: Vec<f32> = (0..4000).map(|i| (i % 16 - 8) as f32 * 0.37).collect();
        x.push(3.3);
        let geometry = BlockGeometry::new(&[x.len() as i64], &[1], &[], None).unwrap();
        let mut s = HistogramStatistics::new(1 << 14, None).unwrap();
        s.update(Values::F32(&x), &geometry).unwrap();
        let (min, max) = MseSearch::default().encodings(&s, 15.0, true).unwrap()[0];
        let delta = (max - min) / 15.0;
        assert!((delta - 0.37).abs() < 2e-3, "{delta}");
        assert!(MseSearch::new(9).is_err());
    }
}
