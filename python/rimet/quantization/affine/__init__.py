"""Affine (integer) quantization: quantizers, encodings, functions, backends."""

from __future__ import annotations

from rimet.quantization.affine.backends import (
    add_backend,
    dequantize,
    get_backend,
    quantize,
    quantize_dequantize,
    set_backend,
)
from rimet.quantization.affine.encoding import AffineEncoding, GroupedBlockEncoding, VectorEncoding
from rimet.quantization.affine.quantizer import (
    AffineQuantizerBase,
    Dequantize,
    GroupedBlockQuantizeDequantize,
    MinMaxQuantizer,
    Quantize,
    QuantizeDequantize,
    ScaleOffsetQuantizer,
)

__all__ = [
    "AffineEncoding",
    "AffineQuantizerBase",
    "Dequantize",
    "GroupedBlockEncoding",
    "GroupedBlockQuantizeDequantize",
    "MinMaxQuantizer",
    "Quantize",
    "QuantizeDequantize",
    "ScaleOffsetQuantizer",
    "VectorEncoding",
    "add_backend",
    "dequantize",
    "get_backend",
    "quantize",
    "quantize_dequantize",
    "set_backend",
]
