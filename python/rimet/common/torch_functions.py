"""Names of the torch functions that a ``TorchFunctionMode`` sees."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.overrides

from rimet import _core

__all__ = ["canonical_name", "function_name"]


@lru_cache(maxsize=1)
def _dispatched_names() -> dict[Any, str]:
    """Functions of ``torch.nn.functional`` whose ``__name__`` is not the name they are called
    by.
    """
    functional = vars(torch.nn.functional).items()
    return {
        value: name
        for name, value in functional
        if callable(value) and getattr(value, "__name__", name) == "fn"
    }


def function_name(func: Callable[..., Any]) -> str:
    """The name under which a torch function is called: ``"relu"``, ``"__add__"``, ``"mT"``;
    ``"torch.jit.script(gate)"`` for a scripted function.
    """
    if isinstance(func, torch.jit.ScriptFunction):
        return f"torch.jit.script({func.name})"
    if isinstance(func, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        packet: Any = getattr(func, "overloadpacket", func)
        return str(packet._qualified_op_name).rpartition("::")[2]
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "fn":
        return _dispatched_names().get(func, name)
    if name == "__get__":
        # The getter of a property such as ``Tensor.mT``.
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name)


def _known_functions() -> Iterator[Any]:
    for functions in torch.overrides.get_overridable_functions().values():
        yield from functions
    # What torch.compile gives a mode in the place of the methods of torch.Tensor.
    for name in dir(operator):
        function = getattr(operator, name)
        if callable(function) and not isinstance(function, type):
            yield function


_names: dict[Any, str] = {}


def canonical_name(func: Callable[..., Any]) -> str | None:
    """One name for the spellings of one torch function: ``"add"`` for ``torch.add``,
    ``Tensor.__iadd__`` and ``operator.add``.

    ``None`` for a function that was never seen before while ``torch.compile`` runs, which cannot
    follow the look-up.
    """
    name = _names.get(func)
    if name is None and not torch.compiler.is_compiling():
        name = _names[func] = _core.canonical_function(function_name(func))
    return name


for _function in _known_functions():
    canonical_name(_function)
