//! Quantize and quantize-dequantize to floating-point formats, forward and backward, one pass each.
//!
//! `nearest(x / scale) [* scale]`, where `nearest` rounds to the format's values, ties to even,
//! saturating; see `docs/numerics.md`.

use super::element::{Compute, Element};
use super::elementwise::{self, Function};
use super::isa::Simd;
use super::vector::Vector;
use crate::encoding::{BlockGeometry, FloatFormat};
use std::marker::PhantomData;

/// A format's constants in the kernel's precision: in one lane (`V = C`) or in sixteen. With `V = C` the CUDA
/// kernels' argument too: twin of `Rounding` in `csrc/cuda/float.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rounding<V> {
    /// What carries into the kept bits from just over half of the dropped ones on.
    below_half: V,
    /// The kept bits, without the sign.
    kept: V,
    /// Which bit decides a tie (none if nothing is dropped).
    odd: V,
    /// Set where the format has no mantissa: the implicit bit, which is odd, decides then.
    implicit: V,
    min_normal: V,
    /// Its unit in the last place is the format's finest step.
    finest: V,
    max: V,
    /// What to add to make a negative zero positive (0), or to change nothing (-0).
    zero: V,
    /// Bits of the compute type's mantissa that the format has not.
    dropped: u32,
}

impl<C: Compute> Rounding<C> {
    /// The constants of `format`, whose values `C` holds.
    pub fn new(format: &FloatFormat) -> Self {
        let dropped = C::MANTISSA_BITS - format.mantissa_bits();
        let power = |exponent: i32| {
            C::from_f64(f64::from_bits(
                ((exponent + 1023) as u64) << f64::MANTISSA_BITS,
            ))
        };
        Self {
            dropped,
            below_half: C::from_bits(((1 << dropped) - 1) >> 1),
            kept: C::MAGNITUDE.bits_and(C::from_bits(u64::MAX << dropped)),
            odd: C::from_bits(u64::from(dropped > 0)),
            implicit: C::from_bits(u64::from(format.mantissa_bits() == 0)),
            min_normal: power(format.min_exponent()),
            finest: power(format.min_exponent() + dropped as i32),
            max: C::from_f64(format.max()),
            zero: if format.unsigned_zero() {
                C::ZERO
            } else {
                -C::ZERO
            },
        }
    }

    #[inline(always)]
    fn splat<V: Vector<C>>(&self) -> Rounding<V> {
        Rounding {
            dropped: self.dropped,
            below_half: V::splat(self.below_half),
            kept: V::splat(self.kept),
            odd: V::splat(self.odd),
            implicit: V::splat(self.implicit),
            min_normal: V::splat(self.min_normal),
            finest: V::splat(self.finest),
            max: V::splat(self.max),
            zero: V::splat(self.zero),
        }
    }
}

impl<V: Copy> Rounding<V> {
    /// The nearest value of the format, ties to even; beyond the largest value, that one. NaN stays.
    #[inline(always)]
    fn nearest<C: Compute>(&self, x: V) -> V
    where
        V: Vector<C>,
    {
        let magnitude = x.abs();
        let odd = magnitude
            .bits_shift_right(self.dropped)
            .bits_or(self.implicit)
            .bits_and(self.odd);
        // A carry out of the mantissa is the next power of two, as it should be.
        let normal = magnitude
            .bits_add(self.below_half.bits_add(odd))
            .bits_and(self.kept);
        // Adding rounds to the unit in the last place of the sum, ties to even.
        let subnormal = magnitude.add(self.finest).sub(self.finest);
        let rounded = V::select(self.min_normal.le(magnitude), normal, subnormal).min(self.max);
        let signed = rounded.with_sign_of(x).add(self.zero);
        V::select(x.ordered(), signed, x)
    }

    /// Where `x` is not beyond the largest value; nowhere for NaN.
    #[inline(always)]
    fn inside<C: Compute>(&self, x: V) -> V::Mask
    where
        V: Vector<C>,
    {
        x.abs().le(self.max)
    }
}

/// One of the float functions: its value, and its straight-through gradients.
pub trait FloatOp: Copy + Send + Sync + 'static {
    /// The value at `x`.
    fn value<C: Compute, V: Vector<C>>(x: V, scale: V, rounding: &Rounding<V>) -> V;
    /// The gradients of `x` and scale for the incoming gradient `g`.
    fn gradient<C: Compute, V: Vector<C>>(g: V, x: V, scale: V, rounding: &Rounding<V>) -> (V, V);
}

/// `nearest(x / scale)`.
#[derive(Clone, Copy)]
pub struct FloatQuantize;
/// `nearest(x / scale) * scale`.
#[derive(Clone, Copy)]
pub struct FloatQuantizeDequantize;

impl FloatOp for FloatQuantize {
    #[inline(always)]
    fn value<C: Compute, V: Vector<C>>(x: V, scale: V, rounding: &Rounding<V>) -> V {
        rounding.nearest(x.div(scale))
    }
    #[inline(always)]
    fn gradient<C: Compute, V: Vector<C>>(g: V, x: V, scale: V, rounding: &Rounding<V>) -> (V, V) {
        let zero = V::splat(C::ZERO);
        let ratio = x.div(scale);
        let inside = rounding.inside(ratio);
        let gx = V::select(inside, g.div(scale), zero);
        // Outside the terms are exact zeros, not 0 * inf.
        (gx, V::select(inside, zero.sub(gx.mul(ratio)), zero))
    }
}

impl FloatOp for FloatQuantizeDequantize {
    #[inline(always)]
    fn value<C: Compute, V: Vector<C>>(x: V, scale: V, rounding: &Rounding<V>) -> V {
        rounding.nearest(x.div(scale)).mul(scale)
    }
    #[inline(always)]
    fn gradient<C: Compute, V: Vector<C>>(g: V, x: V, scale: V, rounding: &Rounding<V>) -> (V, V) {
        let ratio = x.div(scale);
        let value = rounding.nearest(ratio);
        let inside = rounding.inside(ratio);
        let slope = V::select(inside, value.sub(ratio), value);
        (V::select(inside, g, V::splat(C::ZERO)), g.mul(slope))
    }
}

/// An op with its format.
#[derive(Clone, Copy)]
struct ToFormat<O, C> {
    rounding: Rounding<C>,
    op: PhantomData<O>,
}

impl<O: FloatOp, C: Compute> ToFormat<O, C> {
    fn new(format: &FloatFormat) -> Self {
        Self {
            rounding: Rounding::new(format),
            op: PhantomData,
        }
    }
}

impl<O: FloatOp, C: Compute> Function<C, 1> for ToFormat<O, C> {
    type Constants<S: Simd> = Rounding<C::V<S>>;
    #[inline(always)]
    fn constants<S: Simd>(&self) -> Rounding<C::V<S>> {
        self.rounding.splat()
    }
    #[inline(always)]
    fn value<S: Simd>(x: C::V<S>, [scale]: [C::V<S>; 1], rounding: &Rounding<C::V<S>>) -> C::V<S> {
        O::value(x, scale, rounding)
    }
    #[inline(always)]
    fn gradient<S: Simd>(
        g: C::V<S>,
        x: C::V<S>,
        [scale]: [C::V<S>; 1],
        rounding: &Rounding<C::V<S>>,
    ) -> (C::V<S>, [C::V<S>; 1]) {
        let (input, scale) = O::gradient(g, x, scale, rounding);
        (input, [scale])
    }
}

/// Applies `O` to every element. `output` may be `input`.
///
/// # Safety
/// `input` is valid for reads and `output` for writes of `geometry.numel()` elements;
/// they are the same place or do not overlap.
///
/// # Panics
/// If `scale` has not `geometry.num_groups()` elements.
pub unsafe fn forward<O: FloatOp, T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    scale: &[C],
    format: &FloatFormat,
    input: *const T,
    output: *mut T,
) {
    let function = ToFormat::<O, C>::new(format);
    // SAFETY: handed on.
    unsafe { elementwise::forward(geometry, function, [scale], input, output) }
}

/// The gradients of `O`: writes that of the input (unless `grad_input` is null) and returns that of the
/// scale, per encoding, summed as in [`elementwise::backward`].
///
/// # Safety
/// `grad` and `input` are valid for reads, `grad_input` (if not null) for writes of
/// `geometry.numel()` elements in the same memory order, and it overlaps neither.
///
/// # Panics
/// If `scale` has not `geometry.num_groups()` elements.
pub unsafe fn backward<O: FloatOp, T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    scale: &[C],
    format: &FloatFormat,
    grad: *const T,
    input: *const T,
    grad_input: *mut T,
) -> Vec<[f64; 1]> {
    let function = ToFormat::<O, C>::new(format);
    // SAFETY: handed on.
    unsafe { elementwise::backward(geometry, function, [scale], grad, input, grad_input) }
}

/// The definition, in float64: the step at |x|, an integer number of steps, saturated.
#[cfg(test)]
pub(super) fn definition(x: f64, format: &FloatFormat) -> f64 {
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

#[cfg(test)]
mod tests {
    use super::super::isa::Portable;
    use super::*;

    fn nearest<C: Compute>(x: C, format: &FloatFormat) -> C {
        type V<C> = <C as Compute>::V<Portable>;
        let rounding = Rounding::new(format).splat::<V<C>>();
        rounding.nearest(V::<C>::splat(x)).to_array()[0]
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
                    let wide = nearest(f64::from(x), &format);
                    proptest::prop_assert!(wide == expected || (wide.is_nan() && expected.is_nan()),
                        "{format:?} {x:e}: {wide:e} {expected:e}");
                    if format.fits_f32() {
                        let got = nearest(x, &format);
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
            assert_eq!(nearest(f64::INFINITY, &format), format.max());
            assert_eq!(nearest(-f64::INFINITY, &format), -format.max());
            assert!(nearest(f64::NAN, &format).is_nan());
            assert!(nearest(0.0_f64, &format).is_sign_positive());
            assert_eq!(
                nearest(-0.0_f64, &format).is_sign_negative(),
                !format.unsigned_zero()
            );
        }
    }
}
