//! Quantize and quantize-dequantize to floating-point formats, forward and backward, one pass each.
//!
//! `nearest(x / scale) [* scale]`, where `nearest` rounds to the format's values, ties to even,
//! saturating; see `docs/numerics.md`.

use super::element::{load, load_part, store, store_part, Compute, Element, LANES};
use super::isa::Simd;
use super::reduce::{reduce, Reduction};
use super::vector::Vector;
use crate::encoding::{BlockGeometry, FloatFormat};
use std::marker::PhantomData;

/// A format's constants in the kernel's precision. `W` is the unsigned integer of `C`'s size.
#[derive(Clone, Copy)]
pub struct Rounding<C, W> {
    /// Bits of the compute type's mantissa that the format has not.
    dropped: u32,
    /// What carries into the kept bits from just over half of the dropped ones on.
    below_half: W,
    /// The kept bits.
    kept: W,
    /// Which bit decides a tie (none if nothing is dropped).
    odd: W,
    /// Set where the format has no mantissa: the implicit bit, which is odd, decides then.
    implicit: W,
    min_normal: C,
    /// Its unit in the last place is the format's finest step.
    finest: C,
    max: C,
    /// What to add to make a negative zero positive (0), or to change nothing (-0).
    zero: C,
}

/// A compute type whose values can be rounded to a format.
pub trait RoundToFormat: Compute {
    /// The constants.
    type Rounding: Copy + Send + Sync;
    /// The constants of `format`.
    fn rounding(format: &FloatFormat) -> Self::Rounding;
    /// The nearest value of the format, ties to even; beyond the largest value, that one. NaN stays.
    fn nearest(self, rounding: &Self::Rounding) -> Self;
    /// The largest value of the format.
    fn largest(rounding: &Self::Rounding) -> Self;
    /// Magnitude.
    fn magnitude(self) -> Self;
}

macro_rules! round_to_format {
    ($c:ty, $w:ty) => {
        impl RoundToFormat for $c {
            type Rounding = Rounding<$c, $w>;

            fn rounding(format: &FloatFormat) -> Self::Rounding {
                const STORED: u32 = <$c>::MANTISSA_DIGITS - 1;
                let dropped = STORED - format.mantissa_bits();
                let power = |exponent: i32| f64::from_bits(((exponent + 1023) as u64) << 52) as $c;
                Rounding {
                    dropped,
                    below_half: (1 as $w).checked_shl(dropped).unwrap_or(0).wrapping_sub(1) >> 1,
                    kept: (<$w>::MAX >> 1) & (<$w>::MAX << dropped),
                    odd: <$w>::from(dropped > 0),
                    implicit: <$w>::from(format.mantissa_bits() == 0),
                    min_normal: power(format.min_exponent()),
                    finest: power(format.min_exponent() + dropped as i32),
                    max: format.max() as $c,
                    zero: if format.unsigned_zero() { 0.0 } else { -0.0 },
                }
            }

            #[inline(always)]
            fn nearest(self, r: &Self::Rounding) -> Self {
                let bits = self.to_bits();
                let sign = bits & !(<$w>::MAX >> 1);
                let magnitude = bits ^ sign;
                // A carry out of the mantissa is the next power of two, as it should be.
                let odd = ((magnitude >> r.dropped) | r.implicit) & r.odd;
                let normal = <$c>::from_bits((magnitude + (r.below_half + odd)) & r.kept);
                let magnitude = <$c>::from_bits(magnitude);
                // Adding rounds to the unit in the last place of the sum, ties to even.
                let subnormal = (magnitude + r.finest) - r.finest;
                let rounded = if magnitude < r.min_normal {
                    subnormal
                } else {
                    normal
                };
                let rounded = if rounded > r.max { r.max } else { rounded };
                let signed = <$c>::from_bits(rounded.to_bits() | sign) + r.zero;
                if self.is_nan() {
                    self
                } else {
                    signed
                }
            }

            #[inline(always)]
            fn largest(r: &Self::Rounding) -> Self {
                r.max
            }

            #[inline(always)]
            fn magnitude(self) -> Self {
                self.abs()
            }
        }
    };
}
round_to_format!(f32, u32);
round_to_format!(f64, u64);

/// One of the float functions: its value, and its straight-through gradients.
pub trait FloatOp: Copy + Send + Sync + 'static {
    /// The value at `x`.
    fn value<C: RoundToFormat>(x: C, scale: C, rounding: &C::Rounding) -> C;
    /// The gradients of `x` and scale for the incoming gradient `g`.
    fn gradient<C: RoundToFormat>(g: C, x: C, scale: C, rounding: &C::Rounding) -> (C, C);
}

/// `nearest(x / scale)`.
#[derive(Clone, Copy)]
pub struct FloatQuantize;
/// `nearest(x / scale) * scale`.
#[derive(Clone, Copy)]
pub struct FloatQuantizeDequantize;

impl FloatOp for FloatQuantize {
    #[inline(always)]
    fn value<C: RoundToFormat>(x: C, scale: C, rounding: &C::Rounding) -> C {
        (x / scale).nearest(rounding)
    }
    #[inline(always)]
    fn gradient<C: RoundToFormat>(g: C, x: C, scale: C, rounding: &C::Rounding) -> (C, C) {
        let ratio = x / scale;
        let inside = ratio.magnitude() <= C::largest(rounding);
        let gx = if inside { g / scale } else { C::ZERO };
        // Outside the terms are exact zeros, not 0 * inf.
        let gs = if inside { -(gx * ratio) } else { C::ZERO };
        (gx, gs)
    }
}

impl FloatOp for FloatQuantizeDequantize {
    #[inline(always)]
    fn value<C: RoundToFormat>(x: C, scale: C, rounding: &C::Rounding) -> C {
        (x / scale).nearest(rounding) * scale
    }
    #[inline(always)]
    fn gradient<C: RoundToFormat>(g: C, x: C, scale: C, rounding: &C::Rounding) -> (C, C) {
        let ratio = x / scale;
        let value = ratio.nearest(rounding);
        let inside = ratio.magnitude() <= C::largest(rounding);
        let gx = if inside { g } else { C::ZERO };
        (gx, g * if inside { value - ratio } else { value })
    }
}

/// Reads up to sixteen elements; the lanes beyond `n` are zero.
///
/// # Safety
/// `p` is valid for reads of `n.min(16)` elements.
#[inline(always)]
unsafe fn read<S: Simd, T: Element<C>, C: Compute>(p: *const T, n: usize) -> [C; LANES] {
    // SAFETY: by the contract.
    unsafe {
        if n >= LANES {
            load::<S, T, C>(p).to_array()
        } else {
            load_part::<S, T, C>(p, n).to_array()
        }
    }
}

/// Writes the first `n.min(16)` of sixteen values.
///
/// # Safety
/// `p` is valid for writes of `n.min(16)` elements.
#[inline(always)]
unsafe fn write<S: Simd, T: Element<C>, C: Compute>(p: *mut T, n: usize, values: [C; LANES]) {
    let values = <C::V<S>>::from_array(values);
    // SAFETY: by the contract.
    unsafe {
        if n >= LANES {
            store::<S, T, C, false>(p, values);
        } else {
            store_part::<S, T, C>(p, n, values);
        }
    }
}

/// A walk that only writes: nothing is reduced.
struct Forward<'a, O, T, C: RoundToFormat> {
    scale: &'a [C],
    rounding: C::Rounding,
    input: *const T,
    output: *mut T,
    op: PhantomData<O>,
}

// SAFETY: `input` is only read; `output` is written in disjoint stretches, each element after it was read.
unsafe impl<O: Sync, T: Sync, C: RoundToFormat> Sync for Forward<'_, O, T, C> {}

impl<O: FloatOp, T: Element<C>, C: RoundToFormat> Forward<'_, O, T, C> {
    /// # Safety
    /// `n.min(16)` elements from `at` are inside this call's stretch.
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES]) {
        // SAFETY: by the contract.
        unsafe {
            let x = read::<S, T, C>(self.input.add(at), n);
            let mut y = [C::ZERO; LANES];
            for j in 0..LANES {
                y[j] = O::value(x[j], scale[j], &self.rounding);
            }
            write::<S, T, C>(self.output.add(at), n, y);
        }
    }
}

impl<O: FloatOp, T: Element<C>, C: RoundToFormat> Reduction for Forward<'_, O, T, C> {
    type Partial = ();

    fn identity(&self) {}

    fn combine((): &mut (), (): ()) {}

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, start: usize, len: usize, group: usize) {
        let scale = [self.scale[group]; LANES];
        for i in (0..len).step_by(LANES) {
            // SAFETY: the block is inside the run.
            unsafe { self.block::<S>(start + i, len - i, &scale) };
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, start: usize, groups: &[usize], _: &mut [()]) {
        for (i, groups) in groups.chunks(LANES).enumerate() {
            let scale = gather(self.scale, groups);
            // SAFETY: the tile is inside the tensor.
            unsafe { self.block::<S>(start + i * LANES, groups.len(), &scale) };
        }
    }
}

/// The scales of up to sixteen elements; 1 in the lanes beyond.
#[inline(always)]
fn gather<C: Compute>(scale: &[C], groups: &[usize]) -> [C; LANES] {
    let mut lanes = [C::from_f64(1.0); LANES];
    for (lane, &group) in lanes.iter_mut().zip(groups) {
        *lane = scale[group];
    }
    lanes
}

/// Applies `O` to every element. `output` may be `input`.
///
/// # Safety
/// `input` is valid for reads and `output` for writes of `geometry.numel()` elements;
/// they are the same place or do not overlap.
///
/// # Panics
/// If `scale` has not `geometry.num_groups()` elements.
pub unsafe fn forward<O: FloatOp, T: Element<C>, C: RoundToFormat>(
    geometry: &BlockGeometry,
    scale: &[C],
    format: &FloatFormat,
    input: *const T,
    output: *mut T,
) {
    assert_eq!(scale.len(), geometry.num_groups());
    reduce(
        geometry,
        &Forward::<O, T, C> {
            scale,
            rounding: C::rounding(format),
            input,
            output,
            op: PhantomData,
        },
    );
}

struct Backward<'a, O, T, C: RoundToFormat> {
    scale: &'a [C],
    rounding: C::Rounding,
    grad: *const T,
    input: *const T,
    /// Null if the gradient of the input is not wanted.
    grad_input: *mut T,
    op: PhantomData<O>,
}

// SAFETY: `grad` and `input` are only read; `grad_input` is written in disjoint stretches.
unsafe impl<O: Sync, T: Sync, C: RoundToFormat> Sync for Backward<'_, O, T, C> {}

/// Elements whose sums are kept in the lanes before they are added up in float64.
const LANE_SUM: usize = 4096;

impl<O: FloatOp, T: Element<C>, C: RoundToFormat> Backward<'_, O, T, C> {
    /// Writes the gradients of sixteen (or the last `n`) elements and gives the scale's terms; lanes
    /// beyond `n` are zero, unless the scale is.
    ///
    /// # Safety
    /// `n.min(16)` elements from `at` are inside this call's stretch.
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES]) -> [C; LANES] {
        // SAFETY: by the contract.
        unsafe {
            let g = read::<S, T, C>(self.grad.add(at), n);
            let x = read::<S, T, C>(self.input.add(at), n);
            let mut gx = [C::ZERO; LANES];
            let mut gs = [C::ZERO; LANES];
            for j in 0..LANES {
                (gx[j], gs[j]) = O::gradient(g[j], x[j], scale[j], &self.rounding);
            }
            if !self.grad_input.is_null() {
                write::<S, T, C>(self.grad_input.add(at), n, gx);
            }
            gs
        }
    }
}

impl<O: FloatOp, T: Element<C>, C: RoundToFormat> Reduction for Backward<'_, O, T, C> {
    type Partial = f64;

    fn identity(&self) -> f64 {
        0.0
    }

    #[inline(always)]
    fn combine(into: &mut f64, from: f64) {
        *into += from;
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, start: usize, len: usize, group: usize) -> f64 {
        let scale = [self.scale[group]; LANES];
        let mut total = 0.0;
        for from in (0..len).step_by(LANE_SUM) {
            let end = len.min(from + LANE_SUM);
            let mut sum = [C::ZERO; LANES];
            for i in (from..end).step_by(LANES) {
                // SAFETY: the block is inside the run.
                let terms = unsafe { self.block::<S>(start + i, end - i, &scale) };
                for j in 0..LANES {
                    // Lanes beyond the end hold 0 / 0 for a scale of zero.
                    let term = if i + j < end { terms[j] } else { C::ZERO };
                    sum[j] = sum[j] + term;
                }
            }
            for lane in sum {
                total += lane.to_f64();
            }
        }
        total
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, start: usize, groups: &[usize], partials: &mut [f64]) {
        for (i, groups) in groups.chunks(LANES).enumerate() {
            let scale = gather(self.scale, groups);
            // SAFETY: the tile is inside the tensor.
            let terms = unsafe { self.block::<S>(start + i * LANES, groups.len(), &scale) };
            for (&group, term) in groups.iter().zip(terms) {
                partials[group] += term.to_f64();
            }
        }
    }
}

/// The gradients of `O`: writes that of the input (unless `grad_input` is null) and returns that of the
/// scale, per encoding, summed as in [`affine::backward`](super::affine::backward).
///
/// # Safety
/// `grad` and `input` are valid for reads, `grad_input` (if not null) for writes of
/// `geometry.numel()` elements in the same memory order, and it overlaps neither.
///
/// # Panics
/// If `scale` has not `geometry.num_groups()` elements.
pub unsafe fn backward<O: FloatOp, T: Element<C>, C: RoundToFormat>(
    geometry: &BlockGeometry,
    scale: &[C],
    format: &FloatFormat,
    grad: *const T,
    input: *const T,
    grad_input: *mut T,
) -> Vec<f64> {
    assert_eq!(scale.len(), geometry.num_groups());
    reduce(
        geometry,
        &Backward::<O, T, C> {
            scale,
            rounding: C::rounding(format),
            grad,
            input,
            grad_input,
            op: PhantomData,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in float64: the step at |x|, an integer number of steps, saturated.
    fn definition(x: f64, format: &FloatFormat) -> f64 {
        if x.is_nan() {
            return x;
        }
        if x.abs() >= format.max() {
            return format.max().copysign(x);
        }
        let exponent = if x == 0.0 {
            format.min_exponent()
        } else {
            (x.abs().log2().floor() as i32).max(format.min_exponent())
        };
        let step = f64::from(exponent - format.mantissa_bits() as i32).exp2();
        ((x / step).round_ties_even() * step).clamp(-format.max(), format.max())
    }

    fn formats() -> Vec<FloatFormat> {
        let mut formats = Vec::new();
        for exponent in 0..=8 {
            for mantissa in [0, 1, 2, 3, 7, 10, 22, 23] {
                for (finite, unsigned_zero) in [(false, false), (true, false), (true, true)] {
                    formats.extend(FloatFormat::new(exponent, mantissa, finite, unsigned_zero));
                }
            }
        }
        formats
    }

    proptest::proptest! {
        #[test]
        fn the_nearest_value_is_that_of_the_definition(bits: u32, near in -160_i32..130) {
            let any = f32::from_bits(bits);
            // Values whose exponent and mantissa are near those of the formats: ties are frequent.
            let tie = ((bits & 0xff) as f32 - 128.0) * f32::from_bits(((near + 127).clamp(1, 254) as u32) << 23) / 16.0;
            for format in formats() {
                for x in [any, tie, -any] {
                    let expected = definition(f64::from(x), &format);
                    let wide = f64::from(x).nearest(&f64::rounding(&format));
                    proptest::prop_assert!(wide == expected || (wide.is_nan() && expected.is_nan()),
                        "{format:?} {x:e}: {wide:e} {expected:e}");
                    if format.fits_f32() {
                        let got = x.nearest(&f32::rounding(&format));
                        proptest::prop_assert!(f64::from(got) == expected || (got.is_nan() && expected.is_nan()),
                            "{format:?} {x:e}: {got:e} {expected:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn infinities_saturate_and_zeros_keep_their_sign_unless_there_is_one_only() {
        for format in formats() {
            let rounding = f64::rounding(&format);
            assert_eq!(f64::INFINITY.nearest(&rounding), format.max());
            assert_eq!((-f64::INFINITY).nearest(&rounding), -format.max());
            assert!(f64::NAN.nearest(&rounding).is_nan());
            assert!(0.0_f64.nearest(&rounding).is_sign_positive());
            assert_eq!(
                (-0.0_f64).nearest(&rounding).is_sign_negative(),
                !format.unsigned_zero()
            );
        }
    }
}
