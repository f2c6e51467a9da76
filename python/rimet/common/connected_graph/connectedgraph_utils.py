"""Questions to a graph."""

from __future__ import annotations

import json
from pathlib import Path

from rimet.common.connected_graph.connectedgraph import ConnectedGraph
from rimet.common.connected_graph.operation import Op

__all__ = [
    "CG_SPLIT",
    "export_connected_graph",
    "get_all_input_ops",
    "get_all_ops_with_constant_inputs",
    "get_all_output_ops",
]

CG_SPLIT = "CG_Split"
"""Type of the operation that stands where one output goes to several consumers."""


def get_all_input_ops(conn_graph: ConnectedGraph) -> list[Op]:
    """The operations that use an input of the model."""
    ops = conn_graph.get_all_ops().values()
    return [op for op in ops if any(p.is_model_input and p.producer is None for p in op.inputs)]


def get_all_output_ops(conn_graph: ConnectedGraph) -> list[Op]:
    """The operations whose output nobody uses."""
    return [op for op in conn_graph.get_all_ops().values() if not op.output_ops]


def get_all_ops_with_constant_inputs(conn_graph: ConnectedGraph) -> set[Op]:
    """The operations that have a constant among their inputs."""
    ops = conn_graph.get_all_ops().values()
    return {op for op in ops if any(product.is_const for product in op.inputs)}


def export_connected_graph(conn_graph: ConnectedGraph, path: str, filename_prefix: str) -> None:
    """Writes ``{path}/{filename_prefix}.json``: ``ops`` (name, type, inputs, outputs,
    is_functional) and ``products`` (``activations``: producer, consumers; ``parameters``: name,
    op)."""
    ops = [
        {
            "name": op.dotted_name,
            "type": op.type,
            "inputs": [other.dotted_name for other in op.input_ops],
            "outputs": [other.dotted_name for other in op.output_ops],
            "is_functional": op.get_module() is None,
        }
        for op in conn_graph.get_all_ops().values()
    ]
    activations, parameters = [], []
    for product in conn_graph.get_all_products().values():
        consumers = [op.dotted_name for op in product.consumers]
        if product.is_parm:
            parameters.append({"name": product.name, "op": consumers[0] if consumers else None})
        else:
            producer = None if product.producer is None else product.producer.dotted_name
            activations.append({"producer": producer, "consumers": consumers})
    content = {"ops": ops, "products": {"activations": activations, "parameters": parameters}}
    target = Path(path) / f"{filename_prefix}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=4, sort_keys=True), encoding="utf-8")
