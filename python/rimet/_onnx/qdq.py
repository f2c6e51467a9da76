"""Marks as ``QuantizeLinear`` and ``DequantizeLinear``.

A tensor ``x`` becomes ``x_q`` and ``x_qdq``, with the constants ``x_scale`` and ``x_zero_point``; a graph
output keeps its name for the quantized tensor, and what comes before is called ``x_qdq``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from rimet._onnx.marked import MarkedModel, constant_of, initializer
from rimet.quantization.affine import AffineEncoding, GroupedBlockEncoding
from rimet.quantization.base import EncodingBase
from rimet.quantization.float import FloatEncoding

__all__ = ["lower", "minimum_opset"]

_Array = np.ndarray[Any, Any]

_INTEGERS: dict[tuple[int, bool], Any] = {
    (2, True): ml_dtypes.int2,
    (2, False): ml_dtypes.uint2,
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (8, True): np.int8,
    (8, False): np.uint8,
    (16, True): np.int16,
    (16, False): np.uint16,
    (32, True): np.int32,
}
_FLOATS: dict[str, Any] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}


@dataclass(frozen=True)
class _Layout:
    """An encoding shape in ONNX's terms.

    :ivar shape: shape that the scale is expanded to
    :ivar attributes: ``axis`` and ``block_size`` of the operators
    """

    shape: tuple[int, ...]
    attributes: dict[str, int]


def minimum_opset(encoding: EncodingBase) -> tuple[int, str]:
    """The first opset whose ``QuantizeLinear`` has this grid, and what it is about the grid."""
    if isinstance(encoding, FloatEncoding):
        if encoding.bitwidth == 4:
            return 23, "float4"
        return (21, "blocks") if encoding.block_size is not None else (19, "float8")
    affine: Any = encoding
    if affine.bitwidth == 2:
        return 25, "2-bit integers"
    if affine.block_size is not None:
        return 21, "blocks"
    if affine.bitwidth in (4, 16):
        return 21, f"{affine.bitwidth}-bit integers"
    return (13, "channels") if affine.scale.dim() else (10, "tensors")


def lower(marked: MarkedModel, prequantize_constants: bool) -> None:
    """Turn all marks into quantize and dequantize operators, in place.

    :param prequantize_constants: whether parameters are stored quantized, with no ``QuantizeLinear``
    :raises RuntimeError: a grid that the operators do not have
    """
    for node, mark in list(marked.marked()):
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        graph: Any = node.graph
        name, before, after = _names(marked, source, output)
        lowering = _Lowering(marked.model.graph, graph, node, name)
        array = constant_of(source)
        integers = isinstance(mark.encoding, AffineEncoding) and mark.encoding.bitwidth == 32
        if array is not None and (prequantize_constants or integers):
            dequantized = lowering.constant(array, mark.encoding)
        else:
            source.name = before
            dequantized = lowering.tensor(source, mark.encoding)
        dequantized.shape, dequantized.type = output.shape, output.type
        if output.is_graph_output():
            outputs = graph.outputs
            outputs[outputs.index(output)] = dequantized
            output.name = f"{after}_marked"
        output.replace_all_uses_with(dequantized)
        graph.remove(node, safe=True)
        dequantized.name = after


def _names(marked: MarkedModel, source: ir.Value, output: ir.Value) -> tuple[str, str, str]:
    """What the constants' names begin with, and the names before and after quantization."""
    if output.is_graph_output():
        name = str(output.name)
        is_free = source.producer() is not None and not source.is_graph_output()
        return name, f"{name}_qdq" if is_free else str(source.name), name
    name = str(source.name)
    taken = marked.model.graph.initializers
    count, base = 0, name
    while f"{base}_scale" in taken or f"{base}_scale_q" in taken:
        count += 1  # another grid of the same tensor
        base = f"{name}_{count}"
    return base, name, f"{base}_qdq"


class _Lowering:
    """Puts the operators for one tensor in front of a node."""

    def __init__(self, root: ir.Graph, graph: ir.Graph, place: ir.Node, name: str) -> None:
        self.root, self.graph, self.place, self.name = root, graph, place, name

    def tensor(self, source: ir.Value, encoding: EncodingBase) -> ir.Value:
        """``QuantizeLinear`` and ``DequantizeLinear`` of a tensor."""
        if isinstance(encoding, AffineEncoding) and encoding.bitwidth == 32:
            raise RuntimeError(
                f"{self.name}: QuantizeLinear has no 32-bit integers; take 16 bits, or remove the "
                "quantizer"
            )
        shape = None if source.shape is None else tuple(source.shape)
        layout = _layout(encoding, shape, self.name)
        scale = self._scale(encoding, layout)
        zero_point = self._constant("zero_point", _zero_point(encoding, layout, self.name))
        quantized = self._node(
            "QuantizeLinear", "q", "q", [source, scale, zero_point], layout.attributes
        )
        quantized.shape = source.shape
        assert zero_point.type is not None
        quantized.type = ir.TensorType(zero_point.type.dtype)
        return self._node(
            "DequantizeLinear", "dq", "qdq", [quantized, scale, zero_point], layout.attributes
        )

    def constant(self, array: _Array, encoding: EncodingBase) -> ir.Value:
        """``DequantizeLinear`` of a constant that is stored quantized."""
        layout = _layout(encoding, array.shape, self.name)
        scale = self._scale(encoding, layout)
        zero_points = _zero_point(encoding, layout, self.name)
        zero_point = self._constant("zero_point", zero_points)
        # float64: 32-bit integers do not fit into float32.
        values = encoding.quantize(torch.from_numpy(np.array(array)).double()).numpy()
        quantized = self._constant("q", values.astype(zero_points.dtype))
        return self._node(
            "DequantizeLinear", "dq", "qdq", [quantized, scale, zero_point], layout.attributes
        )

    def _constant(self, suffix: str, array: _Array) -> ir.Value:
        return initializer(self.root, f"{self.name}_{suffix}", array)

    def _node(
        self,
        op_type: str,
        suffix: str,
        output: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, int],
    ) -> ir.Value:
        value = ir.Value(name=f"{self.name}_{output}")
        node = ir.Node(
            "",
            op_type,
            inputs,
            [ir.AttrInt64(key, number) for key, number in attributes.items()],
            outputs=[value],
            name=f"{self.name}_{suffix}",
        )
        self.graph.insert_before(self.place, node)
        return value

    def _scale(self, encoding: EncodingBase, layout: _Layout) -> ir.Value:
        if isinstance(encoding, GroupedBlockEncoding) and not encoding._is_plain:
            return self._grouped_scale(encoding, layout)
        affine: Any = encoding
        return self._constant("scale", _expanded(affine.scale, layout).astype(np.float32))

    def _grouped_scale(self, encoding: GroupedBlockEncoding, layout: _Layout) -> ir.Value:
        """Scales of blocks as small integers times a scale per group of blocks."""
        integers = _expanded(encoding.per_block_int_scale, layout)
        dtype = np.uint8 if integers.max() < 256 else np.uint16
        group_scale, _ = encoding._grouping()
        # Groups are to the scales of blocks what blocks are to the elements.
        grouped = AffineEncoding(
            group_scale,
            torch.zeros_like(group_scale),
            bitwidth=8 * dtype().itemsize,
            block_size=[
                scales // groups
                for scales, groups in zip(encoding.scale.shape, group_scale.shape, strict=True)
            ],
        )
        inner = _layout(grouped, layout.shape, self.name)
        value = self._node(
            "DequantizeLinear",
            "scale_dq",
            "scale",
            [
                self._constant("scale_q", integers.astype(dtype)),
                self._constant("meta_scale", _expanded(group_scale, inner).astype(np.float32)),
                self._constant("meta_zero_point", np.zeros(inner.shape, dtype)),
            ],
            inner.attributes,
        )
        value.shape, value.type = ir.Shape(layout.shape), ir.TensorType(ir.DataType.FLOAT)
        return value


def _zero_point(encoding: EncodingBase, layout: _Layout, name: str) -> _Array:
    """Zero points in the integer or float type of the grid."""
    if isinstance(encoding, FloatEncoding):
        dtype = _FLOATS.get(encoding.format.name)
        if dtype is None:
            raise RuntimeError(
                f"{name}: QuantizeLinear has the formats {', '.join(_FLOATS)}; got "
                f"{encoding.format.name}"
            )
        return np.zeros(layout.shape, dtype)
    affine: Any = encoding
    if affine.zero_point_shift:
        raise RuntimeError(
            f"{name}: QuantizeLinear has whole zero points, got a zero point shift of "
            f"{affine.zero_point_shift}"
        )
    dtype = _INTEGERS[affine.bitwidth, affine.signed]
    return (-_expanded(affine.offset, layout)).astype(dtype)


def _layout(encoding: EncodingBase, shape: Sequence[Any] | None, name: str) -> _Layout:
    """How the operators see an encoding of a tensor of the given shape.

    :raises RuntimeError: blocks along more than one axis, or a shape that is needed and not known
    """
    affine: Any = encoding
    counts, sizes = tuple(affine.scale.shape), affine.block_size
    if affine.scale.numel() == 1 and not isinstance(encoding, GroupedBlockEncoding):
        return _Layout((), {})
    if shape is not None:
        shape = [int(dim) if isinstance(dim, int) else None for dim in shape]
        counts = (1,) * (len(shape) - len(counts)) + counts
    channels = [i for i, count in enumerate(counts) if count > 1]
    if sizes is None and len(channels) == 1:
        axis = channels[0] if shape is not None else channels[0] - len(counts)
        return _Layout((counts[channels[0]],), {"axis": axis})
    if shape is None or None in shape:
        raise RuntimeError(f"{name}: scales of shape {counts} need a tensor of known shape")
    cut = [i for i, count in enumerate(counts) if count > 1 and count != shape[i]]
    if len(cut) > 1 or not channels:
        raise RuntimeError(
            f"{name}: QuantizeLinear has blocks along one axis; got {counts} scales for a tensor of "
            f"shape {tuple(shape)}"
        )
    if not cut and len(channels) == 1:
        return _Layout((counts[channels[0]],), {"axis": channels[0]})
    axis = cut[0] if cut else channels[-1]
    expanded = tuple(
        count if i == axis else dim
        for i, (count, dim) in enumerate(zip(counts, shape, strict=True))
    )
    return _Layout(expanded, {"axis": axis, "block_size": shape[axis] // counts[axis]})


def _expanded(values: torch.Tensor, layout: _Layout) -> _Array:
    """Values in the encoding shape, in the shape of the operators' scale."""
    array = values.detach().cpu().numpy()
    if array.size == 1 or len(layout.shape) == 1 and array.size == layout.shape[0]:
        return np.broadcast_to(
            array.reshape(()) if array.size == 1 else array.reshape(-1), layout.shape
        )
    leading = (1,) * (len(layout.shape) - array.ndim)
    return np.broadcast_to(array.reshape(leading + array.shape), layout.shape)
