//! Affine quantize, dequantize and quantize-dequantize, forward and backward, one pass each.
//!
//! The formulas are those of `docs/numerics.md`. Division stays division: at the speed of memory it
//! costs nothing, and a reciprocal puts some elements into another bin.

use super::element::{load, store, Compute, Element, LANES};
use super::isa::{dispatch, Body, Simd};
use super::parallel::{for_each_range, GRAIN};
use super::reduce::{fill_groups, reduce, Reduction, Shared, TILE};
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

/// One of the affine functions: its value, and its straight-through gradients.
pub trait AffineOp: Copy + Send + Sync + 'static {
    /// The value at `x`.
    fn value<S: Simd, C: Compute>(x: C, scale: C, offset: C, limits: &Limits<C>) -> C;
    /// The gradients of `x`, scale and offset for the incoming gradient `g`.
    fn gradient<S: Simd, C: Compute>(
        g: C,
        x: C,
        scale: C,
        offset: C,
        limits: &Limits<C>,
    ) -> (C, C, C);
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

impl AffineOp for Quantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C, scale: C, offset: C, limits: &Limits<C>) -> C {
        ((x / scale).round::<S>() - offset).limit(limits.qmin, limits.qmax)
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(
        g: C,
        x: C,
        scale: C,
        offset: C,
        limits: &Limits<C>,
    ) -> (C, C, C) {
        let t = x / scale;
        let q = t.round::<S>() - offset;
        let inside = (q >= limits.qmin) & (q <= limits.qmax);
        let g = if inside { g } else { C::ZERO };
        let gx = g / scale;
        // Outside the grid the terms are exact zeros, not 0 * inf.
        let gs = if inside { -(gx * t) } else { C::ZERO };
        (gx, gs, -g)
    }
}

impl AffineOp for Dequantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C, scale: C, offset: C, _: &Limits<C>) -> C {
        (x + offset) * scale
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(g: C, x: C, scale: C, offset: C, _: &Limits<C>) -> (C, C, C) {
        let gs = g * scale;
        (gs, g * (x + offset), gs)
    }
}

impl AffineOp for QuantizeDequantize {
    #[inline(always)]
    fn value<S: Simd, C: Compute>(x: C, scale: C, offset: C, limits: &Limits<C>) -> C {
        let q = ((x / scale - limits.shift).round::<S>() - offset).limit(limits.qmin, limits.qmax);
        (q + (offset + limits.shift)) * scale
    }
    #[inline(always)]
    fn gradient<S: Simd, C: Compute>(
        g: C,
        x: C,
        scale: C,
        offset: C,
        limits: &Limits<C>,
    ) -> (C, C, C) {
        let t = x / scale - limits.shift;
        let rounded = t.round::<S>();
        let q = rounded - offset;
        let inside = (q >= limits.qmin) & (q <= limits.qmax);
        let clamped = rounded.limit(limits.qmin + offset, limits.qmax + offset);
        let slope = if inside { rounded - t } else { clamped };
        let gx = if inside { g } else { C::ZERO };
        let go = if inside { C::ZERO } else { g * scale };
        (gx, g * slope, go)
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
    op: PhantomData<O>,
}

impl<O: AffineOp, T: Element<C>, C: Compute> Forward<'_, O, T, C> {
    /// # Safety
    /// The stretch is inside the tensor, and no other call writes it.
    #[inline(always)]
    unsafe fn stretch<S: Simd>(&self, start: usize, len: usize, scale: C, offset: C) {
        // Each block is read before it is written, so `output` may be `input`.
        let mut i = 0;
        while i < len {
            let n = LANES.min(len - i);
            // SAFETY: `n` elements from `start + i` are inside the stretch.
            unsafe {
                let x = load::<S, T, C>(self.input.add(start + i), n);
                let mut y = [C::ZERO; LANES];
                for j in 0..LANES {
                    y[j] = O::value::<S, C>(x[j], scale, offset, &self.limits);
                }
                store::<S, T, C>(self.output.add(start + i), n, &y);
            }
            i += LANES;
        }
    }

    /// # Safety
    /// As for `stretch`; `scale` and `offset` hold an element for each of the stretch, rounded up to whole
    /// blocks of lanes or exactly as many.
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, start: usize, scale: &[C], offset: &[C]) {
        let len = scale.len();
        let mut i = 0;
        while i < len {
            let n = LANES.min(len - i);
            // SAFETY: `n` elements from `start + i` are inside the stretch, `n` encodings from `i`.
            unsafe {
                let x = load::<S, T, C>(self.input.add(start + i), n);
                let mut s = [C::ZERO; LANES];
                let mut o = [C::ZERO; LANES];
                s[..n].copy_from_slice(&scale[i..i + n]);
                o[..n].copy_from_slice(&offset[i..i + n]);
                let mut y = [C::ZERO; LANES];
                for j in 0..LANES {
                    y[j] = O::value::<S, C>(x[j], s[j], o[j], &self.limits);
                }
                store::<S, T, C>(self.output.add(start + i), n, &y);
            }
            i += LANES;
        }
    }
}

impl<O: AffineOp, T: Element<C>, C: Compute> Body for Forward<'_, O, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Encodings { scale, offset } = self.encodings;
        let geometry = self.geometry;
        let inner = geometry.dims().last().copied().unwrap_or_default();
        if inner.group_stride == 0 && (inner.size >= LANES || geometry.is_uniform()) {
            for p in Pieces::new(geometry, self.begin, self.end) {
                // SAFETY: pieces lie inside `begin..end`, which is this call's alone.
                unsafe { self.stretch::<S>(p.start, p.len, scale[p.group], offset[p.group]) };
            }
        } else if inner.group_stride == 1 && inner.size >= LANES {
            for p in Pieces::new(geometry, self.begin, self.end) {
                let groups = p.group..p.group + p.len;
                // SAFETY: as above.
                unsafe { self.row::<S>(p.start, &scale[groups.clone()], &offset[groups]) };
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
                unsafe { self.row::<S>(begin, &s[..n], &o[..n]) };
                begin = end;
            }
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
    op: PhantomData<O>,
}

// SAFETY: `grad` and `input` are only read; `grad_input` is written in disjoint stretches.
unsafe impl<O: Sync, T: Sync, C: Sync> Sync for Backward<'_, O, T, C> {}

/// Elements whose float32 sums are kept in the lanes before they are added up in float64.
const LANE_SUM: usize = 4096;

impl<O: AffineOp, T: Element<C>, C: Compute> Backward<'_, O, T, C> {
    /// Gradients of sixteen (or the last `n`) elements; lanes beyond `n` are zero.
    ///
    /// # Safety
    /// `n.min(16)` elements from `at` are inside this call's stretch.
    #[inline(always)]
    unsafe fn block<S: Simd>(
        &self,
        at: usize,
        n: usize,
        scale: &[C; LANES],
        offset: &[C; LANES],
    ) -> ([C; LANES], [C; LANES]) {
        // SAFETY: by the contract; lanes beyond `n` read as zero, and a zero incoming gradient over a
        // zero input gives zeros for any scale that is not zero.
        unsafe {
            let g = load::<S, T, C>(self.grad.add(at), n);
            let x = load::<S, T, C>(self.input.add(at), n);
            let mut gx = [C::ZERO; LANES];
            let mut gs = [C::ZERO; LANES];
            let mut go = [C::ZERO; LANES];
            for j in 0..LANES {
                (gx[j], gs[j], go[j]) =
                    O::gradient::<S, C>(g[j], x[j], scale[j], offset[j], &self.limits);
            }
            if !self.grad_input.is_null() {
                store::<S, T, C>(self.grad_input.add(at), n, &gx);
            }
            (gs, go)
        }
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
        let scale = [self.encodings.scale[group]; LANES];
        let offset = [self.encodings.offset[group]; LANES];
        let (one_s, one_o) = (self.encodings.scale[group], self.encodings.offset[group]);
        let limits = self.limits;
        let mut total = (0.0, 0.0);
        let mut i = 0;
        while i < len {
            let end = len.min(i + LANE_SUM);
            let mut sum_s = [C::ZERO; LANES];
            let mut sum_o = [C::ZERO; LANES];
            while i + LANES <= end {
                // SAFETY: the block is inside the run.
                unsafe {
                    let g = load::<S, T, C>(self.grad.add(start + i), LANES);
                    let x = load::<S, T, C>(self.input.add(start + i), LANES);
                    let mut gx = [C::ZERO; LANES];
                    for j in 0..LANES {
                        let (a, b, c) = O::gradient::<S, C>(g[j], x[j], one_s, one_o, &limits);
                        gx[j] = a;
                        sum_s[j] = sum_s[j] + b;
                        sum_o[j] = sum_o[j] + c;
                    }
                    if !self.grad_input.is_null() {
                        store::<S, T, C>(self.grad_input.add(start + i), LANES, &gx);
                    }
                }
                i += LANES;
            }
            if i < end {
                // SAFETY: `end - i` elements are left.
                let (gs, go) = unsafe { self.block::<S>(start + i, end - i, &scale, &offset) };
                for j in 0..end - i {
                    sum_s[j] = sum_s[j] + gs[j];
                    sum_o[j] = sum_o[j] + go[j];
                }
                i = end;
            }
            for j in 0..LANES {
                total.0 += sum_s[j].to_f64();
                total.1 += sum_o[j].to_f64();
            }
        }
        total
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, start: usize, groups: &[usize], partials: &mut [(f64, f64)]) {
        let limits = self.limits;
        let mut i = 0;
        while i < groups.len() {
            let n = LANES.min(groups.len() - i);
            let mut scale = [C::from_f64(1.0); LANES];
            let mut offset = [C::ZERO; LANES];
            let first = groups[i];
            let mut contiguous = n == LANES;
            if contiguous {
                for j in 0..LANES {
                    contiguous &= groups[i + j] == first + j;
                }
            }
            if contiguous {
                scale.copy_from_slice(&self.encodings.scale[first..first + LANES]);
                offset.copy_from_slice(&self.encodings.offset[first..first + LANES]);
            } else {
                for (j, &group) in groups[i..i + n].iter().enumerate() {
                    scale[j] = self.encodings.scale[group];
                    offset[j] = self.encodings.offset[group];
                }
            }
            let (mut gx, mut gs, mut go) = ([C::ZERO; LANES], [C::ZERO; LANES], [C::ZERO; LANES]);
            // SAFETY: the tile is inside the tensor.
            unsafe {
                let g = load::<S, T, C>(self.grad.add(start + i), n);
                let x = load::<S, T, C>(self.input.add(start + i), n);
                for j in 0..LANES {
                    let (a, b, c) = O::gradient::<S, C>(g[j], x[j], scale[j], offset[j], &limits);
                    gx[j] = a;
                    gs[j] = b;
                    go[j] = c;
                }
                if !self.grad_input.is_null() {
                    store::<S, T, C>(self.grad_input.add(start + i), n, &gx);
                }
            }
            if contiguous {
                for (p, j) in partials[first..first + LANES].iter_mut().zip(0..LANES) {
                    p.0 += gs[j].to_f64();
                    p.1 += go[j].to_f64();
                }
            } else {
                for (j, &group) in groups[i..i + n].iter().enumerate() {
                    Self::combine(&mut partials[group], (gs[j].to_f64(), go[j].to_f64()));
                }
            }
            i += n;
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
            op: PhantomData,
        },
    )
}
