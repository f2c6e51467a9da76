//! Which quantizer stands where: the rules of a configuration applied to a graph.
//!
//! The result is plain data, a [`Plan`]: a list of quantizers and, per module, which of them its inputs,
//! outputs and parameters use. Two places with the same number share one quantizer.
//!
//! Rules apply in the order defaults, parameters, operator types, supergroups, model inputs, model outputs,
//! per-channel settings, exceptions of the target; then quantizers are tied where an operator (Concat, Relu)
//! wants its inputs on the grid of its output.

mod plan;
mod rules;
mod section;

use std::ops::Range;
use std::sync::Arc;

use super::config::{Config, Dtype, Format, OpRule};
use super::error::ConfigError;
use super::functional::{self, ModuleForm};
use super::op_types;
use super::pattern::{Flow, ModuleRow, Origin};
use super::symbol::Symbol;
use super::{Graph, ModuleId, NodeId, Parameter};

pub use plan::{Granularity, ModulePlan, Plan, Quantizer, QuantizerId};
use rules::{ParamName, Rules};
use section::{Change, Group, Section};

/// Formats of quantizers about which the configuration says nothing.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub activation: Format,
    pub param: Format,
}

/// Fixed minimum and, optionally, maximum of a range.
pub type Constraints = (f64, Option<f64>);

/// Applies `config` to `graph`.
///
/// # Errors
/// [`ConfigError::Conflict`] if two rules of one section disagree about a quantizer,
/// [`ConfigError::Unsupported`] for strict or unsigned symmetric grids.
pub fn place(graph: &Graph, config: &Config, defaults: Defaults) -> Result<Plan, ConfigError> {
    let flow = Flow::new(graph);
    place_by(&Rules::new(config, &flow), &flow, defaults)
}

fn place_by(rules: &Rules, flow: &Flow, defaults: Defaults) -> Result<Plan, ConfigError> {
    let config = rules.config;
    let mut placement = Placement::new(flow, rules, defaults);
    placement.apply_defaults()?;
    placement.apply_op_rules()?;
    placement.apply_supergroups();
    if config.quantize_model_input {
        placement.quantize_unquantized_inputs();
    }
    if config.quantize_model_output {
        placement.quantize_final_outputs();
    }
    placement.apply_exceptions();
    placement.drop_constant_rescales();
    placement.check()?;
    let mut plan = placement.realize();
    plan.leave_integers(flow);
    // In module form, what several places use are operations for each place; what is left are steps of a module that
    // itself runs several times, and like its layers they have one set of quantizers.
    if !flow.is_in_module_form() {
        plan.unuse_reused(flow);
    }
    plan.tie_grids(flow, config);
    Ok(plan)
}

/// A plan for modules and functional operations.
#[derive(Debug, Clone)]
pub struct FunctionalPlan {
    /// Of the modules alone.
    pub plan: Plan,
    /// Per operation of `form`: its quantizers.
    pub functions: Vec<ModulePlan>,
    pub form: ModuleForm,
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
    let flow = Flow::in_module_form(graph, &form);
    let rules = Rules::new(config, &flow);
    let mut plan = place_by(&rules, &flow, defaults)?;
    let own = |module: &ModulePlan| !flow.is_functional(module.module);
    let mut functions = plan.modules.split_off(plan.modules.partition_point(own));
    for (op, module) in form.ops.iter().zip(&mut functions) {
        module.inputs.end = module.inputs.end.min(module.inputs.start + op.inputs.len());
        let takes_quantizer = &form.takes_quantizer[op.inputs.clone()];
        for (slot, &may) in plan.slots[module.inputs.clone()]
            .iter_mut()
            .zip(takes_quantizer)
        {
            *slot = slot.filter(|_| may);
        }
        let weight = module.inputs.start + functional::WEIGHT;
        if let (Some(shape), true) = (&op.weight, weight < module.inputs.end) {
            let class = flow.modules[module.module].class;
            let quantizer = weight_quantizer(&rules, class, shape, defaults.param);
            plan.slots[weight] = quantizer.map(|quantizer| {
                plan.quantizers.push(Some(quantizer));
                plan.quantizers.len() - 1
            });
        }
    }
    Ok(FunctionalPlan {
        plan,
        functions,
        form,
    })
}

/// The quantizer of a parameter that a function takes for its weight: what a module of `class` would have.
fn weight_quantizer(
    rules: &Rules,
    class: Symbol,
    shape: &[i64],
    format: Format,
) -> Option<Quantizer> {
    let rules = rules.of_class(class)?;
    let setting = rules.param(ParamName::Weight);
    setting.enabled.then(|| Quantizer {
        symmetric: setting.symmetric,
        format,
        granularity: match rules.per_channel {
            true => per_channel(class, ParamName::Weight, shape),
            false => Granularity::PerTensor,
        },
        constraints: None,
    })
}

/// One encoding per output channel of a parameter.
fn per_channel(class: Symbol, param: ParamName, shape: &[i64]) -> Granularity {
    let transposed = class.starts_with("nn.ConvTranspose") && param == ParamName::Weight;
    let axis = usize::from(transposed);
    match shape.get(axis) {
        Some(&channels) => Granularity::PerChannel {
            rank: shape.len(),
            axis,
            channels,
        },
        None => Granularity::PerTensor,
    }
}

/// Index into [`Placement::candidates`].
type CandidateId = usize;

/// A quantizer that may be made: what the rules have said of it so far.
#[derive(Debug, Clone, Copy)]
struct Candidate<'c> {
    enabled: bool,
    symmetric: bool,
    /// Of the parameter that it is for.
    param: Option<ParamName>,
    format: Format,
    constraints: Option<&'c Constraints>,
}

impl<'c> Candidate<'c> {
    fn apply(&mut self, change: Change<'c>) {
        match change {
            Change::Enabled(on) => self.enabled = on,
            Change::Symmetric(symmetric) => self.symmetric = symmetric,
            Change::Constraints(range) => self.constraints = Some(range),
        }
    }
}

/// The candidates of a module: those of its inputs, outputs and parameters follow each other. A module that gets
/// no quantizers has none; every other has an input and an output.
#[derive(Debug, Clone, Copy)]
struct Slots {
    inputs: u32,
    outputs: u32,
    params: u32,
    end: u32,
}

impl Slots {
    fn inputs(&self) -> Range<CandidateId> {
        self.inputs as usize..self.outputs as usize
    }

    fn outputs(&self) -> Range<CandidateId> {
        self.outputs as usize..self.params as usize
    }

    fn params(&self) -> Range<CandidateId> {
        self.params as usize..self.end as usize
    }

    fn input(&self, position: usize) -> Option<CandidateId> {
        self.inputs().nth(position)
    }

    fn is_empty(&self) -> bool {
        self.inputs == self.end
    }
}

struct Placement<'a, 'c> {
    flow: &'a Flow<'a>,
    rules: &'a Rules<'c>,
    candidates: Vec<Candidate<'c>>,
    /// Per module.
    slots: Vec<Slots>,
}

impl<'a, 'c> Placement<'a, 'c> {
    fn new(flow: &'a Flow<'a>, rules: &'a Rules<'c>, defaults: Defaults) -> Self {
        let mut this = Placement {
            flow,
            rules,
            candidates: Vec::with_capacity(4 * flow.modules.len()),
            slots: Vec::with_capacity(flow.modules.len()),
        };
        for (module, row) in flow.modules.iter().enumerate() {
            let slots = this.add_candidates(row, flow.params(module), defaults);
            this.slots.push(slots);
        }
        this
    }

    /// Adds the candidates of a module. Those of parameters are as the rules want them, since nothing but the
    /// exceptions of the target changes them later.
    fn add_candidates(
        &mut self,
        module: &ModuleRow,
        params: &[Parameter],
        defaults: Defaults,
    ) -> Slots {
        let here = |this: &Self| this.candidates.len() as u32;
        let inputs = here(self);
        let rules = self.rules.of_class(module.class);
        let Some(rules) = rules.filter(|_| module.quantizable) else {
            return Slots {
                inputs,
                outputs: inputs,
                params: inputs,
                end: inputs,
            };
        };
        let candidate = Candidate {
            enabled: false,
            symmetric: false,
            param: None,
            format: defaults.activation,
            constraints: None,
        };
        let mut add = |count| {
            let end = self.candidates.len() + count;
            self.candidates.resize(end, candidate);
            end as u32
        };
        let outputs = add(module.recorded_inputs as usize);
        let first_param = add(module.recorded_outputs as usize);
        self.candidates.extend(params.iter().map(|param| {
            let name = ParamName::of(param.name);
            let setting = rules.param(name);
            Candidate {
                enabled: setting.enabled,
                symmetric: setting.symmetric,
                param: Some(name),
                format: defaults.param,
                constraints: None,
            }
        }));
        Slots {
            inputs,
            outputs,
            params: first_param,
            end: here(self),
        }
    }

    /// What a quantizer is, for error messages.
    fn name(&self, id: CandidateId) -> String {
        for (module, slots) in self.slots.iter().enumerate() {
            let path = || self.flow.path(module);
            let index = |ids: Range<CandidateId>| ids.contains(&id).then(|| id - ids.start);
            if let Some(i) = index(slots.inputs()) {
                return format!("input {i} of {}", path());
            }
            if let Some(i) = index(slots.outputs()) {
                return format!("output {i} of {}", path());
            }
            if let Some(i) = index(slots.params()) {
                return format!("{}.{}", path(), self.flow.params(module)[i].name);
            }
        }
        format!("quantizer {id}")
    }

    fn new_section(&self) -> Section<'c> {
        let nodes = self.flow.graph.nodes.len();
        Section::new(self.candidates.len(), self.slots.len(), nodes)
    }

    /// The module of a node, if it gets quantizers.
    fn quantized_module(&self, node: NodeId) -> Option<ModuleId> {
        let module = self.flow.module(node)?;
        (!self.slots[module].is_empty()).then_some(module)
    }

    fn is_quantized(&self, module: ModuleId) -> bool {
        !self.slots[module].is_empty()
    }

    /// Functional operators that take part in the rules.
    fn elementwise_functions(&self) -> Vec<NodeId> {
        // In module form, what is a function still is one that is left in floating point on purpose; or it is a
        // scripted one, whose result can only be quantized where it is used.
        let mut nodes = self.flow.ops_of_types(if self.flow.is_in_module_form() {
            op_types::is_scripted
        } else {
            op_types::is_elementwise_function
        });
        nodes.retain(|&node| self.flow.module(node).is_none());
        nodes
    }

    fn apply_defaults(&mut self) -> Result<(), ConfigError> {
        let rule = &self.rules.config.ops;
        let mut section = self.new_section();
        for module in 0..self.slots.len() {
            if self.is_quantized(module) {
                self.apply_op_rule(Operator::Module(module), rule, &mut section)?;
            }
        }
        for node in self.elementwise_functions() {
            self.apply_op_rule(Operator::Function(node), rule, &mut section)?;
        }
        Ok(())
    }

    fn apply_op_rules(&mut self) -> Result<(), ConfigError> {
        let rules = self.rules;
        let mut section = self.new_section();
        for (module, row) in self.flow.modules.iter().enumerate() {
            let of_class = rules.of_class(row.class);
            for rule in of_class
                .filter(|_| self.is_quantized(module))
                .map_or(&[][..], |r| &r.op_rules)
            {
                self.apply_op_rule(Operator::Module(module), rule, &mut section)?;
            }
        }
        for node in self.elementwise_functions() {
            if let Some(rule) = rules.of_op_type(&self.flow.op_type(node)) {
                self.apply_op_rule(Operator::Function(node), rule, &mut section)?;
            }
        }
        Ok(())
    }

    fn apply_op_rule(
        &mut self,
        operator: Operator,
        rule: &'c OpRule,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        if rule.is_input_quantized == Some(true) {
            self.set_inputs(operator, Change::Enabled(true), section)?;
        }
        match rule.is_output_quantized {
            Some(true) => self.set_outputs(operator, Change::Enabled(true), section)?,
            Some(false) => self.set_around_operator(operator, Change::Enabled(false), section)?,
            None => {}
        }
        if let Some(symmetric) = rule.is_symmetric {
            let change = Change::Symmetric(symmetric);
            if let Operator::Module(module) = operator {
                self.set(Group::Inputs(module), change, section)?;
            }
            if let Some(node) = operator.node(self.flow) {
                for producer in self.flow.producers(node) {
                    // What feeds a thousand operators would be walked around a thousand times.
                    if !section.note_around(producer, symmetric) {
                        self.set_around(producer, change, section)?;
                    }
                }
            }
            self.set_around_operator(operator, change, section)?;
        }
        if let Some(range) = &rule.constraints {
            self.set_outputs(operator, Change::Constraints(range), section)?;
        }
        Ok(())
    }

    /// Changes the input quantizers of an operator: a functional one has those of its producers' outputs.
    fn set_inputs(
        &mut self,
        operator: Operator,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        match operator {
            Operator::Module(module) => self.set(Group::Inputs(module), change, section),
            Operator::Function(node) => {
                for producer in self.flow.producers(node) {
                    if let Some(module) = self.quantized_module(producer) {
                        self.set(Group::FirstOutput(module), change, section)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Changes the output quantizers of an operator: a functional one has the input quantizers of what it feeds.
    fn set_outputs(
        &mut self,
        operator: Operator,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        match operator {
            Operator::Module(module) => self.set(Group::Outputs(module), change, section),
            Operator::Function(node) => self.set_consumers(node, change, section),
        }
    }

    fn set_around_operator(
        &mut self,
        operator: Operator,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        match (operator.node(self.flow), operator) {
            (Some(node), _) => self.set_around(node, change, section),
            // It did not run.
            (None, _) => self.set_outputs(operator, change, section),
        }
    }

    /// Changes the quantizers on both ends of the edges that leave `node`: its outputs, and its consumers' inputs.
    fn set_around(
        &mut self,
        node: NodeId,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        if let Some(module) = self.quantized_module(node) {
            self.set(Group::Outputs(module), change, section)?;
        }
        self.set_consumers(node, change, section)
    }

    /// Changes the input quantizers of the modules that `node` feeds.
    fn set_consumers(
        &mut self,
        node: NodeId,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        for consumer in self.flow.consumers(node) {
            if let Some(module) = self.quantized_module(consumer) {
                self.set(Group::Inputs(module), change, section)?;
            }
        }
        Ok(())
    }

    fn set(
        &mut self,
        group: Group,
        change: Change<'c>,
        section: &mut Section<'c>,
    ) -> Result<(), ConfigError> {
        if section.note_group(group, change) {
            return Ok(());
        }
        for id in group.of(&self.slots[group.module()]) {
            match section.note(id, change) {
                Some(first) if first != change => {
                    return Err(ConfigError::Conflict {
                        quantizer: self.name(id),
                        first: first.to_string(),
                        second: change.to_string(),
                    });
                }
                Some(_) => {}
                None => self.candidates[id].apply(change),
            }
        }
        Ok(())
    }

    fn apply_supergroups(&mut self) {
        let flow = self.flow;
        let fold = ["Conv", "ConvTranspose", "Gemm"]
            .map(|first| vec![first.to_owned(), "BatchNormalization".to_owned()]);
        let mut folded = flow.chains(&fold, &[], |_| false);
        // A grouped transposed convolution cannot take up a batch norm.
        folded.retain(|chain| {
            let module = flow
                .module(chain[0])
                .and_then(|m| flow.graph.modules.get(m));
            !module.is_some_and(|m| m.class == "nn.ConvTranspose2d" && m.groups != 1)
        });
        let norms: Vec<NodeId> = folded.iter().map(|chain| chain[1]).collect();
        let chains = flow.chains(&self.rules.config.supergroups, &norms, |node| {
            self.has_no_fused_kernel(node)
        });
        for chain in chains {
            let last = chain.len() - 1;
            for (position, &node) in chain.iter().enumerate() {
                let Some(module) = self.quantized_module(node) else {
                    continue;
                };
                if position != 0 {
                    self.disable(self.slots[module].inputs());
                }
                if position != last {
                    self.disable(self.slots[module].outputs());
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
            let norm = self.slots[norm];
            self.disable(norm.inputs());
            self.disable(norm.params());
            // The norm will be folded into the layer, so the pair has one output: the norm's.
            for (layer, norm) in self.slots[layer].outputs().zip(norm.outputs()) {
                self.candidates[norm].enabled = self.candidates[layer].enabled;
                self.candidates[layer].enabled = false;
            }
        }
    }

    fn disable(&mut self, ids: Range<CandidateId>) {
        for candidate in &mut self.candidates[ids] {
            candidate.enabled = false;
        }
    }

    /// Three-dimensional and depthwise convolutions have no kernel with a fused activation.
    fn has_no_fused_kernel(&self, node: NodeId) -> bool {
        let op_type = self.flow.op_type(node);
        if !matches!(op_type.as_str(), "Conv" | "ConvTranspose") {
            return false;
        }
        let modules = &self.flow.graph.modules;
        let Some(module) = self.flow.module(node).and_then(|m| modules.get(m)) else {
            return false;
        };
        let Some(weight) = module.params.iter().find(|p| p.name == "weight") else {
            return false;
        };
        let depthwise = module.groups != 1
            && match op_type.as_str() {
                "Conv" => weight.shape.get(1) == Some(&1),
                _ => weight.shape.first() == Some(&module.groups),
            };
        weight.shape.len() == 5 || depthwise
    }

    /// Switches on the input quantizers of modules whose inputs no quantizer has seen: model inputs,
    /// constants, and what only moved them.
    fn quantize_unquantized_inputs(&mut self) {
        let flow = self.flow;
        // In order of execution, so producers are known before their consumers.
        let mut quantized = vec![true; flow.graph.nodes.len()];
        for &node in &flow.ops {
            let seen = |origin: Origin| match origin {
                Origin::Node(producer, _) => quantized[producer as usize],
                Origin::Parameter => true,
                Origin::Root(_) | Origin::Number => false,
            };
            let arguments = flow.arguments(node);
            let first = arguments.first().map(|argument| argument.origin);
            let first_seen = first.is_some_and(seen);
            quantized[node] = match (self.quantized_module(node), flow.class(node)) {
                (Some(module), _) => {
                    let slots = self.slots[module];
                    // Arithmetic of sizes is no matter for quantizers.
                    let numbers_only = arguments.iter().all(|a| a.origin == Origin::Number);
                    for input in arguments
                        .iter()
                        .filter(|a| !numbers_only && !seen(a.origin))
                    {
                        if let Some(id) = slots.input(input.slot as usize) {
                            self.candidates[id].enabled = true;
                        }
                    }
                    true
                }
                (None, Some(class)) => {
                    let first_is_root = matches!(first, Some(Origin::Root(_) | Origin::Number));
                    class.traits().module_preserves_grid && (first_is_root || first_seen)
                }
                (None, None) => !flow.moves_data(node) || first_seen,
            };
        }
    }

    fn quantize_final_outputs(&mut self) {
        for &node in &self.flow.ops {
            if self.flow.consumers(node).len() == 0 {
                if let Some(module) = self.quantized_module(node) {
                    for candidate in &mut self.candidates[self.slots[module].outputs()] {
                        candidate.enabled = true;
                    }
                }
            }
        }
    }

    /// What particular modules need on particular targets.
    fn apply_exceptions(&mut self) {
        let hw = self.rules.config.hw_version.as_deref();
        let old = matches!(hw, Some("V66" | "V68" | "V69"));
        for (module, row) in self.flow.modules.iter().enumerate() {
            if !self.is_quantized(module) {
                continue;
            }
            let params = self.slots[module].params();
            let is_weight =
                |&id: &CandidateId| self.candidates[id].param == Some(ParamName::Weight);
            match row.class.as_str() {
                "nn.Embedding" if hw.is_some() && !old => {
                    if let Some(weight) = params.clone().find(is_weight) {
                        self.copy_output_format(module, weight);
                    }
                }
                "nn.GroupNorm"
                    if hw.is_some() && !old && params.clone().any(|id| is_weight(&id)) =>
                {
                    params.for_each(|param| self.copy_output_format(module, param));
                }
                "nn.LayerNorm" => {
                    if let Some(weight) = params.clone().find(is_weight) {
                        let candidate = &mut self.candidates[weight];
                        candidate.symmetric = candidate.format.bitwidth >= 16;
                    }
                }
                "custom.MatMul" | "custom.Outer" if hw.is_some() => {
                    if let Some(node) = row.last_call() {
                        self.apply_matmul_exception(module, node, old);
                    }
                }
                _ => {}
            }
        }
    }

    fn copy_output_format(&mut self, module: ModuleId, param: CandidateId) {
        let output = self.candidates[self.slots[module].outputs().start];
        let param = &mut self.candidates[param];
        param.format.bitwidth = output.format.bitwidth;
        param.symmetric = output.symmetric;
    }

    /// The second factor has 8 bits and a symmetric grid on old targets; on others it may have 16 bits if the
    /// grid is symmetric and the first factor has 16 bits too.
    fn apply_matmul_exception(&mut self, module: ModuleId, node: NodeId, old: bool) {
        let first = self.effective_input_quantizer(module, node, 0);
        let Some(second) = self.effective_input_quantizer(module, node, 1) else {
            return;
        };
        let is_float = |id: CandidateId| self.candidates[id].format.dtype == Dtype::Float;
        if first.is_some_and(is_float) && is_float(second) {
            return;
        }
        if old {
            self.candidates[second].symmetric = true;
            self.candidates[second].format.bitwidth = 8;
        } else if let Some(first) = first {
            if self.candidates[second].format.bitwidth == 16 {
                self.candidates[second].symmetric = true;
                self.candidates[first].format.bitwidth = 16;
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
    ) -> Option<CandidateId> {
        let enabled = |id: &CandidateId| self.candidates[*id].enabled;
        let own = self.slots[module].input(slot)?;
        if enabled(&own) {
            return Some(own);
        }
        let mut arguments = self.flow.arguments(node).iter();
        let argument = arguments.find(|argument| argument.slot as usize == slot)?;
        let mut node = argument.origin.producer()?;
        loop {
            let mut producers = self.flow.producers(node);
            let first = producers.next();
            match self.quantized_module(node) {
                Some(module) => {
                    let slots = self.slots[module];
                    let near = [slots.outputs().start, slots.inputs().start];
                    if let Some(id) = near.into_iter().find(enabled) {
                        return Some(id);
                    }
                    if producers.next().is_some() {
                        return None;
                    }
                    node = first?;
                }
                None => node = first?,
            }
        }
    }

    /// Multiplying or dividing by a positive constant only rescales the grid: no quantizer of its own.
    fn drop_constant_rescales(&mut self) {
        let rescales = |op_type: &str| matches!(op_type, "Mul" | "Div");
        for node in self.flow.ops_of_types(rescales) {
            let Some(module) = self.quantized_module(node) else {
                continue;
            };
            let multiply = match self.flow.class(node).map(Symbol::as_str) {
                Some("custom.Multiply") => true,
                Some("custom.Divide") => false,
                _ => continue,
            };
            let [left, right] = self.flow.graph.inputs(node) else {
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
            if source.is_some_and(|id| self.candidates[id].enabled) {
                let slots = self.slots[module];
                if let Some(id) = slots.input(factor.slot) {
                    self.candidates[id].enabled = false;
                }
                self.candidates[slots.outputs().start].enabled = false;
            }
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let config = self.rules.config;
        let symmetric = self.candidates.iter().any(|q| q.enabled && q.symmetric);
        for (on, key) in [
            (config.strict_symmetric, "strict_symmetric"),
            (config.unsigned_symmetric, "unsigned_symmetric"),
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
        let quantizer = |candidate: &Candidate| {
            candidate.enabled.then(|| Quantizer {
                symmetric: candidate.symmetric,
                format: candidate.format,
                granularity: Granularity::PerTensor,
                constraints: candidate.constraints.copied(),
            })
        };
        let mut plan = Plan {
            quantizers: self.candidates.iter().map(quantizer).collect(),
            slots: Vec::with_capacity(self.candidates.len()),
            modules: Vec::with_capacity(self.slots.len()),
            ..Plan::default()
        };
        for (id, (slots, module)) in self.slots.iter().zip(&self.flow.modules).enumerate() {
            let rules = self.rules.of_class(module.class);
            let Some(rules) = rules.filter(|_| !slots.is_empty()) else {
                continue;
            };
            let ran = module.num_calls > 0;
            if rules.per_channel && ran {
                for (param, id) in self.flow.params(id).iter().zip(slots.params()) {
                    if let Some(quantizer) = &mut plan.quantizers[id] {
                        let name = ParamName::of(param.name);
                        quantizer.granularity = per_channel(module.class, name, &param.shape);
                    }
                }
            }
            let (inputs, outputs) = (slots.inputs(), slots.outputs());
            let num_inputs = match (module.dynamic, module.dynamic_inputs) {
                (true, _) => inputs.len(),
                (false, true) => inputs.len().max(module.num_inputs as usize),
                (false, false) => module.num_inputs as usize,
            };
            let num_outputs = match module.dynamic {
                true => outputs.len(),
                false => module.num_outputs as usize,
            };
            let module_plan = ModulePlan {
                module: id,
                inputs: plan.add_slots(inputs, num_inputs),
                outputs: plan.add_slots(outputs, num_outputs),
                params: plan.add_slots(slots.params(), slots.params().len()),
                supported_kernels: match ran {
                    true => rules.kernels.clone(),
                    false => Arc::default(),
                },
            };
            plan.modules.push(module_plan);
        }
        plan
    }
}

/// What an operator rule is applied to.
#[derive(Debug, Clone, Copy)]
enum Operator {
    Module(ModuleId),
    /// A function, which has no quantizers of its own.
    Function(NodeId),
}

impl Operator {
    /// The node whose edges count; none of a module that did not run.
    fn node(self, flow: &Flow) -> Option<NodeId> {
        match self {
            Operator::Module(module) => flow.modules[module].last_call(),
            Operator::Function(node) => Some(node),
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

    struct Placed {
        graph: Graph,
        plan: Plan,
    }

    fn plan(graph: Graph, config: &str) -> Placed {
        let defaults = Defaults {
            activation: int(8),
            param: int(4),
        };
        let plan = place(&graph, &Config::parse(config).unwrap(), defaults).unwrap();
        Placed { graph, plan }
    }

    impl Placed {
        fn module(&self, path: &str) -> &ModulePlan {
            let id = self.graph.module(path);
            self.plan
                .modules
                .iter()
                .find(|m| Some(m.module) == id)
                .unwrap()
        }

        fn inputs(&self, path: &str) -> &[Option<QuantizerId>] {
            &self.plan.slots[self.module(path).inputs.clone()]
        }

        fn outputs(&self, path: &str) -> &[Option<QuantizerId>] {
            &self.plan.slots[self.module(path).outputs.clone()]
        }

        fn params(&self, path: &str) -> &[Option<QuantizerId>] {
            &self.plan.slots[self.module(path).params.clone()]
        }

        fn quantizer(&self, slot: Option<QuantizerId>) -> &Quantizer {
            self.plan.quantizers[slot.unwrap()].as_ref().unwrap()
        }
    }

    /// "io w-" style: inputs, outputs, parameters; a dash where there is no quantizer.
    fn show(placed: &Placed, path: &str) -> String {
        let mark = |on: bool, c: char| if on { c } else { '-' };
        let inputs = placed.inputs(path).iter().map(|q| mark(q.is_some(), 'i'));
        let outputs = placed.outputs(path).iter().map(|q| mark(q.is_some(), 'o'));
        let params = &placed.graph.modules[placed.module(path).module].params;
        let params = params
            .iter()
            .zip(placed.params(path))
            .map(|(p, q)| mark(q.is_some(), p.name.chars().next().unwrap()));
        inputs.chain(outputs).chain(params).collect()
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
        let plan = plan(residual(), DEFAULT);
        assert_eq!(show(&plan, "conv1"), "i-w-");
        assert_eq!(show(&plan, "bn1"), "----");
        assert_eq!(show(&plan, "relu1"), "-o");
        assert_eq!(show(&plan, "conv2"), "--w-"); // depthwise, its norm carries the output
        assert_eq!(show(&plan, "bn2"), "-o--");
        assert_eq!(show(&plan, "relu2"), "-o"); // Add + Relu: the input goes
        assert_eq!(show(&plan, "pool"), "--");
        assert_eq!(show(&plan, "fc"), "-ow-");
        let weight = plan.quantizer(plan.params("conv2")[0]);
        assert_eq!(
            (weight.granularity.shape(), weight.symmetric, weight.format),
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
        let plan = plan(net.finish(f), DEFAULT);
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
        let plan = plan(net.finish(d), DEFAULT);
        let shared = plan.outputs("cat")[0];
        assert!(shared.is_some());
        assert_eq!(plan.outputs("a")[0], shared);
        assert_eq!(plan.outputs("relu")[0], shared);
        assert_eq!(plan.outputs("b")[0], shared);
        assert_eq!(plan.inputs("cat"), [None, None, shared]);
    }

    #[test]
    fn reused_module_without_parameters_gets_none() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(module("relu", "nn.ReLU"), &[x]);
        let b = net.add(conv("conv", 1), &[a]);
        let c = net.call("relu", &[b]);
        let d = net.call("conv", &[c]);
        let plan = plan(net.finish(d), DEFAULT);
        assert_eq!(show(&plan, "relu"), "--");
        assert_eq!(plan.plan.reused, [plan.graph.module("relu").unwrap()]);
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
        let results = ["int64", "float32"].map(|dtype| (vec![2, 4], dtype.into()));
        let (_, values) = builder
            .call_module("odd", vec![arg(0, index), arg(1, x)], results.to_vec())
            .unwrap();
        builder.output(values.start + 1, 0).unwrap();
        let plan = plan(builder.finish(), DEFAULT);
        let has = |slots: &[Option<QuantizerId>]| -> Vec<bool> {
            slots.iter().map(Option::is_some).collect()
        };
        assert_eq!(has(plan.inputs("odd")), [false, true]);
        assert_eq!(has(plan.outputs("odd")), [false, true]);
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
        let plan = plan(net.finish(b), config);
        assert_eq!(show(&plan, "soft"), "-o");
        assert_eq!(show(&plan, "flat"), "-o");
        let output = plan.quantizer(plan.outputs("soft")[0]);
        assert_eq!(output.constraints, Some((0.0, Some(1.0))));
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
        let plan = plan(net.finish(x), DEFAULT);
        assert_eq!(plan.plan.modules.len(), 7500);
        assert_eq!(show(&plan, "r2499"), "-o");
    }
}
