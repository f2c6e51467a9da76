//! The engine's errors as Python exceptions. Every variant is named, so that a new one cannot be
//! forgotten.

use crate::error::Error;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::PyErr;

/// `Value` and `Json` become `ValueError`, `Type` `TypeError`, `Io` `OSError`, the others
/// `RuntimeError`.
pub(crate) fn to_py(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Value { .. } | Error::Json { .. } => PyValueError::new_err(text),
        Error::Type { .. } => PyTypeError::new_err(text),
        Error::Io { .. } => PyOSError::new_err(text),
        Error::State(_) | Error::Torch(_) => PyRuntimeError::new_err(text),
    }
}
