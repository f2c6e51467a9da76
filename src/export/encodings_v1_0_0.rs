//! Version 1.0.0: one object per tensor, with lists of scales and offsets.

use serde_json::{Map, Value};

use super::{header, Encoding, EncodingsError, Grid, ModelEncodings};

const VERSION: &str = "1.0.0";

/// The object of one tensor.
pub fn encoding(name: &str, encoding: &Encoding) -> Result<Value, EncodingsError> {
    let mut map = Map::new();
    map.insert("name".to_owned(), name.into());
    match encoding.grid {
        Grid::Float(format) if format.is_half() => {
            map.insert("dtype".to_owned(), "FLOAT".into());
            map.insert("bw".to_owned(), format.bitwidth().into());
            map.insert("enc_type".to_owned(), "PER_TENSOR".into());
        }
        Grid::Float(format) => {
            return Err(EncodingsError::Inexpressible {
                name: name.to_owned(),
                version: VERSION,
                what: format!("the number format {}", format.name()),
                remedy: "2.0.0",
            });
        }
        Grid::Affine {
            qmin,
            symmetric,
            zero_point_shift,
            ..
        } => {
            map.insert("dtype".to_owned(), "INT".into());
            map.insert("bw".to_owned(), encoding.bitwidth().into());
            map.insert("is_sym".to_owned(), symmetric.into());
            if let Some(grouped) = &encoding.grouped {
                let (_, length) = encoding.block_axis(name, VERSION)?;
                map.insert("enc_type".to_owned(), "LPBQ".into());
                map.insert("block_size".to_owned(), length.into());
                map.insert(
                    "compressed_bw".to_owned(),
                    grouped.compressed_bitwidth.into(),
                );
                map.insert(
                    "per_block_int_scale".to_owned(),
                    grouped.per_block_int_scale.clone().into(),
                );
                map.insert("scale".to_owned(), grouped.per_channel_scale.clone().into());
                let offset = -(1i64 << (encoding.bitwidth() - 1));
                map.insert(
                    "offset".to_owned(),
                    vec![offset; grouped.per_channel_scale.len()].into(),
                );
                return Ok(Value::Object(map));
            }
            let enc_type = match (&encoding.block_size, encoding.shape.iter().any(|&n| n != 1)) {
                (Some(_), _) => "PER_BLOCK",
                (None, true) => "PER_CHANNEL",
                // A list of one scale along a channel axis of length one is still per channel.
                (None, false) if !encoding.shape.is_empty() => "PER_CHANNEL",
                (None, false) => "PER_TENSOR",
            };
            map.insert("enc_type".to_owned(), enc_type.into());
            if enc_type == "PER_BLOCK" {
                let (_, length) = encoding.block_axis(name, VERSION)?;
                map.insert("block_size".to_owned(), length.into());
            }
            map.insert("scale".to_owned(), encoding.scale.clone().into());
            let offsets: Vec<i64> = encoding
                .offset
                .iter()
                .map(|&offset| offset as i64 + qmin)
                .collect();
            map.insert("offset".to_owned(), offsets.into());
            if zero_point_shift != 0.0 {
                map.insert(
                    "zero_point_shift".to_owned(),
                    vec![zero_point_shift; encoding.scale.len()].into(),
                );
            }
        }
    }
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
        let list: Result<Vec<Value>, _> =
            entries.iter().map(|(name, e)| encoding(name, e)).collect();
        map.insert(key.to_owned(), Value::Array(list?));
    }
    Ok(Value::Object(map))
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{FloatFormat, Grouped};
    use super::*;

    #[test]
    fn kinds() {
        let file = tensor_file(&model()).unwrap();
        let input = &file["activation_encodings"][0];
        assert_eq!(input["name"], "conv.input.0");
        assert_eq!(input["enc_type"], "PER_TENSOR");
        assert_eq!(input["offset"], serde_json::json!([-10]));
        let weight = &file["param_encodings"][0];
        assert_eq!(weight["enc_type"], "PER_CHANNEL");
        assert_eq!(weight["offset"], serde_json::json!([-128, -128]));
        assert_eq!(weight["is_sym"], true);

        let mut blocks = affine(-8, 7, true, &[1.0, 2.0, 3.0, 4.0], &[0.0; 4]);
        blocks.shape = vec![2, 2];
        blocks.block_size = Some(vec![1, 16]);
        let value = encoding("w", &blocks).unwrap();
        assert_eq!(
            (value["enc_type"].as_str(), value["block_size"].as_i64()),
            (Some("PER_BLOCK"), Some(16))
        );

        let mut grouped = affine(-128, 127, true, &[1.0, 2.0, 3.0, 4.0], &[0.0; 4]);
        grouped.block_size = Some(vec![1, 16]);
        grouped.grouped = Some(Grouped {
            compressed_bitwidth: 4,
            per_block_int_scale: vec![1, 2, 3, 4],
            per_channel_scale: vec![0.5, 0.25],
            channel_shape: vec![2, 1],
        });
        let value = encoding("w", &grouped).unwrap();
        assert_eq!(value["bw"], 8);
        assert_eq!(value["offset"], serde_json::json!([-128, -128]));
        assert_eq!(value["compressed_bw"], 4);
    }

    #[test]
    fn small_floats_are_refused() {
        let format = FloatFormat {
            exponent_bits: 4,
            mantissa_bits: 3,
            finite: true,
            unsigned_zero: false,
        };
        let mut fp8 = affine(0, 1, false, &[1.0], &[0.0]);
        fp8.grid = Grid::Float(format);
        assert!(matches!(
            encoding("x", &fp8),
            Err(EncodingsError::Inexpressible { .. })
        ));
        fp8.grid = Grid::Float(FloatFormat {
            exponent_bits: 5,
            mantissa_bits: 10,
            ..format
        });
        assert_eq!(encoding("x", &fp8).unwrap()["dtype"], "FLOAT");
    }
}
