//! From a range (min, max) to scale and offset, and the gradients back.
//!
//! `scale = max(|max - min| / num_steps, minimum_scale)`;
//! `offset = clamp(round(min / scale) - qmin, -qmax, -qmin)`, or the grid's constant if symmetric.
//! The gradients are straight-through at the rounding and zero where a clamp holds.

use super::element::Compute;
use super::isa::Portable;
use super::parallel::{for_each_range, Shared};
use crate::encoding::{minimum_scale, AffineGrid};

/// The range's constants in the kernel's precision.
#[derive(Clone, Copy)]
struct RangeRule<C> {
    steps: C,
    minimum_scale: C,
    qmin: C,
    offset_low: C,
    offset_high: C,
    symmetric_offset: Option<C>,
}

impl<C: Compute> RangeRule<C> {
    fn new(grid: &AffineGrid, symmetric: bool) -> Self {
        Self {
            steps: C::from_f64(grid.num_steps() as f64),
            minimum_scale: C::from_f64(minimum_scale(grid.num_steps())),
            qmin: C::from_f64(grid.qmin() as f64),
            offset_low: C::from_f64(-grid.qmax() as f64),
            offset_high: C::from_f64(-grid.qmin() as f64),
            symmetric_offset: symmetric.then(|| C::from_f64(grid.symmetric_offset())),
        }
    }

    #[inline(always)]
    fn scale(&self, min: C, max: C) -> C {
        let raw = (max - min) / self.steps;
        let magnitude = if raw < C::ZERO { -raw } else { raw };
        if magnitude < self.minimum_scale {
            self.minimum_scale
        } else {
            magnitude
        }
    }

    #[inline(always)]
    fn unclamped_offset(&self, min: C, scale: C) -> C {
        (min / scale).round::<Portable>() - self.qmin
    }

    #[inline(always)]
    fn scale_offset(&self, min: C, max: C) -> (C, C) {
        let scale = self.scale(min, max);
        let offset = match self.symmetric_offset {
            Some(offset) => offset,
            None => self
                .unclamped_offset(min, scale)
                .limit(self.offset_low, self.offset_high),
        };
        (scale, offset)
    }
}

/// Scale and offset of each range.
///
/// # Panics
/// If the slices differ in length.
pub fn range_to_scale_offset<C: Compute>(
    min: &[C],
    max: &[C],
    grid: &AffineGrid,
    symmetric: bool,
    scale: &mut [C],
    offset: &mut [C],
) {
    let rule = RangeRule::<C>::new(grid, symmetric);
    assert!(min.len() == max.len() && scale.len() == min.len() && offset.len() == min.len());
    let (scale, offset) = (Shared(scale.as_mut_ptr()), Shared(offset.as_mut_ptr()));
    for_each_range(min.len(), GRAIN, |range| {
        let (scale, offset) = (&scale, &offset);
        for i in range {
            let (s, o) = rule.scale_offset(min[i], max[i]);
            // SAFETY: `i` is inside all four slices, and each thread has its own.
            unsafe {
                scale.0.add(i).write(s);
                offset.0.add(i).write(o);
            }
        }
    });
}

/// Ranges below which no second thread is worth waking: each costs some ten times an element of a tensor.
const GRAIN: usize = 4096;

/// The chain rule from scale and offset to min and max.
pub struct RangeGradient<C> {
    rule: RangeRule<C>,
}

impl<C: Compute> RangeGradient<C> {
    /// For quantizers of this grid.
    pub fn new(grid: &AffineGrid, symmetric: bool) -> Self {
        Self {
            rule: RangeRule::new(grid, symmetric),
        }
    }

    /// Turns the gradients of (scale, offset) into those of (min, max), in place.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn apply_all(&self, min: &[C], max: &[C], sums: &mut [(f64, f64)]) {
        assert!(min.len() == sums.len() && max.len() == sums.len());
        let n = sums.len();
        let sums = Shared(sums.as_mut_ptr());
        for_each_range(n, GRAIN, |range| {
            let sums = &sums;
            for i in range {
                // SAFETY: `i` is inside the slice, and each thread has its own.
                let sum = unsafe { &mut *sums.0.add(i) };
                *sum = self.apply(min[i], max[i], sum.0, sum.1);
            }
        });
    }

    /// Gradients of (min, max) from those of (scale, offset).
    pub fn apply(&self, min: C, max: C, grad_scale: f64, grad_offset: f64) -> (f64, f64) {
        let rule = &self.rule;
        let scale = rule.scale(min, max);
        let s = scale.to_f64();
        let mut grad_min = 0.0;
        let mut grad_scale = grad_scale;
        if rule.symmetric_offset.is_none() {
            let offset = rule.unclamped_offset(min, scale);
            if offset >= rule.offset_low && offset <= rule.offset_high {
                grad_min += grad_offset / s;
                grad_scale -= grad_offset * min.to_f64() / (s * s);
            }
        }
        let raw = ((max - min) / rule.steps).to_f64();
        let slope = if raw.abs() < rule.minimum_scale.to_f64() {
            0.0
        } else {
            raw.signum() / rule.steps.to_f64()
        };
        (grad_min - grad_scale * slope, grad_scale * slope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale_offset(min: f64, max: f64, grid: &AffineGrid, symmetric: bool) -> (f64, f64) {
        let (mut s, mut o) = ([0.0], [0.0]);
        range_to_scale_offset(&[min], &[max], grid, symmetric, &mut s, &mut o);
        (s[0], o[0])
    }

    #[test]
    fn a_range_gives_the_usual_scale_and_offset() {
        let grid = AffineGrid::from_bitwidth(8, false).unwrap();
        assert_eq!(scale_offset(-1.0, 254.0, &grid, false), (1.0, -1.0));
        assert_eq!(scale_offset(-128.0, 127.0, &grid, true), (1.0, -128.0));
        // Reversed and empty ranges have a positive scale.
        assert_eq!(scale_offset(254.0, -1.0, &grid, false).0, 1.0);
        assert_eq!(
            scale_offset(0.0, 0.0, &grid, false),
            (f64::from(f32::EPSILON), 0.0)
        );
        // A range that does not hold zero: the offset stays on the grid.
        assert_eq!(scale_offset(100.0, 355.0, &grid, false), (1.0, 0.0));
    }

    #[test]
    fn the_symmetric_gradient_is_the_numeric_derivative() {
        let grid = AffineGrid::from_bitwidth(4, true).unwrap();
        let gradient = RangeGradient::<f64>::new(&grid, true);
        let (gmin, gmax) = gradient.apply(-1.0, 2.0, 3.0, 5.0);
        let h = 1e-6;
        let numeric = |dmin: f64, dmax: f64| {
            let up = scale_offset(-1.0 + dmin, 2.0 + dmax, &grid, true).0;
            let down = scale_offset(-1.0 - dmin, 2.0 - dmax, &grid, true).0;
            3.0 * (up - down) / (2.0 * h)
        };
        approx::assert_relative_eq!(gmin, numeric(h, 0.0), max_relative = 1e-6);
        approx::assert_relative_eq!(gmax, numeric(0.0, h), max_relative = 1e-6);
    }
}
