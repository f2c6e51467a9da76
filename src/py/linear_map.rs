//! Layers as linear maps, for the techniques that reconstruct their outputs.

use crate::error::{Error, Result};
use crate::ops::Convolution;
use crate::ptq::linear_map::LinearMap;
use pyo3::prelude::*;

/// How a layer turns inputs into outputs. See `rimet::ptq::linear_map::LinearMap`.
#[pyclass(module = "rimet._core", name = "LinearMap", frozen)]
pub struct PyLinearMap(pub LinearMap);

#[pymethods]
impl PyLinearMap {
    /// A linear layer.
    #[staticmethod]
    fn linear() -> Self {
        Self(LinearMap::Linear)
    }

    /// A convolution; `pad` as `torch.nn.functional.pad` takes it, done ahead of it.
    #[staticmethod]
    #[pyo3(signature = (*, stride, padding, dilation, output_padding, transposed, groups, pad=None, pad_mode="constant"))]
    #[allow(clippy::too_many_arguments)]
    fn convolution(
        stride: Vec<i64>,
        padding: Vec<i64>,
        dilation: Vec<i64>,
        output_padding: Vec<i64>,
        transposed: bool,
        groups: i64,
        pad: Option<Vec<i64>>,
        pad_mode: &str,
    ) -> Self {
        Self(LinearMap::Convolution {
            convolution: Convolution {
                stride,
                padding,
                dilation,
                output_padding,
                transposed,
                groups,
            },
            pad: pad.map(|sizes| (sizes, pad_mode.to_owned())),
        })
    }
}

/// Runs `work` without the GIL. The function given to it passes a number of steps to `callback` and lets
/// Ctrl-C through; what either raises is what the caller gets.
pub fn interruptible<R: Send>(
    py: Python<'_>,
    callback: Option<PyObject>,
    work: impl FnOnce(&mut dyn FnMut(u64) -> Result<()>) -> Result<R> + Send,
) -> PyResult<R> {
    let mut raised = None;
    let result = py.allow_threads(|| {
        work(&mut |steps| {
            let outcome = Python::with_gil(|py| -> PyResult<()> {
                py.check_signals()?;
                if let Some(callback) = &callback {
                    callback.call1(py, (steps,))?;
                }
                Ok(())
            });
            outcome.map_err(|error| {
                raised = Some(error);
                Error::State("interrupted".to_owned())
            })
        })
    });
    match raised {
        Some(error) => Err(error),
        None => result.map_err(super::error::to_py),
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyLinearMap>()
}
