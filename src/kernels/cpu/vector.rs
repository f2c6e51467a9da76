//! Sixteen lanes as a value, in the registers of each instruction set.
//!
//! Loops over arrays of sixteen leave it to the compiler whether they become vector instructions, and small
//! changes around them were measured to cost a factor of six. Here every operation is one instruction per
//! register, and the same IEEE operation on every instruction set.

use super::element::{Compute, LANES};
use super::isa::Portable;

/// Sixteen numbers.
pub trait Vector<C>: Copy {
    /// Sixteen truth values.
    type Mask: Copy;
    /// The same number in each lane.
    fn splat(value: C) -> Self;
    /// From memory order.
    fn from_array(values: [C; LANES]) -> Self;
    /// To memory order.
    fn to_array(self) -> [C; LANES];
    /// `self + other`
    fn add(self, other: Self) -> Self;
    /// `self - other`
    fn sub(self, other: Self) -> Self;
    /// `self * other`
    fn mul(self, other: Self) -> Self;
    /// `self / other`
    fn div(self, other: Self) -> Self;
    /// Nearest integer, ties to even; NaN stays NaN.
    fn round(self) -> Self;
    /// The smaller one; `other` if either is NaN or they are equal.
    fn min(self, other: Self) -> Self;
    /// The larger one; `other` if either is NaN or they are equal.
    fn max(self, other: Self) -> Self;
    /// Where `self <= other`; nowhere for NaN.
    fn le(self, other: Self) -> Self::Mask;
    /// Where there is a number, not NaN.
    fn ordered(self) -> Self::Mask;
    /// Both.
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether true in all lanes.
    fn all(mask: Self::Mask) -> bool;
    /// `yes` where the mask is true, else `no`.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
    /// The bits that both have.
    fn bits_and(self, other: Self) -> Self;
    /// The bits that either has.
    fn bits_or(self, other: Self) -> Self;
    /// Sums of the bits as integers, modulo their number.
    fn bits_add(self, other: Self) -> Self;
    /// The bits, `n` places lower; `n` is less than their number.
    fn bits_shift_right(self, n: u32) -> Self;
    /// The bits, `n` places higher; `n` is less than their number.
    fn bits_shift_left(self, n: u32) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
    /// The lanes' sum in float64, by halves: one after the other, sixteen additions would wait for each
    /// other, which took half of the time where encodings change every few blocks.
    fn sum(self) -> f64;
    /// [`Vector::sum`] of each, the same bits: with eight at a time, every addition fills a register.
    fn sums(vectors: [Self; 8]) -> [f64; 8];
    /// Magnitudes.
    #[inline(always)]
    fn abs(self) -> Self
    where
        C: Compute,
    {
        self.bits_and(Self::splat(C::MAGNITUDE))
    }
    /// These numbers, not negative, with the signs of others.
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self
    where
        C: Compute,
    {
        self.bits_or(other.bits_and(Self::splat(-C::ZERO)))
    }
    /// `self` limited to `low..=high`; NaN stays NaN.
    #[inline(always)]
    fn limit(self, low: Self, high: Self) -> Self {
        high.min(low.max(self))
    }
}

/// Lanes of the baseline: the compiler's choice of instructions.
#[derive(Clone, Copy)]
pub struct Lanes<C>([C; LANES]);

// Loops, not closures over arrays: what is not inlined into the function with the instruction set switched
// on is compiled for the baseline.
impl<C: Compute> Vector<C> for Lanes<C> {
    type Mask = [bool; LANES];
    #[inline(always)]
    fn splat(value: C) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn from_array(values: [C; LANES]) -> Self {
        Self(values)
    }
    #[inline(always)]
    fn to_array(self) -> [C; LANES] {
        self.0
    }
    #[inline(always)]
    fn add(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j] + other.0[j];
        }
        self
    }
    #[inline(always)]
    fn sub(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j] - other.0[j];
        }
        self
    }
    #[inline(always)]
    fn mul(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j] * other.0[j];
        }
        self
    }
    #[inline(always)]
    fn div(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j] / other.0[j];
        }
        self
    }
    #[inline(always)]
    fn round(mut self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].round::<Portable>();
        }
        self
    }
    #[inline(always)]
    fn min(mut self, other: Self) -> Self {
        for j in 0..LANES {
            // `other` also where the comparison is false for NaN.
            self.0[j] = if self.0[j] < other.0[j] {
                self.0[j]
            } else {
                other.0[j]
            };
        }
        self
    }
    #[inline(always)]
    fn max(mut self, other: Self) -> Self {
        for j in 0..LANES {
            // `other` also where the comparison is false for NaN.
            self.0[j] = if self.0[j] > other.0[j] {
                self.0[j]
            } else {
                other.0[j]
            };
        }
        self
    }
    #[inline(always)]
    fn le(self, other: Self) -> Self::Mask {
        let mut mask = [false; LANES];
        for (j, m) in mask.iter_mut().enumerate() {
            *m = self.0[j] <= other.0[j];
        }
        mask
    }
    #[inline(always)]
    fn ordered(self) -> Self::Mask {
        let mut mask = [false; LANES];
        for (j, m) in mask.iter_mut().enumerate() {
            *m = !self.0[j].is_nan();
        }
        mask
    }
    #[inline(always)]
    fn and(mut a: Self::Mask, b: Self::Mask) -> Self::Mask {
        for j in 0..LANES {
            a[j] &= b[j];
        }
        a
    }
    #[inline(always)]
    fn all(mask: Self::Mask) -> bool {
        let mut all = true;
        for m in mask {
            all &= m;
        }
        all
    }
    #[inline(always)]
    fn select(mask: Self::Mask, mut yes: Self, no: Self) -> Self {
        for (j, m) in mask.into_iter().enumerate() {
            if !m {
                yes.0[j] = no.0[j];
            }
        }
        yes
    }
    #[inline(always)]
    fn bits_and(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].bits_and(other.0[j]);
        }
        self
    }
    #[inline(always)]
    fn bits_or(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].bits_or(other.0[j]);
        }
        self
    }
    #[inline(always)]
    fn bits_add(mut self, other: Self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].bits_add(other.0[j]);
        }
        self
    }
    #[inline(always)]
    fn bits_shift_right(mut self, n: u32) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].bits_shift_right(n);
        }
        self
    }
    #[inline(always)]
    fn bits_shift_left(mut self, n: u32) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].bits_shift_left(n);
        }
        self
    }
    #[inline(always)]
    fn sqrt(mut self) -> Self {
        for j in 0..LANES {
            self.0[j] = self.0[j].sqrt();
        }
        self
    }
    #[inline(always)]
    fn sum(self) -> f64 {
        let mut sums = [0.0; LANES];
        for (sum, lane) in sums.iter_mut().zip(self.0) {
            *sum = lane.to_f64();
        }
        let mut n = LANES / 2;
        while n > 0 {
            for j in 0..n {
                sums[j] += sums[j + n];
            }
            n /= 2;
        }
        sums[0]
    }
    #[inline(always)]
    fn sums(vectors: [Self; 8]) -> [f64; 8] {
        let mut sums = [0.0; 8];
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = vector.sum();
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{F32x16Avx2, F32x16Avx512, F64x16Avx2, F64x16Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Vector, LANES};
    use std::arch::x86_64::*;

    /// Sixteen lanes in `$n` registers of `$lanes`.
    ///
    /// The types are only named by the instruction sets of `isa`, whose code runs inside functions that
    /// have the features switched on (see `isa::dispatch`); that is the reason of every `unsafe`
    /// block here. Loads and stores stay inside an array of sixteen.
    macro_rules! vector {
        (
            $name:ident: $c:ty = [$register:ty; $n:literal], lanes $lanes:literal,
            $splat:ident $load:ident $store:ident $add:ident $sub:ident $mul:ident $div:ident
            $min:ident $max:ident,
            round |$r:ident| $round:expr,
            mask $mask:ty, le |$la:ident, $lb:ident| $le:expr, ordered |$o:ident| $ordered:expr,
            and |$aa:ident, $ab:ident| $and:expr, all |$all_of:ident| $all:expr,
            select |$m:ident, $yes:ident, $no:ident| $select:expr,
            bits $to_bits:ident $from_bits:ident $bits_and:ident $bits_or:ident $bits_add:ident,
            shift $shift_right:ident $shift_left:ident, sqrt $sqrt:ident,
            sum |$summed:ident| $partial:expr, $sum_of_one:ident $sum_of_each:ident $wide:ident
        ) => {
            /// Sixteen lanes in registers.
            #[derive(Clone, Copy)]
            pub struct $name([$register; $n]);

            impl Vector<$c> for $name {
                type Mask = [$mask; $n];
                #[inline(always)]
                fn splat(value: $c) -> Self {
                    // SAFETY: see `vector!`.
                    Self([unsafe { $splat(value) }; $n])
                }
                #[inline(always)]
                fn from_array(values: [$c; LANES]) -> Self {
                    let mut out = Self::splat(0.0);
                    for i in 0..$n {
                        // SAFETY: see `vector!`.
                        out.0[i] = unsafe { $load(values.as_ptr().add(i * $lanes)) };
                    }
                    out
                }
                #[inline(always)]
                fn to_array(self) -> [$c; LANES] {
                    let mut values = [0.0; LANES];
                    for i in 0..$n {
                        // SAFETY: see `vector!`.
                        unsafe { $store(values.as_mut_ptr().add(i * $lanes), self.0[i]) };
                    }
                    values
                }
                vector!(@binary add $add $n);
                vector!(@binary sub $sub $n);
                vector!(@binary mul $mul $n);
                vector!(@binary div $div $n);
                vector!(@binary min $min $n);
                vector!(@binary max $max $n);
                #[inline(always)]
                fn round(mut self) -> Self {
                    for i in 0..$n {
                        let $r = self.0[i];
                        // SAFETY: see `vector!`.
                        self.0[i] = unsafe { $round };
                    }
                    self
                }
                #[inline(always)]
                fn le(self, other: Self) -> Self::Mask {
                    // SAFETY: see `vector!`.
                    let mut mask: Self::Mask = unsafe { std::mem::zeroed() };
                    for i in 0..$n {
                        let ($la, $lb) = (self.0[i], other.0[i]);
                        // SAFETY: see `vector!`.
                        mask[i] = unsafe { $le };
                    }
                    mask
                }
                #[inline(always)]
                fn ordered(self) -> Self::Mask {
                    // SAFETY: see `vector!`.
                    let mut mask: Self::Mask = unsafe { std::mem::zeroed() };
                    for i in 0..$n {
                        let $o = self.0[i];
                        // SAFETY: see `vector!`.
                        mask[i] = unsafe { $ordered };
                    }
                    mask
                }
                #[allow(unused_unsafe)] // mask registers of AVX-512 are plain integers
                #[inline(always)]
                fn and(mut a: Self::Mask, b: Self::Mask) -> Self::Mask {
                    for i in 0..$n {
                        let ($aa, $ab) = (a[i], b[i]);
                        // SAFETY: see `vector!`.
                        a[i] = unsafe { $and };
                    }
                    a
                }
                #[allow(unused_unsafe)] // as for `and`
                #[inline(always)]
                fn all(mask: Self::Mask) -> bool {
                    let mut all = true;
                    for $all_of in mask {
                        // SAFETY: see `vector!`.
                        all &= unsafe { $all };
                    }
                    all
                }
                #[inline(always)]
                fn select(mask: Self::Mask, mut yes: Self, no: Self) -> Self {
                    for i in 0..$n {
                        let ($m, $yes, $no) = (mask[i], yes.0[i], no.0[i]);
                        // SAFETY: see `vector!`.
                        yes.0[i] = unsafe { $select };
                    }
                    yes
                }
                vector!(@bits bits_and $to_bits $from_bits $bits_and $n);
                vector!(@bits bits_or $to_bits $from_bits $bits_or $n);
                vector!(@bits bits_add $to_bits $from_bits $bits_add $n);
                vector!(@shift bits_shift_right $to_bits $from_bits $shift_right $n);
                vector!(@shift bits_shift_left $to_bits $from_bits $shift_left $n);
                #[inline(always)]
                fn sqrt(mut self) -> Self {
                    for i in 0..$n {
                        // SAFETY: see `vector!`.
                        self.0[i] = unsafe { $sqrt(self.0[i]) };
                    }
                    self
                }
                #[inline(always)]
                fn sum(self) -> f64 {
                    let $summed = self.0;
                    // SAFETY: see `vector!`.
                    unsafe { $sum_of_one($partial) }
                }
                #[inline(always)]
                fn sums(vectors: [Self; 8]) -> [f64; 8] {
                    // SAFETY: see `vector!`.
                    unsafe {
                        let mut partial = [$wide(); 8];
                        for i in 0..8 {
                            let $summed = vectors[i].0;
                            partial[i] = $partial;
                        }
                        $sum_of_each(partial)
                    }
                }
            }
        };
        (@shift $method:ident $to:ident $from:ident $intrinsic:ident $n:literal) => {
            #[inline(always)]
            fn $method(mut self, n: u32) -> Self {
                for i in 0..$n {
                    // SAFETY: see `vector!`.
                    self.0[i] = unsafe {
                        $from($intrinsic($to(self.0[i]), _mm_cvtsi32_si128(n as i32)))
                    };
                }
                self
            }
        };
        (@bits $method:ident $to:ident $from:ident $intrinsic:ident $n:literal) => {
            #[inline(always)]
            fn $method(mut self, other: Self) -> Self {
                for i in 0..$n {
                    // SAFETY: see `vector!`.
                    self.0[i] = unsafe { $from($intrinsic($to(self.0[i]), $to(other.0[i]))) };
                }
                self
            }
        };
        (@binary $method:ident $intrinsic:ident $n:literal) => {
            #[inline(always)]
            fn $method(mut self, other: Self) -> Self {
                for i in 0..$n {
                    // SAFETY: see `vector!`.
                    self.0[i] = unsafe { $intrinsic(self.0[i], other.0[i]) };
                }
                self
            }
        };
    }

    /// # Safety
    /// The processor has AVX-512 F.
    #[inline(always)]
    unsafe fn sum_of_eight(a: __m512d) -> f64 {
        // SAFETY: by the contract.
        unsafe {
            sum_of_four(_mm256_add_pd(
                _mm512_castpd512_pd256(a),
                _mm512_extractf64x4_pd::<1>(a),
            ))
        }
    }

    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn sum_of_four(a: __m256d) -> f64 {
        // SAFETY: by the contract.
        unsafe {
            let two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }

    /// [`sum_of_eight`] of each of eight: each step adds the upper halves to the lower ones, of two at a time.
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[inline(always)]
    unsafe fn sums_of_eight(a: [__m512d; 8]) -> [f64; 8] {
        // SAFETY: by the contract; a register is eight numbers.
        unsafe {
            let mut fours = [_mm512_setzero_pd(); 4];
            for i in 0..4 {
                fours[i] = _mm512_add_pd(
                    _mm512_shuffle_f64x2::<0x44>(a[i], a[i + 4]),
                    _mm512_shuffle_f64x2::<0xee>(a[i], a[i + 4]),
                );
            }
            let mut twos = [_mm512_setzero_pd(); 2];
            for i in 0..2 {
                twos[i] = _mm512_add_pd(
                    _mm512_shuffle_f64x2::<0x88>(fours[i], fours[i + 2]),
                    _mm512_shuffle_f64x2::<0xdd>(fours[i], fours[i + 2]),
                );
            }
            // Of 0, 1, 4, 5, 2, 3, 6, 7.
            let sums = _mm512_add_pd(
                _mm512_unpacklo_pd(twos[0], twos[1]),
                _mm512_unpackhi_pd(twos[0], twos[1]),
            );
            std::mem::transmute(_mm512_shuffle_f64x2::<0xd8>(sums, sums))
        }
    }

    /// [`sum_of_four`] of each of eight.
    ///
    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn sums_of_four(a: [__m256d; 8]) -> [f64; 8] {
        // SAFETY: by the contract; a register is four numbers.
        unsafe {
            let mut sums = [_mm256_setzero_pd(); 2];
            for i in 0..2 {
                let [p, q, r, s] = [a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]];
                let pr = _mm256_add_pd(
                    _mm256_permute2f128_pd::<0x20>(p, r),
                    _mm256_permute2f128_pd::<0x31>(p, r),
                );
                let qs = _mm256_add_pd(
                    _mm256_permute2f128_pd::<0x20>(q, s),
                    _mm256_permute2f128_pd::<0x31>(q, s),
                );
                sums[i] = _mm256_add_pd(_mm256_unpacklo_pd(pr, qs), _mm256_unpackhi_pd(pr, qs));
            }
            std::mem::transmute(sums)
        }
    }

    /// The first and the last four.
    ///
    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn widened(a: __m256) -> [__m256d; 2] {
        // SAFETY: by the contract.
        unsafe {
            [
                _mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a)),
            ]
        }
    }

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    vector! {
        F32x16Avx512: f32 = [__m512; 1], lanes 16,
        _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_min_ps _mm512_max_ps,
        round |a| _mm512_roundscale_ps::<NEAREST>(a),
        mask __mmask16, le |a, b| _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm512_cmp_ps_mask::<_CMP_ORD_Q>(a, a),
        and |a, b| a & b, all |m| m == __mmask16::MAX,
        select |m, yes, no| _mm512_mask_blend_ps(m, no, yes),
        bits _mm512_castps_si512 _mm512_castsi512_ps _mm512_and_si512 _mm512_or_si512 _mm512_add_epi32,
        shift _mm512_srl_epi32 _mm512_sll_epi32, sqrt _mm512_sqrt_ps,
        sum |a| _mm512_add_pd(
            _mm512_cvtps_pd(_mm512_castps512_ps256(a[0])),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(a[0])),
        ), sum_of_eight sums_of_eight _mm512_setzero_pd
    }
    vector! {
        F64x16Avx512: f64 = [__m512d; 2], lanes 8,
        _mm512_set1_pd _mm512_loadu_pd _mm512_storeu_pd
        _mm512_add_pd _mm512_sub_pd _mm512_mul_pd _mm512_div_pd _mm512_min_pd _mm512_max_pd,
        round |a| _mm512_roundscale_pd::<NEAREST>(a),
        mask __mmask8, le |a, b| _mm512_cmp_pd_mask::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm512_cmp_pd_mask::<_CMP_ORD_Q>(a, a),
        and |a, b| a & b, all |m| m == __mmask8::MAX,
        select |m, yes, no| _mm512_mask_blend_pd(m, no, yes),
        bits _mm512_castpd_si512 _mm512_castsi512_pd _mm512_and_si512 _mm512_or_si512 _mm512_add_epi64,
        shift _mm512_srl_epi64 _mm512_sll_epi64, sqrt _mm512_sqrt_pd,
        sum |a| _mm512_add_pd(a[0], a[1]), sum_of_eight sums_of_eight _mm512_setzero_pd
    }
    vector! {
        F32x16Avx2: f32 = [__m256; 2], lanes 8,
        _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_min_ps _mm256_max_ps,
        round |a| _mm256_round_ps::<NEAREST>(a),
        mask __m256, le |a, b| _mm256_cmp_ps::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm256_cmp_ps::<_CMP_ORD_Q>(a, a),
        and |a, b| _mm256_and_ps(a, b), all |m| _mm256_movemask_ps(m) == 0xff,
        select |m, yes, no| _mm256_blendv_ps(no, yes, m),
        bits _mm256_castps_si256 _mm256_castsi256_ps _mm256_and_si256 _mm256_or_si256 _mm256_add_epi32,
        shift _mm256_srl_epi32 _mm256_sll_epi32, sqrt _mm256_sqrt_ps,
        sum |a| {
            let ([a, b], [c, d]) = (widened(a[0]), widened(a[1]));
            _mm256_add_pd(_mm256_add_pd(a, c), _mm256_add_pd(b, d))
        }, sum_of_four sums_of_four _mm256_setzero_pd
    }
    vector! {
        F64x16Avx2: f64 = [__m256d; 4], lanes 4,
        _mm256_set1_pd _mm256_loadu_pd _mm256_storeu_pd
        _mm256_add_pd _mm256_sub_pd _mm256_mul_pd _mm256_div_pd _mm256_min_pd _mm256_max_pd,
        round |a| _mm256_round_pd::<NEAREST>(a),
        mask __m256d, le |a, b| _mm256_cmp_pd::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm256_cmp_pd::<_CMP_ORD_Q>(a, a),
        and |a, b| _mm256_and_pd(a, b), all |m| _mm256_movemask_pd(m) == 0xf,
        select |m, yes, no| _mm256_blendv_pd(no, yes, m),
        bits _mm256_castpd_si256 _mm256_castsi256_pd _mm256_and_si256 _mm256_or_si256 _mm256_add_epi64,
        shift _mm256_srl_epi64 _mm256_sll_epi64, sqrt _mm256_sqrt_pd,
        sum |a| _mm256_add_pd(_mm256_add_pd(a[0], a[2]), _mm256_add_pd(a[1], a[3])),
        sum_of_four sums_of_four _mm256_setzero_pd
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::{dispatch, force, Body, Isa, Simd};
    use super::*;

    fn hostile<C: Compute>() -> Vec<C> {
        let mut values: Vec<C> = [
            0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 1e-40, -1e-40, 1e30, -1e30,
        ]
        .map(C::from_f64)
        .to_vec();
        values.extend([C::INFINITY, -C::INFINITY, C::NAN]);
        values
    }

    struct Every<C>(Vec<C>);

    impl<C: Compute> Body for Every<C> {
        type Output = Vec<u64>;
        #[inline(always)]
        fn run<S: Simd>(self) -> Vec<u64> {
            let mut bits = Vec::new();
            let a = <C::V<S>>::from_array(self.0[..].try_into().expect("sixteen"));
            let numbers = <C::V<S>>::select(a.ordered(), a, <C::V<S>>::splat(C::ZERO));
            let large = C::from_f64(1e7);
            let sum = numbers
                .limit(
                    <C::V<S>>::splat(-large),
                    <C::V<S>>::splat(large / C::from_f64(3.0)),
                )
                .sum();
            assert!(sum.is_finite());
            bits.push(sum.to_bits());
            let mut eight = [numbers; 8];
            for (i, vector) in eight.iter_mut().enumerate() {
                let mut lanes = vector.to_array();
                lanes.rotate_left(i);
                *vector = Vector::from_array(lanes);
            }
            let sums = <C::V<S>>::sums(eight);
            for (vector, sum) in eight.into_iter().zip(sums) {
                assert_eq!(vector.sum().to_bits(), sum.to_bits());
            }
            for &other in &self.0 {
                let b = <C::V<S>>::splat(other);
                let less = a.le(b);
                for v in [
                    a.add(b),
                    a.sub(b),
                    a.mul(b),
                    a.div(b),
                    a.min(b),
                    a.max(b),
                    a.round(),
                    <C::V<S>>::select(less, a, b),
                    <C::V<S>>::select(<C::V<S>>::and(less, a.ordered()), b, a),
                    a.limit(<C::V<S>>::splat(C::from_f64(-1.0)), b),
                    a.bits_and(b),
                    a.bits_or(b),
                    a.bits_add(b.bits_shift_right(9)),
                    b.bits_shift_left(5).bits_or(a),
                    b.abs().sqrt(),
                ] {
                    // Any NaN is as good as another.
                    bits.extend(v.to_array().map(|x| {
                        if x.is_nan() {
                            u64::MAX
                        } else {
                            x.to_f64().to_bits()
                        }
                    }));
                }
                bits.push(u64::from(<C::V<S>>::all(less)));
                bits.push(u64::from(<C::V<S>>::all(b.ordered())));
            }
            bits
        }
    }

    #[test]
    fn every_instruction_set_computes_the_same_bits() {
        for isa in Isa::ALL {
            if !force(Some(isa)) {
                continue;
            }
            let single = dispatch(Every(hostile::<f32>()));
            let double = dispatch(Every(hostile::<f64>()));
            force(None);
            assert_eq!(single, Every(hostile::<f32>()).run::<Portable>(), "{isa:?}");
            assert_eq!(double, Every(hostile::<f64>()).run::<Portable>(), "{isa:?}");
        }
    }

    #[test]
    fn min_max_and_limit_treat_nan_as_they_say() {
        type V = Lanes<f32>;
        let (nan, one) = (V::splat(f32::NAN), V::splat(1.0));
        assert_eq!(nan.min(one).to_array()[0], 1.0);
        assert!(one.max(nan).to_array()[0].is_nan());
        assert!(nan.limit(one, one).to_array()[0].is_nan());
        assert_eq!(V::splat(7.0).limit(one, V::splat(3.0)).to_array()[0], 3.0);
        assert!(!V::all(nan.ordered()) && V::all(one.ordered()));
    }
}
