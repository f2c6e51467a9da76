"""Questions to the graph of a torch model."""

from __future__ import annotations

from typing import Any

from torch import nn

from rimet._graph import example_inputs
from rimet.meta.connectedgraph import ConnectedGraph
from rimet.meta.operation import Op

__all__ = [
    "ActivationTypes",
    "create_connected_graph_with_input_shapes",
    "get_module_act_func_pair",
    "get_ops_with_missing_modules",
]

ActivationTypes = (
    nn.ReLU6,
    nn.ReLU,
    nn.PReLU,
    nn.RReLU,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softmin,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Tanh,
    nn.Hardtanh,
    nn.ELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.SiLU,
    nn.GELU,
)


def create_connected_graph_with_input_shapes(
    model: nn.Module, input_shapes: tuple[int, ...] | list[tuple[int, ...]]
) -> ConnectedGraph:
    """The graph of a model that takes float tensors of the given shape, or shapes.

    The inputs are uniform noise with the dtype and device of the model's first parameter.
    """
    args, _ = example_inputs(model, input_shapes)
    return ConnectedGraph(model, args)


def get_module_act_func_pair(
    model: nn.Module, model_input: Any
) -> dict[nn.Module, nn.Module | None]:
    """Per module that runs: the activation module that alone uses its output, or None."""
    pairs: dict[nn.Module, nn.Module | None] = {}
    for op in ConnectedGraph(model, model_input).ordered_ops:
        module = op.get_module()
        if module is None:
            continue
        following = op.output_ops
        activation = following[0].get_module() if len(following) == 1 else None
        pairs[module] = activation if isinstance(activation, ActivationTypes) else None
    return pairs


def get_ops_with_missing_modules(model: nn.Module, model_input: Any) -> list[Op]:
    """The functions of a model that compute, so that a quantizer behind them would need a
    module.
    """
    return [
        op
        for op in ConnectedGraph(model, model_input).ordered_ops
        if op.get_module() is None and not op.is_grid_preserving_op()
    ]
