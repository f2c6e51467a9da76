"""An ONNX graph whose quantized tensors are marked, and what is rewritten in it before it is written.

A *mark* is a node ``rimet::QuantizeDequantize``: its output is its input, quantized. Its attribute
``quantizer`` is a key of :attr:`MarkedModel.marks`, where the encoding is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from rimet.quantization.affine import AffineEncoding, GroupedBlockEncoding
from rimet.quantization.affine.encoding import VectorEncoding
from rimet.quantization.base import EncodingBase
from rimet.quantization.float import FloatEncoding

__all__ = ["DOMAIN", "Mark", "MarkedModel", "OP_TYPE", "constant_of", "same_grid"]

DOMAIN = "rimet"
OP_TYPE = "QuantizeDequantize"

#: Operators whose outputs hold nothing but elements of their inputs (data inputs by position;
#: ``None``: all), so that a quantized tensor stays on its grid.
_MOVES: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "DepthToSpace": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "MaxPool": (0,),
    "Pad": (0,),
    "ReduceMax": (0,),
    "ReduceMin": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "SpaceToDepth": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}


@dataclass(frozen=True)
class Mark:
    """What a marked tensor is quantized to.

    :ivar encoding: the grid
    :ivar is_param: whether the quantizer is that of a parameter
    :ivar owner: path of the quantizer in the model; empty for marks that were derived
    :ivar is_derived: put there because the tensor holds elements of a quantized one
    """

    encoding: EncodingBase
    is_param: bool
    owner: str = ""
    is_derived: bool = False


@dataclass
class MarkedModel:
    """An exported model with marks in its graph."""

    model: ir.Model
    marks: dict[int, Mark]
    #: Parameters that are stored transposed: name -> original name, permutation.
    transposed: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = max(self.marks, default=-1) + 1

    def nodes(self) -> list[ir.Node]:
        """All nodes, those of subgraphs included, in topological order."""
        return list(ir.traversal.RecursiveGraphIterator(self.model.graph))

    def marked(self) -> Iterator[tuple[ir.Node, Mark]]:
        """The marks' nodes, in topological order."""
        for node in self.nodes():
            if is_mark(node):
                yield node, self.marks[_key(node)]

    def mark_of(self, value: ir.Value | None) -> Mark | None:
        """The mark that a tensor is the output of."""
        producer = None if value is None else value.producer()
        if producer is None or not is_mark(producer):
            return None
        return self.marks[_key(producer)]

    def replace_mark(self, node: ir.Node, mark: Mark) -> None:
        """Give one mark, not all of the same quantizer, another encoding."""
        node.attributes["quantizer"] = ir.AttrInt64("quantizer", self._add(mark))

    def remove(self, node: ir.Node) -> None:
        """Take a mark out: its input takes the place of its output.

        A graph output keeps its name.
        """
        before, after = _single_input(node), node.outputs[0]
        if after.is_graph_output():
            _become_output(before, after)
        after.replace_all_uses_with(before)
        _graph_of(node).remove(node, safe=True)

    def insert(
        self,
        value: ir.Value,
        mark: Mark,
        before: ir.Node | None = None,
        use: tuple[ir.Node, int] | None = None,
    ) -> None:
        """Mark a tensor.

        :param before: node to insert the mark in front of; by default it comes behind the tensor's
            producer
        :param use: node and input position that the mark is for; by default all uses, and a graph
            output
        """
        output = ir.Value(name=f"{value.name}_marked", shape=value.shape, type=value.type)
        node = ir.Node(
            DOMAIN,
            OP_TYPE,
            [value],
            [ir.AttrInt64("quantizer", self._add(mark))],
            outputs=[output],
        )
        for user, index in [use] if use else list(value.uses()):
            if user is not node:
                user.replace_input_with(index, output)
        producer = value.producer()
        if use is None and value.is_graph_output():
            # The quantized tensor is the output, under the output's name.
            outputs = self.model.graph.outputs
            outputs[outputs.index(value)] = output
            output.name, value.name = value.name, f"{value.name}_unmarked"
        if before is not None:
            _graph_of(before).insert_before(before, node)
        else:
            assert producer is not None
            _graph_of(producer).insert_after(producer, node)

    def _add(self, mark: Mark) -> int:
        key, self._next = self._next, self._next + 1
        self.marks[key] = mark
        return key

    # -- rewriting ---------------------------------------------------------------------------------

    def drop(self, unwanted: Callable[[Mark], bool]) -> None:
        """Take out marks; their tensors are not quantized."""
        for node, mark in list(self.marked()):
            if unwanted(mark):
                self.remove(node)

    def force_sign(self, signed: bool) -> None:
        """Let the integers of all activations be signed, or unsigned."""
        for node, mark in self.marked():
            if not mark.is_param and isinstance(mark.encoding, AffineEncoding):
                self.replace_mark(node, replace(mark, encoding=with_sign(mark.encoding, signed)))

    def flatten_single_scales(self) -> None:
        """Say of grids with one scale that they are per tensor, whatever the rank of the scale."""
        for node, mark in self.marked():
            encoding: Any = mark.encoding
            if type(encoding) is AffineEncoding and encoding.scale.numel() == 1:
                scalar = encoding._mapped(lambda tensor: tensor.reshape(()))
                scalar.block_size = None
                self.replace_mark(node, replace(mark, encoding=scalar))

    def merge_equal(self) -> None:
        """Leave one of the marks that quantize one tensor to one grid, side by side or one behind
        the other.
        """
        first: dict[int, list[tuple[ir.Node, Mark]]] = {}
        for node, mark in list(self.marked()):
            source = _single_input(node)
            before = self.mark_of(source)
            if before is not None and same_grid(before.encoding, mark.encoding):
                self.remove(node)
                continue
            for other, known in first.setdefault(id(source), []):
                if other.graph is node.graph and same_grid(mark.encoding, known.encoding):
                    output = node.outputs[0]
                    if output.is_graph_output():
                        break  # its name is needed
                    output.replace_all_uses_with(other.outputs[0])
                    _graph_of(node).remove(node, safe=True)
                    break
            else:
                first[id(source)].append((node, mark))

    def fold_transposes(self) -> None:
        """Transpose quantized parameters once and for all, where nothing else uses them.

        ``fc.weight`` that is only used transposed becomes ``fc.weight_0``, as the exporters call
        a parameter that they have folded an operator into.
        """
        graph = self.model.graph
        for node, mark in list(self.marked()):
            source, output = _single_input(node), node.outputs[0]
            uses = list(output.uses())
            if not source.is_initializer() or len(list(source.uses())) != 1 or len(uses) != 1:
                continue
            user = uses[0][0]
            if user.op_type != "Transpose" or user.domain or output.is_graph_output():
                continue
            array = constant_of(source)
            if array is None or user.outputs[0].is_graph_output():
                continue
            attribute = user.attributes.get("perm")
            perm = tuple(range(array.ndim))[::-1] if attribute is None else attribute.as_ints()
            encoding = permuted(mark.encoding, perm)
            if encoding is None:
                continue
            folded = initializer(
                graph, unused_name(graph, f"{source.name}_0"), np.transpose(array, perm)
            )
            self.transposed[str(folded.name)] = str(source.name), tuple(perm)
            node.replace_input_with(0, folded)
            self.replace_mark(node, replace(mark, encoding=encoding))
            output.shape = folded.shape
            user.outputs[0].replace_all_uses_with(output)
            _graph_of(user).remove(user, safe=True)

    def quantize_parameters(self) -> None:
        """Store parameters with their quantized values, as float32 numbers.

        Those that are used otherwise too, or on several grids, stay as they are.
        """
        for node, mark in self.marked():
            source = _single_input(node)
            if mark.is_param and source.is_initializer() and len(list(source.uses())) == 1:
                array = constant_of(source)
                assert array is not None
                values = mark.encoding.quantize_dequantize(torch.from_numpy(np.array(array)))
                source.const_value = ir.Tensor(values.numpy(), name=source.name)

    def propagate(self) -> None:
        """Mark what holds elements of quantized tensors only: a reshaped tensor has the grid of the
        tensor that was reshaped.

        Grids per tensor only, and where nothing quantizes the tensor otherwise. It changes no
        value: elements on a grid stay what they are.
        """
        for node in self.nodes():
            if node.domain or node.op_type not in _MOVES:
                continue
            positions = _MOVES[node.op_type]
            data = [
                value
                for i, value in enumerate(node.inputs)
                if value is not None and (positions is None or i in positions)
            ]
            found = [self.mark_of(value) for value in data]
            first = found[0] if found else None
            if first is None or not _is_per_tensor(first.encoding):
                continue
            if any(m is None or not same_grid(m.encoding, first.encoding) for m in found):
                continue
            if node.op_type == "Pad" and not _pads_with_grid_value(node, first.encoding):
                continue
            for output in node.outputs[: None if node.op_type == "Split" else 1]:
                users = [user for user, _ in output.uses()]
                is_used = bool(users) or output.is_graph_output()
                # Where a mark stands behind, the tensor has a grid already.
                if is_used and not any(is_mark(user) for user in users):
                    self.insert(output, Mark(first.encoding, first.is_param, is_derived=True))


def is_mark(node: ir.Node) -> bool:
    """Whether a node is a mark."""
    return node.domain == DOMAIN and node.op_type == OP_TYPE


def _key(node: ir.Node) -> int:
    return node.attributes["quantizer"].as_int()


def _single_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _graph_of(node: ir.Node) -> Any:
    graph = node.graph
    assert graph is not None
    return graph


def _become_output(value: ir.Value, output: ir.Value) -> None:
    """Let a tensor be a graph output in place of another one, under the latter's name."""
    graph = output.graph
    assert graph is not None
    outputs = graph.outputs
    index = outputs.index(output)
    if value.producer() is None or value.is_graph_output():
        # An input, a parameter, or an output already: it keeps its own name.
        copy = ir.Value(name=output.name, shape=output.shape, type=output.type)
        graph.append(ir.Node("", "Identity", [value], outputs=[copy]))
        outputs[index] = copy
    else:
        outputs[index] = value
        value.name, value.shape, value.type = output.name, output.shape, output.type
    output.name = f"{output.name}_removed"


def constant_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The value of an initializer, looked up behind ``Identity`` too; ``None`` for other tensors."""
    while value is not None:
        if value.is_initializer():
            return None if value.const_value is None else value.const_value.numpy()
        producer = value.producer()
        if producer is None or producer.domain:
            return None
        if producer.op_type == "Constant":
            attribute = producer.attributes.get("value")
            return None if attribute is None else attribute.as_tensor().numpy()
        if producer.op_type != "Identity":
            return None
        value = producer.inputs[0]
    return None


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A new constant of a graph."""
    tensor = ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def unused_name(graph: ir.Graph, name: str) -> str:
    """``name``, or with a number behind it if an initializer is called so."""
    count, candidate = 0, name
    while candidate in graph.initializers:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _pads_with_grid_value(node: ir.Node, encoding: EncodingBase) -> bool:
    """Whether what ``Pad`` adds lies on the grid."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    attribute = node.attributes.get("value")  # before opset 11
    fill = np.zeros(()) if given is None else constant_of(given)
    if fill is None:
        return False
    value = torch.tensor(attribute.as_float() if attribute else float(fill.reshape(())))
    return bool(encoding.quantize_dequantize(value) == value)


def _is_per_tensor(encoding: EncodingBase) -> bool:
    scale = getattr(encoding, "scale", None)
    return isinstance(scale, torch.Tensor) and scale.numel() == 1


def same_grid(a: EncodingBase, b: EncodingBase) -> bool:
    """Whether two encodings quantize alike."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, VectorEncoding):
        return False
    if isinstance(a, FloatEncoding) and isinstance(b, FloatEncoding):
        return a.format == b.format and torch.equal(a.scale, b.scale)
    if not isinstance(a, AffineEncoding) or not isinstance(b, AffineEncoding):
        return False
    return (
        (a.qmin, a.qmax, a.symmetry, a.block_size, a.zero_point_shift)
        == (b.qmin, b.qmax, b.symmetry, b.block_size, b.zero_point_shift)
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.offset, b.offset)
    )


def with_sign(encoding: AffineEncoding, signed: bool) -> AffineEncoding:
    """The same values, counted by signed or by unsigned integers."""
    if encoding.signed == signed:
        return encoding
    half = 2 ** (encoding.bitwidth - 1)
    shift = -half if signed else half
    new = encoding._clone()
    new.qmin, new.qmax, new.offset = new.qmin + shift, new.qmax + shift, new.offset - shift
    return new


def permuted(encoding: EncodingBase, perm: Sequence[int]) -> EncodingBase | None:
    """The encoding of a transposed tensor; ``None`` if it has fewer dimensions than the tensor and
    one that matters moves.
    """
    if _is_per_tensor(encoding) and not isinstance(encoding, GroupedBlockEncoding):
        return encoding
    affine: Any = encoding
    if affine.scale.dim() != len(perm) or isinstance(encoding, VectorEncoding):
        return None
    new = encoding._mapped(lambda tensor: tensor.permute(*perm).contiguous())
    for name in ("block_size", "block_grouping"):
        sizes = getattr(new, name, None)
        if sizes is not None:
            setattr(new, name, tuple(sizes[i] for i in perm))
    return new
