//! Percentile: the range that holds a given share of the values.

use super::histogram::{Bins, GroupHistogram, HistogramStatistics};
use super::min_max::fit_range;
use crate::error::{Error, Result};

/// The range from the `100 - p` to the `p` percentile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percentile(f64);

impl Percentile {
    /// # Errors
    /// [`Error::Value`] for a percentile outside 50..=100.
    pub fn new(percentile: f64) -> Result<Self> {
        if !(50.0..=100.0).contains(&percentile) {
            return Err(Error::value(
                "percentile",
                "a number within 50..=100",
                percentile,
            ));
        }
        Ok(Self(percentile))
    }

    /// Percentiles of a group: the left edges of the bins in which the cumulative count reaches its
    /// shares. All values for 100.
    fn range(self, group: &GroupHistogram, bins: u32) -> (f32, f32) {
        if self.0 == 100.0 {
            return match group.bins() {
                // The outermost edges: wider than the range if that is a single value.
                Bins::Equal { low, .. } => (low, group.edge(bins as i32, bins)),
                Bins::Lattice { .. } => (group.min(), group.max()),
            };
        }
        let (index, count) = group.counts();
        let total = group.total() as f32;
        // The shares in float32, as the reference computes them.
        let lower = f64::from(total * (1.0 - self.0 / 100.0) as f32);
        let upper = f64::from(total * self.0 as f32 / 100.0);
        let reach = |share: f64| {
            let mut below = 0;
            for (&i, &n) in index.iter().zip(count) {
                below += n;
                if below as f64 >= share {
                    return i;
                }
            }
            index[index.len() - 1]
        };
        let edge = |share: f64| match group.bins() {
            Bins::Equal { .. } => group.edge(reach(share), bins),
            Bins::Lattice { .. } => group
                .edge(reach(share), bins)
                .clamp(group.min(), group.max()),
        };
        (edge(lower), edge(upper))
    }

    /// The range of a grid with `num_steps` steps for each group.
    ///
    /// # Errors
    /// [`Error::State`] before any data, [`Error::Value`] if `num_steps` is not positive.
    pub fn encodings(
        self,
        statistics: &HistogramStatistics,
        num_steps: f64,
        symmetric: bool,
    ) -> Result<Vec<(f32, f32)>> {
        statistics
            .observed()?
            .iter()
            .map(|group| {
                let (low, high) = self.range(group, statistics.bins());
                fit_range(low, high, num_steps, symmetric)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Values;
    use super::*;
    use crate::encoding::BlockGeometry;

    fn statistics(batches: &[&[f32]], bins: usize) -> HistogramStatistics {
        let mut s = HistogramStatistics::new(bins, None).unwrap();
        for x in batches {
            let geometry = BlockGeometry::new(&[x.len() as i64], &[1], &[], None).unwrap();
            s.update(Values::F32(x), &geometry).unwrap();
        }
        s
    }

    #[test]
    fn by_hand() {
        // 0, 1, .. 100 on 100 bins of width 1: bin i holds i, the last one 99 and 100.
        let x: Vec<f32> = (-50..=50).map(|i| i as f32).collect();
        let s = statistics(&[&x], 100);
        let at = |p: f64| {
            Percentile::new(p)
                .unwrap()
                .encodings(&s, 255.0, false)
                .unwrap()[0]
        };
        assert_eq!(at(100.0), (-50.0, 50.0));
        // 101 * 0.9 = 90.9: the 91st value, -50 + 90; 101 * 0.1 = 10.1: the 11th, -50 + 10.
        assert_eq!(at(90.0), (-40.0, 40.0));
        for bad in [49.9, 100.1, f64::NAN] {
            assert!(Percentile::new(bad).is_err());
        }
        let empty = HistogramStatistics::new(4, None).unwrap();
        assert!(Percentile::new(99.0)
            .unwrap()
            .encodings(&empty, 255.0, false)
            .is_err());
    }

    #[test]
    fn several_batches_stay_within_a_bin() {
        let x: Vec<f32> = (0..10_000)
            .map(|i| (i as f32 * 0.377).sin() * 3.0)
            .collect();
        let y: Vec<f32> = (0..10_000)
            .map(|i| (i as f32 * 0.173).cos() * 5.0 + 1.0)
            .collect();
        let s = statistics(&[&x, &y], 512);
        let mut all = [x, y].concat();
        all.sort_by(f32::total_cmp);
        for p in [60.0, 90.0, 99.0, 99.9] {
            let (low, high) = Percentile::new(p)
                .unwrap()
                .encodings(&s, 255.0, false)
                .unwrap()[0];
            let exact = |share: f64| all[((all.len() as f64 * share) as usize).min(all.len() - 1)];
            let width = 2.0 * 10.0 / 512.0;
            assert!((high - exact(p / 100.0)).abs() <= width, "{p}: {high}");
            assert!((low - exact(1.0 - p / 100.0)).abs() <= width, "{p}: {low}");
        }
    }
}
