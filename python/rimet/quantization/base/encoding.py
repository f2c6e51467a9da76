"""Base of the value types that describe a quantization grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch

__all__ = ["EncodingBase"]

_Self = TypeVar("_Self", bound="EncodingBase")


class EncodingBase(ABC):
    """A quantization grid: enough to quantize a tensor onto it and to bring it back.

    Encodings are values: no method changes one in place.
    """

    # Shape of the tensor that was, or is to be, quantized. Export needs it to tell a channel axis
    # from a block axis.
    _input_shape_hint: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def mapping(self) -> str:
        """Kind of the map from grid indices to values: ``"affine"`` or ``"float"``."""

    @property
    @abstractmethod
    def granularity(self) -> str | None:
        """``"pertensor"``, ``"perchannel"``, ``"blockwise"`` or ``"unknown"``; ``None`` for scales
        that are no tensors.
        """

    @property
    @abstractmethod
    def bitwidth(self) -> int:
        """Number of bits of one element."""

    @abstractmethod
    def quantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to grid indices, kept in the dtype of ``input``."""

    @abstractmethod
    def dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Grid indices to real values, kept in the dtype of ``input``."""

    def quantize_dequantize(self, input: torch.Tensor) -> torch.Tensor:
        """Real values to the nearest values on the grid."""
        return self.dequantize(self.quantize(input))

    @abstractmethod
    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """The same grid with its tensors on another device or in another floating dtype.

        Takes what :meth:`torch.Tensor.to` takes.

        :raises RuntimeError: the dtype is not a floating one
        """

    @abstractmethod
    def to_qnn_encoding_dict(
        self, encoding_version: str | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The grid as an entry of an encodings file.

        :param encoding_version: ``"0.6.1"``, ``"1.0.0"``, ``"2.0.0"`` or ``"2.1.0"``
        """

    @abstractmethod
    def _map_tensors(self, function: Any) -> None:
        """Replace each tensor of this (fresh) object by ``function`` of it."""

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        # The producing quantizer is a reference, no part of the value; so is an autograd history.
        def duplicate(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone().requires_grad_(tensor.is_leaf and tensor.requires_grad)

        return self._mapped(duplicate)

    def __getstate__(self) -> dict[str, Any]:
        return {**self._detach().__dict__, "producer": None}

    def _mapped(self: _Self, function: Any) -> _Self:
        new: _Self = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._map_tensors(function)
        return new

    def _clone(self: _Self) -> _Self:
        return self._mapped(torch.Tensor.clone)

    def _detach(self: _Self) -> _Self:
        return self._mapped(torch.Tensor.detach)

    def _hint_input_shape(self: _Self, input_shape: tuple[int, ...]) -> _Self:
        """Tell the shape of the quantized tensor, which export of channel and block axes asks for.
        Returns ``self``.
        """
        self._input_shape_hint = tuple(input_shape)
        return self
