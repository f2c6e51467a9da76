//! `rimet._core`: recording a model's graph, and placing quantizers on it.

use std::collections::hash_map::{Entry, HashMap};
use std::ops::Range;

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use crate::graph::config::{Config, Dtype, Format, Kernel};
use crate::graph::error::{ConfigError, GraphError};
use crate::graph::pattern::Flow;
use crate::graph::placement::{self, Defaults, FunctionalPlan, ModulePlan, Plan, Quantizer};
use crate::graph::symbol::{Symbol, SymbolMap};
use crate::graph::{self, op_types, Input, Module, Parameter, Source};

impl From<ConfigError> for PyErr {
    fn from(error: ConfigError) -> Self {
        let text = error.to_string();
        match error {
            ConfigError::Json(_) | ConfigError::Schema { .. } => PyValueError::new_err(text),
            ConfigError::Unsupported { .. } => PyNotImplementedError::new_err(text),
            ConfigError::Conflict { .. } => PyRuntimeError::new_err(text),
        }
    }
}

impl From<GraphError> for PyErr {
    fn from(error: GraphError) -> Self {
        PyRuntimeError::new_err(error.to_string())
    }
}

/// (slot, tensor id, number)
type PyInput = (usize, Option<usize>, Option<f64>);
/// (shape, dtype)
type PyOutput = (Vec<i64>, PyBackedStr);

fn inputs(raw: Vec<PyInput>) -> Vec<Input> {
    raw.into_iter()
        .map(|(slot, tensor, value)| Input {
            slot,
            tensor,
            value,
        })
        .collect()
}

fn outputs(raw: Vec<PyOutput>) -> Vec<(Vec<i64>, Symbol)> {
    raw.into_iter()
        .map(|(shape, dtype)| (shape, Symbol::new(&dtype)))
        .collect()
}

/// Takes the events of one run of a model.
#[pyclass(module = "rimet._core")]
pub struct GraphBuilder {
    builder: graph::GraphBuilder,
}

#[pymethods]
impl GraphBuilder {
    #[new]
    fn new() -> Self {
        GraphBuilder {
            builder: graph::GraphBuilder::new(),
        }
    }

    #[pyo3(signature = (path, class_key, params, groups, num_inputs, num_outputs, dynamic_inputs, dynamic, quantizable))]
    #[allow(clippy::too_many_arguments)]
    fn module(
        &mut self,
        path: String,
        class_key: &str,
        params: Vec<(PyBackedStr, Vec<i64>)>,
        groups: i64,
        num_inputs: usize,
        num_outputs: usize,
        dynamic_inputs: bool,
        dynamic: bool,
        quantizable: bool,
    ) -> PyResult<()> {
        let params = params
            .into_iter()
            .map(|(name, shape)| Parameter {
                name: Symbol::new(&name),
                shape,
            })
            .collect();
        self.builder.module(Module {
            path,
            class: class_key.into(),
            params,
            groups,
            num_inputs,
            num_outputs,
            dynamic_inputs,
            dynamic,
            quantizable,
            calls: Vec::new(),
        })?;
        Ok(())
    }

    fn input(&mut self, position: usize, shape: Vec<i64>, dtype: &str) -> usize {
        self.builder
            .tensor(Source::Input(position), shape, dtype.into())
    }

    fn parameter(&mut self, name: String, shape: Vec<i64>, dtype: &str) -> usize {
        self.builder
            .tensor(Source::Parameter(name), shape, dtype.into())
    }

    fn constant(&mut self, shape: Vec<i64>, dtype: &str) -> usize {
        self.builder.tensor(Source::Constant, shape, dtype.into())
    }

    fn mark_unbounded(&mut self, tensor: usize) -> PyResult<()> {
        Ok(self.builder.mark_unbounded(tensor)?)
    }

    fn enter_scope(&mut self) {
        self.builder.enter_scope();
    }

    fn leave_scope(&mut self) {
        self.builder.leave_scope();
    }

    fn call_module(
        &mut self,
        path: &str,
        args: Vec<PyInput>,
        results: Vec<PyOutput>,
    ) -> PyResult<Vec<usize>> {
        Ok(self
            .builder
            .call_module(path, inputs(args), outputs(results))?
            .1)
    }

    fn call_function(
        &mut self,
        name: &str,
        scope: &str,
        args: Vec<PyInput>,
        results: Vec<PyOutput>,
        in_place: bool,
    ) -> PyResult<Vec<usize>> {
        Ok(self
            .builder
            .call_function(name, scope, inputs(args), outputs(results), in_place)?
            .1)
    }

    fn output(&mut self, tensor: usize, position: usize) -> PyResult<()> {
        Ok(self.builder.output(tensor, position)?)
    }

    /// The graph so far; the builder starts anew.
    fn finish(&mut self) -> Graph {
        Graph {
            graph: std::mem::take(&mut self.builder).finish(),
        }
    }
}

/// A recorded graph.
#[pyclass(module = "rimet._core", frozen)]
pub struct Graph {
    pub(super) graph: graph::Graph,
}

#[pymethods]
impl Graph {
    /// Modules as dicts: path, class, params, calls (node numbers).
    fn modules<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for module in &self.graph.modules {
            let dict = PyDict::new(py);
            dict.set_item("path", &module.path)?;
            dict.set_item("class", module.class.as_str())?;
            let params = module.params.iter();
            let params: Vec<_> = params.map(|p| (p.name.as_str(), &p.shape)).collect();
            dict.set_item("params", params)?;
            dict.set_item("calls", &module.calls)?;
            dict.set_item("quantizable", module.quantizable)?;
            list.append(dict)?;
        }
        Ok(list)
    }

    /// Tensors as dicts: kind, name, shape, dtype, producer (node, output), output, consumers.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for tensor in &self.graph.tensors {
            let dict = PyDict::new(py);
            let (kind, name, producer, position) = match &tensor.source {
                Source::Input(position) => ("input", None, None, Some(*position)),
                Source::Parameter(name) => ("parameter", Some(name), None, None),
                Source::Constant => ("constant", None, None, None),
                Source::Node(node, output) => ("activation", None, Some((*node, *output)), None),
            };
            dict.set_item("kind", kind)?;
            dict.set_item("name", name)?;
            dict.set_item("producer", producer)?;
            dict.set_item("position", position)?;
            dict.set_item("shape", &tensor.shape)?;
            dict.set_item("dtype", tensor.dtype.as_str())?;
            dict.set_item("output", tensor.output)?;
            dict.set_item("consumers", &tensor.consumers)?;
            list.append(dict)?;
        }
        Ok(list)
    }

    /// Nodes as dicts: module (path or None), function, scope, op_type, call, inputs, outputs.
    fn nodes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for (id, node) in self.graph.nodes.iter().enumerate() {
            let dict = PyDict::new(py);
            dict.set_item(
                "module",
                node.module.map(|m| self.graph.modules[m].path.as_str()),
            )?;
            dict.set_item("function", node.function.map(Symbol::as_str))?;
            dict.set_item("scope", self.graph.scope(id))?;
            dict.set_item("op_type", node.op_type.as_str())?;
            dict.set_item("call", node.call)?;
            dict.set_item("turn", node.turn)?;
            let inputs: Vec<_> = node
                .inputs
                .iter()
                .map(|i| (i.slot, i.tensor, i.value))
                .collect();
            dict.set_item("inputs", inputs)?;
            dict.set_item("outputs", &node.outputs)?;
            dict.set_item("in_place", node.in_place)?;
            dict.set_item("passthrough", self.graph.is_passthrough(id))?;
            list.append(dict)?;
        }
        Ok(list)
    }

    fn __len__(&self) -> usize {
        self.graph.nodes.len()
    }

    /// The graph as text, for copies and pickles.
    fn to_json(&self) -> PyResult<String> {
        serde_json::to_string(&self.graph).map_err(|e| PyRuntimeError::new_err(e.to_string()))
    }

    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        let graph = serde_json::from_str(text).map_err(|e| PyValueError::new_err(e.to_string()))?;
        Ok(Graph { graph })
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((
            py.get_type::<Graph>().getattr("from_json")?,
            (self.to_json()?,),
        ))
    }

    /// Chains of operator types, longest pattern first, no node in two chains; see `Flow::chains`.
    #[pyo3(signature = (patterns, skip = Vec::new()))]
    fn chains(&self, patterns: Vec<Vec<String>>, skip: Vec<usize>) -> Vec<Vec<usize>> {
        Flow::new(&self.graph).chains(&patterns, &skip, |_| false)
    }

    /// Applies a configuration. Returns a dict: quantizers (`None` for a number that no place has), modules (path, inputs, outputs,
    /// params by name, supported_kernels), reused; with `functional`, too: functions (scope, function, turn, quantizes_weight,
    /// in_place, inputs, outputs, supported_kernels), left ((scope, function, turn), reason) and calls (scope, function, number).
    #[pyo3(signature = (config, activation_bitwidth, param_bitwidth, is_float, functional = false))]
    fn place<'py>(
        &self,
        py: Python<'py>,
        config: &QuantSimConfig,
        activation_bitwidth: u32,
        param_bitwidth: u32,
        is_float: bool,
        functional: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let dtype = if is_float { Dtype::Float } else { Dtype::Int };
        let defaults = Defaults {
            activation: Format {
                dtype,
                bitwidth: activation_bitwidth,
            },
            param: Format {
                dtype,
                bitwidth: param_bitwidth,
            },
        };
        if !functional {
            let plan =
                py.allow_threads(|| placement::place(&self.graph, &config.config, defaults))?;
            return PlanWriter::new(py, &self.graph, &plan).plan();
        }
        let functional = py
            .allow_threads(|| placement::place_functional(&self.graph, &config.config, defaults))?;
        PlanWriter::new(py, &self.graph, &functional.plan).functional_plan(&functional)
    }
}

fn format_tuple(format: Format) -> (&'static str, u32) {
    let dtype = if format.dtype == Dtype::Float {
        "float"
    } else {
        "int"
    };
    (dtype, format.bitwidth)
}

type PyKernel = ((&'static str, u32), Option<(&'static str, u32)>);

fn kernel_list(kernels: &[Kernel]) -> Vec<PyKernel> {
    kernels
        .iter()
        .map(|k| (format_tuple(k.activation), k.param.map(format_tuple)))
        .collect()
}

/// Makes the Python objects of a plan; those that are alike are one object.
struct PlanWriter<'py, 'p> {
    py: Python<'py>,
    graph: &'p graph::Graph,
    plan: &'p Plan,
    names: SymbolMap<Bound<'py, PyString>>,
    /// By the address of their kernels, which all modules of a class share.
    kernels: HashMap<*const Kernel, Bound<'py, PyList>>,
}

impl<'py, 'p> PlanWriter<'py, 'p> {
    fn new(py: Python<'py>, graph: &'p graph::Graph, plan: &'p Plan) -> Self {
        PlanWriter {
            py,
            graph,
            plan,
            names: SymbolMap::default(),
            kernels: HashMap::new(),
        }
    }

    fn name(&mut self, symbol: Symbol) -> &Bound<'py, PyString> {
        let py = self.py;
        self.names
            .get_or_insert_with(symbol, || PyString::new(py, &symbol))
    }

    fn slots(&self, range: &Range<usize>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(self.py, &self.plan.slots[range.clone()])
    }

    fn kernels(&mut self, kernels: &[Kernel]) -> PyResult<Bound<'py, PyList>> {
        Ok(match self.kernels.entry(kernels.as_ptr()) {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(entry) => {
                let list = PyList::new(self.py, kernel_list(kernels))?;
                entry.insert(list).clone()
            }
        })
    }

    /// A dict with the quantizers of a module.
    fn module_dict(&mut self, module: &ModulePlan) -> PyResult<Bound<'py, PyDict>> {
        let py = self.py;
        let dict = PyDict::new(py);
        dict.set_item(intern!(py, "inputs"), self.slots(&module.inputs)?)?;
        dict.set_item(intern!(py, "outputs"), self.slots(&module.outputs)?)?;
        let kernels = self.kernels(&module.supported_kernels)?;
        dict.set_item(intern!(py, "supported_kernels"), kernels)?;
        Ok(dict)
    }

    fn quantizers(&self) -> PyResult<Bound<'py, PyList>> {
        let py = self.py;
        let mut made: HashMap<_, Bound<'py, PyDict>> = HashMap::new();
        let list = PyList::empty(py);
        for quantizer in &self.plan.quantizers {
            let Some(quantizer) = quantizer else {
                list.append(py.None())?;
                continue;
            };
            let Quantizer {
                format,
                symmetric,
                shape,
                constraints,
            } = quantizer;
            let ends = constraints.map(|(low, high)| (low.to_bits(), high.map(f64::to_bits)));
            let dict = match made.entry((format, symmetric, shape, ends)) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let (dtype, bitwidth) = format_tuple(*format);
                    let dict = PyDict::new(py);
                    dict.set_item(intern!(py, "dtype"), dtype)?;
                    dict.set_item(intern!(py, "bitwidth"), bitwidth)?;
                    dict.set_item(intern!(py, "symmetric"), symmetric)?;
                    dict.set_item(intern!(py, "shape"), shape)?;
                    dict.set_item(intern!(py, "constraints"), constraints)?;
                    entry.insert(dict)
                }
            };
            list.append(&*dict)?;
        }
        Ok(list)
    }

    fn plan(&mut self) -> PyResult<Bound<'py, PyDict>> {
        let py = self.py;
        let modules = PyList::empty(py);
        for module in &self.plan.modules {
            let declared = &self.graph.modules[module.module];
            let dict = self.module_dict(module)?;
            dict.set_item(intern!(py, "path"), &declared.path)?;
            let params = PyDict::new(py);
            for (param, slot) in declared
                .params
                .iter()
                .zip(&self.plan.slots[module.params.clone()])
            {
                params.set_item(self.name(param.name), slot)?;
            }
            dict.set_item(intern!(py, "params"), params)?;
            modules.append(dict)?;
        }
        let reused = self.plan.reused.iter();
        let reused = reused.map(|&module| self.graph.modules[module].path.as_str());
        let result = PyDict::new(py);
        result.set_item(intern!(py, "quantizers"), self.quantizers()?)?;
        result.set_item(intern!(py, "modules"), modules)?;
        result.set_item(intern!(py, "reused"), PyList::new(py, reused)?)?;
        Ok(result)
    }

    /// [`Self::plan`] with what there is to say of functional operations.
    fn functional_plan(&mut self, functional: &FunctionalPlan) -> PyResult<Bound<'py, PyDict>> {
        let py = self.py;
        let result = self.plan()?;
        let scopes: Vec<Bound<PyString>> = self
            .graph
            .scopes()
            .iter()
            .map(|path| PyString::new(py, path))
            .collect();
        let functions = PyList::empty(py);
        for (op, module) in functional.ops() {
            let dict = self.module_dict(module)?;
            let (scope, function, turn) = op.place;
            dict.set_item(intern!(py, "scope"), &scopes[scope])?;
            dict.set_item(intern!(py, "function"), self.name(function))?;
            dict.set_item(intern!(py, "turn"), turn)?;
            dict.set_item(intern!(py, "quantizes_weight"), op.weight.is_some())?;
            dict.set_item(intern!(py, "in_place"), op.in_place)?;
            functions.append(dict)?;
        }
        result.set_item(intern!(py, "functions"), functions)?;
        let left = PyList::empty(py);
        for ((scope, function, turn), reason) in &functional.form.left {
            let place = (&scopes[*scope], self.name(*function), turn);
            left.append((place, reason.text()))?;
        }
        result.set_item(intern!(py, "left"), left)?;
        let calls = PyList::empty(py);
        for (scope, function, count) in &functional.form.calls {
            calls.append((&scopes[*scope], self.name(*function), count))?;
        }
        result.set_item(intern!(py, "calls"), calls)?;
        Ok(result)
    }
}

/// A parsed and checked quantsim configuration.
#[pyclass(module = "rimet._core", frozen)]
pub struct QuantSimConfig {
    config: Config,
}

#[pymethods]
impl QuantSimConfig {
    #[new]
    fn new(text: &str) -> PyResult<Self> {
        Ok(QuantSimConfig {
            config: Config::parse(text)?,
        })
    }

    #[getter]
    fn hw_version(&self) -> Option<&str> {
        self.config.hw_version.as_deref()
    }

    /// Whether parameters are symmetric by default.
    #[getter]
    fn symmetric_params(&self) -> bool {
        self.config.params.is_symmetric.unwrap_or(false)
    }

    /// Whether the parameters of some operator are quantized per channel.
    #[getter]
    fn any_per_channel(&self) -> bool {
        self.config.per_channel
            || self
                .config
                .op_rules
                .values()
                .any(|r| r.per_channel == Some(true))
    }

    /// Operator type (and "defaults") to its kernels, as ((dtype, bits), (dtype, bits) or None).
    #[getter]
    fn supported_kernels(&self) -> Vec<(String, Vec<PyKernel>)> {
        let mut all = Vec::new();
        if let Some(kernels) = &self.config.supported_kernels {
            all.push(("defaults".to_owned(), kernel_list(kernels)));
        }
        for (op_type, rule) in &self.config.op_rules {
            if let Some(kernels) = &rule.supported_kernels {
                all.push((op_type.clone(), kernel_list(kernels)));
            }
        }
        all
    }
}

/// Class key to ONNX types, for every module class that has some.
#[pyfunction]
fn onnx_type_table() -> Vec<(&'static str, Vec<&'static str>)> {
    op_types::onnx_type_table()
        .map(|(class, types)| (class, types.to_vec()))
        .collect()
}

/// Operator type of a module class by its key.
#[pyfunction]
fn module_op_type(class_key: &str) -> &str {
    op_types::module_op_type(class_key)
}

/// One name for the spellings of one torch function.
#[pyfunction]
fn canonical_function(name: &str) -> &str {
    op_types::canonical(name)
}

/// Whether there is a module class that computes what the torch function of this canonical name does.
#[pyfunction]
fn function_has_module_form(canonical: &str) -> bool {
    op_types::module_of_function(canonical).is_some()
}

/// Whether a functional node of this type only moves data.
#[pyfunction]
fn function_moves_data(op_type: &str) -> bool {
    op_types::function_moves_data(op_type)
}

/// Whether a module of this class only moves data.
#[pyfunction]
fn module_preserves_grid(class_key: &str) -> bool {
    op_types::module_preserves_grid(class_key)
}

/// Names of the functions that only move data.
#[pyfunction]
fn moving_functions() -> Vec<&'static str> {
    op_types::MOVING_FUNCTIONS.to_vec()
}

/// Names of the functions that hand their input on.
#[pyfunction]
fn passthrough_functions() -> Vec<&'static str> {
    op_types::PASSTHROUGH_FUNCTIONS.to_vec()
}

/// Adds this file's classes and functions to `rimet._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<GraphBuilder>()?;
    module.add_class::<Graph>()?;
    module.add_class::<QuantSimConfig>()?;
    module.add_function(wrap_pyfunction!(onnx_type_table, module)?)?;
    module.add_function(wrap_pyfunction!(module_op_type, module)?)?;
    module.add_function(wrap_pyfunction!(canonical_function, module)?)?;
    module.add_function(wrap_pyfunction!(function_has_module_form, module)?)?;
    module.add_function(wrap_pyfunction!(function_moves_data, module)?)?;
    module.add_function(wrap_pyfunction!(module_preserves_grid, module)?)?;
    module.add_function(wrap_pyfunction!(moving_functions, module)?)?;
    module.add_function(wrap_pyfunction!(passthrough_functions, module)?)?;
    Ok(())
}
