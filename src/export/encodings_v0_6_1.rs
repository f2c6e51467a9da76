//! Version 0.6.1: one object per channel, over a grid without sign. Also the format of the files that name modules.

use serde_json::{Map, Value};

use super::{header, object, Encoding, EncodingsError, Grid, ModelEncodings, Side};

const VERSION: &str = "0.6.1";

/// One object per scale.
///
/// The grid is shifted to start at 0, so `offset` is at most 0: minus the zero point. Minimum and maximum are rounded
/// to float32, the precision of the scales.
pub fn encoding(name: &str, encoding: &Encoding) -> Result<Vec<Value>, EncodingsError> {
    match encoding.grid {
        Grid::Float(format) if format.is_half() => Ok(vec![object([
            ("bitwidth", 16.into()),
            ("dtype", "float".into()),
        ])]),
        Grid::Float(format) => Err(EncodingsError::Inexpressible {
            name: name.to_owned(),
            version: VERSION,
            what: format!("the number format {}", format.name()),
            remedy: "2.0.0",
        }),
        Grid::Affine {
            qmin,
            qmax,
            symmetric,
            ..
        } => {
            // A block's scale, which both levels make, is that of the compressed grid.
            let (bitwidth, qmin, qmax) = match &encoding.grouped {
                Some(grouped) => {
                    let half = 1i64 << (grouped.compressed_bitwidth - 1);
                    (grouped.compressed_bitwidth, -half, half - 1)
                }
                None => (encoding.bitwidth(), qmin, qmax),
            };
            let steps = (qmax - qmin) as f32;
            let symmetric = if symmetric { "True" } else { "False" };
            let channel = |(&scale, &offset): (&f64, &f64)| {
                let offset = offset + qmin as f64;
                let min = (offset as f32) * (scale as f32);
                let max = (offset as f32 + steps) * (scale as f32);
                object([
                    ("bitwidth", bitwidth.into()),
                    ("dtype", "int".into()),
                    ("is_symmetric", symmetric.into()),
                    ("max", f64::from(max).into()),
                    ("min", f64::from(min).into()),
                    ("offset", (offset as i64).into()),
                    ("scale", scale.into()),
                ])
            };
            Ok(encoding
                .scale
                .iter()
                .zip(&encoding.offset)
                .map(channel)
                .collect())
        }
    }
}

/// `{activation_encodings, param_encodings}` by module names.
pub fn module_sections(encodings: &ModelEncodings) -> Result<Map<String, Value>, EncodingsError> {
    let mut modules: Map<String, Value> = Map::new();
    for (module, side, index, encoding_) in &encodings.activations {
        let side = if *side == Side::Input {
            "input"
        } else {
            "output"
        };
        let mut entries = encoding(&format!("{module}.{side}.{index}"), encoding_)?;
        let entry = if entries.len() == 1 {
            entries.swap_remove(0)
        } else {
            Value::Array(entries)
        };
        let module = modules
            .entry(module.clone())
            .or_insert_with(|| Value::Object(Map::new()));
        let sides = module.as_object_mut().expect("made as an object above");
        let side = sides
            .entry(side)
            .or_insert_with(|| Value::Object(Map::new()));
        side.as_object_mut()
            .expect("made as an object above")
            .insert(index.to_string(), entry);
    }
    let mut params = Map::new();
    for (name, encoding_) in &encodings.params {
        params.insert(name.clone(), Value::Array(encoding(name, encoding_)?));
    }
    let mut map = Map::new();
    map.insert("activation_encodings".to_owned(), Value::Object(modules));
    map.insert("param_encodings".to_owned(), Value::Object(params));
    Ok(map)
}

/// The whole file by module names.
pub fn module_file(encodings: &ModelEncodings) -> Result<Value, EncodingsError> {
    let mut map = header(encodings, VERSION);
    map.extend(module_sections(encodings)?);
    Ok(Value::Object(map))
}

/// The whole file by tensor names.
pub fn tensor_file(encodings: &ModelEncodings) -> Result<Value, EncodingsError> {
    let (activations, params) = encodings.by_tensor();
    let mut map = header(encodings, VERSION);
    for (key, entries) in [
        ("activation_encodings", activations),
        ("param_encodings", params),
    ] {
        let mut section = Map::new();
        for (name, encoding_) in entries {
            let list = encoding(&name, encoding_)?;
            section.insert(name, Value::Array(list));
        }
        map.insert(key.to_owned(), Value::Object(section));
    }
    Ok(Value::Object(map))
}

/// One object per channel, as it was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Channel {
    Int {
        bitwidth: u32,
        symmetric: bool,
        min: f64,
        max: f64,
        scale: f64,
        offset: i64,
    },
    Float {
        bitwidth: u32,
    },
}

/// A file by module names, as it was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModuleFile {
    /// Every module that the file names, those without an entry included.
    pub modules: Vec<String>,
    pub activations: Vec<(String, Side, usize, Vec<Channel>)>,
    pub params: Vec<(String, Vec<Channel>)>,
}

fn fail<T>(at: &str, expected: &str, got: &Value) -> Result<T, EncodingsError> {
    let mut got = got.to_string();
    if got.chars().count() > 60 {
        got = got.chars().take(57).chain("...".chars()).collect();
    }
    Err(EncodingsError::Format {
        at: at.to_owned(),
        expected: expected.to_owned(),
        got,
    })
}

fn entries<'v>(value: &'v Value, at: &str) -> Result<&'v Map<String, Value>, EncodingsError> {
    match value {
        Value::Object(map) => Ok(map),
        other => fail(at, "an object", other),
    }
}

fn channel(value: &Value, at: &str) -> Result<Channel, EncodingsError> {
    let map = entries(value, at)?;
    let get = |key: &str| match map.get(key) {
        Some(found) => Ok(found),
        None => fail(&format!("{at}.{key}"), "this key", &Value::Null),
    };
    let number = |key: &str| {
        let found = get(key)?;
        match found.as_f64() {
            Some(number) if number.is_finite() => Ok(number),
            _ => fail(&format!("{at}.{key}"), "a finite number", found),
        }
    };
    let bitwidth = number("bitwidth")?;
    if bitwidth.fract() != 0.0 || !(1.0..=32.0).contains(&bitwidth) {
        return fail(
            &format!("{at}.bitwidth"),
            "a whole number from 1 to 32",
            get("bitwidth")?,
        );
    }
    let bitwidth = bitwidth as u32;
    match map.get("dtype").map(|v| v.as_str()) {
        None | Some(Some("int")) => {}
        Some(Some("float")) => return Ok(Channel::Float { bitwidth }),
        _ => {
            return fail(
                &format!("{at}.dtype"),
                "\"int\" or \"float\"",
                get("dtype")?,
            )
        }
    }
    let symmetric = match get("is_symmetric")? {
        Value::Bool(symmetric) => *symmetric,
        Value::String(text) if text.eq_ignore_ascii_case("true") => true,
        Value::String(text) if text.eq_ignore_ascii_case("false") => false,
        other => {
            return fail(
                &format!("{at}.is_symmetric"),
                "\"True\" or \"False\"",
                other,
            )
        }
    };
    let steps = ((1u64 << bitwidth) - 1) as f64;
    // Either pair determines the other.
    let (scale, offset, min, max) = if map.contains_key("scale") && map.contains_key("offset") {
        let (scale, offset) = (number("scale")?, number("offset")?);
        let min = if map.contains_key("min") {
            number("min")?
        } else {
            offset * scale
        };
        let max = if map.contains_key("max") {
            number("max")?
        } else {
            (offset + steps) * scale
        };
        (scale, offset, min, max)
    } else {
        let (min, max) = (number("min")?, number("max")?);
        let scale = (max - min) / steps;
        (
            scale,
            if scale > 0.0 {
                (min / scale).round_ties_even()
            } else {
                0.0
            },
            min,
            max,
        )
    };
    if scale <= 0.0 || max <= min {
        return fail(at, "a positive scale and min below max", value);
    }
    Ok(Channel::Int {
        bitwidth,
        symmetric,
        min,
        max,
        scale,
        offset: offset as i64,
    })
}

fn channels(value: &Value, at: &str) -> Result<Vec<Channel>, EncodingsError> {
    match value {
        Value::Array(items) if items.is_empty() => fail(at, "at least one encoding", value),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(i, item)| channel(item, &format!("{at}[{i}]")))
            .collect(),
        single => Ok(vec![channel(single, at)?]),
    }
}

/// Reads a file by module names; sections that are not there are empty.
pub fn read_module_file(text: &str) -> Result<ModuleFile, EncodingsError> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| EncodingsError::Json(e.to_string()))?;
    let root = entries(&value, "$")?;
    let mut file = ModuleFile::default();
    if let Some(section) = root.get("activation_encodings") {
        for (module, sides) in entries(section, "$.activation_encodings")? {
            let at = format!("$.activation_encodings[{module:?}]");
            file.modules.push(module.clone());
            for (side_name, slots) in entries(sides, &at)? {
                let side = match side_name.as_str() {
                    "input" => Side::Input,
                    "output" => Side::Output,
                    _ => return fail(&at, "\"input\" or \"output\"", &side_name.as_str().into()),
                };
                let at = format!("{at}.{side_name}");
                for (slot, value) in entries(slots, &at)? {
                    let at = format!("{at}[{slot:?}]");
                    let Ok(index) = slot.parse() else {
                        return fail(
                            &at,
                            "the number of an input or output",
                            &slot.as_str().into(),
                        );
                    };
                    file.activations
                        .push((module.clone(), side, index, channels(value, &at)?));
                }
            }
        }
    }
    if let Some(section) = root.get("param_encodings") {
        for (name, value) in entries(section, "$.param_encodings")? {
            let at = format!("$.param_encodings[{name:?}]");
            file.params.push((name.clone(), channels(value, &at)?));
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn signed_grids_are_shifted() {
        let model = model();
        let text = super::super::to_text(&module_file(&model).unwrap()).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        let weight = &value["param_encodings"]["conv.weight"];
        assert_eq!(weight[0]["offset"], -128);
        assert_eq!(weight[0]["min"], -64.0);
        assert_eq!(weight[0]["max"], 63.5);
        assert_eq!(weight[1]["is_symmetric"], "True");
        assert_eq!(
            value["activation_encodings"]["conv"]["input"]["0"]["min"],
            -5.0
        );
        assert_eq!(value["version"], "0.6.1");
    }

    #[test]
    fn what_is_written_is_read() {
        let text = super::super::to_text(&module_file(&model()).unwrap()).unwrap();
        let file = read_module_file(&text).unwrap();
        assert_eq!(file.params[0].0, "conv.weight");
        assert_eq!(
            file.params[0].1[1],
            Channel::Int {
                bitwidth: 8,
                symmetric: true,
                min: -32.0,
                max: 31.75,
                scale: 0.25,
                offset: -128
            }
        );
        assert_eq!(file.activations.len(), 2);
        let empty = read_module_file(r#"{"activation_encodings": {"nowhere": {}}}"#).unwrap();
        assert_eq!(empty.modules, ["nowhere"]);
    }

    #[test]
    fn errors_name_the_place() {
        for (text, place) in [
            (
                r#"{"param_encodings": {"w": [{"bitwidth": 8}]}}"#,
                r#"$.param_encodings["w"][0].is_symmetric"#,
            ),
            (
                r#"{"param_encodings": {"w": []}}"#,
                r#"$.param_encodings["w"]"#,
            ),
            (r#"{"param_encodings": []}"#, "$.param_encodings"),
            (
                r#"{"activation_encodings": {"a": {"inpt": {}}}}"#,
                r#"$.activation_encodings["a"]"#,
            ),
            (
                r#"{"activation_encodings": {"a": {"input": {"x": {}}}}}"#,
                r#"$.activation_encodings["a"].input["x"]"#,
            ),
            (
                r#"{"param_encodings": {"w": {"bitwidth": 99, "is_symmetric": "True"}}}"#,
                r#"$.param_encodings["w"].bitwidth"#,
            ),
            (
                r#"{"param_encodings": {"w": {"bitwidth": 8, "is_symmetric": "True", "scale": 0, "offset": 0}}}"#,
                r#"$.param_encodings["w"]"#,
            ),
            ("7", "$"),
        ] {
            match read_module_file(text) {
                Err(EncodingsError::Format { at, .. }) => assert_eq!(at, place),
                other => panic!("{text}: {other:?}"),
            }
        }
        assert!(matches!(
            read_module_file("{"),
            Err(EncodingsError::Json(_))
        ));
    }
}
