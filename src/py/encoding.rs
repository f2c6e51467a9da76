//! What the engine knows of formats.

use super::error::to_py;
use crate::encoding::FloatFormat;
use pyo3::prelude::*;

/// The largest value of a floating-point format, and the exponent of its smallest normal one.
#[pyfunction]
fn float_format(
    exponent_bits: i64,
    mantissa_bits: i64,
    finite: bool,
    unsigned_zero: bool,
) -> PyResult<(f64, i32)> {
    let format =
        FloatFormat::new(exponent_bits, mantissa_bits, finite, unsigned_zero).map_err(to_py)?;
    Ok((format.max(), format.min_exponent()))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(float_format, module)?)
}
