//! Exponential and logarithm of sixteen lanes.
//!
//! float32 follows the polynomials of the Cephes library \[moshier1992\] (within two units in the
//! last place), the same operations on every instruction set; float64 is the standard library's.

use super::element::Compute;
use super::isa::Simd;
use super::vector::Vector;

/// Elementary functions of a type kernels calculate in, of sixteen lanes.
pub trait Transcendental: Compute {
    /// `e^x`; beyond ±87 (float32) the value there.
    fn exp<S: Simd>(x: Self::V<S>) -> Self::V<S>;
    /// The natural logarithm of a positive, normal `x`.
    fn ln<S: Simd>(x: Self::V<S>) -> Self::V<S>;
}

/// Bits of float32 numbers.
const MANTISSA_BITS: u32 = 23;
const EXPONENT_BIAS: u32 = 127 << MANTISSA_BITS;

impl Transcendental for f32 {
    #[inline(always)]
    fn exp<S: Simd>(x: S::F32) -> S::F32 {
        // ln(2) in two parts, the first of few bits: n * LN2_HIGH is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Added to a small integer, it leaves the integer in the lowest bits.
        const MAGIC: f32 = 12_582_912.0;
        let number = |value: f32| <S::F32>::splat(value);
        let x = x.limit(number(-87.0), number(87.0));
        let n = x.mul(number(std::f32::consts::LOG2_E)).round();
        let r = x.sub(n.mul(number(LN2_HIGH))).sub(n.mul(number(LN2_LOW)));
        let mut p = number(1.987_569_1e-4).mul(r).add(number(1.398_2e-3));
        for c in [8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul(r).add(number(c));
        }
        let value = p.mul(r.mul(r)).add(r).add(number(1.0));
        let power = n
            .add(number(MAGIC))
            .bits_shift_left(MANTISSA_BITS)
            .bits_add(number(f32::from_bits(EXPONENT_BIAS)));
        value.mul(power)
    }

    #[inline(always)]
    fn ln<S: Simd>(x: S::F32) -> S::F32 {
        // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
        const SQRT_HALF: u32 = 0x3f35_04f3;
        const MANTISSA: u32 = (1 << MANTISSA_BITS) - 1;
        // With a small integer in its lowest bits, it is larger by that integer.
        const MAGIC: f32 = 8_388_608.0;
        let number = |value: f32| <S::F32>::splat(value);
        let bits = |value: u32| <S::F32>::splat(f32::from_bits(value));
        let shifted = x.bits_add(bits(EXPONENT_BIAS.wrapping_sub(SQRT_HALF)));
        let e = shifted
            .bits_shift_right(MANTISSA_BITS)
            .bits_or(number(MAGIC))
            .sub(number(MAGIC + 127.0));
        let m = shifted.bits_and(bits(MANTISSA)).bits_add(bits(SQRT_HALF));
        let z = m.sub(number(1.0));
        let mut p = number(7.037_683_6e-2).mul(z).sub(number(1.151_461e-1));
        for c in [
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            0.333_333_34,
        ] {
            p = p.mul(z).add(number(c));
        }
        let z2 = z.mul(z);
        let tail = p
            .mul(z)
            .mul(z2)
            .add(e.mul(number(-2.121_944_4e-4)))
            .sub(number(0.5).mul(z2));
        z.add(tail).add(e.mul(number(0.693_359_4)))
    }
}

impl Transcendental for f64 {
    #[inline(always)]
    fn exp<S: Simd>(x: S::F64) -> S::F64 {
        let mut values = x.to_array();
        for value in &mut values {
            *value = value.exp();
        }
        Vector::from_array(values)
    }
    #[inline(always)]
    fn ln<S: Simd>(x: S::F64) -> S::F64 {
        let mut values = x.to_array();
        for value in &mut values {
            *value = value.ln();
        }
        Vector::from_array(values)
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::LANES;
    use super::super::isa::{dispatch, force, Body, Isa};
    use super::*;

    struct Apply {
        logarithm: bool,
        values: Vec<f32>,
    }

    impl Body for Apply {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self) -> Vec<f32> {
            let mut found = Vec::with_capacity(self.values.len() + LANES);
            for block in self.values.chunks(LANES) {
                let mut x = [1.0; LANES];
                x[..block.len()].copy_from_slice(block);
                let x = <S::F32>::from_array(x);
                let y = if self.logarithm {
                    <f32 as Transcendental>::ln::<S>(x)
                } else {
                    <f32 as Transcendental>::exp::<S>(x)
                };
                found.extend(&y.to_array()[..block.len()]);
            }
            found
        }
    }

    /// On every instruction set, which must agree.
    fn apply(logarithm: bool, values: &[f32]) -> Vec<f32> {
        let values = values.to_vec();
        let mut found: Option<Vec<f32>> = None;
        for isa in Isa::ALL {
            if force(Some(isa)) {
                let values = values.clone();
                let got = dispatch(Apply { logarithm, values });
                force(None);
                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                if let Some(expected) = &found {
                    assert_eq!(bits(&got), bits(expected), "{isa:?}");
                }
                found = Some(got);
            }
        }
        found.expect("the baseline is there")
    }

    #[test]
    fn float32_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (-86_000..=86_000).map(|i| i as f32 / 1000.0).collect();
        for (x, got) in x.iter().zip(apply(false, &x)) {
            let (expected, got) = (f64::from(*x).exp(), f64::from(got));
            assert!(
                (got / expected - 1.0).abs() < 2.5e-7,
                "exp({x}): {got} {expected}"
            );
        }
        let mut x: Vec<f32> = (1..200_000).map(|i| i as f32 / 50_000.0).collect();
        x.extend([1e-30, 1e-37, 3e38]);
        for (x, got) in x.iter().zip(apply(true, &x)) {
            let (expected, got) = (f64::from(*x).ln(), f64::from(got));
            assert!(
                (got - expected).abs() <= 2.5e-7 * expected.abs().max(0.5),
                "ln({x}): {got} {expected}"
            );
        }
    }

    #[test]
    fn exponentials_outside_the_range_are_limited_and_nan_stays() {
        let got = apply(false, &[1e9, -1e9, 0.0]);
        assert!(got[0].is_finite() && got[1] > 0.0 && got[2] == 1.0);
        assert!(apply(false, &[f32::NAN])[0].is_nan());
        assert_eq!(apply(true, &[1.0])[0], 0.0);
    }
}
