//! The quantsim configuration: which quantizers a target has.
//!
//! A JSON object with the sections `defaults`, `params`, `op_type`, `supergroups`, `model_input` and
//! `model_output`. Switches are the strings `"True"` and `"False"`, unknown keys are errors, and every error
//! names its place as a JSON path.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::error::ConfigError;

type Result<T> = std::result::Result<T, ConfigError>;

/// Number type of a quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    Int,
    Float,
}

/// A number format: type and bit-width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    pub dtype: Dtype,
    pub bitwidth: u32,
}

/// A pair of formats that a target has a kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub activation: Format,
    pub param: Option<Format>,
}

/// Rules for a parameter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParamRule {
    pub is_quantized: Option<bool>,
    pub is_symmetric: Option<bool>,
}

/// Rules for the operators of one type, or for all (`defaults.ops`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OpRule {
    pub is_input_quantized: Option<bool>,
    pub is_output_quantized: Option<bool>,
    pub is_symmetric: Option<bool>,
    pub params: BTreeMap<String, ParamRule>,
    pub supported_kernels: Option<Vec<Kernel>>,
    pub per_channel: Option<bool>,
    /// Fixed minimum and, optionally, maximum of the output.
    pub constraints: Option<(f64, Option<f64>)>,
}

/// A parsed and checked configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    pub ops: OpRule,
    pub params: ParamRule,
    pub strict_symmetric: bool,
    pub unsigned_symmetric: bool,
    pub per_channel: bool,
    pub hw_version: Option<String>,
    pub supported_kernels: Option<Vec<Kernel>>,
    pub param_rules: BTreeMap<String, ParamRule>,
    pub op_rules: BTreeMap<String, OpRule>,
    pub supergroups: Vec<Vec<String>>,
    pub supergroup_passes: Vec<String>,
    pub quantize_model_input: bool,
    pub quantize_model_output: bool,
}

/// A JSON value together with its place in the file.
#[derive(Clone)]
struct Place<'v> {
    value: &'v Value,
    path: String,
}

impl<'v> Place<'v> {
    fn fail<T>(&self, expected: &str) -> Result<T> {
        let mut got = self.value.to_string();
        if got.chars().count() > 60 {
            got = got.chars().take(57).chain("...".chars()).collect();
        }
        Err(ConfigError::Schema {
            path: self.path.clone(),
            expected: expected.to_owned(),
            got,
        })
    }

    fn unsupported<T>(&self, reason: &str) -> Result<T> {
        Err(ConfigError::Unsupported {
            path: self.path.clone(),
            reason: reason.to_owned(),
        })
    }

    fn object(&self) -> Result<&'v Map<String, Value>> {
        match self.value {
            Value::Object(map) => Ok(map),
            _ => self.fail("an object"),
        }
    }

    /// The object's entries, after checking that each key is one of `allowed` and each of `required` is there.
    fn entries(&self, allowed: &[&str], required: &[&str]) -> Result<&'v Map<String, Value>> {
        let map = self.object()?;
        for key in map.keys() {
            if !allowed.contains(&key.as_str()) {
                let expected = format!("one of the keys {}", allowed.join(", "));
                return Err(ConfigError::Schema {
                    path: self.at(key),
                    expected,
                    got: "an unknown key".into(),
                });
            }
        }
        for key in required {
            if !map.contains_key(*key) {
                let expected = "this required key".to_owned();
                return Err(ConfigError::Schema {
                    path: self.at(key),
                    expected,
                    got: "nothing".into(),
                });
            }
        }
        Ok(map)
    }

    fn at(&self, key: &str) -> String {
        let plain = key.chars().all(|c| c.is_alphanumeric() || c == '_');
        if plain {
            format!("{}.{key}", self.path)
        } else {
            format!("{}[{key:?}]", self.path)
        }
    }

    fn get(&self, key: &str) -> Option<Place<'v>> {
        let value = self.value.get(key)?;
        Some(Place {
            value,
            path: self.at(key),
        })
    }

    fn children(&self) -> Result<Vec<(&'v str, Place<'v>)>> {
        let map = self.object()?;
        Ok(map
            .iter()
            .map(|(k, value)| {
                (
                    k.as_str(),
                    Place {
                        value,
                        path: self.at(k),
                    },
                )
            })
            .collect())
    }

    fn items(&self, expected: &str) -> Result<Vec<Place<'v>>> {
        let Value::Array(items) = self.value else {
            return self.fail(expected);
        };
        let place = |(i, value)| Place {
            value,
            path: format!("{}[{i}]", self.path),
        };
        Ok(items.iter().enumerate().map(place).collect())
    }

    fn string(&self) -> Result<&'v str> {
        match self.value {
            Value::String(text) => Ok(text),
            _ => self.fail("a string"),
        }
    }

    fn switch(&self) -> Result<bool> {
        match self.value.as_str() {
            Some("True") => Ok(true),
            Some("False") => Ok(false),
            _ => self.fail("the string \"True\" or \"False\""),
        }
    }

    fn number(&self) -> Result<f64> {
        match self.value.as_f64() {
            Some(number) if number.is_finite() => Ok(number),
            _ => self.fail("a finite number"),
        }
    }

    fn switch_at(&self, key: &str) -> Result<Option<bool>> {
        self.get(key).map(|place| place.switch()).transpose()
    }
}

fn format(place: &Place) -> Result<Format> {
    place.entries(&["bitwidth", "dtype"], &["bitwidth", "dtype"])?;
    let (Some(bits), Some(dtype)) = (place.get("bitwidth"), place.get("dtype")) else {
        return place.fail("an object with bitwidth and dtype");
    };
    let bitwidth = match bits.value.as_u64() {
        Some(bitwidth @ (4 | 8 | 16 | 32)) => bitwidth as u32,
        _ => return bits.fail("4, 8, 16 or 32"),
    };
    let dtype = match dtype.value.as_str() {
        Some("int") => Dtype::Int,
        Some("float") => Dtype::Float,
        _ => return dtype.fail("\"int\" or \"float\""),
    };
    if dtype == Dtype::Float && !matches!(bitwidth, 16 | 32) {
        return place.unsupported("a float kernel has 16 or 32 bits");
    }
    Ok(Format { dtype, bitwidth })
}

fn kernels(place: &Place, param_required: bool) -> Result<Vec<Kernel>> {
    let items = place.items("a list of kernels")?;
    if items.is_empty() {
        return place.fail("at least one kernel");
    }
    let required: &[&str] = if param_required {
        &["activation", "param"]
    } else {
        &["activation"]
    };
    items
        .iter()
        .map(|item| {
            item.entries(&["activation", "param"], required)?;
            let Some(activation) = item.get("activation") else {
                return item.fail("an activation format");
            };
            Ok(Kernel {
                activation: format(&activation)?,
                param: item.get("param").as_ref().map(format).transpose()?,
            })
        })
        .collect()
}

fn param_rule(place: &Place) -> Result<ParamRule> {
    place.entries(&["is_quantized", "is_symmetric"], &[])?;
    Ok(ParamRule {
        is_quantized: place.switch_at("is_quantized")?,
        is_symmetric: place.switch_at("is_symmetric")?,
    })
}

fn param_rules(place: &Place) -> Result<BTreeMap<String, ParamRule>> {
    place
        .children()?
        .into_iter()
        .map(|(name, rule)| Ok((name.to_owned(), param_rule(&rule)?)))
        .collect()
}

fn op_rule(place: &Place) -> Result<OpRule> {
    const KEYS: &[&str] = &[
        "is_input_quantized",
        "is_output_quantized",
        "is_symmetric",
        "params",
        "supported_kernels",
        "per_channel_quantization",
        "encoding_constraints",
    ];
    place.entries(KEYS, &[])?;
    let is_input_quantized = place.switch_at("is_input_quantized")?;
    if let (Some(false), Some(place)) = (is_input_quantized, place.get("is_input_quantized")) {
        return place.unsupported("an operator's inputs cannot be switched off; leave the key out");
    }
    let constraints = match place.get("encoding_constraints") {
        Some(place) => {
            place.entries(&["min", "max"], &["min"])?;
            let min = place.get("min").map_or(Ok(0.0), |min| min.number())?;
            let max = place.get("max").map(|max| max.number()).transpose()?;
            if max.is_some_and(|max| max <= min) {
                return place.fail("min below max");
            }
            Some((min, max))
        }
        None => None,
    };
    Ok(OpRule {
        is_input_quantized,
        is_output_quantized: place.switch_at("is_output_quantized")?,
        is_symmetric: place.switch_at("is_symmetric")?,
        params: place
            .get("params")
            .as_ref()
            .map(param_rules)
            .transpose()?
            .unwrap_or_default(),
        supported_kernels: place
            .get("supported_kernels")
            .map(|p| kernels(&p, false))
            .transpose()?,
        per_channel: place.switch_at("per_channel_quantization")?,
        constraints,
    })
}

impl Config {
    /// Parses and checks the text of a configuration file.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
        let root = Place {
            value: &value,
            path: "$".to_owned(),
        };
        const REQUIRED: &[&str] = &[
            "defaults",
            "params",
            "op_type",
            "supergroups",
            "model_input",
            "model_output",
        ];
        let allowed: Vec<&str> = REQUIRED
            .iter()
            .copied()
            .chain(["supergroup_pass_list"])
            .collect();
        root.entries(&allowed, REQUIRED)?;
        let section = |key: &str| Place {
            value: &root.value[key],
            path: root.at(key),
        };

        let mut config = Config::default();
        config.read_defaults(&section("defaults"))?;
        config.param_rules = param_rules(&section("params"))?;
        for (op_type, rule) in section("op_type").children()? {
            config.op_rules.insert(op_type.to_owned(), op_rule(&rule)?);
        }
        for group in section("supergroups").items("a list of supergroups")? {
            config.supergroups.push(supergroup(&group)?);
        }
        if let Some(passes) = root.get("supergroup_pass_list") {
            for pass in passes.items("a list of strings")? {
                config.supergroup_passes.push(pass.string()?.to_owned());
            }
        }
        config.quantize_model_input = only_true(&section("model_input"), "is_input_quantized")?;
        config.quantize_model_output = only_true(&section("model_output"), "is_output_quantized")?;
        Ok(config)
    }

    fn read_defaults(&mut self, place: &Place) -> Result<()> {
        const KEYS: &[&str] = &[
            "ops",
            "params",
            "strict_symmetric",
            "unsigned_symmetric",
            "per_channel_quantization",
            "hw_version",
            "supported_kernels",
        ];
        place.entries(KEYS, &["ops", "params"])?;
        if let Some(ops) = place.get("ops") {
            ops.entries(
                &["is_input_quantized", "is_output_quantized", "is_symmetric"],
                &[],
            )?;
            if let Some(input) = ops.get("is_input_quantized") {
                input.switch()?;
                return input
                    .unsupported("inputs are quantized by their producers; leave the key out");
            }
            self.ops.is_output_quantized = ops.switch_at("is_output_quantized")?;
            if let (Some(false), Some(place)) =
                (self.ops.is_output_quantized, ops.get("is_output_quantized"))
            {
                return place.unsupported(
                    "outputs cannot be switched off for all operators; leave the key out",
                );
            }
            self.ops.is_symmetric = ops.switch_at("is_symmetric")?;
        }
        if let Some(params) = place.get("params") {
            self.params = param_rule(&params)?;
        }
        self.strict_symmetric = place.switch_at("strict_symmetric")?.unwrap_or(false);
        self.unsigned_symmetric = place.switch_at("unsigned_symmetric")?.unwrap_or(false);
        self.per_channel = place
            .switch_at("per_channel_quantization")?
            .unwrap_or(false);
        self.hw_version = place
            .get("hw_version")
            .map(|p| p.string().map(str::to_owned))
            .transpose()?;
        self.supported_kernels = place
            .get("supported_kernels")
            .map(|p| kernels(&p, true))
            .transpose()?;
        Ok(())
    }
}

fn supergroup(place: &Place) -> Result<Vec<String>> {
    place.entries(&["op_list"], &["op_list"])?;
    let Some(list) = place.get("op_list") else {
        return place.fail("an object with op_list");
    };
    let items = list.items("a list of operator types")?;
    if items.len() < 2 {
        return list.fail("at least two operator types");
    }
    items
        .iter()
        .map(|item| {
            let name = item.string()?;
            if !super::op_types::is_known_onnx_type(name) {
                return item.fail("an operator type that a module can have");
            }
            Ok(name.to_owned())
        })
        .collect()
}

fn only_true(place: &Place, key: &str) -> Result<bool> {
    place.entries(&[key], &[])?;
    match place.get(key) {
        None => Ok(false),
        Some(at) if at.switch()? => Ok(true),
        Some(at) => at.unsupported("can only be switched on; leave the key out"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"defaults": {"ops": {"is_output_quantized": "True"}, "params": {}},
        "params": {}, "op_type": {}, "supergroups": [], "model_input": {}, "model_output": {}}"#;

    fn with(path: &[&str], value: &str) -> Result<Config> {
        let mut json: Value = serde_json::from_str(MINIMAL).unwrap();
        let mut at = &mut json;
        for key in path {
            at = at
                .as_object_mut()
                .unwrap()
                .entry(key.to_string())
                .or_insert(Value::Object(Map::new()));
        }
        *at = serde_json::from_str(value).unwrap();
        Config::parse(&json.to_string())
    }

    fn schema_path(result: Result<Config>) -> String {
        match result {
            Err(ConfigError::Schema { path, .. }) => path,
            other => panic!("expected a schema error, got {other:?}"),
        }
    }

    #[test]
    fn all_sections() {
        let config = Config::parse(
            r#"{"defaults": {"ops": {"is_output_quantized": "True", "is_symmetric": "False"},
                 "params": {"is_quantized": "True"}, "strict_symmetric": "False",
                 "per_channel_quantization": "True", "hw_version": "V73",
                 "supported_kernels": [{"activation": {"bitwidth": 8, "dtype": "int"},
                                        "param": {"bitwidth": 16, "dtype": "float"}}]},
                "params": {"bias": {"is_quantized": "False"}},
                "op_type": {"Softmax": {"encoding_constraints": {"min": 0, "max": 1.0}},
                            "Conv": {"per_channel_quantization": "False", "params": {"weight": {}}}},
                "supergroups": [{"op_list": ["Conv", "Relu"]}], "supergroup_pass_list": ["MatmulAdd"],
                "model_input": {"is_input_quantized": "True"}, "model_output": {}}"#,
        )
        .unwrap();
        assert_eq!(config.ops.is_symmetric, Some(false));
        assert_eq!(
            config.op_rules["Softmax"].constraints,
            Some((0.0, Some(1.0)))
        );
        assert_eq!(config.op_rules["Conv"].per_channel, Some(false));
        assert_eq!(config.param_rules["bias"].is_quantized, Some(false));
        assert_eq!(
            config.supergroups,
            vec![vec!["Conv".to_owned(), "Relu".to_owned()]]
        );
        assert!(config.quantize_model_input && !config.quantize_model_output && config.per_channel);
        assert_eq!(config.hw_version.as_deref(), Some("V73"));
        let float16 = Format {
            dtype: Dtype::Float,
            bitwidth: 16,
        };
        assert_eq!(config.supported_kernels.unwrap()[0].param, Some(float16));
    }

    #[test]
    fn errors_name_the_place() {
        assert_eq!(
            schema_path(with(&["params", "bias", "is_quantized"], "false")),
            "$.params.bias.is_quantized"
        );
        assert_eq!(
            schema_path(with(&["op_type", "Conv", "colour"], "1")),
            "$.op_type.Conv.colour"
        );
        assert_eq!(
            schema_path(with(&["supergroups"], r#"[{"op_list": ["Conv"]}]"#)),
            "$.supergroups[0].op_list"
        );
        assert_eq!(
            schema_path(with(&["supergroups"], r#"[{"op_list": ["Conv", "Nope"]}]"#)),
            "$.supergroups[0].op_list[1]"
        );
        assert_eq!(schema_path(with(&["extra"], "{}")), "$.extra");
        assert_eq!(
            schema_path(with(&["defaults"], r#"{"ops": {}}"#)),
            "$.defaults.params"
        );
        assert_eq!(
            schema_path(with(
                &["defaults", "supported_kernels"],
                r#"[{"activation": {"bitwidth": 8, "dtype": "int"}}]"#
            )),
            "$.defaults.supported_kernels[0].param"
        );
        assert_eq!(
            schema_path(with(
                &["op_type", "Relu", "encoding_constraints"],
                r#"{"min": 1, "max": 0}"#
            )),
            "$.op_type.Relu.encoding_constraints"
        );
        assert_eq!(schema_path(Config::parse("[]")), "$");
        assert!(matches!(Config::parse("{"), Err(ConfigError::Json(_))));
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        for (path, value) in [
            (vec!["defaults", "ops", "is_input_quantized"], r#""True""#),
            (vec!["defaults", "ops", "is_output_quantized"], r#""False""#),
            (vec!["op_type", "Conv", "is_input_quantized"], r#""False""#),
            (vec!["model_input", "is_input_quantized"], r#""False""#),
            (vec!["model_output", "is_output_quantized"], r#""False""#),
            (
                vec!["op_type", "Conv", "supported_kernels"],
                r#"[{"activation": {"bitwidth": 8, "dtype": "float"}}]"#,
            ),
        ] {
            assert!(
                matches!(with(&path, value), Err(ConfigError::Unsupported { .. })),
                "{path:?}"
            );
        }
    }
}
