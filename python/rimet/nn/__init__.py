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
    compute_param_encodings(model)
    in_slots: dict[int, Any] = {}
    of_params: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseQuantizationMixin):
            of_params.update(id(q) for q in module.param_quantizers.modules())
            in_slots.update((id(q), q) for q in module._activation_quantizers())
    with contextlib.ExitStack() as stack:
        for quantizer in in_slots.values():
            stack.enter_context(quantizer._calibrate(pass_through=True))
        for module in model.modules():
            if isinstance(module, QuantizerBase) and id(module) not in of_params:
                stack.enter_context(module.compute_encodings())  # nothing new for those in slots
        yield


def compute_param_encodings(model: nn.Module) -> None:
    """Set the range of every parameter quantizer of ``model`` from its parameter, unless
    ``allow_overwrite`` forbids it.
    """
    for module in model.modules():
        if isinstance(module, BaseQuantizationMixin):
            module.compute_param_encodings()
