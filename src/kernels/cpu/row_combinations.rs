//! Linear combinations of a matrix's rows, where rows are few and long: memory-bound, unlike other matrix
//! products, which a library for those takes three times as long for.

use super::element::{load_up_to, store_up_to, Compute, LANES};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared, GRAIN};
use super::vector::Vector;

/// Rows of the input at the most.
pub const MOST_ROWS: usize = 64;
/// Vectors worked on at a time.
const UNROLL: usize = 4;

/// The terms of one row of the output: rows of the input, and what each is multiplied with.
pub type Terms<C> = Vec<(usize, C)>;

/// What one thread does of [`combine_rows`], with its arguments.
struct Combine<'a, C> {
    terms: &'a [Terms<C>],
    rows: usize,
    /// Elements of a row.
    len: usize,
    input: *const C,
    output: *mut C,
    /// The elements of every row that are this thread's alone: within `0..len`.
    begin: usize,
    end: usize,
}

impl<C: Compute> Combine<'_, C> {
    /// Up to `N` vectors of all rows, from `at` on. Every input is read before anything is written: rows whose
    /// distance is a power of two are in each other's way in the cache.
    ///
    /// # Safety
    /// The `n` elements from `at`, more than `N - 1` vectors and at most `N`, are within `begin..end`.
    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(
        &self,
        at: usize,
        n: usize,
        inputs: &mut [[C::V<S>; UNROLL]; MOST_ROWS],
    ) {
        let lanes = |j: usize| LANES.min(n - j * LANES);
        for (row, vectors) in inputs[..self.rows].iter_mut().enumerate() {
            for (j, vector) in vectors[..N].iter_mut().enumerate() {
                let place = row * self.len + at + j * LANES;
                // SAFETY: `row` is one of the input's `rows`, and the elements are within it.
                *vector = unsafe { load_up_to::<S, C, C>(self.input.add(place), lanes(j)) };
            }
        }
        for (row, terms) in self.terms.iter().enumerate() {
            let mut sums = [<C::V<S>>::splat(C::ZERO); N];
            for &(input, factor) in terms {
                let factor = <C::V<S>>::splat(factor);
                for j in 0..N {
                    sums[j] = sums[j].add(inputs[input][j].mul(factor));
                }
            }
            for (j, sum) in sums.into_iter().enumerate() {
                let place = row * self.len + at + j * LANES;
                // SAFETY: the output has as many rows as there are `terms`; the elements are within this one, and
                // this thread's.
                unsafe { store_up_to::<S, C, C>(self.output.add(place), lanes(j), sum) };
            }
        }
    }
}

impl<C: Compute> Body for Combine<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let mut inputs = [[<C::V<S>>::splat(C::ZERO); UNROLL]; MOST_ROWS];
        let mut at = self.begin;
        // SAFETY: `at + n` is never beyond `end`.
        unsafe {
            while at + UNROLL * LANES <= self.end {
                self.vectors::<S, UNROLL>(at, UNROLL * LANES, &mut inputs);
                at += UNROLL * LANES;
            }
            while at < self.end {
                let n = LANES.min(self.end - at);
                self.vectors::<S, 1>(at, n, &mut inputs);
                at += n;
            }
        }
    }
}

/// Row `i` of `output` is the sum of `factor * input[row]` over the `(row, factor)` of `terms[i]`, in their order.
///
/// # Panics
/// If there are more than [`MOST_ROWS`] rows, or a term names one that is not there.
///
/// # Safety
/// `input` is valid for reads of `rows * len` elements, `output` for writes of `terms.len() * len`; they
/// do not overlap.
pub unsafe fn combine_rows<C: Compute>(
    terms: &[Terms<C>],
    rows: usize,
    len: usize,
    input: *const C,
    output: *mut C,
) {
    assert!(rows <= MOST_ROWS);
    assert!(terms.iter().flatten().all(|&(row, _)| row < rows));
    let grain = (GRAIN / (rows + terms.len()).max(1)).max(1);
    let (input, output) = (Shared(input.cast_mut()), Shared(output));
    for_each_range(len, grain, |range| {
        let (input, output) = (&input, &output);
        dispatch(Combine {
            terms,
            rows,
            len,
            input: input.0.cast_const(),
            output: output.0,
            begin: range.start,
            end: range.end,
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::isa::{force, Isa};
    use super::*;

    fn combined<C: Compute>(terms: &[Terms<C>], rows: usize, input: &[C]) -> Vec<C> {
        let len = input.len() / rows;
        let mut output = vec![C::NAN; terms.len() * len];
        // SAFETY: both hold as many rows of `len` elements as it says.
        unsafe { combine_rows(terms, rows, len, input.as_ptr(), output.as_mut_ptr()) };
        output
    }

    fn check<C: Compute + std::fmt::Debug>(rows: usize, len: usize) {
        let number = |i: usize| C::from_f64(((i * 7919) % 1013) as f64 / 64.0 - 5.0);
        let input: Vec<C> = (0..rows * len).map(number).collect();
        // Every row once or twice, one row of nothing.
        let mut terms: Vec<Terms<C>> = (0..rows)
            .map(|row| vec![(row, C::from_f64(0.5)), ((row * 5 + 1) % rows, number(row))])
            .collect();
        terms.push(vec![]);
        let mut expected = vec![];
        for terms in &terms {
            for i in 0..len {
                let add = |sum, &(row, factor): &(usize, C)| sum + input[row * len + i] * factor;
                expected.push(terms.iter().fold(C::ZERO, add));
            }
        }
        for isa in Isa::ALL {
            if force(Some(isa)) {
                let found = combined(&terms, rows, &input);
                force(None);
                assert_eq!(found, expected, "{isa:?}, {rows} rows of {len}");
            }
        }
    }

    #[test]
    fn rows_of_any_length_are_combined_the_same_on_every_instruction_set() {
        for len in [1, 15, 16, 64, 65, 200, 40_000] {
            check::<f32>(4, len);
            check::<f64>(9, len);
        }
        check::<f32>(MOST_ROWS, 100);
    }

    #[test]
    fn nothing_is_combined_to_zeros() {
        assert_eq!(combined::<f32>(&[vec![]], 1, &[1.0, 2.0]), [0.0, 0.0]);
        assert!(combined::<f32>(&[], 1, &[1.0]).is_empty());
    }
}
