"""Affine quantizers: modules whose learnable range ``[min, max]`` spans an integer grid."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import nn

from rimet.quantization import _ops
from rimet.quantization.affine import backends as _backends
from rimet.quantization.affine._grid import (
    AffineGrid,
    bind_grid_arguments,
    check_block_size,
    grid_of_bitwidth,
)
from rimet.quantization.affine.encoding import AffineEncoding, GroupedBlockEncoding
from rimet.quantization.base import EncodingBase, QuantizerBase
from rimet.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    StatisticsNotFoundError,
)
from rimet.quantization.tensor import (
    DequantizedTensor,
    QuantizedTensor,
    QuantizedTensorBase,
    _RangeOf,
)

__all__ = [
    "AffineQuantizerBase",
    "Dequantize",
    "GroupedBlockQuantizeDequantize",
    "MinMaxQuantizer",
    "Quantize",
    "QuantizeDequantize",
    "ScaleOffsetQuantizer",
]

_Self = TypeVar("_Self", bound="AffineQuantizerBase")

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_function_transform = torch._C._functorch.peek_interpreter_stack
_NAN = float("nan")


def _as_plain(input: torch.Tensor) -> torch.Tensor:
    """The tensor without its subclass, so that its ``__torch_function__`` stays out of the
    kernels' way.
    """
    return input.as_subclass(torch.Tensor) if isinstance(input, QuantizedTensorBase) else input


def _normalize_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    dims = (shape,) if isinstance(shape, int) and not isinstance(shape, bool) else shape
    if isinstance(dims, str) or not isinstance(dims, Sequence):
        raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}")
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}")
        if dim < 1:
            raise ValueError(f"shape: expected positive dimensions, got {tuple(dims)}")
    return tuple(int(dim) for dim in dims)


def _check_zero_point_shift(zero_point_shift: float | None) -> float:
    shift = 0.0 if zero_point_shift is None else float(zero_point_shift)
    if shift not in (0.0, 0.5):
        raise ValueError(f"zero_point_shift: expected 0.0 or 0.5, got {zero_point_shift}")
    return shift


class AffineQuantizerBase(QuantizerBase, AffineGrid):
    r"""Base of quantizers onto the integer grid ``[qmin, qmax]`` whose range ``[min, max]`` is a
    parameter.

    .. math::
        scale = \max\left(\frac{|max - min|}{qmax - qmin}, 2^{-23}\right), \quad
        offset = \begin{cases}
            -round((qmin + qmax) / 2) & \text{symmetric}\\
            clamp(round(min / scale) - qmin, -qmax, -qmin) & \text{else}\end{cases}

    (the smallest scale is lower on grids with very many steps). ``offset`` is minus the
    ``zero_point`` of torch and ONNX.

    :param shape: encoding shape: ``()`` per tensor, ``[C, 1, 1, 1]`` per channel; it broadcasts
        against the input, or with ``block_size`` counts blocks
    :param qmin, qmax: ends of the grid, ``qmin < qmax``
    :param bitwidth: instead of ``qmin`` and ``qmax``: all of an integer type, signed if
        ``symmetric``
    :param symmetric: whether the grid is symmetric about zero
    :param encoding_analyzer: what calibration takes the range from; :class:`MinMaxEncodingAnalyzer`
        by default
    :param block_size: elements per block, one entry per dimension of ``shape``; ``-1``: whatever
        divides
    :param zero_point_shift: 0.0, or 0.5 for a grid that has no zero and is symmetric about it
    :ivar gradient_scaling: ``False``; if set to ``True``, the gradients of ``min`` and ``max`` are
        multiplied by :math:`1 / \sqrt{N \cdot qmax}`, with :math:`N` the number of input elements
        that share a scale, so that ranges and weights learn at like rates (LSQ, section 2.2)
    :raises TypeError: arguments in none of the two forms
    :raises ValueError: ``qmin >= qmax``, bad shape, block size or zero point shift
    :raises RuntimeError: the analyzer has another shape

    Learned ranges: LSQ (Esser et al. 2020, arXiv 1902.08153), LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576), TQT (Jain et al. 2019, arXiv
    1903.08066).
    """

    min: nn.Parameter
    max: nn.Parameter
    gradient_scaling: bool = False

    @overload
    def __init__(
        self,
        shape: int | Sequence[int],
        qmin: int,
        qmax: int,
        symmetric: bool,
        encoding_analyzer: EncodingAnalyzer[Any] | None = None,
        block_size: Sequence[int] | None = None,
        zero_point_shift: float | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        shape: int | Sequence[int],
        bitwidth: int,
        symmetric: bool,
        encoding_analyzer: EncodingAnalyzer[Any] | None = None,
        block_size: Sequence[int] | None = None,
        zero_point_shift: float | None = None,
    ) -> None: ...

    def __init__(self, shape: int | Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bind_grid_arguments(type(self).__name__, _GRID_FORMS, args, kwargs)
        self.shape = _normalize_shape(shape)
        self._symmetric: bool = given["symmetric"]
        if "bitwidth" in given:
            self.qmin, self.qmax = grid_of_bitwidth(int(given["bitwidth"]), self._symmetric)
        else:
            self.qmin, self.qmax = int(given["qmin"]), int(given["qmax"])
        if self.qmin >= self.qmax:
            raise ValueError(f"qmin: expected less than qmax = {self.qmax}, got {self.qmin}")
        self.block_size = check_block_size(given["block_size"], self.shape)
        self.zero_point_shift = _check_zero_point_shift(given["zero_point_shift"])

        analyzer = given["encoding_analyzer"]
        if analyzer is None:
            analyzer = MinMaxEncodingAnalyzer(self.shape, self.block_size)
        elif not isinstance(analyzer, EncodingAnalyzer):
            raise TypeError(f"encoding_analyzer: expected an EncodingAnalyzer, got {analyzer!r}")
        elif tuple(analyzer.observer.shape) != self.shape:
            raise RuntimeError(
                f"encoding_analyzer: expected one of shape {self.shape}, got "
                f"{tuple(analyzer.observer.shape)}"
            )
        self.encoding_analyzer = analyzer

        self.register_quantization_parameter("min", nn.Parameter(torch.full(self.shape, _NAN)))
        self.register_quantization_parameter("max", nn.Parameter(torch.full(self.shape, _NAN)))

    # -- grid --------------------------------------------------------------------------------------

    @property
    def symmetric(self) -> bool:
        """Whether the grid is symmetric about zero."""
        return self._symmetric

    @symmetric.setter
    def symmetric(self, symmetric: bool) -> None:
        self._symmetric = bool(symmetric)

    @property
    def bitwidth(self) -> int:
        """Number of bits, for grids that are all of an integer type. Setting it keeps the
        signedness.

        :raises RuntimeError: the grid is not all of an integer type
        """
        return self._bitwidth

    @bitwidth.setter
    def bitwidth(self, bitwidth: int) -> None:
        _, signed = self._integer_kind("bitwidth")
        self.qmin, self.qmax = grid_of_bitwidth(bitwidth, signed)

    @property
    def signed(self) -> bool:
        """Whether the grid is that of a signed integer type. Setting it keeps the bit-width.

        :raises RuntimeError: the grid is not all of an integer type
        """
        return self._signed

    @signed.setter
    def signed(self, signed: bool) -> None:
        bitwidth, _ = self._integer_kind("signed")
        self.qmin, self.qmax = grid_of_bitwidth(bitwidth, bool(signed))

    # -- range -------------------------------------------------------------------------------------

    def set_range(self, min: torch.Tensor | float, max: torch.Tensor | float) -> None:
        """Set the range, in place and whatever :meth:`allow_overwrite` says.

        :param min, max: numbers, or tensors that broadcast to the encoding shape; no NaN
        :raises RuntimeError: a shape does not broadcast
        :raises ValueError: NaN
        """
        with torch.no_grad():
            ends = []
            for name, value, param in (("min", min, self.min), ("max", max, self.max)):
                value = _as_plain(torch.as_tensor(value)).to(param.device, param.dtype)
                try:
                    value = value.expand(param.shape)
                except RuntimeError:
                    raise RuntimeError(
                        f"set_range: {name}: expected a shape that broadcasts to "
                        f"{tuple(param.shape)}, "
                        f"got {tuple(value.shape)}"
                    ) from None
                if not value.is_meta and bool(value.isnan().any()):
                    raise ValueError(f"set_range: {name}: expected numbers, got NaN")
                ends.append(value)
            self.min.copy_(ends[0])
            self.max.copy_(ends[1])
        self._ready = True

    def _scale_and_offset(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _ops.range_to_scale_offset(self.min, self.max, self.qmin, self.qmax, self._symmetric)

    def get_scale(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Step of the grid in the encoding shape, or ``None`` before initialization.

        :param dtype: result's dtype; float32 by default
        """
        if not self.is_initialized():
            return None
        return self._scale_and_offset()[0].to(dtype or torch.float32)

    def get_offset(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Minus the grid index of zero, in the encoding shape, or ``None`` before initialization.

        :param dtype: result's dtype; float32 by default
        """
        if not self.is_initialized():
            return None
        return self._scale_and_offset()[1].to(dtype or torch.float32)

    def _end(self, index: int, dtype: torch.dtype | None) -> torch.Tensor | None:
        scale, offset = self.get_scale(dtype), self.get_offset(dtype)
        if scale is None or offset is None:
            return None
        return (offset + index + self.zero_point_shift) * scale

    def get_min(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Smallest value on the grid, ``(qmin + offset + zero_point_shift) * scale``; ``None``
        before initialization.

        :param dtype: result's dtype; float32 by default
        """
        return self._end(self.qmin, dtype)

    def get_max(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Largest value on the grid, ``(qmax + offset + zero_point_shift) * scale``; ``None``
        before initialization.

        :param dtype: result's dtype; float32 by default
        """
        return self._end(self.qmax, dtype)

    # -- forward -----------------------------------------------------------------------------------

    def _observe(self, input: torch.Tensor) -> Any:
        """Take the data into the statistics; return the statistics of this input alone (``None``:
        it is empty).
        """
        assert self.encoding_analyzer is not None
        if not input.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: input: expected a floating-point tensor, got {input.dtype}"
            )
        with torch.no_grad():
            if input.numel() == 0:
                return None
            return self.encoding_analyzer.update_stats(input.detach())

    def _calibration_steps(self) -> int:
        """Number of steps that calibration spreads the data over.

        A shifted grid has no zero: half a step lies beyond the outermost values at either end.
        """
        return max(self._num_steps() - (1 if self.zero_point_shift else 0), 1)

    @torch.no_grad()
    def _apply_statistics(self) -> None:
        assert self.encoding_analyzer is not None
        try:
            low, high = self.encoding_analyzer.compute_encodings(
                self._calibration_steps(), is_symmetric=self._symmetric
            )
        except StatisticsNotFoundError:
            return
        for name, param, value in (("min", self.min, low), ("max", self.max, high)):
            if self._is_overwrite_allowed[name]:
                param.copy_(value.reshape(param.shape))
        # Data with NaN gives a range of NaN, which then is the result and not a lack of one.
        self._ready = all(self._is_overwrite_allowed[name] for name in ("min", "max"))

    def _dynamic_range(self, input: torch.Tensor, stats: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.encoding_analyzer is not None
        if stats is None:
            zero = torch.zeros(self.shape, dtype=input.dtype, device=input.device)
            return zero, zero
        low, high = self.encoding_analyzer.compute_encodings_from_stats(
            stats, self._calibration_steps(), is_symmetric=self._symmetric
        )
        return low.reshape(self.shape), high.reshape(self.shape)

    @abstractmethod
    def _kernel(self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The quantizer's map for a given range."""

    @abstractmethod
    def _wrap(
        self, output: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> QuantizedTensorBase:
        """A fresh plain tensor as one that knows its encoding."""

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(min, max)``, initialized."""
        if not self._ready and not self.is_initialized():
            self._raise_uninitialized()
        parameters: Any = self._parameters
        try:
            return parameters["min"], parameters["max"]
        except KeyError:
            # Replicas and parametrized modules keep their parameters elsewhere, a slower look-up
            # away.
            return self.min, self.max

    def _scale_gradients(
        self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same range, with less of the gradient passed on (:attr:`gradient_scaling`)."""
        count = max(input.numel() // max(low.numel(), 1), 1)
        factor = 1 / math.sqrt(count * max(self.qmax, 1))
        # From a value to itself: the value stays, the gradient is multiplied.
        return torch.lerp(low.detach(), low, factor), torch.lerp(high.detach(), high, factor)

    def _has_nothing_to_do(self, input: torch.Tensor) -> bool:
        """Whether ``input`` is the result without a range: calibration never came here, or there
        are no values (a detector that found nothing, neither now nor in calibration).
        """
        return self._is_idle() or not input.numel() and not self.is_initialized()

    def _forward_tensor(self, input: torch.Tensor) -> torch.Tensor:
        if self._calibrating:
            input = _as_plain(input)
            self._observe(input)
            return input
        if not self._ready and self._has_nothing_to_do(input):
            return _as_plain(input)
        low, high = self._range()
        if isinstance(input, QuantizedTensorBase):
            input = input.as_subclass(torch.Tensor)
        if self.gradient_scaling:
            low, high = self._scale_gradients(input, low, high)
        return self._kernel(input, low, high)

    def forward(self, input: torch.Tensor) -> Any:
        """Quantize a tensor.

        While calibrating (:meth:`compute_encodings`) the input is observed and quantized with its
        own range.

        :param input: floating-point tensor of a shape that the encoding shape (and block size) fits
        :return: a tensor of the same shape and dtype that knows its encoding; a plain tensor under
            ``torch.jit``, ``torch.compile`` and ``torch.export``; ``input`` if the calibration of
            the simulation that the quantizer is in never came here
        :raises RuntimeError: no range has been set yet, or the shape does not fit
        :raises TypeError: not a floating-point tensor
        """
        if self._calibrating:
            if self._pass_through:
                self._forward_tensor(input)
                return input
            input = _as_plain(input)
            low, high = self._dynamic_range(input, self._observe(input))
        else:
            if not self._ready and self._is_idle():
                return input
            low, high = self._range()
            if isinstance(input, QuantizedTensorBase):
                input = input.as_subclass(torch.Tensor)
            if self.gradient_scaling:
                low, high = self._scale_gradients(input, low, high)
        output = self._kernel(input, low, high)
        if _is_compiling() or _is_tracing() is not None:
            return output
        return self._wrap(output, low, high)

    # -- encodings ---------------------------------------------------------------------------------

    def _encoding_of_range(self, low: torch.Tensor, high: torch.Tensor) -> AffineEncoding:
        scale, offset = _ops.range_to_scale_offset(low, high, self.qmin, self.qmax, self._symmetric)
        return AffineEncoding(
            scale.to(torch.float32),
            offset.to(torch.float32),
            self.qmin,
            self.qmax,
            self._symmetric,
            self.block_size,
            self.zero_point_shift,
            producer=self,
        )

    def get_encodings(self) -> AffineEncoding | None:
        """The grid as an :class:`AffineEncoding`, or ``None`` before initialization."""
        return self._encoding_of_range(self.min, self.max) if self.is_initialized() else None

    @classmethod
    def from_encodings(cls: type[_Self], encodings: EncodingBase) -> _Self:
        """A quantizer with the grid and range of ``encodings``.

        :raises TypeError: not an :class:`AffineEncoding`
        """
        if not isinstance(encodings, AffineEncoding):
            raise TypeError(f"encodings: expected an AffineEncoding, got {encodings!r}")
        quantizer = cls(  # type: ignore[abstract]
            tuple(encodings.scale.shape),
            encodings.qmin,
            encodings.qmax,
            encodings.symmetry,
            block_size=encodings.block_size,
            zero_point_shift=encodings.zero_point_shift,
        )
        quantizer.to(encodings.scale.device)
        quantizer.set_range(encodings.min, encodings.max)
        return quantizer

    def set_encodings(self, encodings: EncodingBase) -> None:
        """Take over the grid and range of ``encodings``; the encoding shape has to be this
        quantizer's.

        :raises TypeError: not an :class:`AffineEncoding`
        :raises ValueError: another encoding shape
        """
        if not isinstance(encodings, AffineEncoding):
            raise TypeError(f"encodings: expected an AffineEncoding, got {encodings!r}")
        if tuple(encodings.scale.shape) != self.shape:
            raise ValueError(
                f"encodings: expected scales of shape {self.shape}, got "
                f"{tuple(encodings.scale.shape)}"
            )
        self.qmin, self.qmax = encodings.qmin, encodings.qmax
        self._symmetric = bool(encodings.symmetry)
        self.block_size = encodings.block_size
        self.zero_point_shift = encodings.zero_point_shift
        self.set_range(encodings.min, encodings.max)

    def get_legacy_encodings(self) -> list[dict[str, Any]] | None:
        """The grid in the form of an encodings file of version 0.6.1, one dict per scale; ``None``
        before initialization.
        """
        encodings = self.get_encodings()
        if encodings is None:
            return None
        legacy = encodings._to_legacy()
        return legacy

    def set_legacy_encodings(self, encodings: list[dict[str, Any]]) -> None:
        """Take over grid and range from the form of an encodings file of version 0.6.1.

        :param encodings: one dict per scale, with ``bitwidth``, ``is_symmetric`` and ``min``,
            ``max``
        :raises TypeError: not a list of dicts
        :raises ValueError: not as many as scales, entries that disagree, or not of an integer grid
        """
        entries = _check_legacy(encodings, math.prod(self.shape))
        bitwidth, symmetric = int(entries[0]["bitwidth"]), _as_bool(entries[0]["is_symmetric"])
        low = torch.tensor([float(entry["min"]) for entry in entries]).reshape(self.shape)
        high = torch.tensor([float(entry["max"]) for entry in entries]).reshape(self.shape)
        # Legacy encodings say nothing of signedness; a symmetric grid is signed, as when a
        # quantizer is made.
        self.qmin, self.qmax = grid_of_bitwidth(bitwidth, symmetric)
        self._symmetric = symmetric
        self.set_range(low, high)

    # -- state -------------------------------------------------------------------------------------

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ) -> Any:
        """Load range and grid; without ``_extra_state``, the range alone."""
        return super().load_state_dict(state_dict, strict, **kwargs)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Which parameters are initialized, and the grid: qmin, qmax, symmetric, block_size,
        zero_point_shift.
        """
        return {
            **super().get_extra_state(),
            "qmin": torch.tensor(self.qmin),
            "qmax": torch.tensor(self.qmax),
            "symmetric": torch.tensor(self._symmetric),
            "block_size": torch.tensor(self.block_size or []),
            "zero_point_shift": torch.tensor(self.zero_point_shift),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` gives; what is not in ``state`` stays as it is."""
        super().set_extra_state(state)
        if "qmin" in state and "qmax" in state:
            self.qmin, self.qmax = int(state["qmin"]), int(state["qmax"])
        if "symmetric" in state:
            self._symmetric = bool(state["symmetric"])
        if "block_size" in state:
            block_size = tuple(int(size) for size in state["block_size"])
            self.block_size = block_size or None
        if "zero_point_shift" in state:
            self.zero_point_shift = float(state["zero_point_shift"])

    def extra_repr(self) -> str:
        """Grid and shape, for ``repr``."""
        parts = [f"shape={self.shape}"]
        if self.block_size is not None:
            parts.append(f"block_size={self.block_size}")
        parts.append(f"qmin={self.qmin}, qmax={self.qmax}, symmetric={self._symmetric}")
        if self.zero_point_shift:
            parts.append(f"zero_point_shift={self.zero_point_shift}")
        return ", ".join(parts)


def _form_qmin_qmax(
    qmin: int,
    qmax: int,
    symmetric: bool,
    encoding_analyzer: Any = None,
    block_size: Any = None,
    zero_point_shift: Any = None,
) -> None: ...


def _form_bitwidth(
    bitwidth: int,
    symmetric: bool,
    encoding_analyzer: Any = None,
    block_size: Any = None,
    zero_point_shift: Any = None,
) -> None: ...


_GRID_FORMS = (_form_qmin_qmax, _form_bitwidth)


def _as_bool(value: Any) -> bool:
    return value.lower() == "true" if isinstance(value, str) else bool(value)


def _check_legacy(encodings: Any, count: int) -> list[dict[str, Any]]:
    if not isinstance(encodings, (list, tuple)) or not all(
        isinstance(entry, Mapping) for entry in encodings
    ):
        raise TypeError(f"encodings: expected a list of dicts, got {encodings!r}")
    if len(encodings) != count:
        raise ValueError(f"encodings: expected {count} entries, got {len(encodings)}")
    for index, entry in enumerate(encodings):
        for key in ("bitwidth", "is_symmetric", "min", "max"):
            if key not in entry:
                raise ValueError(f"encodings[{index}]: expected the key {key!r}, got {list(entry)}")
        if entry.get("dtype", "int") != "int":
            raise ValueError(f"encodings[{index}]: expected dtype 'int', got {entry['dtype']!r}")
        for key in ("bitwidth", "is_symmetric"):
            if entry[key] != encodings[0][key]:
                raise ValueError(
                    f"encodings[{index}]: expected {key} = {encodings[0][key]!r} as in the first "
                    "entry, "
                    f"got {entry[key]!r}"
                )
    return list(encodings)


def _refuse_zero_point_shift(quantizer: AffineQuantizerBase) -> None:
    if quantizer.zero_point_shift:
        raise RuntimeError(
            f"zero_point_shift: {type(quantizer).__name__} supports 0.0 only, "
            f"got {quantizer.zero_point_shift}"
        )


class Quantize(AffineQuantizerBase):
    r"""Maps a tensor to grid indices.

    .. math:: out = clamp(round(input / scale) - offset, qmin, qmax)

    Takes the arguments of :class:`AffineQuantizerBase`. The result has the input's dtype and is a
    :class:`rimet.quantization.QuantizedTensor`; it cannot have a zero point shift.
    """

    def __init__(self, shape: int | Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(shape, *args, **kwargs)
        _refuse_zero_point_shift(self)

    def _kernel(self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, offset = _ops.range_to_scale_offset(low, high, self.qmin, self.qmax, self._symmetric)
        backend = _backends._override or _backends._native
        return backend.quantize(input, scale, offset, self.qmin, self.qmax, self.block_size)

    def _wrap(
        self, output: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> QuantizedTensorBase:
        return QuantizedTensor._adopt(output, self._encoding_of_range(low, high))


class QuantizeDequantize(AffineQuantizerBase):
    r"""Maps a tensor to the nearest values on the grid.

    .. math::
        out = (clamp(round(input / scale) - offset, qmin, qmax) + offset) \cdot scale

    Takes the arguments of :class:`AffineQuantizerBase`. The result has the input's dtype and is a
    :class:`rimet.quantization.DequantizedTensor`. Differentiable in the input (straight-through
    within the grid) and in ``min`` and ``max``.
    """

    def _kernel(self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if _backends._override is None:
            return _ops.quantize_dequantize_range(
                input,
                low,
                high,
                self.qmin,
                self.qmax,
                self._symmetric,
                self.zero_point_shift,
                self.block_size,
            )
        scale, offset = _ops.range_to_scale_offset(low, high, self.qmin, self.qmax, self._symmetric)
        return _backends._override.quantize_dequantize(
            input, scale, offset, self.qmin, self.qmax, self.block_size, self.zero_point_shift
        )

    def _may_overwrite(self) -> bool:
        """Whether :meth:`_overwrite` would do what :meth:`_forward_tensor` does: the kernel alone,
        no gradient, no graph being made, no function transform.
        """
        return not (
            _grad_enabled()
            or self._calibrating
            or _backends._override is not None
            or _is_compiling()
            or _is_tracing() is not None
            or _function_transform() is not None
        )

    def _overwrite(self, input: torch.Tensor) -> torch.Tensor:
        """The quantizer's values, written into the plain tensor they are of."""
        if not self._ready and self._has_nothing_to_do(input):
            return input
        low, high = self._range()
        _ops.quantize_dequantize_range_(
            input,
            low,
            high,
            self.qmin,
            self.qmax,
            self._symmetric,
            self.zero_point_shift,
            self.block_size,
        )
        return input

    def _wrap(
        self, output: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> QuantizedTensorBase:
        return DequantizedTensor._adopt_fresh(output, _RangeOf(self, low, high))


class Dequantize(AffineQuantizerBase):
    r"""Maps grid indices to values.

    .. math:: out = (input + offset) \cdot scale

    Takes the arguments of :class:`AffineQuantizerBase`. The result has the input's dtype and is a
    :class:`rimet.quantization.DequantizedTensor`; it cannot have a zero point shift.
    """

    def __init__(self, shape: int | Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(shape, *args, **kwargs)
        _refuse_zero_point_shift(self)

    def _kernel(self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, offset = _ops.range_to_scale_offset(low, high, self.qmin, self.qmax, self._symmetric)
        backend = _backends._override or _backends._native
        return backend.dequantize(input, scale, offset, self.block_size)

    def _wrap(
        self, output: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> QuantizedTensorBase:
        return DequantizedTensor._adopt(output, self._encoding_of_range(low, high))


class GroupedBlockQuantizeDequantize(QuantizeDequantize):
    r"""Blockwise quantization whose block scales are integer multiples of one scale per group of
    blocks (LPBQ).

    .. math::
        s_{group} = \frac{\max_{group} scale}{2^{decompressed\_bw - bitwidth}}, \quad
        scale' = clamp\left(round\left(\frac{scale}{s_{group}}\right), 1, 2^{decompressed\_bw -
        bitwidth}\right) s_{group}

    with ``scale`` of :class:`AffineQuantizerBase`. Gradients reach ``min`` and ``max`` through both
    levels, with rounding as the identity.

    :param shape: encoding shape
    :param bitwidth: bits of an element
    :param symmetric: has to be ``True``
    :param decompressed_bw: bits of an element times its integer scale, at least ``bitwidth``
    :param encoding_analyzer: what calibration takes the range from
    :param block_size: elements per block, one entry per dimension of ``shape``; ``-1``: whatever
        divides
    :param block_grouping: blocks per group, one entry per dimension of ``shape``; ``-1``: all of
        the axis; 1 by default
    :raises RuntimeError: not symmetric, ``decompressed_bw < bitwidth``, or a grouping that does not
        divide ``shape``
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        bitwidth: int,
        symmetric: bool,
        decompressed_bw: int,
        encoding_analyzer: EncodingAnalyzer[Any] | None = None,
        block_size: Sequence[int] | None = None,
        block_grouping: Sequence[int] | None = None,
    ) -> None:
        super().__init__(shape, bitwidth, symmetric, encoding_analyzer, block_size)
        if not symmetric:
            raise RuntimeError("symmetric: grouped-block quantization is symmetric, got False")
        if decompressed_bw < bitwidth:
            raise RuntimeError(
                f"decompressed_bw: expected at least the bitwidth {bitwidth}, got {decompressed_bw}"
            )
        self.decompressed_bw = int(decompressed_bw)
        grouping = tuple(1 for _ in self.shape) if block_grouping is None else block_grouping
        if not isinstance(grouping, Sequence):
            raise TypeError(f"block_grouping: expected a sequence of ints, got {grouping!r}")
        if len(grouping) != len(self.shape):
            raise RuntimeError(
                f"block_grouping: expected one entry per dimension of shape {self.shape}, got "
                f"{tuple(grouping)}"
            )
        for dim, (size, count) in enumerate(zip(grouping, self.shape, strict=True)):
            if size != -1 and (size < 1 or count % size):
                raise RuntimeError(
                    f"block_grouping[{dim}]: expected -1 or a divisor of {count}, got {size}"
                )
        self.block_grouping = tuple(grouping)

    def _two_level_scale(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(scale', offset, scale per group)``."""
        scale, offset = _ops.range_to_scale_offset(low, high, self.qmin, self.qmax, self._symmetric)
        levels = 2 ** (self.decompressed_bw - self.bitwidth)
        snapped, group_scale = _ops.grouped_block_scale(scale, self.block_grouping, levels)
        return snapped, offset, group_scale

    def get_scale(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Step of the grid in the encoding shape: integer multiples of
        :meth:`get_per_channel_scale`.

        :param dtype: result's dtype; float32 by default
        """
        if not self.is_initialized():
            return None
        return self._two_level_scale(self.min, self.max)[0].to(dtype or torch.float32)

    def get_per_channel_scale(self, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """Scale per group of blocks, or ``None`` before initialization.

        :param dtype: result's dtype; float32 by default
        """
        if not self.is_initialized():
            return None
        return self._two_level_scale(self.min, self.max)[2].to(dtype or torch.float32)

    def _kernel(self, input: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, offset, _ = self._two_level_scale(low, high)
        backend = _backends._override or _backends._native
        return backend.quantize_dequantize(
            input, scale, offset, self.qmin, self.qmax, self.block_size, self.zero_point_shift
        )

    def _encoding_of_range(self, low: torch.Tensor, high: torch.Tensor) -> GroupedBlockEncoding:
        scale, offset, group_scale = self._two_level_scale(low, high)
        return GroupedBlockEncoding(
            scale.to(torch.float32),
            offset.to(torch.float32),
            self.bitwidth,
            signed=self.signed,
            symmetry=self._symmetric,
            block_size=self.block_size,
            block_grouping=self.block_grouping,
            decompressed_bw=self.decompressed_bw,
            per_channel_scale=group_scale.to(torch.float32),
            zero_point_shift=self.zero_point_shift,
            producer=self,
        )

    @classmethod
    def from_encodings(cls, encodings: EncodingBase) -> GroupedBlockQuantizeDequantize:
        """A quantizer with the grid and range of ``encodings``.

        :raises TypeError: not a :class:`GroupedBlockEncoding`
        """
        if not isinstance(encodings, GroupedBlockEncoding):
            raise TypeError(f"encodings: expected a GroupedBlockEncoding, got {encodings!r}")
        quantizer = cls(
            tuple(encodings.scale.shape),
            encodings.bitwidth,
            encodings.symmetry,
            encodings._grouping()[1],
            block_size=encodings.block_size,
            block_grouping=encodings.block_grouping,
        )
        quantizer.to(encodings.scale.device)
        quantizer.set_range(encodings.min, encodings.max)
        return quantizer


@runtime_checkable
class MinMaxQuantizer(Protocol):
    """A quantizer whose grid is parametrized by its range."""

    min: nn.Parameter
    max: nn.Parameter


@runtime_checkable
class ScaleOffsetQuantizer(Protocol):
    """A quantizer whose grid is parametrized by scale and offset."""

    scale: nn.Parameter
    offset: nn.Parameter
