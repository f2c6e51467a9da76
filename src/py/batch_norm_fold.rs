//! Batch-norm folding: finding pairs on a graph, and the arithmetic.

use super::error::to_py;
use super::graph::Graph;
use crate::graph::batch_norm_fold::find;
use crate::graph::ModuleId;
use crate::ptq::batch_norm_fold::{fold, scale_range, BatchNorm, Direction};
use crate::ptq::LayerParameters;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use std::collections::HashSet;
use tch::no_grad;

/// (weight, bias, groups, transposed)
pub(super) type PyLayerParameters = (PyTensor, Option<PyTensor>, i64, bool);
/// (weight, bias, running_mean, running_var, eps)
type PyBatchNorm = (Option<PyTensor>, Option<PyTensor>, PyTensor, PyTensor, f64);

pub(super) fn layer(
    (weight, bias, groups, transposed): PyLayerParameters,
) -> PyResult<LayerParameters> {
    LayerParameters::new(weight.0, bias.map(|b| b.0), groups, transposed).map_err(to_py)
}

fn batch_norm((weight, bias, running_mean, running_var, eps): PyBatchNorm) -> BatchNorm {
    BatchNorm {
        weight: weight.map(|w| w.0),
        bias: bias.map(|b| b.0),
        running_mean: running_mean.0,
        running_var: running_var.0,
        eps,
    }
}

/// Ids of modules by their paths; paths that the graph does not know are left out.
pub(super) fn module_ids(graph: &Graph, paths: &[String]) -> HashSet<ModuleId> {
    paths.iter().filter_map(|p| graph.graph.module(p)).collect()
}

type Pairs = Vec<(String, String)>;

/// Paths of the pairs (layer, norm) and (norm, layer) and of the norms that stay.
#[pyfunction]
fn find_batch_norms_to_fold(
    py: Python<'_>,
    graph: &Graph,
    fixed: Vec<String>,
    backward_only: Vec<String>,
) -> (Pairs, Pairs, Vec<String>) {
    let (fixed, backward_only) = (module_ids(graph, &fixed), module_ids(graph, &backward_only));
    let folds = py.allow_threads(|| find(&graph.graph, &fixed, &backward_only));
    let path = |id: ModuleId| graph.graph.modules[id].path.clone();
    let paths = |pairs: Vec<(ModuleId, ModuleId)>| -> Pairs {
        pairs.into_iter().map(|(a, b)| (path(a), path(b))).collect()
    };
    (
        paths(folds.backward),
        paths(folds.forward),
        folds.standalone.into_iter().map(path).collect(),
    )
}

/// Weight and bias of a layer with a batch norm folded in: `direction` is "backward" or "forward".
#[pyfunction]
fn fold_batch_norm(
    py: Python<'_>,
    layer: PyLayerParameters,
    norm: PyBatchNorm,
    direction: &str,
) -> PyResult<(PyTensor, PyTensor)> {
    let direction = match direction {
        "backward" => Direction::Backward,
        "forward" => Direction::Forward,
        other => {
            return Err(PyValueError::new_err(format!(
                "direction: expected backward or forward, got {other}"
            )))
        }
    };
    let (layer, norm) = (self::layer(layer)?, batch_norm(norm));
    let (weight, bias) = py
        .allow_threads(move || no_grad(|| fold(&layer, &norm, direction)))
        .map_err(to_py)?;
    Ok((PyTensor(weight), PyTensor(bias)))
}

/// (scale, shift) of a batch norm in evaluation mode, float64.
#[pyfunction]
fn batch_norm_affine(py: Python<'_>, norm: PyBatchNorm) -> PyResult<(PyTensor, PyTensor)> {
    let norm = batch_norm(norm);
    let (scale, shift) = py
        .allow_threads(move || no_grad(|| norm.affine()))
        .map_err(to_py)?;
    Ok((PyTensor(scale), PyTensor(shift)))
}

/// The range of a weight's quantizer after the weight was multiplied by `scale`.
#[pyfunction]
fn scale_quantizer_range(
    py: Python<'_>,
    min: PyTensor,
    max: PyTensor,
    scale: PyTensor,
) -> PyResult<(PyTensor, PyTensor)> {
    let (min, max, scale) = (min.0, max.0, scale.0);
    let (min, max) = py
        .allow_threads(move || no_grad(|| scale_range(&min, &max, &scale)))
        .map_err(to_py)?;
    Ok((PyTensor(min), PyTensor(max)))
}

/// Adds this file's functions to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(find_batch_norms_to_fold, module)?)?;
    module.add_function(wrap_pyfunction!(fold_batch_norm, module)?)?;
    module.add_function(wrap_pyfunction!(batch_norm_affine, module)?)?;
    module.add_function(wrap_pyfunction!(scale_quantizer_range, module)?)?;
    Ok(())
}
