//! Every kernel against the definition, element by element: any geometry, order of dimensions and place
//! in memory, hostile values, every instruction set of this processor, every dtype.
//!
//! Buffers end with their allocation, so that AddressSanitizer (`make sanitize`) sees any access beyond.

use super::affine::{self, AffineOp, Dequantize, Encodings, Quantize, QuantizeDequantize};
use super::float::{self, FloatOp, FloatQuantize, FloatQuantizeDequantize};
use super::isa::{self, Portable};
use super::min_max::min_max;
use super::{Compute, Element};
use crate::encoding::{AffineGrid, BlockGeometry, FloatFormat};
use half::{bf16, f16};
use proptest::prelude::*;
use std::sync::Mutex;

mod encodings;

/// A test costs its cases times the instruction sets; `PROPTEST_CASES` asks for another number, as
/// `make sanitize` does.
fn config() -> ProptestConfig {
    let asked_for = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if asked_for { default.cases } else { 48 },
        failure_persistence: None,
        ..default
    }
}

/// A tensor's geometry with its encodings, and values to fill tensors with.
#[derive(Clone, Debug)]
struct Case {
    sizes: Vec<i64>,
    strides: Vec<i64>,
    encoding: Vec<i64>,
    block: Vec<i64>,
    /// Elements before the first one in its allocation: where it lies relative to vectors.
    lead: usize,
    seed: u64,
}

impl Case {
    fn geometry(&self) -> BlockGeometry {
        BlockGeometry::new(
            &self.sizes,
            &self.strides,
            &self.encoding,
            Some(&self.block),
        )
        .unwrap()
    }
}

prop_compose! {
    fn cases()(
        parts in prop::collection::vec((1_i64..5, 1_i64..9), 0..4),
        long in prop_oneof![3 => Just(1_i64), 1 => 15_i64..70, 1 => prop::sample::select(vec![16_i64, 32])],
        many in prop_oneof![3 => Just(None), 1 => (5_i64..20).prop_map(Some)],
        empty in prop::bool::weighted(0.1),
        order_seed in 0_usize..24,
        lead in 0_usize..5,
        seed in any::<u64>(),
    ) -> Case {
        let mut parts = parts;
        // Short blocks are summed eight at a time.
        if let (Some(many), Some(first)) = (many, parts.first_mut()) {
            *first = (many, 1);
        }
        if let Some(last) = parts.last_mut() {
            last.1 *= long;
        }
        if empty {
            parts.push((1, 0));
        }
        let encoding: Vec<i64> = parts.iter().map(|p| p.0).collect();
        // An empty block cannot be written as a number.
        let block = parts.iter().map(|p| if p.1 == 0 { -1 } else { p.1 }).collect();
        let sizes: Vec<i64> = parts.iter().map(|p| p.0 * p.1).collect();
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        let mut rest = order_seed;
        for i in (1..order.len()).rev() {
            order.swap(i, rest % (i + 1));
            rest /= i + 1;
        }
        let mut strides = vec![0; sizes.len()];
        let mut step = 1;
        for &axis in order.iter().rev() {
            strides[axis] = step;
            step *= sizes[axis].max(1);
        }
        Case { sizes, strides, encoding, block, lead, seed }
    }
}

/// A small generator of our own: the values of a case follow from its seed.
struct Values(u64);

impl Values {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() % 1_000_003) as f64 / 1_000_003.0
    }

    /// One in four is hostile.
    fn hostile(&mut self) -> f64 {
        const SPECIAL: [f64; 12] = [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            0.0,
            -0.0,
            1e-40,
            -1e-45,
            3e38,
            -3e38,
            65_504.0,
            6e-8,
            0.5,
        ];
        match self.next() % 4 {
            0 => SPECIAL[self.next() as usize % SPECIAL.len()],
            // Halves: ties for a scale of one.
            1 => (self.next() % 64) as f64 / 2.0 - 16.0,
            _ => self.uniform(-20.0, 20.0),
        }
    }
}

/// A stored type by its conversions alone, each by the crate that owns the type.
trait Stored<C: Compute>: Element<C> + std::fmt::Debug {
    fn of(value: f64) -> Self;
    fn get(self) -> C;
    fn round(value: C) -> Self;
    fn same(self, other: Self) -> bool;
}

macro_rules! stored {
    ($t:ty, $c:ty, $of:expr, $get:expr, $round:expr) => {
        impl Stored<$c> for $t {
            fn of(value: f64) -> Self {
                ($of)(value)
            }
            fn get(self) -> $c {
                ($get)(self)
            }
            fn round(value: $c) -> Self {
                ($round)(value)
            }
            fn same(self, other: Self) -> bool {
                // Equal numbers, or both NaN; the sign of a zero is free.
                self == other || (self.is_nan() && other.is_nan())
            }
        }
    };
}
stored!(f32, f32, |v| v as f32, |v| v, |v| v);
stored!(f64, f64, |v| v, |v| v, |v| v);
stored!(f32, f64, |v| v as f32, f64::from, |v| v as f32);
stored!(
    f16,
    f32,
    |v| f16::from_f32(v as f32),
    f16::to_f32,
    f16::from_f32
);
stored!(
    bf16,
    f32,
    |v| bf16::from_f32(v as f32),
    bf16::to_f32,
    bf16::from_f32
);

/// Elements that end with their allocation, `lead` after its beginning.
struct Buffer<T> {
    memory: Vec<T>,
    lead: usize,
}

impl<T: Copy> Buffer<T> {
    fn new(lead: usize, elements: impl ExactSizeIterator<Item = T>, pad: T) -> Self {
        let mut memory = Vec::with_capacity(lead + elements.len());
        memory.resize(lead, pad);
        memory.extend(elements);
        memory.shrink_to_fit();
        Self { memory, lead }
    }

    fn elements(&self) -> &[T] {
        &self.memory[self.lead..]
    }

    fn elements_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.lead..]
    }
}

/// Runs `body` with each instruction set of this processor; one test at a time, since the choice is the
/// process's.
fn with_every_isa(
    mut body: impl FnMut(isa::Isa) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut result = Ok(());
    for isa in isa::Isa::ALL {
        if result.is_ok() && isa::force(Some(isa)) {
            result = body(isa);
        }
    }
    isa::force(None);
    result
}

/// Data of a case: input, gradient, and one scale and offset per encoding.
struct Data<T, C> {
    geometry: BlockGeometry,
    groups: Vec<usize>,
    input: Buffer<T>,
    grad: Buffer<T>,
    scale: Vec<C>,
    offset: Vec<C>,
}

impl<T: Stored<C>, C: Compute> Data<T, C> {
    fn new(case: &Case) -> Self {
        let geometry = case.geometry();
        let mut values = Values(case.seed);
        let n = geometry.numel();
        let input = Buffer::new(
            case.lead,
            (0..n).map(|_| T::of(values.hostile())),
            T::of(7.0),
        );
        let grad = Buffer::new(
            case.lead,
            (0..n).map(|_| T::of(values.uniform(-1.0, 1.0))),
            T::of(7.0),
        );
        let scale = (0..geometry.num_groups())
            .map(|i| {
                if i % 3 == 0 {
                    C::from_f64(1.0)
                } else {
                    C::from_f64(values.uniform(0.05, 2.0))
                }
            })
            .collect();
        let offset = (0..geometry.num_groups())
            .map(|_| C::from_f64((values.next() % 9) as f64 - 4.0))
            .collect();
        Self {
            geometry,
            groups: (0..n).map(|i| geometry.group_of(i)).collect(),
            input,
            grad,
            scale,
            offset,
        }
    }

    fn output(&self) -> Buffer<T> {
        Buffer::new(
            self.input.lead,
            self.groups.iter().map(|_| T::of(-77.0)),
            T::of(-77.0),
        )
    }

    /// `got` against `expected` of each element.
    fn compare(
        &self,
        what: &str,
        got: &Buffer<T>,
        expected: impl Fn(usize) -> C,
    ) -> Result<(), TestCaseError> {
        for (i, &value) in got.elements().iter().enumerate() {
            let expected = T::round(expected(i));
            prop_assert!(
                value.same(expected),
                "{what}: element {i}: {value:?}, expected {expected:?}"
            );
        }
        prop_assert!(
            got.memory[..got.lead].iter().all(|&v| v.same(T::of(-77.0))),
            "{what}: wrote before its output"
        );
        Ok(())
    }

    /// Sums per encoding against those of `term`, added up in float64.
    fn compare_sums(
        &self,
        what: &str,
        got: &[f64],
        term: impl Fn(usize) -> C,
    ) -> Result<(), TestCaseError> {
        let mut sums = vec![(0.0, 0.0); self.scale.len()];
        for (i, &group) in self.groups.iter().enumerate() {
            let term = term(i).to_f64();
            sums[group].0 += term;
            sums[group].1 += term.abs();
        }
        for (group, (&got, (sum, magnitude))) in got.iter().zip(sums).enumerate() {
            // Lanes add up at most 256 terms in float32, and overflow where float64 does not.
            let close = (got - sum).abs() <= 256.0 * f64::from(f32::EPSILON) * magnitude;
            let overflowed = !got.is_finite() && magnitude > f64::from(f32::MAX);
            prop_assert!(
                close || overflowed || (got.is_nan() && sum.is_nan()),
                "{what}: sum {group}: {got}, expected {sum}"
            );
        }
        Ok(())
    }
}

fn check_affine<O: Reference, T: Stored<C>, C: Compute>(case: &Case) -> Result<(), TestCaseError> {
    let data = Data::<T, C>::new(case);
    let grid = AffineGrid::new(
        -3,
        12,
        if O::SHIFTS && case.seed.is_multiple_of(2) {
            0.5
        } else {
            0.0
        },
    )
    .unwrap();
    let encodings = Encodings {
        scale: &data.scale,
        offset: &data.offset,
    };
    with_every_isa(|isa| {
        let what = format!("{} {isa:?}", std::any::type_name::<O>());
        let at = |i: usize| {
            let group = data.groups[i];
            (
                data.input.elements()[i].get(),
                data.scale[group],
                data.offset[group],
            )
        };
        let mut output = data.output();
        // SAFETY: all buffers have `numel` elements.
        unsafe {
            affine::forward::<O, T, C>(
                &data.geometry,
                encodings,
                &grid,
                data.input.elements().as_ptr(),
                output.elements_mut().as_mut_ptr(),
            );
        }
        data.compare(&what, &output, |i| {
            let (x, s, o) = at(i);
            O::value_of(x, s, o, &grid)
        })?;
        // In place.
        output.elements_mut().copy_from_slice(data.input.elements());
        let place = output.elements_mut().as_mut_ptr();
        // SAFETY: input and output are the same place.
        unsafe { affine::forward::<O, T, C>(&data.geometry, encodings, &grid, place, place) };
        data.compare(&what, &output, |i| {
            let (x, s, o) = at(i);
            O::value_of(x, s, o, &grid)
        })?;

        let (g, x) = (
            data.grad.elements().as_ptr(),
            data.input.elements().as_ptr(),
        );
        let mut grad_input = data.output();
        let mut scale_only = data.output();
        // SAFETY: as above.
        let (sums, scale_sums) = unsafe {
            let gx = grad_input.elements_mut().as_mut_ptr();
            let sums = affine::backward::<O, T, C, 2>(&data.geometry, encodings, &grid, g, x, gx);
            let gx = scale_only.elements_mut().as_mut_ptr();
            let scale_sums =
                affine::backward::<O, T, C, 1>(&data.geometry, encodings, &grid, g, x, gx);
            (sums, scale_sums)
        };
        let gradients = |i: usize| {
            let (x, s, o) = at(i);
            O::gradients_of(data.grad.elements()[i].get(), x, s, o, &grid)
        };
        data.compare(&what, &grad_input, |i| gradients(i).0)?;
        data.compare(&what, &scale_only, |i| gradients(i).0)?;
        for (both, [alone]) in sums.iter().zip(scale_sums) {
            // Any NaN is as good as another.
            let same = both[0] == alone || (both[0].is_nan() && alone.is_nan());
            prop_assert!(same, "{what}: {} {alone}", both[0]);
        }
        let (to_scale, to_offset): (Vec<f64>, Vec<f64>) =
            sums.into_iter().map(<(f64, f64)>::from).unzip();
        data.compare_sums(&what, &to_scale, |i| gradients(i).1)?;
        data.compare_sums(&what, &to_offset, |i| gradients(i).2)
    })
}

/// The definition of an affine op, as `docs/numerics.md` states it.
trait Reference: AffineOp {
    const SHIFTS: bool = false;
    fn value_of<C: Compute>(x: C, s: C, o: C, grid: &AffineGrid) -> C;
    fn gradients_of<C: Compute>(g: C, x: C, s: C, o: C, grid: &AffineGrid) -> (C, C, C);
}

fn ends<C: Compute>(grid: &AffineGrid) -> (C, C, C) {
    (
        C::from_f64(grid.qmin() as f64),
        C::from_f64(grid.qmax() as f64),
        C::from_f64(grid.zero_point_shift()),
    )
}

fn clamp<C: Compute>(x: C, low: C, high: C) -> C {
    match () {
        () if x < low => low,
        () if x > high => high,
        () => x,
    }
}

impl Reference for Quantize {
    fn value_of<C: Compute>(x: C, s: C, o: C, grid: &AffineGrid) -> C {
        let (qmin, qmax, _) = ends(grid);
        clamp((x / s).round::<Portable>() - o, qmin, qmax)
    }
    fn gradients_of<C: Compute>(g: C, x: C, s: C, o: C, grid: &AffineGrid) -> (C, C, C) {
        let (qmin, qmax, _) = ends::<C>(grid);
        let q = (x / s).round::<Portable>() - o;
        if q >= qmin && q <= qmax {
            (g / s, -(g / s * (x / s)), -g)
        } else {
            (C::ZERO, C::ZERO, C::ZERO)
        }
    }
}

impl Reference for Dequantize {
    fn value_of<C: Compute>(x: C, s: C, o: C, _: &AffineGrid) -> C {
        (x + o) * s
    }
    fn gradients_of<C: Compute>(g: C, x: C, s: C, o: C, _: &AffineGrid) -> (C, C, C) {
        (g * s, g * (x + o), g * s)
    }
}

impl Reference for QuantizeDequantize {
    const SHIFTS: bool = true;
    fn value_of<C: Compute>(x: C, s: C, o: C, grid: &AffineGrid) -> C {
        let (qmin, qmax, shift) = ends(grid);
        (clamp((x / s - shift).round::<Portable>() - o, qmin, qmax) + (o + shift)) * s
    }
    fn gradients_of<C: Compute>(g: C, x: C, s: C, o: C, grid: &AffineGrid) -> (C, C, C) {
        let (qmin, qmax, shift) = ends::<C>(grid);
        let t = x / s - shift;
        let r = t.round::<Portable>();
        if r - o >= qmin && r - o <= qmax {
            (g, g * (r - t), C::ZERO)
        } else {
            (C::ZERO, g * clamp(r, qmin + o, qmax + o), g * s)
        }
    }
}

fn check_float<O: FloatOp, T: Stored<C>, C: Compute>(
    case: &Case,
    format: &FloatFormat,
) -> Result<(), TestCaseError> {
    let data = Data::<T, C>::new(case);
    let dequantizes =
        std::any::TypeId::of::<O>() == std::any::TypeId::of::<FloatQuantizeDequantize>();
    // Exact in the compute type, which holds the format's values.
    let nearest = |x: C| C::from_f64(float::definition(x.to_f64(), format));
    let max = C::from_f64(format.max());
    with_every_isa(|isa| {
        let what = format!("{} {isa:?}", std::any::type_name::<O>());
        let at = |i: usize| (data.input.elements()[i].get(), data.scale[data.groups[i]]);
        let mut output = data.output();
        // SAFETY: all buffers have `numel` elements.
        unsafe {
            float::forward::<O, T, C>(
                &data.geometry,
                &data.scale,
                format,
                data.input.elements().as_ptr(),
                output.elements_mut().as_mut_ptr(),
            );
        }
        data.compare(&what, &output, |i| {
            let (x, s) = at(i);
            let value = nearest(x / s);
            if dequantizes {
                value * s
            } else {
                value
            }
        })?;
        let mut grad_input = data.output();
        // SAFETY: as above.
        let sums = unsafe {
            float::backward::<O, T, C>(
                &data.geometry,
                &data.scale,
                format,
                data.grad.elements().as_ptr(),
                data.input.elements().as_ptr(),
                grad_input.elements_mut().as_mut_ptr(),
            )
        };
        let gradients = |i: usize| {
            let ((x, s), g) = (at(i), data.grad.elements()[i].get());
            let (ratio, value) = (x / s, nearest(x / s));
            let inside = ratio >= -max && ratio <= max;
            match (dequantizes, inside) {
                (true, true) => (g, g * (value - ratio)),
                (true, false) => (C::ZERO, g * value),
                (false, true) => (g / s, -(g / s * ratio)),
                (false, false) => (C::ZERO, C::ZERO),
            }
        };
        data.compare(&what, &grad_input, |i| gradients(i).0)?;
        data.compare_sums(&what, sums.as_flattened(), |i| gradients(i).1)
    })
}

fn check_min_max<T: Stored<C>, C: Compute>(case: &Case) -> Result<(), TestCaseError> {
    let data = Data::<T, C>::new(case);
    let mut expected = vec![(f64::INFINITY, f64::NEG_INFINITY, false); data.scale.len()];
    for (x, &group) in data.input.elements().iter().zip(&data.groups) {
        let (x, entry) = (x.get().to_f64(), &mut expected[group]);
        *entry = (entry.0.min(x), entry.1.max(x), entry.2 || x.is_nan());
    }
    with_every_isa(|isa| {
        // SAFETY: the input has `numel` elements.
        let got = unsafe { min_max::<T, C>(&data.geometry, data.input.elements().as_ptr()) };
        for (&(low, high), &(want_low, want_high, nan)) in got.iter().zip(&expected) {
            let (low, high) = (low.to_f64(), high.to_f64());
            let right = if nan {
                low.is_nan() && high.is_nan()
            } else {
                low == want_low && high == want_high
            };
            prop_assert!(
                right,
                "{isa:?}: {low} {high}, expected {want_low} {want_high}, NaN {nan}"
            );
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn affine_kernels(case in cases()) {
        check_affine::<Quantize, f32, f32>(&case)?;
        check_affine::<Quantize, f64, f64>(&case)?;
        check_affine::<Quantize, f16, f32>(&case)?;
        check_affine::<Quantize, bf16, f32>(&case)?;
        check_affine::<Dequantize, f32, f32>(&case)?;
        check_affine::<Dequantize, f16, f32>(&case)?;
        check_affine::<QuantizeDequantize, f32, f32>(&case)?;
        check_affine::<QuantizeDequantize, f64, f64>(&case)?;
        check_affine::<QuantizeDequantize, f32, f64>(&case)?;
        check_affine::<QuantizeDequantize, f16, f32>(&case)?;
        check_affine::<QuantizeDequantize, bf16, f32>(&case)?;
    }

    #[test]
    fn float_kernels(case in cases(), fields in prop::sample::select(vec![
        (4, 3, true, false), (5, 2, false, false), (2, 1, true, false), (8, 7, false, false), (3, 0, true, true),
    ])) {
        let (exponent, mantissa, finite, unsigned_zero) = fields;
        let format = FloatFormat::new(exponent, mantissa, finite, unsigned_zero).unwrap();
        check_float::<FloatQuantize, f32, f32>(&case, &format)?;
        check_float::<FloatQuantize, bf16, f32>(&case, &format)?;
        check_float::<FloatQuantizeDequantize, f32, f32>(&case, &format)?;
        check_float::<FloatQuantizeDequantize, f64, f64>(&case, &format)?;
        check_float::<FloatQuantizeDequantize, f16, f32>(&case, &format)?;
    }

    #[test]
    fn min_max_kernel(case in cases()) {
        check_min_max::<f32, f32>(&case)?;
        check_min_max::<f64, f64>(&case)?;
        check_min_max::<f16, f32>(&case)?;
        check_min_max::<bf16, f32>(&case)?;
    }
}

/// Tensors that several threads and chunks share.
#[test]
fn long_tensors() {
    for (sizes, encoding) in [
        ([3, 40_000], [3, 1]),
        ([40_000, 3], [1, 3]),
        ([1, 100_003], [1, 1]),
    ] {
        let block = [sizes[0] / encoding[0], sizes[1] / encoding[1]];
        let case = Case {
            sizes: sizes.to_vec(),
            strides: vec![sizes[1], 1],
            encoding: encoding.to_vec(),
            block: block.to_vec(),
            lead: 1,
            seed: 11,
        };
        check_affine::<QuantizeDequantize, f32, f32>(&case).unwrap();
        check_affine::<QuantizeDequantize, bf16, f32>(&case).unwrap();
        let format = FloatFormat::new(4, 3, true, false).unwrap();
        check_float::<FloatQuantizeDequantize, f32, f32>(&case, &format).unwrap();
        check_min_max::<f32, f32>(&case).unwrap();
    }
}
