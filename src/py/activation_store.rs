//! `rimet._core`: live activations under a memory budget.

use std::collections::HashMap;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3_tch::PyTensor;

use super::error::to_py;
use crate::ptq::activation_store::{self, ActivationStore};

/// Counts the memory of live activations. See `rimet::ptq::activation_store::ActivationStore`.
#[pyclass(module = "rimet._core", name = "ActivationStore")]
struct PyActivationStore(ActivationStore);

#[pymethods]
impl PyActivationStore {
    #[new]
    fn new(budget: u64, folder: PathBuf) -> PyResult<Self> {
        ActivationStore::new(budget, folder)
            .map(Self)
            .map_err(to_py)
    }

    /// One more holder of a storage; False: over the budget, not counted.
    fn hold(&mut self, key: usize, bytes: u64) -> bool {
        self.0.hold(key, bytes)
    }

    /// The first holder of a storage in a mapped file.
    fn hold_mapped(&mut self, key: usize, bytes: u64) {
        self.0.hold_mapped(key, bytes);
    }

    /// Sets a part of the budget aside for a run of the model on one batch.
    fn reserve(&mut self, bytes: u64) {
        self.0.reserve(bytes);
    }

    /// What may be in memory at once.
    fn limit(&self) -> u64 {
        self.0.limit()
    }

    /// One holder less.
    fn release(&mut self, key: usize) -> PyResult<()> {
        self.0.release(key).map_err(to_py)
    }

    /// A copy of bytes in a mapped file.
    fn spill(&mut self, py: Python<'_>, bytes: PyTensor) -> PyResult<PyTensor> {
        let bytes = bytes.0;
        let store = &mut self.0;
        py.allow_threads(move || store.spill(&bytes))
            .map(PyTensor)
            .map_err(to_py)
    }

    /// Has the allocator give freed memory back.
    fn trim(&mut self) {
        self.0.trim();
    }

    /// Bytes: resident, peak_resident, mapped, spilled.
    fn usage(&self) -> HashMap<&'static str, u64> {
        let usage = self.0.usage();
        HashMap::from([
            ("resident", usage.resident),
            ("peak_resident", usage.peak_resident),
            ("mapped", usage.mapped),
            ("spilled", usage.spilled),
        ])
    }
}

/// Large blocks are pages of their own, until as many calls with False as with True.
#[pyfunction]
fn keep_large_blocks_apart(apart: bool) {
    activation_store::keep_large_blocks_apart(apart);
}

/// Adds this file's class and function to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyActivationStore>()?;
    module.add_function(wrap_pyfunction!(keep_large_blocks_apart, module)?)
}
