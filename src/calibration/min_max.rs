//! The observed range, and how a range is fitted to a grid.

use super::walk::{GroupWalk, Scratch};
use super::{check_num_steps, minimum_scale, simd, Values};
use crate::encoding::BlockGeometry;
use crate::error::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Smallest and largest value of each group. NaN anywhere in a group makes both ends NaN, as a torch
/// reduction does; infinities are kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MinMax {
    min: Vec<f32>,
    max: Vec<f32>,
}

impl MinMax {
    /// The range of each group of a tensor.
    ///
    /// # Errors
    /// [`Error::Value`] if the tensor is empty or has another number of elements than the geometry.
    pub fn collect(values: Values<'_>, geometry: &BlockGeometry) -> Result<Self> {
        values.check(geometry)?;
        let walk = GroupWalk::new(geometry);
        let tiles = walk.tiles();
        let ranges: Vec<Vec<(f32, f32)>> = tiles
            .into_par_iter()
            .map_init(Scratch::default, |scratch, tile| {
                let first = tile.start;
                let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); tile.len()];
                walk.for_each_slice(
                    values,
                    tile,
                    0..walk.per_group(),
                    scratch,
                    |group, slice| {
                        let seen = if slice.iter().any(|x| x.is_nan()) {
                            (f32::NAN, f32::NAN)
                        } else {
                            simd::range(slice)
                        };
                        let range = &mut ranges[group - first];
                        *range = (smaller(range.0, seen.0), larger(range.1, seen.1));
                    },
                );
                ranges
            })
            .collect();
        let (min, max) = ranges.into_iter().flatten().unzip();
        Ok(Self { min, max })
    }

    /// Smallest value of each group; empty before any data.
    pub fn min(&self) -> &[f32] {
        &self.min
    }

    /// Largest value of each group; empty before any data.
    pub fn max(&self) -> &[f32] {
        &self.max
    }

    /// Takes in the ranges of other data. The order of merging does not matter.
    ///
    /// # Errors
    /// [`Error::Value`] if the number of groups differs.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.min.is_empty() {
            return Ok(());
        }
        if self.min.is_empty() {
            *self = other.clone();
            return Ok(());
        }
        if self.min.len() != other.min.len() {
            return Err(Error::value(
                "other",
                format!("statistics of {} groups", self.min.len()),
                other.min.len(),
            ));
        }
        for (into, &from) in self.min.iter_mut().zip(&other.min) {
            *into = smaller(*into, from);
        }
        for (into, &from) in self.max.iter_mut().zip(&other.max) {
            *into = larger(*into, from);
        }
        Ok(())
    }

    /// The range of a grid with `num_steps` steps for each group; see [`fit_range_min_max`].
    ///
    /// # Errors
    /// [`Error::State`] before any data, [`Error::Value`] if `num_steps` is not positive.
    pub fn encodings(&self, num_steps: f64, symmetric: bool) -> Result<Vec<(f32, f32)>> {
        if self.min.is_empty() {
            return Err(no_data());
        }
        self.min
            .iter()
            .zip(&self.max)
            .map(|(&low, &high)| fit_range_min_max(low, high, num_steps, symmetric))
            .collect()
    }
}

pub(super) fn no_data() -> Error {
    Error::State("no data was observed: there are no encodings to compute".into())
}

fn smaller(a: f32, b: f32) -> f32 {
    if b < a || b.is_nan() {
        b
    } else {
        a
    }
}

fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() {
        b
    } else {
        a
    }
}

fn fit(low: f32, high: f32, num_steps: f64, symmetric: bool, extra: f64) -> (f32, f32) {
    let steps = num_steps as f32;
    let smallest = minimum_scale(num_steps) as f32;
    // Compare and select: NaN stays.
    let mut low = if low > 0.0 { 0.0 } else { low };
    let mut high = if high < 0.0 { 0.0 } else { high };
    let widening = if (high - low) / steps < smallest {
        smallest
    } else {
        0.0
    };
    if !symmetric {
        return (low, high + steps * widening);
    }
    let positive = (num_steps / 2.0).floor();
    let negative = (num_steps / 2.0).ceil() as f32;
    // A symmetric grid of one step has none above zero; weighing it as one keeps its scale positive.
    let weighed = (positive + extra).max(1.0) as f32;
    let positive = positive as f32;
    high += positive * widening;
    low -= negative * widening;
    let delta = larger(high / weighed, -low / negative);
    (-negative * delta, positive * delta)
}

/// The range of a grid with `num_steps` steps that holds zero and the observed `low..=high`.
///
/// A range narrower than the minimum scale times `num_steps` is widened by that much: upwards if
/// asymmetric, to both sides if symmetric. A symmetric grid has `floor(num_steps / 2)` steps above
/// zero and `ceil(num_steps / 2)` below, all as large as the side in greater need asks for. Infinite
/// ends count as the largest finite value.
///
/// # Errors
/// [`Error::Value`] if `num_steps` is not positive.
pub fn fit_range(low: f32, high: f32, num_steps: f64, symmetric: bool) -> Result<(f32, f32)> {
    check_num_steps(num_steps)?;
    let low = if low < f32::MIN { f32::MIN } else { low };
    let high = if high > f32::MAX { f32::MAX } else { high };
    Ok(fit(low, high, num_steps, symmetric, 0.0))
}

/// [`fit_range`] as the min-max analyzer applies it: a symmetric grid of three steps may clip the
/// positive side by half, so that no step of the negative side is wasted on symmetric data; the
/// result, not the observed range, is made finite.
///
/// # Errors
/// [`Error::Value`] if `num_steps` is not positive.
pub fn fit_range_min_max(
    low: f32,
    high: f32,
    num_steps: f64,
    symmetric: bool,
) -> Result<(f32, f32)> {
    check_num_steps(num_steps)?;
    let extra = if symmetric && num_steps == 3.0 {
        1.0
    } else {
        0.0
    };
    let (low, high) = fit(low, high, num_steps, symmetric, extra);
    Ok((
        low.clamp(f32::MIN, f32::MAX),
        high.clamp(f32::MIN, f32::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn degenerate_ranges() {
        let eps = f32::EPSILON;
        assert_eq!(
            fit_range(0.0, 0.0, 255.0, false).unwrap(),
            (0.0, 255.0 * eps)
        );
        assert_eq!(
            fit_range(0.0, 0.0, 255.0, true).unwrap(),
            (-128.0 * eps, 127.0 * eps)
        );
        assert_eq!(fit_range(1.0, 3.0, 255.0, false).unwrap(), (0.0, 3.0));
        assert_eq!(fit_range(-3.0, -1.0, 255.0, false).unwrap(), (-3.0, 0.0));
        assert!(fit_range(f32::NAN, f32::NAN, 255.0, false)
            .unwrap()
            .0
            .is_nan());
        let (low, high) = fit_range_min_max(f32::NEG_INFINITY, 1.0, 255.0, true).unwrap();
        assert_eq!((low, high), (f32::MIN, f32::MAX));
        assert!(fit_range(0.0, 1.0, 0.0, false).is_err());
        assert!(fit_range(0.0, 1.0, f64::NAN, false).is_err());
        // One step, symmetric, positive data only: still a positive scale.
        assert_eq!(fit_range(0.0, 3.0, 1.0, true).unwrap(), (-3.0, 0.0));
    }

    #[test]
    fn two_bit_symmetric_clips_the_positive_side() {
        assert_eq!(
            fit_range_min_max(-1.0, 1.0, 3.0, true).unwrap(),
            (-1.0, 0.5)
        );
        assert_eq!(fit_range(-1.0, 1.0, 3.0, true).unwrap(), (-2.0, 1.0));
    }

    #[test]
    fn nan_wins_and_merging_is_a_union() {
        let geometry = BlockGeometry::new(&[2, 3], &[3, 1], &[2, 1], None).unwrap();
        let mut a =
            MinMax::collect(Values::F32(&[1.0, 2.0, 3.0, 0.0, f32::NAN, 5.0]), &geometry).unwrap();
        assert_eq!((a.min()[0], a.max()[0]), (1.0, 3.0));
        assert!(a.min()[1].is_nan() && a.max()[1].is_nan());
        let b = MinMax::collect(Values::F32(&[-1.0, 2.0, 2.0, 0.0, 1.0, 9.0]), &geometry).unwrap();
        a.merge(&b).unwrap();
        assert_eq!((a.min()[0], a.max()[0]), (-1.0, 3.0));
        assert!(a.min()[1].is_nan() && a.max()[1].is_nan());
        assert!(MinMax::default().encodings(255.0, false).is_err());
        assert!(MinMax::collect(Values::F32(&[1.0]), &geometry).is_err());
    }

    proptest! {
        #[test]
        fn the_range_holds_zero_and_the_data(
            a in -1e6_f32..1e6, b in -1e6_f32..1e6, bits in 2_u32..17, symmetric: bool,
        ) {
            let steps = f64::from(2_u32.pow(bits) - 1);
            let (low, high) = fit_range(a.min(b), a.max(b), steps, symmetric).unwrap();
            prop_assert!(low <= 0.0 && high >= 0.0 && high > low);
            let slack = 1e-6 * (high - low);
            prop_assert!(low <= a.min(b) + slack);
            prop_assert!(high >= a.max(b) - slack || (symmetric && -low >= a.max(b) - slack));
            prop_assert!((high - low) as f64 / steps >= minimum_scale(steps) * 0.999);
        }
    }
}
