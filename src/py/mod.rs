//! The Python extension `rimet._core`. The only place where pyo3 is named.
//!
//! One thin file per module of the engine: extract the arguments, release the GIL, call, wrap.

use pyo3::prelude::*;

mod activation_store;
mod adaround;
mod backend;
mod batch_norm_fold;
mod bias_correction;
mod calibration;
mod cross_layer_equalization;
mod encoding;
mod error;
mod export;
mod graph;
mod linear_map;
mod program;
mod seq_mse;

/// The compiled engine of rimet. Private: use the package `rimet`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    pyo3_log::try_init().ok();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    adaround::register(module)?;
    activation_store::register(module)?;
    backend::register(module)?;
    batch_norm_fold::register(module)?;
    bias_correction::register(module)?;
    cross_layer_equalization::register(module)?;
    calibration::register(module)?;
    encoding::register(module)?;
    export::register(module)?;
    graph::register(module)?;
    linear_map::register(module)?;
    seq_mse::register(module)?;
    program::register(module)?;
    Ok(())
}
