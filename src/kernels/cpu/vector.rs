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
            select |$m:ident, $yes:ident, $no:ident| $select:expr
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
                #[inline(always)]
                fn and(mut a: Self::Mask, b: Self::Mask) -> Self::Mask {
                    for i in 0..$n {
                        let ($aa, $ab) = (a[i], b[i]);
                        // SAFETY: see `vector!`. (Mask registers are plain integers.)
                        #[allow(unused_unsafe)]
                        {
                            a[i] = unsafe { $and };
                        }
                    }
                    a
                }
                #[inline(always)]
                fn all(mask: Self::Mask) -> bool {
                    let mut all = true;
                    for $all_of in mask {
                        // SAFETY: see `vector!`. (Mask registers are plain integers.)
                        #[allow(unused_unsafe)]
                        {
                            all &= unsafe { $all };
                        }
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

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    vector! {
        F32x16Avx512: f32 = [__m512; 1], lanes 16,
        _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_min_ps _mm512_max_ps,
        round |a| _mm512_roundscale_ps::<NEAREST>(a),
        mask __mmask16, le |a, b| _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm512_cmp_ps_mask::<_CMP_ORD_Q>(a, a),
        and |a, b| a & b, all |m| m == __mmask16::MAX,
        select |m, yes, no| _mm512_mask_blend_ps(m, no, yes)
    }
    vector! {
        F64x16Avx512: f64 = [__m512d; 2], lanes 8,
        _mm512_set1_pd _mm512_loadu_pd _mm512_storeu_pd
        _mm512_add_pd _mm512_sub_pd _mm512_mul_pd _mm512_div_pd _mm512_min_pd _mm512_max_pd,
        round |a| _mm512_roundscale_pd::<NEAREST>(a),
        mask __mmask8, le |a, b| _mm512_cmp_pd_mask::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm512_cmp_pd_mask::<_CMP_ORD_Q>(a, a),
        and |a, b| a & b, all |m| m == __mmask8::MAX,
        select |m, yes, no| _mm512_mask_blend_pd(m, no, yes)
    }
    vector! {
        F32x16Avx2: f32 = [__m256; 2], lanes 8,
        _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_min_ps _mm256_max_ps,
        round |a| _mm256_round_ps::<NEAREST>(a),
        mask __m256, le |a, b| _mm256_cmp_ps::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm256_cmp_ps::<_CMP_ORD_Q>(a, a),
        and |a, b| _mm256_and_ps(a, b), all |m| _mm256_movemask_ps(m) == 0xff,
        select |m, yes, no| _mm256_blendv_ps(no, yes, m)
    }
    vector! {
        F64x16Avx2: f64 = [__m256d; 4], lanes 4,
        _mm256_set1_pd _mm256_loadu_pd _mm256_storeu_pd
        _mm256_add_pd _mm256_sub_pd _mm256_mul_pd _mm256_div_pd _mm256_min_pd _mm256_max_pd,
        round |a| _mm256_round_pd::<NEAREST>(a),
        mask __m256d, le |a, b| _mm256_cmp_pd::<_CMP_LE_OQ>(a, b),
        ordered |a| _mm256_cmp_pd::<_CMP_ORD_Q>(a, a),
        and |a, b| _mm256_and_pd(a, b), all |m| _mm256_movemask_pd(m) == 0xf,
        select |m, yes, no| _mm256_blendv_pd(no, yes, m)
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
