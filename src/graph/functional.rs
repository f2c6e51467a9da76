//! Quantizers for functional operations: the graph in *module form*.
//!
//! Placement knows modules. Here each torch function that can carry quantizers becomes a module of the class that
//! computes the same (`F.relu` an `nn.ReLU`, `x + y` a `custom.Add`), so that one set of rules serves both, with the
//! result that a model has whose author wrote modules throughout.
//!
//! A function is known by the module in whose forward it ran, its name, and how often it had run in that forward
//! before. Where that module runs several times, the calls of one place in its forward share their quantizers.

use std::collections::HashMap;
use std::ops::Range;

use super::symbol::Symbol;
use super::{op_types, Graph, Input, NodeId, ScopeId, Source};

/// A place in the forward of a module: the module, the function, how often that had run before in this forward.
pub type Place = (ScopeId, Symbol, usize);

/// A functional operation that can carry quantizers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionalOp {
    pub place: Place,
    /// The class of modules that it counts as one of.
    pub class: Symbol,
    /// Its entries in [`ModuleForm::takes_quantizer`].
    pub inputs: Range<usize>,
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
    /// Their modules follow those of the graph.
    pub ops: Vec<FunctionalOp>,
    /// Per operation and input: whether it is a tensor that a quantizer may stand before.
    pub takes_quantizer: Vec<bool>,
    /// Per node: its number in `ops`.
    op_of: Vec<Option<u32>>,
    /// Places left in floating point.
    pub left: Vec<(Place, Reason)>,
    /// Per module and function: the number of calls in one forward of that module.
    pub calls: Vec<(ScopeId, Symbol, usize)>,
}

impl ModuleForm {
    /// The functional operation that a node is a call of, as its number in [`Self::ops`].
    pub fn op_of(&self, node: NodeId) -> Option<usize> {
        self.op_of[node].map(|op| op as usize)
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

pub(super) fn is_float(dtype: &str) -> bool {
    dtype.starts_with("float") || dtype.starts_with("bfloat")
}

/// Whether a node makes a mask: it multiplies by, or adds, a number that nothing else is made of.
fn makes_mask(graph: &Graph, id: NodeId) -> bool {
    let function = graph.nodes[id].function.map(Symbol::as_str);
    matches!(function, Some("add" | "sub" | "mul"))
        && graph
            .inputs(id)
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

    fn has_data_input(&self, id: NodeId) -> bool {
        if makes_mask(self.graph, id) {
            return false;
        }
        let has_params = self.graph.nodes[id]
            .module
            .is_some_and(|m| !self.graph.modules[m].params.is_empty());
        let mut inputs = self.graph.inputs(id).iter();
        has_params || inputs.any(|input| self.is_data(input))
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
        let inputs = self.graph.inputs(id);
        let outputs = || self.graph.tensors[node.outputs.clone()].iter();
        if traits.function_is_passthrough
            || traits.function_keeps_values
            || (traits.function_moves_data && op_types::module_of_function(&function).is_none())
            || !outputs().any(|t| is_float(&t.dtype))
        {
            return Verdict::Other;
        }
        if !inputs.iter().any(|input| input.tensor.is_some()) {
            return Verdict::Other; // makes a tensor of numbers
        }
        if !inputs.iter().any(|input| self.is_data(input)) || makes_mask(self.graph, id) {
            return Verdict::Leave(Reason::Constant);
        }
        let masks = matches!(function.as_str(), "add" | "sub")
            && inputs
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

    /// How many inputs of a node can have a quantizer.
    fn num_slots(&self, id: NodeId) -> usize {
        let slots = self.graph.inputs(id).iter().map(|input| input.slot + 1);
        let function = self.graph.nodes[id].function;
        let attention = function.is_some_and(|f| f == "scaled_dot_product_attention");
        slots
            .max()
            .unwrap_or(0)
            .min(if attention { 3 } else { usize::MAX }) // the fourth is a mask
    }
}

/// Position of the weight among the arguments of the functions that [`op_types::layer_of_function`] knows.
pub const WEIGHT: usize = 1;

/// Shape of the weight of a functional layer, if it is a parameter.
fn weight_shape(graph: &Graph, id: NodeId) -> Option<Vec<i64>> {
    op_types::layer_of_function(&graph.nodes[id].function?)?;
    let mut inputs = graph.inputs(id).iter();
    let input = inputs.find(|input| input.slot == WEIGHT)?;
    let tensor = &graph.tensors[input.tensor?];
    matches!(tensor.source, Source::Parameter(_)).then(|| tensor.shape.clone())
}

/// A function in the forwards of one module.
struct Called {
    scope: ScopeId,
    function: Symbol,
    /// Per turn in a forward, its number in [`Places::ends`].
    turns: Vec<Option<usize>>,
}

/// The places of a graph in the order in which they ran first.
struct Places {
    /// Per place: what ran there first and last.
    ends: Vec<(NodeId, NodeId)>,
    /// Per node: what ran next at the same place.
    next: Vec<Option<u32>>,
    functions: Vec<Called>,
}

impl Places {
    fn of(graph: &Graph) -> Self {
        let mut places = Places {
            ends: Vec::new(),
            next: vec![None; graph.nodes.len()],
            functions: Vec::new(),
        };
        let mut known: HashMap<(ScopeId, Symbol), usize> = HashMap::new();
        for (id, node) in graph.nodes.iter().enumerate() {
            let (Some(function), Some(scope)) = (node.function, node.scope) else {
                continue;
            };
            let functions = &mut places.functions;
            let called = *known.entry((scope, function)).or_insert_with(|| {
                functions.push(Called {
                    scope,
                    function,
                    turns: Vec::with_capacity(1),
                });
                functions.len() - 1
            });
            let turns = &mut functions[called].turns;
            if node.turn >= turns.len() {
                turns.resize(node.turn + 1, None);
            }
            match turns[node.turn] {
                Some(place) => {
                    let last = &mut places.ends[place].1;
                    places.next[*last] = Some(id as u32);
                    *last = id;
                }
                None => {
                    turns[node.turn] = Some(places.ends.len());
                    places.ends.push((id, id));
                }
            }
        }
        places
    }

    /// What ran at the place where `first` was the first.
    fn nodes(&self, first: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(Some(first), |&node| self.next[node].map(|n| n as NodeId))
    }
}

/// What the functional operations of a graph become in its module form.
pub fn module_form(graph: &Graph) -> ModuleForm {
    let flow = DataFlow::new(graph);
    let places = Places::of(graph);
    let calls = places.functions.iter();
    let mut form = ModuleForm {
        ops: Vec::with_capacity(places.ends.len()),
        takes_quantizer: Vec::new(),
        op_of: vec![None; graph.nodes.len()],
        left: Vec::new(),
        calls: calls
            .map(|called| (called.scope, called.function, called.turns.len()))
            .collect(),
    };
    for &(first, _) in &places.ends {
        let node = &graph.nodes[first];
        let (Some(function), Some(scope)) = (node.function, node.scope) else {
            continue;
        };
        let place = (scope, function, node.turn);
        let verdicts = places.nodes(first).map(|node| flow.verdict(node));
        match verdicts.reduce(Verdict::and) {
            Some(Verdict::Quantize) => {}
            Some(Verdict::Leave(reason)) => {
                form.left.push((place, reason));
                continue;
            }
            Some(Verdict::Other) | None => continue,
        }
        let widest = places.nodes(first).max_by_key(|&node| flow.num_slots(node));
        let widest = widest.unwrap_or(first);
        let start = form.takes_quantizer.len();
        let end = start + flow.num_slots(widest);
        form.takes_quantizer.resize(end, false);
        for input in graph.inputs(widest) {
            if let Some(takes) = form.takes_quantizer[start..].get_mut(input.slot) {
                *takes = flow.is_data(input);
            }
        }
        let weight = weight_shape(graph, first);
        let class = op_types::layer_of_function(&function)
            .filter(|_| weight.is_some())
            .or_else(|| op_types::module_of_function(&function))
            .map_or_else(|| Symbol::new(&format!("function.{function}")), Symbol::new);
        for node in places.nodes(first) {
            form.op_of[node] = Some(form.ops.len() as u32);
        }
        form.ops.push(FunctionalOp {
            place,
            class,
            inputs: start..end,
            weight,
            in_place: node.in_place,
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
        let classes: Vec<&str> = form.ops.iter().map(|op| op.class.as_str()).collect();
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
        assert_eq!(
            [0, 1, 2, 3].map(|node| form.op_of(node)),
            [Some(0), Some(1)].repeat(2)[..]
        );
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
                .1
                .start
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
