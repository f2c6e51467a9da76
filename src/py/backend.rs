//! Which code runs: instruction set, versions.

use crate::kernels::cpu::isa::{self, Isa};
use crate::kernels::cuda;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The instruction set of the CPU kernels in use, and the widest one this processor has.
#[pyfunction]
fn cpu_isa() -> (&'static str, &'static str) {
    (isa::active().name(), isa::detected().name())
}

/// Makes the CPU kernels use an instruction set (`None`: the default again); for tests. Answers whether
/// this processor has it.
#[pyfunction]
#[pyo3(signature = (name=None))]
fn force_cpu_isa(name: Option<&str>) -> PyResult<bool> {
    match name {
        None => Ok(isa::force(None)),
        Some(name) => match Isa::from_name(name) {
            Some(wanted) => Ok(isa::force(Some(wanted))),
            None => Err(PyValueError::new_err(format!(
                "name: expected one of portable, avx2, avx512, got {name:?}"
            ))),
        },
    }
}

/// Whether kernels compute the tensors of a CUDA device, and with what or why not.
#[pyfunction]
fn cuda_status(py: Python<'_>, index: i32) -> (bool, String) {
    // Opening the driver and NVRTC takes a while the first time.
    let status = py.allow_threads(|| cuda::status(index));
    (status.kernels, status.reason)
}

/// A translation unit with every CUDA kernel; for tests.
#[pyfunction]
fn cuda_kernel_source() -> String {
    cuda::kernel::unit(&cuda::kernels())
}

/// Version of the library whose ops `torch.ops.rimet` holds.
#[pyfunction]
fn registered_version() -> &'static str {
    crate::register_ops()
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_isa, module)?)?;
    module.add_function(wrap_pyfunction!(force_cpu_isa, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_status, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_kernel_source, module)?)?;
    module.add_function(wrap_pyfunction!(registered_version, module)?)?;
    Ok(())
}
