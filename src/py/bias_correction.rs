//! Bias correction: neighbouring normalizations on a graph, and the arithmetic.

use super::batch_norm_fold::{layer, PyLayerParameters};
use super::error::to_py;
use super::graph::Graph;
use crate::graph::batch_norm_fold::{neighbours, Follower};
use crate::ptq::bias_correction::{
    analytic, corrected, expected_activation, Activation, ChannelMean,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::no_grad;

/// (layer, norm in front, activation behind that, norm behind, activation behind that)
type PyNeighbours = (
    String,
    Option<String>,
    &'static str,
    Option<String>,
    &'static str,
);

/// Layers with a batch norm next to them: paths, and activations as members of `ActivationType`.
#[pyfunction]
fn find_batch_norm_neighbours(py: Python<'_>, graph: &Graph) -> Vec<PyNeighbours> {
    let found = py.allow_threads(|| neighbours(&graph.graph));
    let path = |id: usize| graph.graph.modules[id].path.clone();
    let name = |follower: Follower| match follower {
        Follower::Relu => "relu",
        Follower::Relu6 => "relu6",
        Follower::Other => "no_activation",
    };
    found
        .into_iter()
        .map(|n| {
            (
                path(n.layer),
                n.input.map(|(norm, _)| path(norm)),
                name(n.input.map_or(Follower::Other, |(_, follower)| follower)),
                n.output.map(|(norm, _)| path(norm)),
                name(n.output.map_or(Follower::Other, |(_, follower)| follower)),
            )
        })
        .collect()
}

/// Mean output of a batch norm with this weight and bias, and an activation, float64.
#[pyfunction]
fn expected_input(
    py: Python<'_>,
    gamma: PyTensor,
    beta: PyTensor,
    activation: &str,
) -> PyResult<PyTensor> {
    let activation = match activation {
        "no_activation" => Activation::Identity,
        "relu" => Activation::Relu,
        "relu6" => Activation::Relu6,
        other => {
            return Err(PyValueError::new_err(format!(
                "activation: expected no_activation, relu or relu6, got {other}"
            )))
        }
    };
    let (gamma, beta) = (gamma.0, beta.0);
    py.allow_threads(move || no_grad(|| expected_activation(&gamma, &beta, activation)))
        .map(PyTensor)
        .map_err(to_py)
}

/// Bias of a layer with a quantized weight and inputs of the given means.
#[pyfunction]
fn correct_bias_analytically(
    py: Python<'_>,
    layer: PyLayerParameters,
    quantized: PyTensor,
    mean_input: PyTensor,
) -> PyResult<PyTensor> {
    let layer = self::layer(layer)?;
    let (quantized, mean_input) = (quantized.0, mean_input.0);
    py.allow_threads(move || no_grad(|| analytic(&layer, &quantized, &mean_input)))
        .map(PyTensor)
        .map_err(to_py)
}

/// Bias of a layer after a shift of its mean output, that of `quantized` against that of `float`.
#[pyfunction]
fn correct_bias_empirically(
    py: Python<'_>,
    layer: PyLayerParameters,
    float: &PyChannelMean,
    quantized: &PyChannelMean,
) -> PyResult<PyTensor> {
    let layer = self::layer(layer)?;
    let (float, quantized) = (float.mean()?.0, quantized.mean()?.0);
    py.allow_threads(move || no_grad(|| corrected(&layer, &(quantized - float))))
        .map(PyTensor)
        .map_err(to_py)
}

/// Mean of each channel over any number of tensors. See `rimet::ptq::bias_correction::ChannelMean`.
#[pyclass(module = "rimet._core", name = "ChannelMean")]
struct PyChannelMean(ChannelMean);

#[pymethods]
impl PyChannelMean {
    #[new]
    fn new() -> Self {
        PyChannelMean(ChannelMean::default())
    }

    /// Takes in a tensor whose channels are in dimension `dim`.
    fn update(&mut self, py: Python<'_>, tensor: PyTensor, dim: i64) -> PyResult<()> {
        let tensor = tensor.0;
        py.allow_threads(move || no_grad(|| self.0.update(&tensor, dim)))
            .map_err(to_py)
    }

    /// The mean so far, float64.
    fn mean(&self) -> PyResult<PyTensor> {
        self.0.mean().map(PyTensor).map_err(to_py)
    }
}

/// Adds this file's classes and functions to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyChannelMean>()?;
    module.add_function(wrap_pyfunction!(find_batch_norm_neighbours, module)?)?;
    module.add_function(wrap_pyfunction!(expected_input, module)?)?;
    module.add_function(wrap_pyfunction!(correct_bias_analytically, module)?)?;
    module.add_function(wrap_pyfunction!(correct_bias_empirically, module)?)?;
    Ok(())
}
