"""Quantization to floating-point formats."""

from __future__ import annotations

from rimet.quantization.float._format import FloatFormat
from rimet.quantization.float.encoding import FloatEncoding
from rimet.quantization.float.quantizer import FloatQuantizeDequantize, QuantizeDequantize

__all__ = [
    "FloatEncoding",
    "FloatFormat",
    "FloatQuantizeDequantize",
    "QuantizeDequantize",
]
