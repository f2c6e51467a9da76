//! The outcome of placement, and what is done to it once the rules have been applied.

use std::ops::Range;
use std::sync::Arc;

use super::{CandidateId, Constraints};
use crate::graph::config::{Config, Format, Kernel};
use crate::graph::functional::is_float;
use crate::graph::pattern::{Flow, Origin};
use crate::graph::symbol::Symbol;
use crate::graph::{ModuleId, NodeId, TensorId};

/// What shares an encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    PerTensor,
    PerChannel {
        rank: usize,
        axis: usize,
        channels: i64,
    },
}

impl Granularity {
    /// Shape of the encodings; empty for one per tensor.
    pub fn shape(self) -> Vec<i64> {
        match self {
            Granularity::PerTensor => Vec::new(),
            Granularity::PerChannel {
                rank,
                axis,
                channels,
            } => (0..rank)
                .map(|i| if i == axis { channels } else { 1 })
                .collect(),
        }
    }
}

/// One quantizer to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantizer {
    pub symmetric: bool,
    pub format: Format,
    pub granularity: Granularity,
    /// Fixed minimum and maximum of the range.
    pub constraints: Option<Constraints>,
}

/// Index into [`Plan::quantizers`].
pub type QuantizerId = usize;

/// The quantizers of one module, as ranges of [`Plan::slots`].
#[derive(Debug, Clone)]
pub struct ModulePlan {
    pub module: ModuleId,
    pub inputs: Range<usize>,
    pub outputs: Range<usize>,
    /// In the order of the module's parameters.
    pub params: Range<usize>,
    pub supported_kernels: Arc<[Kernel]>,
}

/// What to put where.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// `None`: a number that no slot has.
    pub quantizers: Vec<Option<Quantizer>>,
    /// The places for quantizers of all modules; `None` where there is none.
    pub slots: Vec<Option<QuantizerId>>,
    pub modules: Vec<ModulePlan>,
    /// Modules without parameters that run several times: they get no quantizers, since one range for
    /// different tensors does harm.
    pub reused: Vec<ModuleId>,
}

impl Plan {
    pub(super) fn enabled(&self, id: QuantizerId) -> Option<QuantizerId> {
        self.quantizers[id].is_some().then_some(id)
    }

    /// Adds slots for the quantizers of `ids`, cut to `count`; a twin's further slots get quantizers like the last
    /// one's.
    pub(super) fn add_slots(&mut self, ids: Range<CandidateId>, count: usize) -> Range<usize> {
        let first = self.slots.len();
        for position in 0..count {
            let id = ids.start + position;
            let slot = if id < ids.end {
                self.enabled(id)
            } else {
                let last = ids.clone().last().and_then(|last| self.enabled(last));
                last.map(|last| {
                    self.quantizers.push(self.quantizers[last]);
                    self.quantizers.len() - 1
                })
            };
            self.slots.push(slot);
        }
        first..self.slots.len()
    }

    fn constraints(&self, id: QuantizerId) -> Option<Constraints> {
        self.quantizers[id].as_ref()?.constraints
    }

    /// Both ends of the range are given.
    fn is_fixed(&self, id: QuantizerId) -> bool {
        matches!(self.constraints(id), Some((_, Some(_))))
    }

    /// Some end of the range is given, so the range does not fit other consumers of the same tensor.
    fn is_constrained(&self, id: QuantizerId) -> bool {
        self.constraints(id).is_some()
    }

    /// Per module of `flow`: the position of its plan, if it gets quantizers.
    fn plan_of(&self, flow: &Flow) -> Vec<Option<usize>> {
        let mut plan_of = vec![None; flow.modules.len()];
        for (position, module) in self.modules.iter().enumerate() {
            plan_of[module.module] = Some(position);
        }
        plan_of
    }

    /// Empties the slots of modules made on the fly where no floating-point tensor ever came: a quantizer there would
    /// wait for data for good.
    pub(super) fn leave_integers(&mut self, flow: &Flow) {
        let made_on_the_fly = |module: ModuleId| {
            let module = &flow.modules[module];
            module.dynamic && module.num_calls > 0
        };
        if !(0..flow.modules.len()).any(made_on_the_fly) {
            return;
        }
        let plan_of = self.plan_of(flow);
        let graph = flow.graph;
        let is_float = |tensor: TensorId| is_float(&graph.tensors[tensor].dtype);
        let mut meets_floats = vec![false; self.slots.len()];
        for node in 0..graph.nodes.len() {
            let module = flow.module(node).filter(|&module| made_on_the_fly(module));
            let Some(position) = module.and_then(|module| plan_of[module]) else {
                continue;
            };
            let ModulePlan {
                inputs, outputs, ..
            } = &self.modules[position];
            let given = graph.inputs(node).iter();
            for input in given.filter(|input| input.tensor.is_some_and(is_float)) {
                if let Some(slot) = inputs.clone().nth(input.slot) {
                    meets_floats[slot] = true;
                }
            }
            for (slot, tensor) in outputs.clone().zip(graph.nodes[node].outputs.clone()) {
                meets_floats[slot] |= is_float(tensor);
            }
        }
        for module in self.modules.iter().filter(|m| made_on_the_fly(m.module)) {
            for slot in module.inputs.clone().chain(module.outputs.clone()) {
                if !meets_floats[slot] {
                    self.slots[slot] = None;
                }
            }
        }
    }

    /// Modules without parameters that run more than once lose their quantizers, unless the range is fixed.
    pub(super) fn unuse_reused(&mut self, flow: &Flow) {
        for index in 0..self.modules.len() {
            let ModulePlan {
                module,
                ref inputs,
                ref outputs,
                ..
            } = self.modules[index];
            if flow.modules[module].num_calls < 2 || !flow.params(module).is_empty() {
                continue;
            }
            let mut reused = false;
            for slot in inputs.clone().chain(outputs.clone()) {
                if self.slots[slot].is_some_and(|id| !self.is_fixed(id)) {
                    self.slots[slot] = None;
                    reused = true;
                }
            }
            if reused {
                self.reused.push(module);
            }
        }
    }

    /// Lets the producers of certain operators' inputs use the operator's output quantizer: all inputs of a Concat
    /// must be on one grid, and what a Relu cuts off needs no room in the grid before it.
    pub(super) fn tie_grids(&mut self, flow: &Flow, config: &Config) {
        let plan_of = self.plan_of(flow);
        let planned = |node: NodeId| -> Option<usize> { plan_of[flow.module(node)?] };
        let relu = Symbol::new("nn.ReLU");
        let wants_tie = |class: Symbol| {
            let traits = class.traits();
            class == relu
                || traits.module_joins_grids
                || (config.hw_version.is_some() && traits.module_interpolates)
        };
        // Per argument: the last operator whose walk came by.
        let mut seen: Vec<Option<u32>> = vec![None; flow.num_arguments()];
        let mut todo = Vec::new();
        for &op in flow.ops.iter().rev() {
            if !flow.class(op).is_some_and(wants_tie) {
                continue;
            }
            let Some(module) = planned(op) else { continue };
            let [Some(quantizer)] = self.slots[self.modules[module].outputs.clone()] else {
                continue;
            };
            todo.extend(flow.argument_range(op).map(|argument| (op, argument)));
            while let Some((consumer, argument)) = todo.pop() {
                if seen[argument].replace(op as u32) == Some(op as u32) {
                    continue;
                }
                let input = flow.argument(argument);
                match input.origin {
                    Origin::Parameter | Origin::Number | Origin::Root(None) => {}
                    Origin::Root(Some(tensor)) => {
                        let consumers = &flow.graph.tensors[tensor as usize].consumers;
                        if consumers.len() > 1 && self.is_constrained(quantizer) {
                            continue;
                        }
                        if let Some(module) = planned(consumer) {
                            let inputs = self.modules[module].inputs.clone();
                            if let Some(slot) = self.slots[inputs].get_mut(input.slot as usize) {
                                *slot = Some(quantizer);
                            }
                        }
                    }
                    Origin::Node(producer, output) => {
                        let producer = producer as NodeId;
                        if flow.consumers(producer).len() > 1 && self.is_constrained(quantizer) {
                            continue;
                        }
                        let class = flow.class(producer);
                        let target = planned(producer);
                        if let Some(module) = target {
                            // A Split has one quantizer for all its outputs.
                            let split = class.is_some_and(|class| class == "custom.Split");
                            let output = if split { 0 } else { output as usize };
                            let outputs = self.modules[module].outputs.clone();
                            if let Some(slot @ Some(_)) = self.slots[outputs].get_mut(output) {
                                *slot = Some(quantizer);
                            }
                        }
                        let traits = class.map(Symbol::traits);
                        let moves = target.is_none()
                            && (flow.moves_data(producer)
                                || traits.is_some_and(|t| t.module_preserves_grid));
                        if moves || traits.is_some_and(|t| t.module_is_transparent) {
                            let further = flow.argument_range(producer);
                            todo.extend(further.map(|argument| (producer, argument)));
                        }
                    }
                }
            }
        }
    }
}
