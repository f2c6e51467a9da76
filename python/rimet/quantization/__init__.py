"""Quantizers, encodings and quantized tensors."""

from __future__ import annotations

from rimet.quantization import affine, base, encoding_analyzer, float
from rimet.quantization.affine import get_backend, set_backend
from rimet.quantization.tensor import (
    DequantizedTensor,
    EncodingError,
    QuantizedTensor,
    QuantizedTensorBase,
)

__all__ = [
    "DequantizedTensor",
    "EncodingError",
    "QuantizedTensor",
    "QuantizedTensorBase",
    "affine",
    "base",
    "encoding_analyzer",
    "float",
    "get_backend",
    "set_backend",
]
