//! AdaRound \[nagel2020\]: soft rounding with a learned position between two levels, its gradient, the
//! rounding regularizer, and a whole optimization step in one pass.
//!
//! ```text
//! h(a) = clamp(sigmoid(a) * (ZETA - GAMMA) + GAMMA, 0, 1)                      (equation 23)
//! y    = (clamp(floor(x / s) + h(a) - o, qmin, qmax) + o) * s                  (equation 22)
//! r    = sum(1 - |2 h(a) - 1|^beta)                                            (equation 24)
//! ```

use super::affine::Encodings;
use super::element::{load_lanes, store_lanes, Compute, Element, LANES};
use super::isa::{dispatch, Body, Simd};
use super::math::Transcendental;
use super::parallel::{for_each_range, Shared, GRAIN};
use super::reduce::{fill_groups, TILE};
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
}

/// `h(alpha)` and its derivative. The clamp passes the gradient on its bounds, as torch's does.
#[inline(always)]
fn rectified_sigmoid<S: Simd, C: Transcendental>(alpha: C) -> (C, C) {
    let one = C::from_f64(1.0);
    let stretch = C::from_f64(ZETA - GAMMA);
    let sigmoid = one / (one + (-alpha).exp::<S>());
    let raw = sigmoid * stretch + C::from_f64(GAMMA);
    let free = (raw >= C::ZERO) & (raw <= one);
    let slope = stretch * sigmoid * (one - sigmoid);
    (raw.limit(C::ZERO, one), if free { slope } else { C::ZERO })
}

#[inline(always)]
fn floor<S: Simd, C: Compute>(x: C) -> C {
    let rounded = x.round::<S>();
    if rounded > x {
        rounded - C::from_f64(1.0)
    } else {
        rounded
    }
}

/// Position on the grid, not clamped.
#[inline(always)]
fn level<S: Simd, C: Compute>(x: C, h: C, scale: C, offset: C) -> C {
    (floor::<S, C>(x / scale) + h) - offset
}

#[inline(always)]
fn dequantized<C: Compute>(level: C, scale: C, offset: C, ends: &Ends<C>) -> C {
    (level.limit(ends.qmin, ends.qmax) + offset) * scale
}

/// `|2 h - 1|^exponent` with its sign.
#[inline(always)]
fn signed_power<S: Simd, C: Transcendental>(h: C, exponent: C) -> (C, C) {
    let one = C::from_f64(1.0);
    let u = h + h - one;
    let negative = u < C::ZERO;
    let magnitude = if negative { -u } else { u };
    // Below, any power of at least 1 is nothing beside 1.
    let smallest = C::from_f64(1e-30);
    let positive = if magnitude > smallest {
        magnitude
    } else {
        smallest
    };
    let power = (positive.ln::<S>() * exponent).exp::<S>();
    (power, if negative { -one } else { one })
}

/// What is done with up to sixteen neighbours.
trait Lanes<C> {
    /// # Safety
    /// The `n <= LANES` elements from `at` are inside the tensors, and no other call has them.
    unsafe fn lanes<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES], offset: &[C; LANES]);
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
        if self.geometry.is_uniform() || (inner.group_stride == 0 && inner.size >= LANES) {
            for p in Pieces::new(self.geometry, self.begin, self.end) {
                for r in 0..p.count {
                    let (start, group) = (p.start + r * p.len, p.group + r * p.group_step);
                    let (s, o) = ([scale[group]; LANES], [offset[group]; LANES]);
                    for i in (0..p.len).step_by(LANES) {
                        // SAFETY: pieces lie inside `begin..end`, which is this call's alone.
                        unsafe {
                            self.lanes
                                .lanes::<S>(start + i, LANES.min(p.len - i), &s, &o);
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
                // SAFETY: as above.
                unsafe { self.lanes.lanes::<S>(begin + i, n, &s, &o) };
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
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES], offset: &[C; LANES]) {
        // SAFETY: by the contract.
        unsafe {
            let x = load_lanes::<S, T, C>(self.input.add(at), n);
            let a = load_lanes::<S, T, C>(self.alpha.add(at), n);
            let mut y = [C::ZERO; LANES];
            for j in 0..LANES {
                let hard = C::from_f64(if a[j] >= C::ZERO { 1.0 } else { 0.0 });
                let h = if self.soft {
                    rectified_sigmoid::<S, C>(a[j]).0
                } else {
                    hard
                };
                let q = level::<S, C>(x[j], h, scale[j], offset[j]);
                y[j] = dequantized(q, scale[j], offset[j], &self.ends);
            }
            store_lanes::<S, T, C>(self.output.add(at), n, &y);
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

/// Gradient of the soft rounding with respect to alpha, where `g` comes in.
#[inline(always)]
fn gradient<C: Compute>(g: C, q: C, slope: C, scale: C, ends: &Ends<C>) -> C {
    let inside = (q >= ends.qmin) & (q <= ends.qmax);
    if inside {
        g * scale * slope
    } else {
        C::ZERO
    }
}

impl<T: Element<C>, C: Transcendental> Lanes<C> for Backward<T, C> {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES], offset: &[C; LANES]) {
        // SAFETY: by the contract.
        unsafe {
            let g = load_lanes::<S, T, C>(self.grad.add(at), n);
            let x = load_lanes::<S, T, C>(self.input.add(at), n);
            let a = load_lanes::<S, T, C>(self.alpha.add(at), n);
            let mut y = [C::ZERO; LANES];
            for j in 0..LANES {
                let (h, slope) = rectified_sigmoid::<S, C>(a[j]);
                let q = level::<S, C>(x[j], h, scale[j], offset[j]);
                y[j] = gradient(g[j], q, slope, scale[j], &self.ends);
            }
            store_lanes::<S, T, C>(self.grad_alpha.add(at), n, &y);
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
        let mut sums = [0.0_f64; LANES];
        for at in (0..self.len).step_by(LANES) {
            let n = LANES.min(self.len - at);
            // SAFETY: `n` elements from `at` are inside the chunk.
            let a = unsafe { load_lanes::<S, T, C>(self.alpha.add(at), n) };
            for j in 0..n {
                let (h, _) = rectified_sigmoid::<S, C>(a[j]);
                let (power, _) = signed_power::<S, C>(h, self.beta);
                sums[j] += 1.0 - power.to_f64();
            }
        }
        sums.iter().sum()
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
fn regularizer_slope<S: Simd, C: Transcendental>(h: C, slope: C, beta: C) -> C {
    let (power, sign) = signed_power::<S, C>(h, beta - C::from_f64(1.0));
    -(beta + beta) * power * sign * slope
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
        for at in (0..self.len).step_by(LANES) {
            let n = LANES.min(self.len - at);
            // SAFETY: `n` elements from `at` are inside the stretch.
            unsafe {
                let a = load_lanes::<S, T, C>(self.alpha.add(at), n);
                let mut y = [C::ZERO; LANES];
                for j in 0..LANES {
                    let (h, slope) = rectified_sigmoid::<S, C>(a[j]);
                    y[j] = self.grad * regularizer_slope::<S, C>(h, slope, self.beta);
                }
                store_lanes::<S, T, C>(self.grad_alpha.add(at), n, &y);
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
    correction: C,
    regularized: bool,
}

// SAFETY: what is written is written in disjoint stretches.
unsafe impl<T, C> Sync for Step<T, C> {}

impl<T: Element<C>, C: Transcendental> Lanes<C> for Step<T, C> {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, at: usize, n: usize, scale: &[C; LANES], offset: &[C; LANES]) {
        let t = &self.tensors;
        let (keep1, take1) = (C::from_f64(BETA1), C::from_f64(1.0 - BETA1));
        let (keep2, take2) = (C::from_f64(BETA2), C::from_f64(1.0 - BETA2));
        let epsilon = C::from_f64(EPSILON);
        // SAFETY: by the contract.
        unsafe {
            let mut a = load_lanes::<S, T, C>(t.alpha.add(at), n);
            let mut mean = load_lanes::<S, T, C>(t.exp_avg.add(at), n);
            let mut square = load_lanes::<S, T, C>(t.exp_avg_sq.add(at), n);
            let g = load_lanes::<S, T, C>(t.grad.add(at), n);
            let x = load_lanes::<S, T, C>(t.input.add(at), n);
            let mut base = [C::ZERO; LANES];
            let mut y = [C::ZERO; LANES];
            let (mut h, mut slope) = ([C::ZERO; LANES], [C::ZERO; LANES]);
            let mut total = [C::ZERO; LANES];
            for j in 0..LANES {
                (h[j], slope[j]) = rectified_sigmoid::<S, C>(a[j]);
                base[j] = floor::<S, C>(x[j] / scale[j]);
                let q = (base[j] + h[j]) - offset[j];
                total[j] = gradient(g[j], q, slope[j], scale[j], &self.ends);
            }
            if self.regularized {
                for j in 0..LANES {
                    let slope = regularizer_slope::<S, C>(h[j], slope[j], self.beta);
                    total[j] = total[j] + self.reg_param * slope;
                }
            }
            for j in 0..LANES {
                mean[j] = keep1 * mean[j] + take1 * total[j];
                square[j] = keep2 * square[j] + take2 * (total[j] * total[j]);
                let scaled = square[j].sqrt() / self.correction + epsilon;
                a[j] = a[j] - self.step_size * (mean[j] / scaled);
                let (h, _) = rectified_sigmoid::<S, C>(a[j]);
                y[j] = dequantized((base[j] + h) - offset[j], scale[j], offset[j], &self.ends);
            }
            store_lanes::<S, T, C>(t.alpha.add(at), n, &a);
            store_lanes::<S, T, C>(t.exp_avg.add(at), n, &mean);
            store_lanes::<S, T, C>(t.exp_avg_sq.add(at), n, &square);
            store_lanes::<S, T, C>(t.output.add(at), n, &y);
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
    let power = settings.step.min(i32::MAX as u64) as i32;
    let step_size = settings.learning_rate / (1.0 - BETA1.powi(power));
    let correction = (1.0 - BETA2.powi(power)).sqrt();
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
