"""The activation function behind a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rimet._graph.program import Program

__all__ = ["Activation", "following_activation"]

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU6: "relu6",
    nn.ReLU: "relu",
    nn.PReLU: "prelu",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
}


@dataclass(frozen=True)
class Activation:
    """The activation function that alone takes a layer's result.

    Attributes:
        name: ``relu``, ``relu6``, ``prelu``, ``gelu``, ... as in ``torch.nn.functional``.
        module: the module that computes it, or None if a function does.
    """

    name: str
    module: nn.Module | None
    _function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The activation of a tensor, which is left as it was."""
        return self._function(input)


def following_activation(program: Program, model: nn.Module, path: str) -> Activation | None:
    """The activation function that alone takes what the module at ``path`` gives on its first call;
    None if there is none, or something else takes it as well.
    """
    number = program.plain.single_consumer(path)
    if number is None:
        return None
    step = program.steps[number]
    if step.kind == "module":
        module = model.get_submodule(step.name)
        for cls, name in _ACTIVATIONS.items():
            if isinstance(module, cls):
                if getattr(module, "inplace", False):
                    return Activation(name, module, lambda x: module(x.clone()))
                return Activation(name, module, module)
        return None
    name = step.name.removeprefix("aten::").rstrip("_")
    if name == "hardtanh" and step.arguments.build([torch.empty(0)])[0][1:] == (0, 6):
        name = "relu6"
    if name not in _ACTIVATIONS.values() or len(step.inputs) != 1 or step.function is None:
        return None
    function = step.function

    def call(input: torch.Tensor) -> torch.Tensor:
        args, kwargs = step.arguments.build([input.clone() if step.name.endswith("_") else input])
        return function(*args, **kwargs)

    return Activation(name, None, call)
