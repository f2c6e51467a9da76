//! Reductions to one value per encoding, in a fixed order.
//!
//! The tensor is cut into chunks of a fixed number of elements, whatever the number of threads; a
//! chunk's partial results are combined in memory order. So the result does not depend on threads.

use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared};
use super::walk::{Piece, Pieces};
use crate::encoding::BlockGeometry;

/// Elements of one chunk.
const CHUNK: usize = 32_768;
/// Elements whose encodings are gathered at a time where neighbours do not share one.
pub const TILE: usize = 256;
/// Most chunks that get a full array of partial results of their own.
const MAX_ARRAYS: usize = 16;

/// What is reduced. Implementations may write an elementwise result on the way.
pub trait Reduction: Sync {
    /// Partial result of one encoding.
    type Partial: Copy + Send + Sync;
    /// What is the same for all encodings, in registers.
    type Constants<S: Simd>: Copy;

    /// In the registers of an instruction set; once per chunk.
    fn constants<S: Simd>(&self) -> Self::Constants<S>;

    /// The partial result of no elements.
    fn identity(&self) -> Self::Partial;

    /// Adds a later partial result to an earlier one.
    fn combine(into: &mut Self::Partial, from: Self::Partial);

    /// The elements `start..start + len`, which share encoding `group`.
    ///
    /// # Safety
    /// The elements are inside the tensor, and no other call has them at the same time.
    unsafe fn run<S: Simd>(
        &self,
        start: usize,
        len: usize,
        group: usize,
        constants: &Self::Constants<S>,
    ) -> Self::Partial;

    /// The runs of a piece. The partial result of each goes to `places`, from run to run `step` further.
    ///
    /// # Safety
    /// As for `run`; the places are valid for writes, and this call's alone.
    #[inline(always)]
    unsafe fn runs<S: Simd>(
        &self,
        piece: Piece,
        constants: &Self::Constants<S>,
        places: *mut Self::Partial,
        step: usize,
    ) {
        // SAFETY: handed on.
        unsafe { each_run::<S, Self>(self, piece, constants, places, step) }
    }

    /// The elements from `start` on, each with its own encoding, at most [`TILE`] of them.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn tile<S: Simd>(
        &self,
        start: usize,
        groups: &[usize],
        partials: &mut [Self::Partial],
        constants: &Self::Constants<S>,
    );

    /// Called by each thread after each of its chunks.
    #[inline(always)]
    fn finish<S: Simd>(&self) {}
}

/// [`Reduction::runs`] run by run.
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn each_run<S: Simd, R: Reduction + ?Sized>(
    reduction: &R,
    piece: Piece,
    constants: &R::Constants<S>,
    places: *mut R::Partial,
    step: usize,
) {
    let (mut start, mut group) = (piece.start, piece.group);
    for r in 0..piece.count {
        // SAFETY: by the contract.
        unsafe {
            let partial = reduction.run::<S>(start, piece.len, group, constants);
            places.add(r * step).write(partial);
        }
        start += piece.len;
        group += piece.group_step;
    }
}

struct RunChunk<'a, R: Reduction> {
    reduction: &'a R,
    geometry: &'a BlockGeometry,
    begin: usize,
    end: usize,
    /// Where the result of a run goes: its number plus this, or (`None`) its encoding's place.
    chunk: Option<usize>,
    partials: Shared<R::Partial>,
}

impl<R: Reduction> Body for RunChunk<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let constants = &self.reduction.constants::<S>();
        for piece in Pieces::new(self.geometry, self.begin, self.end) {
            let (place, step) = self.chunk.map_or((piece.group, piece.group_step), |chunk| {
                (piece.run + chunk, 1)
            });
            // SAFETY: chunks do not overlap, so neither do their elements. `run + chunk` grows with
            // every run (each begins an iteration or a chunk), so each has its own place; without
            // `chunk` each run is one encoding's only one.
            unsafe {
                let places = self.partials.0.add(place);
                self.reduction.runs::<S>(piece, constants, places, step);
            }
        }
        self.reduction.finish::<S>();
    }
}

struct TileChunk<'a, R: Reduction> {
    reduction: &'a R,
    geometry: &'a BlockGeometry,
    begin: usize,
    end: usize,
    partials: &'a mut [R::Partial],
}

impl<R: Reduction> Body for TileChunk<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let constants = &self.reduction.constants::<S>();
        let mut groups = [0_usize; TILE];
        let mut begin = self.begin;
        while begin < self.end {
            let end = (begin + TILE).min(self.end);
            fill_groups(self.geometry, begin, end, &mut groups);
            // SAFETY: the caller's stretches do not overlap.
            unsafe {
                let groups = &groups[..end - begin];
                self.reduction
                    .tile::<S>(begin, groups, self.partials, constants);
            }
            begin = end;
        }
        self.reduction.finish::<S>();
    }
}

/// Writes the encoding of each element of `begin..end` to the front of `groups`.
#[inline(always)]
pub fn fill_groups(geometry: &BlockGeometry, begin: usize, end: usize, groups: &mut [usize; TILE]) {
    let pieces = Pieces::new(geometry, begin, end);
    let stride = pieces.inner_stride;
    for piece in pieces {
        let from = piece.start - begin;
        let runs = groups[from..from + piece.len * piece.count].chunks_exact_mut(piece.len);
        for (r, run) in runs.enumerate() {
            for (j, slot) in run.iter_mut().enumerate() {
                *slot = piece.group + r * piece.group_step + j * stride;
            }
        }
    }
}

/// One result for each encoding of `geometry`.
pub fn reduce<R: Reduction>(geometry: &BlockGeometry, reduction: &R) -> Vec<R::Partial> {
    let numel = geometry.numel();
    let num_groups = geometry.num_groups();
    if numel == 0 {
        return vec![reduction.identity(); num_groups];
    }
    let inner = geometry.inner();
    let shared_runs = inner.group_stride == 0;
    if shared_runs && inner.size <= CHUNK && numel == inner.size * num_groups {
        // Each run is an encoding of its own: its result is the result.
        let mut result = Vec::with_capacity(num_groups);
        let shared = Shared(result.as_mut_ptr());
        let chunk = CHUNK / inner.size * inner.size;
        for_each_range(numel.div_ceil(chunk), 1, |range| {
            // The whole struct is captured, not its pointer, which alone would not be `Sync`.
            let shared = &shared;
            for i in range {
                dispatch(RunChunk {
                    reduction,
                    geometry,
                    begin: i * chunk,
                    end: ((i + 1) * chunk).min(numel),
                    chunk: None,
                    partials: *shared,
                });
            }
        });
        // SAFETY: the runs are as many as the encodings, and each has written its own.
        unsafe { result.set_len(num_groups) };
        return result;
    }
    let mut result = vec![reduction.identity(); num_groups];
    if shared_runs {
        let chunks = numel.div_ceil(CHUNK);
        let mut partials = vec![reduction.identity(); numel / inner.size + chunks];
        let shared = Shared(partials.as_mut_ptr());
        for_each_range(chunks, 1, |range| {
            let shared = &shared;
            for chunk in range {
                dispatch(RunChunk {
                    reduction,
                    geometry,
                    begin: chunk * CHUNK,
                    end: ((chunk + 1) * CHUNK).min(numel),
                    chunk: Some(chunk),
                    partials: *shared,
                });
            }
        });
        for piece in Pieces::new(geometry, 0, numel) {
            for r in 0..piece.count {
                let start = piece.start + r * piece.len;
                let last = start + piece.len - 1;
                for chunk in start / CHUNK..=last / CHUNK {
                    let group = piece.group + r * piece.group_step;
                    R::combine(&mut result[group], partials[piece.run + r + chunk]);
                }
            }
        }
    } else {
        // Bounded memory: the arrays together hold at most a quarter of the tensor's elements.
        let arrays = (numel / (2 * CHUNK))
            .min(numel / (4 * num_groups))
            .clamp(1, MAX_ARRAYS);
        let length = numel.div_ceil(arrays);
        let mut partials = vec![result.clone(); arrays];
        let shared = Shared(partials.as_mut_ptr());
        for_each_range(arrays, 1, |range| {
            let shared = &shared;
            for i in range {
                // SAFETY: each array is taken by one thread.
                let partials = unsafe { &mut *shared.0.add(i) };
                dispatch(TileChunk {
                    reduction,
                    geometry,
                    begin: i * length,
                    end: ((i + 1) * length).min(numel),
                    partials,
                });
            }
        });
        for array in partials {
            for (into, from) in result.iter_mut().zip(array) {
                R::combine(into, from);
            }
        }
    }
    result
}
