//! Which quantizer stands where: the rules of a configuration applied to a graph.
//!
//! The result is plain data, a [`Plan`]: a list of quantizers and, per module, which of them its inputs,
//! outputs and parameters use. Two places with the same number share one quantizer.
//!
//! Rules apply in the order defaults, parameters, operator types, supergroups, model inputs, model outputs,
//! per-channel settings, exceptions of the target; then quantizers are tied where an operator (Concat, Relu)
//! wants its inputs on the grid of its output.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::config::{Config, Dtype, Format, Kernel, OpRule, ParamRule};
use super::error::ConfigError;
use super::functional::{self, is_float, FunctionalOp, Place, Reason};
use super::op_types;
use super::pattern::{Flow, Origin};
use super::{Graph, Module, ModuleId, NodeId, TensorId};

/// Formats of quantizers about which the configuration says nothing.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub activation: Format,
    pub param: Format,
}

/// One quantizer to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantizer {
    pub enabled: bool,
    pub symmetric: bool,
    pub format: Format,
    /// Shape of the encodings; empty for one encoding per tensor.
    pub shape: Vec<i64>,
    /// Fixed minimum and maximum of the range.
    pub constraints: Option<(f64, Option<f64>)>,
}

/// Index into [`Plan::quantizers`].
pub type QuantizerId = usize;

/// The quantizers of one module; `None` where there is none.
#[derive(Debug, Clone)]
pub struct ModulePlan {
    pub module: ModuleId,
    pub path: String,
    pub inputs: Vec<Option<QuantizerId>>,
    pub outputs: Vec<Option<QuantizerId>>,
    pub params: Vec<(String, Option<QuantizerId>)>,
    pub supported_kernels: Vec<Kernel>,
}

/// What to put where.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub quantizers: Vec<Quantizer>,
    pub modules: Vec<ModulePlan>,
    /// Paths of modules without parameters that run several times: they get no quantizers, since one
    /// range for different tensors does harm.
    pub reused: Vec<String>,
}

/// Applies `config` to `graph`.
///
/// # Errors
/// [`ConfigError::Conflict`] if two rules of one section disagree about a quantizer,
/// [`ConfigError::Unsupported`] for strict or unsigned symmetric grids.
pub fn place(graph: &Graph, config: &Config, defaults: Defaults) -> Result<Plan, ConfigError> {
    let flow = Flow::new(graph);
    let mut placement = Placement::new(&flow, config, defaults);
    placement.apply_defaults()?;
    placement.apply_param_rules();
    placement.apply_op_rules()?;
    placement.apply_supergroups();
    if config.quantize_model_input {
        placement.quantize_unquantized_inputs();
    }
    if config.quantize_model_output {
        placement.quantize_final_outputs();
    }
    placement.apply_per_channel();
    placement.apply_exceptions();
    placement.drop_constant_rescales();
    placement.check()?;
    let mut plan = placement.realize();
    // In module form, what several places use are operations for each place; what is left are steps of a module that
    // itself runs several times, and like its layers they have one set of quantizers.
    if !graph.in_module_form {
        plan.reused = unuse_reused(graph, &mut plan);
    }
    tie_grids(&flow, config, &mut plan);
    Ok(plan)
}

/// A plan for modules and functional operations.
#[derive(Debug, Clone)]
pub struct FunctionalPlan {
    /// Of the modules alone.
    pub plan: Plan,
    /// Each functional operation that can carry quantizers, with those that it has.
    pub ops: Vec<(FunctionalOp, ModulePlan)>,
    pub left: Vec<(Place, Reason)>,
    pub calls: Vec<(String, String, usize)>,
}

/// [`place`] with quantizers for functional operations, too.
///
/// # Errors
/// Those of [`place`].
pub fn place_functional(
    graph: &Graph,
    config: &Config,
    defaults: Defaults,
) -> Result<FunctionalPlan, ConfigError> {
    let form = functional::module_form(graph);
    let mut plan = place(&form.graph, config, defaults)?;
    let functional = plan.modules.split_off(
        plan.modules
            .iter()
            .take_while(|module| graph.module(&module.path).is_some())
            .count(),
    );
    let mut ops = Vec::new();
    for (op, mut module) in form.ops.into_iter().zip(functional) {
        for (slot, may) in module.inputs.iter_mut().zip(&op.inputs) {
            *slot = slot.filter(|_| *may);
        }
        module.inputs.truncate(op.inputs.len());
        if let (Some(shape), Some(slot)) = (&op.weight, module.inputs.get_mut(functional::WEIGHT)) {
            let class = &form.graph.modules[op.module].class;
            let weight = weight_quantizer(config, class, shape, defaults.param);
            *slot = weight.map(|quantizer| {
                plan.quantizers.push(quantizer);
                plan.quantizers.len() - 1
            });
        }
        ops.push((op, module));
    }
    Ok(FunctionalPlan {
        plan,
        ops,
        left: form.left,
        calls: form.calls,
    })
}

/// The quantizer of a parameter that a function takes for its weight: what a module of `class` would have.
fn weight_quantizer(
    config: &Config,
    class: &str,
    shape: &[i64],
    format: Format,
) -> Option<Quantizer> {
    let rules: Vec<&OpRule> = op_types::onnx_types(class)
        .iter()
        .filter_map(|onnx| config.op_rules.get(*onnx))
        .collect();
    let mut rule = config.params;
    let named = config
        .param_rules
        .get("weight")
        .into_iter()
        .chain(rules.iter().filter_map(|r| r.params.get("weight")));
    for special in named {
        rule.is_quantized = special.is_quantized.or(rule.is_quantized);
        rule.is_symmetric = special.is_symmetric.or(rule.is_symmetric);
    }
    let said: Vec<bool> = rules.iter().filter_map(|r| r.per_channel).collect();
    let per_channel = match said.is_empty() {
        true => config.per_channel,
        false => said.contains(&true),
    };
    rule.is_quantized.unwrap_or(false).then(|| Quantizer {
        enabled: true,
        symmetric: rule.is_symmetric.unwrap_or(false),
        format,
        shape: match per_channel {
            true => channel_shape(class, "weight", shape),
            false => Vec::new(),
        },
        constraints: None,
    })
}

/// Shape of the encodings of a parameter with one per output channel.
fn channel_shape(class: &str, param: &str, shape: &[i64]) -> Vec<i64> {
    let transposed = class.starts_with("nn.ConvTranspose") && param == "weight";
    let axis = usize::from(transposed);
    let mut encodings = vec![1; shape.len()];
    match (encodings.get_mut(axis), shape.get(axis)) {
        (Some(size), Some(&channels)) => *size = channels,
        _ => encodings.clear(),
    }
    encodings
}

/// What a rule makes of a quantizer. One section may set each of the three once.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Enabled(bool),
    Symmetric(bool),
    Constraints((f64, Option<f64>)),
}

impl Change {
    /// Number of the setting that it changes.
    fn setting(self) -> usize {
        match self {
            Change::Enabled(_) => 0,
            Change::Symmetric(_) => 1,
            Change::Constraints(_) => 2,
        }
    }

    fn apply(self, quantizer: &mut Quantizer) {
        match self {
            Change::Enabled(on) => quantizer.enabled = on,
            Change::Symmetric(symmetric) => quantizer.symmetric = symmetric,
            Change::Constraints(range) => quantizer.constraints = Some(range),
        }
    }
}

/// As in a configuration file.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Enabled(on) => write!(f, "quantized: {on}"),
            Change::Symmetric(symmetric) => write!(f, "is_symmetric: {symmetric}"),
            Change::Constraints(range) => write!(f, "encoding_constraints: {range:?}"),
        }
    }
}

/// Quantizers of one module that a rule reaches together.
#[derive(Debug, Clone, Copy)]
enum Group {
    Inputs(ModuleId),
    Outputs(ModuleId),
    FirstOutput(ModuleId),
}

impl Group {
    /// The module, and which of its groups this is.
    fn place(self) -> (ModuleId, usize) {
        match self {
            Group::Inputs(module) => (module, 0),
            Group::Outputs(module) => (module, 1),
            Group::FirstOutput(module) => (module, 2),
        }
    }

    fn of(self, slots: &Slots) -> &[QuantizerId] {
        match self {
            Group::Inputs(_) => &slots.inputs,
            Group::Outputs(_) => &slots.outputs,
            Group::FirstOutput(_) => &slots.outputs[..slots.outputs.len().min(1)],
        }
    }
}

/// Quantizers that a rule for one operator reaches.
#[derive(Debug, Default)]
struct Reach {
    input_on: Vec<Group>,
    output_on: Vec<Group>,
    /// Its own inputs. What is around `producers` belongs to them.
    own_inputs: Vec<Group>,
    /// Not resolved here: what feeds a thousand operators would be walked around a thousand times.
    producers: Vec<NodeId>,
    output_off: Vec<Group>,
}

/// What the rules of one section have set so far, each quantizer once. By number and not by hash: in a
/// graph larger than a cache a look-up costs what it reads from memory.
#[derive(Debug)]
struct Done {
    /// Per quantizer and setting.
    changes: Vec<[Option<Change>; 3]>,
    /// Per module and group: the change to each setting that all its quantizers have already.
    groups: Vec<[[Option<Change>; 3]; 3]>,
    /// Per node: all quantizers around it are asymmetric already, or symmetric.
    around: Vec<[bool; 2]>,
}

#[derive(Debug, Default)]
struct Slots {
    inputs: Vec<QuantizerId>,
    outputs: Vec<QuantizerId>,
    params: Vec<QuantizerId>,
}

struct Placement<'a> {
    flow: &'a Flow<'a>,
    config: &'a Config,
    quantizers: Vec<Quantizer>,
    /// Per module; empty slots for a module that gets no quantizers.
    slots: Vec<Slots>,
    supported_kernels: Vec<Vec<Kernel>>,
}

impl<'a> Placement<'a> {
    fn new(flow: &'a Flow<'a>, config: &'a Config, defaults: Defaults) -> Self {
        let modules = &flow.graph.modules;
        let mut this = Placement {
            flow,
            config,
            quantizers: Vec::new(),
            slots: Vec::with_capacity(modules.len()),
            supported_kernels: vec![Vec::new(); modules.len()],
        };
        for module in modules {
            let mut slots = Slots::default();
            if module.quantizable {
                // A module that did not run is taken to have one input and one output.
                let arity = |count: &dyn Fn(NodeId) -> usize| {
                    module
                        .calls
                        .iter()
                        .map(|&node| count(node))
                        .max()
                        .unwrap_or(1)
                        .max(1)
                };
                let nodes = &flow.graph.nodes;
                let inputs = arity(&|n| {
                    nodes[n]
                        .inputs
                        .iter()
                        .map(|i| i.slot + 1)
                        .max()
                        .unwrap_or(1)
                });
                let outputs = arity(&|n| nodes[n].outputs.len());
                slots.inputs = this.add(inputs, defaults.activation);
                slots.outputs = this.add(outputs, defaults.activation);
                slots.params = this.add(module.params.len(), defaults.param);
            }
            this.slots.push(slots);
        }
        this
    }

    fn add(&mut self, count: usize, format: Format) -> Vec<QuantizerId> {
        let first = self.quantizers.len();
        let quantizer = Quantizer {
            enabled: false,
            symmetric: false,
            format,
            shape: Vec::new(),
            constraints: None,
        };
        self.quantizers.resize(first + count, quantizer);
        (first..first + count).collect()
    }

    /// What a quantizer is, for error messages.
    fn name(&self, id: QuantizerId) -> String {
        let modules = self.flow.graph.modules.iter().zip(&self.slots);
        for (Module { path, params, .. }, slots) in modules {
            let index = |ids: &[QuantizerId]| ids.iter().position(|&i| i == id);
            if let Some(i) = index(&slots.inputs) {
                return format!("input {i} of {path}");
            }
            if let Some(i) = index(&slots.outputs) {
                return format!("output {i} of {path}");
            }
            if let Some(i) = index(&slots.params) {
                return format!("{path}.{}", params[i].name);
            }
        }
        format!("quantizer {id}")
    }

    fn nothing_done(&self) -> Done {
        Done {
            changes: vec![[None; 3]; self.quantizers.len()],
            groups: vec![[[None; 3]; 3]; self.slots.len()],
            around: vec![[false; 2]; self.flow.graph.nodes.len()],
        }
    }

    /// The module of a node, if it gets quantizers.
    fn quantized_module(&self, node: NodeId) -> Option<ModuleId> {
        self.flow.graph.nodes[node]
            .module
            .filter(|&m| self.flow.graph.modules[m].quantizable)
    }

    fn quantized_modules(&self) -> impl Iterator<Item = ModuleId> + 'a {
        let modules = &self.flow.graph.modules;
        (0..modules.len()).filter(|&m| modules[m].quantizable)
    }

    /// Quantizers on both ends of the edges that leave `node`: its outputs, and its consumers' inputs.
    fn around_outputs(&self, node: NodeId) -> Vec<Group> {
        let own = self.quantized_module(node).map(Group::Outputs);
        own.into_iter().chain(self.consumer_inputs(node)).collect()
    }

    /// The input quantizers of the modules that `node` feeds.
    fn consumer_inputs(&self, node: NodeId) -> Vec<Group> {
        let consumers = self.flow.consumers[node].iter();
        consumers
            .filter_map(|&(consumer, _)| self.quantized_module(consumer))
            .map(Group::Inputs)
            .collect()
    }

    fn producers(&self, node: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        self.flow.origins[node]
            .iter()
            .filter_map(|origin| match origin {
                Origin::Node(producer, _) => Some(*producer),
                _ => None,
            })
    }

    fn reach_of_node(&self, node: NodeId) -> Reach {
        let mut reach = Reach {
            producers: self.producers(node).collect(),
            output_off: self.around_outputs(node),
            ..Reach::default()
        };
        match self.quantized_module(node) {
            Some(module) => {
                reach.input_on.push(Group::Inputs(module));
                reach.output_on.push(Group::Outputs(module));
                reach.own_inputs.push(Group::Inputs(module));
            }
            None => {
                let modules = reach.producers.iter().copied();
                let modules = modules.filter_map(|p| self.quantized_module(p));
                reach.input_on = modules.map(Group::FirstOutput).collect();
                reach.output_on = self.consumer_inputs(node);
            }
        }
        reach
    }

    fn reach_of_module(&self, module: ModuleId) -> Reach {
        match self.flow.graph.modules[module].calls.last() {
            Some(&node) => self.reach_of_node(node),
            None => Reach {
                input_on: vec![Group::Inputs(module)],
                output_on: vec![Group::Outputs(module)],
                own_inputs: vec![Group::Inputs(module)],
                producers: Vec::new(),
                output_off: vec![Group::Outputs(module)],
            },
        }
    }

    /// Functional operators that take part in the rules.
    fn elementwise_functions(&self) -> Vec<NodeId> {
        let graph = self.flow.graph;
        // In module form, what is a function still is one that is left in floating point on purpose; or it is a
        // scripted one, whose result can only be quantized where it is used.
        let mut nodes = self.flow.ops_of_types(if graph.in_module_form {
            op_types::is_scripted
        } else {
            op_types::is_elementwise_function
        });
        nodes.retain(|&node| graph.nodes[node].module.is_none());
        nodes
    }

    fn apply_defaults(&mut self) -> Result<(), ConfigError> {
        let config = self.config;
        let mut done = self.nothing_done();
        for module in self.quantized_modules() {
            let reach = self.reach_of_module(module);
            self.apply_op_rule(&reach, &config.ops, &mut done)?;
        }
        for node in self.elementwise_functions() {
            let reach = self.reach_of_node(node);
            self.apply_op_rule(&reach, &config.ops, &mut done)?;
        }
        for module in self.quantized_modules() {
            for index in 0..self.slots[module].params.len() {
                self.apply_param_rule(module, index, config.params);
            }
        }
        Ok(())
    }

    fn apply_param_rules(&mut self) {
        let config = self.config;
        for module in self.quantized_modules() {
            self.apply_named_param_rules(module, |name| config.param_rules.get(name).copied());
        }
    }

    /// Only weights and biases can have rules of their own.
    fn apply_named_param_rules(
        &mut self,
        module: ModuleId,
        rule: impl Fn(&str) -> Option<ParamRule>,
    ) {
        let params = &self.flow.graph.modules[module].params;
        for (index, param) in params.iter().enumerate() {
            let name = match param.name.as_str() {
                name @ ("weight" | "bias") => name,
                "sp_conv_3d.bias" => "bias",
                _ => continue,
            };
            if let Some(rule) = rule(name) {
                self.apply_param_rule(module, index, rule);
            }
        }
    }

    fn apply_param_rule(&mut self, module: ModuleId, index: usize, rule: ParamRule) {
        let quantizer = &mut self.quantizers[self.slots[module].params[index]];
        quantizer.enabled = rule.is_quantized.unwrap_or(quantizer.enabled);
        quantizer.symmetric = rule.is_symmetric.unwrap_or(quantizer.symmetric);
    }

    fn apply_op_rules(&mut self) -> Result<(), ConfigError> {
        let rules = self.op_rules();
        let no_output = OpRule {
            is_output_quantized: Some(false),
            ..OpRule::default()
        };
        let mut done = self.nothing_done();
        for module in self.quantized_modules() {
            let class = self.flow.graph.modules[module].class.as_str();
            let mut apply: Vec<&OpRule> = Vec::new();
            match op_types::target_type(class).and_then(|target| rules.get(target)) {
                Some(rule) => apply.push(rule),
                None => {
                    for onnx in op_types::onnx_types(class) {
                        match rules.get(*onnx) {
                            Some(rule) => apply.push(rule),
                            None if op_types::is_grid_preserving(onnx) => apply.push(&no_output),
                            None => {}
                        }
                    }
                }
            }
            if apply.is_empty() {
                continue;
            }
            let reach = self.reach_of_module(module);
            for rule in apply {
                self.apply_op_rule(&reach, rule, &mut done)?;
                self.apply_named_param_rules(module, |name| rule.params.get(name).copied());
            }
        }
        for node in self.elementwise_functions() {
            if let Some(rule) = rules.get(self.flow.op_type(node)) {
                let reach = self.reach_of_node(node);
                self.apply_op_rule(&reach, rule, &mut done)?;
            }
        }
        Ok(())
    }

    /// The operator rules. A rule for a target's name takes what the rule for the ONNX name says, if there
    /// is one, and keeps its own kernels.
    fn op_rules(&self) -> HashMap<&'a str, OpRule> {
        let mut rules: HashMap<&str, OpRule> = self
            .config
            .op_rules
            .iter()
            .map(|(name, rule)| (name.as_str(), rule.clone()))
            .collect();
        for module in &self.flow.graph.modules {
            let Some(target) = op_types::target_type(&module.class) else {
                continue;
            };
            let Some((target, own)) = self.config.op_rules.get_key_value(target) else {
                continue;
            };
            for onnx in op_types::onnx_types(&module.class)
                .iter()
                .filter(|onnx| *onnx != target)
            {
                if let Some(onnx_rule) = self.config.op_rules.get(*onnx) {
                    let kernels = own
                        .supported_kernels
                        .clone()
                        .or(onnx_rule.supported_kernels.clone());
                    let merged = OpRule {
                        supported_kernels: kernels,
                        ..onnx_rule.clone()
                    };
                    rules.insert(target.as_str(), merged);
                }
            }
        }
        rules
    }

    fn apply_op_rule(
        &mut self,
        reach: &Reach,
        rule: &OpRule,
        done: &mut Done,
    ) -> Result<(), ConfigError> {
        if rule.is_input_quantized == Some(true) {
            self.set(&reach.input_on, Change::Enabled(true), done)?;
        }
        if let Some(on) = rule.is_output_quantized {
            let groups = if on {
                &reach.output_on
            } else {
                &reach.output_off
            };
            self.set(groups, Change::Enabled(on), done)?;
        }
        if let Some(symmetric) = rule.is_symmetric {
            let change = Change::Symmetric(symmetric);
            self.set(&reach.own_inputs, change, done)?;
            for &producer in &reach.producers {
                let around = &mut done.around[producer][usize::from(symmetric)];
                if !std::mem::replace(around, true) {
                    self.set(&self.around_outputs(producer), change, done)?;
                }
            }
            self.set(&reach.output_off, change, done)?;
        }
        if let Some(range) = rule.constraints {
            self.set(&reach.output_on, Change::Constraints(range), done)?;
        }
        Ok(())
    }

    /// Changes the quantizers of `groups`.
    fn set(
        &mut self,
        groups: &[Group],
        change: Change,
        done: &mut Done,
    ) -> Result<(), ConfigError> {
        let setting = change.setting();
        for &group in groups {
            let (module, which) = group.place();
            let before = &mut done.groups[module][which][setting];
            if before.replace(change) == Some(change) {
                continue;
            }
            let slots = &self.slots[module];
            for &id in group.of(slots) {
                match done.changes[id][setting] {
                    Some(first) if first != change => {
                        return Err(ConfigError::Conflict {
                            quantizer: self.name(id),
                            first: first.to_string(),
                            second: change.to_string(),
                        });
                    }
                    Some(_) => {}
                    None => {
                        change.apply(&mut self.quantizers[id]);
                        done.changes[id][setting] = Some(change);
                    }
                }
            }
        }
        Ok(())
    }

    fn apply_supergroups(&mut self) {
        let graph = self.flow.graph;
        let fold = ["Conv", "ConvTranspose", "Gemm"]
            .map(|first| vec![first.to_owned(), "BatchNormalization".to_owned()]);
        // A grouped transposed convolution cannot take up a batch norm.
        let folded = self
            .flow
            .chains(&fold, &HashSet::new(), |_| false)
            .into_iter()
            .filter(|chain| {
                let module = graph.nodes[chain[0]].module.map(|m| &graph.modules[m]);
                !module.is_some_and(|m| m.class == "nn.ConvTranspose2d" && m.groups != 1)
            });
        let folded: Vec<Vec<NodeId>> = folded.collect();
        let norms: HashSet<NodeId> = folded.iter().map(|chain| chain[1]).collect();
        let chains = self.flow.chains(&self.config.supergroups, &norms, |node| {
            self.has_no_fused_kernel(node)
        });
        for chain in chains {
            let last = chain.len() - 1;
            for (position, &node) in chain.iter().enumerate() {
                let Some(module) = self.quantized_module(node) else {
                    continue;
                };
                if position != 0 {
                    self.disable(module, |slots| &slots.inputs);
                }
                if position != last {
                    self.disable(module, |slots| &slots.outputs);
                }
            }
        }
        for chain in folded {
            let (Some(layer), Some(norm)) = (
                self.quantized_module(chain[0]),
                self.quantized_module(chain[1]),
            ) else {
                continue;
            };
            self.disable(norm, |slots| &slots.inputs);
            self.disable(norm, |slots| &slots.params);
            // The norm will be folded into the layer, so the pair has one output: the norm's.
            let layer_outputs = self.slots[layer].outputs.iter();
            let pairs: Vec<_> = layer_outputs
                .copied()
                .zip(self.slots[norm].outputs.clone())
                .collect();
            for (layer, norm) in pairs {
                self.quantizers[norm].enabled = self.quantizers[layer].enabled;
                self.quantizers[layer].enabled = false;
            }
        }
    }

    fn disable(&mut self, module: ModuleId, which: impl Fn(&Slots) -> &Vec<QuantizerId>) {
        for &id in which(&self.slots[module]) {
            self.quantizers[id].enabled = false;
        }
    }

    /// Three-dimensional and depthwise convolutions have no kernel with a fused activation.
    fn has_no_fused_kernel(&self, node: NodeId) -> bool {
        let op_type = self.flow.op_type(node);
        if !matches!(op_type, "Conv" | "ConvTranspose") {
            return false;
        }
        let Some(module) = self.flow.graph.nodes[node]
            .module
            .map(|m| &self.flow.graph.modules[m])
        else {
            return false;
        };
        let Some(weight) = module.params.iter().find(|p| p.name == "weight") else {
            return false;
        };
        let depthwise = module.groups != 1
            && match op_type {
                "Conv" => weight.shape.get(1) == Some(&1),
                _ => weight.shape.first() == Some(&module.groups),
            };
        weight.shape.len() == 5 || depthwise
    }

    /// Switches on the input quantizers of modules whose inputs no quantizer has seen: model inputs,
    /// constants, and what only moved them.
    fn quantize_unquantized_inputs(&mut self) {
        let nodes = self.flow.graph.nodes.len();
        // In order of execution, so producers are known before their consumers.
        let mut quantized = vec![true; nodes];
        for &node in &self.flow.ops {
            let seen: Vec<bool> = self.flow.origins[node]
                .iter()
                .map(|origin| match *origin {
                    Origin::Node(producer, _) => quantized[producer],
                    Origin::Parameter => true,
                    Origin::Root(_) => false,
                })
                .collect();
            let first_is_root = matches!(self.flow.origins[node].first(), Some(Origin::Root(_)));
            quantized[node] = match (
                self.quantized_module(node),
                self.flow.graph.nodes[node].module,
            ) {
                (Some(module), _) => {
                    let inputs = &self.flow.graph.nodes[node].inputs;
                    // Arithmetic of sizes is no matter for quantizers.
                    let numbers_only = inputs.iter().all(|input| input.tensor.is_none());
                    for (input, seen) in inputs.iter().zip(&seen).filter(|_| !numbers_only) {
                        if let Some(&id) =
                            self.slots[module].inputs.get(input.slot).filter(|_| !seen)
                        {
                            self.quantizers[id].enabled = true;
                        }
                    }
                    true
                }
                (None, Some(module)) => {
                    op_types::module_preserves_grid(&self.flow.graph.modules[module].class)
                        && (first_is_root || seen.first().copied().unwrap_or(false))
                }
                (None, None) => {
                    !self.flow.graph.moves_data(node) || seen.first().copied().unwrap_or(false)
                }
            };
        }
    }

    fn quantize_final_outputs(&mut self) {
        for &node in &self.flow.ops {
            if self.flow.consumers[node].is_empty() {
                if let Some(module) = self.quantized_module(node) {
                    for &id in &self.slots[module].outputs {
                        self.quantizers[id].enabled = true;
                    }
                }
            }
        }
    }

    fn apply_per_channel(&mut self) {
        for module in self.quantized_modules() {
            let declared = &self.flow.graph.modules[module];
            let Some(&node) = declared.calls.last() else {
                continue;
            };
            let rules: Vec<bool> = op_types::onnx_types(&declared.class)
                .iter()
                .filter_map(|onnx| self.config.op_rules.get(*onnx)?.per_channel)
                .collect();
            let per_channel = if rules.is_empty() {
                self.config.per_channel
            } else {
                rules.contains(&true)
            };
            let kernels = |name: &str| self.config.op_rules.get(name)?.supported_kernels.clone();
            self.supported_kernels[module] = op_types::target_type(&declared.class)
                .and_then(kernels)
                .or_else(|| kernels(self.flow.op_type(node)))
                .or_else(|| self.config.supported_kernels.clone())
                .unwrap_or_default();
            if !per_channel {
                continue;
            }
            for (param, &id) in declared.params.iter().zip(&self.slots[module].params) {
                self.quantizers[id].shape =
                    channel_shape(&declared.class, &param.name, &param.shape);
            }
        }
    }

    /// What particular modules need on particular targets.
    fn apply_exceptions(&mut self) {
        let hw = self.config.hw_version.as_deref();
        let old = matches!(hw, Some("V66" | "V68" | "V69"));
        for module in self.quantized_modules() {
            let declared = &self.flow.graph.modules[module];
            let param = |name: &str| declared.params.iter().position(|p| p.name == name);
            match declared.class.as_str() {
                "nn.Embedding" if hw.is_some() && !old => {
                    if let Some(index) = param("weight") {
                        self.copy_output_format(module, index);
                    }
                }
                "nn.GroupNorm" if hw.is_some() && !old && param("weight").is_some() => {
                    (0..declared.params.len())
                        .for_each(|index| self.copy_output_format(module, index));
                }
                "nn.LayerNorm" => {
                    if let Some(index) = param("weight") {
                        let quantizer = &mut self.quantizers[self.slots[module].params[index]];
                        quantizer.symmetric = quantizer.format.bitwidth >= 16;
                    }
                }
                "custom.MatMul" | "custom.Outer" if hw.is_some() => {
                    if let Some(&node) = declared.calls.last() {
                        self.apply_matmul_exception(module, node, old);
                    }
                }
                _ => {}
            }
        }
    }

    fn copy_output_format(&mut self, module: ModuleId, param: usize) {
        let Some(&output) = self.slots[module].outputs.first() else {
            return;
        };
        let output = self.quantizers[output].clone();
        let quantizer = &mut self.quantizers[self.slots[module].params[param]];
        quantizer.format.bitwidth = output.format.bitwidth;
        quantizer.symmetric = output.symmetric;
    }

    /// The second factor has 8 bits and a symmetric grid on old targets; on others it may have 16 bits if the
    /// grid is symmetric and the first factor has 16 bits too.
    fn apply_matmul_exception(&mut self, module: ModuleId, node: NodeId, old: bool) {
        let first = self.effective_input_quantizer(module, node, 0);
        let Some(second) = self.effective_input_quantizer(module, node, 1) else {
            return;
        };
        let is_float = |id: QuantizerId| self.quantizers[id].format.dtype == Dtype::Float;
        if first.is_some_and(is_float) && is_float(second) {
            return;
        }
        if old {
            self.quantizers[second].symmetric = true;
            self.quantizers[second].format.bitwidth = 8;
        } else if let Some(first) = first {
            if self.quantizers[second].format.bitwidth == 16 {
                self.quantizers[second].symmetric = true;
                self.quantizers[first].format.bitwidth = 16;
            }
        }
    }

    /// The quantizer that input `slot` of a module has gone through: its own, or that of the nearest
    /// producer with an enabled one.
    fn effective_input_quantizer(
        &self,
        module: ModuleId,
        node: NodeId,
        slot: usize,
    ) -> Option<QuantizerId> {
        let own = *self.slots[module].inputs.get(slot)?;
        if self.quantizers[own].enabled {
            return Some(own);
        }
        let index = self.flow.graph.nodes[node]
            .inputs
            .iter()
            .position(|input| input.slot == slot)?;
        let Origin::Node(mut producer, _) = self.flow.origins[node][index] else {
            return None;
        };
        loop {
            let producers: Vec<NodeId> = self.producers(producer).collect();
            match self.quantized_module(producer) {
                Some(module) => {
                    let slots = &self.slots[module];
                    let near = [slots.outputs.first(), slots.inputs.first()];
                    let enabled = near
                        .into_iter()
                        .flatten()
                        .find(|&&id| self.quantizers[id].enabled);
                    if let Some(&id) = enabled {
                        return Some(id);
                    }
                    let [only] = producers[..] else { return None };
                    producer = only;
                }
                None => producer = *producers.first()?,
            }
        }
    }

    /// Multiplying or dividing by a positive constant only rescales the grid: no quantizer of its own.
    fn drop_constant_rescales(&mut self) {
        for node in self
            .flow
            .ops_of_types(|op_type| matches!(op_type, "Mul" | "Div"))
        {
            let Some(module) = self.quantized_module(node) else {
                continue;
            };
            let multiply = match self.flow.class(node) {
                Some("custom.Multiply") => true,
                Some("custom.Divide") => false,
                _ => continue,
            };
            let [left, right] = &self.flow.graph.nodes[node].inputs[..] else {
                continue;
            };
            let (input, factor) = if multiply && right.value.is_none() {
                (right, left)
            } else {
                (left, right)
            };
            if !factor
                .value
                .is_some_and(|value| value.is_finite() && value > 0.0)
            {
                continue;
            }
            let source = self.effective_input_quantizer(module, node, input.slot);
            if source.is_some_and(|id| self.quantizers[id].enabled) {
                if let Some(&id) = self.slots[module].inputs.get(factor.slot) {
                    self.quantizers[id].enabled = false;
                }
                if let Some(&id) = self.slots[module].outputs.first() {
                    self.quantizers[id].enabled = false;
                }
            }
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let symmetric = self.quantizers.iter().any(|q| q.enabled && q.symmetric);
        for (on, key) in [
            (self.config.strict_symmetric, "strict_symmetric"),
            (self.config.unsigned_symmetric, "unsigned_symmetric"),
        ] {
            if on && symmetric {
                return Err(ConfigError::Unsupported {
                    path: format!("$.defaults.{key}"),
                    reason: "symmetric quantizers have the full signed grid".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Fits the slots of the recorded calls to those that the quantized twins have.
    fn realize(self) -> Plan {
        let mut plan = Plan {
            quantizers: self.quantizers,
            ..Plan::default()
        };
        let modules = self.flow.graph.modules.iter().enumerate();
        for ((id, module), (slots, kernels)) in
            modules.zip(self.slots.into_iter().zip(self.supported_kernels))
        {
            if !module.quantizable {
                continue;
            }
            let num_inputs = match (module.dynamic, module.dynamic_inputs) {
                (true, _) => slots.inputs.len(),
                (false, true) => module.num_inputs.max(slots.inputs.len()),
                (false, false) => module.num_inputs,
            };
            let num_outputs = match module.dynamic {
                true => slots.outputs.len(),
                false => module.num_outputs,
            };
            let params = module.params.iter().zip(&slots.params);
            let params = params
                .map(|(p, &id)| (p.name.clone(), plan.enabled(id)))
                .collect();
            let mut inputs = plan.fit(&slots.inputs, num_inputs);
            let mut outputs = plan.fit(&slots.outputs, num_outputs);
            if module.dynamic && !module.calls.is_empty() {
                leave_integers(self.flow.graph, module, &mut inputs, &mut outputs);
            }
            plan.modules.push(ModulePlan {
                module: id,
                path: module.path.clone(),
                inputs,
                outputs,
                params,
                supported_kernels: kernels,
            });
        }
        plan
    }
}

impl Plan {
    fn enabled(&self, id: QuantizerId) -> Option<QuantizerId> {
        self.quantizers[id].enabled.then_some(id)
    }

    /// The first `count` slots; a twin's further slots get quantizers like the last one's.
    fn fit(&mut self, slots: &[QuantizerId], count: usize) -> Vec<Option<QuantizerId>> {
        (0..count)
            .map(|i| match slots.get(i) {
                Some(&id) => self.enabled(id),
                None => {
                    let last = self.enabled(*slots.last()?)?;
                    let copy = self.quantizers[last].clone();
                    self.quantizers.push(copy);
                    Some(self.quantizers.len() - 1)
                }
            })
            .collect()
    }

    /// Both ends of the range are given.
    fn is_fixed(&self, id: QuantizerId) -> bool {
        matches!(self.quantizers[id].constraints, Some((_, Some(_))))
    }

    /// Some end of the range is given, so the range does not fit other consumers of the same tensor.
    fn is_constrained(&self, id: QuantizerId) -> bool {
        self.quantizers[id].constraints.is_some()
    }
}

/// Empties the slots of a module made on the fly where no floating-point tensor ever came: a quantizer there would wait
/// for data for good.
fn leave_integers(
    graph: &Graph,
    module: &Module,
    inputs: &mut [Option<QuantizerId>],
    outputs: &mut [Option<QuantizerId>],
) {
    let calls = || module.calls.iter().map(|&node| &graph.nodes[node]);
    let is_float = |t: TensorId| is_float(&graph.tensors[t].dtype);
    for (slot, quantizer) in inputs.iter_mut().enumerate() {
        let mut given = calls().flat_map(|node| &node.inputs);
        if !given.any(|input| input.slot == slot && input.tensor.is_some_and(is_float)) {
            *quantizer = None;
        }
    }
    for (index, quantizer) in outputs.iter_mut().enumerate() {
        if !calls().any(|node| node.outputs.get(index).is_some_and(|&t| is_float(t))) {
            *quantizer = None;
        }
    }
}

/// Modules without parameters that run more than once lose their quantizers, unless the range is fixed.
fn unuse_reused(graph: &Graph, plan: &mut Plan) -> Vec<String> {
    let mut reused = Vec::new();
    for index in 0..plan.modules.len() {
        let module = &graph.modules[plan.modules[index].module];
        // A functional operation has quantizers for each place in a forward; only the calls of one place
        // in several forwards share them.
        let counts = |m: &Module| {
            let functional = m.calls.iter().any(|&n| graph.nodes[n].function.is_some());
            m.calls.len() > 1 && m.params.is_empty() && !functional
        };
        if !counts(module) {
            continue;
        }
        let drop = |slot: &Option<QuantizerId>| slot.is_some_and(|id| !plan.is_fixed(id));
        let inputs: Vec<bool> = plan.modules[index].inputs.iter().map(drop).collect();
        let outputs: Vec<bool> = plan.modules[index].outputs.iter().map(drop).collect();
        if inputs.iter().chain(&outputs).any(|&drop| drop) {
            reused.push(plan.modules[index].path.clone());
        }
        let clear = |slots: &mut Vec<Option<QuantizerId>>, drops: Vec<bool>| {
            slots
                .iter_mut()
                .zip(drops)
                .filter(|(_, drop)| *drop)
                .for_each(|(slot, _)| *slot = None);
        };
        clear(&mut plan.modules[index].inputs, inputs);
        clear(&mut plan.modules[index].outputs, outputs);
    }
    reused
}

/// Lets the producers of certain operators' inputs use the operator's output quantizer: all inputs of a Concat
/// must be on one grid, and what a Relu cuts off needs no room in the grid before it.
fn tie_grids(flow: &Flow, config: &Config, plan: &mut Plan) {
    let mut plan_of = vec![None; flow.graph.modules.len()];
    for (index, module) in plan.modules.iter().enumerate() {
        plan_of[module.module] = Some(index);
    }
    let planned = |node: NodeId| -> Option<usize> { plan_of[flow.graph.nodes[node].module?] };
    let wants_tie = |class: &str| {
        class == "nn.ReLU"
            || op_types::module_joins_grids(class)
            || (config.hw_version.is_some() && op_types::module_interpolates(class))
    };
    for &op in flow.ops.iter().rev() {
        let Some(module) = planned(op).filter(|_| flow.class(op).is_some_and(wants_tie)) else {
            continue;
        };
        let [Some(quantizer)] = plan.modules[module].outputs[..] else {
            continue;
        };
        let mut seen = HashSet::new();
        let mut todo: Vec<(NodeId, usize)> = (0..flow.origins[op].len()).map(|i| (op, i)).collect();
        while let Some((consumer, index)) = todo.pop() {
            if !seen.insert((consumer, index)) {
                continue;
            }
            let input = &flow.graph.nodes[consumer].inputs[index];
            match flow.origins[consumer][index] {
                Origin::Parameter => {}
                Origin::Root(None) => {}
                Origin::Root(Some(tensor)) => {
                    let shared = flow.graph.tensors[tensor].consumers.len() > 1;
                    if shared && plan.is_constrained(quantizer) {
                        continue;
                    }
                    if let Some(slot) =
                        planned(consumer).and_then(|m| plan.modules[m].inputs.get_mut(input.slot))
                    {
                        *slot = Some(quantizer);
                    }
                }
                Origin::Node(producer, output) => {
                    if flow.consumers[producer].len() > 1 && plan.is_constrained(quantizer) {
                        continue;
                    }
                    let class = flow.class(producer).unwrap_or_default();
                    let target = planned(producer);
                    if let Some(module) = target {
                        // A Split has one quantizer for all its outputs.
                        let output = if class == "custom.Split" { 0 } else { output };
                        if let Some(slot @ Some(_)) = plan.modules[module].outputs.get_mut(output) {
                            *slot = Some(quantizer);
                        }
                    }
                    let moves = target.is_none()
                        && (flow.graph.moves_data(producer)
                            || op_types::module_preserves_grid(class));
                    if moves || op_types::is_transparent_module(class) {
                        todo.extend((0..flow.origins[producer].len()).map(|i| (producer, i)));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{GraphBuilder, Input, Module, Source};
    use super::*;

    const DEFAULT: &str =
        include_str!("../../python/rimet/common/quantsim_config/default_config_per_channel.json");

    fn int(bitwidth: u32) -> Format {
        Format {
            dtype: Dtype::Int,
            bitwidth,
        }
    }

    fn plan(graph: &Graph, config: &str) -> Plan {
        let defaults = Defaults {
            activation: int(8),
            param: int(4),
        };
        place(graph, &Config::parse(config).unwrap(), defaults).unwrap()
    }

    /// "io w-" style: inputs, outputs, parameters; a dash where there is no quantizer.
    fn show(plan: &Plan, path: &str) -> String {
        let module = plan.modules.iter().find(|m| m.path == path).unwrap();
        let mark = |on: bool, c: char| if on { c } else { '-' };
        let mut text: String = module
            .inputs
            .iter()
            .map(|q| mark(q.is_some(), 'i'))
            .collect();
        text.extend(module.outputs.iter().map(|q| mark(q.is_some(), 'o')));
        text.extend(
            module
                .params
                .iter()
                .map(|(n, q)| mark(q.is_some(), n.chars().next().unwrap())),
        );
        text
    }

    fn residual() -> Graph {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("conv1", 1), &[x]);
        let b = net.add(norm("bn1"), &[a]);
        let c = net.add(module("relu1", "nn.ReLU"), &[b]);
        let d = net.add(conv("conv2", 8), &[c]);
        let e = net.add(norm("bn2"), &[d]);
        let f = net.function("add", &[e, c]);
        let g = net.add(module("relu2", "nn.ReLU"), &[f]);
        let h = net.add(module("pool", "nn.MaxPool2d"), &[g]);
        let i = net.add(
            Module {
                params: conv("", 1).params,
                ..module("fc", "nn.Linear")
            },
            &[h],
        );
        net.finish(i)
    }

    #[test]
    fn supergroups_folds_and_inputs() {
        let plan = plan(&residual(), DEFAULT);
        assert_eq!(show(&plan, "conv1"), "i-w-");
        assert_eq!(show(&plan, "bn1"), "----");
        assert_eq!(show(&plan, "relu1"), "-o");
        assert_eq!(show(&plan, "conv2"), "--w-"); // depthwise, its norm carries the output
        assert_eq!(show(&plan, "bn2"), "-o--");
        assert_eq!(show(&plan, "relu2"), "-o"); // Add + Relu: the input goes
        assert_eq!(show(&plan, "pool"), "--");
        assert_eq!(show(&plan, "fc"), "-ow-");
        let conv = plan.modules.iter().find(|m| m.path == "conv2").unwrap();
        let weight = &plan.quantizers[conv.params[0].1.unwrap()];
        assert_eq!(
            (weight.shape.clone(), weight.symmetric, weight.format),
            (vec![8, 1, 1, 1], true, int(4))
        );
    }

    #[test]
    fn functional_add_hands_its_grid_to_its_consumers() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("a", 1), &[x]);
        let b = net.function("add", &[a, a]);
        let c = net.function("view", &[b]);
        let d = net.add(conv("direct", 1), &[b]);
        let e = net.add(conv("behind_view", 1), &[c]);
        let f = net.function("add", &[d, e]);
        let plan = plan(&net.finish(f), DEFAULT);
        assert_eq!(show(&plan, "direct"), "iow-");
        assert_eq!(show(&plan, "behind_view"), "-ow-");
    }

    #[test]
    fn concat_and_relu_share_their_quantizer_with_their_producers() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("a", 1), &[x]);
        let b = net.add(conv("b", 8), &[x]);
        let c = net.add(module("relu", "nn.ReLU"), &[b]); // b is depthwise: no supergroup, but tied
        let cat = Module {
            num_inputs: 1,
            dynamic_inputs: true,
            ..module("cat", "custom.Concat")
        };
        let d = net.add(cat, &[a, c, x]);
        let plan = plan(&net.finish(d), DEFAULT);
        let of = |path: &str| plan.modules.iter().find(|m| m.path == path).unwrap();
        let shared = of("cat").outputs[0];
        assert!(shared.is_some());
        assert_eq!(of("a").outputs[0], shared);
        assert_eq!(of("relu").outputs[0], shared);
        assert_eq!(of("b").outputs[0], shared);
        assert_eq!(of("cat").inputs, vec![None, None, shared]);
    }

    #[test]
    fn reused_module_without_parameters_gets_none() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(module("relu", "nn.ReLU"), &[x]);
        let b = net.add(conv("conv", 1), &[a]);
        let c = net.call("relu", &[b]);
        let d = net.call("conv", &[c]);
        let plan = plan(&net.finish(d), DEFAULT);
        assert_eq!(show(&plan, "relu"), "--");
        assert_eq!(plan.reused, vec!["relu"]);
        // The first call is followed by a Relu alone, so its supergroup takes the output.
        assert_eq!(show(&plan, "conv"), "--w-");
    }

    #[test]
    fn integers_of_a_module_made_on_the_fly_get_none() {
        let mut builder = GraphBuilder::new();
        let odd = Module {
            dynamic: true,
            dynamic_inputs: true,
            ..module("odd", "my.Odd")
        };
        builder.module(odd).unwrap();
        let arg = |slot, tensor| Input {
            slot,
            tensor: Some(tensor),
            value: None,
        };
        let index = builder.tensor(Source::Input(0), vec![2], "int64".into());
        let x = builder.tensor(Source::Input(1), vec![3, 4], "float32".into());
        let results = ["int64", "float32"].map(|dtype| (vec![2, 4], dtype.to_owned()));
        let (_, values) = builder
            .call_module("odd", vec![arg(0, index), arg(1, x)], results.to_vec())
            .unwrap();
        builder.output(values[1], 0).unwrap();
        let plan = plan(&builder.finish(), DEFAULT);
        let odd = &plan.modules[0];
        let has = |slots: &[Option<QuantizerId>]| -> Vec<bool> {
            slots.iter().map(Option::is_some).collect()
        };
        assert_eq!(has(&odd.inputs), [false, true]);
        assert_eq!(has(&odd.outputs), [false, true]);
    }

    #[test]
    fn rules_of_one_section_must_agree() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(module("pool", "nn.MaxPool2d"), &[x]);
        let b = net.add(module("sig", "nn.Sigmoid"), &[a]);
        let graph = net.finish(b);
        let config = r#"{"defaults": {"ops": {"is_output_quantized": "True"}, "params": {}}, "params": {},
            "op_type": {"MaxPool": {"is_output_quantized": "False"}, "Sigmoid": {"is_input_quantized": "True"}},
            "supergroups": [], "model_input": {}, "model_output": {}}"#;
        let defaults = Defaults {
            activation: int(8),
            param: int(8),
        };
        let result = place(&graph, &Config::parse(config).unwrap(), defaults);
        assert!(
            matches!(&result, Err(ConfigError::Conflict { quantizer, .. }) if quantizer == "input 0 of sig"),
            "{result:?}"
        );
    }

    #[test]
    fn constraints_and_model_output() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(module("soft", "nn.Softmax"), &[x]);
        let b = net.add(module("flat", "nn.Flatten"), &[a]);
        let config = r#"{"defaults": {"ops": {"is_output_quantized": "True"}, "params": {}}, "params": {},
            "op_type": {"Softmax": {"encoding_constraints": {"min": 0.0, "max": 1.0}, "is_symmetric": "False"}},
            "supergroups": [], "model_input": {}, "model_output": {"is_output_quantized": "True"}}"#;
        let plan = plan(&net.finish(b), config);
        assert_eq!(show(&plan, "soft"), "-o");
        assert_eq!(show(&plan, "flat"), "-o");
        let output = plan.modules[0].outputs[0].unwrap();
        assert_eq!(plan.quantizers[output].constraints, Some((0.0, Some(1.0))));
    }

    #[test]
    fn ten_thousand_nodes_are_placed() {
        let mut net = Net::new();
        let mut x = net.input();
        for i in 0..2500 {
            let a = net.add(conv(&format!("c{i}"), 1), &[x]);
            let b = net.add(norm(&format!("n{i}")), &[a]);
            let c = net.add(module(&format!("r{i}"), "nn.ReLU"), &[b]);
            x = net.function("add", &[c, x]);
        }
        let plan = plan(&net.finish(x), DEFAULT);
        assert_eq!(plan.modules.len(), 7500);
        assert_eq!(show(&plan, "r2499"), "-o");
    }
}
