//! Affine quantize, dequantize and quantize-dequantize, forward and backward, one pass each.
//!
//! The formulas are those of `docs/numerics.md`. Division stays division: at the speed of memory it
//! costs nothing, and a reciprocal puts some elements into another bin.

use super::element::{Compute, Element};
use super::elementwise::{self, Function, Parameters};
use super::isa::Simd;
use super::vector::Vector;
use crate::encoding::{AffineGrid, BlockGeometry};
use std::marker::PhantomData;

/// The grid's limits in the kernel's precision: in one lane (`V = C`) or in sixteen.
#[derive(Clone, Copy)]
pub struct Limits<V> {
    qmin: V,
    qmax: V,
    shift: V,
}

impl<C: Compute> Limits<C> {
    /// Of a grid.
    pub fn new(grid: &AffineGrid) -> Self {
        Self {
            qmin: C::from_f64(grid.qmin() as f64),
            qmax: C::from_f64(grid.qmax() as f64),
            shift: C::from_f64(grid.zero_point_shift()),
        }
    }

    /// The same in each lane.
    #[inline(always)]
    pub fn splat<V: Vector<C>>(&self) -> Limits<V> {
        Limits {
            qmin: V::splat(self.qmin),
            qmax: V::splat(self.qmax),
            shift: V::splat(self.shift),
        }
    }
}

impl<V: Copy> Limits<V> {
    /// Where `q` is on the grid.
    #[inline(always)]
    fn inside<C>(&self, q: V) -> V::Mask
    where
        V: Vector<C>,
    {
        V::and(self.qmin.le(q), q.le(self.qmax))
    }
}

/// Gradients of sixteen elements to the input, and to scale and offset.
type Gradient<V> = (V, [V; 2]);

/// One of the affine functions of an element and its scale and offset: its value, and its straight-through
/// gradients.
pub trait AffineOp: Copy + Send + Sync + 'static {
    /// The value at `x`.
    fn value<C: Compute, V: Vector<C>>(x: V, encoding: [V; 2], limits: &Limits<V>) -> V;
    /// The gradients for the incoming gradient `g`.
    fn gradient<C: Compute, V: Vector<C>>(
        g: V,
        x: V,
        encoding: [V; 2],
        limits: &Limits<V>,
    ) -> Gradient<V>;
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
    fn value<C: Compute, V: Vector<C>>(x: V, [scale, offset]: [V; 2], l: &Limits<V>) -> V {
        x.div(scale).round().sub(offset).limit(l.qmin, l.qmax)
    }
    #[inline(always)]
    fn gradient<C: Compute, V: Vector<C>>(
        g: V,
        x: V,
        [scale, offset]: [V; 2],
        limits: &Limits<V>,
    ) -> Gradient<V> {
        let zero = V::splat(C::ZERO);
        let t = x.div(scale);
        let inside = limits.inside(t.round().sub(offset));
        let g = V::select(inside, g, zero);
        let gx = g.div(scale);
        // Outside the grid the terms are exact zeros, not 0 * inf.
        let gs = V::select(inside, zero.sub(gx.mul(t)), zero);
        (gx, [gs, zero.sub(g)])
    }
}

impl AffineOp for Dequantize {
    #[inline(always)]
    fn value<C: Compute, V: Vector<C>>(x: V, [scale, offset]: [V; 2], _: &Limits<V>) -> V {
        x.add(offset).mul(scale)
    }
    #[inline(always)]
    fn gradient<C: Compute, V: Vector<C>>(
        g: V,
        x: V,
        [scale, offset]: [V; 2],
        _: &Limits<V>,
    ) -> Gradient<V> {
        let gx = g.mul(scale);
        (gx, [g.mul(x.add(offset)), gx])
    }
}

impl AffineOp for QuantizeDequantize {
    #[inline(always)]
    fn value<C: Compute, V: Vector<C>>(x: V, [scale, offset]: [V; 2], l: &Limits<V>) -> V {
        let rounded = x.div(scale).sub(l.shift).round();
        let q = rounded.sub(offset).limit(l.qmin, l.qmax);
        q.add(offset.add(l.shift)).mul(scale)
    }
    #[inline(always)]
    fn gradient<C: Compute, V: Vector<C>>(
        g: V,
        x: V,
        [scale, offset]: [V; 2],
        l: &Limits<V>,
    ) -> Gradient<V> {
        let zero = V::splat(C::ZERO);
        let t = x.div(scale).sub(l.shift);
        let rounded = t.round();
        let inside = l.inside(rounded.sub(offset));
        let clamped = rounded.limit(l.qmin.add(offset), l.qmax.add(offset));
        let slope = V::select(inside, rounded.sub(t), clamped);
        let go = V::select(inside, zero, g.mul(scale));
        (V::select(inside, g, zero), [g.mul(slope), go])
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

impl<'a, C> Encodings<'a, C> {
    fn parameters(self) -> Parameters<'a, C, 2> {
        [self.scale, self.offset]
    }
}

/// An op with its grid.
#[derive(Clone, Copy)]
struct OnGrid<O, C> {
    limits: Limits<C>,
    op: PhantomData<O>,
}

impl<O: AffineOp, C: Compute> OnGrid<O, C> {
    fn new(grid: &AffineGrid) -> Self {
        Self {
            limits: Limits::new(grid),
            op: PhantomData,
        }
    }
}

impl<O: AffineOp, C: Compute> Function<C, 2> for OnGrid<O, C> {
    type Constants<S: Simd> = Limits<C::V<S>>;
    #[inline(always)]
    fn constants<S: Simd>(&self) -> Limits<C::V<S>> {
        self.limits.splat()
    }
    #[inline(always)]
    fn value<S: Simd>(x: C::V<S>, encoding: [C::V<S>; 2], limits: &Limits<C::V<S>>) -> C::V<S> {
        O::value(x, encoding, limits)
    }
    #[inline(always)]
    fn gradient<S: Simd>(
        g: C::V<S>,
        x: C::V<S>,
        encoding: [C::V<S>; 2],
        limits: &Limits<C::V<S>>,
    ) -> Gradient<C::V<S>> {
        O::gradient(g, x, encoding, limits)
    }
}

/// Applies `O` to every element. `output` may be `input`.
///
/// # Safety
/// `input` is valid for reads and `output` for writes of `geometry.numel()` elements;
/// they are the same place or do not overlap.
///
/// # Panics
/// If `encodings` have not `geometry.num_groups()` elements.
pub unsafe fn forward<O: AffineOp, T: Element<C>, C: Compute>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    input: *const T,
    output: *mut T,
) {
    let (function, parameters) = (OnGrid::<O, C>::new(grid), encodings.parameters());
    // SAFETY: handed on.
    unsafe { elementwise::forward(geometry, function, parameters, input, output) }
}

/// The gradients of `O`: writes that of the input (unless `grad_input` is null) and returns those of
/// scale and offset (`N` = 2) or of the scale alone (1), per encoding, summed as in
/// [`elementwise::backward`].
///
/// # Safety
/// `grad` and `input` are valid for reads, `grad_input` (if not null) for writes of
/// `geometry.numel()` elements in the same memory order, and it overlaps neither.
///
/// # Panics
/// If `encodings` have not `geometry.num_groups()` elements.
pub unsafe fn backward<O: AffineOp, T: Element<C>, C: Compute, const N: usize>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    grad: *const T,
    input: *const T,
    grad_input: *mut T,
) -> Vec<[f64; N]> {
    let (function, parameters) = (OnGrid::<O, C>::new(grid), encodings.parameters());
    // SAFETY: handed on.
    unsafe { elementwise::backward(geometry, function, parameters, grad, input, grad_input) }
}
