"""Quantizers to floating-point formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rimet.quantization import _ops
from rimet.quantization.affine._grid import check_block_size
from rimet.quantization.affine.quantizer import _is_compiling, _is_tracing, _normalize_shape
from rimet.quantization.base import EncodingBase, QuantizerBase
from rimet.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    StatisticsNotFoundError,
)
from rimet.quantization.float._format import FloatFormat
from rimet.quantization.float.encoding import FloatEncoding
from rimet.quantization.tensor import DequantizedTensor, QuantizedTensorBase

__all__ = ["FloatQuantizeDequantize", "QuantizeDequantize"]


class FloatQuantizeDequantize(QuantizerBase):
    r"""Maps a tensor to the nearest values of a floating-point format times a scale.

    .. math:: scale = maxval / max_{format}

    ``maxval`` is a buffer that starts at the format's largest value (scale 1), and that calibration
    sets to the largest magnitude observed. float16 and bfloat16 are not calibrated.

    :param exponent_bits, mantissa_bits: fields of the format, or
    :param dtype: float16, bfloat16, float8_e4m3fn, float8_e4m3fnuz, float8_e5m2 or float8_e5m2fnuz
        of torch
    :param finite: without infinities; ``False`` by default
    :param unsigned_zero: with one zero only; ``False`` by default
    :param shape: encoding shape, ``()`` by default
    :param block_size: elements per block, one entry per dimension of ``shape``; ``-1``: whatever
        divides
    :param encoding_analyzer: what calibration takes the range from; :class:`MinMaxEncodingAnalyzer`
        by default
    :raises ValueError: neither or both of fields and ``dtype``, or no such format
    :raises RuntimeError: the analyzer has another shape

    FP8: Micikevicius et al. 2022, arXiv 2209.05433; OCP microscaling formats: Rouhani et al. 2023,
    arXiv 2310.10537.
    """

    maxval: torch.Tensor

    def __init__(
        self,
        exponent_bits: int | None = None,
        mantissa_bits: int | None = None,
        finite: bool | None = None,
        unsigned_zero: bool | None = None,
        dtype: torch.dtype | None = None,
        shape: int | Sequence[int] | None = None,
        block_size: Sequence[int] | None = None,
        encoding_analyzer: EncodingAnalyzer[Any] | None = None,
    ) -> None:
        super().__init__()
        fields = (exponent_bits, mantissa_bits, finite, unsigned_zero)
        if dtype is not None:
            if any(field is not None for field in fields):
                raise ValueError(
                    "dtype: expected either dtype or exponent_bits, mantissa_bits, finite, "
                    "unsigned_zero; got both"
                )
            self._format = FloatFormat.of_dtype(dtype)
        elif exponent_bits is None or mantissa_bits is None:
            raise ValueError("expected dtype, or both exponent_bits and mantissa_bits; got neither")
        else:
            self._format = FloatFormat(
                exponent_bits, mantissa_bits, bool(finite), bool(unsigned_zero)
            )
        self.shape = () if shape is None else _normalize_shape(shape)
        self.block_size = check_block_size(block_size, self.shape)

        if encoding_analyzer is None:
            if not (self.is_float16() or self.is_bfloat16()):
                encoding_analyzer = MinMaxEncodingAnalyzer(self.shape, self.block_size)
        elif not isinstance(encoding_analyzer, EncodingAnalyzer):
            raise TypeError(
                f"encoding_analyzer: expected an EncodingAnalyzer, got {encoding_analyzer!r}"
            )
        elif tuple(encoding_analyzer.observer.shape) != self.shape:
            raise RuntimeError(
                f"encoding_analyzer: expected one of shape {self.shape}, "
                f"got {tuple(encoding_analyzer.observer.shape)}"
            )
        self.encoding_analyzer = encoding_analyzer
        self.register_buffer("maxval", torch.full(self.shape, self._format.max))
        self._is_overwrite_allowed["maxval"] = True
        self._ready = True

    # -- format ------------------------------------------------------------------------------------

    def _set_format(self, form: FloatFormat) -> None:
        """Change the format; a range that was the old format's own becomes that of the new one."""
        old, self._format = self._format, form
        with torch.no_grad():
            own = self.maxval == old.max
            self.maxval.copy_(torch.where(own, torch.full_like(self.maxval, form.max), self.maxval))

    @property
    def exponent_bits(self) -> int:
        """Bits of the exponent."""
        return self._format.exponent_bits

    @exponent_bits.setter
    def exponent_bits(self, exponent_bits: int) -> None:
        old = self._format
        self._set_format(
            FloatFormat(exponent_bits, old.mantissa_bits, old.finite, old.unsigned_zero)
        )

    @property
    def mantissa_bits(self) -> int:
        """Bits of the mantissa."""
        return self._format.mantissa_bits

    @mantissa_bits.setter
    def mantissa_bits(self, mantissa_bits: int) -> None:
        old = self._format
        self._set_format(
            FloatFormat(old.exponent_bits, mantissa_bits, old.finite, old.unsigned_zero)
        )

    @property
    def finite(self) -> bool:
        """Whether the format is without infinities."""
        return self._format.finite

    @property
    def unsigned_zero(self) -> bool:
        """Whether the format has one zero only."""
        return self._format.unsigned_zero

    @property
    def bitwidth(self) -> int:
        """Number of bits, the sign's included."""
        return self._format.bitwidth

    def is_float16(self) -> bool:
        """Whether the format is IEEE half precision."""
        return self._format.torch_dtype is torch.float16

    def is_bfloat16(self) -> bool:
        """Whether the format is bfloat16."""
        return self._format.torch_dtype is torch.bfloat16

    # -- range -------------------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        """``True``: there is a range from the start."""
        return True

    def get_scale(self) -> torch.Tensor | None:
        """``maxval`` over the format's largest value, in the encoding shape and float32."""
        return self._scale_of(self.maxval)

    def _scale_of(self, maxval: torch.Tensor) -> torch.Tensor:
        return maxval.to(torch.promote_types(maxval.dtype, torch.float32)) / self._format.max

    def _observe(self, input: torch.Tensor) -> Any:
        assert self.encoding_analyzer is not None
        if not input.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: input: expected a floating-point tensor, got {input.dtype}"
            )
        with torch.no_grad():
            if input.numel() == 0:
                return None
            return self.encoding_analyzer.update_stats(input.detach())

    def _largest(self, ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.maximum(ends[0].abs(), ends[1].abs()).reshape(self.shape)

    @torch.no_grad()
    def _apply_statistics(self) -> None:
        assert self.encoding_analyzer is not None
        if not self._is_overwrite_allowed["maxval"]:
            return
        try:
            ends = self.encoding_analyzer.compute_encodings(
                2**self.bitwidth - 1, is_symmetric=False
            )
        except StatisticsNotFoundError:
            return
        self.maxval.copy_(self._largest(ends))

    # -- forward -----------------------------------------------------------------------------------

    def _kernel(self, input: torch.Tensor, maxval: torch.Tensor) -> torch.Tensor:
        return _ops.float_quantize_dequantize(  # type: ignore[no-any-return]
            input, self._scale_of(maxval), *self._format.fields, self.block_size
        )

    def _check_input(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, QuantizedTensorBase):
            input = input.as_subclass(torch.Tensor)
        if not input.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: input: expected a floating-point tensor, got {input.dtype}"
            )
        return input

    def _forward_tensor(self, input: torch.Tensor) -> torch.Tensor:
        plain = self._check_input(input)
        if self._calibrating:
            self._observe(plain)
            return plain
        return self._kernel(plain, self.maxval)

    def forward(self, input: torch.Tensor) -> Any:
        """Quantize a tensor.

        While calibrating (:meth:`compute_encodings`) the input is observed and quantized with its
        own range.

        :param input: floating-point tensor of a shape that the encoding shape (and block size) fits
        :return: a :class:`rimet.quantization.DequantizedTensor` of the same shape and dtype; a
            plain tensor under ``torch.jit``, ``torch.compile`` and ``torch.export``
        :raises ValueError: the shape does not fit
        :raises TypeError: not a floating-point tensor
        """
        if self._calibrating and self._pass_through:
            self._forward_tensor(input)
            return input
        input = self._check_input(input)
        maxval = self.maxval
        if self._calibrating:
            assert self.encoding_analyzer is not None
            stats = self._observe(input)
            if stats is not None:
                maxval = self._largest(
                    self.encoding_analyzer.compute_encodings_from_stats(
                        stats, 2**self.bitwidth - 1, is_symmetric=False
                    )
                )
        output = self._kernel(input, maxval)
        if _is_compiling() or _is_tracing() is not None:
            return output
        return DequantizedTensor._adopt_fresh(output, self._encoding_of_maxval(maxval))

    # -- encodings ---------------------------------------------------------------------------------

    def _encoding_of_maxval(self, maxval: torch.Tensor) -> FloatEncoding:
        form = self._format
        return FloatEncoding(
            form.mantissa_bits,
            form.exponent_bits,
            form.finite,
            form.unsigned_zero,
            self._scale_of(maxval),
            self.block_size,
            producer=self,
        )

    def get_encodings(self) -> FloatEncoding | None:
        """The grid as a :class:`FloatEncoding`."""
        return self._encoding_of_maxval(self.maxval)

    @classmethod
    def from_encodings(cls, encodings: EncodingBase) -> FloatQuantizeDequantize:
        """A quantizer with the format and scale of ``encodings``.

        :raises TypeError: not a :class:`FloatEncoding`
        """
        if not isinstance(encodings, FloatEncoding):
            raise TypeError(f"encodings: expected a FloatEncoding, got {encodings!r}")
        quantizer = cls(
            encodings.exponent_bits,
            encodings.mantissa_bits,
            encodings.finite,
            encodings.unsigned_zero,
            shape=tuple(encodings.scale.shape),
            block_size=encodings.block_size,
        )
        quantizer.to(encodings.scale.device)
        with torch.no_grad():
            quantizer.maxval.copy_(encodings.maxval)
        return quantizer

    def set_encodings(self, encodings: EncodingBase) -> None:
        """Take over the format and scale of ``encodings``; the encoding shape has to be this
        quantizer's.

        :raises TypeError: not a :class:`FloatEncoding`
        :raises ValueError: another encoding shape
        """
        if not isinstance(encodings, FloatEncoding):
            raise TypeError(f"encodings: expected a FloatEncoding, got {encodings!r}")
        if tuple(encodings.scale.shape) != self.shape:
            raise ValueError(
                f"encodings: expected scales of shape {self.shape}, got "
                f"{tuple(encodings.scale.shape)}"
            )
        self._format = encodings.format
        self.block_size = encodings.block_size
        with torch.no_grad():
            self.maxval.copy_(encodings.maxval)

    def get_legacy_encodings(self) -> list[dict[str, Any]] | None:
        """The format in the form of an encodings file of version 0.6.1: ``[{"bitwidth": ...,
        "dtype": "float"}]``.
        """
        return [{"bitwidth": self.bitwidth, "dtype": "float"}]

    def set_legacy_encodings(self, encodings: list[dict[str, Any]]) -> None:
        """Take over the format from the form of an encodings file of version 0.6.1.

        Sixteen bits mean float16, unless this quantizer is bfloat16 already; this quantizer's own
        bit-width changes nothing.

        :raises TypeError: not a list of dicts
        :raises ValueError: empty, not a float
        :raises RuntimeError: another bit-width
        """
        if not isinstance(encodings, (list, tuple)) or not all(
            isinstance(entry, Mapping) for entry in encodings
        ):
            raise TypeError(f"encodings: expected a list of dicts, got {encodings!r}")
        if not encodings or any(entry.get("dtype") != "float" for entry in encodings):
            raise ValueError(f"encodings: expected entries of dtype 'float', got {encodings!r}")
        for entry in encodings:
            bitwidth = entry.get("bitwidth")
            if bitwidth not in (16, self.bitwidth):
                raise RuntimeError(
                    f"encodings: expected bitwidth 16 or {self.bitwidth}, got {bitwidth}"
                )
        if encodings[0]["bitwidth"] != self.bitwidth:
            self._format = FloatFormat.of_dtype(torch.float16)
            with torch.no_grad():
                self.maxval.fill_(self._format.max)

    # -- state -------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """The format: exponent_bits, mantissa_bits, finite, unsigned_zero; and block_size."""
        return {
            **super().get_extra_state(),
            "exponent_bits": torch.tensor(self.exponent_bits),
            "mantissa_bits": torch.tensor(self.mantissa_bits),
            "finite": torch.tensor(self.finite),
            "unsigned_zero": torch.tensor(self.unsigned_zero),
            "block_size": torch.tensor(self.block_size or []),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` gives; what is not in ``state`` stays as it is."""
        old = self._format
        self._format = FloatFormat(
            int(state.get("exponent_bits", old.exponent_bits)),
            int(state.get("mantissa_bits", old.mantissa_bits)),
            bool(state.get("finite", old.finite)),
            bool(state.get("unsigned_zero", old.unsigned_zero)),
        )
        if "block_size" in state:
            self.block_size = tuple(int(size) for size in state["block_size"]) or None

    def extra_repr(self) -> str:
        """Format and shape, for ``repr``."""
        dtype = self._format.torch_dtype
        if dtype is not None:
            parts = [f"dtype={dtype}"]
        else:
            parts = [
                f"exponent_bits={self.exponent_bits}, mantissa_bits={self.mantissa_bits}, "
                f"finite={self.finite}, unsigned_zero={self.unsigned_zero}"
            ]
        if math.prod(self.shape) != 1 or self.shape:
            parts.append(f"shape={self.shape}")
        if self.block_size is not None:
            parts.append(f"block_size={self.block_size}")
        return ", ".join(parts)


class QuantizeDequantize(FloatQuantizeDequantize):
    """Short name of :class:`FloatQuantizeDequantize`."""
