"""What the report of the architecture checker says."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["ArchCheckerReportConstants"]


class ArchCheckerReportConstants:
    """Column names, and issue and recommendation of each check by the check's name."""

    OP_STRUCT_OP_TYPE = "OpStructure"
    DF_GRAPH_NODENAME = "Graph/Layer_name"
    DF_ISSUE = "Issue"
    DF_RECOMM = "Recommendation"
    UNDEFINED_ISSUE = "Undefined issue from check: {}"
    UNDEFINED_RECOMM = "Undefined recommendation from check: {}"
    OUTPUT_CSV_HEADER: ClassVar[list[str]] = [DF_GRAPH_NODENAME, DF_ISSUE, DF_RECOMM]

    ERR_MSG_DICT: ClassVar[dict[str, dict[str, str]]] = {
        "_check_conv_channel_32_base": {
            DF_ISSUE: "The number of input or output channels of this convolution is no multiple "
            "of 32.",
            DF_RECOMM: "Make it one: the target computes on 32 channels at a time.",
        },
        "_check_conv_channel_larger_than_32": {
            DF_ISSUE: "This convolution has fewer than 32 input or output channels.",
            DF_RECOMM: "Use at least 32: the target computes on 32 channels at a time.",
        },
        "_check_prelu": {
            DF_ISSUE: "PReLU is slow on the target.",
            DF_RECOMM: "Use ReLU.",
        },
        "_check_silu": {
            DF_ISSUE: "SiLU (Swish) is slow on the target.",
            DF_RECOMM: "Use Hardswish.",
        },
        "_check_batch_norm_fold": {
            DF_ISSUE: "This batch normalization cannot be folded into a layer next to it; "
            "quantized on its own it costs time and accuracy.",
            DF_RECOMM: "Remove it, or move it next to a convolution or Linear.",
        },
        "_check_intermediate_padding": {
            DF_ISSUE: "This convolution pads its input in the middle of a chain of convolutions.",
            DF_RECOMM: "Move the padding of the chain to its first convolution.",
        },
        "_check_foldable_bn_with_split": {
            DF_ISSUE: "A batch normalization follows a concatenation of convolutions' outputs.",
            DF_RECOMM: "Normalize each output before the concatenation, so that the normalization "
            "can be folded.",
        },
    }
