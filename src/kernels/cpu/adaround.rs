//! AdaRound \[nagel2020\]: soft rounding with a learned position between two levels, its gradient, the
//! rounding regularizer, and a whole optimization step in one pass.
//!
//! ```text
//! h(a) = clamp(sigmoid(a) * (ZETA - GAMMA) + GAMMA, 0, 1)                      (equation 23)
//! y    = (clamp(floor(x / s) + h(a) - o, qmin, qmax) + o) * s                  (equation 22)
//! r    = sum(1 - |2 h(a) - 1|^beta)                                            (equation 24)
//! ```

use super::affine::Encodings;
use super::element::{load_up_to, store_up_to, Compute, Element, LANES};
use super::isa::{dispatch, Body, Simd};
use super::math::Transcendental;
use super::parallel::{for_each_range, Shared, GRAIN};
use super::reduce::{fill_groups, TILE};
use super::vector::Vector;
use super::walk::Pieces;
use crate::encoding::{AffineGrid, BlockGeometry};

/// Upper end of the stretched sigmoid.
pub const ZETA: f64 = 1.1;
/// Lower end of the stretched sigmoid.
pub const GAMMA: f64 = -0.1;

/// The grid's ends in the kernel's precision.
#[derive(Clone, Copy)]
struct Ends<C> {
    qmin: C,
    qmax: C,
}

impl<C: Compute> Ends<C> {
    fn new(grid: &AffineGrid) -> Self {
        Self {
            qmin: C::from_f64(grid.qmin() as f64),
            qmax: C::from_f64(grid.qmax() as f64),
        }
    }

    #[inline(always)]
    fn splat<S: Simd>(&self) -> (C::V<S>, C::V<S>) {
        (Vector::splat(self.qmin), Vector::splat(self.qmax))
    }
}

#[inline(always)]
fn number<S: Simd, C: Compute>(value: f64) -> C::V<S> {
    Vector::splat(C::from_f64(value))
}

/// `h(alpha)` and its derivative. The clamp passes the gradient on its bounds, as torch's does.
#[inline(always)]
fn rectified_sigmoid<S: Simd, C: Transcendental>(alpha: C::V<S>) -> (C::V<S>, C::V<S>) {
    let (zero, one) = (number::<S, C>(0.0), number::<S, C>(1.0));
    let stretch = number::<S, C>(ZETA - GAMMA);
    let sigmoid = one.div(one.add(C::exp::<S>(zero.sub(alpha))));
    let raw = sigmoid.mul(stretch).add(number::<S, C>(GAMMA));
    let free = <C::V<S>>::and(zero.le(raw), raw.le(one));
    let slope = stretch.mul(sigmoid).mul(one.sub(sigmoid));
    (raw.limit(zero, one), <C::V<S>>::select(free, slope, zero))
}

#[inline(always)]
fn floor<S: Simd, C: Compute>(x: C::V<S>) -> C::V<S> {
    let rounded = x.round();
    <C::V<S>>::select(rounded.le(x), rounded, rounded.sub(number::<S, C>(1.0)))
}

/// Scale and offset of sixteen neighbours.
#[derive(Clone, Copy)]
struct Grid<V> {
    scale: V,
    offset: V,
    /// Lower and upper end.
    ends: (V, V),
}

impl<V> Grid<V> {
    /// The value at a position on the grid, `floor(x / scale) + h`.
    #[inline(always)]
    fn value<C: Compute>(&self, position: V) -> V
    where
        V: Vector<C>,
    {
        let level = position.sub(self.offset).limit(self.ends.0, self.ends.1);
        level.add(self.offset).mul(self.scale)
    }

    /// The gradient of the position's `h`, times `slope`, where `grad` comes in: none off the grid.
    #[inline(always)]
    fn gradient<C: Compute>(&self, grad: V, position: V, slope: V) -> V
    where
        V: Vector<C>,
    {
        let level = position.sub(self.offset);
        let inside = V::and(self.ends.0.le(level), level.le(self.ends.1));
        V::select(inside, grad.mul(self.scale).mul(slope), V::splat(C::ZERO))
    }
}

/// `|2 h - 1|^exponent` with the sign of `2 h - 1`.
#[inline(always)]
fn signed_power<S: Simd, C: Transcendental>(h: C::V<S>, exponent: C::V<S>) -> C::V<S> {
    let u = h.add(h).sub(number::<S, C>(1.0));
    let magnitude = u.abs().max(number::<S, C>(1e-30));
    // e^-60 is nothing beside 1, and its products are no subnormals, which take many times as long.
    let logarithm = number::<S, C>(-60.0).max(C::ln::<S>(magnitude).mul(exponent));
    C::exp::<S>(logarithm).with_sign_of(u)
}

/// What is done with neighbours, up to `N` vectors of sixteen.
trait Lanes<C: Compute> {
    /// The grid's ends.
    fn ends(&self) -> Ends<C>;
    /// # Safety
    /// The `n` elements from `at`, more than `N - 1` vectors and at most `N`, are inside the tensors, and no other call has them.
    unsafe fn lanes<S: Simd, const N: usize>(&self, at: usize, n: usize, grid: &Grid<C::V<S>>);
}

/// Vectors worked on at a time. One alone waits for itself: a step is a chain of some 130 operations.
const UNROLL: usize = 4;

/// Where the vectors of up to `N * LANES` elements begin, and how many of each there are; `n` is more than
/// `(N - 1) * LANES`.
#[inline(always)]
fn parts<const N: usize>(at: usize, n: usize) -> [(usize, usize); N] {
    let mut parts = [(at, n); N];
    for (j, part) in parts.iter_mut().enumerate() {
        *part = (at + j * LANES, LANES.min(n - j * LANES));
    }
    parts
}

struct Walk<'a, C, L> {
    geometry: &'a BlockGeometry,
    encodings: Encodings<'a, C>,
    begin: usize,
    end: usize,
    lanes: &'a L,
}

impl<C: Compute, L: Lanes<C>> Body for Walk<'_, C, L> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Encodings { scale, offset } = self.encodings;
        let inner = self.geometry.dims().last().copied().unwrap_or_default();
        let ends = self.lanes.ends().splat::<S>();
        if self.geometry.is_uniform() || (inner.group_stride == 0 && inner.size >= LANES) {
            for p in Pieces::new(self.geometry, self.begin, self.end) {
                for r in 0..p.count {
                    let (start, group) = (p.start + r * p.len, p.group + r * p.group_step);
                    let grid = Grid {
                        scale: Vector::splat(scale[group]),
                        offset: Vector::splat(offset[group]),
                        ends,
                    };
                    let mut i = 0;
                    // SAFETY: pieces lie inside `begin..end`, which is this call's alone.
                    unsafe {
                        while i + UNROLL * LANES <= p.len {
                            let n = UNROLL * LANES;
                            self.lanes.lanes::<S, UNROLL>(start + i, n, &grid);
                            i += n;
                        }
                        while i < p.len {
                            let n = LANES.min(p.len - i);
                            self.lanes.lanes::<S, 1>(start + i, n, &grid);
                            i += n;
                        }
                    }
                }
            }
            return;
        }
        let mut groups = [0_usize; TILE];
        let (mut s, mut o) = ([C::from_f64(1.0); LANES], [C::ZERO; LANES]);
        for begin in (self.begin..self.end).step_by(TILE) {
            let end = (begin + TILE).min(self.end);
            fill_groups(self.geometry, begin, end, &mut groups);
            for i in (0..end - begin).step_by(LANES) {
                let n = LANES.min(end - begin - i);
                for (j, &group) in groups[i..i + n].iter().enumerate() {
                    s[j] = scale[group];
                    o[j] = offset[group];
                }
                let grid = Grid {
                    scale: Vector::from_array(s),
                    offset: Vector::from_array(o),
                    ends,
                };
                // SAFETY: as above.
                unsafe { self.lanes.lanes::<S, 1>(begin + i, n, &grid) };
            }
        }
    }
}

fn for_each_lanes<C: Compute, L: Lanes<C> + Sync>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    lanes: &L,
) {
    assert_eq!(encodings.scale.len(), geometry.num_groups());
    assert_eq!(encodings.offset.len(), geometry.num_groups());
    for_each_range(geometry.numel(), GRAIN, |range| {
        dispatch(Walk {
            geometry,
            encodings,
            begin: range.start,
            end: range.end,
            lanes,
        });
    });
}

struct Forward<T, C> {
    input: *const T,
    alpha: *const T,
    output: *mut T,
    ends: Ends<C>,
    soft: bool,
}

// SAFETY: `input` and `alpha` are only read, `output` is written in disjoint stretches.
unsafe impl<T, C> Sync for Forward<T, C> {}

impl<T: Element<C>, C: Transcendental> Lanes<C> for Forward<T, C> {
    fn ends(&self) -> Ends<C> {
        self.ends
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd, const N: usize>(&self, at: usize, n: usize, grid: &Grid<C::V<S>>) {
        for (at, n) in parts::<N>(at, n) {
            // SAFETY: by the contract.
            let x = unsafe { load_up_to::<S, T, C>(self.input.add(at), n) };
            // SAFETY: by the contract.
            let alpha = unsafe { load_up_to::<S, T, C>(self.alpha.add(at), n) };
            let (zero, one) = (number::<S, C>(0.0), number::<S, C>(1.0));
            let h = if self.soft {
                rectified_sigmoid::<S, C>(alpha).0
            } else {
                <C::V<S>>::select(zero.le(alpha), one, zero)
            };
            let position = floor::<S, C>(x.div(grid.scale)).add(h);
            // SAFETY: by the contract.
            unsafe { store_up_to::<S, T, C>(self.output.add(at), n, grid.value(position)) };
        }
    }
}

/// The weights `input` with each element at `h(alpha)` between its two neighbouring levels, or, if not
/// `soft`, on the upper one where `alpha >= 0` and on the lower one elsewhere.
///
/// # Safety
/// `input` and `alpha` are valid for reads and `output` for writes of `geometry.numel()` elements, all
/// in one memory order; `output` overlaps neither.
pub unsafe fn forward<T: Element<C>, C: Transcendental>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    soft: bool,
    input: *const T,
    alpha: *const T,
    output: *mut T,
) {
    let ends = Ends::new(grid);
    for_each_lanes(
        geometry,
        encodings,
        &Forward {
            input,
            alpha,
            output,
            ends,
            soft,
        },
    );
}

struct Backward<T, C> {
    grad: *const T,
    input: *const T,
    alpha: *const T,
    grad_alpha: *mut T,
    ends: Ends<C>,
}

// SAFETY: `grad_alpha` is written in disjoint stretches, the others are only read.
unsafe impl<T, C> Sync for Backward<T, C> {}

impl<T: Element<C>, C: Transcendental> Lanes<C> for Backward<T, C> {
    fn ends(&self) -> Ends<C> {
        self.ends
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd, const N: usize>(&self, at: usize, n: usize, grid: &Grid<C::V<S>>) {
        for (at, n) in parts::<N>(at, n) {
            // SAFETY: by the contract.
            unsafe {
                let grad = load_up_to::<S, T, C>(self.grad.add(at), n);
                let x = load_up_to::<S, T, C>(self.input.add(at), n);
                let alpha = load_up_to::<S, T, C>(self.alpha.add(at), n);
                let (h, slope) = rectified_sigmoid::<S, C>(alpha);
                let position = floor::<S, C>(x.div(grid.scale)).add(h);
                let gradient = grid.gradient(grad, position, slope);
                store_up_to::<S, T, C>(self.grad_alpha.add(at), n, gradient);
            }
        }
    }
}

/// The gradient of [`forward`] (soft) with respect to `alpha`.
///
/// # Safety
/// `grad`, `input` and `alpha` are valid for reads and `grad_alpha` for writes of `geometry.numel()`
/// elements, all in one memory order; `grad_alpha` overlaps none of the others.
pub unsafe fn backward<T: Element<C>, C: Transcendental>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    grad: *const T,
    input: *const T,
    alpha: *const T,
    grad_alpha: *mut T,
) {
    let ends = Ends::new(grid);
    for_each_lanes(
        geometry,
        encodings,
        &Backward {
            grad,
            input,
            alpha,
            grad_alpha,
            ends,
        },
    );
}

/// Elements whose regularizer is summed by one thread; fixed, so that the sum does not depend on the
/// number of threads.
const CHUNK: usize = 32_768;

struct RegularizerSum<T, C> {
    alpha: *const T,
    len: usize,
    beta: C,
}

impl<T: Element<C>, C: Transcendental> Body for RegularizerSum<T, C> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        let beta = Vector::splat(self.beta);
        let one = number::<S, C>(1.0);
        let mut total = 0.0;
        for at in (0..self.len).step_by(LANES) {
            let n = LANES.min(self.len - at);
            // SAFETY: `n` elements from `at` are inside the chunk.
            let alpha = unsafe { load_up_to::<S, T, C>(self.alpha.add(at), n) };
            let (h, _) = rectified_sigmoid::<S, C>(alpha);
            let term = one.sub(signed_power::<S, C>(h, beta).abs());
            if n == LANES {
                total += term.sum();
            } else {
                total += term.to_array()[..n].iter().map(|t| t.to_f64()).sum::<f64>();
            }
        }
        total
    }
}

/// `sum(1 - |2 h(alpha) - 1|^beta)`, summed in float64 in a fixed order.
///
/// # Safety
/// `alpha` is valid for reads of `len` elements.
pub unsafe fn regularizer<T: Element<C>, C: Transcendental>(
    alpha: *const T,
    len: usize,
    beta: f64,
) -> f64 {
    let chunks = len.div_ceil(CHUNK);
    let mut sums = vec![0.0; chunks];
    let (input, output) = (Shared(alpha.cast_mut()), Shared(sums.as_mut_ptr()));
    for_each_range(chunks, 1, |range| {
        let (input, output) = (&input, &output);
        for chunk in range {
            let begin = chunk * CHUNK;
            // SAFETY: chunks are inside the tensor; each has a sum of its own.
            unsafe {
                let sum = dispatch(RegularizerSum::<T, C> {
                    alpha: input.0.add(begin).cast_const(),
                    len: CHUNK.min(len - begin),
                    beta: C::from_f64(beta),
                });
                output.0.add(chunk).write(sum);
            }
        }
    });
    sums.iter().sum()
}

/// Gradient of `1 - |2 h - 1|^beta` with respect to alpha.
#[inline(always)]
fn regularizer_slope<S: Simd, C: Transcendental>(
    h: C::V<S>,
    slope: C::V<S>,
    beta: C::V<S>,
) -> C::V<S> {
    let power = signed_power::<S, C>(h, beta.sub(number::<S, C>(1.0)));
    number::<S, C>(0.0)
        .sub(beta.add(beta))
        .mul(power)
        .mul(slope)
}

struct RegularizerBackward<T, C> {
    alpha: *const T,
    grad_alpha: *mut T,
    len: usize,
    beta: C,
    grad: C,
}

impl<T: Element<C>, C: Transcendental> Body for RegularizerBackward<T, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (beta, grad) = (Vector::splat(self.beta), <C::V<S>>::splat(self.grad));
        for at in (0..self.len).step_by(LANES) {
            let n = LANES.min(self.len - at);
            // SAFETY: `n` elements from `at` are inside the stretch.
            unsafe {
                let alpha = load_up_to::<S, T, C>(self.alpha.add(at), n);
                let (h, slope) = rectified_sigmoid::<S, C>(alpha);
                let gradient = grad.mul(regularizer_slope::<S, C>(h, slope, beta));
                store_up_to::<S, T, C>(self.grad_alpha.add(at), n, gradient);
            }
        }
    }
}

/// The gradient of [`regularizer`], where `grad` comes in.
///
/// # Safety
/// `alpha` is valid for reads and `grad_alpha` for writes of `len` elements; they do not overlap.
pub unsafe fn regularizer_backward<T: Element<C>, C: Transcendental>(
    alpha: *const T,
    len: usize,
    beta: f64,
    grad: f64,
    grad_alpha: *mut T,
) {
    let (input, output) = (Shared(alpha.cast_mut()), Shared(grad_alpha));
    for_each_range(len, GRAIN, |range| {
        let (input, output) = (&input, &output);
        // SAFETY: the stretches are disjoint and inside the tensors.
        unsafe {
            dispatch(RegularizerBackward::<T, C> {
                alpha: input.0.add(range.start).cast_const(),
                grad_alpha: output.0.add(range.start),
                len: range.len(),
                beta: C::from_f64(beta),
                grad: C::from_f64(grad),
            });
        }
    });
}

/// Settings of one [`step`].
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Number of the step, from 1: Adam's bias correction.
    pub step: u64,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Weight of the regularizer; 0 while the warm start lasts.
    pub reg_param: f64,
    /// The regularizer's exponent.
    pub beta: f64,
}

impl StepSettings {
    /// Adam's step size, and what the root of the second moment is multiplied with: both with their bias
    /// corrections.
    pub fn adam(&self) -> (f64, f64) {
        let power = self.step.min(i32::MAX as u64) as i32;
        let step_size = self.learning_rate / (1.0 - BETA1.powi(power));
        (step_size, (1.0 - BETA2.powi(power)).sqrt().recip())
    }
}

/// Adam's decay rates and the term that keeps it from dividing by zero \[kingma2015\].
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// The tensors that one [`step`] reads and writes, all in one memory order.
#[derive(Clone, Copy)]
pub struct StepTensors<T> {
    /// Written: rounding variables.
    pub alpha: *mut T,
    /// Written: Adam's running mean of the gradient.
    pub exp_avg: *mut T,
    /// Written: Adam's running mean of the squared gradient.
    pub exp_avg_sq: *mut T,
    /// Written: the soft-rounded weights after the step.
    pub output: *mut T,
    /// Gradient of the reconstruction loss with respect to the soft-rounded weights before it.
    pub grad: *const T,
    /// The weights.
    pub input: *const T,
}

struct Step<T, C> {
    tensors: StepTensors<T>,
    ends: Ends<C>,
    reg_param: C,
    beta: C,
    step_size: C,
    /// Of the second moment's root: one over its bias correction.
    correction: C,
    regularized: bool,
}

// SAFETY: what is written is written in disjoint stretches.
unsafe impl<T, C> Sync for Step<T, C> {}

impl<T: Element<C>, C: Transcendental> Lanes<C> for Step<T, C> {
    fn ends(&self) -> Ends<C> {
        self.ends
    }
    #[inline(always)]
    unsafe fn lanes<S: Simd, const N: usize>(&self, at: usize, n: usize, grid: &Grid<C::V<S>>) {
        let t = &self.tensors;
        let zeros = [<C::V<S>>::splat(C::ZERO); N];
        let (mut alpha, mut h, mut slope, mut regularizer) = (zeros, zeros, zeros, zeros);
        let (mut base, places) = (zeros, parts::<N>(at, n));
        // SAFETY: by the contract, here and below: all places are inside the `n` elements.
        unsafe {
            for (j, &(at, n)) in places.iter().enumerate() {
                alpha[j] = load_up_to::<S, T, C>(t.alpha.add(at), n);
                (h[j], slope[j]) = rectified_sigmoid::<S, C>(alpha[j]);
            }
            if self.regularized {
                let reg_param = <C::V<S>>::splat(self.reg_param);
                for j in 0..N {
                    let slope = regularizer_slope::<S, C>(h[j], slope[j], Vector::splat(self.beta));
                    regularizer[j] = reg_param.mul(slope);
                }
            }
            for (j, &(at, n)) in places.iter().enumerate() {
                let x = load_up_to::<S, T, C>(t.input.add(at), n);
                base[j] = floor::<S, C>(x.div(grid.scale));
                let grad = load_up_to::<S, T, C>(t.grad.add(at), n);
                let total = grid
                    .gradient(grad, base[j].add(h[j]), slope[j])
                    .add(regularizer[j]);
                let mean = load_up_to::<S, T, C>(t.exp_avg.add(at), n);
                let mean = number::<S, C>(BETA1)
                    .mul(mean)
                    .add(number::<S, C>(1.0 - BETA1).mul(total));
                store_up_to::<S, T, C>(t.exp_avg.add(at), n, mean);
                let square = load_up_to::<S, T, C>(t.exp_avg_sq.add(at), n);
                let square = number::<S, C>(BETA2)
                    .mul(square)
                    .add(number::<S, C>(1.0 - BETA2).mul(total.mul(total)));
                store_up_to::<S, T, C>(t.exp_avg_sq.add(at), n, square);
                let root = square.sqrt().mul(Vector::splat(self.correction));
                let direction = mean.div(root.add(number::<S, C>(EPSILON)));
                alpha[j] = alpha[j].sub(<C::V<S>>::splat(self.step_size).mul(direction));
                store_up_to::<S, T, C>(t.alpha.add(at), n, alpha[j]);
            }
            for (j, &(at, n)) in places.iter().enumerate() {
                let (h, _) = rectified_sigmoid::<S, C>(alpha[j]);
                store_up_to::<S, T, C>(t.output.add(at), n, grid.value(base[j].add(h)));
            }
        }
    }
}

/// One step of the optimization, in one pass over the weights: the gradient of
/// `reconstruction + reg_param * regularizer` with respect to alpha, Adam, and the soft-rounded weights
/// that follow.
///
/// # Safety
/// Every pointer is valid for `geometry.numel()` elements; no two overlap.
pub unsafe fn step<T: Element<C>, C: Transcendental>(
    geometry: &BlockGeometry,
    encodings: Encodings<'_, C>,
    grid: &AffineGrid,
    settings: &StepSettings,
    tensors: StepTensors<T>,
) {
    let (step_size, correction) = settings.adam();
    for_each_lanes(
        geometry,
        encodings,
        &Step {
            tensors,
            ends: Ends::new(grid),
            reg_param: C::from_f64(settings.reg_param),
            beta: C::from_f64(settings.beta),
            step_size: C::from_f64(step_size),
            correction: C::from_f64(correction),
            regularized: settings.reg_param != 0.0,
        },
    );
}

struct ReconstructionGradient<T, C> {
    output: *mut T,
    target: *const T,
    len: usize,
    factor: C,
    relu: bool,
}

impl<T: Element<C>, C: Compute> Body for ReconstructionGradient<T, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (zero, factor) = (number::<S, C>(0.0), <C::V<S>>::splat(self.factor));
        for at in (0..self.len).step_by(LANES) {
            let n = LANES.min(self.len - at);
            // SAFETY: `n` elements from `at` are inside the stretch.
            unsafe {
                let output = load_up_to::<S, T, C>(self.output.add(at), n);
                let mut target = load_up_to::<S, T, C>(self.target.add(at), n);
                if self.relu {
                    target = <C::V<S>>::select(target.le(zero), zero, target);
                }
                let mut gradient = output.sub(target).mul(factor);
                if self.relu {
                    gradient = <C::V<S>>::select(output.le(zero), zero, gradient);
                }
                store_up_to::<S, T, C>(self.output.add(at), n, gradient);
            }
        }
    }
}

/// The gradient of `factor / 2 * |f(output) - f(target)|^2` with respect to `output`, in its place, where `f`
/// is ReLU or nothing. `output` holds `samples.len()` samples of `len` elements; `samples` says which of
/// the target's they are compared with.
///
/// # Safety
/// `output` is valid for reads and writes of `samples.len() * len` elements, `target` for reads of `len`
/// elements from each of `samples` times `len` on; they do not overlap.
pub unsafe fn reconstruction_gradient<T: Element<C>, C: Compute>(
    output: *mut T,
    target: *const T,
    samples: &[i64],
    len: usize,
    factor: f64,
    relu: bool,
) {
    let (output, target) = (Shared(output), Shared(target.cast_mut()));
    for_each_range(samples.len() * len, GRAIN, |range| {
        let (output, target) = (&output, &target);
        let mut at = range.start;
        while at < range.end {
            let (sample, begin) = (at / len, at % len);
            let n = (len - begin).min(range.end - at);
            // SAFETY: the stretch is inside one sample; stretches are disjoint.
            unsafe {
                let from = samples[sample] as usize * len + begin;
                dispatch(ReconstructionGradient::<T, C> {
                    output: output.0.add(at),
                    target: target.0.add(from).cast_const(),
                    len: n,
                    factor: C::from_f64(factor),
                    relu,
                });
            }
            at += n;
        }
    });
}
