//! Reconstruction errors of Sequential MSE: sums along rows, read once, float32 terms in float64 sums.

use super::affine::{AffineOp, Limits, QuantizeDequantize};
use super::element::{load_up_to, Compute, Element, LANES};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared};
use super::vector::Vector;
use crate::encoding::AffineGrid;

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

/// Directions that changes of the weights are projected on: one to a lane.
pub const DIRECTIONS: usize = LANES;
/// Columns of a row that all candidates are taken through before the next ones: with these columns of the
/// directions (4 KiB) and all candidates' changes they stay in the first cache.
const COLUMNS: usize = 64;
/// Candidates that share a load of the directions. As many sums as the narrower registers hold.
const GROUP: usize = 5;

/// Rows of weights, and the ranges to try on them.
pub struct Candidates<'a> {
    /// `[rows, columns]`
    pub weight: &'a [f32],
    /// `[candidates, rows]`
    pub scale: &'a [f32],
    /// `[candidates, rows]`
    pub offset: &'a [f32],
    pub grid: &'a AffineGrid,
    /// `[DIRECTIONS, columns]`
    pub directions: &'a [f32],
}

/// What one row becomes: for each candidate the change's projections and, last, its squared length.
struct Projections<'a> {
    /// In vectors: columns that the row has not are zero, which is on every grid.
    weight: &'a [[f32; LANES]],
    scale_offset: &'a [[f32; 2]],
    limits: Limits<f32>,
    /// Of each column.
    directions: &'a [[f32; DIRECTIONS]],
    /// For each candidate, and as many as a whole group has. Those beyond the candidates are zero.
    changes: &'a mut [[f32; COLUMNS]],
    output: &'a mut [[f64; DIRECTIONS + 1]],
}

impl Body for Projections<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let limits = self.limits.splat::<S::F32>();
        let zeros = S::F32::splat(0.0);
        let weights = self.weight.chunks(COLUMNS / LANES);
        for (weight, directions) in weights.zip(self.directions.chunks(COLUMNS)) {
            let rows = self.changes.iter_mut().zip(&mut *self.output);
            for (&[scale, offset], (changes, output)) in self.scale_offset.iter().zip(rows) {
                let encoding = [S::F32::splat(scale), S::F32::splat(offset)];
                let mut square = zeros;
                for (&w, place) in weight.iter().zip(changes.chunks_exact_mut(LANES)) {
                    let w = S::F32::from_array(w);
                    let change = QuantizeDequantize::value(w, encoding, &limits).sub(w);
                    square = square.add(change.mul(change));
                    place.copy_from_slice(&change.to_array());
                }
                output[DIRECTIONS] += square.sum();
            }
            let groups = self.changes.chunks_exact(GROUP);
            for (changes, output) in groups.zip(self.output.chunks_mut(GROUP)) {
                let mut sums = [zeros; GROUP];
                for column in 0..directions.len().min(COLUMNS) {
                    let along = S::F32::from_array(directions[column]);
                    for (sum, changes) in sums.iter_mut().zip(changes) {
                        *sum = sum.add(along.mul(S::F32::splat(changes[column])));
                    }
                }
                for (output, sum) in output.iter_mut().zip(sums) {
                    let sum = S::f32_to_f64(&sum.to_array());
                    for (total, part) in output.iter_mut().zip(sum) {
                        *total += part;
                    }
                }
            }
        }
    }
}

/// For every candidate and row, with `e` the change that quantizing makes to the row: `e`'s products with the
/// directions, and last `|e|^2`; `[candidates][rows]`. Weights are read once; float32 products, their
/// sums float64 from [`COLUMNS`] terms on.
///
/// # Panics
/// If the slices do not have as many elements as `rows` asks for.
pub fn project_changes(
    candidates: &Candidates<'_>,
    rows: usize,
) -> Vec<Vec<[f64; DIRECTIONS + 1]>> {
    let Candidates {
        weight,
        scale,
        offset,
        grid,
        directions,
    } = *candidates;
    let columns = weight.len() / rows.max(1);
    let count = scale.len() / rows.max(1);
    assert_eq!(weight.len(), rows * columns);
    assert_eq!((scale.len(), offset.len()), (count * rows, count * rows));
    assert_eq!(directions.len(), DIRECTIONS * columns);
    let limits = Limits::new(grid);
    let mut by_column = vec![[0.0; DIRECTIONS]; columns];
    for (i, direction) in directions.chunks(columns.max(1)).enumerate() {
        for (column, &value) in by_column.iter_mut().zip(direction) {
            column[i] = value;
        }
    }
    let mut projections = vec![vec![[0.0; DIRECTIONS + 1]; rows]; count];
    let outputs: Vec<_> = projections
        .iter_mut()
        .map(|of_candidate| Shared(of_candidate.as_mut_ptr()))
        .collect();
    // A candidate's work on an element is that of several in other kernels.
    let grain = (super::parallel::GRAIN / (columns * count).max(1)).max(1);
    for_each_range(rows, grain, |range| {
        let mut found = vec![[0.0; DIRECTIONS + 1]; count];
        let mut changes = vec![[0.0; COLUMNS]; count.next_multiple_of(GROUP)];
        let mut vectors = vec![[0.0; LANES]; columns.div_ceil(LANES)];
        for row in range {
            found.fill([0.0; DIRECTIONS + 1]);
            let scale_offset: Vec<[f32; 2]> = (0..count)
                .map(|i| [scale[i * rows + row], offset[i * rows + row]])
                .collect();
            let weight = weight[row * columns..(row + 1) * columns].chunks(LANES);
            for (vector, weight) in vectors.iter_mut().zip(weight) {
                vector[..weight.len()].copy_from_slice(weight);
            }
            dispatch(Projections {
                weight: &vectors,
                scale_offset: &scale_offset,
                limits,
                directions: &by_column,
                changes: &mut changes,
                output: &mut found,
            });
            for (output, &values) in outputs.iter().zip(&found) {
                // SAFETY: every row has a place of its own in each candidate's list.
                unsafe { output.0.add(row).write(values) };
            }
        }
    });
    projections
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of unequal remainders, asymmetric and symmetric grids, against float64.
    #[test]
    fn projections_are_those_of_each_change() {
        let grid = AffineGrid::new(0, 15, 0.0).unwrap();
        let (rows, count) = (3, 4);
        for columns in [5, 16, 700] {
            let number = |seed: usize| ((seed * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
            let weight: Vec<f32> = (0..rows * columns).map(number).collect();
            let directions: Vec<f32> = (0..DIRECTIONS * columns).map(|i| number(3 * i)).collect();
            let scale: Vec<f32> = (1..=count * rows).map(|i| 0.02 * i as f32).collect();
            let offset: Vec<f32> = (0..count * rows).map(|i| -(i as f32 % 15.0)).collect();
            let candidates = Candidates {
                weight: &weight,
                scale: &scale,
                offset: &offset,
                grid: &grid,
                directions: &directions,
            };
            let found = project_changes(&candidates, rows);
            assert_eq!(found.len(), count);
            for (at, found) in found.iter().flatten().enumerate() {
                let row = &weight[at % rows * columns..][..columns];
                let change: Vec<f64> = row
                    .iter()
                    .map(|&w| {
                        let q = ((w / scale[at]).round_ties_even() - offset[at]).clamp(0.0, 15.0);
                        f64::from((q + offset[at]) * scale[at] - w)
                    })
                    .collect();
                for i in 0..DIRECTIONS {
                    let direction = &directions[i * columns..][..columns];
                    let terms = change.iter().zip(direction).map(|(e, &d)| e * f64::from(d));
                    let expected: f64 = terms.sum();
                    assert!(
                        (found[i] - expected).abs() < 1e-5 * columns as f64,
                        "{at} {i}"
                    );
                }
                let square: f64 = change.iter().map(|e| e * e).sum();
                assert!((found[DIRECTIONS] - square).abs() <= 1e-5 * square, "{at}");
            }
        }
    }
}
