"""Quantized modules: twins of the modules of ``torch.nn`` with quantizers for inputs, parameters
and outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from rimet.nn.base import BaseQuantizationMixin, UnknownModuleError
from rimet.nn.mixin import QuantizationMixin, QuantizationMixinMeta
from rimet.nn.modules import custom
from rimet.nn.multihead_attention import QuantizedMultiheadAttention
from rimet.nn.recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)
from rimet.nn.reuse import reuse_quantized_params
from rimet.nn.torch_modules import *  # noqa: F403
from rimet.nn.torch_modules import __all__ as _torch_modules
from rimet.quantization.base import QuantizerBase

__all__ = [
    "BaseQuantizationMixin",
    "QuantizationMixin",
    "QuantizationMixinMeta",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "UnknownModuleError",
    "compute_encodings",
    "compute_param_encodings",
    "custom",
    "reuse_quantized_params",
]
__all__.extend(_torch_modules)


@contextlib.contextmanager
def compute_encodings(model: nn.Module) -> Iterator[None]:
    """Within this context, all quantizers of ``model`` observe; on leaving it, they set their
    ranges.

    Parameter quantizers are calibrated on entry from their parameters and quantize from then on.
    Values pass input and output quantizers of quantized modules unquantized. Quantizers that stand
    in the model by themselves take part.

    :param model: model with quantized modules or quantizers

    Example::

        with torch.no_grad(), rimet.nn.compute_encodings(model):
            for batch in data:
                model(batch)
    """
    in_slots: set[int] = set()
    activation_quantizers: dict[int, Any] = {}
    compute_param_encodings(model)
    for module in model.modules():
        if isinstance(module, BaseQuantizationMixin):
            in_slots.update(id(q) for q in module.param_quantizers.modules())
            activation_quantizers.update((id(q), q) for q in module._activation_quantizers())
    for module in model.modules():
        if isinstance(module, QuantizerBase) and id(module) not in in_slots:
            activation_quantizers.setdefault(id(module), module)
    with contextlib.ExitStack() as stack:
        for quantizer in activation_quantizers.values():
            stack.enter_context(quantizer.compute_encodings())
        yield


def compute_param_encodings(model: nn.Module) -> None:
    """Set the range of every parameter quantizer of ``model`` from its parameter, unless
    ``allow_overwrite`` forbids it.
    """
    for module in model.modules():
        if isinstance(module, BaseQuantizationMixin):
            module.compute_param_encodings()
