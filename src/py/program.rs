//! `rimet._core`: programs, the records of runs that can be run again.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::graph::program::{Callable, Origin, Output, Program, ProgramBuilder, ValueId};

/// (value that was there already, storage that was there already); neither: new memory
type PyOutput = (Option<usize>, Option<usize>);
/// (kind, position or None, name or None)
type PyOrigin<'a> = (&'static str, Option<usize>, Option<&'a str>);
/// (kind, name, scope, inputs, outputs, is_random, expiring)
type PyStep<'a> = (
    &'static str,
    &'a str,
    &'a str,
    &'a [usize],
    &'a [usize],
    bool,
    &'a [usize],
);

fn describe(origin: &Origin) -> PyOrigin<'_> {
    match origin {
        Origin::Input(position) => ("input", Some(*position), None),
        Origin::State(name) => ("state", None, Some(name)),
        Origin::Constant(number) => ("constant", Some(*number), None),
        Origin::Step(step) => ("step", Some(*step), None),
    }
}

/// Takes the events of one run, operator by operator.
#[pyclass(module = "rimet._core", name = "ProgramBuilder")]
struct PyProgramBuilder(ProgramBuilder);

#[pymethods]
impl PyProgramBuilder {
    #[new]
    fn new() -> Self {
        PyProgramBuilder(ProgramBuilder::new())
    }

    /// An input of the run. Returns (value, storage).
    #[pyo3(signature = (position, storage=None))]
    fn input(&mut self, position: usize, storage: Option<usize>) -> (usize, usize) {
        self.0.value(Origin::Input(position), storage)
    }

    /// A parameter or buffer. Returns (value, storage).
    #[pyo3(signature = (name, storage=None))]
    fn state(&mut self, name: String, storage: Option<usize>) -> (usize, usize) {
        self.0.value(Origin::State(name), storage)
    }

    /// A tensor from outside of the run. Returns (value, storage).
    #[pyo3(signature = (number, storage=None))]
    fn constant(&mut self, number: usize, storage: Option<usize>) -> (usize, usize) {
        self.0.value(Origin::Constant(number), storage)
    }

    /// A call of a "module", an "operator" or a "guard". Returns (value, storage) of each output.
    #[allow(clippy::too_many_arguments)]
    fn step(
        &mut self,
        kind: &str,
        name: String,
        scope: String,
        inputs: Vec<ValueId>,
        outputs: Vec<PyOutput>,
        writes: Vec<usize>,
        is_random: bool,
    ) -> PyResult<Vec<(usize, usize)>> {
        let callable = match kind {
            "module" => Callable::Module(name),
            "operator" => Callable::Operator(name),
            "guard" => Callable::Guard(name),
            other => return Err(PyRuntimeError::new_err(format!("kind of step: {other}"))),
        };
        let outputs: Vec<_> = outputs
            .into_iter()
            .map(|output| match output {
                (Some(value), _) => Output::Known(value),
                (None, Some(storage)) => Output::View(storage),
                (None, None) => Output::Fresh,
            })
            .collect();
        Ok(self
            .0
            .step(callable, scope, inputs, &outputs, writes, is_random)?)
    }

    /// The program so far, with its results; the builder starts anew.
    fn finish(&mut self, outputs: Vec<ValueId>) -> PyResult<PyProgram> {
        Ok(PyProgram(std::mem::take(&mut self.0).finish(outputs)?))
    }
}

/// What ran, as plain data. See `rimet::graph::program::Program`.
#[pyclass(module = "rimet._core", name = "Program", frozen)]
struct PyProgram(Program);

#[pymethods]
impl PyProgram {
    fn __len__(&self) -> usize {
        self.0.steps.len()
    }

    /// Of each value: (kind, position, name).
    fn origins(&self) -> Vec<PyOrigin<'_>> {
        self.0.values.iter().map(|v| describe(&v.origin)).collect()
    }

    /// Of each step: (kind, name, scope, inputs, outputs, is_random, values that nothing needs after it).
    fn steps(&self) -> Vec<PyStep<'_>> {
        let steps = self.0.steps.iter().enumerate();
        steps
            .map(|(id, step)| {
                let (kind, name) = match &step.callable {
                    Callable::Module(path) => ("module", path),
                    Callable::Operator(name) => ("operator", name),
                    Callable::Guard(name) => ("guard", name),
                };
                (
                    kind,
                    name.as_str(),
                    step.scope.as_str(),
                    step.inputs.as_slice(),
                    step.outputs.as_slice(),
                    step.is_random,
                    self.0.expiring(id),
                )
            })
            .collect()
    }

    /// Values that are the run's result.
    #[getter]
    fn outputs(&self) -> Vec<usize> {
        self.0.outputs.clone()
    }

    /// Whether some step draws random numbers.
    #[getter]
    fn is_random(&self) -> bool {
        self.0.is_random()
    }

    /// Steps that call the module at a path, in order.
    fn calls(&self, path: &str) -> Vec<usize> {
        self.0.calls(path).to_vec()
    }

    /// What the run writes to although it did not make it: (kind, position, name).
    fn written(&self) -> Vec<PyOrigin<'_>> {
        self.0.written().into_iter().map(describe).collect()
    }

    /// Values on memory that outlives the run.
    fn outside(&self) -> Vec<usize> {
        self.0.outside()
    }

    /// Values on memory that is written to after it was made.
    fn mutable(&self) -> Vec<usize> {
        self.0.mutable()
    }

    /// The one step that takes the result of the first call of a module.
    fn single_consumer(&self, path: &str) -> Option<usize> {
        self.0.single_consumer(path)
    }
}

/// Adds this file's classes to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyProgramBuilder>()?;
    module.add_class::<PyProgram>()
}
