//! The quadratic losses of a layer that is one block: only candidates that can win are computed.
//!
//! A [sketch](super::super::sketch) of the inputs gives a lower bound of every candidate's error at a small part of the cost.
//! Candidates are then computed exactly in the order of what they promise, and no further once the bounds of
//! the rest are above the least error found: the choice is that of computing all of them. Errors come
//! from the layer's own forward pass with the weights' changes in place of its weights, or from the Gram matrix,
//! whichever counts fewer operations for the candidates that are left; of the matrix's [factor](super::factor), a part
//! is enough to exclude many.

use super::super::pieces::Pieces;
use super::super::sketch::{dominant_directions, whitening};
use super::factor::Factor;
use super::forward::{channel_errors, outputs, ForwardPasses};
use super::{
    InputSymmetry, Loss, Losses, Method, Progress, Search, Sums, LEAST_MEMORY, MOST_MEMORY,
};
use crate::error::{Error, Result};
use crate::kernels::cpu::seq_mse::{project_changes, Candidates, DIRECTIONS};
use crate::ops::{quantize_dequantize, range_to_scale_offset, reconstruction_error, row_dot};
use crate::ptq::linear_map::{compute_kind, LinearMap};
use std::cmp::Ordering;
use tch::{Device, Kind, Tensor};

/// Bounds are float32 sums: a candidate is left out only if its bound is larger by this share than the least error.
const MARGIN: f64 = 1e-3;
/// The sketch and products with it are float32 sums: what is lost of a product, as a share of the lengths of its factors.
/// Matters where a change is almost at a right angle to all inputs, as when these are close to one another.
const ROUNDING: f64 = 2e-5;
/// An error by the Gram matrix that is below this share of the change's energy times that of a column is computed by
/// a forward pass: some 2e-6 of that energy was seen to be lost of a quadratic form, where its products cancel.
const CANCELLED: f64 = 1e-2;
/// Input rows that the directions of the sketch are found on, and elements of them, at most.
const SAMPLE: i64 = 256;
const SAMPLE_ELEMENTS: i64 = 1 << 19;
/// Samples that a convolution's come from, at least.
const SAMPLES: i64 = 4;
/// A sketch with less than this share of the inputs' energy excludes about half of the candidates.
const FEW_EXCLUDED: f64 = 0.5;
/// Filters that a convolution computes at a time: up to a multiple, more come at no cost.
const FILTERS: usize = 16;
/// What it costs to copy an element of a convolution's input into its rows, in multiplications of a matrix product.
const COPY: f64 = 128.0;

/// Whether a layer is one block and its loss quadratic.
pub(super) fn applies(search: &Search<'_>) -> bool {
    search.layout.groups * search.layout.blocks == 1
        && search.problem.quantizer.grouping.is_none()
        && search.config.loss != Loss::L1
}

/// The loss of every candidate that can win, and of those that are chosen; infinite for the others. `None` if the
/// inputs are not finite, or if it costs less to compute all.
pub(super) fn losses(search: &Search<'_>, progress: &mut Progress<'_>) -> Result<Option<Losses>> {
    let layer = OneBlock::new(search)?;
    let sample = layer.sample()?;
    let Some(basis) = dominant_directions(&sample)? else {
        return Ok(None);
    };
    if layer.all_cost_less(&sample, &basis)? {
        return Ok(None);
    }
    let Some(sketch) = layer.sketch(&sample, &basis)? else {
        return Ok(None);
    };
    let mut bounds = layer.bounds(&sketch)?;
    let (mut errors, method) = layer.errors(&sketch, bounds.mean_survivors(), progress)?;
    let mut found = Found::new(&bounds);
    let shape = &search.problem.quantizer.shape;
    let tensors = |found: &Found| -> Result<Vec<Tensor>> {
        let tensor = |losses: &Vec<f64>| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(losses)?
                .f_reshape(shape)?
                .f_to_device(search.weight.device())?)
        };
        found.losses.iter().map(tensor).collect()
    };
    loop {
        let mut wanted = found.most_promising(&bounds, matches!(errors, Errors::Factor(..)));
        let mut known = Some(found.best.clone());
        if wanted.is_empty() && search.config.shared_axis.is_some() {
            // The widest of the choices may be one that an encoding's own bound excludes.
            let best = search.best(&tensors(&found)?)?;
            let best = Vec::<i64>::try_from(best.f_reshape([-1])?)?;
            wanted = best.iter().map(|&i| i as usize).enumerate().collect();
            wanted.retain(|&(encoding, candidate)| found.losses[candidate][encoding].is_infinite());
            known = None;
        }
        if wanted.is_empty() {
            break;
        }
        // At most as many rows as the weight has.
        for pairs in wanted.chunks(layer.num_encodings) {
            let results = layer.exact(pairs, &mut errors, &sketch.signal, known.as_deref())?;
            for (&(encoding, candidate), result) in pairs.iter().zip(results) {
                match result {
                    Computed::Exact(loss) => found.enter(encoding, candidate, loss),
                    Computed::AtLeast(bound) => bounds.lower[candidate][encoding] = bound,
                }
            }
            progress(search.ranges.len() as u32)?;
        }
    }
    Ok(Some(Losses {
        losses: tensors(&found)?,
        before: found.of_the_last(&bounds, sketch.target.is_some()),
        method,
    }))
}

/// Bounds and estimates of the losses, `[candidates][encodings]`.
struct Bounds {
    lower: Vec<Vec<f64>>,
    estimates: Vec<Vec<f64>>,
}

impl Bounds {
    /// Candidates of an encoding whose bounds are below the least estimate, on average.
    fn mean_survivors(&self) -> f64 {
        let num_encodings = self.lower[0].len();
        let survivors: usize = (0..num_encodings)
            .map(|encoding| {
                let estimates = self.estimates.iter().map(|losses| losses[encoding]);
                let least = estimates.fold(f64::INFINITY, f64::min);
                let survives = |losses: &&Vec<f64>| losses[encoding] <= least;
                self.lower.iter().filter(survives).count()
            })
            .sum();
        survivors as f64 / num_encodings as f64
    }
}

/// What is known exactly.
struct Found {
    /// `[candidates][encodings]`; infinite where not computed.
    losses: Vec<Vec<f64>>,
    /// The least of each encoding.
    best: Vec<f64>,
}

impl Found {
    fn new(bounds: &Bounds) -> Self {
        let num_encodings = bounds.lower[0].len();
        Self {
            losses: vec![vec![f64::INFINITY; num_encodings]; bounds.lower.len()],
            best: vec![f64::INFINITY; num_encodings],
        }
    }

    /// Pairs (encoding, candidate) to compute next: the most promising candidate of each encoding that has one left,
    /// or, once few encodings have, all that are left. `at_once`: also once each encoding has a loss.
    fn most_promising(&self, bounds: &Bounds, at_once: bool) -> Vec<(usize, usize)> {
        let promise = |encoding: usize, candidate: usize| bounds.estimates[candidate][encoding];
        let left = |encoding: usize| {
            let is_left = |&candidate: &usize| {
                let order = bounds.lower[candidate][encoding].partial_cmp(&self.best[encoding]);
                // Also where one of the two is NaN.
                self.losses[candidate][encoding].is_infinite() && order != Some(Ordering::Greater)
            };
            let mut left: Vec<usize> = (0..self.losses.len()).filter(is_left).collect();
            left.sort_by(|&a, &b| promise(encoding, a).total_cmp(&promise(encoding, b)));
            (encoding, left)
        };
        let num_encodings = self.best.len();
        let mut left: Vec<(usize, Vec<usize>)> = (0..num_encodings).map(left).collect();
        left.retain(|(_, candidates)| !candidates.is_empty());
        let at_once = at_once && self.best.iter().all(|best| best.is_finite());
        if at_once || 4 * left.len() <= num_encodings {
            let pairs = |(encoding, candidates): (usize, Vec<usize>)| {
                candidates.into_iter().map(move |c| (encoding, c))
            };
            return left.into_iter().flat_map(pairs).collect();
        }
        let filled = left.len().next_multiple_of(FILTERS).min(num_encodings);
        let mut seconds: Vec<(f64, (usize, usize))> = left
            .iter()
            .filter(|(_, candidates)| candidates.len() > 1)
            .map(|(encoding, candidates)| {
                let (first, second) = (candidates[0], candidates[1]);
                let ratio = promise(*encoding, second) / promise(*encoding, first);
                (ratio, (*encoding, second))
            })
            .collect();
        seconds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let firsts = left
            .iter()
            .map(|(encoding, candidates)| (*encoding, candidates[0]));
        let seconds = seconds
            .into_iter()
            .map(|(_, pair)| pair)
            .take(filled - left.len());
        firsts.chain(seconds).collect()
    }

    /// The sum of the last candidate's losses. One that was not computed is taken to differ from its estimate as the
    /// best one does: by the same number where the outputs compared with come from other inputs, since that
    /// difference is the same for all candidates, else by the same share of what is above the bound.
    fn of_the_last(&self, bounds: &Bounds, asymmetric: bool) -> f64 {
        let last = self.losses.len() - 1;
        let of = |encoding: usize| {
            let known = self.losses[last][encoding];
            if known.is_finite() {
                return known;
            }
            let (lower, estimate) = (
                bounds.lower[last][encoding],
                bounds.estimates[last][encoding],
            );
            let best = (0..last).find(|&i| self.losses[i][encoding] == self.best[encoding]);
            let Some(best) = best else {
                return estimate;
            };
            let above = |i: usize| bounds.estimates[i][encoding] - bounds.lower[i][encoding];
            let guess = if asymmetric {
                estimate + self.best[encoding] - bounds.estimates[best][encoding]
            } else {
                let of_best = self.best[encoding] - bounds.lower[best][encoding];
                lower + above(last) * of_best / above(best).max(f64::MIN_POSITIVE)
            };
            guess.max(lower)
        };
        (0..self.best.len()).map(of).sum()
    }

    fn enter(&mut self, encoding: usize, candidate: usize, loss: f64) {
        self.losses[candidate][encoding] = loss;
        self.best[encoding] = self.best[encoding].min(loss);
    }
}

/// The sketch's part in the errors, and what is measured along with it.
struct Sketch {
    /// `[r, K]`
    directions: Tensor,
    /// The part of the shift (see [`OneBlock::pieces`]) along the directions: `[out, r]`.
    target: Option<Tensor>,
    /// Mean energy of the inputs outside the directions, per column: an estimate.
    rest: f64,
    /// Energy of each output, float64, for [`Loss::Sqnr`].
    signal: Tensor,
    num_rows: i64,
}

/// Where exact errors come from.
enum Errors<'a> {
    ForwardPasses(ForwardPasses<'a>),
    Sums(Sums),
    /// The Gram matrix has been factorized, and nothing is to be added to its quadratic form.
    Factor(Sums, Factor),
}

/// A candidate's loss.
enum Computed {
    Exact(f64),
    /// It was left when it was known to be more than another's.
    AtLeast(f64),
}

struct OneBlock<'a> {
    search: &'a Search<'a>,
    map: &'a LinearMap,
    /// Inputs of the quantized weights; if the other model's differ, also the difference that they make at the
    /// outputs, `W x - W x'` (see [`outputs`]).
    pieces: Pieces<'a>,
    /// The weight's axis of output channels.
    out_axis: i64,
    num_encodings: usize,
    /// Ends of the candidates' ranges: `[candidates][encodings]`.
    ranges: Vec<(Vec<f32>, Vec<f32>)>,
}

impl<'a> OneBlock<'a> {
    fn new(search: &'a Search<'a>) -> Result<Self> {
        let map = search.problem.map;
        let prepare = move |piece: Vec<Tensor>| -> Result<Vec<Tensor>> {
            let padded = piece.iter().map(|input| map.padded(input));
            let mut piece = padded.collect::<Result<Vec<_>>>()?;
            if let [quant, float] = piece.as_slice() {
                let shift = outputs(map, &(float - quant), search.weight)?;
                piece.insert(1, shift);
            }
            Ok(piece)
        };
        let inputs = match search.config.symmetry {
            InputSymmetry::Asym => 2.0,
            InputSymmetry::Symqt | InputSymmetry::Symfp => 1.0,
        };
        // Joined and padded; outputs, what they are compared with, and the library's own copy of both in its layout.
        let elements = |input, outputs, _| (2.0 + inputs) * input + (1.0 + inputs) * outputs;
        let values = |t: &Tensor| -> Result<Vec<f32>> { Ok(Vec::try_from(t.f_reshape([-1])?)?) };
        Ok(Self {
            search,
            map,
            pieces: search.pieces(elements, prepare)?,
            out_axis: i64::from(map.transposed()),
            num_encodings: search.layout.out_encodings as usize,
            ranges: search
                .ranges
                .iter()
                .map(|(min, max)| Ok((values(min)?, values(max)?)))
                .collect::<Result<_>>()?,
        })
    }

    fn zeros(&self, size: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_zeros(
            size,
            (Kind::Double, self.search.weight.device()),
        )?)
    }

    /// Rows from all over the first piece; a convolution's are those of a few samples.
    fn sample(&self) -> Result<Tensor> {
        let weight = self.search.weight;
        let columns = self.search.layout.columns;
        let wanted = (SAMPLE_ELEMENTS / columns).clamp(4 * DIRECTIONS as i64, SAMPLE);
        let mut rows = None;
        self.pieces.for_each(|piece| {
            if rows.is_some() {
                return Ok(());
            }
            let few = match self.map {
                LinearMap::Linear => piece[0].shallow_clone(),
                LinearMap::Convolution { .. } => {
                    let samples = piece[0].size()[0];
                    let one = self.map.num_rows_of_input(&piece[0], weight) / samples.max(1);
                    let few = (wanted / one.max(1)).max(SAMPLES);
                    piece[0].f_slice(0, None, None, (samples / few).max(1))?
                }
            };
            let found = self.map.rows(&few, weight)?.f_squeeze_dim(0)?;
            let step = (found.size()[0] / wanted).max(1);
            rows = Some(found.f_slice(0, None, None, step)?.f_contiguous()?);
            Ok(())
        })?;
        rows.ok_or_else(|| Error::value("inputs", "at least one batch", "none"))
    }

    /// Whether computing all candidates by the Gram matrix costs less than finding out which can be left: where the
    /// sketch takes more operations than all their products with that matrix, and would leave about half of them, too
    /// many for forward passes.
    fn all_cost_less(&self, sample: &Tensor, basis: &Tensor) -> Result<bool> {
        let layout = self.search.layout;
        let (rows, columns) = (self.search.num_rows()?, layout.columns as f64);
        let products = self.ranges.len() as f64 * layout.out as f64;
        if products * columns > 2.0 * DIRECTIONS as f64 * rows {
            return Ok(false);
        }
        let share = square_sum(&sample.f_matmul(basis)?)? / square_sum(sample)?;
        let left = 0.5 * products;
        let by_gram = rows * (0.5 * columns + self.copy_cost()) + products * columns;
        Ok(share < FEW_EXCLUDED && by_gram < left * rows)
    }

    /// What it costs to make an element of a row, see [`COPY`].
    fn copy_cost(&self) -> f64 {
        match self.map {
            LinearMap::Linear => 0.0,
            LinearMap::Convolution { .. } => COPY,
        }
    }

    /// `basis` of the rows of `sample`, see [`dominant_directions`].
    fn sketch(&self, sample: &Tensor, basis: &Tensor) -> Result<Option<Sketch>> {
        let search = self.search;
        let (count, out) = (basis.size()[1], search.layout.out);
        let mut size = search.weight.size();
        size[self.out_axis as usize] = count;
        let filters = self
            .map
            .from_matrix(&basis.f_transpose(0, 1)?.f_unsqueeze(0)?, &size)?
            .f_contiguous()?;
        let mut energy = self.zeros(&[count, count])?;
        let mut image = self.zeros(&size)?;
        let mut target: Option<Tensor> = None;
        let mut signal = self.zeros(&[out])?;
        let mut num_rows = 0;
        self.pieces.for_each(|piece| {
            let output = self.map.forward(&piece[0], &filters, None)?;
            let gradient = self.map.weight_gradient(&output, &piece[0], &filters)?;
            let _ = image.f_add_(&gradient.f_reshape(&size)?)?;
            let rows = self.map.output_rows(&output)?.f_squeeze_dim(0)?;
            num_rows += rows.size()[0];
            let exact = rows.f_to_kind(Kind::Double)?;
            let _ = energy.f_add_(&exact.f_transpose(0, 1)?.f_matmul(&exact)?)?;
            if let Some(shift) = piece.get(1) {
                let by_channel = match shift.dim() {
                    3 => shift.f_transpose(0, 1)?.f_reshape([out, -1])?,
                    _ => shift.shallow_clone(),
                };
                let part = by_channel.f_matmul(&rows)?.f_to_kind(Kind::Double)?;
                target = Some(match target.take() {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
            if search.config.loss == Loss::Sqnr {
                let output = outputs(self.map, piece.last().unwrap_or(&piece[0]), search.weight)?;
                let _ = signal.f_add_(&channel_errors(&output, None)?)?;
            }
            Ok(())
        })?;
        let Some(factor) = whitening(&energy)? else {
            return Ok(None);
        };
        let image = self.map.matrix(&image)?.f_squeeze_dim(0)?;
        let directions = factor.f_transpose(0, 1)?.f_matmul(&image)?;
        let of_sample = square_sum(sample)? / sample.size()[0].max(1) as f64;
        let rest = of_sample * num_rows as f64 - square_sum(&directions)?;
        let kind = compute_kind(search.weight);
        Ok(Some(Sketch {
            rest: rest.max(0.0) / search.layout.columns as f64,
            directions: directions.f_to_kind(kind)?,
            target: match target {
                Some(sum) => Some(sum.f_matmul(&factor)?.f_to_kind(kind)?),
                None => None,
            },
            signal,
            num_rows,
        }))
    }

    /// Losses of whole encodings, one after the other, from the errors of their output channels.
    fn per_encoding(&self, errors: &Tensor, signal: &Tensor) -> Result<Vec<f64>> {
        let channels = self.search.layout.out / self.num_encodings as i64;
        let losses = self
            .search
            .loss(errors, signal)?
            .f_reshape([-1, channels])?;
        Ok(Vec::try_from(losses.f_sum_dim_intlist(
            [1_i64].as_slice(),
            false,
            Kind::Double,
        )?)?)
    }

    fn bounds(&self, sketch: &Sketch) -> Result<Bounds> {
        let mut bounds = Bounds {
            lower: vec![],
            estimates: vec![],
        };
        let is_float = self.search.weight.kind() == Kind::Float;
        let projected = match self.search.weight.device() {
            Device::Cpu if is_float => self.projected_in_one_pass(sketch)?,
            _ => self.projected_one_by_one(sketch)?,
        };
        let length = sketch
            .directions
            .f_square()?
            .f_sum(Kind::Double)?
            .f_sqrt()?;
        let of_target = match &sketch.target {
            Some(target) => row_dot(target, target)?.f_sqrt()?,
            None => self.zeros(&[self.search.layout.out])?,
        };
        for (part, square) in projected {
            let lost = (square.f_sqrt()? * &length + &of_target) * ROUNDING;
            let lower = (part.f_sqrt()? - lost).f_clamp_min(0.0)?.f_square()? * (1.0 - MARGIN);
            let estimate = part + square * sketch.rest;
            bounds
                .lower
                .push(self.per_encoding(&lower, &sketch.signal)?);
            bounds
                .estimates
                .push(self.per_encoding(&estimate, &sketch.signal)?);
        }
        Ok(bounds)
    }

    /// For each candidate the part of its errors along the sketch's directions, and the squared length of its change:
    /// float64, `[out]`.
    fn projected_one_by_one(&self, sketch: &Sketch) -> Result<Vec<(Tensor, Tensor)>> {
        let directions = sketch.directions.f_transpose(0, 1)?.f_contiguous()?;
        let projected = |range: &(Tensor, Tensor)| -> Result<(Tensor, Tensor)> {
            let change = self.search.change(range)?.f_squeeze_dim(0)?;
            let along = change.f_matmul(&directions)?;
            let part = reconstruction_error(&along, sketch.target.as_ref(), "mse")?;
            Ok((part, row_dot(&change, &change)?))
        };
        self.search.ranges.iter().map(projected).collect()
    }

    /// The same by the processor's kernel, which reads the weights once for all candidates.
    fn projected_in_one_pass(&self, sketch: &Sketch) -> Result<Vec<(Tensor, Tensor)>> {
        let values = |t: &Tensor| -> Result<Vec<f32>> { Ok(Vec::try_from(t.f_reshape([-1])?)?) };
        let (search, quantizer) = (self.search, self.search.problem.quantizer);
        let out = search.layout.out as usize;
        let channels = out / self.num_encodings;
        let by_channel = |ends: &[f32]| ends.iter().flat_map(|&x| vec![x; channels]).collect();
        let (mut scale, mut offset) = (vec![], vec![]);
        for (min, max) in &search.ranges {
            let (scales, offsets) = quantizer.scale_offset(min, max)?;
            scale.append(&mut by_channel(&values(&scales)?));
            offset.append(&mut by_channel(&values(&offsets)?));
        }
        let columns = search.layout.columns as usize;
        let mut directions = values(&sketch.directions)?;
        directions.resize(DIRECTIONS * columns, 0.0);
        let mut target = vec![[0.0; DIRECTIONS]; out];
        if let Some(known) = &sketch.target {
            let known = values(known)?;
            for (row, known) in target.iter_mut().zip(known.chunks(known.len() / out)) {
                for (to, &from) in row.iter_mut().zip(known) {
                    *to = f64::from(from);
                }
            }
        }
        let candidates = Candidates {
            weight: &values(&self.map.matrix(search.weight)?)?,
            scale: &scale,
            offset: &offset,
            grid: &quantizer.grid,
            directions: &directions,
        };
        let projections = project_changes(&candidates, out);
        let sums = |rows: &Vec<[f64; DIRECTIONS + 1]>| -> Result<(Tensor, Tensor)> {
            let part = rows.iter().zip(&target).map(|(row, target)| {
                let squares = row.iter().zip(target).map(|(x, y)| (x - y) * (x - y));
                squares.sum::<f64>()
            });
            let square = rows.iter().map(|row| row[DIRECTIONS]);
            Ok((
                Tensor::f_from_slice(&part.collect::<Vec<_>>())?,
                Tensor::f_from_slice(&square.collect::<Vec<_>>())?,
            ))
        };
        projections.iter().map(sums).collect()
    }

    /// Forward passes of the survivors, or the Gram matrix and products with it.
    fn errors(
        &self,
        sketch: &Sketch,
        survivors: f64,
        progress: &mut Progress<'_>,
    ) -> Result<(Errors<'_>, Method)> {
        let layout = self.search.layout;
        let (rows, columns) = (sketch.num_rows as f64, layout.columns as f64);
        let products = survivors * layout.out as f64;
        let by_gram = rows * (0.5 * columns + self.copy_cost()) + products * columns;
        if by_gram >= products * rows {
            let passes = self.forward_passes(products)?;
            return Ok((Errors::ForwardPasses(passes), Method::Rows));
        }
        let sums = self.search.sums(progress)?;
        // To factorize takes the operations of as many products as there are columns, about.
        let is_worthwhile = Factor::is_worthwhile(layout.columns) && products > 2.0 * columns;
        let factor = match sums.double_cross {
            None if is_worthwhile => Factor::new(&sums.gram.f_squeeze_dim(0)?)?,
            _ => None,
        };
        let errors = match factor {
            Some(factor) => Errors::Factor(sums, factor),
            None => Errors::Sums(sums),
        };
        Ok((errors, Method::Gram))
    }

    /// Losses of pairs (encoding, candidate). Given the least `known` of each encoding, those that are more need not be
    /// computed to the end.
    fn exact(
        &self,
        pairs: &[(usize, usize)],
        errors: &mut Errors<'_>,
        signal: &Tensor,
        known: Option<&[f64]>,
    ) -> Result<Vec<Computed>> {
        let weight = self.search.weight;
        let channels = self.search.layout.out as usize / self.num_encodings;
        let (mut places, mut low, mut high) = (vec![], vec![], vec![]);
        for &(encoding, candidate) in pairs {
            let (min, max) = &self.ranges[candidate];
            for channel in 0..channels {
                places.push((encoding * channels + channel) as i64);
                low.push(min[encoding]);
                high.push(max[encoding]);
            }
        }
        let device = weight.device();
        let places = Tensor::f_from_slice(&places)?.f_to_device(device)?;
        let rows = weight.f_index_select(self.out_axis, &places)?;
        let mut shape = vec![1; weight.dim()];
        shape[self.out_axis as usize] = low.len() as i64;
        let end = |values: &[f32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(values)?
                .f_reshape(&shape)?
                .f_to_device(device)?)
        };
        let quantizer = self.search.problem.quantizer;
        let (scale, offset) = range_to_scale_offset(
            &end(&low)?,
            &end(&high)?,
            &quantizer.grid,
            quantizer.symmetric,
        )?;
        let mut change = quantize_dequantize(&rows, &scale, &offset, &quantizer.grid, None)?;
        let _ = change.f_sub_(&rows)?;
        let signal = signal.f_index_select(0, &places)?;
        let mut bounds = vec![None; pairs.len()];
        let found = match errors {
            Errors::ForwardPasses(passes) => passes.errors(&change, &places)?,
            Errors::Sums(sums) => {
                let matrix = self.map.matrix(&change)?.f_squeeze_dim(0)?;
                let mut product = matrix.f_matmul(&sums.gram.f_squeeze_dim(0)?)?;
                if let Some(cross) = &sums.double_cross {
                    product -= cross.f_squeeze_dim(0)?.f_index_select(0, &places)?;
                }
                let constant = sums.constant.f_reshape([-1])?.f_index_select(0, &places)?;
                let found = row_dot(&product, &matrix)? + &constant;
                self.without_cancelled(found, sums, &change, &places, &constant)?
            }
            Errors::Factor(sums, factor) => {
                let matrix = self.map.matrix(&change)?.f_squeeze_dim(0)?;
                let mut squares = factor.squares(&matrix, |rows, so_far| {
                    let below =
                        |least| self.still_below(pairs, least, &signal, rows, so_far, &mut bounds);
                    known.map(below).transpose()
                })?;
                for (squares, bound) in squares.chunks_mut(channels).zip(&bounds) {
                    if bound.is_some() {
                        squares.fill(f64::INFINITY);
                    }
                }
                let found = Tensor::f_from_slice(&squares)?.f_to_device(device)?;
                let zeros = found.f_zeros_like()?;
                self.without_cancelled(found, sums, &change, &places, &zeros)?
            }
        };
        let losses = self.per_encoding(&found, &signal)?;
        Ok(losses
            .into_iter()
            .zip(bounds)
            .map(|(loss, bound)| bound.map_or(Computed::Exact(loss), Computed::AtLeast))
            .collect())
    }

    /// The places, among `rows` with the errors `so_far`, of those whose pairs may still have less than the `least` loss
    /// of their encoding; the others' are entered into `bounds`.
    fn still_below(
        &self,
        pairs: &[(usize, usize)],
        least: &[f64],
        signal: &Tensor,
        rows: &[usize],
        so_far: &[f64],
        bounds: &mut [Option<f64>],
    ) -> Result<Vec<usize>> {
        let channels = self.search.layout.out as usize / self.num_encodings;
        let errors: Vec<f64> = so_far.iter().map(|error| error * (1.0 - MARGIN)).collect();
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let device = signal.device();
        let signal =
            signal.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(device)?)?;
        let errors = Tensor::f_from_slice(&errors)?.f_to_device(device)?;
        let losses = self.per_encoding(&errors, &signal)?;
        let mut places = vec![];
        for (i, (rows, loss)) in rows.chunks(channels).zip(losses).enumerate() {
            let pair = rows[0] / channels;
            if loss > least[pairs[pair].0] {
                bounds[pair] = Some(loss);
            } else {
                places.extend(i * channels..(i + 1) * channels);
            }
        }
        Ok(places)
    }

    /// `found` by a quadratic form to which `constant` was added, with those computed anew of which cancelled products
    /// may have left too few digits.
    fn without_cancelled(
        &self,
        found: Tensor,
        sums: &Sums,
        change: &Tensor,
        places: &Tensor,
        constant: &Tensor,
    ) -> Result<Tensor> {
        let matrix = self.map.matrix(change)?.f_squeeze_dim(0)?;
        let gram = sums.gram.f_squeeze_dim(0)?;
        let of_column = gram.f_trace()?.f_to_kind(Kind::Double)? / gram.size()[0] as f64;
        let energy = row_dot(&matrix, &matrix)? * of_column + constant;
        let few = found.f_lt_tensor(&(energy * CANCELLED))?;
        let few = few.f_nonzero()?.f_squeeze_dim(1)?;
        if few.numel() == 0 {
            return Ok(found);
        }
        let again = change.f_index_select(self.out_axis, &few)?;
        let channels = places.f_index_select(0, &few)?;
        let exact = self
            .forward_passes(few.numel() as f64)?
            .errors(&again, &channels)?;
        Ok(found.f_index_copy(0, &few, &exact)?)
    }

    /// For about so many rows of changes.
    fn forward_passes(&self, num_rows: f64) -> Result<ForwardPasses<'_>> {
        let problem = self.search.problem;
        let weight = self.search.weight;
        let held = self.pieces.held().into_iter().flatten().flatten();
        let numel: usize = held.map(Tensor::numel).sum();
        let held = (numel * weight.kind().elt_size_in_bytes()) as u64;
        let bytes = problem.memory.clamp(LEAST_MEMORY, MOST_MEMORY);
        let bytes = bytes.saturating_sub(held);
        ForwardPasses::new(self.map, &self.pieces, weight, num_rows, bytes)
    }
}

fn square_sum(tensor: &Tensor) -> Result<f64> {
    Ok(f64::try_from(tensor.f_square()?.f_sum(Kind::Double)?)?)
}
