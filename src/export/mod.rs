//! Encodings files: the grids of a model's quantizers as JSON, one file of this folder per format version.
//!
//! The versions share the entries below; each version's file says how they are written. A version's file is never
//! changed once it has been released: a new format is a new file.

pub mod encodings_v0_6_1;
pub mod encodings_v1_0_0;
pub mod encodings_v2_0_0;
pub mod encodings_v2_1_0;

use serde::Serialize;
use serde_json::{Map, Value};

/// What a file cannot say, or what is wrong with one that was read.
#[derive(Debug, thiserror::Error)]
pub enum EncodingsError {
    #[error("encodings file is not valid JSON: {0}")]
    Json(String),
    #[error("encodings file, {at}: expected {expected}, got {got}")]
    Format {
        at: String,
        expected: String,
        got: String,
    },
    #[error("encoding of {name}: version {version} cannot express {what}; use {remedy}")]
    Inexpressible {
        name: String,
        version: &'static str,
        what: String,
        remedy: &'static str,
    },
    #[error("encodings version: expected 0.6.1, 1.0.0, 2.0.0 or 2.1.0, got {0:?}")]
    Version(String),
}

/// Versions that can be written.
pub const VERSIONS: [&str; 4] = ["0.6.1", "1.0.0", "2.0.0", "2.1.0"];

/// Scales of a grouped-block grid: one float per channel and one small integer per block.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    pub compressed_bitwidth: u32,
    pub per_block_int_scale: Vec<i64>,
    pub per_channel_scale: Vec<f64>,
    /// Shape of the scales per channel: the rank of the tensor, as many along an axis as there are groups of blocks.
    pub channel_shape: Vec<i64>,
}

/// A floating-point number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloatFormat {
    pub exponent_bits: u32,
    pub mantissa_bits: u32,
    /// Without infinities (the `fn` of `float8e4m3fn`).
    pub finite: bool,
    /// Without negative zero (the `uz`).
    pub unsigned_zero: bool,
}

impl FloatFormat {
    pub fn bitwidth(self) -> u32 {
        1 + self.exponent_bits + self.mantissa_bits
    }

    /// float16 or bfloat16: a plain cast.
    pub fn is_half(self) -> bool {
        matches!((self.exponent_bits, self.mantissa_bits), (5, 10) | (8, 7))
    }

    /// The ONNX-style name, e.g. `float8e4m3fn`.
    pub fn name(self) -> String {
        match (self.exponent_bits, self.mantissa_bits) {
            (5, 10) => "float16".to_owned(),
            (8, 7) => "bfloat16".to_owned(),
            (8, 23) => "float32".to_owned(),
            (exponent, mantissa) => {
                let mut name = format!("float{}e{exponent}m{mantissa}", self.bitwidth());
                if self.finite && self.bitwidth() == 8 {
                    name.push_str("fn");
                }
                if self.unsigned_zero {
                    name.push_str("uz");
                }
                name
            }
        }
    }
}

/// The numbers of a quantizer's grid.
#[derive(Debug, Clone, PartialEq)]
pub enum Grid {
    /// `x = (q + offset) * scale`, `qmin <= q <= qmax`.
    Affine {
        qmin: i64,
        qmax: i64,
        symmetric: bool,
        zero_point_shift: f64,
    },
    Float(FloatFormat),
}

/// The encoding of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoding {
    pub grid: Grid,
    /// Shape of scale and offset; empty for one pair for the whole tensor.
    pub shape: Vec<i64>,
    /// In row-major order.
    pub scale: Vec<f64>,
    pub offset: Vec<f64>,
    pub block_size: Option<Vec<i64>>,
    pub grouped: Option<Grouped>,
}

/// Position of an activation quantizer in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Input,
    Output,
}

/// An encoding and the tensor it belongs to.
pub type Named<'e> = (String, &'e Encoding);

/// The encodings of a model by module names.
#[derive(Debug, Clone, Default)]
pub struct ModelEncodings {
    pub activations: Vec<(String, Side, usize, Encoding)>,
    /// Activations that have names of their own, as tensors of an ONNX graph do.
    pub tensors: Vec<(String, Encoding)>,
    /// By `module.param`.
    pub params: Vec<(String, Encoding)>,
    pub excluded_layers: Vec<String>,
    /// Global settings, as they stand in the file.
    pub quantizer_args: Map<String, Value>,
    pub producer_version: String,
}

impl ModelEncodings {
    /// Activations and parameters by tensor name; those of modules are called `module.input.0`, `module.output.0`.
    pub fn by_tensor(&self) -> (Vec<Named<'_>>, Vec<Named<'_>>) {
        let activations = self
            .activations
            .iter()
            .map(|(module, side, index, encoding)| {
                let side = if *side == Side::Input {
                    "input"
                } else {
                    "output"
                };
                let separator = if module.is_empty() { "" } else { "." };
                (format!("{module}{separator}{side}.{index}"), encoding)
            });
        let tensors = self
            .tensors
            .iter()
            .map(|(name, encoding)| (name.clone(), encoding));
        let params = self
            .params
            .iter()
            .map(|(name, encoding)| (name.clone(), encoding));
        (activations.chain(tensors).collect(), params.collect())
    }
}

impl Encoding {
    pub fn bitwidth(&self) -> u32 {
        match self.grid {
            Grid::Affine { qmin, qmax, .. } => (64 - ((qmax - qmin) as u64).leading_zeros()).max(1),
            Grid::Float(format) => format.bitwidth(),
        }
    }

    /// The axis along which the scales differ, if there is exactly one.
    pub fn axis(&self) -> Option<usize> {
        let mut axes = (0..self.shape.len()).filter(|&i| self.shape[i] != 1);
        let axis = axes.next();
        axis.filter(|_| axes.next().is_none())
    }

    /// The axis that is cut into blocks, and their length. Along other axes a block has length one, or all of the axis.
    fn block_axis(
        &self,
        name: &str,
        version: &'static str,
    ) -> Result<(usize, i64), EncodingsError> {
        let sizes = self.block_size.as_deref().unwrap_or_default();
        let long = || (0..sizes.len()).filter(|&i| sizes[i] != 1);
        let mut cut = long().filter(|&i| self.shape[i] != 1);
        let axis = match (cut.next(), cut.next()) {
            (None, _) => long().next().unwrap_or(sizes.len().saturating_sub(1)),
            (Some(axis), None) => axis,
            (Some(_), Some(_)) => {
                return Err(EncodingsError::Inexpressible {
                    name: name.to_owned(),
                    version,
                    what: format!("blocks of shape {sizes:?}"),
                    remedy: "blocks along one axis",
                })
            }
        };
        Ok((axis, sizes.get(axis).copied().unwrap_or(1)))
    }
}

/// Pretty text with sorted keys, as these files always have been.
pub fn to_text(value: &Value) -> Result<String, EncodingsError> {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    sorted(value)
        .serialize(&mut serializer)
        .map_err(|e| EncodingsError::Json(e.to_string()))?;
    String::from_utf8(text).map_err(|e| EncodingsError::Json(e.to_string()))
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

fn object<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Object(
        entries
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v))
            .collect(),
    )
}

fn header(encodings: &ModelEncodings, version: &str) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("version".to_owned(), version.into());
    map.insert(
        "excluded_layers".to_owned(),
        encodings.excluded_layers.clone().into(),
    );
    let producer = [
        ("package", "rimet".into()),
        ("version", encodings.producer_version.as_str().into()),
    ];
    map.insert("producer".to_owned(), object(producer));
    map.insert(
        "quantizer_args".to_owned(),
        Value::Object(encodings.quantizer_args.clone()),
    );
    map
}

/// The file that names tensors, in the given version.
pub fn tensor_file(encodings: &ModelEncodings, version: &str) -> Result<String, EncodingsError> {
    let value = match version {
        "0.6.1" => encodings_v0_6_1::tensor_file(encodings)?,
        "1.0.0" => encodings_v1_0_0::tensor_file(encodings)?,
        "2.0.0" => encodings_v2_0_0::tensor_file(encodings)?,
        "2.1.0" => encodings_v2_1_0::tensor_file(encodings)?,
        other => return Err(EncodingsError::Version(other.to_owned())),
    };
    to_text(&value)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub fn affine(
        qmin: i64,
        qmax: i64,
        symmetric: bool,
        scale: &[f64],
        offset: &[f64],
    ) -> Encoding {
        Encoding {
            grid: Grid::Affine {
                qmin,
                qmax,
                symmetric,
                zero_point_shift: 0.0,
            },
            shape: if scale.len() == 1 {
                vec![]
            } else {
                vec![scale.len() as i64, 1]
            },
            scale: scale.to_vec(),
            offset: offset.to_vec(),
            block_size: None,
            grouped: None,
        }
    }

    pub fn model() -> ModelEncodings {
        ModelEncodings {
            activations: vec![
                (
                    "conv".into(),
                    Side::Input,
                    0,
                    affine(0, 255, false, &[0.5], &[-10.0]),
                ),
                (
                    "conv".into(),
                    Side::Output,
                    0,
                    affine(0, 255, false, &[0.25], &[0.0]),
                ),
            ],
            params: vec![(
                "conv.weight".into(),
                affine(-128, 127, true, &[0.5, 0.25], &[0.0, 0.0]),
            )],
            producer_version: "9".into(),
            ..ModelEncodings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn widths_and_axes() {
        assert_eq!(affine(-128, 127, true, &[1.0], &[0.0]).bitwidth(), 8);
        assert_eq!(affine(0, 15, false, &[1.0], &[0.0]).bitwidth(), 4);
        assert_eq!(
            affine(-(1 << 31), (1 << 31) - 1, true, &[1.0], &[0.0]).bitwidth(),
            32
        );
        assert_eq!(affine(0, 15, false, &[1.0], &[0.0]).axis(), None);
        assert_eq!(
            affine(0, 15, false, &[1.0, 2.0], &[0.0, 0.0]).axis(),
            Some(0)
        );
        let fp8 = FloatFormat {
            exponent_bits: 4,
            mantissa_bits: 3,
            finite: true,
            unsigned_zero: false,
        };
        assert_eq!(fp8.name(), "float8e4m3fn");
    }

    #[test]
    fn tensors_keep_their_names() {
        let mut model = model();
        let grid = affine(0, 255, false, &[0.5], &[0.0]);
        model.tensors = vec![("/relu/Relu_output_0".into(), grid)];
        let names: Vec<String> = model
            .by_tensor()
            .0
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(
            names,
            ["conv.input.0", "conv.output.0", "/relu/Relu_output_0"]
        );
    }

    #[test]
    fn text_is_sorted() {
        let value = object([
            ("b", 1.into()),
            ("a", object([("d", 0.1.into()), ("c", Value::Null)])),
        ]);
        assert_eq!(
            to_text(&value).unwrap(),
            "{\n    \"a\": {\n        \"c\": null,\n        \"d\": 0.1\n    },\n    \"b\": 1\n}"
        );
        assert!(matches!(
            tensor_file(&model(), "3.0.0"),
            Err(EncodingsError::Version(_))
        ));
    }
}
