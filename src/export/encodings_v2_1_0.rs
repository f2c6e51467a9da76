//! Version 2.1.0: as 2.0.0, with the two levels of scales of a grouped-block grid as one nested scale.

use serde_json::Value;

use super::encodings_v2_0_0::{affine_or_float, file, integer_dtype, nested};
use super::{object, Encoding, EncodingsError, ModelEncodings};

const VERSION: &str = "2.1.0";

/// The object of one tensor; `None` for float16 and bfloat16.
pub fn encoding(name: &str, encoding: &Encoding) -> Result<Option<Value>, EncodingsError> {
    affine_or_float(name, encoding, VERSION, |map, grouped, layout| {
        // Counted from the last one, as AIMET does.
        let channel_axis = (0..layout.shape.len())
            .find(|&i| Some(i) != layout.axis)
            .map_or(-1, |i| i as i64 - layout.shape.len() as i64);
        let scale = object([
            ("x", nested(&grouped.per_block_int_scale, &layout.shape)),
            ("x_scale", grouped.per_channel_scale.clone().into()),
            ("axis", channel_axis.into()),
        ]);
        map.insert("y_scale".to_owned(), scale);
        let dtype = integer_dtype(-1, grouped.compressed_bitwidth);
        map.insert("output_dtype".to_owned(), dtype.into());
    })
}

/// The whole file by tensor names.
pub fn tensor_file(encodings: &ModelEncodings) -> Result<Value, EncodingsError> {
    file(encodings, VERSION, encoding)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::Grouped;
    use super::*;
    use serde_json::json;

    #[test]
    fn grouped_scales_are_nested() {
        let mut grouped = affine(-128, 127, true, &[1.0, 2.0, 3.0, 4.0], &[0.0; 4]);
        grouped.shape = vec![2, 2];
        grouped.block_size = Some(vec![1, 16]);
        grouped.grouped = Some(Grouped {
            compressed_bitwidth: 4,
            per_block_int_scale: vec![1, 2, 3, 4],
            per_channel_scale: vec![0.5, 0.25],
            channel_shape: vec![2, 1],
        });
        let value = encoding("w", &grouped).unwrap().unwrap();
        assert_eq!(
            value["y_scale"],
            json!({"x": [[1, 2], [3, 4]], "x_scale": [0.5, 0.25], "axis": -2})
        );
        assert_eq!(
            (value["output_dtype"].as_str(), value["axis"].as_i64()),
            (Some("int4"), Some(1))
        );
    }
}
