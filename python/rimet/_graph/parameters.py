"""Who computes with a module's parameters, and layers as the engine's techniques see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from rimet import _core

Layer: TypeAlias = (
    nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
    | nn.Linear
)
"""A layer with a weight and a bias."""

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def entangled(
    model: nn.Module, graph: _core.Graph | None, modules: Mapping[str, nn.Module]
) -> set[str]:
    """Those of ``modules`` (by path) whose parameters cannot be changed for this module alone.

    Another module holds the same parameter or buffer; a function in some forward uses it; or it is
    none: a hook computes it anew before each call (``torch.nn.utils.weight_norm``, ``prune``).
    """
    holders: dict[int, int] = {}
    names: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders[id(tensor)] = holders.get(id(tensor), 0) + 1
                names[f"{path}.{name}" if path else name] = id(tensor)
    used = set()
    for tensor in graph.tensors() if graph is not None else ():
        if tensor["kind"] == "parameter" and tensor["consumers"]:
            used.add(names.get(tensor["name"]))

    def is_free(module: nn.Module) -> bool:
        own = [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        computed = isinstance(module, LAYERS) and module._parameters.get("weight") is None
        return not computed and all(holders[id(t)] == 1 and id(t) not in used for t in own)

    return {path for path, module in modules.items() if not is_free(module)}


def engine_layer(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None, int, bool]:
    """``(weight, bias, groups, transposed)`` as the engine's techniques take a layer."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return layer.weight, layer.bias, getattr(layer, "groups", 1), transposed


@torch.no_grad()
def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Writes ``value`` into a parameter, or makes the parameter where there is none."""
    parameter: Any = getattr(module, name)
    if parameter is None:
        weight = getattr(module, "weight", None)
        requires_grad = weight is None or weight.requires_grad
        setattr(module, name, nn.Parameter(value, requires_grad=requires_grad))
    else:
        parameter.copy_(value)


def is_padded(layer: nn.Module) -> bool:
    """Whether a convolution computes with elements beyond the border of its input.

    A transposed convolution counts as padded: at the border fewer of its taps meet the input.
    """
    if isinstance(layer, nn.Linear):
        return False
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return True
    padding: Any = getattr(layer, "padding", 0)
    if padding == "valid":
        return False
    if padding == "same":
        return any(size != 1 for size in layer.kernel_size)  # type: ignore[union-attr]
    return any(padding)
