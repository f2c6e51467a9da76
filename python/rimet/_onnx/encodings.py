"""The floating-point graph of a simulated model, and its encodings by the names of the graph's tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

import rimet
from rimet import _core
from rimet._onnx.marked import Mark, MarkedModel, same_grid
from rimet.quantsim._files import encoding_dict

__all__ = ["TensorEncodings", "take_out"]

logger = logging.getLogger(__name__)


@dataclass
class TensorEncodings:
    """Encodings of tensors of a graph."""

    activations: list[tuple[ir.Value, Mark]] = field(default_factory=list)
    params: list[tuple[ir.Value, Mark]] = field(default_factory=list)

    def to_json(
        self,
        version: str,
        quantizer_args: Mapping[str, Any],
        excluded_layers: Collection[str],
    ) -> str:
        """The text of an encodings file.

        :param version: of the format: 0.6.1, 1.0.0, 2.0.0 or 2.1.0
        :raises RuntimeError: the format cannot express an encoding
        """
        text: str = _core.tensor_encodings_file(
            _named(self.activations),
            _named(self.params),
            version=version,
            quantizer_args=json.dumps(quantizer_args),
            excluded_layers=list(excluded_layers),
            producer_version=rimet.__version__,
        )
        return text


def _named(entries: Iterable[tuple[ir.Value, Mark]]) -> list[tuple[str, dict[str, Any]]]:
    return [(str(value.name), encoding_dict(mark.encoding)) for value, mark in entries]


def take_out(marked: MarkedModel, copies: bool = True) -> TensorEncodings:
    """Take all marks out of a graph.

    A tensor has one encoding, which holds wherever the tensor is used. Where the simulation
    quantizes it for some of its uses only, or differently for some, these uses get a copy of it
    (``Identity``, ``x_dup_0``) that has the encoding.

    :param copies: whether there are such copies; without, the graph is the model's own, and a
        tensor has the first of its encodings (the log names others)
    :return: the encodings by tensors: those of quantizers in the order of the graph, then derived
        ones
    """
    found: list[tuple[ir.Value, Mark]] = []
    of_tensor: dict[int, Mark] = {}
    for node, mark in list(marked.marked()):
        source = node.inputs[0]
        assert source is not None
        known = of_tensor.get(id(source))
        if known is not None and same_grid(known.encoding, mark.encoding):
            marked.remove(node)
            continue
        if known is not None and not copies:
            logger.warning(
                "%s is quantized in more than one way; its encoding is the one of %s, not of %s",
                source.name,
                known.owner,
                mark.owner,
            )
            marked.remove(node)
            continue
        if copies and (known is not None or _is_used_otherwise(marked, source)):
            value = _copy(marked, node, source)
        else:
            marked.remove(node)
            value = source
        of_tensor[id(value)] = mark
        found.append((value, mark))
    ordered = [entry for entry in found if not entry[1].is_derived]
    ordered += [entry for entry in found if entry[1].is_derived]
    result = TensorEncodings()
    for value, mark in ordered:
        is_param = mark.is_param and not mark.is_derived
        (result.params if is_param else result.activations).append((value, mark))
    return result


def _is_used_otherwise(marked: MarkedModel, value: ir.Value) -> bool:
    """Whether something other than marks uses the values of a tensor."""
    if value.is_graph_output():
        return True
    return any(
        marked.mark_of(user.outputs[0]) is None and user.op_type not in ("Shape", "Size")
        for user, _ in value.uses()
    )


def _copy(marked: MarkedModel, node: ir.Node, source: ir.Value) -> ir.Value:
    """Put an ``Identity`` in the place of a mark."""
    graph: Any = node.graph
    output = node.outputs[0]
    taken = {value.name for other in marked.nodes() for value in other.outputs}
    name, count = f"{source.name}_dup_0", 0
    while name in taken:
        count += 1
        name = f"{source.name}_dup_{count}"
    copy = ir.Value(name=name, shape=output.shape, type=output.type)
    identity = ir.Node("", "Identity", [source], outputs=[copy], name=f"Identity_{name}")
    graph.insert_before(node, identity)
    if output.is_graph_output():
        outputs = graph.outputs
        outputs[outputs.index(output)] = copy
        copy.name, output.name = output.name, f"{output.name}_marked"
    output.replace_all_uses_with(copy)
    graph.remove(node, safe=True)
    return copy
