//! From a range (min, max) to scale and offset, and the gradients back.
//!
//! `scale = max(|max - min| / num_steps, minimum_scale)`;
//! `offset = clamp(round(min / scale) - qmin, -qmax, -qmin)`, or the grid's constant if symmetric.
//! The gradients are straight-through at the rounding and zero where a clamp holds.

use super::element::{load, load_up_to, store_up_to, Compute, LANES};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared};
use super::vector::Vector;
use crate::encoding::{minimum_scale, AffineGrid};
use std::ops::Range;

/// The range's constants in the kernel's precision: in one lane (`V = C`) or in sixteen.
#[derive(Clone, Copy)]
struct RangeRule<V> {
    steps: V,
    minimum_scale: V,
    qmin: V,
    offset_low: V,
    offset_high: V,
    symmetric_offset: Option<V>,
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
    fn splat<V: Vector<C>>(&self) -> RangeRule<V> {
        RangeRule {
            steps: V::splat(self.steps),
            minimum_scale: V::splat(self.minimum_scale),
            qmin: V::splat(self.qmin),
            offset_low: V::splat(self.offset_low),
            offset_high: V::splat(self.offset_high),
            symmetric_offset: self.symmetric_offset.map(V::splat),
        }
    }
}

impl<V: Copy> RangeRule<V> {
    /// Width of a step as the range has it, with its sign.
    #[inline(always)]
    fn step<C: Compute>(&self, min: V, max: V) -> V
    where
        V: Vector<C>,
    {
        max.sub(min).div(self.steps)
    }

    #[inline(always)]
    fn scale<C: Compute>(&self, step: V) -> V
    where
        V: Vector<C>,
    {
        self.minimum_scale.max(step.abs())
    }

    #[inline(always)]
    fn unclamped_offset<C: Compute>(&self, min: V, scale: V) -> V
    where
        V: Vector<C>,
    {
        min.div(scale).round().sub(self.qmin)
    }

    #[inline(always)]
    fn scale_offset<C: Compute>(&self, min: V, max: V) -> (V, V)
    where
        V: Vector<C>,
    {
        let scale = self.scale(self.step(min, max));
        let offset = match self.symmetric_offset {
            Some(offset) => offset,
            None => self
                .unclamped_offset(min, scale)
                .limit(self.offset_low, self.offset_high),
        };
        (scale, offset)
    }
}

/// Ranges below which no second thread is worth waking: each costs some two elements of a tensor.
const GRAIN: usize = 16_384;

struct ToScaleOffset<'a, C> {
    rule: RangeRule<C>,
    min: &'a [C],
    max: &'a [C],
    scale: Shared<C>,
    offset: Shared<C>,
    range: Range<usize>,
}

impl<C: Compute> Body for ToScaleOffset<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let rule = self.rule.splat::<C::V<S>>();
        let (min, max) = (&self.min[self.range.clone()], &self.max[self.range.clone()]);
        for i in (0..min.len()).step_by(LANES) {
            let (at, n) = (self.range.start + i, min.len() - i);
            // SAFETY: `n` ranges are left from `i`; the results are as long, and this stretch is this call's.
            unsafe {
                let (scale, offset) = rule.scale_offset(
                    load_up_to::<S, C, C>(min.as_ptr().add(i), n),
                    load_up_to::<S, C, C>(max.as_ptr().add(i), n),
                );
                store_up_to::<S, C, C>(self.scale.0.add(at), n, scale);
                store_up_to::<S, C, C>(self.offset.0.add(at), n, offset);
            }
        }
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
        dispatch(ToScaleOffset {
            rule,
            min,
            max,
            scale: *scale,
            offset: *offset,
            range,
        });
    });
}

/// Gradients of scale and offset (`N` = 2), or of the scale alone (1), one for each range.
#[derive(Clone, Copy)]
pub enum ScaleOffsetGradients<'a, C, const N: usize> {
    /// As a backward pass sums them.
    Sums(&'a [[f64; N]]),
    /// As arrays.
    Arrays(&'a [C], &'a [C]),
}

impl<C: Compute, const N: usize> ScaleOffsetGradients<'_, C, N> {
    /// Those of sixteen ranges from `at` on; zero beyond the last.
    #[inline(always)]
    fn lanes<S: Simd>(&self, at: usize) -> [Wide<S>; 2] {
        let mut lanes = [Wide::<S>::splat(0.0); 2];
        match *self {
            Self::Sums(sums) => {
                let sums = &sums[at..];
                for (k, lanes) in lanes.iter_mut().enumerate().take(N) {
                    let mut values = [0.0; LANES];
                    for (value, sum) in values.iter_mut().zip(sums) {
                        *value = sum[k];
                    }
                    *lanes = Vector::from_array(values);
                }
            }
            Self::Arrays(scale, offset) => {
                for (lanes, gradient) in lanes.iter_mut().zip([scale, offset]) {
                    let gradient = &gradient[at..];
                    // SAFETY: as many elements are left.
                    *lanes = unsafe { load_up_to::<S, C, f64>(gradient.as_ptr(), gradient.len()) };
                }
            }
        }
        lanes
    }
}

/// Sixteen float64.
type Wide<S> = <f64 as Compute>::V<S>;

/// Sixteen numbers in float64. A function, since a closure that is not inlined would be compiled for the
/// baseline.
#[inline(always)]
fn wide<S: Simd, C: Compute>(v: C::V<S>) -> Wide<S> {
    let lanes = v.to_array();
    // SAFETY: there are sixteen.
    unsafe { load::<S, C, f64>(lanes.as_ptr()) }
}

/// The chain rule from scale and offset to min and max, of the ranges in `range`.
struct ToRange<'a, C, const N: usize> {
    rule: RangeRule<C>,
    min: &'a [C],
    max: &'a [C],
    grad: ScaleOffsetGradients<'a, C, N>,
    grad_range: [Shared<C>; 2],
    range: Range<usize>,
}

impl<C: Compute, const N: usize> Body for ToRange<'_, C, N> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let zero = Wide::<S>::splat(0.0);
        let rule = self.rule.splat::<C::V<S>>();
        let slope = Wide::<S>::splat(1.0 / self.rule.steps.to_f64());
        let [minimum_scale, low, high] = [
            self.rule.minimum_scale,
            self.rule.offset_low,
            self.rule.offset_high,
        ]
        .map(|constant| Wide::<S>::splat(constant.to_f64()));
        let (mins, maxs) = (&self.min[self.range.clone()], &self.max[self.range.clone()]);
        for i in (0..mins.len()).step_by(LANES) {
            let (at, n) = (self.range.start + i, mins.len() - i);
            // SAFETY: `n` ranges are left from `i`.
            let (min, max) = unsafe {
                (
                    load_up_to::<S, C, C>(mins.as_ptr().add(i), n),
                    load_up_to::<S, C, C>(maxs.as_ptr().add(i), n),
                )
            };
            let [mut grad_scale, grad_offset] = self.grad.lanes::<S>(at);
            let step = rule.step(min, max);
            let mut grad_min = zero;
            if rule.symmetric_offset.is_none() {
                let scale = rule.scale(step);
                let offset = wide::<S, C>(rule.unclamped_offset(min, scale));
                let free = Wide::<S>::and(low.le(offset), offset.le(high));
                let (s, min) = (wide::<S, C>(scale), wide::<S, C>(min));
                grad_min = Wide::<S>::select(free, grad_offset.div(s), zero);
                let through_offset = grad_offset.mul(min).div(s.mul(s));
                grad_scale = Wide::<S>::select(free, grad_scale.sub(through_offset), grad_scale);
            }
            let step = wide::<S, C>(step);
            // NaN stays NaN, as a NaN range makes everything.
            let flat = Wide::<S>::select(step.ordered(), zero, step);
            let slope = slope.with_sign_of(step);
            let slope = Wide::<S>::select(minimum_scale.le(step.abs()), slope, flat);
            let to_max = grad_scale.mul(slope);
            // SAFETY: the results are as long as the ranges, and this stretch is this call's.
            unsafe {
                for (to, values) in self
                    .grad_range
                    .into_iter()
                    .zip([grad_min.sub(to_max), to_max])
                {
                    if !to.0.is_null() {
                        store_up_to::<S, C, f64>(to.0.add(at), n, values);
                    }
                }
            }
        }
    }
}

/// Writes the gradients of min and max to the two places of `grad_range`; null: not wanted. The offset of
/// symmetric ranges is a constant, whose gradient is not looked at.
///
/// # Safety
/// The places of `grad_range` are null or valid for writes of `min.len()` elements.
///
/// # Panics
/// If `max` or the gradients are not as many as `min`, or the offset's are missing.
pub unsafe fn range_to_scale_offset_backward<C: Compute, const N: usize>(
    min: &[C],
    max: &[C],
    grid: &AffineGrid,
    symmetric: bool,
    grad: ScaleOffsetGradients<'_, C, N>,
    grad_range: [*mut C; 2],
) {
    let rule = RangeRule::<C>::new(grid, symmetric);
    let n = min.len();
    assert!(match grad {
        ScaleOffsetGradients::Sums(sums) => sums.len() == n,
        ScaleOffsetGradients::Arrays(scale, offset) => scale.len() == n && offset.len() == n,
    });
    assert_eq!(max.len(), n);
    assert!(symmetric || N == 2);
    let grad_range = grad_range.map(Shared);
    for_each_range(n, GRAIN, |range| {
        let grad_range = &grad_range;
        dispatch(ToRange {
            rule,
            min,
            max,
            grad,
            grad_range: *grad_range,
            range,
        });
    });
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
        let (mut gmin, mut gmax) = (0.0, 0.0);
        // SAFETY: one range, one gradient each.
        unsafe {
            range_to_scale_offset_backward(
                &[-1.0],
                &[2.0],
                &grid,
                true,
                ScaleOffsetGradients::Sums(&[[3.0, 5.0]]),
                [&raw mut gmin, &raw mut gmax],
            );
        }
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
