//! `rimet._core`: writing and reading encodings files.

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::export::encodings_v0_6_1::{self as v0_6_1, Channel};
use crate::export::{
    self, Encoding, EncodingsError, FloatFormat, Grid, Grouped, ModelEncodings, Side,
};

impl From<EncodingsError> for PyErr {
    fn from(error: EncodingsError) -> Self {
        let text = error.to_string();
        match error {
            EncodingsError::Json(_) | EncodingsError::Format { .. } => PyValueError::new_err(text),
            EncodingsError::Inexpressible { .. } | EncodingsError::Version(_) => {
                PyRuntimeError::new_err(text)
            }
        }
    }
}

fn get<'py, T: FromPyObject<'py>>(dict: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
    match dict.get_item(key)? {
        Some(value) => value.extract(),
        None => Err(PyValueError::new_err(format!(
            "encoding: expected the key {key}, got none"
        ))),
    }
}

fn get_optional<'py, T: FromPyObject<'py>>(
    dict: &Bound<'py, PyDict>,
    key: &str,
) -> PyResult<Option<T>> {
    dict.get_item(key)?
        .filter(|value| !value.is_none())
        .map(|value| value.extract())
        .transpose()
}

fn encoding(dict: &Bound<'_, PyDict>) -> PyResult<Encoding> {
    let grid = match get_optional::<(u32, u32, bool, bool)>(dict, "float_format")? {
        Some((exponent_bits, mantissa_bits, finite, unsigned_zero)) => Grid::Float(FloatFormat {
            exponent_bits,
            mantissa_bits,
            finite,
            unsigned_zero,
        }),
        None => Grid::Affine {
            qmin: get(dict, "qmin")?,
            qmax: get(dict, "qmax")?,
            symmetric: get(dict, "symmetric")?,
            zero_point_shift: get_optional(dict, "zero_point_shift")?.unwrap_or(0.0),
        },
    };
    let grouped = get_optional::<(u32, Vec<i64>, Vec<f64>, Vec<i64>)>(dict, "grouped")?.map(
        |(compressed_bitwidth, per_block_int_scale, per_channel_scale, channel_shape)| Grouped {
            compressed_bitwidth,
            per_block_int_scale,
            per_channel_scale,
            channel_shape,
        },
    );
    Ok(Encoding {
        grid,
        shape: get(dict, "shape")?,
        scale: get(dict, "scale")?,
        offset: get(dict, "offset")?,
        block_size: get_optional(dict, "block_size")?,
        grouped,
    })
}

type PyActivation<'py> = (String, bool, usize, Bound<'py, PyDict>);

fn model(
    activations: Vec<PyActivation<'_>>,
    params: Vec<(String, Bound<'_, PyDict>)>,
) -> PyResult<ModelEncodings> {
    let mut model = ModelEncodings::default();
    for (module, is_input, index, dict) in activations {
        let side = if is_input { Side::Input } else { Side::Output };
        model
            .activations
            .push((module, side, index, encoding(&dict)?));
    }
    for (name, dict) in params {
        model.params.push((name, encoding(&dict)?));
    }
    Ok(model)
}

/// The sections of an encodings file by module names (format 0.6.1), as JSON text.
#[pyfunction]
fn encodings_sections(
    activations: Vec<PyActivation<'_>>,
    params: Vec<(String, Bound<'_, PyDict>)>,
) -> PyResult<String> {
    let sections = v0_6_1::module_sections(&model(activations, params)?)?;
    Ok(export::to_text(&serde_json::Value::Object(sections))?)
}

/// The settings at the head of an encodings file.
fn with_header(
    model: ModelEncodings,
    quantizer_args: &str,
    excluded_layers: Vec<String>,
    producer_version: String,
) -> PyResult<ModelEncodings> {
    Ok(ModelEncodings {
        quantizer_args: serde_json::from_str(quantizer_args)
            .map_err(|e| EncodingsError::Json(e.to_string()))?,
        excluded_layers,
        producer_version,
        ..model
    })
}

/// A whole encodings file as JSON text: by module names (always format 0.6.1), or by tensor names in `version`.
#[pyfunction]
#[pyo3(signature = (activations, params, *, version, quantizer_args, excluded_layers, producer_version))]
fn encodings_file(
    activations: Vec<PyActivation<'_>>,
    params: Vec<(String, Bound<'_, PyDict>)>,
    version: Option<&str>,
    quantizer_args: &str,
    excluded_layers: Vec<String>,
    producer_version: String,
) -> PyResult<String> {
    let model = model(activations, params)?;
    let model = with_header(model, quantizer_args, excluded_layers, producer_version)?;
    match version {
        None => Ok(export::to_text(&v0_6_1::module_file(&model)?)?),
        Some(version) => Ok(export::tensor_file(&model, version)?),
    }
}

/// A whole encodings file as JSON text, in `version`, by the names that the tensors are given here.
#[pyfunction]
#[pyo3(signature = (tensors, params, *, version, quantizer_args, excluded_layers, producer_version))]
fn tensor_encodings_file(
    tensors: Vec<(String, Bound<'_, PyDict>)>,
    params: Vec<(String, Bound<'_, PyDict>)>,
    version: &str,
    quantizer_args: &str,
    excluded_layers: Vec<String>,
    producer_version: String,
) -> PyResult<String> {
    let mut model = model(vec![], params)?;
    for (name, dict) in tensors {
        model.tensors.push((name, encoding(&dict)?));
    }
    let model = with_header(model, quantizer_args, excluded_layers, producer_version)?;
    Ok(export::tensor_file(&model, version)?)
}

fn channels<'py>(py: Python<'py>, channels: &[Channel]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for channel in channels {
        let dict = PyDict::new(py);
        match *channel {
            Channel::Int {
                bitwidth,
                symmetric,
                min,
                max,
                scale,
                offset,
            } => {
                dict.set_item("bitwidth", bitwidth)?;
                dict.set_item("dtype", "int")?;
                dict.set_item("is_symmetric", if symmetric { "True" } else { "False" })?;
                dict.set_item("min", min)?;
                dict.set_item("max", max)?;
                dict.set_item("scale", scale)?;
                dict.set_item("offset", offset)?;
            }
            Channel::Float { bitwidth } => {
                dict.set_item("bitwidth", bitwidth)?;
                dict.set_item("dtype", "float")?;
            }
        }
        list.append(dict)?;
    }
    Ok(list)
}

type ReadActivation<'py> = (String, bool, usize, Bound<'py, PyList>);

type ReadFile<'py> = (
    Vec<String>,
    Vec<ReadActivation<'py>>,
    Vec<(String, Bound<'py, PyList>)>,
);

/// Reads an encodings file by module names: the modules that `activation_encodings` names,
/// `[(module, is_input, index, channels)]`, `[(param, channels)]`.
#[pyfunction]
fn read_encodings<'py>(py: Python<'py>, text: &str) -> PyResult<ReadFile<'py>> {
    let file = v0_6_1::read_module_file(text)?;
    let mut activations = Vec::new();
    for (module, side, index, list) in &file.activations {
        activations.push((
            module.clone(),
            *side == Side::Input,
            *index,
            channels(py, list)?,
        ));
    }
    let mut params = Vec::new();
    for (name, list) in &file.params {
        params.push((name.clone(), channels(py, list)?));
    }
    Ok((file.modules, activations, params))
}

/// Adds this file's functions to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(encodings_sections, module)?)?;
    module.add_function(wrap_pyfunction!(encodings_file, module)?)?;
    module.add_function(wrap_pyfunction!(tensor_encodings_file, module)?)?;
    module.add_function(wrap_pyfunction!(read_encodings, module)?)?;
    Ok(())
}
