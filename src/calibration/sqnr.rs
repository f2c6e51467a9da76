//! SQNR: the grid with the least expected quantization noise, over a set of candidates.
//!
//! The noise of a grid is estimated from a histogram: every value stands in the middle of its bin,
//! and a value that the grid clips counts `gamma` times. Candidates, their clamping to the observed
//! range and the noise of each are computed in float32, operation by operation as AIMET does; the
//! sums are taken to float64. A candidate is not looked at further once what is certain of its
//! noise exceeds the best so far, so the choice is that of the full search.

use super::histogram::{GroupHistogram, HistogramStatistics};
use super::min_max::fit_range;
use super::simd::{self, Candidate};
use super::{check_num_steps, minimum_scale};
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Settings of the search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SqnrSearch {
    asymmetric_deltas: usize,
    symmetric_deltas: usize,
    offsets: usize,
    gamma: f32,
}

impl Default for SqnrSearch {
    fn default() -> Self {
        Self {
            asymmetric_deltas: 17,
            symmetric_deltas: 101,
            offsets: 21,
            gamma: 3.0,
        }
    }
}

impl SqnrSearch {
    /// - `asymmetric_deltas`, `symmetric_deltas`: how many scales to try, up to a little more than
    ///   the observed range asks for; at least 2.
    /// - `offsets`: how many offsets to try with each scale of an asymmetric grid, at least 3.
    /// - `gamma`: weight of clipping noise, at least 0; 1 gives the mean squared error.
    ///
    /// # Errors
    /// [`Error::Value`] naming the setting.
    pub fn new(
        asymmetric_deltas: usize,
        symmetric_deltas: usize,
        offsets: usize,
        gamma: f64,
    ) -> Result<Self> {
        const MOST: usize = 1 << 16;
        let check = |name: &str, least: usize, value: usize| {
            if (least..=MOST).contains(&value) {
                Ok(())
            } else {
                Err(Error::value(name, format!("{least} to {MOST}"), value))
            }
        };
        check("asymmetric_delta_candidates", 2, asymmetric_deltas)?;
        check("symmetric_delta_candidates", 2, symmetric_deltas)?;
        check("offset_candidates", 3, offsets)?;
        if !(gamma >= 0.0 && gamma.is_finite()) {
            return Err(Error::value("gamma", "a finite number, at least 0", gamma));
        }
        Ok(Self {
            asymmetric_deltas,
            symmetric_deltas,
            offsets,
            gamma: gamma as f32,
        })
    }

    pub(super) fn with_gamma(self, gamma: f32) -> Self {
        Self { gamma, ..self }
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
        for_each_group(statistics, num_steps, true, |group, search| {
            let candidates = self.candidates(group, num_steps, symmetric);
            search.best(&candidates, num_steps as f32, self.gamma, None)
        })
    }

    /// All grids to try for a group.
    pub(super) fn candidates(
        self,
        group: &GroupHistogram,
        num_steps: f64,
        symmetric: bool,
    ) -> Vec<Candidate> {
        let steps = num_steps as f32;
        let smallest = minimum_scale(num_steps);
        let min = group.min().min(0.0);
        let max = group
            .max()
            .max(0.0)
            .max(min + (smallest * num_steps) as f32);
        let smallest = smallest as f32;
        if symmetric {
            let widest = 2.0 * max.max(-min) / steps;
            let offset = (-num_steps / 2.0).floor() as f32;
            let parts = (self.symmetric_deltas - 1) as f32;
            return (1..=self.symmetric_deltas)
                .map(|i| (widest * i as f32 / parts).max(smallest))
                .map(|delta| Candidate { delta, offset })
                .collect();
        }
        let widest = (max - min) / steps;
        let observed_offset = (min / widest).round_ties_even();
        let observed_min = widest * observed_offset;
        let observed_max = observed_min + widest * steps;
        let mut offsets = spaced_offsets(num_steps, self.offsets);
        offsets.push(observed_offset);
        let parts = (self.asymmetric_deltas - 1) as f32;
        let mut candidates = Vec::with_capacity(self.asymmetric_deltas * offsets.len());
        for i in 1..=self.asymmetric_deltas {
            let delta = widest * i as f32 / parts;
            for &offset in &offsets {
                // What the grid covers beyond the observed range is given up.
                let low = delta * offset;
                let high = (low + delta * steps).min(observed_max);
                let low = low.max(observed_min);
                let delta = ((high - low) / steps).max(smallest);
                let offset = (low / delta).round_ties_even();
                candidates.push(Candidate { delta, offset });
            }
        }
        candidates
    }
}

/// About `count - 1` offsets from `-num_steps` to 0, evenly spaced and rounded.
fn spaced_offsets(num_steps: f64, count: usize) -> Vec<f32> {
    let count = (num_steps + 2.0).min(count as f64);
    let step = num_steps / (count - 2.0);
    // The half-open interval from -num_steps to step, so that 0 is the last.
    let length = ((step + num_steps) / step).ceil() as usize;
    (0..length)
        .map(|i| ((step * i as f64 - num_steps) as f32).round_ties_even())
        .collect()
}

/// Runs `choose` for every group, in parallel, and turns the chosen grids into ranges. For
/// `as_reference` see [`GroupHistogram::mids`].
pub(super) fn for_each_group(
    statistics: &HistogramStatistics,
    num_steps: f64,
    as_reference: bool,
    choose: impl Fn(&GroupHistogram, &mut Search) -> (Candidate, f64) + Sync,
) -> Result<Vec<(f32, f32)>> {
    check_num_steps(num_steps)?;
    let steps = num_steps as f32;
    let bins = statistics.bins();
    statistics
        .observed()?
        .par_iter()
        .with_min_len(4)
        .map_init(
            || Search::new(bins, as_reference),
            |search, group| {
                if !((group.max().max(0.0) - group.min().min(0.0)) * 2.0).is_finite() {
                    // float32 cannot hold the candidates: the whole range is the only choice.
                    return fit_range(group.min(), group.max(), num_steps, false);
                }
                search.load(group);
                let (best, _) = choose(group, search);
                let min = best.offset * best.delta;
                Ok((min, min + steps * best.delta))
            },
        )
        .collect()
}

/// Up to this many bins, trying a candidate costs no more than ruling it out.
const FEW: usize = 128;

/// One group's histogram, laid out for the search. Reused from group to group.
pub(super) struct Search {
    bins: u32,
    as_reference: bool,
    mids: Vec<f32>,
    counts: Vec<f32>,
    filled: usize,
    /// Sums of count, count * mid and count * mid^2 over the bins before each.
    moments: Vec<[f64; 3]>,
    order: Vec<(f64, f64, usize)>,
}

impl Search {
    fn new(bins: u32, as_reference: bool) -> Self {
        Self {
            bins,
            as_reference,
            mids: Vec::new(),
            counts: Vec::new(),
            filled: 0,
            moments: Vec::new(),
            order: Vec::new(),
        }
    }

    fn load(&mut self, group: &GroupHistogram) {
        let (_, count) = group.counts();
        self.mids.clear();
        self.counts.clear();
        self.moments.clear();
        group.mids(self.bins, self.as_reference, &mut self.mids);
        self.counts.extend(count.iter().map(|&n| n as f32));
        self.filled = count.len();
        let mut sums = [0.0; 3];
        self.moments.push(sums);
        for (&mid, &n) in self.mids.iter().zip(count) {
            let (mid, n) = (f64::from(mid), n as f64);
            sums = [sums[0] + n, sums[1] + n * mid, sums[2] + n * mid * mid];
            self.moments.push(sums);
        }
        simd::pad(&mut self.mids);
        simd::pad(&mut self.counts);
    }

    /// The candidate with the least noise, and that noise; the first of equals. With `known`, one
    /// that has been chosen before, only if better than that.
    pub(super) fn best(
        &mut self,
        candidates: &[Candidate],
        steps: f32,
        gamma: f32,
        known: Option<(Candidate, f64)>,
    ) -> (Candidate, f64) {
        let total = self.moments[self.filled][0];
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        if self.filled <= FEW {
            order.extend((0..candidates.len()).map(|i| (0.0, 0.0, i)));
        } else {
            order.extend(candidates.iter().enumerate().map(|(i, c)| {
                let certain = self.clipping_noise(c, steps, gamma);
                // Rounding noise of a uniform distribution: only decides who is looked at first.
                let likely = certain + f64::from(c.delta) * f64::from(c.delta) / 12.0 * total;
                (likely, certain, i)
            }));
            order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)));
        }

        let (mut best, mut least, mut rank) = match known {
            Some((candidate, noise)) => (candidate, noise, 0),
            None => (candidates[0], f64::INFINITY, usize::MAX),
        };
        let mut previous = None;
        for &(_, certain, i) in &order {
            let candidate = candidates[i];
            // Clamping makes many candidates equal.
            if certain > least || previous == Some(candidate) {
                continue;
            }
            previous = Some(candidate);
            let noise = simd::noise(&self.mids, &self.counts, candidate, steps, gamma, least);
            if noise < least || (noise == least && i < rank) {
                (best, least, rank) = (candidate, noise, i);
            }
        }
        self.order = order;
        (best, least)
    }

    /// A lower bound of the noise, in the time of two binary searches: that of the values which are
    /// clipped for certain, less what float32 may lose.
    fn clipping_noise(&self, candidate: &Candidate, steps: f32, gamma: f32) -> f64 {
        let delta = f64::from(candidate.delta);
        let offset = f64::from(candidate.offset);
        let trust = 1.0 - 1e-6 * (f64::from(steps) + 10.0);
        if trust <= 0.0 {
            return 0.0;
        }
        let mids = &self.mids[..self.filled];
        let low = offset * delta;
        let high = (offset + f64::from(steps)) * delta;
        let below = mids.partition_point(|&m| f64::from(m) < low - 0.51 * delta);
        let above = mids.partition_point(|&m| f64::from(m) <= high + 0.51 * delta);
        let squared = |from: usize, to: usize, end: f64| {
            let (a, b) = (self.moments[from], self.moments[to]);
            let (s0, s1, s2) = (b[0] - a[0], b[1] - a[1], b[2] - a[2]);
            let error = 1e-13 * (self.moments[self.filled][2] + end * end * s0);
            (s2 - 2.0 * end * s1 + end * end * s0 - error).max(0.0)
        };
        let clipped = squared(0, below, low) + squared(above, self.filled, high);
        trust * f64::from(gamma) * clipped
    }
}

#[cfg(test)]
mod tests {
    use super::super::Values;
    use super::*;
    use crate::encoding::BlockGeometry;
    use proptest::prelude::*;

    fn statistics(x: &[f32], bins: usize) -> HistogramStatistics {
        let geometry = BlockGeometry::new(&[x.len() as i64], &[1], &[], None).unwrap();
        let mut s = HistogramStatistics::new(bins, None).unwrap();
        s.update(Values::F32(x), &geometry).unwrap();
        s
    }

    /// The definition, in float64, over all bins and candidates.
    fn noise(s: &HistogramStatistics, c: &Candidate, steps: f64, gamma: f64) -> f64 {
        let group = &s.groups()[0];
        let mut mids = Vec::new();
        group.mids(s.bins(), true, &mut mids);
        let (delta, offset) = (f64::from(c.delta), f64::from(c.offset));
        mids.iter()
            .zip(group.counts().1)
            .map(|(&m, &n)| {
                let m = f64::from(m);
                let q = (m / delta - offset).round_ties_even();
                let weight = if q < 0.0 || q > steps { gamma } else { 1.0 };
                let error = (q.clamp(0.0, steps) + offset) * delta - m;
                weight * n as f64 * error * error
            })
            .sum()
    }

    #[test]
    fn settings_are_checked() {
        for (a, s, o, g, name) in [
            (1, 101, 21, 3.0, "asymmetric_delta_candidates"),
            (17, 0, 21, 3.0, "symmetric_delta_candidates"),
            (17, 101, 2, 3.0, "offset_candidates"),
            (17, 101, 21, -1.0, "gamma"),
            (17, 101, 21, f64::NAN, "gamma"),
        ] {
            let e = SqnrSearch::new(a, s, o, g).unwrap_err().to_string();
            assert!(e.starts_with(name), "{e}");
        }
        let s = statistics(&[1.0, 2.0], 4);
        assert!(SqnrSearch::default().encodings(&s, 0.0, true).is_err());
        let empty = HistogramStatistics::new(4, None).unwrap();
        assert!(SqnrSearch::default()
            .encodings(&empty, 255.0, true)
            .is_err());
    }

    #[test]
    fn offsets_reach_from_all_to_none() {
        let offsets = spaced_offsets(255.0, 21);
        assert_eq!((offsets.len(), offsets[0], offsets[19]), (20, -255.0, 0.0));
        assert_eq!(spaced_offsets(1.0, 21), [-1.0, 0.0]);
        assert_eq!(spaced_offsets(3.0, 21), [-3.0, -2.0, -1.0, 0.0]);
    }

    #[test]
    fn constants_keep_a_usable_range() {
        for value in [0.0, 1e-30, 5.0, -5.0, 1e9, f32::MAX] {
            for symmetric in [false, true] {
                let s = statistics(&[value; 5], 16);
                let (min, max) = SqnrSearch::default()
                    .encodings(&s, 255.0, symmetric)
                    .unwrap()[0];
                assert!(
                    min <= 0.0 && max >= 0.0 && max > min,
                    "{value}: {min} {max}"
                );
                assert!(min.is_finite() && max.is_finite());
            }
        }
        let s = statistics(&[f32::MIN, f32::MAX], 16);
        assert_eq!(
            SqnrSearch::default().encodings(&s, 255.0, true).unwrap()[0],
            (f32::MIN, f32::MAX),
        );
    }

    proptest! {
        /// What is skipped could not have won: the choice is as good as the full search's.
        #[test]
        fn the_choice_is_the_best_of_all(
            x in proptest::collection::vec(-2.0_f32..3.0, 2..300),
            outlier in -30_f32..30.0, bits in 2_u32..10, symmetric: bool, gamma in 1.0_f64..4.0,
        ) {
            let mut x = x;
            x.push(outlier);
            let s = statistics(&x, 64);
            let steps = f64::from(2_u32.pow(bits) - 1);
            let search = SqnrSearch::new(17, 101, 21, gamma).unwrap();
            let (min, max) = search.encodings(&s, steps, symmetric).unwrap()[0];
            let candidates = search.candidates(&s.groups()[0], steps, symmetric);
            let least = candidates
                .iter()
                .map(|c| noise(&s, c, steps, gamma))
                .fold(f64::INFINITY, f64::min);
            let delta = f64::from(max - min) / steps;
            let chosen = candidates
                .iter()
                .filter(|c| {
                    (f64::from(c.delta) - delta).abs() <= 1e-5 * delta
                        && (f64::from(c.offset) - (f64::from(min) / delta).round()).abs() < 1.0
                })
                .map(|c| noise(&s, c, steps, gamma))
                .fold(f64::INFINITY, f64::min);
            prop_assert!(chosen <= least * 1.0001 + 1e-9, "{} {}", chosen, least);
        }
    }
}
