//! Names of operators: torch module classes and torch functions to ONNX types and to the names that target
//! configurations use.
//!
//! A class key is `nn.Conv2d` for classes of `torch.nn`, `custom.Add` for rimet's elementwise modules,
//! `torchvision.RoIPool` for torchvision, and the qualified name for everything else.

use std::collections::HashMap;
use std::sync::LazyLock;

/// (class key, ONNX types with the usual one first, name in target configurations).
type Row = (&'static str, &'static [&'static str], Option<&'static str>);

const TABLE: &[Row] = &[
    (
        "nn.AdaptiveAvgPool2d",
        &["GlobalAveragePool", "AveragePool"],
        None,
    ),
    ("nn.AvgPool2d", &["AveragePool"], Some("PoolAvg2d")),
    ("nn.AvgPool3d", &[], Some("PoolAvg3d")),
    ("nn.BatchNorm1d", &["BatchNormalization"], Some("Batchnorm")),
    ("nn.BatchNorm2d", &["BatchNormalization"], Some("Batchnorm")),
    ("nn.BatchNorm3d", &[], Some("Batchnorm")),
    (
        "nn.ChannelShuffle",
        &["ChannelShuffle"],
        Some("ChannelShuffle"),
    ),
    ("nn.ConstantPad1d", &["Pad"], None),
    ("nn.ConstantPad2d", &["Pad"], None),
    ("nn.ConstantPad3d", &["Pad"], None),
    ("nn.Conv1d", &["Conv"], Some("Conv1d")),
    ("nn.Conv2d", &["Conv"], Some("Conv2d")),
    ("nn.Conv3d", &[], Some("Conv3d")),
    ("nn.ConvTranspose1d", &[], Some("TransposeConv1d")),
    (
        "nn.ConvTranspose2d",
        &["ConvTranspose"],
        Some("TransposeConv2d"),
    ),
    ("nn.ConvTranspose3d", &[], Some("TransposeConv3d")),
    ("nn.Dropout", &["Dropout"], None),
    ("nn.Dropout2d", &["Dropout"], None),
    ("nn.ELU", &[], Some("Elu")),
    ("nn.Embedding", &["Gather"], Some("Gather")),
    ("nn.Flatten", &["Flatten"], None),
    ("nn.GELU", &["Gelu"], Some("Gelu")),
    ("nn.GRU", &["GRU"], Some("Gru")),
    ("nn.GroupNorm", &["GroupNormalization"], Some("GroupNorm")),
    ("nn.Hardswish", &["HardSwish"], Some("HardSwish")),
    ("nn.Hardtanh", &[], Some("ReluMinMax")),
    ("nn.Identity", &["Identity"], None),
    (
        "nn.InstanceNorm1d",
        &["InstanceNormalization"],
        Some("InstanceNorm"),
    ),
    (
        "nn.InstanceNorm2d",
        &["InstanceNormalization"],
        Some("InstanceNorm"),
    ),
    ("nn.InstanceNorm3d", &[], Some("InstanceNorm")),
    ("nn.LPPool2d", &[], Some("L2Pool2d")),
    ("nn.LSTM", &["LSTM"], Some("Lstm")),
    ("nn.LayerNorm", &["LayerNormalization"], Some("LayerNorm")),
    ("nn.LeakyReLU", &["LeakyRelu"], Some("Prelu")),
    ("nn.Linear", &["Gemm", "MatMul"], Some("FullyConnected")),
    ("nn.LocalResponseNorm", &[], Some("Lrn")),
    ("nn.LogSoftmax", &["LogSoftmax"], Some("LogSoftmax")),
    ("nn.MaxPool1d", &["MaxPool"], None),
    ("nn.MaxPool2d", &["MaxPool"], Some("PoolMax2d")),
    ("nn.MaxPool3d", &["MaxPool"], Some("PoolMax3d")),
    ("nn.MaxUnpool1d", &["MaxUnpool"], None),
    ("nn.MaxUnpool2d", &["MaxUnpool"], None),
    ("nn.MaxUnpool3d", &["MaxUnpool"], None),
    ("nn.PReLU", &["PRelu"], Some("Prelu")),
    ("nn.PixelShuffle", &["DepthToSpace"], Some("DepthToSpace")),
    ("nn.PixelUnshuffle", &["SpaceToDepth"], Some("SpaceToDepth")),
    ("nn.RNN", &["RNN"], None),
    ("nn.ReLU", &["Relu"], Some("Relu")),
    ("nn.ReLU6", &["Clip"], Some("Relu6")),
    ("nn.ReflectionPad1d", &["Pad"], None),
    ("nn.ReflectionPad2d", &["Pad"], None),
    ("nn.ReflectionPad3d", &["Pad"], None),
    ("nn.ReplicationPad1d", &["Pad"], None),
    ("nn.ReplicationPad2d", &["Pad"], None),
    ("nn.ReplicationPad3d", &["Pad"], None),
    ("nn.Sigmoid", &["Sigmoid"], Some("Sigmoid")),
    ("nn.Softmax", &["Softmax"], Some("Softmax")),
    ("nn.Softplus", &["Softplus"], Some("ElementWiseSoftplus")),
    ("nn.Tanh", &["Tanh"], Some("Tanh")),
    ("nn.Upsample", &["Resize"], Some("Resize")),
    ("nn.UpsamplingBilinear2d", &["Resize"], None),
    ("nn.UpsamplingNearest2d", &["Resize"], None),
    ("nn.ZeroPad1d", &["Pad"], None),
    ("nn.ZeroPad2d", &["Pad"], None),
    ("nn.ZeroPad3d", &["Pad"], None),
    ("torchvision.Resize", &["Resize"], None),
    ("torchvision.RoIPool", &["MaxRoiPool"], None),
    ("custom.Abs", &[], Some("ElementWiseAbs")),
    ("custom.Add", &["Add"], Some("ElementWiseAdd")),
    ("custom.Argmax", &[], Some("Argmax")),
    ("custom.Argmin", &[], Some("Argmin")),
    ("custom.Asin", &[], Some("ElementWiseAsin")),
    ("custom.Atan", &[], Some("ElementWiseAtan")),
    ("custom.AvgPool2d", &[], Some("PoolAvg2d")),
    ("custom.Cast", &["Cast"], Some("Cast")),
    (
        "custom.ChannelShuffle",
        &["ChannelShuffle"],
        Some("ChannelShuffle"),
    ),
    ("custom.Concat", &["Concat"], Some("Concat")),
    ("custom.Cos", &["Cos"], Some("ElementWiseCos")),
    ("custom.CumSum", &[], Some("CumulativeSum")),
    ("custom.CustomGather", &["Gather"], Some("Gather")),
    (
        "custom.DepthToSpaceDCRMode",
        &["DepthToSpace"],
        Some("DepthToSpace"),
    ),
    ("custom.Divide", &["Div"], Some("ElementWiseDivide")),
    ("custom.ElementwiseCeil", &[], Some("ElementWiseCeil")),
    ("custom.ElementwiseFloor", &[], Some("ElementWiseFloor")),
    ("custom.ElementwiseUnarySign", &[], Some("ElementWiseUnary")),
    ("custom.Equal", &[], Some("ElementWiseEqual")),
    ("custom.Erf", &[], Some("Gelu")),
    ("custom.Expand", &["Expand"], Some("ElementWiseMultiply")),
    ("custom.Exponential", &[], Some("ElementWiseExp")),
    ("custom.FloorDivide", &[], Some("ElementWiseFloorDiv")),
    ("custom.Fmod", &[], Some("ElementWiseFmod")),
    ("custom.Gather", &["Gather"], Some("Gather")),
    ("custom.GatherNd", &["GatherND"], Some("GatherNd")),
    ("custom.Greater", &[], Some("ElementWiseGreater")),
    ("custom.GreaterEqual", &[], Some("ElementWiseGreaterEqual")),
    ("custom.GroupNorm", &[], Some("GroupNorm")),
    ("custom.IndexSelect", &["Gather"], Some("Gather")),
    ("custom.Less", &[], Some("ElementWiseLess")),
    ("custom.LessEqual", &[], Some("ElementWiseLessEqual")),
    ("custom.Log", &[], Some("ElementWiseLog")),
    ("custom.LogicalAnd", &[], Some("ElementWiseAnd")),
    ("custom.LogicalNot", &[], Some("ElementWiseNot")),
    ("custom.LogicalOr", &[], Some("ElementWiseOr")),
    ("custom.MatMul", &[], Some("MatMul")),
    ("custom.Max", &["ReduceMax"], Some("ReduceMax")),
    ("custom.MaxPool2d", &["MaxPool"], Some("PoolMax2d")),
    ("custom.Maximum", &[], Some("ElementWiseMaximum")),
    ("custom.Mean", &["ReduceMean"], Some("ReduceMean")),
    ("custom.Min", &["ReduceMin"], Some("ReduceMin")),
    ("custom.Minimum", &[], Some("ElementWiseMinimum")),
    ("custom.Multiply", &["Mul"], Some("ElementWiseMultiply")),
    ("custom.Neg", &[], Some("ElementWiseNeg")),
    (
        "custom.NonMaxSuppression",
        &["NonMaxSuppression"],
        Some("NonMaxSuppression"),
    ),
    ("custom.NonZero", &["NonZero"], Some("NonZero")),
    ("custom.Normalize", &[], Some("L2Norm")),
    ("custom.OneHot", &[], Some("OneHot")),
    ("custom.Outer", &["MatMul"], None),
    ("custom.Pad", &["Pad"], Some("Pad")),
    ("custom.Permute", &["Transpose"], Some("Transpose")),
    ("custom.Pow", &[], Some("ElementWisePower")),
    ("custom.Prod", &[], Some("ReduceProd")),
    ("custom.Remainder", &[], Some("ElementWiseMod")),
    ("custom.Reshape", &["Reshape"], Some("Reshape")),
    ("custom.RmsNorm", &["RMSNormalization"], None),
    ("custom.RoiAlign", &["RoiAlign"], Some("RoiAlign")),
    ("custom.Round", &[], Some("ElementWiseRound")),
    (
        "custom.ScatterElements",
        &["ScatterElements"],
        Some("ScatterElements"),
    ),
    ("custom.ScatterND", &["ScatterND"], Some("ScatterNd")),
    ("custom.Select", &["Gather"], None),
    ("custom.Shape", &[], Some("Shape")),
    ("custom.Sin", &["Sin"], Some("ElementWiseSin")),
    ("custom.Split", &["Split"], Some("Split")),
    ("custom.Sqrt", &[], Some("ElementWiseRsqrt")),
    ("custom.StridedSlice", &["Slice"], Some("StridedSlice")),
    ("custom.Subtract", &["Sub"], Some("ElementWiseSubtract")),
    ("custom.Sum", &[], Some("ReduceSum")),
    ("custom.Tile", &["Tile"], Some("Tile")),
    ("custom.TopK", &["TopK"], Some("TopK")),
    ("custom.Where", &["Where"], Some("ElementWiseSelect")),
];

/// Modules and functions that hand their input on and are no operation of their own.
const PASSTHROUGH_MODULES: &[&str] = &["nn.Identity"];
pub const PASSTHROUGH_FUNCTIONS: &[&str] = &["to", "t", "detach", "values"];

/// ONNX operators for which quantizing the output of a quantized input changes nothing.
const GRID_PRESERVING: &[&str] = &[
    "Col2Im",
    "Compress",
    "DepthToSpace",
    "Dropout",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "MaxPool",
    "MaxRoiPool",
    "NonZero",
    "Pad",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "SplitToSequence",
    "Squeeze",
    "Tile",
    "TopK",
    "Transpose",
    "Unsqueeze",
];

/// Operators with several inputs whose output grid can serve as the grid of all inputs.
const GRID_JOINING: &[&str] = &["Concat", "Scatter", "ScatterElements", "ScatterND"];

/// Torch functions that move data without computing on it, so that no quantizer belongs behind them.
pub const MOVING_FUNCTIONS: &[&str] = &[
    "size",
    "view",
    "narrow",
    "reshape",
    "reshape_as",
    "mean",
    "index_select",
    "slice",
    "select",
    "unsqueeze",
    "randn",
    "flatten",
    "permute",
    "squeeze",
    "contiguous",
    "copy",
    "clone",
    "index",
    "transpose",
    "expand",
    "expand_as",
    "eq",
    "ne",
    "split",
    "chunk",
];

/// Torch functions that select, move or fill in values of what they are given. [`MOVING_FUNCTIONS`] is the list
/// that placement without functional quantizers has to keep to; this one is longer.
const VALUE_KEEPING_FUNCTIONS: &[&str] = &[
    "H",
    "T",
    "adjoint",
    "as_strided",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "bfloat16",
    "broadcast_tensors",
    "broadcast_to",
    "channel_shuffle",
    "cpu",
    "cuda",
    "data",
    "diag",
    "diag_embed",
    "diagonal",
    "double",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "dsplit",
    "embedding",
    "fill",
    "flip",
    "fliplr",
    "flipud",
    "float",
    "gather",
    "grad",
    "half",
    "hsplit",
    "imag",
    "index_put",
    "index_fill",
    "kthvalue",
    "mH",
    "mT",
    "masked_fill",
    "masked_scatter",
    "masked_select",
    "meshgrid",
    "msort",
    "nan_to_num",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "pad_sequence",
    "pixel_shuffle",
    "pixel_unshuffle",
    "positive",
    "ravel",
    "real",
    "repeat",
    "repeat_interleave",
    "requires_grad",
    "resolve_conj",
    "resolve_neg",
    "roll",
    "rot90",
    "scatter",
    "select_scatter",
    "slice_scatter",
    "sort",
    "split_with_sizes",
    "take",
    "take_along_dim",
    "tensor_split",
    "tile",
    "tril",
    "triu",
    "type",
    "type_as",
    "unbind",
    "unfold",
    "unique",
    "vsplit",
    "view_as_complex",
    "view_as_real",
    "where",
    "zero",
];

/// Torch functions by the class of module that computes the same.
const MODULE_OF_FUNCTION: &[(&str, &str)] = &[
    ("abs", "custom.Abs"),
    ("adaptive_avg_pool1d", "nn.AdaptiveAvgPool1d"),
    ("adaptive_avg_pool2d", "custom.AdaptiveAvgPool2d"),
    ("adaptive_avg_pool3d", "nn.AdaptiveAvgPool3d"),
    ("adaptive_max_pool1d", "nn.AdaptiveMaxPool1d"),
    ("adaptive_max_pool2d", "nn.AdaptiveMaxPool2d"),
    ("adaptive_max_pool3d", "nn.AdaptiveMaxPool3d"),
    ("add", "custom.Add"),
    ("addmm", "custom.Addmm"),
    ("amax", "custom.AMax"),
    ("amin", "custom.AMin"),
    ("asin", "custom.Asin"),
    ("atan", "custom.Atan"),
    ("avg_pool1d", "nn.AvgPool1d"),
    ("avg_pool2d", "custom.AvgPool2d"),
    ("avg_pool3d", "nn.AvgPool3d"),
    ("baddbmm", "custom.Baddbmm"),
    ("batch_norm", "custom.BatchNorm"),
    ("bilinear", "nn.Bilinear"),
    ("bmm", "custom.Bmm"),
    ("cat", "custom.Concat"),
    ("ceil", "custom.ElementwiseCeil"),
    ("celu", "nn.CELU"),
    ("clamp", "nn.Hardtanh"),
    ("clip", "nn.Hardtanh"),
    ("conv1d", "custom.DynamicConv1d"),
    ("conv2d", "custom.DynamicConv2d"),
    ("conv3d", "custom.DynamicConv3d"),
    ("conv_transpose1d", "custom.DynamicConvTranspose1d"),
    ("conv_transpose2d", "custom.DynamicConvTranspose2d"),
    ("conv_transpose3d", "custom.DynamicConvTranspose3d"),
    ("cos", "custom.Cos"),
    ("cumsum", "custom.CumSum"),
    ("div", "custom.Divide"),
    ("elu", "nn.ELU"),
    ("erf", "custom.Erf"),
    ("exp", "custom.Exponential"),
    ("floor", "custom.ElementwiseFloor"),
    ("floor_divide", "custom.FloorDivide"),
    ("fmod", "custom.Fmod"),
    ("gelu", "nn.GELU"),
    ("glu", "nn.GLU"),
    ("grid_sample", "custom.GridSample"),
    ("group_norm", "custom.GroupNorm"),
    ("hardshrink", "nn.Hardshrink"),
    ("hardsigmoid", "nn.Hardsigmoid"),
    ("hardswish", "nn.Hardswish"),
    ("hardtanh", "nn.Hardtanh"),
    ("instance_norm", "nn.InstanceNorm2d"),
    ("interpolate", "custom.Interpolate"),
    ("layer_norm", "nn.LayerNorm"),
    ("leaky_relu", "nn.LeakyReLU"),
    ("linear", "custom.DynamicLinear"),
    ("log", "custom.Log"),
    ("log_softmax", "nn.LogSoftmax"),
    ("logsigmoid", "nn.LogSigmoid"),
    ("matmul", "custom.MatMul"),
    ("max", "custom.Max"),
    ("max_pool1d", "nn.MaxPool1d"),
    ("max_pool2d", "custom.MaxPool2d"),
    ("max_pool2d_with_indices", "custom.MaxPool2d"),
    ("max_pool3d", "nn.MaxPool3d"),
    ("maximum", "custom.Maximum"),
    ("mean", "custom.Mean"),
    ("min", "custom.Min"),
    ("minimum", "custom.Minimum"),
    ("mish", "nn.Mish"),
    ("mm", "custom.MatMul"),
    ("mul", "custom.Multiply"),
    ("neg", "custom.Neg"),
    ("norm", "custom.Norm"),
    ("normalize", "custom.Normalize"),
    ("outer", "custom.Outer"),
    ("pad", "custom.Pad"),
    ("pow", "custom.Pow"),
    ("prelu", "nn.PReLU"),
    ("prod", "custom.Prod"),
    ("relu", "nn.ReLU"),
    ("relu6", "nn.ReLU6"),
    ("remainder", "custom.Remainder"),
    ("rms_norm", "nn.RMSNorm"),
    ("roi_align", "custom.RoiAlign"),
    ("round", "custom.Round"),
    ("rrelu", "nn.RReLU"),
    ("rsqrt", "custom.RSqrt"),
    (
        "scaled_dot_product_attention",
        "custom.ScaledDotProductAttention",
    ),
    ("selu", "nn.SELU"),
    ("sigmoid", "nn.Sigmoid"),
    ("silu", "nn.SiLU"),
    ("sin", "custom.Sin"),
    ("softmax", "nn.Softmax"),
    ("softmin", "nn.Softmin"),
    ("softplus", "nn.Softplus"),
    ("softshrink", "nn.Softshrink"),
    ("softsign", "nn.Softsign"),
    ("sqrt", "custom.Sqrt"),
    ("square", "custom.Square"),
    ("sub", "custom.Subtract"),
    ("sum", "custom.Sum"),
    ("tanh", "nn.Tanh"),
    ("tanhshrink", "nn.Tanhshrink"),
    ("topk", "custom.TopK"),
];

/// Modules through which an output grid is handed on to whoever made the input.
const TRANSPARENT_MODULES: &[&str] = &[
    "custom.Reshape",
    "custom.Permute",
    "custom.Shape",
    "custom.Cast",
    "custom.ChannelShuffle",
    "nn.ChannelShuffle",
    "nn.Identity",
];

/// What the tables of this file say of one name, as the class of a module and as a torch function.
#[derive(Debug, Clone, Copy)]
pub struct Traits {
    /// See [`onnx_types`].
    pub onnx_types: &'static [&'static str],
    /// See [`target_type`].
    pub target_type: Option<&'static str>,
    pub module_preserves_grid: bool,
    pub module_joins_grids: bool,
    pub module_interpolates: bool,
    /// Hands an output grid on to whoever made its input.
    pub module_is_transparent: bool,
    /// Hands its input on and is no operation of its own.
    pub module_is_passthrough: bool,
    pub function_is_passthrough: bool,
    /// Moves data without computing on it, so that no quantizer belongs behind it.
    pub function_moves_data: bool,
    /// Every value that the function returns is one that it was given, or a fill value.
    pub function_keeps_values: bool,
}

impl Traits {
    pub fn of(name: &str) -> Self {
        Traits {
            onnx_types: onnx_types(name),
            target_type: target_type(name),
            module_preserves_grid: module_preserves_grid(name),
            module_joins_grids: module_joins_grids(name),
            module_interpolates: module_interpolates(name),
            module_is_transparent: TRANSPARENT_MODULES.contains(&name),
            module_is_passthrough: PASSTHROUGH_MODULES.contains(&name),
            function_is_passthrough: PASSTHROUGH_FUNCTIONS.contains(&name),
            function_moves_data: function_moves_data(name),
            function_keeps_values: VALUE_KEEPING_FUNCTIONS.contains(&name),
        }
    }
}

fn row(class: &str) -> Option<&'static Row> {
    static BY_CLASS: LazyLock<HashMap<&str, &Row>> =
        LazyLock::new(|| TABLE.iter().map(|row| (row.0, row)).collect());
    BY_CLASS.get(class).copied()
}

/// Every class key with its ONNX types.
pub fn onnx_type_table() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    TABLE
        .iter()
        .filter(|row| !row.1.is_empty())
        .map(|row| (row.0, row.1))
}

/// ONNX types of a module class, the usual one first; empty if it has none.
pub fn onnx_types(class: &str) -> &'static [&'static str] {
    row(class).map_or(&[], |row| row.1)
}

/// The name that target configurations use for a module class.
pub fn target_type(class: &str) -> Option<&'static str> {
    row(class).and_then(|row| row.2)
}

/// Whether any module or functional operator has this ONNX type.
pub fn is_known_onnx_type(op_type: &str) -> bool {
    TABLE.iter().any(|row| row.1.contains(&op_type))
}

/// Operator type of a module's node: its first ONNX type, or the bare class name.
pub fn module_op_type(class: &str) -> &str {
    match onnx_types(class).first() {
        Some(onnx) => onnx,
        None => class.rsplit('.').next().unwrap_or(class),
    }
}

/// One name for the spellings of one torch function: `__iadd__`, `add_` and `add` are `add`.
pub fn canonical(name: &str) -> &str {
    let bare = name.trim_matches('_');
    match bare {
        "radd" | "iadd" => "add",
        "rmul" | "imul" | "multiply" => "mul",
        "truediv" | "itruediv" | "rtruediv" | "rdiv" | "idiv" | "divide" | "true_divide" => "div",
        "isub" | "rsub" | "subtract" => "sub",
        "concat" | "concatenate" => "cat",
        "getitem" => "slice",
        "setitem" => "index_put",
        "rmatmul" => "matmul",
        "rpow" | "ipow" => "pow",
        "swapaxes" | "swapdims" | "movedim" | "moveaxis" => "transpose",
        "unflatten" | "view_as" => "view",
        "floordiv" | "ifloordiv" | "rfloordiv" => "floor_divide",
        "mod" | "imod" | "rmod" => "remainder",
        "negative" => "neg",
        "absolute" => "abs",
        _ => bare,
    }
}

/// Whether a functional node is the call of a function that `torch.jit.script` compiled.
pub fn is_scripted(function: &str) -> bool {
    function.starts_with("torch.jit.script(")
}

/// Operator type of a functional node: the four that a configuration can speak of, or the function's name.
pub fn function_op_type(canonical: &str) -> &str {
    match canonical {
        "add" => "Add",
        "cat" => "Concat",
        "mul" => "Mul",
        "div" => "Div",
        "relu6" => "hardtanh",
        other => other,
    }
}

/// Whether a functional node takes part in the configuration's rules: its output grid is the input grid of
/// the modules behind it.
pub fn is_elementwise_function(op_type: &str) -> bool {
    matches!(op_type, "Add" | "Mul" | "Concat" | "Div")
}

pub fn is_grid_preserving(onnx_type: &str) -> bool {
    GRID_PRESERVING.contains(&onnx_type)
}

/// Whether all ONNX types of a module class preserve the grid; false for a class without any.
pub fn module_preserves_grid(class: &str) -> bool {
    let types = onnx_types(class);
    !types.is_empty() && types.iter().all(|t| is_grid_preserving(t))
}

/// Whether all ONNX types of a module class join the grids of their inputs.
fn module_joins_grids(class: &str) -> bool {
    let types = onnx_types(class);
    !types.is_empty() && types.iter().all(|t| GRID_JOINING.contains(t))
}

/// Whether a module class resamples its input (a target with fixed kernels ties its input and output).
fn module_interpolates(class: &str) -> bool {
    let types = onnx_types(class);
    !types.is_empty() && types.iter().all(|t| matches!(*t, "Resize" | "Upsample"))
}

pub fn function_moves_data(canonical: &str) -> bool {
    MOVING_FUNCTIONS.contains(&canonical)
}

/// Class key of the module that computes what a torch function does, if there is one.
pub fn module_of_function(canonical: &str) -> Option<&'static str> {
    MODULE_OF_FUNCTION
        .iter()
        .find(|(function, _)| *function == canonical)
        .map(|(_, class)| *class)
}

/// Class key of the layer that a torch function is if its weight, the second argument, is a parameter.
pub fn layer_of_function(canonical: &str) -> Option<&'static str> {
    Some(match canonical {
        "linear" => "nn.Linear",
        "conv1d" => "nn.Conv1d",
        "conv2d" => "nn.Conv2d",
        "conv3d" => "nn.Conv3d",
        "conv_transpose1d" => "nn.ConvTranspose1d",
        "conv_transpose2d" => "nn.ConvTranspose2d",
        "conv_transpose3d" => "nn.ConvTranspose3d",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(module_op_type("nn.Linear"), "Gemm");
        assert_eq!(module_op_type("nn.Conv3d"), "Conv3d");
        assert_eq!(module_op_type("my.pkg.Swish"), "Swish");
        assert_eq!(canonical("__radd__"), "add");
        assert_eq!(canonical("relu_"), "relu");
        assert_eq!(function_op_type(canonical("add_")), "Add");
        assert_eq!(function_op_type(canonical("relu")), "relu");
        assert!(module_preserves_grid("nn.MaxPool2d") && !module_preserves_grid("nn.ReLU"));
        assert!(!module_preserves_grid("nn.Conv3d"));
    }

    #[test]
    fn no_class_twice() {
        let mut seen = std::collections::HashSet::new();
        assert!(TABLE.iter().all(|row| seen.insert(row.0)));
    }
}
