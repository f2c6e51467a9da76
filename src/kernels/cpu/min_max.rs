//! Smallest and largest element of each encoding's block, in one read. NaN wins, as in torch.

use super::element::{load, load_part, Compute, Element, LANES};
use super::isa::Simd;
use super::reduce::{reduce, Reduction};
use super::vector::Vector;
use crate::encoding::BlockGeometry;
use std::marker::PhantomData;

struct MinMax<T, C> {
    input: *const T,
    compute: PhantomData<C>,
}

// SAFETY: the input is only read.
unsafe impl<T: Sync, C> Sync for MinMax<T, C> {}

#[inline(always)]
fn smaller<C: Compute>(a: C, b: C) -> C {
    // A NaN in `a` stays (the comparison is false); a NaN in `b` is taken.
    if (b < a) | b.is_nan() {
        b
    } else {
        a
    }
}

#[inline(always)]
fn larger<C: Compute>(a: C, b: C) -> C {
    if (b > a) | b.is_nan() {
        b
    } else {
        a
    }
}

impl<T: Element<C>, C: Compute> Reduction for MinMax<T, C> {
    type Partial = (C, C);
    type Constants<S: Simd> = ();

    #[inline(always)]
    fn constants<S: Simd>(&self) {}

    fn identity(&self) -> (C, C) {
        (C::INFINITY, -C::INFINITY)
    }

    #[inline(always)]
    fn combine(into: &mut (C, C), from: (C, C)) {
        *into = (smaller(into.0, from.0), larger(into.1, from.1));
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, start: usize, len: usize, _: usize, (): &()) -> (C, C) {
        // Several accumulators, or each comparison would wait for the one before it. NaN is looked for
        // on the side: `min` and `max` leave it out if it comes first.
        const WIDE: usize = 4;
        let mut low = [<C::V<S>>::splat(C::INFINITY); WIDE];
        let mut high = [<C::V<S>>::splat(-C::INFINITY); WIDE];
        let mut ordered = [low[0].ordered(); WIDE];
        let mut i = 0;
        // SAFETY: every block is inside the run.
        unsafe {
            while i + WIDE * LANES <= len {
                for k in 0..WIDE {
                    let x = load::<S, T, C>(self.input.add(start + i + k * LANES));
                    low[k] = x.min(low[k]);
                    high[k] = x.max(high[k]);
                    ordered[k] = <C::V<S>>::and(ordered[k], x.ordered());
                }
                i += WIDE * LANES;
            }
            while i + LANES <= len {
                let x = load::<S, T, C>(self.input.add(start + i));
                low[0] = x.min(low[0]);
                high[0] = x.max(high[0]);
                ordered[0] = <C::V<S>>::and(ordered[0], x.ordered());
                i += LANES;
            }
        }
        let mut result = self.identity();
        for k in 1..WIDE {
            low[0] = low[k].min(low[0]);
            high[0] = high[k].max(high[0]);
            ordered[0] = <C::V<S>>::and(ordered[0], ordered[k]);
        }
        for (low, high) in low[0].to_array().into_iter().zip(high[0].to_array()) {
            result = (smaller(result.0, low), larger(result.1, high));
        }
        if !<C::V<S>>::all(ordered[0]) {
            result = (C::NAN, C::NAN);
        }
        // SAFETY: `len - i` elements are left.
        let rest = unsafe { load_part::<S, T, C>(self.input.add(start + i), len - i) }.to_array();
        for &v in &rest[..len - i] {
            result = (smaller(result.0, v), larger(result.1, v));
        }
        result
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(
        &self,
        start: usize,
        groups: &[usize],
        partials: &mut [(C, C)],
        (): &(),
    ) {
        let mut i = 0;
        while i < groups.len() {
            let n = LANES.min(groups.len() - i);
            // SAFETY: the tile is inside the tensor.
            let x = unsafe { load_part::<S, T, C>(self.input.add(start + i), n) }.to_array();
            for (&v, &group) in x[..n].iter().zip(&groups[i..]) {
                Self::combine(&mut partials[group], (v, v));
            }
            i += n;
        }
    }
}

/// The smallest and largest element of each block, `(min, max)` per encoding. A block with a NaN gives
/// NaN for both. Blocks without elements give `(inf, -inf)`.
///
/// # Safety
/// `input` is valid for reads of `geometry.numel()` elements.
pub unsafe fn min_max<T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    input: *const T,
) -> Vec<(C, C)> {
    reduce(
        geometry,
        &MinMax::<T, C> {
            input,
            compute: PhantomData,
        },
    )
}
