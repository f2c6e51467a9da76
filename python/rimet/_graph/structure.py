"""Nested values taken apart into tensors and a structure, and put together again.

Unlike ``torch.utils._pytree`` this needs no registration: a key-value cache or any other plain
object that holds tensors is taken apart by its attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Structure", "flatten"]

_OPAQUE = (torch.nn.Module, torch.Generator, torch.dtype, torch.device, type)


class _ByIdentity:
    """A value without equality of its own: the same only as itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _comparable(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()  # NaN equals NaN, 0.0 does not equal -0.0
    if isinstance(value, complex):
        return value.real.hex(), value.imag.hex()
    if isinstance(value, list):
        return tuple((type(item), _comparable(item)) for item in value)
    if isinstance(value, tuple):
        return tuple((type(item), _comparable(item)) for item in value)
    if type(value).__hash__ is None or type(value).__eq__ is object.__eq__:
        return _ByIdentity(value)
    return value


@dataclasses.dataclass(frozen=True)
class Structure:
    """The shape of a nested value: what is left when its tensors are taken out.

    Two structures are equal if their containers, keys and other values are. Other values are kept
    by reference.
    """

    kind: str
    """``tensor``, ``value``, ``sequence``, ``fields``, ``mapping`` or ``object``."""
    cls: type
    key: Any = None
    """Keys of a mapping or an object, or what a value is compared by."""
    parts: tuple[Structure, ...] = ()
    value: Any = dataclasses.field(default=None, compare=False)

    @property
    def num_tensors(self) -> int:
        """How many tensors the value holds."""
        if self.kind == "tensor":
            return 1
        return sum(part.num_tensors for part in self.parts)

    @property
    def num_leaves(self) -> int:
        """How many tensors and other values it holds."""
        if self.kind in ("tensor", "value"):
            return 1
        return sum(part.num_leaves for part in self.parts)

    def describe(self) -> str:
        """Containers, keys and values as text; objects without equality as their class."""
        if self.kind == "tensor":
            return "tensor"
        key = self.cls.__qualname__ if isinstance(self.key, _ByIdentity) else repr(self.key)
        inner = ", ".join(part.describe() for part in self.parts)
        return f"{self.kind} {self.cls.__qualname__} {key} ({inner})"

    def matches(self, other: Structure) -> bool:
        """Equality, but objects that only equal themselves match objects of the same class."""
        if self.kind != other.kind or self.cls is not other.cls:
            return False
        if isinstance(self.key, _ByIdentity) and isinstance(other.key, _ByIdentity):
            return True
        pairs = zip(self.parts, other.parts, strict=False)
        return (
            self.key == other.key
            and len(self.parts) == len(other.parts)
            and all(part.matches(twin) for part, twin in pairs)
        )

    def build(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The nested value with these tensors in it, in the order of :func:`flatten`."""
        return self._build(iter(tensors))

    def _build(self, tensors: Iterator[torch.Tensor]) -> Any:
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "value":
            return self.value
        parts = [part._build(tensors) for part in self.parts]
        if self.kind == "sequence":
            return parts if self.cls is list else self.cls(parts)
        if self.kind == "fields":
            return self.cls(*parts)
        if self.kind == "mapping":
            items = dict(zip(self.key, parts, strict=True))
            if self.cls is dict:
                return items
            if dataclasses.is_dataclass(self.cls):
                return self.cls(**items)
            made = self.cls()
            made.update(items)
            return made
        made = object.__new__(self.cls)
        made.__dict__.update(zip(self.key, parts, strict=True))
        return made


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """Takes a nested value apart: tuples, lists, mappings, dataclasses, and objects that hold
    tensors in their attributes.

    Returns:
        The tensors in order, and the structure that :meth:`Structure.build` makes the value from.
    """
    tensors: list[torch.Tensor] = []
    structure = _flatten(value, tensors, ())
    return tensors, structure


_TENSOR = Structure("tensor", torch.Tensor)
_PRIMITIVES = (int, bool, str, type(None), torch.dtype, torch.device)


def _flatten(value: Any, tensors: list[torch.Tensor], above: tuple[int, ...]) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TENSOR
    cls = type(value)
    if cls in _PRIMITIVES:
        return Structure("value", cls, value, (), value)
    if isinstance(value, tuple | list) and cls is not torch.Size:
        start = len(tensors)
        parts = tuple(_flatten(item, tensors, above) for item in value)
        if len(tensors) == start and cls in (tuple, list):
            return Structure("value", cls, _comparable(value), (), value)
        named = hasattr(value, "_fields")
        return Structure("fields" if named else "sequence", cls, None, parts)
    if isinstance(value, Mapping):
        keys = tuple(value.keys())
        parts = tuple(_flatten(item, tensors, above) for item in value.values())
        return Structure("mapping", cls, keys, parts)
    if id(value) not in above and not isinstance(value, _OPAQUE) and hasattr(value, "__dict__"):
        found: list[torch.Tensor] = []
        attributes = vars(value)
        inner = (*above, id(value))
        parts = tuple(_flatten(item, found, inner) for item in attributes.values())
        if found:
            tensors.extend(found)
            return Structure("object", cls, tuple(attributes), parts)
    return Structure("value", cls, _comparable(value), (), value)
