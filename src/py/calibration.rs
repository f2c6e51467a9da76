//! Encoding analyzers: histograms and the searches over them.

use super::error::to_py;
use crate::calibration::histogram::Parts;
use crate::calibration::{
    with_values, Bins, HistogramStatistics, MseSearch, Percentile, SqnrSearch,
};
use crate::error::{Error, Result};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::{Kind, Tensor};

type Ranges = (PyTensor, PyTensor);

/// Running histograms, one per encoding. See `rimet::calibration::HistogramStatistics`.
#[pyclass(module = "rimet._core", name = "HistogramStatistics")]
#[derive(Clone)]
struct PyHistogramStatistics(HistogramStatistics);

#[pymethods]
impl PyHistogramStatistics {
    #[new]
    #[pyo3(signature = (num_bins, growth_limit=None))]
    fn new(num_bins: usize, growth_limit: Option<f64>) -> PyResult<Self> {
        HistogramStatistics::new(num_bins, growth_limit)
            .map(Self)
            .map_err(to_py)
    }

    /// Number of encodings; 0 before any data.
    fn __len__(&self) -> usize {
        self.0.groups().len()
    }

    /// Number of bins over the range of a batch.
    #[getter]
    fn num_bins(&self) -> u32 {
        self.0.bins()
    }

    fn __copy__(&self) -> Self {
        self.clone()
    }

    /// Forgets all data.
    fn reset(&mut self) {
        self.0.reset();
    }

    /// Statistics of a tensor alone; `limited`: within the limits that the data so far have set.
    #[pyo3(signature = (input, shape, block_size=None, *, limited=false))]
    fn collect(
        &self,
        py: Python<'_>,
        input: PyTensor,
        shape: Vec<i64>,
        block_size: Option<Vec<i64>>,
        limited: bool,
    ) -> PyResult<Self> {
        let input = input.0;
        py.allow_threads(move || {
            with_values(&input, &shape, block_size.as_deref(), |values, geometry| {
                self.0.collect(values, geometry, limited)
            })
        })
        .map(Self)
        .map_err(to_py)
    }

    /// Takes in other statistics.
    fn merge(&mut self, py: Python<'_>, other: &Self) -> PyResult<()> {
        let other = other.0.clone();
        py.allow_threads(|| self.0.merge(other)).map_err(to_py)
    }

    /// Low and high ends of the bins for batches of these finite ranges.
    fn batch_range(&self, min: PyTensor, max: PyTensor) -> PyResult<Ranges> {
        let ranges = pairs(&min.0, &max.0).map_err(to_py)?;
        to_tensors(&self.0.batch_range(&ranges).map_err(to_py)?)
    }

    /// Statistics of a batch counted elsewhere: counts `[encodings, num_bins]`, int64.
    #[pyo3(name = "from_counts")]
    fn with_counts(&self, min: PyTensor, max: PyTensor, counts: PyTensor) -> PyResult<Self> {
        let build = || {
            let ranges = pairs(&min.0, &max.0)?;
            self.0
                .from_counts(&ranges, &to_vec::<i64>(&counts.0, Kind::Int64)?)
        };
        build().map(Self).map_err(to_py)
    }

    /// Counts, edges (one more), min and max of one encoding.
    fn group(&self, index: usize) -> PyResult<(PyTensor, PyTensor, f32, f32)> {
        let group = self
            .0
            .groups()
            .get(index)
            .ok_or_else(|| PyIndexError::new_err("no such encoding"))?;
        let (indices, counts) = group.counts();
        let (first, number) = match group.bins() {
            Bins::Equal { .. } => (0, self.0.bins() as usize),
            Bins::Lattice { .. } => (
                indices[0],
                (indices[indices.len() - 1] - indices[0]) as usize + 1,
            ),
        };
        let mut dense = vec![0.0_f32; number];
        for (&i, &n) in indices.iter().zip(counts) {
            dense[(i - first) as usize] = n as f32;
        }
        let edges: Vec<f32> = (first..=first + number as i32)
            .map(|i| group.edge(i, self.0.bins()))
            .collect();
        let wrap = |v: &[f32]| Ok::<_, PyErr>(PyTensor(tensor(v).map_err(to_py)?));
        Ok((wrap(&dense)?, wrap(&edges)?, group.min(), group.max()))
    }

    /// Percentile encodings `(min, max)`, one value per encoding.
    fn percentile(
        &self,
        py: Python<'_>,
        percentile: f64,
        num_steps: f64,
        symmetric: bool,
    ) -> PyResult<Ranges> {
        let found = py.allow_threads(|| {
            Percentile::new(percentile)?.encodings(&self.0, num_steps, symmetric)
        });
        to_tensors(&found.map_err(to_py)?)
    }

    /// SQNR encodings `(min, max)`, one value per encoding.
    #[pyo3(signature = (
        num_steps, symmetric, *, asymmetric_delta_candidates, symmetric_delta_candidates,
        offset_candidates, gamma,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn sqnr(
        &self,
        py: Python<'_>,
        num_steps: f64,
        symmetric: bool,
        asymmetric_delta_candidates: usize,
        symmetric_delta_candidates: usize,
        offset_candidates: usize,
        gamma: f64,
    ) -> PyResult<Ranges> {
        let found = py.allow_threads(|| {
            SqnrSearch::new(
                asymmetric_delta_candidates,
                symmetric_delta_candidates,
                offset_candidates,
                gamma,
            )?
            .encodings(&self.0, num_steps, symmetric)
        });
        to_tensors(&found.map_err(to_py)?)
    }

    /// MSE encodings `(min, max)`, one value per encoding.
    #[pyo3(signature = (num_steps, symmetric, *, refinement_rounds))]
    fn mse(
        &self,
        py: Python<'_>,
        num_steps: f64,
        symmetric: bool,
        refinement_rounds: u32,
    ) -> PyResult<Ranges> {
        let found = py.allow_threads(|| {
            MseSearch::new(refinement_rounds)?.encodings(&self.0, num_steps, symmetric)
        });
        to_tensors(&found.map_err(to_py)?)
    }

    /// Everything as tensors: ranges `[encodings, 6]`, level, start, index, count.
    fn to_parts(&self) -> PyResult<(PyTensor, PyTensor, PyTensor, PyTensor, PyTensor)> {
        let parts = self.0.to_parts();
        let build = || -> Result<_> {
            Ok((
                PyTensor(tensor(&parts.range)?.f_view([-1, 6])?),
                PyTensor(tensor(&parts.level)?),
                PyTensor(tensor(&parts.start)?),
                PyTensor(tensor(&parts.index)?),
                PyTensor(tensor(&parts.count)?),
            ))
        };
        build().map_err(to_py)
    }

    /// Replaces all data by what `to_parts` gave.
    fn set_parts(
        &mut self,
        range: PyTensor,
        level: PyTensor,
        start: PyTensor,
        index: PyTensor,
        count: PyTensor,
    ) -> PyResult<()> {
        let mut set = || {
            let parts = Parts {
                range: to_vec(&range.0, Kind::Float)?,
                level: to_vec(&level.0, Kind::Int)?,
                start: to_vec(&start.0, Kind::Int64)?,
                index: to_vec(&index.0, Kind::Int)?,
                count: to_vec(&count.0, Kind::Int64)?,
            };
            self.0.set_parts(&parts)
        };
        set().map_err(to_py)
    }
}

fn tensor<T: tch::kind::Element>(values: &[T]) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?)
}

fn to_vec<T: tch::kind::Element>(tensor: &Tensor, kind: Kind) -> Result<Vec<T>>
where
    Vec<T>: TryFrom<Tensor, Error = tch::TchError>,
{
    if tensor.kind() != kind {
        return Err(Error::type_(
            "parts",
            format!("a {kind:?} tensor"),
            format!("{:?}", tensor.kind()),
        ));
    }
    Ok(Vec::try_from(tensor.f_flatten(0, -1)?)?)
}

fn pairs(min: &Tensor, max: &Tensor) -> Result<Vec<(f32, f32)>> {
    let (min, max) = (to_vec(min, Kind::Float)?, to_vec(max, Kind::Float)?);
    if min.len() != max.len() {
        return Err(Error::value(
            "max",
            format!("{} values, as in min", min.len()),
            max.len(),
        ));
    }
    Ok(min.into_iter().zip(max).collect())
}

fn to_tensors(ranges: &[(f32, f32)]) -> PyResult<Ranges> {
    let (min, max): (Vec<f32>, Vec<f32>) = ranges.iter().copied().unzip();
    let wrap = |v: &[f32]| tensor(v).map(PyTensor).map_err(to_py);
    Ok((wrap(&min)?, wrap(&max)?))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyHistogramStatistics>()
}
