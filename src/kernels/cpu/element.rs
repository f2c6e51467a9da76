//! Stored types (what tensors hold) and computed types (what kernels calculate in).

use super::isa::Simd;
use super::vector::Vector;
use crate::encoding::BlockGeometry;
use half::{bf16, f16};

/// Number of lanes a kernel body handles at a time, on every instruction set.
pub const LANES: usize = 16;

/// A type kernels calculate in.
pub trait Compute:
    Copy
    + Element<Self>
    + Element<f64>
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
    /// Sixteen of them in the registers of an instruction set.
    type V<S: Simd>: Vector<Self>;
    /// Bits of the mantissa that are stored: 23 or 52.
    const MANTISSA_BITS: u32;
    /// Zero.
    const ZERO: Self;
    /// All bits but the sign's.
    const MAGNITUDE: Self;
    /// Positive infinity.
    const INFINITY: Self;
    /// Not a number.
    const NAN: Self;
    /// From float64, rounded.
    fn from_f64(value: f64) -> Self;
    /// As float64.
    fn to_f64(self) -> f64;
    /// Nearest integer, ties to even; NaN stays NaN. Without an instruction for it the compiler's own
    /// would be a call per element. (`cfg!(target_feature)` does not see what a function switches on,
    /// so the instruction set says it.)
    fn round<S: Simd>(self) -> Self;
    /// The number with these bits; those that it has not are dropped.
    fn from_bits(bits: u64) -> Self;
    /// The bits that both have.
    fn bits_and(self, other: Self) -> Self;
    /// The bits that either has.
    fn bits_or(self, other: Self) -> Self;
    /// Sum of the bits as integers, modulo their number.
    fn bits_add(self, other: Self) -> Self;
    /// The bits, `n` places lower; `n` is less than their number.
    fn bits_shift_right(self, n: u32) -> Self;
    /// The bits, `n` places higher; `n` is less than their number.
    fn bits_shift_left(self, n: u32) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
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

macro_rules! compute {
    ($c:ident, $vector:ident, $bits:ty, $magic:literal) => {
        impl Compute for $c {
            type V<S: Simd> = S::$vector;
            const MANTISSA_BITS: u32 = $c::MANTISSA_DIGITS - 1;
            const ZERO: Self = 0.0;
            const MAGNITUDE: Self = $c::from_bits(<$bits>::MAX >> 1);
            const INFINITY: Self = $c::INFINITY;
            const NAN: Self = $c::NAN;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $c
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
                // Adding and taking away 2^23 (2^52) rounds to an integer in the current (nearest, even)
                // mode.
                const MAGIC: $c = $magic;
                let magnitude = self.abs();
                let rounded = ((magnitude + MAGIC) - MAGIC).copysign(self);
                if magnitude < MAGIC {
                    rounded
                } else {
                    self
                }
            }
            #[inline(always)]
            fn from_bits(bits: u64) -> Self {
                $c::from_bits(bits as $bits)
            }
            #[inline(always)]
            fn bits_and(self, other: Self) -> Self {
                $c::from_bits(self.to_bits() & other.to_bits())
            }
            #[inline(always)]
            fn bits_or(self, other: Self) -> Self {
                $c::from_bits(self.to_bits() | other.to_bits())
            }
            #[inline(always)]
            fn bits_add(self, other: Self) -> Self {
                $c::from_bits(self.to_bits().wrapping_add(other.to_bits()))
            }
            #[inline(always)]
            fn bits_shift_right(self, n: u32) -> Self {
                $c::from_bits(self.to_bits() >> n)
            }
            #[inline(always)]
            fn bits_shift_left(self, n: u32) -> Self {
                $c::from_bits(self.to_bits() << n)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                self.is_nan()
            }
        }
    };
}
compute!(f32, F32, u32, 8_388_608.0);
compute!(f64, F64, u64, 4_503_599_627_370_496.0);

/// A type tensors hold, read and written as `C`.
pub trait Element<C: Compute>: Copy + Default + Send + Sync + 'static {
    /// Sixteen elements.
    fn widen<S: Simd>(values: &[Self; LANES]) -> [C; LANES];
    /// Sixteen elements, rounded to nearest even.
    fn narrow<S: Simd>(values: &[C; LANES]) -> [Self; LANES];
}

// As a loop: the closure of `array::map` is not always inlined, and then compiled for the baseline.
macro_rules! each {
    ($values:expr, |$v:ident| $out:expr) => {{
        let mut out = [Default::default(); LANES];
        for j in 0..LANES {
            let $v = $values[j];
            out[j] = $out;
        }
        out
    }};
}

macro_rules! element_itself {
    ($t:ty) => {
        impl Element<$t> for $t {
            #[inline(always)]
            fn widen<S: Simd>(values: &[Self; LANES]) -> [$t; LANES] {
                *values
            }
            #[inline(always)]
            fn narrow<S: Simd>(values: &[$t; LANES]) -> [Self; LANES] {
                *values
            }
        }
    };
}
element_itself!(f32);
element_itself!(f64);

// By instructions: cast one by one, a vector goes through memory in sixteen pieces.
impl Element<f64> for f32 {
    #[inline(always)]
    fn widen<S: Simd>(values: &[Self; LANES]) -> [f64; LANES] {
        S::f32_to_f64(values)
    }
    #[inline(always)]
    fn narrow<S: Simd>(values: &[f64; LANES]) -> [Self; LANES] {
        S::f64_to_f32(values)
    }
}

impl Element<f32> for f16 {
    #[inline(always)]
    fn widen<S: Simd>(values: &[Self; LANES]) -> [f32; LANES] {
        S::f16_to_f32(&each!(values, |v| v.to_bits()))
    }
    #[inline(always)]
    fn narrow<S: Simd>(values: &[f32; LANES]) -> [Self; LANES] {
        each!(S::f32_to_f16(values), |v| f16::from_bits(v))
    }
}

impl Element<f32> for bf16 {
    #[inline(always)]
    fn widen<S: Simd>(values: &[Self; LANES]) -> [f32; LANES] {
        each!(values, |v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    fn narrow<S: Simd>(values: &[f32; LANES]) -> [Self; LANES] {
        each!(values, |v| {
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
                S::f32_to_f64(&<$t as Element<f32>>::widen::<S>(values))
            }
            #[inline(always)]
            fn narrow<S: Simd>(values: &[f64; LANES]) -> [Self; LANES] {
                <$t as Element<f32>>::narrow::<S>(&S::f64_to_f32(values))
            }
        }
    };
}
element_through_f32!(f16);
element_through_f32!(bf16);

/// Reads sixteen elements.
///
/// # Safety
/// `p` is valid for reads of sixteen elements; it need not be aligned.
#[inline(always)]
pub unsafe fn load<S: Simd, T: Element<C>, C: Compute>(p: *const T) -> C::V<S> {
    // SAFETY: by the contract.
    <C::V<S>>::from_array(T::widen::<S>(unsafe {
        &p.cast::<[T; LANES]>().read_unaligned()
    }))
}

/// Reads the first `n` of sixteen elements; the other lanes are zero.
///
/// # Safety
/// `n` is at most sixteen, and `p` is valid for reads of `n` elements.
#[inline(always)]
pub unsafe fn load_part<S: Simd, T: Element<C>, C: Compute>(p: *const T, n: usize) -> C::V<S> {
    let mut block = [T::default(); LANES];
    // SAFETY: `n` elements are readable, and `block` holds sixteen.
    unsafe { std::ptr::copy_nonoverlapping(p, block.as_mut_ptr(), n) };
    <C::V<S>>::from_array(T::widen::<S>(&block))
}

/// Reads the first `n.min(16)` of sixteen elements; the other lanes are zero.
///
/// # Safety
/// `p` is valid for reads of `n.min(16)` elements.
#[inline(always)]
pub unsafe fn load_up_to<S: Simd, T: Element<C>, C: Compute>(p: *const T, n: usize) -> C::V<S> {
    // SAFETY: by the contract.
    unsafe {
        if n >= LANES {
            load::<S, T, C>(p)
        } else {
            load_part::<S, T, C>(p, n)
        }
    }
}

/// Writes sixteen values; past the cache if `STREAM`.
///
/// # Safety
/// `p` is valid for writes of sixteen elements; aligned to [`stream_alignment`] if `STREAM`.
#[inline(always)]
pub unsafe fn store<S: Simd, T: Element<C>, C: Compute, const STREAM: bool>(
    p: *mut T,
    values: C::V<S>,
) {
    let block = T::narrow::<S>(&values.to_array());
    // SAFETY: by the contract.
    unsafe {
        if STREAM {
            S::stream(p.cast(), (&raw const block).cast(), size_of::<[T; LANES]>());
        } else {
            p.cast::<[T; LANES]>().write_unaligned(block);
        }
    }
}

/// Writes the first `n` of sixteen values.
///
/// # Safety
/// `n` is at most sixteen, and `p` is valid for writes of `n` elements.
#[inline(always)]
pub unsafe fn store_part<S: Simd, T: Element<C>, C: Compute>(p: *mut T, n: usize, values: C::V<S>) {
    let block = T::narrow::<S>(&values.to_array());
    // SAFETY: `n` elements are writable, and `block` holds sixteen.
    unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), p, n) };
}

/// Writes the first `n.min(16)` of sixteen values.
///
/// # Safety
/// `p` is valid for writes of `n.min(16)` elements.
#[inline(always)]
pub unsafe fn store_up_to<S: Simd, T: Element<C>, C: Compute>(
    p: *mut T,
    n: usize,
    values: C::V<S>,
) {
    // SAFETY: by the contract.
    unsafe {
        if n >= LANES {
            store::<S, T, C, false>(p, values);
        } else {
            store_part::<S, T, C>(p, n, values);
        }
    }
}

/// Bytes read and written from which on the output is written past the cache. An ordinary store reads the
/// line it writes to first, so streaming saves that traffic: measured on two cores, 2^24 float32 forward take
/// 1.5 ms against 2.0 to 3.1, and 2^22 forward and backward 1.35 ms against 1.70. Below, the tensors fit a
/// last-level cache of usual size together, where whatever comes next wants the output, and streaming was
/// measured to take 1.8 times as long.
const STREAM_BYTES: usize = 48 << 20;

/// Whether a pass over `tensors` tensors, the output among them, is large enough to write past the cache, and
/// made of runs that leave few lines to be written in parts.
pub fn streams<T>(output: *const T, geometry: &BlockGeometry, tensors: usize) -> bool {
    let run = geometry.inner().size;
    let whole_lines =
        run.is_multiple_of(LANES) && (output as usize).is_multiple_of(stream_alignment::<T>());
    tensors * geometry.numel() * size_of::<T>() >= STREAM_BYTES
        && (whole_lines || run >= 64 * LANES)
}

/// What streaming stores of a block of lanes ask of the address.
#[inline(always)]
const fn stream_alignment<T>() -> usize {
    if size_of::<[T; LANES]>() < 64 {
        size_of::<[T; LANES]>()
    } else {
        64
    }
}

/// Elements from `p` to the first place where a block can be streamed: fewer than sixteen.
#[inline(always)]
pub fn before_stream<T>(p: *const T) -> usize {
    (p as usize).wrapping_neg() % stream_alignment::<T>() / size_of::<T>()
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
