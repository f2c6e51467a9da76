"""Integer grids: argument forms, bit-widths, block geometry. No tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["AffineGrid", "bind_grid_arguments", "check_block_size", "grid_of_bitwidth"]


def grid_of_bitwidth(bitwidth: int, signed: bool) -> tuple[int, int]:
    """``(qmin, qmax)`` of an integer of that many bits."""
    bitwidth = int(bitwidth)
    if bitwidth < 1:
        raise ValueError(f"bitwidth: expected at least 1, got {bitwidth}")
    if signed:
        return -(2 ** (bitwidth - 1)), 2 ** (bitwidth - 1) - 1
    return 0, 2**bitwidth - 1


def check_block_size(
    block_size: Sequence[int] | int | None, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A block size as a tuple with one entry per dimension of ``shape``."""
    if block_size is None:
        return None
    block = (block_size,) if isinstance(block_size, int) else tuple(block_size)
    if len(block) != len(shape):
        raise ValueError(
            f"block_size: expected one entry per dimension of shape {shape}, got {block}"
        )
    for dim, size in enumerate(block):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"block_size[{dim}]: expected an int, got {size!r}")
        if size < 1 and size != -1:
            raise ValueError(f"block_size[{dim}]: expected a positive number or -1, got {size}")
    return block


_signature = functools.lru_cache(inspect.signature)


def bind_grid_arguments(
    name: str, forms: Sequence[Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Bind arguments to the first form (an overload's signature) that takes them.

    Arguments annotated ``int`` or ``bool`` have to be that, which tells ``(qmin, qmax, symmetric)``
    from ``(bitwidth, symmetric)``.

    :raises TypeError: no form fits; the message lists the forms
    """
    for form in forms:
        signature = _signature(form)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            continue
        ok = True
        for key, value in bound.arguments.items():
            annotation = signature.parameters[key].annotation
            if annotation in ("int", int):
                ok &= _is_int(value)
            elif annotation in ("bool", bool):
                ok &= isinstance(value, bool)
        if ok:
            bound.apply_defaults()
            return dict(bound.arguments)
    known = {key for form in forms for key in inspect.signature(form).parameters}
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(f"{name}: unexpected keyword argument {unknown[0]!r}")
    got = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    expected = "\n".join(f"  {name}{inspect.signature(form)}" for form in forms)
    raise TypeError(f"{name}: expected arguments in one of the forms\n{expected}\ngot ({got})")


def _is_int(value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    )


class AffineGrid:
    """What an object with ``qmin`` and ``qmax`` says about its grid."""

    qmin: int
    qmax: int

    def _num_steps(self) -> int:
        return self.qmax - self.qmin

    def _integer_kind(self, attribute: str) -> tuple[int, bool]:
        """``(bitwidth, signed)`` of a grid that is all of an integer type."""
        bits = (self.qmax - self.qmin + 1).bit_length() - 1
        for signed in (False, True):
            if bits >= 1 and grid_of_bitwidth(bits, signed) == (self.qmin, self.qmax):
                return bits, signed
        raise RuntimeError(
            f"{type(self).__name__}.{attribute}: the grid [{self.qmin}, {self.qmax}] is not all "
            "of an integer type; "
            "use qmin and qmax"
        )

    @property
    def _bitwidth(self) -> int:
        return self._integer_kind("bitwidth")[0]

    @property
    def _signed(self) -> bool:
        return self._integer_kind("signed")[1]
