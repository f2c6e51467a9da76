//! Sequential MSE: the range of a weight quantizer that keeps the layer's output closest.
//!
//! Of the candidates `range * i / N`, `i = 1..=N`, every encoding of the weight takes the one with the
//! least error of the outputs it has a part in, on calibration data. A block of input channels counts
//! with its own part of the output.
//!
//! For the quadratic losses the error of a candidate with weight change `e = W' - W` is `e^T G e` with
//! the Gram matrix `G = X^T X` of the input rows, made once. Where there are few rows, the rows themselves
//! cost less: `|X e|^2`. Whichever counts fewer operations is taken. Products are float32, their sums
//! over pieces of the rows float64. Where a layer is one block, candidates that cannot win are found by a lower
//! bound and left out (see [`pruned`]).

mod factor;
mod forward;
mod pruned;

use super::linear_map::{compute_kind, LinearMap};
use super::pieces::Pieces;
use super::rows::{rows_of, Batches, Gram};
use crate::calibration::fit_range_min_max;
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::ops::{quantize_dequantize, range_to_scale_offset, reconstruction_error, row_dot};
use tch::{Kind, Tensor};

/// What is minimized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Sum of squared errors.
    Mse,
    /// Sum of absolute errors.
    L1,
    /// Sum of squared errors over the sum of squared outputs, in decibels.
    Sqnr,
}

/// Which model's inputs `x` (floating-point) and `x'` (quantized) the outputs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputSymmetry {
    /// `W x'` against `W' x'`.
    Symqt,
    /// `W x` against `W' x`.
    Symfp,
    /// `W x` against `W' x'`.
    Asym,
}

/// A weight quantizer: grid, and how its encodings lie over the weight.
#[derive(Clone, Debug)]
pub struct WeightQuantizer {
    pub grid: AffineGrid,
    pub symmetric: bool,
    /// Shape of the encodings.
    pub shape: Vec<i64>,
    /// Elements of a block, per dimension of `shape`; `None`: `shape` broadcasts.
    pub block_size: Option<Vec<i64>>,
    /// Two-level scales: blocks per group, per dimension of `shape`, and the number of integer scales.
    pub grouping: Option<(Vec<i64>, i64)>,
}

impl WeightQuantizer {
    /// Scale and offset of a range.
    pub fn scale_offset(&self, min: &Tensor, max: &Tensor) -> Result<(Tensor, Tensor)> {
        let (scale, offset) = range_to_scale_offset(min, max, &self.grid, self.symmetric)?;
        let Some((grouping, levels)) = &self.grouping else {
            return Ok((scale, offset));
        };
        // Each scale becomes an integer multiple of its group's: the largest is `levels` times that.
        let mut split = vec![];
        for (&size, &count) in grouping.iter().zip(&self.shape) {
            let size = if size == -1 { count } else { size };
            split.extend([count / size, size]);
        }
        let within: Vec<i64> = (0..self.shape.len() as i64).map(|d| 2 * d + 1).collect();
        let grouped = scale.f_reshape(&split)?;
        let unit = grouped.f_amax(&within, true)? / *levels as f64;
        let steps = (grouped / &unit).f_round()?.f_clamp(1, *levels)?;
        Ok(((steps * unit).f_reshape(&self.shape)?, offset))
    }

    fn quantize_dequantize(&self, weight: &Tensor, min: &Tensor, max: &Tensor) -> Result<Tensor> {
        let (scale, offset) = self.scale_offset(min, max)?;
        quantize_dequantize(
            weight,
            &scale,
            &offset,
            &self.grid,
            self.block_size.as_deref(),
        )
    }
}

/// The layer to treat and its data.
pub struct Problem<'a> {
    pub map: &'a LinearMap,
    pub weight: &'a Tensor,
    pub quantizer: &'a WeightQuantizer,
    /// The full range, `(min, max)`, of each encoding: the last candidate.
    pub range: (&'a Tensor, &'a Tensor),
    pub num_batches: usize,
    /// Input of the layer in the floating-point model.
    pub float_input: &'a Batches<'a>,
    /// Input of the layer in the quantized model.
    pub quant_input: &'a Batches<'a>,
    /// Bytes for inputs, and what is made of them, at a time. More than [`MOST_MEMORY`] are not used, and what
    /// one sample takes, or [`LEAST_MEMORY`], may be.
    pub memory: u64,
}

/// Larger pieces of the inputs would not make matrix products any faster.
pub const MOST_MEMORY: u64 = 256 << 20;
/// Smaller ones would make them slow.
pub const LEAST_MEMORY: u64 = 1 << 20;

/// Settings of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub num_candidates: u32,
    pub symmetry: InputSymmetry,
    pub loss: Loss,
    /// An axis of the quantizer's shape along which all encodings get the widest of their choices.
    pub shared_axis: Option<i64>,
}

/// How errors were computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// From the input rows.
    Rows,
    /// From their Gram matrix.
    Gram,
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The chosen range, in the quantizer's shape.
    pub min: Tensor,
    pub max: Tensor,
    /// Number of the chosen candidate of each encoding, 1 to `num_candidates`.
    pub candidate: Tensor,
    /// Loss of the full range, summed over encodings; where a bound excluded it, an estimate by that bound and the
    /// best candidate's loss.
    pub loss_before: f64,
    /// Loss of the chosen ranges, summed over encodings.
    pub loss_after: f64,
    pub method: Method,
}

/// Called after each candidate with the number of candidates done; an error ends the work.
pub type Progress<'a> = dyn FnMut(u32) -> Result<()> + 'a;

/// Chooses the range of a layer's weight quantizer.
///
/// Memory on top of the inputs: [`Problem::memory`], four times the weight, and three Gram matrices if it takes that
/// way.
///
/// # Errors
/// [`Error::Value`] for settings or shapes that do not fit, no data; whatever `progress` gives.
pub fn seq_mse(
    problem: &Problem<'_>,
    config: &Config,
    progress: &mut Progress<'_>,
) -> Result<Outcome> {
    if config.num_candidates == 0 {
        return Err(Error::value("num_candidates", "1 or more", 0));
    }
    if problem.num_batches == 0 {
        return Err(Error::value("inputs", "at least one batch", "none"));
    }
    problem.map.check(problem.weight)?;
    let _guard = tch::no_grad_guard();
    let weight = problem
        .weight
        .f_detach()?
        .f_to_kind(compute_kind(problem.weight))?
        .f_contiguous()?;
    let layout = Layout::new(problem.map, &weight, problem.quantizer)?;
    let search = Search {
        problem,
        config,
        ranges: candidate_ranges(problem, config.num_candidates)?,
        weight: &weight,
        layout: &layout,
    };
    let pruned = match pruned::applies(&search) {
        true => pruned::losses(&search, progress)?,
        false => None,
    };
    let found = match pruned {
        Some(found) => found,
        None if search.gram_is_cheaper()? => {
            Losses::complete(search.by_gram(progress)?, Method::Gram)?
        }
        None => Losses::complete(search.by_rows(progress)?, Method::Rows)?,
    };
    search.choose(&found)
}

/// The losses that choices follow from.
struct Losses {
    /// Of each candidate, in the quantizer's shape; infinite where a bound excludes it.
    losses: Vec<Tensor>,
    /// Of the full range, see [`Outcome::loss_before`].
    before: f64,
    method: Method,
}

impl Losses {
    fn complete(losses: Vec<Tensor>, method: Method) -> Result<Self> {
        let before = losses.last().map_or(Ok(0.0), total)?;
        Ok(Self {
            losses,
            before,
            method,
        })
    }
}

fn total(losses: &Tensor) -> Result<f64> {
    Ok(f64::try_from(losses.f_sum(Kind::Double)?)?)
}

/// Range of each candidate: `full range * i / num_candidates`, fitted to the grid.
fn candidate_ranges(problem: &Problem<'_>, num_candidates: u32) -> Result<Vec<(Tensor, Tensor)>> {
    let quantizer = problem.quantizer;
    let values = |t: &Tensor| -> Result<Vec<f32>> {
        if t.size() != quantizer.shape {
            return Err(Error::value(
                "range",
                format!("shape {:?}", quantizer.shape),
                format!("{:?}", t.size()),
            ));
        }
        Ok(Vec::try_from(
            t.f_detach()?.f_to_kind(Kind::Float)?.f_reshape([-1])?,
        )?)
    };
    let (low, high) = (values(problem.range.0)?, values(problem.range.1)?);
    let steps = quantizer.grid.num_steps() as f64;
    (1..=num_candidates)
        .map(|i| {
            let part = |end: f32| end / num_candidates as f32 * i as f32;
            let fitted = low
                .iter()
                .zip(&high)
                .map(|(&low, &high)| {
                    fit_range_min_max(part(low), part(high), steps, quantizer.symmetric)
                })
                .collect::<Result<Vec<_>>>()?;
            let (min, max): (Vec<f32>, Vec<f32>) = fitted.into_iter().unzip();
            let tensor = |v: &[f32]| -> Result<Tensor> {
                Ok(Tensor::f_from_slice(v)?
                    .f_reshape(&quantizer.shape)?
                    .f_to_device(problem.weight.device())?)
            };
            Ok((tensor(&min)?, tensor(&max)?))
        })
        .collect()
}

/// Where the encodings lie in the weight's matrix `[groups, out, K]`.
struct Layout {
    groups: i64,
    /// Output channels of a group.
    out: i64,
    /// Blocks of columns within a group, and columns of a block.
    blocks: i64,
    columns: i64,
    transposed: bool,
    /// Encodings along the output and input channels of the weight.
    out_encodings: i64,
    in_encodings: i64,
    shape: Vec<i64>,
}

impl Layout {
    fn new(map: &LinearMap, weight: &Tensor, quantizer: &WeightQuantizer) -> Result<Self> {
        let size = weight.size();
        let extra = quantizer.shape.len().saturating_sub(size.len());
        let mut encodings = vec![1; size.len().saturating_sub(quantizer.shape.len())];
        encodings.extend(&quantizer.shape[extra..]);
        let (out_axis, in_axis) = if map.transposed() { (1, 0) } else { (0, 1) };
        if let Some(blocks) = &quantizer.block_size {
            let extra = size.len() - blocks.len().min(size.len());
            let fit = |(i, &block): (usize, &i64)| {
                block == -1 || block * encodings[extra + i] == size[extra + i]
            };
            if blocks.len() > size.len() || !blocks.iter().enumerate().all(fit) {
                return Err(Error::value(
                    "block_size",
                    format!(
                        "blocks that make {:?} encodings of {size:?}",
                        quantizer.shape
                    ),
                    format!("{blocks:?}"),
                ));
            }
        }
        if encodings[2..].iter().any(|&e| e != 1) {
            return Err(Error::value(
                "block_size",
                "whole kernels: encodings along output and input channels alone",
                format!("encodings of shape {:?}", quantizer.shape),
            ));
        }
        let matrix = map.matrix(weight)?.size();
        let (groups, out, columns) = (matrix[0], matrix[1], matrix[2]);
        let (out_encodings, in_encodings) = (encodings[out_axis], encodings[in_axis]);
        // In a transposed layer the groups lie along the input channels.
        let blocks = if map.transposed() {
            (in_encodings / groups).max(1)
        } else {
            in_encodings
        };
        let fits = if map.transposed() {
            in_encodings % groups == 0 || groups % in_encodings == 0
        } else {
            true
        };
        if !fits || columns % blocks != 0 {
            return Err(Error::value(
                "block_size",
                format!("blocks of input channels that {groups} groups divide or are divided by"),
                format!("{in_encodings} blocks in a weight of shape {size:?}"),
            ));
        }
        Ok(Self {
            groups,
            out,
            blocks,
            columns: columns / blocks,
            transposed: map.transposed(),
            out_encodings,
            in_encodings,
            shape: quantizer.shape.clone(),
        })
    }

    /// `[groups, n, blocks * columns]` as `[groups * blocks, n, columns]`.
    fn by_block(&self, rows: &Tensor) -> Result<Tensor> {
        if self.blocks == 1 {
            return Ok(rows.shallow_clone());
        }
        let n = rows.size()[1];
        Ok(rows
            .f_reshape([self.groups, n, self.blocks, self.columns])?
            .f_transpose(1, 2)?
            .f_reshape([self.groups * self.blocks, n, self.columns])?)
    }

    /// Losses `[groups * blocks, out]` summed within each encoding, in the quantizer's shape.
    fn per_encoding(&self, losses: &Tensor) -> Result<Tensor> {
        let losses = losses.f_reshape([self.groups, self.blocks, self.out])?;
        let channels_by_blocks = if self.transposed {
            // Axis 0 of the weight: groups and the blocks within them; axis 1: outputs of a group.
            let units = self.groups * self.blocks;
            losses.f_reshape([units, self.out])?.f_transpose(0, 1)?
        } else {
            losses
                .f_transpose(1, 2)?
                .f_reshape([self.groups * self.out, self.blocks])?
        };
        let size = channels_by_blocks.size();
        let summed = channels_by_blocks
            .f_reshape([
                self.out_encodings,
                size[0] / self.out_encodings,
                self.in_encodings,
                size[1] / self.in_encodings,
            ])?
            .f_sum_dim_intlist([1_i64, 3].as_slice(), false, Kind::Double)?;
        let ordered = if self.transposed {
            summed.f_transpose(0, 1)?
        } else {
            summed
        };
        Ok(ordered.f_reshape(&self.shape)?)
    }
}

/// What the error of every change `e` of the weights follows from: `e^T gram e - double_cross e + constant`. By unit
/// (group and block of columns) and output channel.
struct Sums {
    /// `[units, columns, columns]`
    gram: Tensor,
    /// `[units, out, columns]`; `None`: zeros.
    double_cross: Option<Tensor>,
    /// `[units, out]`, float64.
    constant: Tensor,
    /// Energy of the outputs, for [`Loss::Sqnr`]; `[units, out]`, float64.
    signal: Tensor,
}

struct Search<'a> {
    problem: &'a Problem<'a>,
    config: &'a Config,
    ranges: Vec<(Tensor, Tensor)>,
    weight: &'a Tensor,
    layout: &'a Layout,
}

impl Search<'_> {
    /// `W' - W` of a candidate, `[groups * blocks, out, columns]`.
    fn change(&self, (min, max): &(Tensor, Tensor)) -> Result<Tensor> {
        let quantizer = self.problem.quantizer;
        let mut change = quantizer.quantize_dequantize(self.weight, min, max)?;
        self.matrix(&change.f_sub_(self.weight)?)
    }

    fn matrix(&self, weight: &Tensor) -> Result<Tensor> {
        self.layout.by_block(&self.problem.map.matrix(weight)?)
    }

    /// Inputs, in the type that sums are computed in: those the candidates' outputs come from, and with
    /// [`InputSymmetry::Asym`] also those of the floating-point model. `elements` says what the elements of one sample's
    /// input, outputs and rows come to.
    fn pieces<'p>(
        &'p self,
        elements: impl Fn(f64, f64, f64) -> f64,
        prepare: impl Fn(Vec<Tensor>) -> Result<Vec<Tensor>> + 'p,
    ) -> Result<Pieces<'p>> {
        let problem = self.problem;
        let map = problem.map;
        let sources: Vec<&Batches<'_>> = match self.config.symmetry {
            InputSymmetry::Symqt => vec![problem.quant_input],
            InputSymmetry::Symfp => vec![problem.float_input],
            InputSymmetry::Asym => vec![problem.quant_input, problem.float_input],
        };
        let load = move |batch: usize| -> Result<Vec<Tensor>> {
            let input = |source: &&Batches<'_>| map.batched(&source(batch)?.f_detach()?);
            sources.iter().map(input).collect()
        };
        let first = &load(0)?[0];
        let num_rows = map.num_rows_of_input(first, self.weight) as f64;
        let (groups, layout) = (self.layout.groups as f64, self.layout);
        let (rows, outputs) = (layout.blocks * layout.columns, layout.out);
        let samples = first.size()[0].max(1) as f64;
        let input = first.numel() as f64 / samples;
        let of_sample = elements(
            input,
            num_rows * groups * outputs as f64 / samples,
            num_rows * groups * rows as f64 / samples,
        );
        let kind = compute_kind(self.weight);
        let memory = problem.memory.clamp(LEAST_MEMORY, MOST_MEMORY) as f64;
        let samples = memory / (kind.elt_size_in_bytes() as f64 * of_sample.max(1.0));
        let most = (samples * input) as usize;
        Pieces::new(problem.num_batches, most, load, move |piece| {
            let same_kind = |t: &Tensor| Ok(t.f_to_kind(kind)?);
            prepare(piece.iter().map(same_kind).collect::<Result<_>>()?)
        })
    }

    /// Rows of the inputs, by block: pieces of [`pieces`](Self::pieces).
    fn for_each_rows(&self, mut body: impl FnMut(&[Tensor]) -> Result<()>) -> Result<()> {
        // Rows are copied out, and again for blocks; a candidate's output, and the target.
        let elements = |input, outputs, rows| 2.0 * (input + outputs + rows);
        self.pieces(elements, Ok)?.for_each(|piece| {
            let rows = |input: &Tensor| -> Result<Tensor> {
                let rows = rows_of(self.problem.map, input, self.weight)?;
                self.layout.by_block(&rows)
            };
            body(&piece.iter().map(rows).collect::<Result<Vec<_>>>()?)
        })
    }

    /// Rows of all inputs.
    fn num_rows(&self) -> Result<f64> {
        let mut rows = 0;
        for batch in 0..self.problem.num_batches {
            let source = match self.config.symmetry {
                InputSymmetry::Symfp => self.problem.float_input,
                _ => self.problem.quant_input,
            };
            let input = self.problem.map.batched(&source(batch)?)?;
            rows += self.problem.map.num_rows_of_input(&input, self.weight);
        }
        Ok(rows as f64)
    }

    /// Compares the operations of both ways: making the Gram matrix and one product with it for each
    /// output and candidate, against one product with the rows for each.
    fn gram_is_cheaper(&self) -> Result<bool> {
        if self.config.loss == Loss::L1 {
            return Ok(false);
        }
        let rows = self.num_rows()?;
        let products = (self.layout.out * i64::from(self.config.num_candidates)) as f64;
        let columns = self.layout.columns as f64;
        Ok(columns * (rows + products) < rows * products)
    }

    /// Difference of the outputs that does not come from the weight, `(X - X') W^T`, as
    /// `[groups * blocks, out, n]`; `None` where both models' inputs are the same.
    fn shift(&self, piece: &[Tensor], matrix: &Tensor) -> Result<Option<Tensor>> {
        Ok(match piece {
            [quant, float] => Some(matrix.f_bmm(&(float - quant).f_transpose(1, 2)?)?),
            _ => None,
        })
    }

    fn target_rows<'t>(&self, piece: &'t [Tensor]) -> &'t Tensor {
        piece.last().unwrap_or(&piece[0])
    }

    fn by_rows(&self, progress: &mut Progress<'_>) -> Result<Vec<Tensor>> {
        let matrix = self.matrix(self.weight)?;
        let size = [matrix.size()[0], matrix.size()[1]];
        let zeros = || Tensor::f_zeros(size, (Kind::Double, self.weight.device()));
        let mut errors: Vec<Tensor> = self
            .ranges
            .iter()
            .map(|_| zeros())
            .collect::<Result<_, _>>()?;
        let mut signal = zeros()?;
        let loss = match self.config.loss {
            Loss::L1 => "l1",
            Loss::Mse | Loss::Sqnr => "mse",
        };
        self.for_each_rows(|piece| {
            let columns = piece[0].f_transpose(1, 2)?;
            // W' x' - W x = (W' - W) x' - W (x - x').
            let shift = self.shift(piece, &matrix)?;
            if self.config.loss == Loss::Sqnr {
                let target = matrix.f_bmm(&self.target_rows(piece).f_transpose(1, 2)?)?;
                let _ = signal.f_add_(&reconstruction_error(&target, None, "mse")?)?;
            }
            for (i, range) in self.ranges.iter().enumerate() {
                let output = self.change(range)?.f_bmm(&columns)?;
                let error = reconstruction_error(&output, shift.as_ref(), loss)?;
                let _ = errors[i].f_add_(&error)?;
                progress(i as u32 + 1)?;
            }
            Ok(())
        })?;
        self.losses(errors, &signal)
    }

    /// The sums over all rows that the quadratic losses consist of.
    fn sums(&self, progress: &mut Progress<'_>) -> Result<Sums> {
        let matrix = self.matrix(self.weight)?;
        let batch = matrix.size()[0];
        let columns = self.layout.columns;
        let mut gram = Gram::new(batch, columns, self.weight)?;
        let mut target_gram = match self.config {
            Config {
                loss: Loss::Sqnr,
                symmetry: InputSymmetry::Asym,
                ..
            } => Some(Gram::new(batch, columns, self.weight)?),
            _ => None,
        };
        let zeros = |size: &[i64]| Tensor::f_zeros(size, (Kind::Double, self.weight.device()));
        let mut constant = zeros(&matrix.size()[..2])?;
        let mut cross = zeros(&matrix.size())?;
        self.for_each_rows(|piece| {
            gram.add(&piece[0])?;
            if let Some(gram) = &mut target_gram {
                gram.add(self.target_rows(piece))?;
            }
            if let Some(shift) = self.shift(piece, &matrix)? {
                let _ = constant.f_add_(&reconstruction_error(&shift, None, "mse")?)?;
                let _ = cross.f_add_(&shift.f_bmm(&piece[0])?)?;
            }
            progress(0)
        })?;
        let kind = compute_kind(self.weight);
        let gram = gram.finish(kind)?;
        let signal = match self.config.loss {
            Loss::Sqnr => {
                let target_gram = match target_gram {
                    Some(gram) => gram.finish(kind)?,
                    None => gram.shallow_clone(),
                };
                row_dot(&matrix.f_bmm(&target_gram)?, &matrix)?
            }
            _ => zeros(&matrix.size()[..2])?,
        };
        let asymmetric = self.config.symmetry == InputSymmetry::Asym;
        Ok(Sums {
            gram,
            double_cross: match asymmetric {
                true => Some((cross * 2.0).f_to_kind(kind)?),
                false => None,
            },
            constant,
            signal,
        })
    }

    fn by_gram(&self, progress: &mut Progress<'_>) -> Result<Vec<Tensor>> {
        let sums = self.sums(progress)?;
        let mut errors = Vec::with_capacity(self.ranges.len());
        for (i, range) in self.ranges.iter().enumerate() {
            let change = self.change(range)?;
            let mut product = change.f_bmm(&sums.gram)?;
            if let Some(cross) = &sums.double_cross {
                product -= cross;
            }
            errors.push(row_dot(&product, &change)? + &sums.constant);
            progress(i as u32 + 1)?;
        }
        self.losses(errors, &sums.signal)
    }

    /// Loss of each output channel from its squared or absolute errors.
    fn loss(&self, error: &Tensor, signal: &Tensor) -> Result<Tensor> {
        Ok(match self.config.loss {
            Loss::Mse | Loss::L1 => error.shallow_clone(),
            // Decibels of the noise over the signal; tiny values keep zeros finite.
            Loss::Sqnr => {
                let (noise, signal) = (error.f_clamp_min(1e-30)?, signal.f_clamp_min(1e-30)?);
                (noise / signal).f_log10()? * 10.0
            }
        })
    }

    /// Losses per encoding from errors per output channel.
    fn losses(&self, errors: Vec<Tensor>, signal: &Tensor) -> Result<Vec<Tensor>> {
        errors
            .iter()
            .map(|error| self.layout.per_encoding(&self.loss(error, signal)?))
            .collect()
    }

    /// Numbers of the chosen candidates, from 0.
    fn best(&self, losses: &[Tensor]) -> Result<Tensor> {
        // The first of equal losses, as the direct search keeps it.
        let best = Tensor::f_stack(losses, 0)?.f_argmin(0, false)?;
        Ok(match self.config.shared_axis {
            Some(axis) => best
                .f_amax([axis].as_slice(), true)?
                .f_expand_as(&best)?
                .f_contiguous()?,
            None => best,
        })
    }

    fn choose(&self, found: &Losses) -> Result<Outcome> {
        let best = self.best(&found.losses)?;
        let pick = |tensors: Vec<&Tensor>| -> Result<Tensor> {
            Ok(Tensor::f_stack(&tensors, 0)?
                .f_gather(0, &best.f_unsqueeze(0)?, false)?
                .f_squeeze_dim(0)?)
        };
        Ok(Outcome {
            min: pick(self.ranges.iter().map(|r| &r.0).collect())?,
            max: pick(self.ranges.iter().map(|r| &r.1).collect())?,
            loss_after: total(&pick(found.losses.iter().collect())?)?,
            loss_before: found.before,
            candidate: best + 1,
            method: found.method,
        })
    }
}
