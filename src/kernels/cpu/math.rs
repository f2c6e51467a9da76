//! Exponential and logarithm without calls, so that loops over them are vectorized.
//!
//! float32 follows the polynomials of the Cephes library \[moshier1992\] (within two units in the
//! last place), the same operations on every instruction set; float64 is the standard library's.

use super::element::Compute;
use super::isa::Simd;

/// Elementary functions of a type kernels calculate in.
pub trait Transcendental: Compute {
    /// `e^x`; beyond ±87 (float32) the value there.
    fn exp<S: Simd>(self) -> Self;
    /// The natural logarithm of a positive, normal `x`.
    fn ln<S: Simd>(self) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
}

impl Transcendental for f32 {
    #[inline(always)]
    fn exp<S: Simd>(self) -> Self {
        // ln(2) in two parts, the first of few bits: n * LN2_HIGH is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Added to a small integer, it leaves the integer in the lowest bits.
        const MAGIC: f32 = 12_582_912.0;
        let x = self.limit(-87.0, 87.0);
        let n = Compute::round::<S>(x * std::f32::consts::LOG2_E);
        let r = (x - n * LN2_HIGH) - n * LN2_LOW;
        let mut p = 1.987_569_1e-4 * r + 1.398_2e-3;
        p = p * r + 8.333_452e-3;
        p = p * r + 4.166_579_6e-2;
        p = p * r + 1.666_666_5e-1;
        p = p * r + 0.5;
        let value = (p * (r * r) + r) + 1.0;
        let power = f32::from_bits(((n + MAGIC).to_bits() << 23).wrapping_add(127 << 23));
        value * power
    }

    #[inline(always)]
    fn ln<S: Simd>(self) -> Self {
        // self = m * 2^e with m in [sqrt(1/2), sqrt(2)).
        const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
        let shifted = self.to_bits().wrapping_sub(SQRT_HALF_BITS);
        let e = ((shifted as i32) >> 23) as f32;
        let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF_BITS));
        let z = m - 1.0;
        let mut p = 7.037_683_6e-2 * z - 1.151_461e-1;
        p = p * z + 1.167_699_9e-1;
        p = p * z - 1.242_014_1e-1;
        p = p * z + 1.424_932_3e-1;
        p = p * z - 1.666_805_8e-1;
        p = p * z + 2.000_071_5e-1;
        p = p * z - 2.499_999_4e-1;
        p = p * z + 0.333_333_34;
        let z2 = z * z;
        let tail = (p * z) * z2 + e * -2.121_944_4e-4 - 0.5 * z2;
        (z + tail) + e * 0.693_359_4
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

impl Transcendental for f64 {
    #[inline(always)]
    fn exp<S: Simd>(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn ln<S: Simd>(self) -> Self {
        self.ln()
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Portable;
    use super::*;

    #[test]
    fn float32_is_within_two_units_in_the_last_place() {
        for i in -86_000..=86_000 {
            let x = i as f32 / 1000.0;
            let expected = f64::from(x).exp();
            let got = f64::from(Transcendental::exp::<Portable>(x));
            assert!(
                (got / expected - 1.0).abs() < 2.5e-7,
                "exp({x}): {got} {expected}"
            );
        }
        for i in 1..200_000 {
            let x = i as f32 / 50_000.0;
            let expected = f64::from(x).ln();
            let got = f64::from(Transcendental::ln::<Portable>(x));
            assert!(
                (got - expected).abs() <= 2.5e-7 * expected.abs().max(0.5),
                "ln({x}): {got} {expected}"
            );
        }
    }

    #[test]
    fn exponentials_outside_the_range_are_limited_and_nan_stays() {
        assert!(Transcendental::exp::<Portable>(1e9_f32).is_finite());
        assert!(Transcendental::exp::<Portable>(-1e9_f32) > 0.0);
        assert!(Transcendental::exp::<Portable>(f32::NAN).is_nan());
        assert_eq!(Transcendental::ln::<Portable>(1.0_f32), 0.0);
        assert_eq!(Transcendental::exp::<Portable>(0.0_f32), 1.0);
    }
}
