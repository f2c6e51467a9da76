//! AdaRound \[nagel2020\]: weights rounded up or down so that the layer's output stays close.
//!
//! For a layer with weights `W`, inputs `x` of the floating-point model and `x'` of the quantized one,
//! and the activation function `f` behind it, minimizes over the rounding variables `alpha`
//!
//! ```text
//! E |f(W x + b) - f(W'(alpha) x' + b)|^2 + reg_param * sum(1 - |2 h(alpha) - 1|^beta)      (equation 25)
//! ```
//!
//! with Adam, where `W'` is the soft-rounded weight ([`adaround_quantize_dequantize`]). `beta` falls from
//! 20 to 2 after a warm start without the second term. Then each weight takes the level that its `alpha`
//! leans to.
//!
//! Each step takes 32 samples of the cached inputs, through the layer itself or, where that counts fewer
//! operations, through [matrix products](super::matrix_products) over inputs that are prepared once. Or, where
//! the output is linear in the weights (no activation function follows), it takes all of them at once through
//! their Gram matrix: the loss is then `tr(E G E^T) + 2 tr(E D^T) + const`, `E` being the weights' change,
//! `G = x'^T x'` and `D = (W x' - W x)^T x'`.

mod activation;
mod minibatch;
mod rounding;

use super::linear_map::{compute_kind, LinearMap};
use super::matrix_products::{layer_operations, MatrixProducts};
use super::rows::{for_each_piece, Batches, Gram};
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::ops::{adaround_regularizer, AdaroundStep};
use minibatch::Minibatch;
use rounding::Rounding;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

pub use activation::Activation;

/// Samples of one step.
pub const BATCH_SIZE: usize = 32;
/// How often the caller hears of progress, and an early stop is looked for, in steps.
const REPORT_EVERY: u64 = 50;
/// After this time the caller hears of it in any case: only then can it end the work. A step on a large layer takes
/// seconds.
const LONGEST_SILENCE: Duration = Duration::from_millis(200);
/// Elements of the rows that are cut out of inputs at a time, for a Gram matrix; a convolution's are many times as many
/// as its input's.
const ROWS_AT_ONCE: i64 = 1 << 24;

/// Settings of the optimization.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub num_iterations: u64,
    /// Weight of the regularizer.
    pub reg_param: f64,
    /// First and last exponent of the regularizer.
    pub beta_range: (f64, f64),
    /// Share of the iterations without regularizer.
    pub warm_start: f64,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Stop once the rounding is as good as decided: `mean(1 - |2 h - 1|^2)` below this. `None`: never.
    pub early_stop: Option<f64>,
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_iterations: 10_000,
            reg_param: 0.01,
            beta_range: (20.0, 2.0),
            warm_start: 0.2,
            learning_rate: default_learning_rate(10_000),
            early_stop: None,
            seed: 0,
        }
    }
}

/// Adam's learning rate for a number of iterations: 1e-3 from 10,000 on, more for shorter runs (at most
/// 1e-2), so that a rounding variable can come equally far.
pub fn default_learning_rate(num_iterations: u64) -> f64 {
    (10.0 / num_iterations.max(1) as f64).clamp(1e-3, 1e-2)
}

impl Config {
    /// # Errors
    /// [`Error::Value`] naming the setting.
    pub fn check(&self) -> Result<()> {
        let (start, end) = self.beta_range;
        let checks = [
            (
                "num_iterations",
                self.num_iterations >= 1,
                "1 or more",
                self.num_iterations.to_string(),
            ),
            (
                "reg_param",
                self.reg_param >= 0.0 && self.reg_param.is_finite(),
                "a number that is not negative",
                self.reg_param.to_string(),
            ),
            (
                "beta_range",
                start >= end && end >= 1.0 && start.is_finite(),
                "(start, end) with start >= end >= 1",
                format!("({start}, {end})"),
            ),
            (
                "warm_start",
                (0.0..1.0).contains(&self.warm_start),
                "at least 0 and below 1",
                self.warm_start.to_string(),
            ),
            (
                "learning_rate",
                self.learning_rate > 0.0 && self.learning_rate.is_finite(),
                "a positive number",
                self.learning_rate.to_string(),
            ),
            (
                "early_stop",
                self.early_stop.is_none_or(|tolerance| tolerance > 0.0),
                "a positive number or None",
                format!("{:?}", self.early_stop),
            ),
        ];
        for (name, valid, expected, got) in checks {
            if !valid {
                return Err(Error::value(name, expected, got));
            }
        }
        Ok(())
    }

    /// Weight and exponent of the regularizer in an iteration, counted from 0.
    pub fn regularization(&self, iteration: u64) -> (f64, f64) {
        let (start, end) = self.beta_range;
        let total = self.num_iterations as f64;
        let warm = self.warm_start * total;
        if (iteration as f64) < warm {
            return (0.0, start);
        }
        let progress = (iteration as f64 - warm) / (total - warm);
        let falling = 0.5 * (1.0 + (progress * std::f64::consts::PI).cos());
        (self.reg_param, end + (start - end) * falling)
    }
}

/// The layer to treat and its data.
pub struct Problem<'a> {
    pub map: &'a LinearMap,
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    /// Scale and offset of the weight's quantizer, in its encoding shape.
    pub scale_offset: (&'a Tensor, &'a Tensor),
    pub grid: AffineGrid,
    pub block_size: Option<&'a [i64]>,
    /// The activation function behind the layer.
    pub activation: Option<&'a Activation>,
    pub num_batches: usize,
    /// Input of the layer in the quantized model.
    pub input: &'a Batches<'a>,
    /// Output of the layer in the floating-point model, without the activation function.
    pub target: &'a Batches<'a>,
    /// Bytes for what is made of inputs and targets ahead of the steps. What does not fit is made in each step: the
    /// same bits, in a longer time.
    pub memory: u64,
}

/// How a layer was optimized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// 32 samples a step, through the layer.
    Minibatch,
    /// The same, as a product of the weight's matrix and rows of inputs.
    Rows,
    /// The same, by minimal filtering.
    Filtering,
    /// All samples, through their Gram matrix.
    Gram,
}

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The weight on its grid.
    pub weight: Tensor,
    /// Mean over rows of the squared error, summed over output channels, with nearest rounding. Where it is not
    /// finite, nor is the data, and nearest rounding is kept without a step.
    pub loss_before: f64,
    /// The same with the rounding found.
    pub loss_after: f64,
    pub method: Method,
    /// Steps taken; fewer than asked for after an early stop.
    pub iterations: u64,
    /// Whether nearest rounding was kept, since the rounding found was no better.
    pub kept_nearest: bool,
}

/// Called now and then with the steps taken so far; an error ends the work.
pub type Progress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Chooses the rounding of a layer's weight.
///
/// The same seed, machine and number of threads give the same bits. Memory on top of the inputs: nine times
/// the weight, 32 samples of input and output, and with [`Method::Gram`] three Gram matrices, or with
/// [`Method::Rows`] and [`Method::Filtering`] at most [`Problem::memory`] and a few times 32 samples.
///
/// # Errors
/// [`Error::Value`] for settings or shapes that do not fit, no data; whatever `progress` gives.
pub fn adaround(
    problem: &Problem<'_>,
    config: &Config,
    progress: &mut Progress<'_>,
) -> Result<Outcome> {
    config.check()?;
    problem.map.check(problem.weight)?;
    if problem.num_batches == 0 {
        return Err(Error::value("inputs", "at least one batch", "none"));
    }
    let (scale, offset) = problem.scale_offset;
    let dims = problem.weight.dim();
    if scale.dim() > dims || offset.dim() > dims {
        return Err(Error::value(
            "scale and offset",
            format!("at most {dims} dimensions, as the weight"),
            format!("shapes {:?} and {:?}", scale.size(), offset.size()),
        ));
    }
    let _guard = tch::no_grad_guard();
    let kind = compute_kind(problem.weight);
    let weight = problem.weight.f_detach()?.f_to_kind(kind)?.f_contiguous()?;
    let bias = match problem.bias {
        Some(bias) => Some(bias.f_detach()?.f_to_kind(kind)?),
        None => None,
    };
    let layer = Layer {
        problem,
        weight: &weight,
        bias: bias.as_ref(),
        kind,
    };
    let mut pulse = Pulse::new(progress);
    let samples = layer.samples()?;
    let nearest = layer.nearest()?;
    let loss_before = layer.loss(&nearest, &mut pulse)?;
    let plan = layer.plan(&samples, config.num_iterations)?;
    let method = plan.method();
    if !loss_before.is_finite() {
        return Ok(Outcome {
            weight: nearest.f_to_kind(problem.weight.kind())?,
            loss_before,
            loss_after: loss_before,
            method,
            iterations: 0,
            kept_nearest: true,
        });
    }
    let rounding = Rounding::new(&layer, plan.weight_order())?;
    let mut state = rounding.initial_state()?;

    let seed = config.seed;
    let minibatch = |minibatch| Gradient::Minibatch(Box::new(minibatch));
    let mut gradient = match plan {
        Plan::Gram => Gradient::Gram(GramLoss::new(&layer, &samples, &mut pulse)?),
        Plan::Layer => minibatch(Minibatch::of_layer(samples, seed)),
        Plan::Products(products) => minibatch(Minibatch::of_products(
            &layer, samples, products, seed, &mut pulse,
        )?),
    };

    for iteration in 0..config.num_iterations {
        if iteration % REPORT_EVERY == 0 {
            pulse.report()?;
            if let Some(tolerance) = config.early_stop {
                let undecided = f64::try_from(adaround_regularizer(&state.alpha, 2.0)?)?;
                if undecided < tolerance * weight.numel() as f64 {
                    break;
                }
            }
        } else {
            pulse.beat()?;
        }
        let grad = match &mut gradient {
            Gradient::Gram(loss) => loss.gradient(&layer, &state.output)?,
            Gradient::Minibatch(minibatch) => minibatch.gradient(&layer, &state.output)?,
        };
        let (reg_param, beta) = config.regularization(iteration);
        let settings = AdaroundStep {
            step: iteration as i64 + 1,
            learning_rate: config.learning_rate,
            reg_param,
            beta,
        };
        rounding.step(&mut state, &grad, settings)?;
        pulse.taken = iteration + 1;
    }
    pulse.report()?;

    let rounded = rounding.in_place(&rounding.rounded(&state.alpha, false)?)?;
    let loss_after = layer.loss(&rounded, &mut pulse)?;
    let kept_nearest = loss_after.is_nan() || loss_after >= loss_before;
    let (chosen, loss_after) = if kept_nearest {
        (nearest, loss_before)
    } else {
        (rounded, loss_after)
    };
    Ok(Outcome {
        weight: chosen.f_to_kind(problem.weight.kind())?,
        loss_before,
        loss_after,
        method,
        iterations: pulse.taken,
        kept_nearest,
    })
}

/// Lets the caller hear of progress.
struct Pulse<'a, 'b> {
    progress: &'a mut Progress<'b>,
    /// Steps taken.
    taken: u64,
    last: Instant,
}

impl<'a, 'b> Pulse<'a, 'b> {
    fn new(progress: &'a mut Progress<'b>) -> Self {
        Self {
            progress,
            taken: 0,
            last: Instant::now(),
        }
    }

    fn report(&mut self) -> Result<()> {
        (self.progress)(self.taken)?;
        self.last = Instant::now();
        Ok(())
    }

    /// Reports if it is [time](LONGEST_SILENCE); for all that can take long.
    fn beat(&mut self) -> Result<()> {
        if self.last.elapsed() >= LONGEST_SILENCE {
            self.report()?;
        }
        Ok(())
    }
}

/// The problem in the type it is computed in.
struct Layer<'a> {
    problem: &'a Problem<'a>,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    kind: Kind,
}

/// What is known of a batch before its data is used.
struct BatchShape {
    samples: usize,
    /// Rows of the weight's matrix product, all samples together.
    rows: i64,
    /// Sizes of input and output without the number of samples: what can be stacked.
    shape: (Vec<i64>, Vec<i64>),
}

impl Layer<'_> {
    /// The inputs of a batch as they came, with a dimension for samples.
    fn raw_input(&self, batch: usize) -> Result<Tensor> {
        self.problem
            .map
            .batched(&(self.problem.input)(batch)?.f_detach()?)
    }

    /// The same for the floating-point model's outputs.
    fn raw_target(&self, batch: usize) -> Result<Tensor> {
        self.problem
            .map
            .batched(&(self.problem.target)(batch)?.f_detach()?)
    }

    fn input(&self, batch: usize) -> Result<Tensor> {
        self.padded(&self.raw_input(batch)?)
    }

    fn padded(&self, input: &Tensor) -> Result<Tensor> {
        self.problem.map.padded(&input.f_to_kind(self.kind)?)
    }

    fn target(&self, batch: usize) -> Result<Tensor> {
        Ok(self.raw_target(batch)?.f_to_kind(self.kind)?)
    }

    fn forward(&self, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.problem.map.forward(input, weight, self.bias)
    }

    fn activated(&self, output: &Tensor) -> Result<Tensor> {
        match self.problem.activation {
            Some(activation) => activation.apply(output),
            None => Ok(output.shallow_clone()),
        }
    }

    /// The weight with every element on its nearest level.
    fn nearest(&self) -> Result<Tensor> {
        let (scale, offset) = self.problem.scale_offset;
        let (grid, block_size) = (&self.problem.grid, self.problem.block_size);
        crate::ops::quantize_dequantize(self.weight, scale, offset, grid, block_size)
    }

    fn samples(&self) -> Result<Vec<BatchShape>> {
        (0..self.problem.num_batches)
            .map(|batch| {
                let (input, target) = (self.raw_input(batch)?, self.raw_target(batch)?);
                let (input_size, target_size) = (input.size(), target.size());
                let samples = input_size[0];
                if samples == 0 || target_size.first() != input_size.first() {
                    return Err(Error::value(
                        format!("inputs, batch {batch}"),
                        "one output for each of at least one sample",
                        format!("input {input_size:?}, output {target_size:?}"),
                    ));
                }
                Ok(BatchShape {
                    samples: samples as usize,
                    rows: self.problem.map.num_rows(&target),
                    shape: (input_size[1..].to_vec(), target_size[1..].to_vec()),
                })
            })
            .collect()
    }

    /// Mean over all rows of the squared error, summed over output channels.
    fn loss(&self, weight: &Tensor, pulse: &mut Pulse<'_, '_>) -> Result<f64> {
        let (mut sum, mut rows) = (0.0, 0);
        for batch in 0..self.problem.num_batches {
            pulse.beat()?;
            let output = self.forward(&self.input(batch)?, weight)?;
            let target = self.target(batch)?;
            if output.size() != target.size() {
                return Err(Error::value(
                    format!("outputs, batch {batch}"),
                    format!("shape {:?}, as the layer gives", output.size()),
                    format!("{:?}", target.size()),
                ));
            }
            let (output, target) = (self.activated(&output)?, self.activated(&target)?);
            rows += self.problem.map.num_rows(&target);
            let size = output.size();
            let flat = [size[0].max(1), -1];
            let errors = crate::ops::reconstruction_error(
                &output.f_reshape(flat)?,
                Some(&target.f_reshape(flat)?),
                "mse",
            )?;
            sum += f64::try_from(errors.f_sum(Kind::Double)?)?;
        }
        Ok(sum / rows.max(1) as f64)
    }

    /// What counts the fewest operations for a step.
    fn plan(&self, batches: &[BatchShape], num_iterations: u64) -> Result<Plan<'_>> {
        let problem = self.problem;
        let total: usize = batches.iter().map(|b| b.samples).sum();
        let rows = batches.iter().map(|b| b.rows).sum::<i64>() as f64;
        let rows_of_step = rows * (BATCH_SIZE.min(total) as f64 / total as f64);
        let mut plan = Plan::Layer;
        let mut least = layer_operations(problem.map, self.weight, rows_of_step);
        for products in self.matrix_products(batches)? {
            let operations = products.operations(BATCH_SIZE.min(total) as i64);
            if operations < least {
                (plan, least) = (Plan::Products(products), operations);
            }
        }
        if problem.activation.is_none() {
            let matrix = problem.map.matrix(self.weight)?.size();
            let (numel, columns) = (self.weight.numel() as f64, matrix[2] as f64);
            // The making is spread over the steps.
            let making = rows * matrix[0] as f64 * columns * columns / num_iterations as f64;
            if numel * columns + making < least {
                plan = Plan::Gram;
            }
        }
        Ok(plan)
    }

    /// The matrix products that the layer can be computed by. Samples have to be of one shape. On other devices than
    /// CPUs the layer's own convolution is left to choose.
    fn matrix_products(&self, batches: &[BatchShape]) -> Result<Vec<MatrixProducts<'_>>> {
        let (map, first) = (self.problem.map, &batches[0]);
        if self.weight.device() != Device::Cpu || batches.iter().any(|b| b.shape != first.shape) {
            return Ok(vec![]);
        }
        let places = first.shape.1.get(1..).unwrap_or_default();
        let mut ways = MatrixProducts::filtering(map, self.weight, places)?;
        ways.extend(MatrixProducts::rows(map, self.weight, places));
        Ok(ways)
    }
}

/// How steps are computed.
enum Plan<'a> {
    Layer,
    Products(MatrixProducts<'a>),
    Gram,
}

impl Plan<'_> {
    fn method(&self) -> Method {
        match self {
            Plan::Layer => Method::Minibatch,
            Plan::Products(products) if products.is_filtering() => Method::Filtering,
            Plan::Products(_) => Method::Rows,
            Plan::Gram => Method::Gram,
        }
    }

    /// The order of the weight's dimensions in which a step computes with it; `None`: its own.
    fn weight_order(&self) -> Option<Vec<i64>> {
        match self {
            Plan::Products(products) => Some(products.weight_order()),
            Plan::Layer | Plan::Gram => None,
        }
    }
}

enum Gradient<'a> {
    Gram(GramLoss),
    Minibatch(Box<Minibatch<'a>>),
}

/// The quadratic loss: its gradient at `W'` is `2 ((W' - W) G + D) / rows`.
struct GramLoss {
    gram: Tensor,
    constant: Tensor,
    factor: f64,
}

impl GramLoss {
    fn new(layer: &Layer<'_>, batches: &[BatchShape], pulse: &mut Pulse<'_, '_>) -> Result<Self> {
        let map = layer.problem.map;
        let matrix = map.matrix(layer.weight)?;
        let size = matrix.size();
        let mut gram = Gram::new(size[0], size[2], layer.weight)?;
        let mut constant = Tensor::f_zeros(&size, (Kind::Double, layer.weight.device()))?;
        let mut rows = 0;
        // Batch, first sample, number of samples.
        let mut parts: Vec<(usize, i64, i64)> = vec![];
        for (index, batch) in batches.iter().enumerate() {
            let samples = batch.samples as i64;
            let of_sample = batch.rows / samples * size[0] * size[2];
            let at_once = (ROWS_AT_ONCE / of_sample.max(1)).max(1);
            let begins = (0..samples).step_by(at_once as usize);
            parts.extend(begins.map(|begin| (index, begin, at_once.min(samples - begin))));
        }
        let load = |part: usize| {
            let (batch, begin, samples) = parts[part];
            let input = layer.raw_input(batch)?.f_narrow(0, begin, samples)?;
            let target = layer.raw_target(batch)?.f_narrow(0, begin, samples)?;
            let input = layer.padded(&input)?;
            let output = layer.forward(&input, layer.weight)?;
            let residual = map.output_rows(&(output - target.f_to_kind(layer.kind)?))?;
            Ok(vec![map.rows(&input, layer.weight)?, residual])
        };
        for_each_piece(parts.len(), load, |piece| {
            pulse.beat()?;
            rows += piece[0].size()[1];
            gram.add(&piece[0])?;
            let product = piece[1].f_transpose(1, 2)?.f_matmul(&piece[0])?;
            let _ = constant.f_add_(&product)?;
            Ok(())
        })?;
        Ok(Self {
            gram: gram.finish(layer.kind)?,
            constant: constant.f_to_kind(layer.kind)?,
            factor: 2.0 / rows.max(1) as f64,
        })
    }

    fn gradient(&self, layer: &Layer<'_>, rounded: &Tensor) -> Result<Tensor> {
        let map = layer.problem.map;
        let change = map.matrix(&(rounded - layer.weight))?;
        let mut grad = self.constant.f_baddbmm(&change, &self.gram, 1, 1)?;
        let _ = grad.f_mul_scalar_(self.factor)?;
        map.from_matrix(&grad, &layer.weight.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loading a batch takes some time here, as running a large layer does.
    #[test]
    fn work_can_be_ended_while_steps_take_long() {
        let options = (Kind::Float, Device::Cpu);
        let (weight, input) = (
            Tensor::randn([4, 6], options),
            Tensor::randn([5, 6], options),
        );
        let target = input.linear(&weight, None::<Tensor>);
        let slowly = |_| {
            std::thread::sleep(LONGEST_SILENCE / 4);
            Ok(input.shallow_clone())
        };
        let scale = Tensor::full([], 0.3, options);
        let problem = Problem {
            map: &LinearMap::Linear,
            weight: &weight,
            bias: None,
            scale_offset: (&scale, &scale.zeros_like()),
            grid: AffineGrid::new(-8, 7, 0.0).unwrap(),
            block_size: None,
            activation: Some(&Activation::Relu),
            num_batches: 1,
            input: &slowly,
            target: &|_| Ok(target.shallow_clone()),
            memory: u64::MAX,
        };
        let mut heard = vec![];
        let outcome = adaround(&problem, &Config::default(), &mut |steps| {
            heard.push(steps);
            match steps {
                0 => Ok(()),
                _ => Err(Error::State("ended".to_owned())),
            }
        });
        assert!(matches!(outcome, Err(Error::State(_))));
        let last = heard.last().copied().unwrap();
        assert!((1..REPORT_EVERY).contains(&last), "{heard:?}");
    }
}
