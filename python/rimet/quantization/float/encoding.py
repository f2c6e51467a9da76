"""Encodings of floating-point grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rimet.quantization import _ops
from rimet.quantization.affine.encoding import (
    channel_and_block_axes,
    check_encoding_version,
    granularity_of,
    target_dtype,
    to_list,
)
from rimet.quantization.base import EncodingBase
from rimet.quantization.float._format import FloatFormat

if TYPE_CHECKING:
    from rimet.quantization.float.quantizer import FloatQuantizeDequantize

__all__ = ["FloatEncoding"]

_FILE_DTYPES = {
    FloatFormat(4, 3, finite=True): "float8e4m3fn",
    FloatFormat(4, 3, finite=True, unsigned_zero=True): "float8e4m3fnuz",
    FloatFormat(5, 2): "float8e5m2",
    FloatFormat(5, 2, finite=True, unsigned_zero=True): "float8e5m2fnuz",
    FloatFormat(2, 1, finite=True): "float4e2m1",
}
_HALF_FORMATS = (FloatFormat(5, 10), FloatFormat(8, 7))


class FloatEncoding(EncodingBase):
    """A floating-point grid with a scale.

    :param mantissa_bits, exponent_bits: fields of the format
    :param finite: without infinities
    :param unsigned_zero: with one zero only
    :param scale: positive tensor in the encoding shape; the grid's values are those of the format
        times the scale
    :param block_size: elements per block, one entry per dimension of ``scale``; ``-1``: whatever
        divides
    :param producer: the quantizer this comes from
    :raises TypeError, ValueError: there is no such format
    """

    def __init__(
        self,
        mantissa_bits: int,
        exponent_bits: int,
        finite: bool,
        unsigned_zero: bool,
        scale: torch.Tensor,
        block_size: Sequence[int] | None = None,
        *,
        producer: FloatQuantizeDequantize | None = None,
    ) -> None:
        self.format = FloatFormat(exponent_bits, mantissa_bits, finite, unsigned_zero)
        self.scale = scale
        self.block_size = None if block_size is None else tuple(block_size)
        self.producer = producer

    @property
    def mapping(self) -> str:
        """``"float"``."""
        return "float"

    @property
    def granularity(self) -> str | None:
        """``"pertensor"``, ``"perchannel"``, ``"blockwise"`` or ``"unknown"``."""
        return granularity_of(self.scale, self.block_size)

    @property
    def bitwidth(self) -> int:
        """Number of bits, the sign's included."""
        return self.format.bitwidth

    @property
    def exponent_bits(self) -> int:
        """Bits of the exponent."""
        return self.format.exponent_bits

    @property
    def mantissa_bits(self) -> int:
        """Bits of the mantissa."""
        return self.format.mantissa_bits

    @property
    def finite(self) -> bool:
        """Whether the format is without infinities."""
        return self.format.finite

    @property
    def unsigned_zero(self) -> bool:
        """Whether the format has one zero only."""
        return self.format.unsigned_zero

    @property
    def maxval(self) -> torch.Tensor:
        """Largest value on the grid, in the encoding shape."""
        return self.scale * self.format.max

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype of the format; float32 if it has none."""
        return self.format.torch_dtype or torch.float32

    def __repr__(self) -> str:
        shape = tuple(self.scale.shape)
        block = "" if self.block_size is None else f", block_size={self.block_size}"
        return f"FloatEncoding({self.format.name}, shape={shape}{block})"

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.scale = function(self.scale)

    def _scaled(self, factor: float) -> FloatEncoding:
        """The grid with every value multiplied by ``factor``; it is its own mirror image."""
        new = self._clone()
        new.scale = self.scale * abs(factor)
        return new

    def quantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to values of the format, in the dtype of ``input``."""
        return _ops.float_quantize(input, self.scale, *self.format.fields, self.block_size)  # type: ignore[no-any-return]

    def dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Values of the format to real values, in the dtype of ``input``."""
        # An affine grid whose zero is that of the numbers; adding -0.0 changes no value.
        offset = torch.full_like(self.scale, -0.0)
        return _ops.dequantize(input, self.scale, offset, self.block_size)  # type: ignore[no-any-return]

    def quantize_dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to the nearest values on the grid, in the dtype of ``input``."""
        return _ops.float_quantize_dequantize(  # type: ignore[no-any-return]
            input, self.scale, *self.format.fields, self.block_size
        )

    def to(self, *args: Any, **kwargs: Any) -> FloatEncoding:
        """The same grid with its scale on another device or in another floating dtype.

        :raises RuntimeError: the dtype is not a floating one
        """
        target_dtype(*args, **kwargs)
        return self._mapped(lambda tensor: tensor.to(*args, **kwargs))

    def to_qnn_encoding_dict(
        self, encoding_version: str | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The grid as an entry of an encodings file.

        Files before 2.0.0 know float16 and bfloat16 without a scale; those of 2.0.0 and 2.1.0 have
        no entry for these (an empty dict is returned).

        :param encoding_version: ``"0.6.1"`` (a list of dicts), ``"1.0.0"``, ``"2.0.0"`` or
            ``"2.1.0"`` (a dict)
        :raises ValueError: another version
        :raises RuntimeError: the version cannot express the format, the scale or the granularity
        """
        version = check_encoding_version(encoding_version)
        if version in ("0.6.1", "1.0.0"):
            if self.format not in _HALF_FORMATS or bool((self.scale != 1).any()):
                raise RuntimeError(
                    f"encodings of version {version} have float16 and bfloat16 with scale 1 only, "
                    f"got {self.format.name}"
                    f"{'' if self.format not in _HALF_FORMATS else ' with another scale'}"
                )
            if version == "0.6.1":
                return [{"bitwidth": self.bitwidth, "dtype": "float"}]
            return {"dtype": "FLOAT", "bw": self.bitwidth, "enc_type": "PER_TENSOR"}
        if self.format in _HALF_FORMATS:
            return {}
        if self.format not in _FILE_DTYPES:
            raise RuntimeError(
                f"encodings of version {version} have {', '.join(_FILE_DTYPES.values())}, got "
                f"{self.format.name}"
            )
        entry: dict[str, Any] = {"output_dtype": _FILE_DTYPES[self.format]}
        channel, block, size = channel_and_block_axes(
            self.scale.shape, self.block_size, self._input_shape_hint
        )
        if block is not None:
            return {**entry, "y_scale": to_list(self.scale), "axis": block, "block_size": size}
        if channel is not None:
            return {**entry, "y_scale": to_list(self.scale.flatten()), "axis": channel}
        return {**entry, "y_scale": to_list(self.scale.reshape(()))}
