"""Tensors that know their quantization grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rimet.quantization.base.encoding import EncodingBase

if TYPE_CHECKING:
    from rimet.quantization.affine.quantizer import AffineQuantizerBase

__all__ = ["DequantizedTensor", "EncodingError", "QuantizedTensor", "QuantizedTensorBase"]

_T = TypeVar("_T", bound="QuantizedTensorBase")

_disable_torch_function = torch._C.DisableTorchFunctionSubclass


class EncodingError(RuntimeError):
    """Raised when a tensor is asked for something that takes an encoding, and has none."""


class _RangeOf:
    """The encoding of a quantizer at its present range, not computed yet.

    The range may change before anybody asks for the encoding, so it is kept by value: as numbers
    where reading them is cheap (one value each, in the CPU's memory, and no gradient to follow), as
    copies otherwise.
    """

    __slots__ = ("high", "low", "quantizer")

    def __init__(
        self, quantizer: AffineQuantizerBase, low: torch.Tensor, high: torch.Tensor
    ) -> None:
        self.quantizer = quantizer
        self.low: float | torch.Tensor
        self.high: float | torch.Tensor
        if low.is_cpu and not low.dim() and not torch.is_grad_enabled():
            self.low, self.high = low.item(), high.item()
        else:
            self.low, self.high = low.clone(), high.clone()

    def resolve(self) -> EncodingBase:
        low, high = (
            end if isinstance(end, torch.Tensor) else torch.tensor(end, dtype=param.dtype)
            for end, param in ((self.low, self.quantizer.min), (self.high, self.quantizer.max))
        )
        return self.quantizer._encoding_of_range(low, high)


def _version(tensor: torch.Tensor) -> int:
    # An inference tensor has no version. It counts as never written to; in-place operators say so
    # themselves.
    return 0 if tensor.is_inference() else tensor._version


class QuantizedTensorBase(torch.Tensor):
    """Base of :class:`QuantizedTensor` and :class:`DequantizedTensor`: a tensor with an
    ``encoding``.

    Operators that only copy, move or cast to another floating dtype keep the encoding; those that
    only pick or rearrange elements keep it if it is per tensor. All others return plain tensors. A
    tensor written to in place has no encoding any more.

    :param encoding: the grid, or ``None``; all other arguments are those of :class:`torch.Tensor`
    """

    _encoding: EncodingBase | _RangeOf | None
    # Version of the tensor that the encoding belongs to.
    _encoded_version: int = 0

    def __new__(
        cls: type[_T], *args: Any, encoding: EncodingBase | None = None, **kwargs: Any
    ) -> _T:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            self = args[0].as_subclass(torch.Tensor).as_subclass(cls)
        else:
            self = super().__new__(cls, *args, **kwargs)
        self.encoding = encoding
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def _adopt(cls: type[_T], tensor: torch.Tensor, encoding: EncodingBase | _RangeOf | None) -> _T:
        """Turn a fresh plain tensor into one of this class, without an alias (and its autograd
        node).
        """
        if type(tensor) is not torch.Tensor:
            return tensor  # type: ignore[return-value]  # fake and functional tensors stay what they are
        version = _version(tensor)
        tensor.__class__ = cls  # type: ignore[assignment]
        fresh: _T = tensor  # type: ignore[assignment]
        fresh._encoding = encoding
        fresh._encoded_version = version
        return fresh

    @classmethod
    def _adopt_fresh(cls: type[_T], tensor: torch.Tensor, encoding: EncodingBase | _RangeOf) -> _T:
        """:meth:`_adopt` for a tensor that nobody has written to yet, as every kernel's output
        is.
        """
        if type(tensor) is not torch.Tensor:
            return tensor  # type: ignore[return-value]
        tensor.__class__ = cls  # type: ignore[assignment]
        tensor._encoding = encoding  # type: ignore[attr-defined]
        return tensor  # type: ignore[return-value]

    @property
    def encoding(self) -> EncodingBase | None:
        """The grid, or ``None`` if it is unknown (or was lost by writing to the tensor)."""
        encoding = self.__dict__.get("_encoding")
        if encoding is None:
            return None
        with _disable_torch_function():
            if _version(self) != self._encoded_version:
                self._encoding = None
                return None
        if isinstance(encoding, _RangeOf):
            encoding = encoding.resolve()
            self._encoding = encoding
        return encoding

    @encoding.setter
    def encoding(self, encoding: EncodingBase | None) -> None:
        if encoding is not None and not isinstance(encoding, EncodingBase):
            raise TypeError(f"encoding: expected an encoding or None, got {encoding!r}")
        with _disable_torch_function():
            self._encoding = encoding
            self._encoded_version = _version(self)

    def _require_encoding(self) -> EncodingBase:
        encoding = self.encoding
        if encoding is None:
            raise EncodingError(
                f"this {type(self).__name__} of shape {tuple(self.shape)} has no encoding: it was "
                "made without one, or "
                "an operator changed its values or regrouped its channels"
            )
        return encoding

    def quantize(self) -> QuantizedTensor:
        """The grid indices, in the dtype of this tensor."""
        raise NotImplementedError

    def dequantize(self) -> DequantizedTensor:
        """The real values, in the dtype of this tensor."""
        raise NotImplementedError

    def quantized_repr(self) -> torch.Tensor:
        """The grid indices as a plain tensor of an integer dtype (for float grids: of the float
        dtype).
        """
        raise NotImplementedError

    def clone(  # type: ignore[override]
        self: _T, *, memory_format: torch.memory_format = torch.preserve_format
    ) -> _T:
        """A copy with a copy of the encoding."""
        encoding = self.encoding
        with _disable_torch_function():
            copy = super().clone(memory_format=memory_format)
        return self._adopt(copy, encoding and encoding._clone())

    def detach(self: _T) -> _T:
        """The tensor and its encoding without their autograd history."""
        encoding = self.encoding
        with _disable_torch_function():
            detached = super().detach()
        return self._adopt(_as_plain(detached), encoding and encoding._detach())

    def new_empty(  # type: ignore[override]
        self: _T,
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
        layout: torch.layout = torch.strided,
        pin_memory: bool = False,
        **kwargs: Any,
    ) -> _T:
        """An uninitialized tensor of this class, without an encoding."""
        with _disable_torch_function():
            new = super().new_empty(
                size,
                dtype=dtype,
                device=device,
                requires_grad=requires_grad,
                layout=layout,
                pin_memory=pin_memory,
                **kwargs,
            )
        return self._adopt(new, None)

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:  # type: ignore[override]
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be deep-copied; detach() first")
        copy = self.detach().clone()
        copy.requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        encoding = self.encoding
        if encoding is not None:
            # The producing quantizer is no part of the value.
            encoding = encoding._detach()
            encoding.producer = None  # type: ignore[attr-defined]
        with _disable_torch_function():
            plain = self.detach().as_subclass(torch.Tensor)
        plain.requires_grad_(self.requires_grad and self.is_leaf)
        return _rebuild, (type(self), plain, encoding)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs)
        with _disable_torch_function():
            out = func(*args, **kwargs)
        if not (args and isinstance(args[0], QuantizedTensorBase)):
            return out
        self = args[0]
        if func in _KEEPS_ANY:
            return _with_encoding(out, self, self.encoding)
        if func in _CASTS:
            if out is self:
                return self
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                return _as_plain(out)
            encoding = self.encoding
            return _with_encoding(out, self, encoding and encoding.to(out.device, out.dtype))
        if func in _KEEPS_PER_TENSOR:
            encoding = self.encoding if out is not self else self._peek()
            per_tensor = encoding is not None and encoding.granularity == "pertensor"
            return _with_encoding(out, self, encoding if per_tensor else None)
        if out is self and getattr(func, "__name__", "").rstrip("_") != getattr(
            func, "__name__", ""
        ):
            self._encoding = None
        return out

    def _peek(self) -> EncodingBase | None:
        """The encoding, whatever has been written since."""
        encoding = self.__dict__.get("_encoding")
        return encoding.resolve() if isinstance(encoding, _RangeOf) else encoding


def _rebuild(
    cls: type[QuantizedTensorBase], tensor: torch.Tensor, encoding: EncodingBase | None
) -> QuantizedTensorBase:
    return cls(tensor, encoding=encoding)


def _as_plain(value: Any) -> Any:
    if isinstance(value, QuantizedTensorBase):
        with _disable_torch_function():
            return value.as_subclass(torch.Tensor)
    return value


def _with_encoding(out: Any, self: QuantizedTensorBase, encoding: EncodingBase | None) -> Any:
    """``out`` (a tensor, or several) as tensors of the class of ``self``."""
    if isinstance(out, (tuple, list)):
        return type(out)(_with_encoding(item, self, encoding) for item in out)
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        return out
    if isinstance(out, QuantizedTensorBase):
        if out is self and encoding is None:
            self._encoding = None
        elif out is self or encoding is not None:
            out.encoding = encoding
        return out
    return type(self)._adopt(out, encoding)


class QuantizedTensor(QuantizedTensorBase):
    """Grid indices, kept in a floating dtype.

    ``dequantize()`` gives the real values, ``quantized_repr()`` the indices in an integer dtype.
    """

    def quantize(self) -> QuantizedTensor:
        """This tensor."""
        return self

    def dequantize(self) -> DequantizedTensor:  # type: ignore[override]
        """The real values.

        :raises EncodingError: without an encoding
        """
        encoding = self._require_encoding()
        return DequantizedTensor._adopt(encoding.dequantize(_as_plain(self)), encoding)

    def quantized_repr(self) -> torch.Tensor:
        """The grid indices in the smallest dtype that holds the grid.

        :raises EncodingError: without an encoding
        """
        encoding = self._require_encoding()
        plain: torch.Tensor = _as_plain(self)
        return plain.to(encoding.dtype)  # type: ignore[attr-defined]


class DequantizedTensor(QuantizedTensorBase):
    """Real values that lie on a grid.

    ``quantize()`` gives the grid indices, ``quantized_repr()`` these in an integer dtype.
    """

    def quantize(self) -> QuantizedTensor:
        """The grid indices.

        :raises EncodingError: without an encoding
        """
        encoding = self._require_encoding()
        return QuantizedTensor._adopt(encoding.quantize(_as_plain(self)), encoding)

    def dequantize(self) -> DequantizedTensor:  # type: ignore[override]
        """This tensor."""
        return self

    def quantized_repr(self) -> torch.Tensor:
        """The grid indices in the smallest dtype that holds the grid.

        :raises EncodingError: without an encoding
        """
        encoding = self._require_encoding()
        plain: torch.Tensor = _as_plain(self)
        # A half-precision float cannot count to the end of a 16-bit grid.
        wide = torch.float64 if getattr(encoding, "bitwidth", 8) > 24 else torch.float32
        wide = torch.promote_types(wide, plain.dtype)
        return encoding.quantize(plain.to(wide)).to(encoding.dtype)  # type: ignore[attr-defined]


# -- which operators keep an encoding --------------------------------------------------------------


def _functions(*names: str) -> set[Any]:
    """Functions of these names in ``torch`` and ``torch.Tensor``; properties by their getters."""
    found: set[Any] = set()
    for name in names:
        for owner in (torch, torch.Tensor):
            function: Any = getattr(owner, name, None)
            if isinstance(function, property) or type(function).__name__ == "getset_descriptor":
                function = function.__get__
            if callable(function):
                found.add(function)
    return found


_KEEPS_ANY = _functions("contiguous", "requires_grad_", "share_memory_", "pin_memory")
_CASTS = _functions(
    "to", "cpu", "cuda", "half", "float", "double", "bfloat16", "type", "type_as",
    "bool", "char", "short", "int", "long", "byte",
)  # fmt: skip
_KEEPS_PER_TENSOR = _functions(
    "     ", "__getitem__", "as_strided", "as_strided_copy", "broadcast_to", "chunk", "dsplit",
    "expand", "expand_as", "expand_copy", "flatten", "flip", "fliplr", "flipud", "gather",
    "hsplit", "index_select", "kthvalue", "masked_select", "mH", "moveaxis", "movedim", "msort",
    "mT", "narrow", "narrow_copy", "permute", "permute_copy", "ravel", "repeat",
    "repeat_interleave", "reshape", "reshape_as", "resize", "resize_", "resize_as",
    "resize_as_", "roll", "rot90", "select", "split", "split_with_sizes", "squeeze", "squeeze_",
    "squeeze_copy", "swapaxes", "swapaxes_", "swapdims", "swapdims_", "t", "T", "t_", "t_copy",
    "take", "take_along_dim", "tensor_split", "tile", "transpose", "transpose_", "unbind",
    "unflatten", "unsqueeze", "unsqueeze_", "unsqueeze_copy", "view", "view_as", "view_copy",
    "vsplit",
)  # fmt: skip
_KEEPS_PER_TENSOR.add(torch.functional.split)


def _scaled(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Multiplication or division by a Python number: the grid scales along, where there is one
    that fits.
    """
    with _disable_torch_function():
        out = func(*args, **kwargs)
    divides = func in _DIVISIONS
    tensor, factor = args[0], kwargs.get("other", args[1] if len(args) > 1 else None)
    if not divides and isinstance(factor, DequantizedTensor):
        tensor, factor = factor, tensor
    if (
        not isinstance(tensor, DequantizedTensor)
        or isinstance(factor, torch.Tensor)
        or not isinstance(factor, (int, float))
        or out is tensor
        or set(kwargs) - {"other"}
    ):
        return out
    encoding = tensor.encoding
    scaled = getattr(encoding, "_scaled", None)
    ratio = float(factor)
    if scaled is None or ratio == 0 or not math.isfinite(ratio):
        return out
    new = scaled((1 / ratio) if divides else ratio)
    return out if new is None else DequantizedTensor._adopt(out, new)


def _embedding(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Look-up of rows of a quantized table: each row brings its scale along."""
    with _disable_torch_function():
        out = func(*args, **kwargs)
    named = dict(zip(("input", "weight"), args, strict=False), **kwargs)
    index, weight = named["input"], named["weight"]
    if not isinstance(weight, QuantizedTensorBase) or type(out) is not torch.Tensor:
        return out
    encoding = weight.encoding
    granularity = None if encoding is None else encoding.granularity
    if granularity == "perchannel" and encoding.scale.shape[0] == weight.shape[0]:  # type: ignore[union-attr]
        encoding = encoding._mapped(lambda tensor: tensor[index])  # type: ignore[union-attr]
    elif granularity != "pertensor":
        return out
    return type(weight)._adopt(out, encoding)


_DIVISIONS = {torch.div, torch.Tensor.div, torch.Tensor.__truediv__}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        [*_DIVISIONS, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__],
        _scaled,
    ),
    torch.nn.functional.embedding: _embedding,
}
