//! Cross-layer equalization: finding the layers on a graph, and the arithmetic.

use super::batch_norm_fold::{layer, module_ids, PyLayerParameters};
use super::error::to_py;
use super::graph::Graph;
use crate::graph::cross_layer_equalization::{cut_into_sets, layer_groups, norm_linears, Shape};
use crate::ptq::cross_layer_equalization::{absorb_high_bias, equalize};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::no_grad;

/// Groups of layers, each as (path, whether an activation follows). `folded`: batch normalizations folded
/// since the graph was recorded.
#[pyfunction]
fn find_layer_groups_to_scale(
    py: Python<'_>,
    graph: &Graph,
    fixed: Vec<String>,
    folded: Vec<String>,
) -> Vec<Vec<(String, bool)>> {
    let (fixed, folded) = (module_ids(graph, &fixed), module_ids(graph, &folded));
    let groups = py.allow_threads(|| layer_groups(&graph.graph, &fixed, &folded));
    let path = |id: usize| graph.graph.modules[id].path.clone();
    groups
        .into_iter()
        .map(|g| g.iter().map(|m| (path(m.layer), m.activation)).collect())
        .collect()
}

/// Sets of a group of layers given by (in_channels, out_channels, groups), as positions in it.
#[pyfunction]
fn cut_layer_group(group: Vec<(i64, i64, i64)>) -> Vec<Vec<usize>> {
    let shape = |&(in_channels, out_channels, groups): &(i64, i64, i64)| Shape {
        in_channels,
        out_channels,
        groups,
    };
    cut_into_sets(&group.iter().map(shape).collect::<Vec<_>>())
}

/// Norms with the linear layers behind them, by path.
#[pyfunction]
fn find_norm_linears(
    py: Python<'_>,
    graph: &Graph,
    fixed: Vec<String>,
) -> Vec<(String, Vec<String>)> {
    let fixed = module_ids(graph, &fixed);
    let found = py.allow_threads(|| norm_linears(&graph.graph, &fixed));
    let path = |id: usize| graph.graph.modules[id].path.clone();
    found
        .into_iter()
        .map(|(norm, linears)| (path(norm), linears.into_iter().map(path).collect()))
        .collect()
}

type Parameters = Vec<(PyTensor, Option<PyTensor>)>;

/// Weights and biases of equalized layers, those of `last` at the end, and the factors, float64.
#[pyfunction]
fn equalize_layers(
    py: Python<'_>,
    chain: Vec<PyLayerParameters>,
    last: Vec<PyLayerParameters>,
) -> PyResult<(Parameters, Vec<PyTensor>)> {
    let chain: Vec<_> = chain.into_iter().map(layer).collect::<PyResult<_>>()?;
    let last: Vec<_> = last.into_iter().map(layer).collect::<PyResult<_>>()?;
    let done = py
        .allow_threads(move || no_grad(|| equalize(&chain, &last)))
        .map_err(to_py)?;
    Ok((
        done.layers
            .into_iter()
            .map(|(weight, bias)| (PyTensor(weight), bias.map(PyTensor)))
            .collect(),
        done.factors.into_iter().map(PyTensor).collect(),
    ))
}

/// Biases of two layers after high-bias absorption.
#[pyfunction]
fn absorb_bias(
    py: Python<'_>,
    first: PyLayerParameters,
    second: PyLayerParameters,
    gamma_beta: (PyTensor, PyTensor),
    factor: PyTensor,
    activation: bool,
) -> PyResult<(PyTensor, PyTensor)> {
    let (first, second) = (layer(first)?, layer(second)?);
    let (gamma, beta) = (gamma_beta.0 .0, gamma_beta.1 .0);
    let factor = factor.0;
    let (bias1, bias2) = py
        .allow_threads(move || {
            no_grad(|| absorb_high_bias(&first, &second, (&gamma, &beta), &factor, activation))
        })
        .map_err(to_py)?;
    Ok((PyTensor(bias1), PyTensor(bias2)))
}

/// Adds this file's functions to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(find_layer_groups_to_scale, module)?)?;
    module.add_function(wrap_pyfunction!(cut_layer_group, module)?)?;
    module.add_function(wrap_pyfunction!(find_norm_linears, module)?)?;
    module.add_function(wrap_pyfunction!(equalize_layers, module)?)?;
    module.add_function(wrap_pyfunction!(absorb_bias, module)?)?;
    Ok(())
}
