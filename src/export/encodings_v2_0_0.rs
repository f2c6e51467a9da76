//! Version 2.0.0: ONNX's words. One list of objects with scale, zero point, axis and block size.

use serde_json::{Map, Value};

use super::{object, Encoding, EncodingsError, Grid, ModelEncodings};

const VERSION: &str = "2.0.0";

/// Nests a row-major list into the given shape; without shape, the one number.
pub(super) fn nested<T: Clone + Into<Value>>(values: &[T], shape: &[usize]) -> Value {
    match shape {
        [] => values.first().cloned().map_or(Value::Null, Into::into),
        [_] => Value::Array(values.iter().cloned().map(Into::into).collect()),
        [_, rest @ ..] => {
            let chunk = rest.iter().product::<usize>().max(1);
            Value::Array(
                values
                    .chunks(chunk)
                    .map(|part| nested(part, rest))
                    .collect(),
            )
        }
    }
}

/// Shape, axis and length of blocks in ONNX's terms: a list along `axis` for channels; the tensor's rank with the
/// number of blocks along `axis` for blocks.
pub(super) struct Layout {
    pub shape: Vec<usize>,
    pub axis: Option<usize>,
    pub block_size: Option<i64>,
}

pub(super) fn layout(
    name: &str,
    encoding: &Encoding,
    version: &'static str,
) -> Result<Layout, EncodingsError> {
    let full: Vec<usize> = encoding.shape.iter().map(|&n| n.max(0) as usize).collect();
    if encoding.block_size.is_some() {
        let (axis, length) = encoding.block_axis(name, version)?;
        return Ok(Layout {
            shape: full,
            axis: Some(axis),
            block_size: Some(length),
        });
    }
    if encoding.shape.is_empty() {
        return Ok(Layout {
            shape: vec![],
            axis: None,
            block_size: None,
        });
    }
    let axis = encoding.axis().unwrap_or(0);
    if encoding.scale.len() != full.get(axis).copied().unwrap_or(1) {
        return Err(EncodingsError::Inexpressible {
            name: name.to_owned(),
            version,
            what: format!("scales of shape {full:?}"),
            remedy: "one channel axis",
        });
    }
    Ok(Layout {
        shape: vec![encoding.scale.len()],
        axis: Some(axis),
        block_size: None,
    })
}

/// `int8`, `uint4`, ... of a grid.
pub(super) fn integer_dtype(qmin: i64, bitwidth: u32) -> String {
    format!("{}int{bitwidth}", if qmin < 0 { "" } else { "u" })
}

/// The object of one tensor; `None` for float16 and bfloat16, which are plain casts.
pub fn encoding(name: &str, encoding: &Encoding) -> Result<Option<Value>, EncodingsError> {
    affine_or_float(name, encoding, VERSION, |map, grouped, layout| {
        map.insert(
            "per_block_int_scale".to_owned(),
            nested(&grouped.per_block_int_scale, &layout.shape),
        );
        let shape: Vec<usize> = grouped.channel_shape.iter().map(|&n| n as usize).collect();
        map.insert(
            "per_channel_float_scale".to_owned(),
            nested(&grouped.per_channel_scale, &shape),
        );
    })
}

pub(super) fn affine_or_float(
    name: &str,
    encoding: &Encoding,
    version: &'static str,
    write_grouped: impl Fn(&mut Map<String, Value>, &super::Grouped, &Layout),
) -> Result<Option<Value>, EncodingsError> {
    let layout = layout(name, encoding, version)?;
    let mut map = Map::new();
    map.insert("name".to_owned(), name.into());
    match encoding.grid {
        Grid::Float(format) if format.is_half() => return Ok(None),
        Grid::Float(format) => {
            map.insert("output_dtype".to_owned(), format.name().into());
            map.insert("y_scale".to_owned(), nested(&encoding.scale, &layout.shape));
        }
        Grid::Affine {
            qmin,
            qmax,
            symmetric,
            ..
        } => {
            let bitwidth = encoding.bitwidth();
            if let Some(grouped) = &encoding.grouped {
                map.insert(
                    "output_dtype".to_owned(),
                    integer_dtype(qmin, grouped.compressed_bitwidth).into(),
                );
                write_grouped(&mut map, grouped, &layout);
            } else {
                map.insert(
                    "output_dtype".to_owned(),
                    integer_dtype(qmin, bitwidth).into(),
                );
                map.insert("y_scale".to_owned(), nested(&encoding.scale, &layout.shape));
                // A symmetric grid is centred; its zero point is the centre, 0 if signed.
                let centre = if qmin < 0 { 0 } else { (qmax - qmin + 1) / 2 };
                let zero_points: Vec<i64> = match symmetric {
                    true => vec![centre; encoding.scale.len()],
                    false => encoding
                        .offset
                        .iter()
                        .map(|&offset| -(offset as i64))
                        .collect(),
                };
                if zero_points.iter().any(|&z| z != 0) {
                    map.insert(
                        "y_zero_point".to_owned(),
                        nested(&zero_points, &layout.shape),
                    );
                }
            }
        }
    }
    if let Some(axis) = layout.axis {
        map.insert("axis".to_owned(), axis.into());
    }
    if let Some(block) = layout.block_size {
        map.insert("block_size".to_owned(), block.into());
    }
    Ok(Some(Value::Object(map)))
}

pub(super) fn file(
    encodings: &ModelEncodings,
    version: &str,
    entry: impl Fn(&str, &Encoding) -> Result<Option<Value>, EncodingsError>,
) -> Result<Value, EncodingsError> {
    let (activations, params) = encodings.by_tensor();
    let mut list = Vec::new();
    for (name, encoding) in activations.iter().chain(&params) {
        list.extend(entry(name, encoding)?);
    }
    let producer = [
        ("package", "rimet".into()),
        ("version", encodings.producer_version.as_str().into()),
    ];
    Ok(object([
        ("version", version.into()),
        ("producer", object(producer)),
        ("encodings", Value::Array(list)),
    ]))
}

/// The whole file by tensor names.
pub fn tensor_file(encodings: &ModelEncodings) -> Result<Value, EncodingsError> {
    file(encodings, VERSION, encoding)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use serde_json::json;

    #[test]
    fn kinds() {
        let file = tensor_file(&model()).unwrap();
        assert_eq!(
            file["encodings"],
            json!([
                {"name": "conv.input.0", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 10},
                {"name": "conv.output.0", "output_dtype": "uint8", "y_scale": 0.25},
                {"name": "conv.weight", "output_dtype": "int8", "y_scale": [0.5, 0.25], "axis": 0},
            ])
        );
        let mut blocks = affine(-8, 7, true, &[1.0, 2.0, 3.0, 4.0], &[0.0; 4]);
        blocks.shape = vec![2, 2];
        blocks.block_size = Some(vec![1, 16]);
        let value = encoding("w", &blocks).unwrap().unwrap();
        assert_eq!(value["y_scale"], json!([[1.0, 2.0], [3.0, 4.0]]));
        assert_eq!(
            (value["axis"].as_i64(), value["block_size"].as_i64()),
            (Some(1), Some(16))
        );
        let unsigned = affine(0, 15, true, &[0.5], &[-8.0]);
        assert_eq!(
            encoding("w", &unsigned).unwrap().unwrap()["y_zero_point"],
            8
        );
    }
}
