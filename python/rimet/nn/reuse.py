"""Explicit reuse of quantized parameters: computed once in a block instead of in every call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["reuse_quantized_params"]

# How many blocks are open in all threads, and whether any is: read first in every forward pass, so
# that nothing else is
# paid without one. (A bool of its own: compiled code is specialized on it, and should not be on the
# number.)
_open_blocks = 0
_any_open = False
_open_blocks_lock = threading.Lock()


class _Blocks(threading.local):
    """Per thread: module -> (number of blocks that hold it, name -> quantized parameter).

    Keyed by the module's identity, and outside of it: copies, pickles and state dicts hold nothing
    of it.
    """

    def __init__(self) -> None:
        self.entries: dict[int, list[Any]] = {}


_blocks = _Blocks()


@contextlib.contextmanager
def reuse_quantized_params(model: nn.Module) -> Iterator[None]:
    """Within this context, each parameter of ``model`` is quantized at most once, by the first call
    that needs it.

    :param model: model with quantized modules

    It is up to the caller that neither parameters nor their quantizers change meanwhile; a change
    made through
    ``compute_encodings()``, ``compute_param_encodings()``, ``fold_param_quantizers()`` or the
    import of encodings is
    noticed, others are not. Holds for the calling thread alone, and for calls without gradients:
    under ``torch.enable_grad``, ``torch.jit``
    tracing, ``torch.compile`` and ``torch.export`` parameters are quantized in every call as ever.
    Needs the memory of one
    copy of the quantized parameters, until the block ends.

    :raises TypeError: ``model`` is no ``nn.Module``
    """
    global _open_blocks, _any_open
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"reuse_quantized_params: model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    entries = _blocks.entries
    modules = [m for m in model.modules() if hasattr(m, "param_quantizers")]
    for module in modules:
        # The entry holds the module: its identity stays taken while the block is open.
        entries.setdefault(id(module), [0, {}, module])[0] += 1
    with _open_blocks_lock:
        _open_blocks += 1
        _any_open = True
    try:
        yield
    finally:
        with _open_blocks_lock:
            _open_blocks -= 1
            _any_open = _open_blocks > 0
        for module in modules:
            entry = entries[id(module)]
            entry[0] -= 1
            if entry[0] == 0:
                del entries[id(module)]


def _tensors(module: Any) -> dict[str, Tensor] | None:
    """Where quantized parameters of ``module`` are kept at this moment, if they are."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
    ):
        return None
    entry = _blocks.entries.get(id(module))
    return None if entry is None else entry[1]


def lookup(module: Any, name: str) -> Tensor | None:
    """The quantized parameter, if an open block has it and it may be used now."""
    if not _any_open:
        return None
    tensors = _tensors(module)
    return None if tensors is None else tensors.get(name)


def store(module: Any, name: str, quantized: Tensor) -> None:
    """Keep a quantized parameter, if a block is open and it may be kept."""
    if _any_open and (tensors := _tensors(module)) is not None:
        tensors[name] = quantized


def forget(module: Any) -> None:
    """Drop what is kept of a module whose quantizers or parameters change."""
    entry = _blocks.entries.get(id(module))
    if entry is not None:
        entry[1].clear()
