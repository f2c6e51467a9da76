"""Example inputs of any structure: how they bind to a model's forward, and which tensors are in
them.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

ForwardFn = Callable[[torch.nn.Module, Any], Any]
"""Runs a model on a batch."""


def forward(model: torch.nn.Module, batch: Any) -> Any:
    """How a batch goes into a model when the user does not say: see :func:`bind_inputs`."""
    args, kwargs = bind_inputs(model, batch)
    return model(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a nested value (tuples, lists, dicts, dataclasses) in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def move_to(value: Any, device: torch.device | str) -> Any:
    """The same nested value with its tensors on ``device``."""
    return _map_tensors(value, lambda tensor: tensor.to(device))


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: _map_tensors(item, change) for key, item in value.items()})  # type: ignore[arg-type]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def bind_inputs(model: torch.nn.Module, dummy_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turns an example input into ``(args, kwargs)`` of ``model.forward``.

    A tuple or list holds the positional arguments, a dict whose keys are parameters of ``forward``
    (some of them, if it takes ``**kwargs``) the keyword arguments; a dict at the end of a tuple is
    taken for keyword arguments by the same test. Anything else is the one positional argument.

    Raises:
        RuntimeError: there is no tensor in ``dummy_input``.
    """
    if next(tensors_in(dummy_input), None) is None:
        raise RuntimeError(
            f"dummy_input of {type(model).__name__}: expected a tensor or a tuple, list or dict "
            "that holds "
            f"tensors, got {type(dummy_input).__name__} without any tensor"
        )
    if isinstance(dummy_input, Mapping) and _are_keywords(model, dummy_input):
        return (), dict(dummy_input)
    if not isinstance(dummy_input, tuple | list):
        return (dummy_input,), {}
    args = tuple(dummy_input)
    last = args[-1]
    if isinstance(last, Mapping) and _are_keywords(model, last, taken=len(args) - 1):
        return args[:-1], dict(last)
    return args, {}


def without_labels(model: torch.nn.Module, batch: Any) -> Any:
    """A tuple or list cut to the number of positional arguments of ``forward``."""
    if not isinstance(batch, tuple | list) or hasattr(batch, "_fields"):
        return batch
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return batch
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if len(batch) > places:
        logger.info("each batch is cut to its first %d of %d elements", places, len(batch))
        return tuple(batch[:places])
    return batch


def example_inputs(
    model: torch.nn.Module, input_shapes: Any, dummy_input: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of ``model.forward``: ``dummy_input``, or else uniform noise of
    ``input_shapes`` (one shape, or a list of shapes) with the dtype and device of the model.

    Raises:
        ValueError: neither is given.
        RuntimeError: there is no tensor in ``dummy_input``.
    """
    if dummy_input is not None:
        return bind_inputs(model, dummy_input)
    if input_shapes is None:
        raise ValueError("expected input_shapes or dummy_input, got neither")
    shapes = input_shapes if isinstance(input_shapes, list) else [input_shapes]
    floating = (p for p in model.parameters() if p.is_floating_point())
    like = next(floating, torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.rand(tuple(shape), generator=generator) for shape in shapes)
    return tuple(x.to(like.device, like.dtype) for x in inputs), {}


def _are_keywords(model: torch.nn.Module, mapping: Mapping[Any, Any], taken: int = 0) -> bool:
    """Whether each key names a parameter of ``forward`` that no positional argument fills.

    Where ``forward`` takes any keywords (``**kwargs``), one such name is enough; where it names no
    parameter at all (``*args, **kwargs``), a dict that is the whole input is its keywords.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = {p.name for p in list(parameters)[taken:] if p.kind in by_keyword}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        if not all(isinstance(key, str) for key in mapping):
            return False
        names_none = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        return any(key in free for key in mapping) or (names_none and not taken)
    return bool(mapping) and all(key in free for key in mapping)
