"""Tensors inside nested values, in the order in which the recorder numbers them."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["holds_tensor", "map_arguments", "map_results"]


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in a nested value (tuples, lists, dicts, dataclasses)."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, list | tuple):
        return any(holds_tensor(item) for item in value)
    if isinstance(value, Mapping):
        return any(holds_tensor(item) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds_tensor(getattr(value, f.name)) for f in dataclasses.fields(value))
    return False


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to its items, in a container of the same kind."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)([change(item) for item in value])
    if isinstance(value, Mapping):
        items = {key: change(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, items)
        return type(value)(**items) if all(map(_is_name, items)) else type(value)(items)  # type: ignore[arg-type, call-arg]
    rebuilt = copy.copy(value)  # not made anew: what the constructor computes may not be quantized
    for field in dataclasses.fields(value):
        object.__setattr__(rebuilt, field.name, change(getattr(value, field.name)))
    return rebuilt


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier()


def map_arguments(
    change: Callable[[int, Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with ``change(slot, tensor)`` in the place of each tensor.

    Slots are counted as the recorder does: positional arguments first, then the keyword arguments
    that hold tensors; a nested value has a slot for each of its items if it holds a tensor, else
    one.
    """
    slot = 0

    def visit(value: Any) -> Any:
        nonlocal slot
        if isinstance(value, list | tuple | Mapping) and holds_tensor(value):
            return _rebuilt(value, visit)
        slot += 1
        return change(slot - 1, value) if isinstance(value, Tensor) else value

    changed = tuple(visit(value) for value in args)
    named = {key: visit(value) if holds_tensor(value) else value for key, value in kwargs.items()}
    return changed, named


def map_results(change: Callable[[int, Tensor], Tensor], outcome: Any) -> Any:
    """A result with ``change(index, tensor)`` in the place of each tensor in it.

    A tensor that stands in several places counts once, at the first of them.
    """
    changed: dict[int, Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(len(changed), value)
            return changed[id(value)]
        return _rebuilt(value, visit) if holds_tensor(value) else value

    return visit(outcome)
