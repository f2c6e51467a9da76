"""The engine's ops, looked up once.

An overload kept in a module global spares a call two attribute look-ups on ``torch.ops`` and the
overload resolution.
"""

from __future__ import annotations

import torch

import rimet._core  # noqa: F401  (loading it registers torch.ops.rimet)

__all__ = [
    "dequantize",
    "float_quantize",
    "float_quantize_dequantize",
    "grouped_block_scale",
    "quantize",
    "quantize_dequantize",
    "quantize_dequantize_range",
    "quantize_dequantize_range_",
    "range_to_scale_offset",
]

quantize = torch.ops.rimet.quantize.default
dequantize = torch.ops.rimet.dequantize.default
quantize_dequantize = torch.ops.rimet.quantize_dequantize.default
quantize_dequantize_range = torch.ops.rimet.quantize_dequantize_range.default
quantize_dequantize_range_ = torch.ops.rimet.quantize_dequantize_range_.default
range_to_scale_offset = torch.ops.rimet.range_to_scale_offset.default
float_quantize = torch.ops.rimet.float_quantize.default
float_quantize_dequantize = torch.ops.rimet.float_quantize_dequantize.default
grouped_block_scale = torch.ops.rimet.grouped_block_scale.default
