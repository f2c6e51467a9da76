//! The graph of a model as plain data: what ran, on which tensors, in which order.
//!
//! A [`GraphBuilder`] takes the events of one run (a module was called, a torch function was called) and
//! returns a [`Graph`]. Nothing here knows Python or holds tensors, so the pattern matching of
//! [`pattern`] and the quantizer placement of [`placement`] can be tested on hand-made graphs.

pub mod batch_norm_fold;
pub mod config;
pub mod cross_layer_equalization;
pub mod error;
pub mod functional;
pub mod op_types;
pub mod pattern;
pub mod placement;
pub mod program;
pub mod symbol;

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use error::GraphError;
use symbol::Symbol;

/// Index of a node in [`Graph::nodes`], which stand in the order of execution.
pub type NodeId = usize;
/// Index of a tensor in [`Graph::tensors`].
pub type TensorId = usize;
/// Index of a module in [`Graph::modules`].
pub type ModuleId = usize;
/// Number of a scope: a module in whose forward functions ran.
pub type ScopeId = usize;

/// Where a tensor's value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// An input of the model, with its position in the flattened inputs.
    Input(usize),
    /// A parameter or buffer, with its dotted name.
    Parameter(String),
    /// A tensor that existed before the run, or was made outside what is watched.
    Constant,
    /// The output `1` of node `0`.
    Node(NodeId, usize),
}

/// One value of a tensor. An in-place operation makes a new value.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tensor {
    pub source: Source,
    pub shape: Vec<i64>,
    pub dtype: Symbol,
    /// Position in the flattened outputs of the model, if it is one.
    pub output: Option<usize>,
    pub consumers: Vec<NodeId>,
    /// Held infinities, or numbers as large as its dtype has, in the recorded run: no grid serves it.
    #[serde(default)]
    pub unbounded: bool,
}

/// A parameter that a module owns itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Parameter {
    pub name: Symbol,
    pub shape: Vec<i64>,
}

/// A module that is one operation of the graph, or could be one: it has a quantized twin or no parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Module {
    /// Dotted path in the model; empty for the model itself.
    pub path: String,
    /// Class key, see [`op_types`].
    pub class: Symbol,
    pub params: Vec<Parameter>,
    pub groups: i64,
    /// How many quantizers its quantized twin holds for inputs and outputs.
    pub num_inputs: usize,
    pub num_outputs: usize,
    /// The twin grows its list of input quantizers to the number of inputs (Concat).
    pub dynamic_inputs: bool,
    /// The numbers of quantizers are those of the tensors in the recorded run (twins made on the fly).
    #[serde(default)]
    pub dynamic: bool,
    /// A module without twin keeps its place in the graph but gets no quantizer.
    pub quantizable: bool,
    /// Calls in the recorded run, in order.
    pub calls: Vec<NodeId>,
}

/// One input of a node: which argument it is, and what stands there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Input {
    /// Position among the flattened positional arguments.
    pub slot: usize,
    /// `None`: a number, kept in `value`.
    pub tensor: Option<TensorId>,
    pub value: Option<f64>,
}

/// One operation that ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Node {
    /// The module that ran, for the call of a module.
    pub module: Option<ModuleId>,
    /// Canonical name of the torch function, for a functional operation (see [`op_types::canonical`]).
    pub function: Option<Symbol>,
    /// The innermost module whose forward was running, for a functional operation.
    pub scope: Option<ScopeId>,
    /// ONNX-style operator type, or the class or function name where there is none.
    pub op_type: Symbol,
    /// How often this module, or this function in this scope, had run before.
    pub call: usize,
    /// How often this function had run before in the same call of the module at `scope`: what the
    /// quantizers of functional operations are matched by.
    #[serde(default)]
    pub turn: usize,
    /// Where its inputs stand among those of all nodes, see [`Graph::inputs`].
    inputs: Range<usize>,
    /// The tensors that it made.
    pub outputs: Range<TensorId>,
    /// The function wrote into one of its inputs.
    pub in_place: bool,
}

/// What ran when a model was called once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Graph {
    pub modules: Vec<Module>,
    pub tensors: Vec<Tensor>,
    pub nodes: Vec<Node>,
    /// Of all nodes, one after the other.
    inputs: Vec<Input>,
    /// Path per scope.
    scopes: Vec<String>,
    by_path: HashMap<String, ModuleId>,
}

impl Graph {
    /// The module at `path`, if it was declared.
    pub fn module(&self, path: &str) -> Option<ModuleId> {
        self.by_path.get(path).copied()
    }

    /// The inputs of a node.
    pub fn inputs(&self, id: NodeId) -> &[Input] {
        &self.inputs[self.nodes[id].inputs.clone()]
    }

    /// The node that made tensor `id`.
    pub fn producer(&self, id: TensorId) -> Option<NodeId> {
        match self.tensors[id].source {
            Source::Node(node, _) => Some(node),
            _ => None,
        }
    }

    /// Path per scope.
    pub fn scopes(&self) -> &[String] {
        &self.scopes
    }

    /// Path of the innermost module whose forward was running when a node ran: its own, for the call of a module.
    pub fn scope(&self, id: NodeId) -> &str {
        let node = &self.nodes[id];
        match (node.scope, node.module) {
            (Some(scope), _) => &self.scopes[scope],
            (None, Some(module)) => &self.modules[module].path,
            (None, None) => "",
        }
    }

    /// A node that only hands its input on: it has no place in the graph that patterns are matched on.
    pub fn is_passthrough(&self, id: NodeId) -> bool {
        let node = &self.nodes[id];
        match node.module {
            Some(module) => self.modules[module].class.traits().module_is_passthrough,
            None => node
                .function
                .is_some_and(|function| function.traits().function_is_passthrough),
        }
    }
}

/// Takes the events of one run in their order and makes a [`Graph`] of them; every event costs constant time.
#[derive(Debug, Default)]
pub struct GraphBuilder {
    graph: Graph,
    scope_ids: HashMap<String, ScopeId>,
    function_calls: HashMap<(ScopeId, Symbol), usize>,
    /// Per call of a module that is running, innermost last: function to the number of its calls.
    turns: Vec<HashMap<Symbol, usize>>,
}

impl GraphBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a module that may become a node.
    pub fn module(&mut self, module: Module) -> Result<ModuleId, GraphError> {
        let id = self.graph.modules.len();
        if self.graph.by_path.contains_key(&module.path) {
            return Err(GraphError::DuplicateModule { path: module.path });
        }
        self.graph.by_path.insert(module.path.clone(), id);
        self.graph.modules.push(module);
        Ok(id)
    }

    /// Declares a tensor that no node made.
    pub fn tensor(&mut self, source: Source, shape: Vec<i64>, dtype: Symbol) -> TensorId {
        self.graph.tensors.push(Tensor {
            source,
            shape,
            dtype,
            output: None,
            consumers: Vec::new(),
            unbounded: false,
        });
        self.graph.tensors.len() - 1
    }

    /// The forward of a module that is no node itself begins.
    pub fn enter_scope(&mut self) {
        self.turns.push(HashMap::new());
    }

    /// The forward of a module that is no node itself has ended.
    pub fn leave_scope(&mut self) {
        self.turns.pop();
    }

    /// Says that tensor `id` holds infinities or the largest numbers of its dtype.
    pub fn mark_unbounded(&mut self, id: TensorId) -> Result<(), GraphError> {
        let known = self.graph.tensors.len();
        let tensor = self
            .graph
            .tensors
            .get_mut(id)
            .ok_or(GraphError::UnknownTensor { id, known })?;
        tensor.unbounded = true;
        Ok(())
    }

    /// A module was called. Returns the node and the ids of its outputs.
    pub fn call_module(
        &mut self,
        path: &str,
        inputs: Vec<Input>,
        outputs: Vec<(Vec<i64>, Symbol)>,
    ) -> Result<(NodeId, Range<TensorId>), GraphError> {
        let module = self
            .graph
            .module(path)
            .ok_or_else(|| GraphError::UnknownModule {
                path: path.to_owned(),
            })?;
        let op_type = self.graph.modules[module].class.module_op_type();
        let call = self.graph.modules[module].calls.len();
        let node = Node {
            module: Some(module),
            function: None,
            scope: None,
            op_type,
            call,
            turn: 0,
            inputs: 0..0,
            outputs: 0..0,
            in_place: false,
        };
        let (id, outputs) = self.push(node, inputs, outputs)?;
        self.graph.modules[module].calls.push(id);
        Ok((id, outputs))
    }

    /// A torch function named `name` was called while the module at `scope` was running.
    pub fn call_function(
        &mut self,
        name: &str,
        scope: &str,
        inputs: Vec<Input>,
        outputs: Vec<(Vec<i64>, Symbol)>,
        in_place: bool,
    ) -> Result<(NodeId, Range<TensorId>), GraphError> {
        let function = Symbol::new(op_types::canonical(name));
        let scope = self.scope_id(scope);
        let counter = self.function_calls.entry((scope, function)).or_insert(0);
        let call = *counter;
        *counter += 1;
        if self.turns.is_empty() {
            self.enter_scope();
        }
        let turns = self
            .turns
            .last_mut()
            .map(|turns| turns.entry(function).or_insert(0));
        let turn = turns.map_or(0, |next| {
            *next += 1;
            *next - 1
        });
        let node = Node {
            module: None,
            op_type: op_types::function_op_type(&function).into(),
            function: Some(function),
            scope: Some(scope),
            call,
            turn,
            inputs: 0..0,
            outputs: 0..0,
            in_place,
        };
        self.push(node, inputs, outputs)
    }

    /// Says that tensor `id` is output `position` of the model.
    pub fn output(&mut self, id: TensorId, position: usize) -> Result<(), GraphError> {
        let known = self.graph.tensors.len();
        let tensor = self
            .graph
            .tensors
            .get_mut(id)
            .ok_or(GraphError::UnknownTensor { id, known })?;
        tensor.output.get_or_insert(position);
        Ok(())
    }

    /// The finished graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    fn scope_id(&mut self, path: &str) -> ScopeId {
        if let Some(&id) = self.scope_ids.get(path) {
            return id;
        }
        let id = self.graph.scopes.len();
        self.graph.scopes.push(path.to_owned());
        self.scope_ids.insert(path.to_owned(), id);
        id
    }

    /// Adds a node with its inputs and outputs.
    fn push(
        &mut self,
        mut node: Node,
        inputs: Vec<Input>,
        outputs: Vec<(Vec<i64>, Symbol)>,
    ) -> Result<(NodeId, Range<TensorId>), GraphError> {
        let id = self.graph.nodes.len();
        let known = self.graph.tensors.len();
        for input in inputs.iter().filter_map(|input| input.tensor) {
            let tensor = self
                .graph
                .tensors
                .get_mut(input)
                .ok_or(GraphError::UnknownTensor { id: input, known })?;
            tensor.consumers.push(id);
        }
        let first = self.graph.inputs.len();
        self.graph.inputs.extend(inputs);
        node.inputs = first..self.graph.inputs.len();
        for (position, (shape, dtype)) in outputs.into_iter().enumerate() {
            self.tensor(Source::Node(id, position), shape, dtype);
        }
        let outputs = known..self.graph.tensors.len();
        node.outputs = outputs.clone();
        self.graph.nodes.push(node);
        Ok((id, outputs))
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Short ways to write a graph in a test.
    use super::*;

    pub fn module(path: &str, class: &str) -> Module {
        Module {
            path: path.to_owned(),
            class: class.into(),
            params: Vec::new(),
            groups: 1,
            num_inputs: 1,
            num_outputs: 1,
            dynamic_inputs: false,
            dynamic: false,
            quantizable: true,
            calls: Vec::new(),
        }
    }

    pub fn conv(path: &str, groups: i64) -> Module {
        let weight = Parameter {
            name: "weight".into(),
            shape: vec![8, 8 / groups, 3, 3],
        };
        let bias = Parameter {
            name: "bias".into(),
            shape: vec![8],
        };
        Module {
            params: vec![weight, bias],
            groups,
            ..module(path, "nn.Conv2d")
        }
    }

    pub fn norm(path: &str) -> Module {
        let weight = Parameter {
            name: "weight".into(),
            shape: vec![8],
        };
        let bias = Parameter {
            name: "bias".into(),
            shape: vec![8],
        };
        Module {
            params: vec![weight, bias],
            ..module(path, "nn.BatchNorm2d")
        }
    }

    pub struct Net(pub GraphBuilder);

    impl Net {
        pub fn new() -> Self {
            Net(GraphBuilder::new())
        }
        pub fn input(&mut self) -> TensorId {
            self.0
                .tensor(Source::Input(0), vec![1, 8, 8, 8], "float32".into())
        }
        fn args(tensors: &[TensorId]) -> Vec<Input> {
            let arg = |(slot, &t)| Input {
                slot,
                tensor: Some(t),
                value: None,
            };
            tensors.iter().enumerate().map(arg).collect()
        }
        /// Declares a module and calls it.
        pub fn add(&mut self, module: Module, inputs: &[TensorId]) -> TensorId {
            let path = module.path.clone();
            self.0.module(module).unwrap();
            self.call(&path, inputs)
        }
        pub fn call(&mut self, path: &str, inputs: &[TensorId]) -> TensorId {
            let out = vec![(vec![1, 8, 8, 8], "float32".into())];
            self.0
                .call_module(path, Self::args(inputs), out)
                .unwrap()
                .1
                .start
        }
        pub fn function(&mut self, name: &str, inputs: &[TensorId]) -> TensorId {
            let out = vec![(vec![1, 8, 8, 8], "float32".into())];
            self.0
                .call_function(name, "", Self::args(inputs), out, false)
                .unwrap()
                .1
                .start
        }
        pub fn finish(mut self, output: TensorId) -> Graph {
            self.0.output(output, 0).unwrap();
            self.0.finish()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn consumers_producers_and_call_numbers() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(module("relu", "nn.ReLU"), &[x]);
        let b = net.call("relu", &[a]);
        let c = net.function("__add__", &[a, b]);
        let d = net.function("__iadd__", &[c, b]);
        let graph = net.finish(d);
        assert_eq!(graph.tensors[a].consumers, vec![1, 2]);
        assert_eq!(graph.producer(b), Some(1));
        assert_eq!(graph.nodes[1].call, 1);
        assert_eq!(
            (graph.nodes[2].op_type.as_str(), graph.nodes[2].call),
            ("Add", 0)
        );
        assert_eq!(
            (graph.nodes[3].op_type.as_str(), graph.nodes[3].call),
            ("Add", 1)
        );
        assert_eq!(graph.modules[0].calls, vec![0, 1]);
        assert_eq!(graph.tensors[d].output, Some(0));
    }

    #[test]
    fn events_that_do_not_fit_are_refused() {
        let mut builder = GraphBuilder::new();
        builder.module(module("a", "nn.ReLU")).unwrap();
        assert!(matches!(
            builder.module(module("a", "nn.ReLU")),
            Err(GraphError::DuplicateModule { path }) if path == "a"
        ));
        let input = Input {
            slot: 0,
            tensor: Some(7),
            value: None,
        };
        assert!(matches!(
            builder.call_module("a", vec![input], vec![]),
            Err(GraphError::UnknownTensor { id: 7, known: 0 })
        ));
        assert!(matches!(
            builder.call_module("b", vec![], vec![]),
            Err(GraphError::UnknownModule { .. })
        ));
    }
}
