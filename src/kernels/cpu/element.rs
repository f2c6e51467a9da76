//! Stored types (what tensors hold) and computed types (what kernels calculate in).

use super::isa::Simd;
use half::{bf16, f16};

/// Number of lanes a kernel body handles at a time, on every instruction set.
pub const LANES: usize = 16;

/// A type kernels calculate in.
pub trait Compute:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// Positive infinity.
    const INFINITY: Self;
    /// From float64, rounded.
    fn from_f64(value: f64) -> Self;
    /// As float64.
    fn to_f64(self) -> f64;
    /// Nearest integer, ties to even; NaN stays NaN. Without an instruction for it the compiler's own
    /// would be a call per element. (`cfg!(target_feature)` does not see what a function switches on,
    /// so the instruction set says it.)
    fn round<S: Simd>(self) -> Self;
    /// Whether this is NaN.
    fn is_nan(self) -> bool;
    /// `x` limited to `low..=high`; NaN stays NaN (compare and select, not min/max).
    #[inline(always)]
    fn limit(self, low: Self, high: Self) -> Self {
        let x = if self < low { low } else { self };
        if x > high {
            high
        } else {
            x
        }
    }
}

impl Compute for f32 {
    const ZERO: Self = 0.0;
    const INFINITY: Self = f32::INFINITY;
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn round<S: Simd>(self) -> Self {
        if S::HAS_ROUND {
            return self.round_ties_even();
        }
        // Adding and taking away 2^23 rounds to an integer in the current (nearest, even) mode.
        const MAGIC: f32 = 8_388_608.0;
        let magnitude = self.abs();
        let rounded = ((magnitude + MAGIC) - MAGIC).copysign(self);
        if magnitude < MAGIC {
            rounded
        } else {
            self
        }
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

impl Compute for f64 {
    const ZERO: Self = 0.0;
    const INFINITY: Self = f64::INFINITY;
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn round<S: Simd>(self) -> Self {
        if S::HAS_ROUND {
            return self.round_ties_even();
        }
        const MAGIC: f64 = 4_503_599_627_370_496.0;
        let magnitude = self.abs();
        let rounded = ((magnitude + MAGIC) - MAGIC).copysign(self);
        if magnitude < MAGIC {
            rounded
        } else {
            self
        }
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

/// A type tensors hold, read and written as `C`.
pub trait Element<C: Compute>: Copy + Default + Send + Sync + 'static {
    /// Sixteen elements.
    fn widen<S: Simd>(values: &[Self; LANES]) -> [C; LANES];
    /// Sixteen elements, rounded to nearest even.
    fn narrow<S: Simd>(values: &[C; LANES]) -> [Self; LANES];
}

macro_rules! element_by_cast {
    ($t:ty, $c:ty) => {
        impl Element<$c> for $t {
            #[inline(always)]
            fn widen<S: Simd>(values: &[Self; LANES]) -> [$c; LANES] {
                values.map(|v| v as $c)
            }
            #[inline(always)]
            fn narrow<S: Simd>(values: &[$c; LANES]) -> [Self; LANES] {
                values.map(|v| v as $t)
            }
        }
    };
}
element_by_cast!(f32, f32);
element_by_cast!(f64, f64);
element_by_cast!(f32, f64);

impl Element<f32> for f16 {
    #[inline(always)]
    fn widen<S: Simd>(values: &[Self; LANES]) -> [f32; LANES] {
        S::f16_to_f32(&values.map(f16::to_bits))
    }
    #[inline(always)]
    fn narrow<S: Simd>(values: &[f32; LANES]) -> [Self; LANES] {
        S::f32_to_f16(values).map(f16::from_bits)
    }
}

impl Element<f32> for bf16 {
    #[inline(always)]
    fn widen<S: Simd>(values: &[Self; LANES]) -> [f32; LANES] {
        values.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    fn narrow<S: Simd>(values: &[f32; LANES]) -> [Self; LANES] {
        values.map(|v| {
            let bits = v.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            // Rounding could carry a NaN into infinity; torch's NaN is 0x7fc0.
            // Selected as 32 bits, then cut: the other way round it is not vectorized.
            bf16::from_bits((if v.is_nan() { 0x7fc0 } else { rounded }) as u16)
        })
    }
}

// Grids that float32 cannot hold, over half-precision tensors: float64 by way of float32 (widening is
// exact; narrowing rounds twice, the first time to 29 bits more than the second keeps).
macro_rules! element_through_f32 {
    ($t:ty) => {
        impl Element<f64> for $t {
            #[inline(always)]
            fn widen<S: Simd>(values: &[Self; LANES]) -> [f64; LANES] {
                <$t as Element<f32>>::widen::<S>(values).map(f64::from)
            }
            #[inline(always)]
            fn narrow<S: Simd>(values: &[f64; LANES]) -> [Self; LANES] {
                <$t as Element<f32>>::narrow::<S>(&values.map(|v| v as f32))
            }
        }
    };
}
element_through_f32!(f16);
element_through_f32!(bf16);

/// Reads up to sixteen elements; the lanes beyond `n` are zero.
///
/// # Safety
/// `p` is valid for reads of `n.min(16)` elements.
#[inline(always)]
pub unsafe fn load<S: Simd, T: Element<C>, C: Compute>(p: *const T, n: usize) -> [C; LANES] {
    if n >= LANES {
        // SAFETY: sixteen elements are readable; the read is unaligned.
        let block = unsafe { p.cast::<[T; LANES]>().read_unaligned() };
        T::widen::<S>(&block)
    } else {
        let mut block = [T::default(); LANES];
        // SAFETY: `n` elements are readable, and `block` holds sixteen.
        unsafe { std::ptr::copy_nonoverlapping(p, block.as_mut_ptr(), n) };
        T::widen::<S>(&block)
    }
}

/// Writes the first `n.min(16)` of sixteen values.
///
/// # Safety
/// `p` is valid for writes of `n.min(16)` elements.
#[inline(always)]
pub unsafe fn store<S: Simd, T: Element<C>, C: Compute>(p: *mut T, n: usize, values: &[C; LANES]) {
    let block = T::narrow::<S>(values);
    if n >= LANES {
        // SAFETY: sixteen elements are writable; the write is unaligned.
        unsafe { p.cast::<[T; LANES]>().write_unaligned(block) };
    } else {
        // SAFETY: `n` elements are writable, and `block` holds sixteen.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), p, n) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Portable;
    use super::*;

    #[test]
    fn rounding_is_to_even_for_every_kind_of_float() {
        let mut values = vec![
            0.0_f32,
            -0.0,
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            0.499_999_97,
            8_388_607.5,
            8_388_608.0,
            4_194_303.5,
            1e30,
            -1e30,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MIN_POSITIVE,
        ];
        let mut bits = 1_u32;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits(bits));
        }
        for v in values {
            let (got, expected) = (Compute::round::<Portable>(v), v.round_ties_even());
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()),
                "{v}: {got} {expected}"
            );
            let v = f64::from(v) * 1.000_000_1;
            let (got, expected) = (Compute::round::<Portable>(v), v.round_ties_even());
            assert!(got.to_bits() == expected.to_bits() || got.is_nan(), "{v}");
        }
    }

    #[test]
    fn bfloat16_is_half_crates() {
        let mut bits = 7_u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let v = f32::from_bits(bits);
            let got = <bf16 as Element<f32>>::narrow::<Portable>(&[v; LANES])[3];
            let expected = bf16::from_f32(v);
            assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()));
        }
    }
}
