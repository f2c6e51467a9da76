//! The inner loops, each written once and compiled for every instruction set.
//!
//! A body has a fixed number of independent lanes, a fixed order of summation and no fused
//! multiply-add, so that AVX-512, AVX2 and the portable build give identical bits.

use crate::kernels::cpu::isa::{dispatch, Body, Simd};

/// Defines `fn $name(args..) -> ret`: the always-inlined `$body`, compiled for the active
/// instruction set.
macro_rules! kernel {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path;) => {
        $(#[$doc])*
        pub(super) fn $name<'a>($($arg: $ty),*) $(-> $ret)? {
            struct Call<'a> {
                $($arg: $ty,)*
                lifetime: std::marker::PhantomData<&'a ()>,
            }
            impl<'a> Body for Call<'a> {
                type Output = kernel!(@output $($ret)?);
                #[inline(always)]
                fn run<S: Simd>(self) -> Self::Output {
                    $body($(self.$arg),*)
                }
            }
            dispatch(Call { $($arg,)* lifetime: std::marker::PhantomData })
        }
    };
    (@output) => { () };
    (@output $ret:ty) => { $ret };
}

const LANES: usize = 16;

/// Smallest and largest of the values that compare (NaN is left out); `(inf, -inf)` if there are none.
#[inline(always)]
fn range_body(x: &[f32]) -> (f32, f32) {
    let mut low = [f32::INFINITY; LANES];
    let mut high = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for j in 0..LANES {
            low[j] = if block[j] < low[j] { block[j] } else { low[j] };
            high[j] = if block[j] > high[j] {
                block[j]
            } else {
                high[j]
            };
        }
    }
    for &v in rest {
        low[0] = if v < low[0] { v } else { low[0] };
        high[0] = if v > high[0] { v } else { high[0] };
    }
    (
        low.into_iter()
            .fold(f32::INFINITY, |a, b| if b < a { b } else { a }),
        high.into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a }),
    )
}

kernel! {
    /// Smallest and largest value, NaN left out; `(inf, -inf)` if there are none.
    fn range(x: &'a [f32]) -> (f32, f32) = range_body;
}

/// Bin of each value on `bins` equal bins over `low..=high`; values outside go to the end bins, NaN
/// to the extra bin `bins`.
///
/// The expression is that of `torch.histc`, operation by operation, so that the counts are equal.
#[inline(always)]
fn bin_indices_body(x: &[f32], low: f32, high: f32, bins: u32, out: &mut [u32]) {
    let count = bins as f32;
    let last = (bins - 1) as f32;
    let span = high - low;
    for (slot, &v) in out.iter_mut().zip(x) {
        let t = (v - low) * count / span;
        let t = if t < 0.0 { 0.0 } else { t };
        let t = if t > last { last } else { t };
        let t = if t.is_nan() { count } else { t };
        // SAFETY: t is neither NaN nor outside 0..=bins, which fits.
        *slot = unsafe { t.to_int_unchecked::<i32>() } as u32;
    }
}

kernel! {
    /// Bin of each value on `bins` equal bins over `low..=high`: the formula of `torch.histc`.
    /// Values outside go to the end bins, NaN to the extra bin `bins`.
    fn bin_indices(x: &'a [f32], low: f32, high: f32, bins: u32, out: &'a mut [u32]) = bin_indices_body;
}

/// One grid to try: values are rounded to `(0..=steps + offset) * delta`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub delta: f32,
    pub offset: f32,
}

/// Bins summed in float32 before the sum is taken over to float64.
const PORTION: usize = 8 * LANES;

/// Weighted squared error of `mids` on a grid, each with its count; clipped ones count `gamma` times.
/// Stops once the sum exceeds `limit`. Both slices are padded to a multiple of [`LANES`] with zeros.
#[inline(always)]
fn noise_body(
    mids: &[f32],
    counts: &[f32],
    candidate: Candidate,
    steps: f32,
    gamma: f32,
    limit: f64,
) -> f64 {
    let Candidate { delta, offset } = candidate;
    let mut total = 0.0_f64;
    for (mids, counts) in mids.chunks(PORTION).zip(counts.chunks(PORTION)) {
        let mut sums = [0.0_f32; LANES];
        let blocks = mids
            .as_chunks::<LANES>()
            .0
            .iter()
            .zip(counts.as_chunks::<LANES>().0);
        for (mid, count) in blocks {
            for j in 0..LANES {
                let q = (mid[j] / delta - offset).round_ties_even();
                let weight = if (q < 0.0) | (q > steps) { gamma } else { 1.0 };
                let q = if q < 0.0 { 0.0 } else { q };
                let q = if q > steps { steps } else { q };
                let error = (q + offset) * delta - mid[j];
                sums[j] += error * error * count[j] * weight;
            }
        }
        // A fixed tree, the same under every instruction set.
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for j in 0..width {
                sums[j] += sums[j + width];
            }
        }
        total += f64::from(sums[0]);
        if total > limit {
            break;
        }
    }
    total
}

kernel! {
    /// Expected squared error of a histogram on a grid; see [`pad`] for the layout of the slices.
    fn noise(
        mids: &'a [f32],
        counts: &'a [f32],
        candidate: Candidate,
        steps: f32,
        gamma: f32,
        limit: f64,
    ) -> f64 = noise_body;
}

/// Fills up to a multiple of the lanes with bins that hold nothing.
pub(super) fn pad(values: &mut Vec<f32>) {
    values.resize(values.len().next_multiple_of(LANES), 0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::isa;
    use proptest::prelude::*;

    proptest! {
        /// The same bits under every instruction set, hostile values included.
        #[test]
        fn instruction_sets_agree(
            x in proptest::collection::vec(proptest::num::f32::ANY, 0..200),
            y in proptest::collection::vec(-4.0_f32..4.0, 0..400),
            delta in 1e-3_f32..1.0, offset in -300_f32..10.0, gamma in 1.0_f32..4.0,
        ) {
            let (low, high) = (-1.5_f32, 2.25_f32);
            let offset = offset.round();
            let mut counts: Vec<f32> = y.iter().map(|v| (v * 10.0).abs().floor()).collect();
            let mut mids = y.clone();
            pad(&mut mids);
            pad(&mut counts);
            let run = || {
                let mut bins = [vec![0_u32; x.len()], vec![0_u32; y.len()]];
                bin_indices(&x, low, high, 37, &mut bins[0]);
                bin_indices(&y, low, high, 37, &mut bins[1]);
                let (a, b) = range(&x);
                let candidate = Candidate { delta, offset };
                let error = noise(&mids, &counts, candidate, 255.0, gamma, f64::MAX);
                (bins, a.to_bits(), b.to_bits(), error.to_bits())
            };
            let results: Vec<_> = isa::Isa::ALL
                .into_iter()
                .filter(|&wanted| isa::force(Some(wanted)))
                .map(|_| run())
                .collect();
            isa::force(None);
            prop_assert!(results.iter().all(|r| *r == results[0]));
        }

        #[test]
        fn bins_follow_the_definition(x in proptest::collection::vec(-4.0_f32..4.0, 1..200)) {
            let mut bins = vec![0; x.len()];
            bin_indices(&x, -2.0, 2.0, 16, &mut bins);
            for (&v, &bin) in x.iter().zip(&bins) {
                // Edges are exact in binary here.
                let expected = (((v + 2.0) * 4.0).floor()).clamp(0.0, 15.0);
                prop_assert_eq!(bin as f32, expected, "{}", v);
            }
        }
    }

    #[test]
    fn special_values_have_their_bins() {
        let x = [
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            0.0,
            1.0,
            -1.0,
            2.0,
            -0.0,
        ];
        let mut bins = [9; 8];
        bin_indices(&x, 0.0, 1.0, 4, &mut bins);
        assert_eq!(bins, [0, 3, 4, 0, 3, 0, 3, 0]);
        assert_eq!(range(&x[2..3]), (f32::INFINITY, f32::NEG_INFINITY));
    }

    #[test]
    fn noise_by_hand() {
        // Grid 0, 1, 2; the value 0.25 rounds to 0, 3 clips to 2, -1 clips to 0.
        let mut mids = vec![0.25, 3.0, -1.0, 2.0];
        let mut counts = vec![2.0, 1.0, 3.0, 7.0];
        pad(&mut mids);
        pad(&mut counts);
        let candidate = Candidate {
            delta: 1.0,
            offset: 0.0,
        };
        let total = noise(&mids, &counts, candidate, 2.0, 3.0, f64::MAX);
        assert_eq!(total, 2.0 * 0.0625 + 3.0 * 1.0 + 3.0 * 3.0);
    }
}
