//! Functions of each element and its encoding, forward and backward: the walks over memory.
//!
//! A kernel file gives a [`Function`]; [`forward`] reads and writes each element once, [`backward`] reads the
//! element and its incoming gradient once, writes the gradient once and sums those of the encodings on the way.

use super::element::{
    before_stream, load, load_part, store, store_part, streams, Compute, Element, LANES,
};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared, GRAIN};
use super::reduce::{each_run, fill_groups, reduce, Reduction, TILE};
use super::vector::Vector;
use super::walk::{Piece, Pieces};
use crate::encoding::BlockGeometry;

/// The encodings' parameters (scales, offsets), an array of each with one element per group.
pub type Parameters<'a, C, const P: usize> = [&'a [C]; P];

/// A function of an element and the `P` parameters of its encoding, with its straight-through gradients.
pub trait Function<C: Compute, const P: usize>: Copy + Send + Sync {
    /// What is the same for all encodings, in registers.
    type Constants<S: Simd>: Copy;
    /// In the registers of an instruction set; once per stretch of memory.
    fn constants<S: Simd>(&self) -> Self::Constants<S>;
    /// The value at `x`.
    fn value<S: Simd>(
        x: C::V<S>,
        parameters: [C::V<S>; P],
        constants: &Self::Constants<S>,
    ) -> C::V<S>;
    /// The gradients of `x` and of each parameter for the incoming gradient `g`.
    fn gradient<S: Simd>(
        g: C::V<S>,
        x: C::V<S>,
        parameters: [C::V<S>; P],
        constants: &Self::Constants<S>,
    ) -> (C::V<S>, [C::V<S>; P]);
}

/// All lanes share an encoding.
#[inline(always)]
fn shared<S: Simd, C: Compute, const P: usize>(
    parameters: Parameters<'_, C, P>,
    group: usize,
) -> [C::V<S>; P] {
    let mut lanes = [<C::V<S>>::splat(C::ZERO); P];
    for (lanes, parameter) in lanes.iter_mut().zip(parameters) {
        *lanes = Vector::splat(parameter[group]);
    }
    lanes
}

fn assert_lengths<C, const P: usize>(geometry: &BlockGeometry, parameters: Parameters<'_, C, P>) {
    for parameter in parameters {
        assert_eq!(parameter.len(), geometry.num_groups());
    }
}

struct Forward<'a, F, T, C, const P: usize> {
    geometry: &'a BlockGeometry,
    function: F,
    parameters: Parameters<'a, C, P>,
    input: *const T,
    output: *mut T,
    begin: usize,
    end: usize,
    stream: bool,
}

impl<F: Function<C, P>, T: Element<C>, C: Compute, const P: usize> Forward<'_, F, T, C, P> {
    /// The `n < 16` elements from `at` on.
    ///
    /// # Safety
    /// They are inside the tensor, and no other call writes them.
    #[inline(always)]
    unsafe fn part<S: Simd>(
        &self,
        at: usize,
        n: usize,
        parameters: [C::V<S>; P],
        constants: &F::Constants<S>,
    ) {
        // SAFETY: by the contract.
        unsafe {
            let x = load_part::<S, T, C>(self.input.add(at), n);
            let y = F::value(x, parameters, constants);
            store_part::<S, T, C>(self.output.add(at), n, y);
        }
    }

    /// Elements that share an encoding. Each block is read before it is written, so `output` may be
    /// `input`.
    ///
    /// # Safety
    /// The stretch is inside the tensor, and no other call writes it.
    #[inline(always)]
    unsafe fn stretch<S: Simd, const STREAM: bool>(
        &self,
        start: usize,
        len: usize,
        group: usize,
        constants: &F::Constants<S>,
    ) {
        let parameters = shared::<S, C, P>(self.parameters, group);
        let (mut at, end) = (start, start + len);
        // SAFETY: all blocks and parts are inside the stretch; after the head, streamed ones are aligned.
        unsafe {
            if STREAM {
                let head = before_stream(self.output.add(at)).min(len);
                if head > 0 {
                    self.part::<S>(at, head, parameters, constants);
                    at += head;
                }
            }
            while at + LANES <= end {
                let x = load::<S, T, C>(self.input.add(at));
                let y = F::value(x, parameters, constants);
                store::<S, T, C, STREAM>(self.output.add(at), y);
                at += LANES;
            }
            if at < end {
                self.part::<S>(at, end - at, parameters, constants);
            }
        }
    }

    /// Elements with an encoding each: `parameters` are theirs.
    ///
    /// # Safety
    /// As for `stretch`.
    #[inline(always)]
    unsafe fn row<S: Simd, const STREAM: bool>(
        &self,
        start: usize,
        parameters: Parameters<'_, C, P>,
        constants: &F::Constants<S>,
    ) {
        let len = parameters[0].len();
        for parameter in parameters {
            assert_eq!(parameter.len(), len);
        }
        let part = |i: usize, n: usize| {
            let mut lanes = [<C::V<S>>::splat(C::ZERO); P];
            for (lanes, parameter) in lanes.iter_mut().zip(parameters) {
                // SAFETY: called with `i + n <= len` and `n <= 16`.
                *lanes = unsafe { load_part::<S, C, C>(parameter.as_ptr().add(i), n) };
            }
            // SAFETY: as many elements from `start + i` are inside the stretch.
            unsafe { self.part::<S>(start + i, n, lanes, constants) };
        };
        let mut i = 0;
        // SAFETY: `n` elements from `start + i` are inside the stretch wherever `i + n <= len`, and as many
        // encodings from `i`; after the head, streamed blocks are aligned.
        unsafe {
            if STREAM {
                i = before_stream(self.output.add(start)).min(len);
                if i > 0 {
                    part(0, i);
                }
            }
            while i + LANES <= len {
                let mut lanes = [<C::V<S>>::splat(C::ZERO); P];
                for (lanes, parameter) in lanes.iter_mut().zip(parameters) {
                    *lanes = load::<S, C, C>(parameter.as_ptr().add(i));
                }
                let x = load::<S, T, C>(self.input.add(start + i));
                let y = F::value(x, lanes, constants);
                store::<S, T, C, STREAM>(self.output.add(start + i), y);
                i += LANES;
            }
            if i < len {
                part(i, len - i);
            }
        }
    }

    #[inline(always)]
    fn walk<S: Simd, const STREAM: bool>(&self) {
        let geometry = self.geometry;
        let inner = geometry.inner();
        let constants = &self.function.constants::<S>();
        if inner.group_stride == 0 && (inner.size >= LANES || geometry.is_uniform()) {
            for p in Pieces::new(geometry, self.begin, self.end) {
                let (mut start, mut group) = (p.start, p.group);
                for _ in 0..p.count {
                    // SAFETY: pieces lie inside `begin..end`, which is this call's alone.
                    unsafe { self.stretch::<S, STREAM>(start, p.len, group, constants) };
                    start += p.len;
                    group += p.group_step;
                }
            }
        } else if inner.group_stride == 1 && inner.size >= LANES {
            for p in Pieces::new(geometry, self.begin, self.end) {
                for r in 0..p.count {
                    let first = p.group + r * p.group_step;
                    let mut parameters = self.parameters;
                    for parameter in &mut parameters {
                        *parameter = &parameter[first..first + p.len];
                    }
                    // SAFETY: as above.
                    unsafe { self.row::<S, STREAM>(p.start + r * p.len, parameters, constants) };
                }
            }
        } else {
            let mut groups = [0_usize; TILE];
            let mut gathered = [[C::ZERO; TILE]; P];
            let mut begin = self.begin;
            while begin < self.end {
                let end = (begin + TILE).min(self.end);
                let n = end - begin;
                fill_groups(geometry, begin, end, &mut groups);
                let mut parameters = self.parameters;
                for (parameter, gathered) in parameters.iter_mut().zip(&mut gathered) {
                    for (slot, &group) in gathered.iter_mut().zip(&groups[..n]) {
                        *slot = parameter[group];
                    }
                    *parameter = &gathered[..n];
                }
                // SAFETY: as above.
                unsafe { self.row::<S, false>(begin, parameters, constants) };
                begin = end;
            }
        }
        if STREAM {
            S::fence();
        }
    }
}

impl<F: Function<C, P>, T: Element<C>, C: Compute, const P: usize> Body
    for Forward<'_, F, T, C, P>
{
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        if self.stream {
            self.walk::<S, true>();
        } else {
            self.walk::<S, false>();
        }
    }
}

/// Applies `function` to every element. `output` may be `input`.
///
/// # Safety
/// `input` is valid for reads and `output` for writes of `geometry.numel()` elements;
/// they are the same place or do not overlap.
///
/// # Panics
/// If a parameter has not `geometry.num_groups()` elements.
pub unsafe fn forward<F: Function<C, P>, T: Element<C>, C: Compute, const P: usize>(
    geometry: &BlockGeometry,
    function: F,
    parameters: Parameters<'_, C, P>,
    input: *const T,
    output: *mut T,
) {
    assert_lengths(geometry, parameters);
    // In place, the lines are in the cache already.
    let stream = !std::ptr::eq(input, output) && streams(output, geometry, 2);
    let (input, output) = (Shared(input.cast_mut()), Shared(output));
    for_each_range(geometry.numel(), GRAIN, |range| {
        let (input, output) = (&input, &output);
        dispatch(Forward {
            geometry,
            function,
            parameters,
            input: input.0,
            output: output.0,
            begin: range.start,
            end: range.end,
            stream,
        });
    });
}

/// `N`: how many parameters' gradients are wanted, the first ones.
struct Backward<'a, F, T, C, const P: usize, const N: usize> {
    function: F,
    parameters: Parameters<'a, C, P>,
    grad: *const T,
    input: *const T,
    /// Null if the gradient of the input is not wanted.
    grad_input: *mut T,
    stream: bool,
}

// SAFETY: `grad` and `input` are only read; `grad_input` is written in disjoint stretches.
unsafe impl<F: Sync, T: Sync, C: Sync, const P: usize, const N: usize> Sync
    for Backward<'_, F, T, C, P, N>
{
}

/// Elements whose float32 sums are kept in the lanes before they are added up in float64.
const LANE_SUM: usize = 4096;

/// The first `N` of `P`.
#[inline(always)]
fn first<V: Copy, const P: usize, const N: usize>(all: [V; P]) -> [V; N] {
    std::array::from_fn(
        #[inline(always)]
        |k| all[k],
    )
}

impl<F: Function<C, P>, T: Element<C>, C: Compute, const P: usize, const N: usize>
    Backward<'_, F, T, C, P, N>
{
    /// Gradients of the parameters of sixteen elements; writes those of the input if `INPUT`.
    ///
    /// # Safety
    /// Sixteen elements from `at` are inside this call's stretch, aligned for streaming if `STREAM`.
    #[inline(always)]
    unsafe fn block<S: Simd, const INPUT: bool, const STREAM: bool>(
        &self,
        at: usize,
        parameters: [C::V<S>; P],
        constants: &F::Constants<S>,
    ) -> [C::V<S>; N] {
        // SAFETY: by the contract.
        unsafe {
            let g = load::<S, T, C>(self.grad.add(at));
            let x = load::<S, T, C>(self.input.add(at));
            let (input, terms) = F::gradient(g, x, parameters, constants);
            if INPUT {
                store::<S, T, C, STREAM>(self.grad_input.add(at), input);
            }
            first(terms)
        }
    }

    /// As `block`, of the first `n` of sixteen elements; the other lanes are zero.
    ///
    /// # Safety
    /// `n <= 16` elements from `at` are inside this call's stretch.
    #[inline(always)]
    unsafe fn part<S: Simd>(
        &self,
        at: usize,
        n: usize,
        parameters: [C::V<S>; P],
        constants: &F::Constants<S>,
    ) -> [C::V<S>; N] {
        // SAFETY: by the contract.
        let mut terms: [C::V<S>; N] = unsafe {
            let g = load_part::<S, T, C>(self.grad.add(at), n);
            let x = load_part::<S, T, C>(self.input.add(at), n);
            let (input, terms) = F::gradient(g, x, parameters, constants);
            if !self.grad_input.is_null() {
                store_part::<S, T, C>(self.grad_input.add(at), n, input);
            }
            first(terms)
        };
        for terms in &mut terms {
            let mut values = terms.to_array();
            // Zeros divided by a scale of zero are not zero.
            values[n..].fill(C::ZERO);
            *terms = Vector::from_array(values);
        }
        terms
    }

    /// The lanes' sums of a run of whole blocks; writes the gradient of the input.
    ///
    /// # Safety
    /// As for `Reduction::run`; aligned for streaming if `STREAM`.
    #[inline(always)]
    unsafe fn lanes<S: Simd, const STREAM: bool>(
        &self,
        start: usize,
        len: usize,
        group: usize,
        constants: &F::Constants<S>,
    ) -> [C::V<S>; N] {
        let parameters = shared::<S, C, P>(self.parameters, group);
        let mut sums = [<C::V<S>>::splat(C::ZERO); N];
        for at in (start..start + len).step_by(LANES) {
            // SAFETY: the run is made of whole blocks.
            let terms = unsafe { self.block::<S, true, STREAM>(at, parameters, constants) };
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum = sum.add(term);
            }
        }
        sums
    }

    /// The runs of a piece, each of whole blocks, few enough for one sum a lane. Many short runs are what
    /// small blocks come down to: one by one, adding up their lanes took a third of the time.
    ///
    /// # Safety
    /// As for `Reduction::runs`; aligned for streaming if `STREAM`.
    #[inline(always)]
    unsafe fn short_runs<S: Simd, const STREAM: bool>(
        &self,
        piece: Piece,
        constants: &F::Constants<S>,
        places: *mut [f64; N],
        step: usize,
    ) {
        let (mut start, mut group) = (piece.start, piece.group);
        let mut first = 0;
        while first < piece.count {
            let count = (piece.count - first).min(8);
            let mut lanes = [[<C::V<S>>::splat(C::ZERO); 8]; N];
            for r in 0..count {
                // SAFETY: by the contract.
                let run = unsafe { self.lanes::<S, STREAM>(start, piece.len, group, constants) };
                for (lanes, run) in lanes.iter_mut().zip(run) {
                    lanes[r] = run;
                }
                start += piece.len;
                group += piece.group_step;
            }
            let mut totals = [[0.0; N]; 8];
            for (k, lanes) in lanes.into_iter().enumerate() {
                for (total, sum) in totals.iter_mut().zip(<C::V<S>>::sums(lanes)) {
                    total[k] = sum;
                }
            }
            for (r, total) in totals.into_iter().enumerate().take(count) {
                // SAFETY: by the contract.
                unsafe { places.add((first + r) * step).write(total) };
            }
            first += count;
        }
    }

    /// # Safety
    /// As for `Reduction::run`.
    #[inline(always)]
    unsafe fn sum<S: Simd, const INPUT: bool, const STREAM: bool>(
        &self,
        start: usize,
        len: usize,
        group: usize,
        constants: &F::Constants<S>,
    ) -> [f64; N] {
        let parameters = shared::<S, C, P>(self.parameters, group);
        let mut total = [0.0; N];
        let (mut at, end) = (start, start + len);
        while at < end {
            let stop = end.min(at + LANE_SUM);
            let mut sums = [<C::V<S>>::splat(C::ZERO); N];
            // SAFETY: all blocks and parts are inside the run; streamed ones are aligned.
            unsafe {
                while at + LANES <= stop {
                    let terms = self.block::<S, INPUT, STREAM>(at, parameters, constants);
                    for (sum, term) in sums.iter_mut().zip(terms) {
                        *sum = sum.add(term);
                    }
                    at += LANES;
                }
                if at < stop {
                    let terms = self.part::<S>(at, stop - at, parameters, constants);
                    for (sum, term) in sums.iter_mut().zip(terms) {
                        *sum = sum.add(term);
                    }
                    at = stop;
                }
            }
            for (total, sum) in total.iter_mut().zip(sums) {
                *total += sum.sum();
            }
        }
        total
    }
}

impl<F: Function<C, P>, T: Element<C>, C: Compute, const P: usize, const N: usize> Reduction
    for Backward<'_, F, T, C, P, N>
{
    type Partial = [f64; N];
    type Constants<S: Simd> = F::Constants<S>;

    #[inline(always)]
    fn constants<S: Simd>(&self) -> F::Constants<S> {
        self.function.constants::<S>()
    }

    fn identity(&self) -> [f64; N] {
        [0.0; N]
    }

    #[inline(always)]
    fn combine(into: &mut [f64; N], from: [f64; N]) {
        for (into, from) in into.iter_mut().zip(from) {
            *into += from;
        }
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(
        &self,
        start: usize,
        len: usize,
        group: usize,
        constants: &F::Constants<S>,
    ) -> [f64; N] {
        // SAFETY: handed on. A run that is not aligned for streaming (sums always begin with whole
        // blocks, so that their order does not depend on the address) is written through the cache.
        unsafe {
            if self.grad_input.is_null() {
                self.sum::<S, false, false>(start, len, group, constants)
            } else if self.stream && before_stream(self.grad_input.add(start)) == 0 {
                self.sum::<S, true, true>(start, len, group, constants)
            } else {
                self.sum::<S, true, false>(start, len, group, constants)
            }
        }
    }

    #[inline(always)]
    unsafe fn runs<S: Simd>(
        &self,
        piece: Piece,
        constants: &F::Constants<S>,
        places: *mut [f64; N],
        step: usize,
    ) {
        // SAFETY: handed on. All runs of whole blocks are aligned if the first is.
        unsafe {
            let blocks = piece.len.is_multiple_of(LANES) && piece.len <= LANE_SUM;
            // Without a gradient of the input it is not worth the code.
            if !blocks || self.grad_input.is_null() {
                each_run::<S, Self>(self, piece, constants, places, step);
            } else if self.stream && before_stream(self.grad_input.add(piece.start)) == 0 {
                self.short_runs::<S, true>(piece, constants, places, step);
            } else {
                self.short_runs::<S, false>(piece, constants, places, step);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(
        &self,
        start: usize,
        groups: &[usize],
        partials: &mut [[f64; N]],
        constants: &F::Constants<S>,
    ) {
        let mut i = 0;
        while i < groups.len() {
            let n = LANES.min(groups.len() - i);
            let groups = &groups[i..i + n];
            let first = groups[0];
            let mut neighbours = n == LANES;
            if neighbours {
                for (j, &group) in groups.iter().enumerate() {
                    neighbours &= group == first + j;
                }
            }
            let mut parameters = [<C::V<S>>::splat(C::ZERO); P];
            for (lanes, parameter) in parameters.iter_mut().zip(self.parameters) {
                let mut values = [C::ZERO; LANES];
                if neighbours {
                    values.copy_from_slice(&parameter[first..first + LANES]);
                } else {
                    for (value, &group) in values.iter_mut().zip(groups) {
                        *value = parameter[group];
                    }
                }
                *lanes = Vector::from_array(values);
            }
            // SAFETY: the tile is inside the tensor.
            let terms = unsafe {
                if n < LANES {
                    self.part::<S>(start + i, n, parameters, constants)
                } else if self.grad_input.is_null() {
                    self.block::<S, false, false>(start + i, parameters, constants)
                } else {
                    self.block::<S, true, false>(start + i, parameters, constants)
                }
            };
            let mut values = [[C::ZERO; LANES]; N];
            for (values, terms) in values.iter_mut().zip(terms) {
                *values = terms.to_array();
            }
            let add = |partial: &mut [f64; N], j: usize| {
                for (sum, values) in partial.iter_mut().zip(&values) {
                    *sum += values[j].to_f64();
                }
            };
            if neighbours {
                for (j, partial) in partials[first..first + LANES].iter_mut().enumerate() {
                    add(partial, j);
                }
            } else {
                for (j, &group) in groups.iter().enumerate() {
                    add(&mut partials[group], j);
                }
            }
            i += n;
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self) {
        if self.stream {
            S::fence();
        }
    }
}

/// The gradients of `function`: writes that of the input (unless `grad_input` is null) and returns those of
/// the first `N` parameters, per encoding, summed in float32 over at most 256 elements a lane and in
/// float64 beyond.
///
/// # Safety
/// `grad` and `input` are valid for reads, `grad_input` (if not null) for writes of
/// `geometry.numel()` elements in the same memory order, and it overlaps neither.
///
/// # Panics
/// If a parameter has not `geometry.num_groups()` elements.
pub unsafe fn backward<
    F: Function<C, P>,
    T: Element<C>,
    C: Compute,
    const P: usize,
    const N: usize,
>(
    geometry: &BlockGeometry,
    function: F,
    parameters: Parameters<'_, C, P>,
    grad: *const T,
    input: *const T,
    grad_input: *mut T,
) -> Vec<[f64; N]> {
    assert_lengths(geometry, parameters);
    reduce(
        geometry,
        &Backward::<F, T, C, P, N> {
            function,
            parameters,
            grad,
            input,
            grad_input,
            stream: !grad_input.is_null() && streams(grad_input, geometry, 3),
        },
    )
}

/// Encodings below which no second thread is worth waking to write their sums.
const SUMS_GRAIN: usize = 16_384;

/// Writes each parameter's sums to its place; null: not wanted. Places beyond the sums are left alone.
///
/// # Safety
/// The places are null or valid for writes of `sums.len()` elements.
pub unsafe fn write_sums<C: Compute, const N: usize>(sums: &[[f64; N]], places: &[*mut C]) {
    for (k, &place) in places.iter().enumerate().take(N) {
        if place.is_null() {
            continue;
        }
        let place = Shared(place);
        for_each_range(sums.len(), SUMS_GRAIN, |range| {
            let place = &place;
            for i in range {
                // SAFETY: by the contract; each thread has its own.
                unsafe { place.0.add(i).write(C::from_f64(sums[i][k])) };
            }
        });
    }
}
