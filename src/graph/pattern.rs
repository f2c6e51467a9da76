//! Chains of operators in a graph.
//!
//! Patterns are matched on the *flow* view: without nodes that only hand their input on, and with "the output
//! of this node goes to exactly one place" as the condition for a chain to continue.

use std::ops::Range;

use super::functional::{FunctionalOp, ModuleForm};
use super::symbol::{Symbol, SymbolMap};
use super::{Graph, Module, ModuleId, NodeId, Parameter, Source, TensorId};

/// Where an input of a node comes from, looking through nodes that only hand their input on.
///
/// Numbers of nodes and tensors take 32 bits here: what placement walks through should fit in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The output `1` of node `0`.
    Node(u32, u32),
    Parameter,
    /// A model input or a constant tensor; `None` for what was made of a number.
    Root(Option<u32>),
    Number,
}

impl Origin {
    /// The node that it is an output of.
    pub fn producer(self) -> Option<NodeId> {
        match self {
            Origin::Node(node, _) => Some(node as NodeId),
            _ => None,
        }
    }
}

/// One input of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    pub origin: Origin,
    /// Position among the flattened positional arguments.
    pub slot: u32,
}

/// What patterns and placement ask of a node; ranges are those of its entries in the tables of [`Flow`].
#[derive(Debug, Clone)]
struct Row {
    op_type: Symbol,
    module: Option<u32>,
    moves_data: bool,
    arguments: Range<u32>,
    consumers: Range<u32>,
}

/// What placement asks of a module.
#[derive(Debug, Clone, Copy)]
pub struct ModuleRow {
    pub class: Symbol,
    pub quantizable: bool,
    pub dynamic: bool,
    pub dynamic_inputs: bool,
    /// Quantizers that its twin holds.
    pub num_inputs: u32,
    pub num_outputs: u32,
    /// The most that a call had; one, if it did not run.
    pub recorded_inputs: u32,
    pub recorded_outputs: u32,
    pub num_calls: u32,
    last_call: u32,
}

impl ModuleRow {
    /// The node that was its last call, if it ran.
    pub fn last_call(&self) -> Option<NodeId> {
        (self.num_calls > 0).then_some(self.last_call as NodeId)
    }
}

impl From<&Module> for ModuleRow {
    fn from(module: &Module) -> Self {
        ModuleRow {
            class: module.class,
            quantizable: module.quantizable,
            dynamic: module.dynamic,
            dynamic_inputs: module.dynamic_inputs,
            num_inputs: module.num_inputs as u32,
            num_outputs: module.num_outputs as u32,
            recorded_inputs: 1,
            recorded_outputs: 1,
            num_calls: 0,
            last_call: 0,
        }
    }
}

/// A module that computes the same.
impl From<&FunctionalOp> for ModuleRow {
    fn from(op: &FunctionalOp) -> Self {
        ModuleRow {
            class: op.class,
            quantizable: true,
            // What shares the memory of a result that was written in place has the same quantizer.
            dynamic: !op.in_place,
            dynamic_inputs: true,
            num_inputs: op.inputs.len() as u32,
            num_outputs: 1,
            recorded_inputs: 1,
            recorded_outputs: 1,
            num_calls: 0,
            last_call: 0,
        }
    }
}

/// The graph as patterns and placement see it. Made once, in time linear in the graph.
///
/// Everything stands in a few flat tables in the order in which it is read: a graph of ten thousand nodes takes
/// megabytes on the heap, and is walked through a dozen times.
#[derive(Debug)]
pub struct Flow<'g> {
    pub graph: &'g Graph,
    /// The functional operations that count as modules.
    form: Option<&'g ModuleForm>,
    /// Those of the graph, then the functional operations that count as modules.
    pub modules: Vec<ModuleRow>,
    /// Per node.
    rows: Vec<Row>,
    arguments: Vec<Argument>,
    consumers: Vec<u32>,
    /// Nodes that are operations of their own, in order of execution.
    pub ops: Vec<NodeId>,
    /// Operator type to its nodes, in order of execution.
    of_type: SymbolMap<Vec<NodeId>>,
}

impl<'g> Flow<'g> {
    pub fn new(graph: &'g Graph) -> Self {
        Self::build(graph, None)
    }

    /// The graph whose functional operations are modules, where they can carry quantizers.
    pub fn in_module_form(graph: &'g Graph, form: &'g ModuleForm) -> Self {
        Self::build(graph, Some(form))
    }

    fn build(graph: &'g Graph, form: Option<&'g ModuleForm>) -> Self {
        let mut flow = Flow {
            graph,
            form,
            modules: graph.modules.iter().map(ModuleRow::from).collect(),
            rows: Vec::with_capacity(graph.nodes.len()),
            arguments: Vec::with_capacity(graph.nodes.len()),
            consumers: Vec::new(),
            ops: Vec::with_capacity(graph.nodes.len()),
            of_type: SymbolMap::default(),
        };
        let functional = form.iter().flat_map(|form| &form.ops);
        flow.modules.extend(functional.map(ModuleRow::from));
        // Of the tensors that nodes made. The others are looked at where they are used.
        let mut origin_of: Vec<Option<Origin>> = vec![None; graph.tensors.len()];
        let origin_in = |known: &[Option<Origin>], tensor: TensorId| {
            known[tensor].unwrap_or_else(|| match graph.tensors[tensor].source {
                Source::Parameter(_) => Origin::Parameter,
                _ => Origin::Root(Some(tensor as u32)),
            })
        };
        for (id, node) in graph.nodes.iter().enumerate() {
            let op = form.and_then(|form| form.op_of(id));
            let module = op.map_or(node.module, |op| Some(graph.modules.len() + op));
            let op_type = match op {
                Some(op) => flow.modules[graph.modules.len() + op]
                    .class
                    .module_op_type(),
                None => node.op_type,
            };
            let inputs = graph.inputs(id);
            if let Some(module) = module {
                let row = &mut flow.modules[module];
                row.num_calls += 1;
                row.last_call = id as u32;
                let slots = inputs.iter().map(|input| input.slot as u32 + 1);
                row.recorded_inputs = slots.fold(row.recorded_inputs, u32::max);
                row.recorded_outputs = row.recorded_outputs.max(node.outputs.len() as u32);
            }
            let moves_data = node.function.is_some_and(|function| {
                let traits = function.traits();
                traits.function_moves_data || (form.is_some() && traits.function_keeps_values)
            });
            let first = flow.arguments.len() as u32;
            if graph.is_passthrough(id) {
                let input = inputs.iter().find_map(|input| input.tensor);
                let origin = input.map_or(Origin::Root(None), |t| origin_in(&origin_of, t));
                origin_of[node.outputs.clone()].fill(Some(origin));
            } else {
                flow.ops.push(id);
                flow.of_type.get_or_insert_with(op_type, Vec::new).push(id);
                for input in inputs {
                    let origin = input
                        .tensor
                        .map_or(Origin::Number, |t| origin_in(&origin_of, t));
                    if let Some(producer) = origin.producer() {
                        flow.rows[producer].consumers.end += 1;
                    }
                    let slot = input.slot as u32;
                    flow.arguments.push(Argument { origin, slot });
                }
                let outputs = origin_of[node.outputs.clone()].iter_mut();
                for (position, origin) in (0..).zip(outputs) {
                    *origin = Some(Origin::Node(id as u32, position));
                }
            }
            flow.rows.push(Row {
                op_type,
                module: module.map(|module| module as u32),
                moves_data,
                arguments: first..flow.arguments.len() as u32,
                consumers: 0..0,
            });
        }
        flow.list_consumers();
        flow
    }

    /// Fills [`Self::consumers`]; each row has counted its own in `consumers.end`.
    fn list_consumers(&mut self) {
        let mut total = 0;
        for row in &mut self.rows {
            let count = row.consumers.end;
            row.consumers = total..total;
            total += count;
        }
        self.consumers = vec![0; total as usize];
        for node in 0..self.rows.len() {
            for argument in self.rows[node].arguments.clone() {
                if let Some(producer) = self.arguments[argument as usize].origin.producer() {
                    let end = &mut self.rows[producer].consumers.end;
                    self.consumers[*end as usize] = node as u32;
                    *end += 1;
                }
            }
        }
    }

    /// The inputs of a node; none of one that only hands its input on.
    pub fn arguments(&self, node: NodeId) -> &[Argument] {
        &self.arguments[self.argument_range(node)]
    }

    /// Where [`Self::arguments`] of a node stand among those of all nodes.
    pub fn argument_range(&self, node: NodeId) -> Range<usize> {
        let Range { start, end } = self.rows[node].arguments;
        start as usize..end as usize
    }

    pub fn argument(&self, position: usize) -> Argument {
        self.arguments[position]
    }

    pub fn num_arguments(&self) -> usize {
        self.arguments.len()
    }

    /// The consumer of every edge that leaves a node, in order of execution.
    pub fn consumers(&self, node: NodeId) -> impl ExactSizeIterator<Item = NodeId> + '_ {
        let Range { start, end } = self.rows[node].consumers;
        let consumers = &self.consumers[start as usize..end as usize];
        consumers.iter().map(|&consumer| consumer as NodeId)
    }

    /// The producer of every input of a node that a node made.
    pub fn producers(&self, node: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let arguments = self.arguments(node).iter();
        arguments.filter_map(|argument| argument.origin.producer())
    }

    /// The module of a node.
    pub fn module(&self, node: NodeId) -> Option<ModuleId> {
        self.rows[node].module.map(|module| module as ModuleId)
    }

    /// The parameters of a module; a functional operation owns none.
    pub fn params(&self, module: ModuleId) -> &'g [Parameter] {
        self.graph
            .modules
            .get(module)
            .map_or(&[], |declared| &declared.params)
    }

    /// What a module is, for error messages.
    pub fn path(&self, module: ModuleId) -> String {
        let own = &self.graph.modules;
        match (own.get(module), self.form) {
            (None, Some(form)) => {
                let (scope, function, turn) = form.ops[module - own.len()].place;
                format!("{}({function} {turn})", self.graph.scopes()[scope])
            }
            _ => own[module].path.clone(),
        }
    }

    /// Whether a module is a functional operation.
    pub fn is_functional(&self, module: ModuleId) -> bool {
        module >= self.graph.modules.len()
    }

    /// Whether functional operations count as modules.
    pub fn is_in_module_form(&self) -> bool {
        self.form.is_some()
    }

    /// Whether a functional node moves data without computing on it.
    pub fn moves_data(&self, node: NodeId) -> bool {
        self.rows[node].moves_data
    }

    /// Nodes of the operator types that `wanted` picks, in order of execution.
    pub fn ops_of_types(&self, wanted: impl Fn(&str) -> bool) -> Vec<NodeId> {
        let chosen = self.of_type.iter().filter(|(op_type, _)| wanted(op_type));
        let mut nodes: Vec<NodeId> = chosen.flat_map(|(_, nodes)| nodes).copied().collect();
        nodes.sort_unstable();
        nodes
    }

    pub fn op_type(&self, node: NodeId) -> Symbol {
        self.rows[node].op_type
    }

    /// The class key of the module of a node.
    pub fn class(&self, node: NodeId) -> Option<Symbol> {
        self.module(node).map(|module| self.modules[module].class)
    }

    /// All chains of the given operator types, longest pattern first, in order of execution, no node in two
    /// chains. Nodes in `skip` are looked through; chains whose first node `reject`s are left out.
    pub fn chains(
        &self,
        patterns: &[Vec<String>],
        skip: &[NodeId],
        reject: impl Fn(NodeId) -> bool,
    ) -> Vec<Vec<NodeId>> {
        let mut skipped = vec![false; self.rows.len()];
        for &node in skip {
            if let Some(skipped) = skipped.get_mut(node) {
                *skipped = true;
            }
        }
        let mut sorted: Vec<&Vec<String>> = patterns.iter().filter(|p| !p.is_empty()).collect();
        sorted.sort_by_key(|pattern| std::cmp::Reverse(pattern.len()));
        let mut taken = vec![false; self.rows.len()];
        let mut found = Vec::new();
        let mut chain = Vec::new();
        for pattern in sorted {
            // A name that no symbol has is the operator type of no node.
            let pattern: Option<Vec<Symbol>> =
                pattern.iter().map(|name| Symbol::get(name)).collect();
            let Some(pattern) = pattern else { continue };
            for &op in self.of_type.get(pattern[0]).into_iter().flatten() {
                if skipped[op] || !self.follow(op, &pattern, &skipped, &mut chain) {
                    continue;
                }
                if reject(op) || chain.iter().any(|&node| taken[node]) {
                    continue;
                }
                chain.iter().for_each(|&node| taken[node] = true);
                found.push(chain.clone());
            }
        }
        found
    }

    /// The one node that uses the output of `node` as its first argument, if nothing else sees that tensor: no
    /// second use, no output of the model. Stricter than [`Flow::arguments`] in what it looks through: only
    /// nodes that hand on the very same values, so that arithmetic may move from one end to the other.
    pub fn sole_consumer(&self, node: NodeId) -> Option<NodeId> {
        let mut node = node;
        loop {
            let outputs = self.graph.nodes[node].outputs.clone();
            let [tensor] = &self.graph.tensors[outputs.clone()] else {
                return None;
            };
            let ([next], None) = (&tensor.consumers[..], tensor.output) else {
                return None;
            };
            if self.graph.inputs(*next).first()?.tensor != Some(outputs.start) {
                return None;
            }
            if !self.graph.is_passthrough(*next) {
                return Some(*next);
            }
            let [same] = &self.graph.tensors[self.graph.nodes[*next].outputs.clone()] else {
                return None;
            };
            let transposed = self.graph.nodes[*next].function.is_some_and(|f| f == "t");
            if transposed || (&same.shape, &same.dtype) != (&tensor.shape, &tensor.dtype) {
                return None;
            }
            node = *next;
        }
    }

    /// Finds the chain that starts at `start`, where every node but the last has exactly one consumer.
    fn follow(
        &self,
        start: NodeId,
        pattern: &[Symbol],
        skipped: &[bool],
        chain: &mut Vec<NodeId>,
    ) -> bool {
        chain.clear();
        chain.push(start);
        let mut node = start;
        while chain.len() < pattern.len() {
            let mut consumers = self.consumers(node);
            let (Some(next), None) = (consumers.next(), consumers.next()) else {
                return false;
            };
            node = next;
            if skipped[node] {
                continue;
            }
            if self.op_type(node) != pattern[chain.len()] {
                return false;
            }
            chain.push(node);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn pattern(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn longer_first_no_overlap_no_branch() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c1", 1), &[x]); // 0
        let b = net.add(norm("b1"), &[a]); // 1
        let c = net.add(module("r1", "nn.ReLU"), &[b]); // 2
        let d = net.add(conv("c2", 1), &[c]); // 3, branches
        let e = net.add(module("r2", "nn.ReLU"), &[d]); // 4
        let f = net.function("add", &[d, e]); // 5
        let g = net.add(module("r3", "nn.ReLU"), &[f]); // 6
        let graph = net.finish(g);
        let flow = Flow::new(&graph);
        let patterns = [
            pattern(&["Conv", "BatchNormalization"]),
            pattern(&["Conv", "BatchNormalization", "Relu"]),
        ];
        assert_eq!(flow.chains(&patterns, &[], |_| false), vec![vec![0, 1, 2]]);
        let patterns = [pattern(&["Conv", "Relu"]), pattern(&["Add", "Relu"])];
        assert_eq!(flow.chains(&patterns, &[], |_| false), vec![vec![5, 6]]);
        assert_eq!(
            flow.chains(&patterns, &[1], |_| false),
            vec![vec![0, 2], vec![5, 6]]
        );
        assert_eq!(flow.chains(&patterns, &[1], |op| op == 0), vec![vec![5, 6]]);
    }

    #[test]
    fn identity_is_looked_through() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.add(module("id", "nn.Identity"), &[a]);
        let c = net.function("detach", &[b]);
        let d = net.add(module("r", "nn.ReLU"), &[c]);
        let graph = net.finish(d);
        let flow = Flow::new(&graph);
        assert_eq!(
            flow.chains(&[pattern(&["Conv", "Relu"])], &[], |_| false),
            vec![vec![0, 3]]
        );
        let origin = Origin::Node(0, 0);
        assert_eq!(flow.arguments(3), [Argument { origin, slot: 0 }]);
        assert_eq!(flow.consumers(0).collect::<Vec<_>>(), [3]);
    }
}
