//! Sequential MSE of one layer.

use super::error::to_py;
use super::linear_map::{interruptible, PyLinearMap};
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::ptq::seq_mse::{
    seq_mse, Config, InputSymmetry, Loss, Method, Problem, WeightQuantizer, MOST_MEMORY,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3_tch::PyTensor;
use tch::Tensor;

/// Chooses the range of a layer's weight quantizer. Answers a dict with `min`, `max`, `candidate`,
/// `loss_before`, `loss_after` and `method`. See `rimet::ptq::seq_mse`.
///
/// `min`, `max`: the full range. `grouping`: blocks per group, per dimension of `shape`, and the number of integer scales.
/// `shared_axis`: an axis of `shape` along which all get the widest range chosen. `memory`: bytes for inputs and what is
/// made of them at a time.
#[pyfunction]
#[pyo3(signature = (
    map, weight, min, max, float_inputs, quant_inputs, *, qmin, qmax, symmetric, shape, block_size, grouping,
    num_candidates, inp_symmetry, loss, shared_axis=None, memory=None, progress=None
))]
#[allow(clippy::too_many_arguments)]
fn seq_mse_layer<'py>(
    py: Python<'py>,
    map: &PyLinearMap,
    weight: PyTensor,
    min: PyTensor,
    max: PyTensor,
    float_inputs: Vec<PyTensor>,
    quant_inputs: Vec<PyTensor>,
    qmin: i64,
    qmax: i64,
    symmetric: bool,
    shape: Vec<i64>,
    block_size: Option<Vec<i64>>,
    grouping: Option<(Vec<i64>, i64)>,
    num_candidates: u32,
    inp_symmetry: &str,
    loss: &str,
    shared_axis: Option<i64>,
    memory: Option<u64>,
    progress: Option<PyObject>,
) -> PyResult<Bound<'py, PyDict>> {
    let config = Config {
        num_candidates,
        symmetry: symmetry_of(inp_symmetry).map_err(to_py)?,
        loss: loss_of(loss).map_err(to_py)?,
        shared_axis,
    };
    let quantizer = WeightQuantizer {
        grid: AffineGrid::new(qmin, qmax, 0.0).map_err(to_py)?,
        symmetric,
        shape,
        block_size,
        grouping,
    };
    let plain = |tensors: Vec<PyTensor>| tensors.into_iter().map(|t| t.0).collect::<Vec<Tensor>>();
    let (float_inputs, quant_inputs) = (plain(float_inputs), plain(quant_inputs));
    let needed = match config.symmetry {
        InputSymmetry::Symfp => float_inputs.len(),
        InputSymmetry::Symqt => quant_inputs.len(),
        InputSymmetry::Asym if float_inputs.len() == quant_inputs.len() => quant_inputs.len(),
        InputSymmetry::Asym => {
            return Err(to_py(Error::value(
                "float_inputs",
                format!("{} batches, as there are quant_inputs", quant_inputs.len()),
                float_inputs.len(),
            )))
        }
    };
    let (weight, min, max) = (weight.0, min.0, max.0);
    let map = map.0.clone();
    let outcome = interruptible(py, progress, move |report| {
        let load = |tensors: &[Tensor], batch: usize| Ok(tensors[batch].shallow_clone());
        let problem = Problem {
            map: &map,
            weight: &weight,
            quantizer: &quantizer,
            range: (&min, &max),
            num_batches: needed,
            float_input: &|batch| load(&float_inputs, batch),
            quant_input: &|batch| load(&quant_inputs, batch),
            memory: memory.unwrap_or(MOST_MEMORY),
        };
        seq_mse(&problem, &config, &mut |candidates| {
            report(u64::from(candidates))
        })
    })?;
    let result = PyDict::new(py);
    result.set_item("min", PyTensor(outcome.min))?;
    result.set_item("max", PyTensor(outcome.max))?;
    result.set_item("candidate", PyTensor(outcome.candidate))?;
    result.set_item("loss_before", outcome.loss_before)?;
    result.set_item("loss_after", outcome.loss_after)?;
    let method = match outcome.method {
        Method::Rows => "rows",
        Method::Gram => "gram",
    };
    result.set_item("method", method)?;
    Ok(result)
}

fn symmetry_of(name: &str) -> Result<InputSymmetry> {
    Ok(match name {
        "symqt" => InputSymmetry::Symqt,
        "symfp" => InputSymmetry::Symfp,
        "asym" => InputSymmetry::Asym,
        other => return Err(Error::value("inp_symmetry", "symqt, symfp or asym", other)),
    })
}

fn loss_of(name: &str) -> Result<Loss> {
    Ok(match name {
        "mse" => Loss::Mse,
        "l1" => Loss::L1,
        "sqnr" => Loss::Sqnr,
        other => return Err(Error::value("loss_fn", "mse, l1 or sqnr", other)),
    })
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(seq_mse_layer, module)?)
}
