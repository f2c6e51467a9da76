"""Functional affine quantization, and the choice of what computes it.

The engine's ops (backend ``"rimet"``) are the default. ``"torch_builtins"`` composes the same
arithmetic of plain torch operators. Others can be added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any, overload

import torch

from rimet.quantization.affine.backends import native as _native
from rimet.quantization.affine.backends import torch_builtins

__all__ = [
    "add_backend",
    "dequantize",
    "get_backend",
    "quantize",
    "quantize_dequantize",
    "set_backend",
]

_DEFAULT = "rimet"
_backends: dict[str, Any] = {_DEFAULT: _native, "torch_builtins": torch_builtins}
# The chosen backend, or None for the engine's ops, which quantizers then call without a detour.
_override: Any = None


class _BackendSwitch:
    """Goes back to the former backend on leaving a ``with`` block."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __enter__(self) -> _BackendSwitch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _override
        _override = self._previous


def set_backend(name: str) -> _BackendSwitch:
    """Choose what computes affine quantization from now on, or for the length of a ``with`` block.

    :param name: ``"rimet"`` (the engine's ops, the default), ``"torch_builtins"``, or one that was
        added
    :return: a context manager whose end brings the former choice back
    :raises RuntimeError: there is no such backend
    """
    global _override
    if name not in _backends:
        raise RuntimeError(f"backend: expected one of {', '.join(_backends)}, got {name!r}")
    switch = _BackendSwitch(_override)
    _override = None if name == _DEFAULT else _backends[name]
    return switch


def get_backend() -> ModuleType:
    """The module that computes affine quantization at present."""
    backend: ModuleType = _native if _override is None else _override
    return backend


def add_backend(name: str, module: Any) -> None:
    """Make a backend known.

    :param name: its name for :func:`set_backend`
    :param module: has ``quantize(tensor, scale, offset, qmin, qmax, block_size)``,
        ``quantize_dequantize(tensor, scale, offset, qmin, qmax, block_size, zero_point_shift)`` and
        ``dequantize(tensor, scale, offset, block_size)``
    :raises RuntimeError: the name is taken
    :raises TypeError: a function is missing
    """
    if name in _backends:
        raise RuntimeError(f"backend: {name!r} exists already")
    for function in ("quantize", "quantize_dequantize", "dequantize"):
        if not callable(getattr(module, function, None)):
            raise TypeError(f"backend {name!r}: expected a function {function}()")
    _backends[name] = module


def _int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    ):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    return int(value)


def _parse(
    function: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int, Sequence[int] | None, float]:
    """``(qmin, qmax, block_size, zero_point_shift)`` from any of the three overloads."""
    names: tuple[str, ...]
    if "num_steps" in kwargs and not args:
        names = ()
    elif (
        "qmin" in kwargs
        or "qmax" in kwargs
        or (len(args) > 1 and isinstance(args[1], (int, float)) and not isinstance(args[1], bool))
    ):
        names = ("qmin", "qmax", "block_size", "zero_point_shift")
    else:
        names = ("bitwidth", "signed", "block_size", "zero_point_shift")
    given = dict(zip(names, args, strict=False))
    repeated = given.keys() & kwargs.keys()
    allowed = {*names, "block_size", "zero_point_shift"} | (
        set() if names else {"num_steps", "signed"}
    )
    unknown = kwargs.keys() - allowed
    if len(args) > len(names) or repeated or unknown:
        wrong = next(iter(repeated or unknown), f"{len(args)} positional arguments")
        raise TypeError(
            f"{function}: got {wrong!r}; expected (tensor, scale, offset, bitwidth, signed=False, "
            "block_size=None), "
            "(tensor, scale, offset, *, num_steps, signed=False, block_size=None) or "
            "(tensor, scale, offset, qmin, qmax, block_size=None)"
        )
    given.update(kwargs)
    if names[:1] == ("qmin",):
        if "qmin" not in given or "qmax" not in given:
            raise TypeError(f"{function}: expected both qmin and qmax")
        qmin, qmax = _int(given["qmin"], "qmin"), _int(given["qmax"], "qmax")
    else:
        signed = bool(given.get("signed", False))
        if names:
            if "bitwidth" not in given:
                raise TypeError(f"{function}: expected bitwidth, num_steps, or qmin and qmax")
            steps = 2 ** max(_int(given["bitwidth"], "bitwidth"), 0) - 1
        else:
            steps = _int(given["num_steps"], "num_steps")
        if steps < 1:
            what = "bitwidth" if names else "num_steps"
            raise ValueError(f"{function}: {what}: expected at least 1, got {given[what]}")
        qmin, qmax = (-math.ceil(steps / 2), math.floor(steps / 2)) if signed else (0, steps)
    if qmin > qmax:
        raise ValueError(f"{function}: qmin: expected at most qmax = {qmax}, got {qmin}")
    block_size = given.get("block_size")
    if block_size is not None and not isinstance(block_size, Sequence):
        raise TypeError(f"{function}: block_size: expected a sequence of ints, got {block_size!r}")
    return qmin, qmax, block_size, float(given.get("zero_point_shift") or 0.0)


@overload
def quantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    bitwidth: int,
    signed: bool = False,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


@overload
def quantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_steps: int,
    signed: bool = False,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


@overload
def quantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


def quantize(
    tensor: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    r"""Map a tensor to grid indices.

    .. math:: out = clamp(round(tensor / scale) - offset, qmin, qmax)

    Rounds half to even. With ``block_size`` :math:`(B_0, \dots)` the element at :math:`(j_0,
    \dots)` has the scale and offset at :math:`(\lfloor j_0 / B_0 \rfloor, \dots)`.

    :param tensor: floating-point tensor
    :param scale: positive; broadcasts against ``tensor``, or has one entry per block
    :param offset: shape of ``scale``; minus torch's zero point
    :param bitwidth, signed: grid of an integer type, or
    :param num_steps: ``qmax - qmin`` of a grid that begins at zero (or is centred, if ``signed``),
        or
    :param qmin, qmax: ends of the grid
    :param block_size: elements per block, one entry per dimension of ``scale``; ``-1``: whatever
        divides
    :return: shape and dtype of ``tensor``
    :raises TypeError: arguments in none of the three forms
    :raises ValueError: an empty grid
    :raises RuntimeError: shapes do not fit, or a ``zero_point_shift`` other than zero
    """
    qmin, qmax, block_size, shift = _parse("quantize", args, kwargs)
    if shift:
        raise RuntimeError(f"quantize: zero_point_shift: expected 0, got {shift}")
    return get_backend().quantize(tensor, scale, offset, qmin, qmax, block_size)  # type: ignore[no-any-return]


@overload
def quantize_dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    bitwidth: int,
    signed: bool = False,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


@overload
def quantize_dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_steps: int,
    signed: bool = False,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


@overload
def quantize_dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float | None = None,
) -> torch.Tensor: ...


def quantize_dequantize(
    tensor: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    r"""Map a tensor to the nearest values on the grid.

    .. math::
        out = (clamp(round(tensor / scale - shift) - offset, qmin, qmax) + offset + shift) \cdot
        scale

    Differentiable in ``tensor`` (straight-through within the grid, zero outside), ``scale`` and
    ``offset``. ``zero_point_shift`` is the shift, 0.0 or 0.5; for all else see :func:`quantize`.
    """
    qmin, qmax, block_size, shift = _parse("quantize_dequantize", args, kwargs)
    return get_backend().quantize_dequantize(  # type: ignore[no-any-return]
        tensor, scale, offset, qmin, qmax, block_size, shift
    )


def dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    r"""Map grid indices to values.

    .. math:: out = (tensor + offset) \cdot scale

    :param tensor: floating-point tensor of grid indices
    :param scale: positive; broadcasts against ``tensor``, or has one entry per block
    :param offset: shape of ``scale``; minus torch's zero point
    :param block_size: elements per block, one entry per dimension of ``scale``; ``-1``: whatever
        divides
    :return: shape and dtype of ``tensor``
    :raises RuntimeError: shapes do not fit
    """
    return get_backend().dequantize(tensor, scale, offset, block_size)  # type: ignore[no-any-return]
