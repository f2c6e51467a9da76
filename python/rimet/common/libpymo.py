"""Enumerations of the older AIMET interface."""

from __future__ import annotations

from enum import Enum

__all__ = ["QuantizationMode", "RoundingMode", "TensorQuantizerOpMode"]


class QuantizationMode(Enum):
    """How a range is found."""

    QUANTIZATION_TF = 0
    QUANTIZATION_TF_ENHANCED = 1
    QUANTIZATION_RANGE_LEARNING = 2
    QUANTIZATION_PERCENTILE = 3


class RoundingMode(Enum):
    """How a value is brought to the grid."""

    ROUND_NEAREST = 0
    ROUND_STOCHASTIC = 1


class TensorQuantizerOpMode(Enum):
    """What a quantizer does with its input."""

    updateStats = 0
    oneShotQuantizeDequantize = 1
    quantizeDequantize = 2
    passThrough = 3
