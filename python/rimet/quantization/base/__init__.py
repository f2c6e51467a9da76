"""What all quantizers and all encodings have in common."""

from __future__ import annotations

from rimet.quantization.base.encoding import EncodingBase
from rimet.quantization.base.quantizer import QuantizerBase

__all__ = ["EncodingBase", "QuantizerBase"]
