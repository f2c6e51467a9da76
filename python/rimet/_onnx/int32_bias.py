"""Biases as 32-bit integers in units of input scale times weight scale.

An integer accumulator holds products of input and weight integers; a bias in the same units can be
added to it. See Jacob et al. 2018, arXiv 1712.05877, section 2.4.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import torch

from rimet._onnx.marked import Mark, MarkedModel, constant_of
from rimet.quantization.affine import AffineEncoding, GroupedBlockEncoding

__all__ = ["quantize_biases"]

logger = logging.getLogger(__name__)

#: Operators of input, weight and bias, and the axis of the weight that counts output channels.
_OPERATORS = {
    "BatchNormalization": 0,
    "Conv": 0,
    "ConvTranspose": 1,
    "Gemm": 0,
    "GroupNormalization": 0,
    "InstanceNormalization": 0,
    "LayerNormalization": 0,
}
_LARGEST = 2**31 - 1


def quantize_biases(marked: MarkedModel) -> None:
    """Mark the biases of operators whose input and weight are quantized to integers.

    Left in floating point: a bias whose scale is not one per output channel, or that is too large
    for its integers (named in the log).
    """
    for node in marked.nodes():
        if node.domain:
            continue
        if node.op_type in _OPERATORS and len(node.inputs) > 2:
            axis = _OPERATORS[node.op_type]
            transposed = node.attributes.get("transB")
            if node.op_type == "Gemm" and not (transposed and transposed.as_int()):
                axis = 1
            _quantize(marked, node, 2, node.inputs[0], node.inputs[1], axis)
        elif node.op_type == "Add":
            for index, other in ((0, node.inputs[1]), (1, node.inputs[0])):
                product = None if other is None else other.producer()
                if product is not None and product.op_type == "MatMul" and not product.domain:
                    _quantize(marked, node, index, product.inputs[0], product.inputs[1], 1)


def _quantize(
    marked: MarkedModel,
    node: ir.Node,
    index: int,
    input: ir.Value | None,
    weight: ir.Value | None,
    axis: int,
) -> None:
    bias = node.inputs[index]
    values = None if bias is None else constant_of(bias)
    if bias is None or values is None or values.ndim != 1 or values.dtype != np.float32:
        return
    input_mark, weight_mark = marked.mark_of(input), marked.mark_of(weight)
    if input_mark is None or weight_mark is None or not weight_mark.is_param:
        return
    input_grid, weight_grid = input_mark.encoding, weight_mark.encoding
    if not isinstance(input_grid, AffineEncoding) or not isinstance(weight_grid, AffineEncoding):
        return
    if input_grid.scale.numel() != 1:
        return
    channels = _scale_per_channel(weight_grid, axis)
    if channels is None or channels.numel() not in (1, values.size):
        return
    scale = input_grid.scale.reshape(()) * channels
    if np.abs(values / scale.numpy()).max(initial=0) > _LARGEST:
        logger.warning(
            "%s stays in floating point: it is more than 2^31 times input scale times weight scale",
            bias.name,
        )
        return
    grid = AffineEncoding(scale, torch.zeros_like(scale), bitwidth=32, signed=True, symmetry=True)
    marked.insert(bias, Mark(grid, True), before=node, use=(node, index))


def _scale_per_channel(encoding: AffineEncoding, axis: int) -> torch.Tensor | None:
    """One scale per output channel: of blocks the largest, of groups of blocks theirs."""
    scale = encoding.scale
    if isinstance(encoding, GroupedBlockEncoding) and not encoding._is_plain:
        scale = encoding._grouping()[0]
    if scale.numel() == 1:
        return scale.reshape(())
    if axis >= scale.dim():
        return None if scale.dim() != 1 else scale
    others = [dim for dim in range(scale.dim()) if dim != axis]
    return scale.amax(others) if others else scale
