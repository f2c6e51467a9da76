//! `rimet._core`: recording a model's graph, and placing quantizers on it.

use std::collections::HashSet;
use std::ops::Range;

use pyo3::exceptions::{PyIndexError, PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};

use crate::graph::config::{Config, Dtype, Format, Kernel};
use crate::graph::error::{ConfigError, GraphError};
use crate::graph::functional::ModuleForm;
use crate::graph::pattern::Flow;
use crate::graph::placement::{self, Defaults, ModulePlan, Quantizer};
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
            .1
            .collect())
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
            .1
            .collect())
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
            let inputs: Vec<_> = self
                .graph
                .inputs(id)
                .iter()
                .map(|i| (i.slot, i.tensor, i.value))
                .collect();
            dict.set_item("inputs", inputs)?;
            dict.set_item("outputs", PyList::new(py, node.outputs.clone())?)?;
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

    /// Applies a configuration; with `functional`, functional operations get quantizers, too.
    #[pyo3(signature = (config, activation_bitwidth, param_bitwidth, is_float, functional = false))]
    fn place(
        slf: Bound<'_, Self>,
        config: &QuantSimConfig,
        activation_bitwidth: u32,
        param_bitwidth: u32,
        is_float: bool,
        functional: bool,
    ) -> PyResult<Plan> {
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
        let (graph, config) = (&slf.get().graph, &config.config);
        let (plan, functional) = slf.py().allow_threads(|| {
            if !functional {
                return Ok((placement::place(graph, config, defaults)?, None));
            }
            let placed = placement::place_functional(graph, config, defaults)?;
            Ok::<_, ConfigError>((placed.plan, Some((placed.form, placed.functions))))
        })?;
        Ok(Plan {
            graph: slf.unbind(),
            plan,
            functional,
        })
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

/// Which quantizers go where. Compact; Python objects are made of it where they are asked for.
#[pyclass(module = "rimet._core", frozen)]
pub struct Plan {
    graph: Py<Graph>,
    plan: placement::Plan,
    /// With quantizers for functional operations: their quantizers, in the order of the operations.
    functional: Option<(ModuleForm, Vec<ModulePlan>)>,
}

#[pymethods]
impl Plan {
    /// Whether functional operations have quantizers, too.
    #[getter]
    fn functional(&self) -> bool {
        self.functional.is_some()
    }

    /// Paths of modules without parameters that run several times and therefore get no quantizers.
    #[getter]
    fn reused(&self) -> Vec<String> {
        let modules = &self.graph.get().graph.modules;
        let reused = self.plan.reused.iter();
        reused.map(|&module| modules[module].path.clone()).collect()
    }

    /// The quantizer of this number as a dict: dtype, bitwidth, symmetric, shape, constraints.
    fn quantizer<'py>(&self, py: Python<'py>, number: usize) -> PyResult<Bound<'py, PyDict>> {
        match self.plan.quantizers.get(number) {
            Some(Some(quantizer)) => quantizer_dict(py, quantizer),
            _ => Err(PyIndexError::new_err(format!(
                "number: expected that of a quantizer of the plan, got {number}"
            ))),
        }
    }

    /// Each kind of quantizer that occurs, once, as [`Self::quantizer`] gives it.
    fn distinct_quantizers<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let mut known = HashSet::new();
        let mut distinct = Vec::new();
        for quantizer in self.plan.quantizers.iter().flatten() {
            let Quantizer {
                format,
                symmetric,
                granularity,
                constraints,
            } = quantizer;
            let ends = constraints.map(|(low, high)| (low.to_bits(), high.map(f64::to_bits)));
            if known.insert((format, symmetric, granularity, ends)) {
                distinct.push(quantizer_dict(py, quantizer)?);
            }
        }
        Ok(distinct)
    }

    /// Modules as dicts: path, inputs, outputs and params (by name) with the numbers of their quantizers or `None`,
    /// supported_kernels.
    fn modules(slf: Bound<'_, Self>) -> PlanEntries {
        PlanEntries::new(slf, false)
    }

    /// Functional operations as dicts: scope, function, turn, quantizes_weight, in_place, and inputs, outputs,
    /// supported_kernels as of modules.
    fn functions(slf: Bound<'_, Self>) -> PlanEntries {
        PlanEntries::new(slf, true)
    }

    /// Functional operations left in floating point: ((scope, function, turn), reason).
    fn left(&self) -> Vec<((&str, &str, usize), &str)> {
        let scopes = self.graph.get().graph.scopes();
        let left = self.functional.iter().flat_map(|(form, _)| &form.left);
        left.map(|((scope, function, turn), reason)| {
            let place = (scopes[*scope].as_str(), function.as_str(), *turn);
            (place, reason.text())
        })
        .collect()
    }

    /// How often functions run in one forward of a module: (scope, function, number).
    fn calls(&self) -> Vec<(&str, &str, usize)> {
        let scopes = self.graph.get().graph.scopes();
        let calls = self.functional.iter().flat_map(|(form, _)| &form.calls);
        calls
            .map(|(scope, function, count)| (scopes[*scope].as_str(), function.as_str(), *count))
            .collect()
    }
}

fn quantizer_dict<'py>(py: Python<'py>, quantizer: &Quantizer) -> PyResult<Bound<'py, PyDict>> {
    let (dtype, bitwidth) = format_tuple(quantizer.format);
    let dict = PyDict::new(py);
    dict.set_item(intern!(py, "dtype"), dtype)?;
    dict.set_item(intern!(py, "bitwidth"), bitwidth)?;
    dict.set_item(intern!(py, "symmetric"), quantizer.symmetric)?;
    dict.set_item(intern!(py, "shape"), quantizer.granularity.shape())?;
    dict.set_item(intern!(py, "constraints"), quantizer.constraints)?;
    Ok(dict)
}

/// Iterator over the modules or the functional operations of a plan.
#[pyclass(module = "rimet._core")]
pub struct PlanEntries {
    plan: Py<Plan>,
    functions: bool,
    next: usize,
    names: SymbolMap<Py<PyString>>,
}

impl PlanEntries {
    fn new(plan: Bound<'_, Plan>, functions: bool) -> Self {
        PlanEntries {
            plan: plan.unbind(),
            functions,
            next: 0,
            names: SymbolMap::default(),
        }
    }
}

#[pymethods]
impl PlanEntries {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let PlanEntries {
            ref plan,
            functions,
            ref mut next,
            ref mut names,
        } = *self;
        let Plan {
            graph,
            plan,
            functional,
        } = plan.get();
        let graph = &graph.get().graph;
        let mut name = |symbol: Symbol| {
            names
                .get_or_insert_with(symbol, || PyString::new(py, &symbol).unbind())
                .clone_ref(py)
        };
        let (entries, form) = match (functions, functional) {
            (false, _) => (&plan.modules, None),
            (true, Some((form, entries))) => (entries, Some(form)),
            (true, None) => return Ok(None),
        };
        let Some(entry) = entries.get(*next) else {
            return Ok(None);
        };
        let dict = PyDict::new(py);
        if let Some(form) = form {
            let op = &form.ops[*next];
            let (scope, function, turn) = op.place;
            dict.set_item(intern!(py, "scope"), &graph.scopes()[scope])?;
            dict.set_item(intern!(py, "function"), name(function))?;
            dict.set_item(intern!(py, "turn"), turn)?;
            dict.set_item(intern!(py, "quantizes_weight"), op.weight.is_some())?;
            dict.set_item(intern!(py, "in_place"), op.in_place)?;
        } else {
            let module = &graph.modules[entry.module];
            dict.set_item(intern!(py, "path"), &module.path)?;
            let params = PyDict::new(py);
            let slots = &plan.slots[entry.params.clone()];
            for (param, slot) in module.params.iter().zip(slots) {
                params.set_item(name(param.name), slot)?;
            }
            dict.set_item(intern!(py, "params"), params)?;
        }
        let slots = |range: &Range<usize>| PyTuple::new(py, &plan.slots[range.clone()]);
        dict.set_item(intern!(py, "inputs"), slots(&entry.inputs)?)?;
        dict.set_item(intern!(py, "outputs"), slots(&entry.outputs)?)?;
        dict.set_item(
            intern!(py, "supported_kernels"),
            kernel_list(&entry.supported_kernels),
        )?;
        *next += 1;
        Ok(Some(dict))
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
    module.add_class::<Plan>()?;
    module.add_class::<PlanEntries>()?;
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
