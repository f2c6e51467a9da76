//! Reconstruction errors of Sequential MSE: sums along rows, read once, float32 terms in float64 sums.

use super::element::{load_up_to, Compute, Element, LANES};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared};
use super::vector::Vector;

/// What is summed along a row, of `a` and `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSum {
    /// `(a - b)^2`
    SquaredDifference,
    /// `|a - b|`
    AbsoluteDifference,
    /// `a * b`
    Product,
}

impl RowSum {
    /// All of them, by their numbers in `csrc/engine.h`.
    pub const ALL: [RowSum; 3] = [
        RowSum::SquaredDifference,
        RowSum::AbsoluteDifference,
        RowSum::Product,
    ];
}

/// Elements whose terms are summed in the compute type, spread over the lanes, before they are added up
/// in float64.
const LANE_SUM: usize = 4096;
/// Elements of a row that one thread takes; a multiple of `LANE_SUM`.
const CHUNK: usize = 65_536;

struct Sum<T> {
    kind: RowSum,
    a: *const T,
    /// Null: zeros.
    b: *const T,
    len: usize,
}

impl<T> Sum<T> {
    #[inline(always)]
    fn total<S: Simd, C: Compute>(&self, term: impl Fn(C::V<S>, C::V<S>) -> C::V<S>) -> f64
    where
        T: Element<C>,
    {
        let zeros = <C::V<S>>::splat(C::ZERO);
        let mut total = 0.0;
        for begin in (0..self.len).step_by(LANE_SUM) {
            let end = self.len.min(begin + LANE_SUM);
            let mut sums = zeros;
            for at in (begin..end).step_by(LANES) {
                let n = LANES.min(end - at);
                // Lanes beyond `n` are zero, and so are their terms.
                let read = |p: *const T| {
                    if p.is_null() {
                        return zeros;
                    }
                    // SAFETY: `n` elements from `at` are inside the row.
                    unsafe { load_up_to::<S, T, C>(p.add(at), n) }
                };
                sums = sums.add(term(read(self.a), read(self.b)));
            }
            total += sums.sum();
        }
        total
    }
}

struct Typed<T, C>(Sum<T>, std::marker::PhantomData<C>);

impl<T: Element<C>, C: Compute> Body for Typed<T, C> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        match self.0.kind {
            RowSum::SquaredDifference => self.0.total::<S, C>(
                #[inline(always)]
                |a, b| {
                    let d = a.sub(b);
                    d.mul(d)
                },
            ),
            RowSum::AbsoluteDifference => self.0.total::<S, C>(
                #[inline(always)]
                |a, b| a.sub(b).abs(),
            ),
            RowSum::Product => self.0.total::<S, C>(
                #[inline(always)]
                |a, b| a.mul(b),
            ),
        }
    }
}

/// One sum for each of `rows` rows of `columns` elements. The order of summation depends on the number
/// of columns alone.
///
/// # Safety
/// `a` and, unless it is null (zeros), `b` are valid for reads of `rows * columns` elements.
pub unsafe fn row_sums<T: Element<C>, C: Compute>(
    kind: RowSum,
    a: *const T,
    b: *const T,
    rows: usize,
    columns: usize,
) -> Vec<f64> {
    let chunks = columns.div_ceil(CHUNK).max(1);
    let mut partial = vec![0.0; rows * chunks];
    let (a, b) = (Shared(a.cast_mut()), Shared(b.cast_mut()));
    let output = Shared(partial.as_mut_ptr());
    let grain = (super::parallel::GRAIN / columns.clamp(1, CHUNK)).max(1);
    for_each_range(rows * chunks, grain, |range| {
        let (a, b, output) = (&a, &b, &output);
        for index in range {
            let (row, begin) = (index / chunks, index % chunks * CHUNK);
            let start = row * columns + begin;
            // SAFETY: the chunk is inside its row; every chunk has a sum of its own.
            unsafe {
                let b = if b.0.is_null() {
                    std::ptr::null()
                } else {
                    b.0.add(start).cast_const()
                };
                let sum = Sum {
                    kind,
                    a: a.0.add(start).cast_const(),
                    b,
                    len: CHUNK.min(columns - begin),
                };
                output
                    .0
                    .add(index)
                    .write(dispatch(Typed::<T, C>(sum, std::marker::PhantomData)));
            }
        }
    });
    partial.chunks(chunks).map(|c| c.iter().sum()).collect()
}
