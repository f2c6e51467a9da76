//! Quantizers for functional operations: the graph in *module form*.
//!
//! Placement knows modules. Here each torch function that can carry quantizers becomes a module of the class that
//! computes the same (`F.relu` an `nn.ReLU`, `x + y` a `custom.Add`), so that one set of rules serves both, with the
//! result that a model has whose author wrote modules throughout.
//!
//! A function is known by the module in whose forward it ran, its name, and how often it had run in that forward
//! before. Where that module runs several times, the calls of one place in its forward share their quantizers.

use std::collections::HashMap;

use super::symbol::Symbol;
use super::{op_types, Graph, Input, Module, ModuleId, Node, NodeId, ScopeId, Source};

/// A place in the forward of a module: the module, the function, how often that had run before in this forward.
pub type Place = (ScopeId, Symbol, usize);

/// A functional operation that can carry quantizers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionalOp {
    pub place: Place,
    /// Which inputs are tensors that an input quantizer may stand before.
    pub inputs: Vec<bool>,
    /// Shape of the weight, if that is a parameter (`F.linear(x, self.weight)`); it is input 1.
    pub weight: Option<Vec<i64>>,
    /// The function wrote into its first argument.
    pub in_place: bool,
}

/// Why a functional operation that computes on floating-point numbers carries no quantizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its inputs hold no data: they come from integers and constants alone (masks, positions), or it makes a
    /// mask with a number of that size.
    Constant,
    /// It combines data with what comes from integers and constants alone: it puts on a mask.
    Mask,
    /// Its result holds infinities or the largest numbers of its dtype.
    Unbounded,
    /// It is a function compiled by `torch.jit.script`: what it calls is not seen when the model runs.
    Scripted,
}

impl Reason {
    /// In words, for reports.
    pub fn text(self) -> &'static str {
        match self {
            Reason::Constant => "a mask, or computed from integers and constants alone",
            Reason::Mask => "adds what integers and constants alone determine, such as a mask",
            Reason::Unbounded => "its result holds infinities or the largest numbers of its dtype",
            Reason::Scripted => {
                "compiled by torch.jit.script; what uses its result quantizes its input"
            }
        }
    }
}

/// The functional operations of a graph that are modules in its module form, as they can carry quantizers.
#[derive(Debug, Clone)]
pub struct ModuleForm {
    /// Number of the first of [`Self::modules`]: they follow those of the graph.
    first: ModuleId,
    /// One per operation.
    pub modules: Vec<Module>,
    pub ops: Vec<FunctionalOp>,
    /// Per node: the position of its module in `modules`.
    module_of: Vec<Option<u32>>,
    /// Places left in floating point.
    pub left: Vec<(Place, Reason)>,
    /// Per module and function: the number of calls in one forward of that module.
    pub calls: Vec<(ScopeId, Symbol, usize)>,
}

impl ModuleForm {
    /// The number of the module that a functional node has become.
    pub fn module_of(&self, node: NodeId) -> Option<ModuleId> {
        self.module_of[node].map(|position| self.first + position as usize)
    }
}

/// What can be said of one functional node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Quantize,
    Leave(Reason),
    /// Nothing that a quantizer is for: it moves data, or its results are integers.
    Other,
}

impl Verdict {
    /// Of a place where nodes with either verdict ran.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Verdict::Leave(reason), _) | (_, Verdict::Leave(reason)) => Verdict::Leave(reason),
            (Verdict::Other, _) | (_, Verdict::Other) => Verdict::Other,
            (Verdict::Quantize, Verdict::Quantize) => Verdict::Quantize,
        }
    }
}

fn is_float(dtype: &str) -> bool {
    dtype.starts_with("float") || dtype.starts_with("bfloat")
}

/// Whether a node makes a mask: it multiplies by, or adds, a number that nothing else is made of.
fn makes_mask(node: &Node) -> bool {
    matches!(
        node.function.map(Symbol::as_str),
        Some("add" | "sub" | "mul")
    ) && node
        .inputs
        .iter()
        .any(|input| input.value.is_some_and(|value| value.abs() >= 1e4))
}

/// Follows which tensors hold data, as opposed to what integers and constants alone determine.
struct DataFlow<'g> {
    graph: &'g Graph,
    holds_data: Vec<bool>,
}

impl<'g> DataFlow<'g> {
    fn new(graph: &'g Graph) -> Self {
        let mut flow = DataFlow {
            graph,
            holds_data: Vec::with_capacity(graph.tensors.len()),
        };
        // Tensors stand in the order in which they were made, so those of a node's inputs are known.
        for tensor in &graph.tensors {
            let holds_data = is_float(&tensor.dtype)
                && match tensor.source {
                    Source::Input(_) | Source::Parameter(_) | Source::Constant => !tensor.unbounded,
                    Source::Node(node, _) => flow.has_data_input(node),
                };
            flow.holds_data.push(holds_data);
        }
        flow
    }

    fn has_data_input(&self, node: NodeId) -> bool {
        let node = &self.graph.nodes[node];
        if makes_mask(node) {
            return false;
        }
        let has_params = node
            .module
            .is_some_and(|m| !self.graph.modules[m].params.is_empty());
        has_params
            || node
                .inputs
                .iter()
                .any(|input| input.tensor.is_some_and(|t| self.holds_data[t]))
    }

    fn is_data(&self, input: &Input) -> bool {
        input.tensor.is_some_and(|t| self.holds_data[t])
    }

    fn is_float(&self, input: &Input) -> bool {
        input
            .tensor
            .is_some_and(|t| is_float(&self.graph.tensors[t].dtype))
    }

    fn verdict(&self, id: NodeId) -> Verdict {
        let node = &self.graph.nodes[id];
        let Some(function) = node.function else {
            return Verdict::Other;
        };
        let traits = function.traits();
        let outputs = || node.outputs.iter().map(|&t| &self.graph.tensors[t]);
        if traits.function_is_passthrough
            || traits.function_keeps_values
            || (traits.function_moves_data && op_types::module_of_function(&function).is_none())
            || !outputs().any(|t| is_float(&t.dtype))
        {
            return Verdict::Other;
        }
        if !node.inputs.iter().any(|input| input.tensor.is_some()) {
            return Verdict::Other; // makes a tensor of numbers
        }
        if !node.inputs.iter().any(|input| self.is_data(input)) || makes_mask(node) {
            return Verdict::Leave(Reason::Constant);
        }
        let masks = matches!(function.as_str(), "add" | "sub")
            && node
                .inputs
                .iter()
                .any(|input| self.is_float(input) && !self.is_data(input));
        if masks {
            return Verdict::Leave(Reason::Mask);
        }
        if outputs().any(|t| t.unbounded) {
            return Verdict::Leave(Reason::Unbounded);
        }
        if op_types::is_scripted(&function) {
            return Verdict::Leave(Reason::Scripted);
        }
        Verdict::Quantize
    }

    /// Which inputs may have a quantizer of their own.
    fn inputs(&self, node: &Node) -> Vec<bool> {
        let slots = node.inputs.iter().map(|input| input.slot + 1).max();
        let mut inputs = vec![false; slots.unwrap_or(0)];
        for input in &node.inputs {
            inputs[input.slot] = self.is_data(input);
        }
        if node
            .function
            .is_some_and(|f| f == "scaled_dot_product_attention")
        {
            inputs.truncate(3); // the fourth is a mask
        }
        inputs
    }
}

/// Position of the weight among the arguments of the functions that [`op_types::layer_of_function`] knows.
pub const WEIGHT: usize = 1;

/// Shape of the weight of a functional layer, if it is a parameter.
fn weight_shape(graph: &Graph, node: &Node) -> Option<Vec<i64>> {
    op_types::layer_of_function(&node.function?)?;
    let input = node.inputs.iter().find(|input| input.slot == WEIGHT)?;
    let tensor = &graph.tensors[input.tensor?];
    matches!(tensor.source, Source::Parameter(_)).then(|| tensor.shape.clone())
}

/// A function in the forwards of one module.
struct Called {
    scope: ScopeId,
    function: Symbol,
    /// Per turn in a forward, its number in [`Places::nodes`].
    turns: Vec<Option<usize>>,
}

/// The places of a graph in the order in which they ran first.
#[derive(Default)]
struct Places {
    /// Per place: what ran there.
    nodes: Vec<Vec<NodeId>>,
    functions: Vec<Called>,
}

impl Places {
    fn of(graph: &Graph) -> Self {
        let mut places = Places::default();
        let mut known: HashMap<(ScopeId, Symbol), usize> = HashMap::new();
        for (id, node) in graph.nodes.iter().enumerate() {
            let (Some(function), Some(scope)) = (node.function, node.scope) else {
                continue;
            };
            let next = places.functions.len();
            let called = *known.entry((scope, function)).or_insert(next);
            if called == next {
                places.functions.push(Called {
                    scope,
                    function,
                    turns: Vec::with_capacity(1),
                });
            }
            let turns = &mut places.functions[called].turns;
            if node.turn >= turns.len() {
                turns.resize(node.turn + 1, None);
            }
            match turns[node.turn] {
                Some(place) => places.nodes[place].push(id),
                None => {
                    turns[node.turn] = Some(places.nodes.len());
                    places.nodes.push(vec![id]);
                }
            }
        }
        places
    }
}

/// What the functional operations of a graph become in its module form.
pub fn module_form(graph: &Graph) -> ModuleForm {
    let flow = DataFlow::new(graph);
    let Places { nodes, functions } = Places::of(graph);
    let mut form = ModuleForm {
        first: graph.modules.len(),
        modules: Vec::new(),
        ops: Vec::new(),
        module_of: vec![None; graph.nodes.len()],
        left: Vec::new(),
        calls: functions
            .iter()
            .map(|called| (called.scope, called.function, called.turns.len()))
            .collect(),
    };
    for nodes in nodes {
        let first = &graph.nodes[nodes[0]];
        let (Some(function), Some(scope)) = (first.function, first.scope) else {
            continue;
        };
        let place = (scope, function, first.turn);
        let verdicts = nodes.iter().map(|&node| flow.verdict(node));
        match verdicts.reduce(Verdict::and) {
            Some(Verdict::Quantize) => {}
            Some(Verdict::Leave(reason)) => {
                form.left.push((place, reason));
                continue;
            }
            Some(Verdict::Other) | None => continue,
        }
        let inputs = nodes
            .iter()
            .map(|&node| flow.inputs(&graph.nodes[node]))
            .max_by_key(Vec::len)
            .unwrap_or_default();
        let weight = weight_shape(graph, first);
        let class = op_types::layer_of_function(&function)
            .filter(|_| weight.is_some())
            .or_else(|| op_types::module_of_function(&function))
            .map_or_else(
                || format!("function.{function}").as_str().into(),
                Symbol::new,
            );
        for &node in &nodes {
            form.module_of[node] = Some(form.modules.len() as u32);
        }
        form.modules.push(Module {
            path: format!("{}({function} {})", graph.scope(nodes[0]), first.turn),
            class,
            params: Vec::new(),
            groups: 1,
            num_inputs: inputs.len(),
            num_outputs: 1,
            dynamic_inputs: true,
            // What shares the memory of a result that was written in place has the same quantizer.
            dynamic: !first.in_place,
            quantizable: true,
            calls: nodes,
        });
        form.ops.push(FunctionalOp {
            place,
            inputs,
            weight,
            in_place: first.in_place,
        });
    }
    form
}

#[cfg(test)]
mod tests {
    use super::super::pattern::Flow;
    use super::super::testing::*;
    use super::super::GraphBuilder;
    use super::*;

    fn places(form: &ModuleForm) -> Vec<(&str, usize)> {
        form.ops
            .iter()
            .map(|op| (op.place.1.as_str(), op.place.2))
            .collect()
    }

    #[test]
    fn functions_that_compute_become_modules() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.function("relu", &[a]);
        let c = net.function("view", &[b]);
        let d = net.function("__iadd__", &[c, x]);
        let e = net.function("erf", &[d]);
        let f = net.function("add", &[e, x]);
        let graph = net.finish(f);
        let form = module_form(&graph);
        assert_eq!(
            places(&form),
            [("relu", 0), ("add", 0), ("erf", 0), ("add", 1)]
        );
        let classes: Vec<&str> = form.modules.iter().map(|m| m.class.as_str()).collect();
        assert_eq!(
            classes,
            ["nn.ReLU", "custom.Add", "custom.Erf", "custom.Add"]
        );
        let flow = Flow::in_module_form(&graph, &form);
        assert_eq!(
            (flow.op_type(1).as_str(), flow.module(1)),
            ("Relu", Some(1))
        );
        assert!(flow.module(2).is_none() && flow.moves_data(2));
        assert!(form.calls.contains(&(0, "add".into(), 2)));
    }

    /// Two passes through one block: its places are those of one pass.
    #[test]
    fn a_block_that_runs_twice_has_one_set_of_places() {
        let mut net = Net::new();
        let mut x = net.input();
        for _ in 0..2 {
            net.0.enter_scope();
            x = net.function("relu", &[x]);
            x = net.function("relu", &[x]);
            net.0.leave_scope();
        }
        let form = module_form(&net.finish(x));
        assert_eq!(places(&form), [("relu", 0), ("relu", 1)]);
        assert_eq!(form.modules[0].calls, [0, 2]);
    }

    #[test]
    fn masks_stay_as_they_are() {
        let mut builder = GraphBuilder::new();
        let float = || vec![(vec![2, 2], "float32".into())];
        let arg = |t| Input {
            slot: 0,
            tensor: Some(t),
            value: None,
        };
        let second = |t| Input { slot: 1, ..arg(t) };
        let x = builder.tensor(Source::Input(0), vec![2, 2], "float32".into());
        let mask = builder.tensor(Source::Input(1), vec![2, 2], "int64".into());
        let mut call = |name: &str, inputs| {
            builder
                .call_function(name, "", inputs, float(), false)
                .unwrap()
                .1[0]
        };
        let scale = call("mul", vec![arg(mask)]);
        let masked = call("add", vec![arg(x), second(scale)]);
        let softmax = call("softmax", vec![arg(masked)]);
        let filled = call("exp", vec![arg(softmax)]);
        builder.mark_unbounded(filled).unwrap();
        let form = module_form(&builder.finish());
        assert_eq!(places(&form), [("softmax", 0)]);
        let reasons: Vec<Reason> = form.left.iter().map(|(_, reason)| *reason).collect();
        assert_eq!(reasons, [Reason::Constant, Reason::Mask, Reason::Unbounded]);
    }
}
