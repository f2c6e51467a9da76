//! The kernels over arrays of encodings: ranges to scales and offsets, and the scales of grouped blocks.

use super::super::grouped_block;
use super::super::{range_to_scale_offset, range_to_scale_offset_backward, ScaleOffsetGradients};
use super::{cases, clamp, config, with_every_isa, Buffer, Case, Stored, Values};
use crate::encoding::{minimum_scale, AffineGrid};
use crate::kernels::cpu::isa::Portable;
use crate::kernels::cpu::Compute;
use proptest::prelude::*;

/// `got` against `expected`: the same number, or both NaN.
fn same<C: Stored<C> + Compute>(
    what: &str,
    got: &[C],
    expected: &[C],
) -> Result<(), TestCaseError> {
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        prop_assert!(
            got.same(expected),
            "{what}: {i}: {got:?}, expected {expected:?}"
        );
    }
    Ok(())
}

/// Scale and offset of a range, as `docs/numerics.md` states them.
fn scale_offset<C: Compute>(min: C, max: C, grid: &AffineGrid, symmetric: bool) -> (C, C) {
    let constant = |value: i64| C::from_f64(value as f64);
    let least = C::from_f64(minimum_scale(grid.num_steps()));
    let step = (max - min) / constant(grid.num_steps());
    let magnitude = if step < C::ZERO { -step } else { step };
    let scale = if magnitude < least { least } else { magnitude };
    let offset = (min / scale).round::<Portable>() - constant(grid.qmin());
    if symmetric {
        (scale, C::from_f64(grid.symmetric_offset()))
    } else {
        let (low, high) = (constant(-grid.qmax()), constant(-grid.qmin()));
        (scale, clamp(offset, low, high))
    }
}

/// The gradients of min and max, as `docs/numerics.md` states them.
fn range_gradients<C: Compute>(
    (min, max): (C, C),
    (grad_scale, grad_offset): (f64, f64),
    grid: &AffineGrid,
    symmetric: bool,
) -> (f64, f64) {
    let (scale, _) = scale_offset(min, max, grid, true);
    let unclamped = ((min / scale).round::<Portable>() - C::from_f64(grid.qmin() as f64)).to_f64();
    let free =
        !symmetric && unclamped >= -(grid.qmax() as f64) && unclamped <= -(grid.qmin() as f64);
    let s = scale.to_f64();
    let (direct, g) = if free {
        (
            grad_offset / s,
            grad_scale - grad_offset * min.to_f64() / (s * s),
        )
    } else {
        (0.0, grad_scale)
    };
    let steps = grid.num_steps() as f64;
    let u = ((max - min) / C::from_f64(steps)).to_f64();
    let least = C::from_f64(minimum_scale(grid.num_steps())).to_f64();
    let slope = if u.abs() < least {
        0.0
    } else {
        u.signum() / steps
    };
    (direct - g * slope, g * slope)
}

fn check_range<C: Stored<C> + Compute>(
    (n, lead, seed): (usize, usize, u64),
    grid: &AffineGrid,
    symmetric: bool,
) -> Result<(), TestCaseError> {
    let mut values = Values(seed);
    let mut array = |hostile: bool| {
        let elements: Vec<C> = (0..n)
            .map(|_| {
                C::of(if hostile {
                    values.hostile()
                } else {
                    values.uniform(-2.0, 2.0)
                })
            })
            .collect();
        Buffer::new(lead, elements.into_iter(), C::of(7.0))
    };
    let [min, max] = [array(true), array(true)];
    let [grad_scale, grad_offset] = [array(false), array(false)];
    let result = || Buffer::new(lead, vec![C::of(-77.0); n].into_iter(), C::of(-77.0));
    let range = |i: usize| (min.elements()[i], max.elements()[i]);
    let grad = |i: usize| {
        (
            grad_scale.elements()[i].to_f64(),
            grad_offset.elements()[i].to_f64(),
        )
    };
    let sums: Vec<[f64; 2]> = (0..n).map(|i| <[f64; 2]>::from(grad(i))).collect();
    with_every_isa(|isa| {
        let what = format!("{isa:?} {grid:?} symmetric {symmetric}");
        let (expected_scale, expected_offset): (Vec<C>, Vec<C>) = (0..n)
            .map(|i| scale_offset(range(i).0, range(i).1, grid, symmetric))
            .unzip();
        let (mut scale, mut offset) = (result(), result());
        range_to_scale_offset(
            min.elements(),
            max.elements(),
            grid,
            symmetric,
            scale.elements_mut(),
            offset.elements_mut(),
        );
        same(&what, scale.elements(), &expected_scale)?;
        same(&what, offset.elements(), &expected_offset)?;

        let (expected_min, expected_max): (Vec<C>, Vec<C>) = (0..n)
            .map(|i| {
                let (to_min, to_max) = range_gradients(range(i), grad(i), grid, symmetric);
                (C::from_f64(to_min), C::from_f64(to_max))
            })
            .unzip();
        let scale_sums: Vec<[f64; 1]> = sums.iter().map(|&[scale, _]| [scale]).collect();
        let (min, max) = (min.elements(), max.elements());
        let (gs, go) = (grad_scale.elements(), grad_offset.elements());
        let backward = |way: usize, places: [*mut C; 2]| {
            let sums = ScaleOffsetGradients::Sums(&sums);
            let scale_sums = ScaleOffsetGradients::Sums(&scale_sums);
            let arrays = ScaleOffsetGradients::<C, 2>::Arrays(gs, go);
            // SAFETY: each place is null or has `n` elements.
            unsafe {
                match way {
                    0 => range_to_scale_offset_backward(min, max, grid, symmetric, sums, places),
                    1 => range_to_scale_offset_backward(min, max, grid, symmetric, arrays, places),
                    _ => range_to_scale_offset_backward(min, max, grid, true, scale_sums, places),
                }
            }
        };
        for way in 0..(if symmetric { 3 } else { 2 }) {
            let (mut grad_min, mut grad_max) = (result(), result());
            let places = [
                grad_min.elements_mut().as_mut_ptr(),
                grad_max.elements_mut().as_mut_ptr(),
            ];
            backward(way, places);
            same(&what, grad_min.elements(), &expected_min)?;
            same(&what, grad_max.elements(), &expected_max)?;
            // One alone.
            let mut alone = result();
            let places = [std::ptr::null_mut(), alone.elements_mut().as_mut_ptr()];
            backward(way, places);
            same(&what, alone.elements(), &expected_max)?;
        }
        Ok(())
    })
}

/// Block scales in groups: the encodings of `case` are the groups.
fn check_grouped_block<C: Stored<C> + Compute>(
    case: &Case,
    levels: i64,
) -> Result<(), TestCaseError> {
    let geometry = case.geometry();
    let n = geometry.numel();
    let group_of: Vec<usize> = (0..n).map(|i| geometry.group_of(i)).collect();
    let mut values = Values(case.seed);
    let mut array = |n: usize, hostile: bool| {
        let elements: Vec<C> = (0..n)
            .map(|_| match hostile {
                // Scales are positive; few values, so that groups have several largest ones.
                true => C::of(values.hostile().abs()),
                false => C::of(values.uniform(-1.0, 1.0)),
            })
            .collect();
        Buffer::new(case.lead, elements.into_iter(), C::of(7.0))
    };
    let (scale, grad) = (array(n, true), array(n, false));
    let grad_group = array(geometry.num_groups(), false);
    let (scale, grad, grad_group) = (scale.elements(), grad.elements(), grad_group.elements());

    // The definition of `docs/numerics.md`.
    let mut largest = vec![-C::INFINITY; geometry.num_groups()];
    for (&s, &group) in scale.iter().zip(&group_of) {
        if s.is_nan() || s > largest[group] {
            largest[group] = if largest[group].is_nan() {
                largest[group]
            } else {
                s
            };
        }
    }
    let of_levels = |value: i64| C::from_f64(value as f64);
    let group_scale: Vec<C> = largest.iter().map(|&s| s / of_levels(levels)).collect();
    let (one, most) = (of_levels(1), of_levels(levels.max(2)));
    let expected: Vec<C> = (0..n)
        .map(|i| {
            let unit = group_scale[group_of[i]];
            clamp((scale[i] / unit).round::<Portable>(), one, most) * unit
        })
        .collect();
    let mut terms = vec![(0.0, 0.0); largest.len()];
    let mut ties = vec![0_u32; largest.len()];
    let mut direct = vec![C::ZERO; n];
    for i in 0..n {
        let group = group_of[i];
        let quotient = scale[i] / group_scale[group];
        let rounded = quotient.round::<Portable>();
        let inside = rounded >= one && rounded <= most;
        let slope = if inside {
            rounded - quotient
        } else {
            clamp(rounded, one, most)
        };
        let term = (grad[i] * slope).to_f64();
        terms[group] = (terms[group].0 + term, terms[group].1 + term.abs());
        ties[group] += u32::from(scale[i] == largest[group]);
        direct[i] = if inside { grad[i] } else { C::ZERO };
    }

    with_every_isa(|isa| {
        let what = format!("{isa:?} levels {levels}");
        let result = || Buffer::new(case.lead, vec![C::of(-77.0); n].into_iter(), C::of(-77.0));
        let mut snapped = result();
        let groups =
            grouped_block::forward(&geometry, levels, scale, snapped.elements_mut()).unwrap();
        same(&what, &groups, &group_scale)?;
        same(&what, snapped.elements(), &expected)?;

        let mut output = result();
        let place = output.elements_mut();
        grouped_block::backward(&geometry, levels, scale, grad, grad_group, place).unwrap();
        for i in 0..n {
            let group = group_of[i];
            let (mut wanted, mut tolerance) = (direct[i].to_f64(), 0.0);
            if scale[i] == largest[group] {
                let (sum, magnitude) = terms[group];
                let to_group = grad_group[group].to_f64();
                let share = 1.0 / (levels as f64 * f64::from(ties[group]));
                wanted += (sum + to_group) * share;
                // Sums of up to 256 terms in the compute type.
                tolerance = 256.0 * f64::from(f32::EPSILON) * (magnitude + to_group.abs() + 1.0);
            }
            let got = output.elements()[i].to_f64();
            prop_assert!(
                (got - wanted).abs() <= tolerance
                    || got == wanted
                    || (got.is_nan() && wanted.is_nan()),
                "{what}: {i}: {got}, expected {wanted}"
            );
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn range_kernels(
        place in (0_usize..70, 0_usize..5, any::<u64>()),
        (qmin, qmax) in prop::sample::select(vec![(-8, 7), (0, 255), (0, 1), (-128, 127), (-2_147_483_648, 2_147_483_647)]),
        symmetric: bool,
    ) {
        let grid = AffineGrid::new(qmin, qmax, 0.0).unwrap();
        check_range::<f64>(place, &grid, symmetric)?;
        // Wider grids are computed in float64.
        if qmax < 1 << 24 {
            check_range::<f32>(place, &grid, symmetric)?;
        }
    }

    #[test]
    fn grouped_block_kernels(case in cases(), levels in prop::sample::select(vec![1_i64, 2, 16, 256])) {
        check_grouped_block::<f32>(&case, levels)?;
        check_grouped_block::<f64>(&case, levels)?;
    }
}

/// Ranges that several threads share.
#[test]
fn many_ranges() {
    let grid = AffineGrid::new(-8, 7, 0.0).unwrap();
    for symmetric in [false, true] {
        check_range::<f32>((100_003, 1, 5), &grid, symmetric).unwrap();
    }
}
