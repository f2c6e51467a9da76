"""ONNX models with ``QuantizeLinear`` and ``DequantizeLinear`` from simulated ones: :func:`export`.

Needs the packages of the extra ``rimet[onnx]``.
"""

from __future__ import annotations

import io
import os
from typing import Any, Literal

from torch import nn

from rimet._onnx._require import require_onnx
from rimet.quantsim import QuantizationSimModel

__all__ = ["export"]


def export(
    model: nn.Module | QuantizationSimModel,
    args: Any,
    f: str | os.PathLike[str] | io.BytesIO,
    *,
    export_int32_bias: bool = True,
    prequantize_constants: bool = False,
    force_activation_as: Literal["unsigned", "signed"] | None = "unsigned",
    **kwargs: Any,
) -> None:
    """Write a simulated model as an ONNX model with ``QuantizeLinear`` and ``DequantizeLinear``.

    A runtime computes from it what ``model`` computes. A quantized tensor ``x`` is called ``x_q`` as
    integers and ``x_qdq`` behind ``DequantizeLinear``, its constants ``x_scale`` and
    ``x_zero_point``; a graph output keeps its name. Tensors that hold elements of a quantized one
    only (reshaped, transposed, cut, padded with a value on the grid) have its grid. Scales of LPBQ
    are integers behind a ``DequantizeLinear`` of their own. float16 and bfloat16 quantizers are
    left out.

    The float32 part of the graph is made by ``torch.onnx.export``, with either exporter; it takes
    the model as it takes the model without quantizers.

    Args:
        model: a calibrated simulation, or its model. A model without quantizers is exported as
            it is.
        args: example inputs, as of ``torch.onnx.export`` or as for the constructor of a
            simulation: a tensor, a tuple or list, a dict by the names of ``forward``'s parameters.
        f: path of the file, or a buffer. The file is whole or not there.
        export_int32_bias: whether biases are 32-bit integers in units of input scale times weight
            scale, where input and weight are quantized to integers. That rounds them.
        prequantize_constants: whether parameters are stored as integers, which makes the file
            smaller, instead of as float32 numbers behind ``QuantizeLinear``.
        force_activation_as: whether the integers of activations are all ``"unsigned"``, all
            ``"signed"``, or ``None``: as the quantizers have them. The values are the same.
        **kwargs: of ``torch.onnx.export``: ``dynamo``, ``input_names``, ``output_names``,
            ``dynamic_axes``, ``dynamic_shapes``, ... ``opset_version`` is 7 to 25, by default 20;
            scales per channel need 13, blocks and 4- and 16-bit integers 21, 2-bit integers 25.
            ``external_data=True`` puts the tensors into ``{f}.data``, as for models beyond 2 GiB.

    Raises:
        ImportError: the packages of the extra ``rimet[onnx]`` are missing.
        RuntimeError: not a module; quantizers that are not calibrated, or that the opset cannot
            express (all are named); parameters that are not float32.
        ValueError: another ``opset_version`` or ``force_activation_as``; ``verify=True``.
        NotImplementedError: ``export_params=False``, ``keep_initializers_as_inputs=True`` or
            ``do_constant_folding=False``.

    ``model`` is unchanged, on an error too.
    """
    require_onnx()
    from rimet._onnx.export import export_qdq

    export_qdq(
        model.model if isinstance(model, QuantizationSimModel) else model,
        args,
        f,
        export_int32_bias=export_int32_bias,
        prequantize_constants=prequantize_constants,
        force_activation_as=force_activation_as,
        kwargs=kwargs,
    )
