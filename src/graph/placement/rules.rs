//! What a configuration says of the modules of one class, looked up once for all of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::graph::config::{Config, Kernel, OpRule};
use crate::graph::op_types;
use crate::graph::pattern::Flow;
use crate::graph::symbol::{Symbol, SymbolMap};

/// As far as rules tell parameters apart: only weights and biases can have rules of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamName {
    Weight,
    Bias,
    Other,
}

impl ParamName {
    pub fn of(name: Symbol) -> Self {
        match name.as_str() {
            "weight" => ParamName::Weight,
            "bias" | "sp_conv_3d.bias" => ParamName::Bias,
            _ => ParamName::Other,
        }
    }

    /// The name that rules have.
    fn key(self) -> Option<&'static str> {
        match self {
            ParamName::Weight => Some("weight"),
            ParamName::Bias => Some("bias"),
            ParamName::Other => None,
        }
    }
}

/// What the rules make of the quantizer of a parameter.
#[derive(Debug, Clone, Copy)]
pub struct ParamSetting {
    pub enabled: bool,
    pub symmetric: bool,
}

/// The rules for the modules of one class.
#[derive(Debug)]
pub struct ClassRules<'c> {
    /// Rules for its operator types, in the order in which they apply.
    pub op_rules: Vec<&'c OpRule>,
    /// Whether a parameter has one encoding per output channel.
    pub per_channel: bool,
    pub kernels: Arc<[Kernel]>,
    weight: ParamSetting,
    bias: ParamSetting,
    other_param: ParamSetting,
}

impl ClassRules<'_> {
    pub fn param(&self, name: ParamName) -> ParamSetting {
        match name {
            ParamName::Weight => self.weight,
            ParamName::Bias => self.bias,
            ParamName::Other => self.other_param,
        }
    }
}

/// The rule for operators whose output has the grid of the input.
static NO_OUTPUT: OpRule = OpRule {
    is_output_quantized: Some(false),
    is_input_quantized: None,
    is_symmetric: None,
    params: BTreeMap::new(),
    supported_kernels: None,
    per_channel: None,
    constraints: None,
};

/// The rules of a configuration, as they hold for a set of module classes.
#[derive(Debug)]
pub struct Rules<'c> {
    pub config: &'c Config,
    by_op_type: HashMap<&'c str, &'c OpRule>,
    of_class: SymbolMap<ClassRules<'c>>,
}

impl<'c> Rules<'c> {
    /// The rules for the modules of `flow`.
    pub fn new(config: &'c Config, flow: &Flow) -> Self {
        let mut rules = Rules {
            config,
            by_op_type: HashMap::new(),
            of_class: SymbolMap::default(),
        };
        // Each class once, in the order of its last module.
        let mut seen: SymbolMap<()> = SymbolMap::default();
        let mut distinct = Vec::new();
        for class in flow.modules.iter().rev().map(|module| module.class) {
            if seen.get(class).is_none() {
                seen.get_or_insert_with(class, || ());
                distinct.push(class);
            }
        }
        distinct.reverse();
        rules.by_op_type = by_op_type(config, &distinct);
        for class in distinct {
            let of_class = rules.compile(class);
            rules.of_class.get_or_insert_with(class, || of_class);
        }
        rules
    }

    /// The rule for operators of a type.
    pub fn of_op_type(&self, op_type: &str) -> Option<&'c OpRule> {
        self.by_op_type.get(op_type).copied()
    }

    /// The rules for the class of a module.
    pub fn of_class(&self, class: Symbol) -> Option<&ClassRules<'c>> {
        self.of_class.get(class)
    }

    fn compile(&self, class: Symbol) -> ClassRules<'c> {
        let config = self.config;
        let traits = class.traits();
        let for_target = traits
            .target_type
            .and_then(|target| self.of_op_type(target));
        let op_rules: Vec<&OpRule> = match for_target {
            Some(rule) => vec![rule],
            None => {
                let rule = |onnx: &&str| match self.of_op_type(onnx) {
                    None if op_types::is_grid_preserving(onnx) => Some(&NO_OUTPUT),
                    rule => rule,
                };
                traits.onnx_types.iter().filter_map(rule).collect()
            }
        };
        let per_channel: Vec<bool> = traits
            .onnx_types
            .iter()
            .filter_map(|onnx| config.op_rules.get(*onnx)?.per_channel)
            .collect();
        let kernels = |name: &str| config.op_rules.get(name)?.supported_kernels.as_deref();
        let param = |name: ParamName| {
            let mut rule = config.params;
            if let Some(name) = name.key() {
                let named = config.param_rules.get(name).into_iter();
                for special in named.chain(op_rules.iter().filter_map(|r| r.params.get(name))) {
                    rule.is_quantized = special.is_quantized.or(rule.is_quantized);
                    rule.is_symmetric = special.is_symmetric.or(rule.is_symmetric);
                }
            }
            ParamSetting {
                enabled: rule.is_quantized.unwrap_or(false),
                symmetric: rule.is_symmetric.unwrap_or(false),
            }
        };
        ClassRules {
            per_channel: match per_channel.is_empty() {
                true => config.per_channel,
                false => per_channel.contains(&true),
            },
            kernels: traits
                .target_type
                .and_then(kernels)
                .or_else(|| kernels(&class.module_op_type()))
                .or(config.supported_kernels.as_deref())
                .map_or_else(Arc::default, Arc::from),
            weight: param(ParamName::Weight),
            bias: param(ParamName::Bias),
            other_param: param(ParamName::Other),
            op_rules,
        }
    }
}

/// The operator rules by name. For a target's name, what the rule for the ONNX name says, if there is one.
fn by_op_type<'c>(config: &'c Config, classes: &[Symbol]) -> HashMap<&'c str, &'c OpRule> {
    let named = config.op_rules.iter();
    let mut rules: HashMap<&str, &OpRule> =
        named.map(|(name, rule)| (name.as_str(), rule)).collect();
    for class in classes {
        let traits = class.traits();
        let target = traits
            .target_type
            .and_then(|target| config.op_rules.get_key_value(target));
        let Some((target, _)) = target else { continue };
        for onnx in traits.onnx_types.iter().filter(|onnx| *onnx != target) {
            if let Some(rule) = config.op_rules.get(*onnx) {
                rules.insert(target, rule);
            }
        }
    }
    rules
}
