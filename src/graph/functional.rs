//! Quantizers for functional operations: the graph in *module form*.
//!
//! Placement knows modules. Here each torch function that can carry quantizers becomes a module of the class that
//! computes the same (`F.relu` an `nn.ReLU`, `x + y` a `custom.Add`), so that one set of rules serves both, with the
//! result that a model has whose author wrote modules throughout.
//!
//! A function is known by the module in whose forward it ran, its name, and how often it had run in that forward
//! before. Where that module runs several times, the calls of one place in its forward share their quantizers.

use std::collections::HashMap;

use super::{op_types, Graph, Input, Module, ModuleId, Node, NodeId, Source};

/// A place in the forward of a module: its path, the function, how often that had run before in this forward.
pub type Place = (String, String, usize);

/// A functional operation that can carry quantizers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionalOp {
    pub place: Place,
    /// Its module in the module form.
    pub module: ModuleId,
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

/// A graph whose functional operations are modules, where they can carry quantizers.
#[derive(Debug, Clone)]
pub struct ModuleForm {
    pub graph: Graph,
    pub ops: Vec<FunctionalOp>,
    /// Places left in floating point.
    pub left: Vec<(Place, Reason)>,
    /// Per module path and function: the number of calls in one forward of that module.
    pub calls: Vec<(String, String, usize)>,
}

/// What can be said of one functional node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Quantize,
    Leave(Reason),
    /// Nothing that a quantizer is for: it moves data, or its results are integers.
    Other,
}

pub(super) fn is_float(dtype: &str) -> bool {
    dtype.starts_with("float") || dtype.starts_with("bfloat")
}

/// Whether a node makes a mask: it multiplies by, or adds, a number that nothing else is made of.
fn makes_mask(node: &Node) -> bool {
    matches!(node.function.as_deref(), Some("add" | "sub" | "mul"))
        && node
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
        let Some(function) = node.function.as_deref() else {
            return Verdict::Other;
        };
        let outputs = || node.outputs.iter().map(|&t| &self.graph.tensors[t]);
        if self.graph.is_passthrough(id)
            || op_types::function_keeps_values(function)
            || (op_types::function_moves_data(function)
                && op_types::module_of_function(function).is_none())
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
        let masks = matches!(function, "add" | "sub")
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
        if op_types::is_scripted(function) {
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
        if node.function.as_deref() == Some("scaled_dot_product_attention") {
            inputs.truncate(3); // the fourth is a mask
        }
        inputs
    }
}

/// Position of the weight among the arguments of the functions that [`op_types::layer_of_function`] knows.
pub const WEIGHT: usize = 1;

/// Shape of the weight of a functional layer, if it is a parameter.
fn weight_shape(graph: &Graph, node: &Node) -> Option<Vec<i64>> {
    op_types::layer_of_function(node.function.as_deref()?)?;
    let input = node.inputs.iter().find(|input| input.slot == WEIGHT)?;
    let tensor = &graph.tensors[input.tensor?];
    matches!(tensor.source, Source::Parameter(_)).then(|| tensor.shape.clone())
}

/// The graph in module form.
pub fn module_form(graph: &Graph) -> ModuleForm {
    let flow = DataFlow::new(graph);
    let mut form = graph.clone();
    form.in_module_form = true;
    let mut ops: Vec<FunctionalOp> = Vec::new();
    let mut left = Vec::new();
    let mut calls: HashMap<(&str, &str), usize> = HashMap::new();
    let mut places: HashMap<(&str, &str, usize), Vec<NodeId>> = HashMap::new();
    let mut order = Vec::new();
    for (id, node) in graph.nodes.iter().enumerate() {
        let Some(function) = node.function.as_deref() else {
            continue;
        };
        let count = calls.entry((&node.scope, function)).or_default();
        *count = (*count).max(node.turn + 1);
        let key = (node.scope.as_str(), function, node.turn);
        let nodes = places.entry(key).or_default();
        if nodes.is_empty() {
            order.push(key);
        }
        nodes.push(id);
    }
    for key in order {
        let (scope, function, turn) = key;
        let nodes = &places[&key];
        let place = (scope.to_owned(), function.to_owned(), turn);
        let verdicts: Vec<Verdict> = nodes.iter().map(|&node| flow.verdict(node)).collect();
        let reason = verdicts.iter().find_map(|verdict| match verdict {
            Verdict::Leave(reason) => Some(*reason),
            _ => None,
        });
        if let Some(reason) = reason {
            left.push((place, reason));
            continue;
        }
        if verdicts.contains(&Verdict::Other) {
            continue;
        }
        let first = &graph.nodes[nodes[0]];
        let inputs = nodes
            .iter()
            .map(|&node| flow.inputs(&graph.nodes[node]))
            .max_by_key(Vec::len)
            .unwrap_or_default();
        let weight = weight_shape(graph, first);
        let class = op_types::layer_of_function(function)
            .filter(|_| weight.is_some())
            .or_else(|| op_types::module_of_function(function));
        let module = form.modules.len();
        form.modules.push(Module {
            path: format!("{scope}({function} {turn})"),
            class: class.map_or_else(|| format!("function.{function}"), str::to_owned),
            params: Vec::new(),
            groups: 1,
            num_inputs: inputs.len(),
            num_outputs: 1,
            dynamic_inputs: true,
            // What shares the memory of a result that was written in place has the same quantizer.
            dynamic: !first.in_place,
            quantizable: true,
            calls: nodes.clone(),
        });
        for &node in nodes {
            let op_type = op_types::module_op_type(&form.modules[module].class).to_owned();
            form.nodes[node].module = Some(module);
            form.nodes[node].op_type = op_type;
        }
        ops.push(FunctionalOp {
            place,
            module,
            inputs,
            weight,
            in_place: first.in_place,
        });
    }
    for (id, module) in form.modules.iter().enumerate() {
        form.by_path.insert(module.path.clone(), id);
    }
    let mut calls: Vec<(String, String, usize)> = calls
        .into_iter()
        .map(|((scope, function), count)| (scope.to_owned(), function.to_owned(), count))
        .collect();
    calls.sort();
    ModuleForm {
        graph: form,
        ops,
        left,
        calls,
    }
}

#[cfg(test)]
mod tests {
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
        let form = module_form(&net.finish(f));
        assert_eq!(
            places(&form),
            [("relu", 0), ("add", 0), ("erf", 0), ("add", 1)]
        );
        let classes: Vec<&str> = form
            .ops
            .iter()
            .map(|op| form.graph.modules[op.module].class.as_str())
            .collect();
        assert_eq!(
            classes,
            ["nn.ReLU", "custom.Add", "function.erf", "custom.Add"].map(|c| {
                if c == "function.erf" {
                    "custom.Erf"
                } else {
                    c
                }
            })
        );
        assert_eq!(form.graph.nodes[1].op_type, "Relu");
        assert!(form.graph.nodes[2].module.is_none() && form.graph.moves_data(2));
        assert!(form.calls.contains(&(String::new(), "add".into(), 2)));
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
        assert_eq!(form.graph.modules[form.ops[0].module].calls, [0, 2]);
    }

    #[test]
    fn masks_stay_as_they_are() {
        let mut builder = GraphBuilder::new();
        let float = || vec![(vec![2, 2], "float32".to_owned())];
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
