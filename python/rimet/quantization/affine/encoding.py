"""Affine encodings: scale, offset and integer grid as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from rimet.common.quantsim import VALID_ENCODING_VERSIONS
from rimet.quantization.affine import backends as _backends
from rimet.quantization.affine._grid import AffineGrid, bind_grid_arguments, grid_of_bitwidth
from rimet.quantization.base import EncodingBase

if TYPE_CHECKING:
    from rimet.quantization.affine.quantizer import AffineQuantizerBase

__all__ = ["AffineEncoding", "GroupedBlockEncoding", "VectorEncoding"]

_Self = TypeVar("_Self", bound="AffineEncoding")

_INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_encoding_version(version: str | None) -> str:
    """The version, if it is one of an encodings file.

    :raises ValueError: it is not
    """
    if version not in VALID_ENCODING_VERSIONS:
        raise ValueError(
            f"encoding_version: expected one of {', '.join(VALID_ENCODING_VERSIONS)}, got "
            f"{version!r}"
        )
    return version


def target_dtype(*args: Any, **kwargs: Any) -> torch.dtype | None:
    """The dtype that ``Tensor.to(*args, **kwargs)`` would cast to, if it says one; a floating one.

    :raises RuntimeError: a dtype that is not floating
    """
    dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
    if dtype is not None and not dtype.is_floating_point:
        raise RuntimeError(f"encodings are kept in floating dtypes; expected one, got {dtype}")
    return dtype


def granularity_of(scale: Any, block_size: Sequence[int] | None) -> str | None:
    """How many elements share a scale: ``pertensor``, ``perchannel``, ``blockwise`` or
    ``unknown``.
    """
    if not isinstance(scale, torch.Tensor):
        return None
    if block_size is not None and scale.dim() > 0:
        return "blockwise"
    if scale.dim() == 0:
        return "pertensor"
    return "perchannel" if sum(dim > 1 for dim in scale.shape) <= 1 else "unknown"


def channel_and_block_axes(
    shape: Sequence[int], block_size: Sequence[int] | None, input_shape: Sequence[int] | None
) -> tuple[int | None, int | None, int | None]:
    """``(channel axis, block axis, block size)`` of a scale, axes counted from the back.

    :raises RuntimeError: more than one axis of a kind, blocks without channels, or a block size of
        ``-1`` and no hint
    :raises ValueError: the hinted input has fewer dimensions than the scale
    """
    ndim = len(shape)
    if input_shape is not None and len(input_shape) < ndim:
        raise ValueError(
            f"input shape: expected at least the {ndim} dimensions of the scale, got "
            f"{tuple(input_shape)}"
        )
    trailing = None if input_shape is None else tuple(input_shape)[len(input_shape) - ndim :]
    channels: list[tuple[int, int]] = []
    blocks: list[tuple[int, int]] = []
    for axis, dim in enumerate(shape):
        if dim == 1:
            continue
        size = 1 if block_size is None else block_size[axis]
        if size == -1:
            if trailing is None:
                raise RuntimeError(
                    "block_size -1 stands for the rest of an axis: call _hint_input_shape() first"
                )
            size = trailing[axis] // dim
        (channels if size == 1 else blocks).append((axis - ndim, size))
    if len(blocks) > 1:
        raise RuntimeError(f"expected at most one block axis, got axes {[a for a, _ in blocks]}")
    if len(channels) > 1:
        raise RuntimeError(
            f"expected at most one channel axis, got axes {[a for a, _ in channels]}"
        )
    if blocks and not channels:
        raise RuntimeError(f"block axis {blocks[0][0]} goes without a channel axis")
    channel = channels[0][0] if channels else None
    return (channel, *blocks[0]) if blocks else (channel, None, None)


def to_list(values: torch.Tensor) -> Any:
    """A tensor as (nested lists of) Python numbers."""
    return values.detach().cpu().tolist()


def _form_qmin_qmax(
    qmin: int,
    qmax: int,
    symmetry: bool = False,
    block_size: Any = None,
    zero_point_shift: Any = None,
    *,
    producer: Any = None,
) -> None: ...


def _form_bitwidth(
    bitwidth: int,
    signed: bool = False,
    symmetry: bool = False,
    block_size: Any = None,
    zero_point_shift: Any = None,
    *,
    producer: Any = None,
) -> None: ...


_FORMS = (_form_qmin_qmax, _form_bitwidth)


class AffineEncoding(EncodingBase, AffineGrid):
    r"""An integer grid ``[qmin, qmax]`` with scale and offset.

    .. math::
        x_{int} = clamp(round(x / scale) - offset, qmin, qmax), \quad x = (x_{int} + offset) \cdot
        scale

    :param scale: floating-point tensor in the encoding shape, positive
    :param offset: tensor in the encoding shape; minus torch's and ONNX's zero point
    :param qmin, qmax: ends of the grid
    :param bitwidth, signed: instead of ``qmin`` and ``qmax``: all of an integer type
    :param symmetry: whether the grid is meant to be symmetric about zero
    :param block_size: elements per block, one entry per dimension of ``scale``; ``-1``: whatever
        divides
    :param zero_point_shift: 0.0 or 0.5, added to the offset when values are computed
    :param producer: the quantizer this comes from
    :raises TypeError: arguments in none of the two forms
    """

    scale: torch.Tensor
    offset: torch.Tensor
    block_size: tuple[int, ...] | None
    producer: AffineQuantizerBase | None

    @overload
    def __init__(
        self,
        scale: torch.Tensor,
        offset: torch.Tensor,
        qmin: int,
        qmax: int,
        symmetry: bool = False,
        block_size: Sequence[int] | None = None,
        zero_point_shift: float | None = None,
        *,
        producer: AffineQuantizerBase | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        scale: torch.Tensor,
        offset: torch.Tensor,
        bitwidth: int,
        signed: bool = False,
        symmetry: bool = False,
        block_size: Sequence[int] | None = None,
        zero_point_shift: float | None = None,
        *,
        producer: AffineQuantizerBase | None = None,
    ) -> None: ...

    def __init__(
        self, scale: torch.Tensor, offset: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        given = bind_grid_arguments(type(self).__name__, _FORMS, args, kwargs)
        if "bitwidth" in given:
            given["qmin"], given["qmax"] = grid_of_bitwidth(int(given["bitwidth"]), given["signed"])
        if given["qmin"] >= given["qmax"]:
            raise ValueError(
                f"qmin: expected less than qmax = {given['qmax']}, got {given['qmin']}"
            )
        self.scale = scale
        self.offset = offset
        self.qmin: int = int(given["qmin"])
        self.qmax: int = int(given["qmax"])
        self._symmetry: bool = given["symmetry"]
        self.block_size = None if given["block_size"] is None else tuple(given["block_size"])
        shift = given["zero_point_shift"]
        self._zero_point_shift = 0.0 if shift is None else float(shift)
        self.producer = given["producer"]

    # -- what it says of itself --------------------------------------------------------------------

    @property
    def mapping(self) -> str:
        """``"affine"``."""
        return "affine"

    @property
    def granularity(self) -> str | None:
        """``"pertensor"``, ``"perchannel"``, ``"blockwise"`` or ``"unknown"``; ``None`` for scales
        that are no tensors.
        """
        return granularity_of(self.scale, self.block_size)

    @property
    def min(self) -> torch.Tensor:
        """Value of ``qmin``, without the zero point shift: ``(qmin + offset) * scale``."""
        return self.scale * (self.offset + self.qmin)

    @property
    def max(self) -> torch.Tensor:
        """Value of ``qmax``, without the zero point shift: ``(qmax + offset) * scale``."""
        return self.scale * (self.offset + self.qmax)

    @property
    def num_steps(self) -> int:
        """``qmax - qmin``."""
        return self._num_steps()

    @property
    def symmetry(self) -> bool:
        """Whether the grid is meant to be symmetric about zero."""
        return self._symmetry

    @property
    def zero_point_shift(self) -> float:
        """0.0 or 0.5."""
        return self._zero_point_shift

    @property
    def bitwidth(self) -> int:
        """Number of bits, for grids that are all of an integer type (else RuntimeError)."""
        return self._bitwidth

    @property
    def signed(self) -> bool:
        """Whether the grid is that of a signed integer type (RuntimeError if it is all of none)."""
        return self._signed

    @property
    def dtype(self) -> torch.dtype:
        """Smallest integer dtype of torch that holds the grid."""
        for dtype in _INT_DTYPES:
            info = torch.iinfo(dtype)
            if info.min <= self.qmin and self.qmax <= info.max:
                return dtype
        raise RuntimeError(f"no integer dtype holds the grid [{self.qmin}, {self.qmax}]")

    def __repr__(self) -> str:
        parts = [f"qmin={self.qmin}, qmax={self.qmax}, symmetry={self._symmetry}"]
        if isinstance(self.scale, torch.Tensor):
            parts.insert(0, f"shape={tuple(self.scale.shape)}")
        if self.block_size is not None:
            parts.append(f"block_size={self.block_size}")
        if self._zero_point_shift:
            parts.append(f"zero_point_shift={self._zero_point_shift}")
        return f"{type(self).__name__}({', '.join(parts)})"

    # -- use ---------------------------------------------------------------------------------------

    def quantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to grid indices, in the dtype of ``input``.

        :raises RuntimeError: the encoding has a zero point shift, or its shape does not fit
        """
        return _backends.quantize(
            input,
            self.scale,
            self.offset,
            self.qmin,
            self.qmax,
            self.block_size,
            zero_point_shift=self._zero_point_shift,
        )

    def dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Grid indices to real values, in the dtype of ``input``."""
        offset = self.offset + self._zero_point_shift if self._zero_point_shift else self.offset
        return _backends.dequantize(input, self.scale, offset, self.block_size)

    def quantize_dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to the nearest values on the grid, in the dtype of ``input``."""
        return _backends.quantize_dequantize(
            input,
            self.scale,
            self.offset,
            self.qmin,
            self.qmax,
            self.block_size,
            zero_point_shift=self._zero_point_shift,
        )

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.scale = function(self.scale)
        self.offset = function(self.offset)

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """The same grid with its tensors on another device or in another floating dtype.

        :raises RuntimeError: the dtype is not a floating one
        """
        target_dtype(*args, **kwargs)
        return self._mapped(lambda tensor: tensor.to(*args, **kwargs))

    def _scaled(self: _Self, factor: float) -> _Self | None:
        """The grid with every value multiplied by ``factor``; ``None`` if that is none on the same
        integers.

        A negative factor mirrors the grid, which moves the offset to that of the other end.
        """
        if factor < 0 and (self._symmetry or self._zero_point_shift):
            return None
        new = self._clone()
        new.scale = self.scale * abs(factor)
        if factor < 0:
            new.offset = -self.offset - (self.qmin + self.qmax)
        return new

    # -- files -------------------------------------------------------------------------------------

    def to_qnn_encoding_dict(
        self, encoding_version: str | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The grid as an entry of an encodings file.

        :param encoding_version: ``"0.6.1"`` (a list of dicts), ``"1.0.0"``, ``"2.0.0"`` or
            ``"2.1.0"`` (a dict)
        :raises ValueError: another version
        :raises RuntimeError: the version cannot express the granularity, or an axis cannot be told
        """
        version = check_encoding_version(encoding_version)
        if version == "0.6.1":
            return self._to_legacy()
        if version == "1.0.0":
            return self._to_version_1()
        return self._to_version_2(version)

    def _unsigned_offset(self) -> torch.Tensor:
        """The offset as it would be if the grid began at zero, as files before 2.0.0 have it."""
        return (self.offset.detach() + self.qmin).to(torch.int64)

    def _to_legacy(self) -> list[dict[str, Any]]:
        bitwidth = self.bitwidth
        columns = zip(
            self.min.detach().flatten().tolist(),
            self.max.detach().flatten().tolist(),
            self.scale.detach().flatten().tolist(),
            self._unsigned_offset().flatten().tolist(),
            strict=True,
        )
        extra: dict[str, Any] = {}
        if self._zero_point_shift:
            extra["zero_point_shift"] = self._zero_point_shift
        return [
            {
                "min": low,
                "max": high,
                "scale": scale,
                "offset": offset,
                "bitwidth": bitwidth,
                "dtype": "int",
                "is_symmetric": str(self._symmetry),
                **extra,
                **self._vector_properties(),
            }
            for low, high, scale, offset in columns
        ]

    def _vector_properties(self) -> dict[str, Any]:
        return {}

    def _to_version_1(self) -> dict[str, Any]:
        granularity = self.granularity
        entry: dict[str, Any] = {
            "dtype": "INT",
            "bw": self.bitwidth,
            "is_sym": self._symmetry,
            "scale": self.scale.detach().flatten().tolist(),
            "offset": self._unsigned_offset().flatten().tolist(),
        }
        if granularity == "pertensor":
            entry["enc_type"] = "PER_TENSOR"
        elif granularity == "perchannel":
            entry["enc_type"] = "PER_CHANNEL"
        elif granularity == "blockwise":
            _, axis, size = channel_and_block_axes(
                self.scale.shape, self.block_size, self._input_shape_hint
            )
            if axis is None:
                # Every block is a whole axis: scales per channel, or one for all.
                entry["enc_type"] = "PER_CHANNEL" if self.scale.numel() > 1 else "PER_TENSOR"
            else:
                entry["enc_type"] = "PER_BLOCK"
                entry["block_size"] = size
        else:
            raise RuntimeError(
                "encodings of version 1.0.0 have scales per tensor, channel or block; got scales "
                "of shape "
                f"{tuple(self.scale.shape)} without a block size"
            )
        if self._zero_point_shift:
            entry["zero_point_shift"] = [self._zero_point_shift] * self.scale.numel()
        return entry

    def _output_dtype(self) -> str:
        bits = max(math.ceil(math.log2(self.num_steps + 1)), 1)
        return f"{'int' if self.qmin < 0 else 'uint'}{bits}"

    def _to_version_2(self, version: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"output_dtype": self._output_dtype()}
        channel, block, size = channel_and_block_axes(
            self.scale.shape, self.block_size, self._input_shape_hint
        )
        scale = self.scale.detach()
        zero_point = -(self.offset.detach() + self._zero_point_shift)
        if not self._zero_point_shift:
            zero_point = zero_point.to(torch.int64)
        if block is None:
            shape = () if channel is None else (-1,)
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        entry["y_scale"] = to_list(scale)
        if bool(zero_point.any()):
            entry["y_zero_point"] = to_list(zero_point)
        if block is not None:
            entry["axis"] = block
            entry["block_size"] = size
        elif channel is not None:
            entry["axis"] = channel
        return entry


class GroupedBlockEncoding(AffineEncoding):
    r"""A blockwise grid whose scales are integer multiples of a scale per group of blocks (LPBQ).

    .. math::
        scale = s_{int} \cdot s_{group}, \quad s_{int} \in \{1, \dots, 2^{decompressed\_bw -
        bitwidth}\}

    :param block_grouping: blocks per group, one entry per dimension of ``scale``; ``-1``: all of an
        axis
    :param decompressed_bw: bit-width of ``x_int * s_int``
    :param per_channel_scale: scale per group
    """

    def __init__(
        self,
        scale: torch.Tensor,
        offset: torch.Tensor,
        bitwidth: int,
        signed: bool = False,
        symmetry: bool = False,
        block_size: Sequence[int] | None = None,
        block_grouping: Sequence[int] | None = None,
        decompressed_bw: int | None = None,
        per_channel_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale, offset, bitwidth, signed, symmetry, block_size, **kwargs)
        self.block_grouping = None if block_grouping is None else tuple(block_grouping)
        self.decompressed_bw = decompressed_bw
        self.per_channel_scale = per_channel_scale

    def _scaled(self, factor: float) -> GroupedBlockEncoding | None:
        new = super()._scaled(factor)
        if new is not None and new.per_channel_scale is not None:
            new.per_channel_scale = new.per_channel_scale * abs(factor)
        return new

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_tensors(function)
        if self.per_channel_scale is not None:
            self.per_channel_scale = function(self.per_channel_scale)

    def _grouping(self) -> tuple[torch.Tensor, int]:
        if self.per_channel_scale is None or self.decompressed_bw is None:
            raise RuntimeError(
                "a grouped-block encoding needs per_channel_scale and decompressed_bw to be split "
                "in two levels"
            )
        return self.per_channel_scale, self.decompressed_bw

    @property
    def per_block_int_scale(self) -> torch.Tensor:
        """Integer scale of each block, in the encoding shape.

        :raises RuntimeError: made without ``per_channel_scale`` or ``decompressed_bw``
        """
        group_scale, decompressed_bw = self._grouping()
        expanded = group_scale
        for axis, (dim, groups) in enumerate(zip(self.scale.shape, group_scale.shape, strict=True)):
            expanded = expanded.repeat_interleave(dim // groups, axis)
        levels = 2 ** (decompressed_bw - self.bitwidth)
        return torch.round(self.scale / expanded).clamp(1, levels)

    @property
    def _is_plain(self) -> bool:
        """Whether every block is a group: then nothing is gained by two levels, and files say
        PER_BLOCK.
        """
        return self.block_grouping is None or all(size == 1 for size in self.block_grouping)

    def _to_version_1(self) -> dict[str, Any]:
        if self._is_plain:
            return super()._to_version_1()
        group_scale, decompressed_bw = self._grouping()
        _, axis, size = channel_and_block_axes(
            self.scale.shape, self.block_size, self._input_shape_hint
        )
        if axis is None:
            size = self._only_block_size()
        return {
            "dtype": "INT",
            "bw": decompressed_bw,
            "is_sym": self._symmetry,
            "scale": to_list(group_scale.flatten()),
            "offset": [-(2 ** (decompressed_bw - 1))] * group_scale.numel(),
            "enc_type": "LPBQ",
            "block_size": size,
            "compressed_bw": self.bitwidth,
            "per_block_int_scale": to_list(self.per_block_int_scale.flatten().to(torch.int64)),
        }

    def _only_block_size(self) -> int:
        """Size of the blocks where each is a whole axis."""
        sizes = [size for size in self.block_size or () if size != 1]
        if len(sizes) != 1 or sizes[0] == -1:
            raise RuntimeError(
                f"the block axis of scales of shape {tuple(self.scale.shape)} with block size "
                f"{self.block_size} "
                "cannot be told"
            )
        return sizes[0]

    def _to_version_2(self, version: str) -> dict[str, Any]:
        if self._is_plain:
            return super()._to_version_2(version)
        group_scale, _ = self._grouping()
        channel, block, size = channel_and_block_axes(
            self.scale.shape, self.block_size, self._input_shape_hint
        )
        int_scale = to_list(self.per_block_int_scale.to(torch.int64))
        axes = {"axis": channel} if block is None else {"axis": block, "block_size": size}
        if version == "2.0.0":
            return {
                **axes,
                "per_block_int_scale": int_scale,
                "per_channel_float_scale": to_list(group_scale),
                "output_dtype": self._output_dtype(),
            }
        return {
            "output_dtype": self._output_dtype(),
            "y_scale": {"x": int_scale, "x_scale": to_list(group_scale.flatten()), "axis": channel},
            **axes,
        }


class VectorEncoding(AffineEncoding):
    """Affine scales of a tensor whose values come from a codebook (GPTVQ); a description for
    encodings files.

    :param rows_per_block, cols_per_block: shape of the blocks that share a codebook
    :param vector_dim: elements per codebook entry
    :param vector_stride: distance of a vector's elements along its row
    :param index_bw: bits of a codebook index
    """

    def __init__(
        self,
        scale: torch.Tensor,
        offset: torch.Tensor,
        bitwidth: int,
        signed: bool = False,
        symmetry: bool = False,
        block_size: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        properties = {}
        for name in _VECTOR_PROPERTIES:
            if name not in kwargs:
                raise KeyError(f"VectorEncoding: expected the keyword argument {name!r}")
            properties[name] = kwargs.pop(name)
        super().__init__(scale, offset, bitwidth, signed, symmetry, block_size, **kwargs)
        self.rows_per_block: int = properties["rows_per_block"]
        self.cols_per_block: int = properties["cols_per_block"]
        self.vector_dim: int = properties["vector_dim"]
        self.vector_stride: int = properties["vector_stride"]
        self.index_bw: int = properties["index_bw"]

    def _vector_properties(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _VECTOR_PROPERTIES}

    def _to_version_1(self) -> dict[str, Any]:
        entry = super()._to_version_1()
        return {**entry, "enc_type": "VECTOR", **self._vector_properties()}


_VECTOR_PROPERTIES = (
    "rows_per_block",
    "cols_per_block",
    "vector_dim",
    "vector_stride",
    "index_bw",
)
