//! AdaRound of one layer.

use super::error::to_py;
use super::linear_map::{interruptible, PyLinearMap};
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::ptq::adaround::{adaround, default_learning_rate, Activation, Config, Method, Problem};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3_tch::PyTensor;
use tch::Tensor;

/// Chooses the rounding of a layer's weight. Answers a dict with `weight`, `loss_before`, `loss_after`,
/// `method`, `iterations` and `kept_nearest`. See `rimet::ptq::adaround`.
///
/// `activation`: name, numbers and weights of the activation function behind the layer. `memory`: bytes for what is
/// made of inputs and targets; None: as many as it takes.
#[pyfunction]
#[pyo3(signature = (
    map, weight, bias, inputs, targets, scale, offset, *, qmin, qmax, block_size, activation,
    num_iterations, reg_param, beta_range, warm_start, learning_rate, early_stop, seed, memory=None,
    progress=None
))]
#[allow(clippy::too_many_arguments)]
fn adaround_layer<'py>(
    py: Python<'py>,
    map: &PyLinearMap,
    weight: PyTensor,
    bias: Option<PyTensor>,
    inputs: Vec<PyTensor>,
    targets: Vec<PyTensor>,
    scale: PyTensor,
    offset: PyTensor,
    qmin: i64,
    qmax: i64,
    block_size: Option<Vec<i64>>,
    activation: Option<(String, Vec<f64>, Option<PyTensor>)>,
    num_iterations: u64,
    reg_param: f64,
    beta_range: (f64, f64),
    warm_start: f64,
    learning_rate: f64,
    early_stop: Option<f64>,
    seed: u64,
    memory: Option<u64>,
    progress: Option<PyObject>,
) -> PyResult<Bound<'py, PyDict>> {
    let config = Config {
        num_iterations,
        reg_param,
        beta_range,
        warm_start,
        learning_rate,
        early_stop,
        seed,
    };
    let grid = AffineGrid::new(qmin, qmax, 0.0).map_err(to_py)?;
    let activation = activation
        .map(|(name, numbers, weights)| activation_of(&name, &numbers, weights.map(|w| w.0)))
        .transpose()
        .map_err(to_py)?;
    if inputs.len() != targets.len() {
        return Err(to_py(Error::value(
            "targets",
            format!("{} batches, as there are inputs", inputs.len()),
            targets.len(),
        )));
    }
    let plain = |tensors: Vec<PyTensor>| tensors.into_iter().map(|t| t.0).collect::<Vec<Tensor>>();
    let (inputs, targets) = (plain(inputs), plain(targets));
    let (weight, bias) = (weight.0, bias.map(|b| b.0));
    let (scale, offset) = (scale.0, offset.0);
    let map = map.0.clone();
    let outcome = interruptible(py, progress, move |report| {
        let load = |tensors: &[Tensor], batch: usize| Ok(tensors[batch].shallow_clone());
        let problem = Problem {
            map: &map,
            weight: &weight,
            bias: bias.as_ref(),
            scale_offset: (&scale, &offset),
            grid,
            block_size: block_size.as_deref(),
            activation: activation.as_ref(),
            num_batches: inputs.len(),
            input: &|batch| load(&inputs, batch),
            target: &|batch| load(&targets, batch),
            memory: memory.unwrap_or(u64::MAX),
        };
        adaround(&problem, &config, report)
    })?;
    let result = PyDict::new(py);
    result.set_item("weight", PyTensor(outcome.weight))?;
    result.set_item("loss_before", outcome.loss_before)?;
    result.set_item("loss_after", outcome.loss_after)?;
    let method = match outcome.method {
        Method::Minibatch => "minibatch",
        Method::Rows => "minibatch, rows",
        Method::Filtering => "minibatch, minimal filtering",
        Method::Gram => "gram",
    };
    result.set_item("method", method)?;
    result.set_item("iterations", outcome.iterations)?;
    result.set_item("kept_nearest", outcome.kept_nearest)?;
    Ok(result)
}

fn activation_of(name: &str, numbers: &[f64], weights: Option<Tensor>) -> Result<Activation> {
    Ok(match (name, numbers, weights) {
        ("relu", [], None) => Activation::Relu,
        ("hardtanh", &[low, high], None) => Activation::Clamp(low, high),
        ("leaky_relu", &[slope], None) => Activation::LeakyRelu(slope),
        ("prelu", [], Some(weights)) => Activation::Prelu(weights.f_detach()?),
        ("elu", &[alpha], None) => Activation::Elu(alpha),
        ("gelu", [], None) => Activation::Gelu("none".to_owned()),
        ("gelu_tanh", [], None) => Activation::Gelu("tanh".to_owned()),
        ("silu", [], None) => Activation::Silu,
        ("mish", [], None) => Activation::Mish,
        ("hardswish", [], None) => Activation::Hardswish,
        ("hardsigmoid", [], None) => Activation::Hardsigmoid,
        ("sigmoid", [], None) => Activation::Sigmoid,
        ("tanh", [], None) => Activation::Tanh,
        ("softplus", &[beta, threshold], None) => Activation::Softplus(beta, threshold),
        (_, _, weights) => {
            return Err(Error::value(
                "activation",
                "an activation function the engine knows, with its numbers",
                format!("{name:?} with {numbers:?}, weights: {}", weights.is_some()),
            ))
        }
    })
}

/// Refuses settings that [`adaround_layer`] would, ahead of any work.
#[pyfunction]
#[pyo3(signature = (*, num_iterations, reg_param, beta_range, warm_start, learning_rate, early_stop))]
fn check_adaround_settings(
    num_iterations: u64,
    reg_param: f64,
    beta_range: (f64, f64),
    warm_start: f64,
    learning_rate: f64,
    early_stop: Option<f64>,
) -> PyResult<()> {
    let config = Config {
        num_iterations,
        reg_param,
        beta_range,
        warm_start,
        learning_rate,
        early_stop,
        seed: 0,
    };
    config.check().map_err(to_py)
}

/// Adam's learning rate for a number of iterations, where none is given.
#[pyfunction]
fn adaround_learning_rate(num_iterations: u64) -> f64 {
    default_learning_rate(num_iterations)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(adaround_learning_rate, module)?)?;
    module.add_function(wrap_pyfunction!(check_adaround_settings, module)?)?;
    module.add_function(wrap_pyfunction!(adaround_layer, module)?)
}
