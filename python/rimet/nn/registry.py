"""The table of quantized twins: a row per module class, from which its quantized class is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rimet.nn.mixin import (
    QuantizationMixin,
    QuantizationMixinMeta,
    build_forward,
    twin_docstring,
)

__all__ = ["REGISTRY", "QuantSpec", "stateless", "twin"]


@dataclass(frozen=True)
class QuantSpec:
    """What is quantized in a module class, and how its twin computes."""

    #: Module class
    module: type[nn.Module]
    #: Arguments of ``forward`` that have an input quantizer, in the order of the quantizers
    inputs: tuple[str, ...]
    #: Number of output quantizers
    outputs: int
    #: Names of all parameters the class can have, where the forward pass is built upon them;
    #: ``None``: found at run time
    parameters: tuple[str, ...] | None = None
    #: Forward as a function ``call(module, input, *parameters)``
    call: Callable[..., Any] | None = None
    #: Torch function that a kernel takes the place of; ``None``: the first one that forward calls
    function: Any = None
    #: Whether the first output quantizer serves all results
    shared_output: bool = False
    #: Forward returns one tensor that torch has just allocated, or else one of its arguments
    fresh: bool = False
    #: Number of quantized tensors is that of the arguments (``Concat``)
    variadic: bool = False


#: All rows, by module class
REGISTRY: dict[type[nn.Module], QuantSpec] = {}


def twin(
    module_cls: type[nn.Module],
    inputs: tuple[str, ...] | int | None = None,
    outputs: int = 1,
    *,
    name: str | None = None,
    bases: tuple[type, ...] | None = None,
    home: str | None = None,
    namespace: dict[str, Any] | None = None,
    register: bool = True,
    like: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Make and register the quantized class of a module class.

    :param inputs: arguments of ``forward`` that have an input quantizer, or how many of its first
        ones; one by default
    :param outputs: number of output quantizers
    :param name: name of the class; ``Quantized<Module>`` by default
    :param bases: its bases; the mixin and the module class by default
    :param home: module in which the class can be imported; that of the caller by default
    :param namespace: further attributes; a ``forward`` in it takes the place of the one that would
        be built
    :param register: whether this class is the twin of ``module_cls``
    :param like: function with the arguments of ``forward``, where they have other names than in the
        module class
    :param options: see :class:`QuantSpec`
    """
    if inputs is None:
        inputs = 1
    signature = None if like is None else inspect.signature(like)
    if isinstance(inputs, int):
        names = tuple(inspect.signature(module_cls.forward).parameters)[1:]
        inputs = names[:inputs] + tuple(f"x{i}" for i in range(len(names), inputs))
    if home is None:
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals["__name__"] == __name__:
            frame = frame.f_back
        home = "__main__" if frame is None else frame.f_globals["__name__"]
    spec = QuantSpec(module_cls, inputs, outputs, **options)
    number = len(inputs)

    def __quant_init__(self: Any) -> None:
        self._quant_init_slots(number, outputs)

    attributes: dict[str, Any] = {
        "__module__": home,
        "__doc__": twin_docstring(module_cls, inputs, outputs),
        "__quant_init__": __quant_init__,
    }
    if bases is None or bases[0] is QuantizationMixin:
        attributes["forward"] = build_forward(
            module_cls,
            inputs=inputs,
            function=spec.function,
            call=spec.call,
            parameters=spec.parameters,
            shared_output=spec.shared_output,
            variadic=spec.variadic,
            pure=True,
            fresh=spec.fresh,
            signature=signature,
        )
    attributes.update(namespace or {})
    quantized_cls = QuantizationMixinMeta(
        name or f"Quantized{module_cls.__name__}",
        bases or (QuantizationMixin, module_cls),
        attributes,
    )
    if register:
        REGISTRY[module_cls] = spec
        QuantizationMixin.implements(module_cls)(quantized_cls)
    return quantized_cls


def stateless(
    module_cls: type[nn.Module], inputs: Any = None, outputs: int = 1, **options: Any
) -> Any:
    """:func:`twin` of a class without parameters."""
    return twin(module_cls, inputs, outputs, parameters=(), **options)
