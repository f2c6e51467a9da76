//! Affine quantize, dequantize and quantize-dequantize, forward and backward, one pass each.
//!
//! The formulas are those of `docs/numerics.md`. Division stays division: at the speed of memory it
//! costs nothing, and a reciprocal puts some elements into another bin.

use super::element::{
    before_stream, load, load_part, store, store_part, streams, Compute, Element, LANES,
};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, Shared, GRAIN};
use super::reduce::{fill_groups, reduce, Reduction, TILE};
use super::vector::Vector;
use super::walk::Pieces;
use crate::encoding::{AffineGrid, BlockGeometry};
use std::marker::PhantomData;

/// The grid's limits in the kernel's precision.
#[derive(Clone, Copy)]
pub struct Limits<C> {
    qmin: C,
    qmax: C,
    shift: C,
}

impl<C: Compute> Limits<C> {
    fn new(grid: &AffineGrid) -> Self {
        Self {
            qmin: C::from_f64(grid.qmin() as f64),
            qmax: C::from_f64(grid.qmax() as f64),
            shift: C::from_f64(grid.zero_point_shift()),
        }
    }
}

/// Sixteen lanes and what they are quantized with.
#[derive(Clone, Copy)]
pub struct Lanes<S: Simd, C: Compute> {
    scale: C::V<S>,
    offset: C::V<S>,
    qmin: C::V<S>,
    qmax: C::V<S>,
    shift: C::V<S>,
}

impl<S: Simd, C: Compute> Lanes<S, C> {
    #[inline(always)]
    fn new(scale: C::V<S>, offset: C::V<S>, limits: &Limits<C>) -> Self {
        Self {
            scale,
            offset,
            qmin: Vector::splat(limits.qmin),
            qmax: Vector::splat(limits.qmax),
            shift: Vector::splat(limits.shift),
        }
    }

    /// All lanes share an encoding.
    #[inline(always)]
    fn splat(scale: C, offset: C, limits: &Limits<C>) -> Self {
        Self::new(Vector::splat(scale), Vector::splat(offset), limits)
    }
}

/// One of the affine functions: its value, and its straight-through gradients.
pub trait AffineOp: Copy + Send + Sync + 'static {
    /// The value at `x`.
    fn value<S: Simd, C: Compute>(x: C::V<S>, l: &Lanes<S, C>) -> C::V<S>;
    /// The gradients of `x`, scale and offset for the incoming gradient `g`.
    fn gradient<S: Simd, C: Compute>(g: C::V<S>, x: C::V<S>, l: &Lanes<S, C>) -> Gradient<C::V<S>>;
}

/// Gradients of sixteen elements to input, scale and offset.
pub struct Gradient<V> {
    input: V,
    scale: V,
    offset: V,
}

/// `clamp(round(x / scale) - offset, qmin, qmax)`.
#[derive(Clone, Copy)]
pub struct Quantize;
/// `(x + offset) * scale`.
#[derive(Clone, Copy)]
pub struct Dequantize;
/// `(clamp(round(x / scale - shift) - offset, qmin, qmax) + offset + shift) * scale`.
#[derive(Clone, Copy)]
pub struct QuantizeDequantize;

/// Where `qmin <= q <= qmax`.
#[inline(always)]
fn inside<S: Simd, C: Compute>(q: C::V<S>, l: &Lanes<S, C>) -> <C::V<S> as Vector<C>>::Mask {
    <C::V<S>>::and(l.qmin.le(q), q.le(l.qmax))
}

impl AffineOp for Quantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C::V<S>, l: &Lanes<S, C>) -> C::V<S> {
        x.div(l.scale).round().sub(l.offset).limit(l.qmin, l.qmax)
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(g: C::V<S>, x: C::V<S>, l: &Lanes<S, C>) -> Gradient<C::V<S>> {
        let zero = <C::V<S>>::splat(C::ZERO);
        let t = x.div(l.scale);
        let inside = inside::<S, C>(t.round().sub(l.offset), l);
        let g = <C::V<S>>::select(inside, g, zero);
        let input = g.div(l.scale);
        // Outside the grid the terms are exact zeros, not 0 * inf.
        let scale = <C::V<S>>::select(inside, zero.sub(input.mul(t)), zero);
        Gradient {
            input,
            scale,
            offset: zero.sub(g),
        }
    }
}

impl AffineOp for Dequantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C::V<S>, l: &Lanes<S, C>) -> C::V<S> {
        x.add(l.offset).mul(l.scale)
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(g: C::V<S>, x: C::V<S>, l: &Lanes<S, C>) -> Gradient<C::V<S>> {
        let input = g.mul(l.scale);
        Gradient {
            input,
            scale: g.mul(x.add(l.offset)),
            offset: input,
        }
    }
}

impl AffineOp for QuantizeDequantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C::V<S>, l: &Lanes<S, C>) -> C::V<S> {
        let rounded = x.div(l.scale).sub(l.shift).round();
        let q = rounded.sub(l.offset).limit(l.qmin, l.qmax);
        q.add(l.offset.add(l.shift)).mul(l.scale)
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(g: C::V<S>, x: C::V<S>, l: &Lanes<S, C>) -> Gradient<C::V<S>> {
        let zero = <C::V<S>>::splat(C::ZERO);
        let t = x.div(l.scale).sub(l.shift);
        let rounded = t.round();
        let inside = inside::<S, C>(rounded.sub(l.offset), l);
        let clamped = rounded.limit(l.qmin.add(l.offset), l.qmax.add(l.offset));
        let slope = <C::V<S>>::select(inside, rounded.sub(t), clamped);
        Gradient {
            input: <C::V<S>>::select(inside, g, zero),
            scale: g.mul(slope),
            offset: <C::V<S>>::select(inside, zero, g.mul(l.scale)),
        }
    }
}

/// The encodings, one element per group.
#[derive(Clone, Copy)]
pub struct Encodings<'a, C> {
    /// Scales.
    pub scale: &'a [C],
    /// Offsets.
    pub offset: &'a [C],
}

struct Forward<'a, O, T, C> {
    geometry: &'a BlockGeometry,
    encodings: Encodings<'a, C>,
    limits: Limits<C>,
    input: *const T,
    output: *mut T,
    begin: usize,
    end: usize,
    stream: bool,
    op: PhantomData<O>,
}

impl<O: AffineOp, T: Element<C>, C: Compute> Forward<'_, O, T, C> {
    /// The `n < 16` elements from `at` on.
    ///
    /// # Safety
    /// They are inside the tensor, and no other call writes them.
    #[inline(always)]
    unsafe fn part<S: Simd>(&self, at: usize, n: usize, lanes: &Lanes<S, C>) {
        // SAFETY: by the contract.
        unsafe {
            let x = load_part::<S, T, C>(self.input.add(at), n);
            store_part::<S, T, C>(self.output.add(at), n, O::value(x, lanes));
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
        scale: C,
        offset: C,
    ) {
        let lanes = Lanes::<S, C>::splat(scale, offset, &self.limits);
        let (mut at, end) = (start, start + len);
        // SAFETY: all blocks and parts are inside the stretch; after the head, streamed ones are aligned.
        unsafe {
            if STREAM {
                let head = before_stream(self.output.add(at)).min(len);
                self.part::<S>(at, head, &lanes);
                at += head;
            }
            while at + LANES <= end {
                let x = load::<S, T, C>(self.input.add(at));
                store::<S, T, C, STREAM>(self.output.add(at), O::value(x, &lanes));
                at += LANES;
            }
            if at < end {
                self.part::<S>(at, end - at, &lanes);
            }
        }
    }

    /// Elements with an encoding each: `scale` and `offset` are theirs.
    ///
    /// # Safety
    /// As for `stretch`.
    #[inline(always)]
    unsafe fn row<S: Simd, const STREAM: bool>(&self, start: usize, scale: &[C], offset: &[C]) {
        let len = scale.len();
        assert_eq!(offset.len(), len);
        let (scale, offset) = (scale.as_ptr(), offset.as_ptr());
        let mut i = 0;
        // SAFETY: `n` elements from `start + i` are inside the stretch wherever `i + n <= len`, and as many
        // encodings from `i`; after the head, streamed blocks are aligned.
        unsafe {
            if STREAM {
                let head = before_stream(self.output.add(start)).min(len);
                let lanes = Lanes::new(
                    load_part::<S, C, C>(scale, head),
                    load_part::<S, C, C>(offset, head),
                    &self.limits,
                );
                self.part::<S>(start, head, &lanes);
                i = head;
            }
            while i + LANES <= len {
                let lanes = Lanes::new(
                    load::<S, C, C>(scale.add(i)),
                    load::<S, C, C>(offset.add(i)),
                    &self.limits,
                );
                let x = load::<S, T, C>(self.input.add(start + i));
                store::<S, T, C, STREAM>(self.output.add(start + i), O::value(x, &lanes));
                i += LANES;
            }
            if i < len {
                let n = len - i;
                let lanes = Lanes::new(
                    load_part::<S, C, C>(scale.add(i), n),
                    load_part::<S, C, C>(offset.add(i), n),
                    &self.limits,
                );
                self.part::<S>(start + i, n, &lanes);
            }
        }
    }

    #[inline(always)]
    fn walk<S: Simd, const STREAM: bool>(&self) {
        let Encodings { scale, offset } = self.encodings;
        let geometry = self.geometry;
        let inner = geometry.inner();
        if inner.group_stride == 0 && (inner.size >= LANES || geometry.is_uniform()) {
            for p in Pieces::new(geometry, self.begin, self.end) {
                let (mut start, mut group) = (p.start, p.group);
                for _ in 0..p.count {
                    // SAFETY: pieces lie inside `begin..end`, which is this call's alone.
                    unsafe { self.stretch::<S, STREAM>(start, p.len, scale[group], offset[group]) };
                    start += p.len;
                    group += p.group_step;
                }
            }
        } else if inner.group_stride == 1 && inner.size >= LANES {
            for p in Pieces::new(geometry, self.begin, self.end) {
                for r in 0..p.count {
                    let first = p.group + r * p.group_step;
                    let (s, o) = (&scale[first..first + p.len], &offset[first..first + p.len]);
                    // SAFETY: as above.
                    unsafe { self.row::<S, STREAM>(p.start + r * p.len, s, o) };
                }
            }
        } else {
            let mut groups = [0_usize; TILE];
            let (mut s, mut o) = ([C::ZERO; TILE], [C::ZERO; TILE]);
            let mut begin = self.begin;
            while begin < self.end {
                let end = (begin + TILE).min(self.end);
                let n = end - begin;
                fill_groups(geometry, begin, end, &mut groups);
                for (i, &group) in groups[..n].iter().enumerate() {
                    s[i] = scale[group];
                    o[i] = offset[group];
                }
                // SAFETY: as above.
                unsafe { self.row::<S, false>(begin, &s[..n], &o[..n]) };
                begin = end;
            }
        }
        if STREAM {
            S::fence();
        }
    }
}

impl<O: AffineOp, T: Element<C>, C: Compute> Body for Forward<'_, O, T, C> {
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

/// Applies `O` to every element. `output` may be `input`.
///
/// # Safety
/// `input` is valid for reads and `output` for writes of `geometry.numel()` elements;
/// they are the same place or do not overlap. `encodings` has `geometry.num_groups()` elements.
pub unsafe fn forward<O: AffineOp, T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    input: *const T,
    output: *mut T,
) {
    assert_eq!(encodings.scale.len(), geometry.num_groups());
    assert_eq!(encodings.offset.len(), geometry.num_groups());
    let limits = Limits::new(grid);
    // In place, the lines are in the cache already.
    let stream = !std::ptr::eq(input, output) && streams(output, geometry);
    let (input, output) = (Shared(input.cast_mut()), Shared(output));
    for_each_range(geometry.numel(), GRAIN, |range| {
        let (input, output) = (&input, &output);
        dispatch(Forward::<O, T, C> {
            geometry,
            encodings,
            limits,
            input: input.0,
            output: output.0,
            begin: range.start,
            end: range.end,
            stream,
            op: PhantomData,
        });
    });
}

struct Backward<'a, O, T, C> {
    encodings: Encodings<'a, C>,
    limits: Limits<C>,
    grad: *const T,
    input: *const T,
    /// Null if the gradient of the input is not wanted.
    grad_input: *mut T,
    stream: bool,
    op: PhantomData<O>,
}

// SAFETY: `grad` and `input` are only read; `grad_input` is written in disjoint stretches.
unsafe impl<O: Sync, T: Sync, C: Sync> Sync for Backward<'_, O, T, C> {}

/// The lanes' sum in float64, by halves: one after the other, sixteen additions would wait for each other,
/// which took half of the time where encodings change every few blocks.
#[inline(always)]
fn lanes_sum<C: Compute>(lanes: &[C; LANES]) -> f64 {
    let mut sums = [0.0; LANES];
    for (sum, lane) in sums.iter_mut().zip(lanes) {
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

/// Elements whose float32 sums are kept in the lanes before they are added up in float64.
const LANE_SUM: usize = 4096;

impl<O: AffineOp, T: Element<C>, C: Compute> Backward<'_, O, T, C> {
    /// Gradients of scale and offset of sixteen elements; writes those of the input if `INPUT`.
    ///
    /// # Safety
    /// Sixteen elements from `at` are inside this call's stretch, aligned for streaming if `STREAM`.
    #[inline(always)]
    unsafe fn block<S: Simd, const INPUT: bool, const STREAM: bool>(
        &self,
        at: usize,
        lanes: &Lanes<S, C>,
    ) -> (C::V<S>, C::V<S>) {
        // SAFETY: by the contract.
        unsafe {
            let g = load::<S, T, C>(self.grad.add(at));
            let x = load::<S, T, C>(self.input.add(at));
            let gradient = O::gradient(g, x, lanes);
            if INPUT {
                store::<S, T, C, STREAM>(self.grad_input.add(at), gradient.input);
            }
            (gradient.scale, gradient.offset)
        }
    }

    /// As `block`, of the first `n` of sixteen elements; the other lanes are zero: `x` and `g` read as
    /// zero there.
    ///
    /// # Safety
    /// `n <= 16` elements from `at` are inside this call's stretch.
    #[inline(always)]
    unsafe fn part<S: Simd>(
        &self,
        at: usize,
        n: usize,
        lanes: &Lanes<S, C>,
    ) -> ([C; LANES], [C; LANES]) {
        // SAFETY: by the contract.
        unsafe {
            let g = load_part::<S, T, C>(self.grad.add(at), n);
            let x = load_part::<S, T, C>(self.input.add(at), n);
            let gradient = O::gradient(g, x, lanes);
            if !self.grad_input.is_null() {
                store_part::<S, T, C>(self.grad_input.add(at), n, gradient.input);
            }
            (gradient.scale.to_array(), gradient.offset.to_array())
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
    ) -> (f64, f64) {
        let lanes = Lanes::<S, C>::splat(
            self.encodings.scale[group],
            self.encodings.offset[group],
            &self.limits,
        );
        let mut total = (0.0, 0.0);
        let (mut at, end) = (start, start + len);
        while at < end {
            let stop = end.min(at + LANE_SUM);
            let mut scale = <C::V<S>>::splat(C::ZERO);
            let mut offset = <C::V<S>>::splat(C::ZERO);
            let mut rest = ([C::ZERO; LANES], [C::ZERO; LANES]);
            let mut left = 0;
            // SAFETY: all blocks and parts are inside the run; streamed ones are aligned.
            unsafe {
                while at + LANES <= stop {
                    let (gs, go) = self.block::<S, INPUT, STREAM>(at, &lanes);
                    scale = scale.add(gs);
                    offset = offset.add(go);
                    at += LANES;
                }
                if at < stop {
                    left = stop - at;
                    rest = self.part::<S>(at, left, &lanes);
                    at = stop;
                }
            }
            let (mut scale, mut offset) = (scale.to_array(), offset.to_array());
            for j in 0..left {
                scale[j] = scale[j] + rest.0[j];
                offset[j] = offset[j] + rest.1[j];
            }
            total.0 += lanes_sum(&scale);
            total.1 += lanes_sum(&offset);
        }
        total
    }
}

impl<O: AffineOp, T: Element<C>, C: Compute> Reduction for Backward<'_, O, T, C> {
    type Partial = (f64, f64);

    fn identity(&self) -> (f64, f64) {
        (0.0, 0.0)
    }

    #[inline(always)]
    fn combine(into: &mut (f64, f64), from: (f64, f64)) {
        into.0 += from.0;
        into.1 += from.1;
    }

    #[inline(always)]
    unsafe fn run<S: Simd>(&self, start: usize, len: usize, group: usize) -> (f64, f64) {
        // SAFETY: handed on. A run that is not aligned for streaming (sums always begin with whole
        // blocks, so that their order does not depend on the address) is written through the cache.
        unsafe {
            if self.grad_input.is_null() {
                self.sum::<S, false, false>(start, len, group)
            } else if self.stream && before_stream(self.grad_input.add(start)) == 0 {
                self.sum::<S, true, true>(start, len, group)
            } else {
                self.sum::<S, true, false>(start, len, group)
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, start: usize, groups: &[usize], partials: &mut [(f64, f64)]) {
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
            let mut scale = [C::from_f64(1.0); LANES];
            let mut offset = [C::ZERO; LANES];
            if neighbours {
                scale.copy_from_slice(&self.encodings.scale[first..first + LANES]);
                offset.copy_from_slice(&self.encodings.offset[first..first + LANES]);
            } else {
                for (j, &group) in groups.iter().enumerate() {
                    scale[j] = self.encodings.scale[group];
                    offset[j] = self.encodings.offset[group];
                }
            }
            let lanes = Lanes::<S, C>::new(
                Vector::from_array(scale),
                Vector::from_array(offset),
                &self.limits,
            );
            // SAFETY: the tile is inside the tensor.
            let (gs, go) = unsafe {
                if n < LANES {
                    self.part::<S>(start + i, n, &lanes)
                } else {
                    let (gs, go) = if self.grad_input.is_null() {
                        self.block::<S, false, false>(start + i, &lanes)
                    } else {
                        self.block::<S, true, false>(start + i, &lanes)
                    };
                    (gs.to_array(), go.to_array())
                }
            };
            if neighbours {
                let partials = &mut partials[first..first + LANES];
                for (p, (s, o)) in partials.iter_mut().zip(gs.iter().zip(&go)) {
                    Self::combine(p, (s.to_f64(), o.to_f64()));
                }
            } else {
                for (j, &group) in groups.iter().enumerate() {
                    Self::combine(&mut partials[group], (gs[j].to_f64(), go[j].to_f64()));
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

/// The gradients of `O`: writes that of the input (unless `grad_input` is null) and returns those of
/// scale and offset, per encoding, summed in float32 over at most 256 elements a lane and in
/// float64 beyond.
///
/// # Safety
/// `grad` and `input` are valid for reads, `grad_input` (if not null) for writes of
/// `geometry.numel()` elements in the same memory order, and it overlaps neither.
/// `encodings` has `geometry.num_groups()` elements.
pub unsafe fn backward<O: AffineOp, T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    grad: *const T,
    input: *const T,
    grad_input: *mut T,
) -> Vec<(f64, f64)> {
    assert_eq!(encodings.scale.len(), geometry.num_groups());
    assert_eq!(encodings.offset.len(), geometry.num_groups());
    reduce(
        geometry,
        &Backward::<O, T, C> {
            encodings,
            limits: Limits::new(grid),
            grad,
            input,
            grad_input,
            stream: !grad_input.is_null() && streams(grad_input, geometry),
            op: PhantomData,
        },
    )
}
