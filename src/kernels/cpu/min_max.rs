//! Smallest and largest element of each encoding's block, in one read. NaN wins, as in torch.

use super::element::{load, Compute, Element, LANES};
use super::isa::Simd;
use super::reduce::{reduce, Reduction};
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

    fn identity(&self) -> (C, C) {
        (C::INFINITY, -C::INFINITY)
    }

    #[inline(always)]
    fn combine(into: &mut (C, C), from: (C, C)) {
        *into = (smaller(into.0, from.0), larger(into.1, from.1));
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, start: usize, len: usize, _group: usize) -> (C, C) {
        let mut low = [C::INFINITY; LANES];
        let mut high = [-C::INFINITY; LANES];
        let mut nan = [C::ZERO; LANES];
        let mut i = 0;
        while i + LANES <= len {
            // SAFETY: the block is inside the run.
            let x = unsafe { load::<S, T, C>(self.input.add(start + i), LANES) };
            for j in 0..LANES {
                low[j] = if x[j] < low[j] { x[j] } else { low[j] };
                high[j] = if x[j] > high[j] { x[j] } else { high[j] };
                nan[j] = if x[j].is_nan() { x[j] } else { nan[j] };
            }
            i += LANES;
        }
        for j in 0..LANES {
            if nan[j].is_nan() {
                low[j] = nan[j];
                high[j] = nan[j];
            }
        }
        let mut result = (low[0], high[0]);
        for j in 1..LANES {
            result = (smaller(result.0, low[j]), larger(result.1, high[j]));
        }
        if i < len {
            // SAFETY: `len - i` elements are left.
            let x = unsafe { load::<S, T, C>(self.input.add(start + i), len - i) };
            for &v in &x[..len - i] {
                result = (smaller(result.0, v), larger(result.1, v));
            }
        }
        result
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, start: usize, groups: &[usize], partials: &mut [(C, C)]) {
        let mut i = 0;
        while i < groups.len() {
            let n = LANES.min(groups.len() - i);
            // SAFETY: the tile is inside the tensor.
            let x = unsafe { load::<S, T, C>(self.input.add(start + i), n) };
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
