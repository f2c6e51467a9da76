"""Names of a graph's nodes by the modules they come from."""

from __future__ import annotations

import ast

import onnx_ir as ir
from torch import nn

from rimet.nn import BaseQuantizationMixin
from rimet.nn.functional_ops import FunctionalOp, FunctionalOps
from rimet.quantization.base import QuantizerBase

__all__ = ["name_nodes"]

# Modules that are not called: they do not show in the exporters' scopes.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, FunctionalOps)
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(graph: ir.Graph, model: nn.Module) -> dict[str, list[ir.Node]]:
    """Call nodes as the modules that they compute: ``conv1``; of several nodes ``fc``, ``fc#1``, ...,
    ``fc#3.end``, and the last one's outputs ``/fc#3.end/Add_output_0``.

    Nodes that do not depend on the graph's inputs, shapes, and nodes that no module without parts
    computes keep their names.

    :param graph: exported from ``model`` by either of torch's exporters
    :return: for each module that has nodes, these, in topological order
    """
    modules = dict(model.named_modules())
    scopes = _scopes(model)
    nodes: dict[str, list[ir.Node]] = {}
    varying = {id(value) for value in graph.inputs}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type == "Shape" or not any(id(value) in varying for value in node.inputs):
            continue
        varying.update(id(value) for value in node.outputs)
        path = _path_of(node, scopes)
        if path in modules and _is_leaf(modules[path]):
            nodes.setdefault(path, []).append(node)
    for path, group in nodes.items():
        for i, node in enumerate(group):
            node.name = f"{path}#{i}" if i else path
        if len(group) > 1:
            last = group[-1]
            last.name = f"{last.name}.end"
            scope = f"/{path.replace('.', '/')}#{len(group) - 1}.end"
            for i, output in enumerate(last.outputs):
                if not output.is_graph_output():
                    output.name = f"{scope}/{last.op_type}_output_{i}"
    return nodes


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, FunctionalOp):
        return False
    if isinstance(module, BaseQuantizationMixin):
        return True
    return not any(not isinstance(child, QuantizerBase) for child in module.children())


def _path_of(node: ir.Node, scopes: dict[str, str]) -> str:
    listed = node.metadata_props.get(_SCOPES)
    if listed is not None:  # of the exporter on torch.export: paths, and last the node itself
        names = ast.literal_eval(listed)
        return str(names[-2]) if len(names) > 1 else ""
    return scopes.get((node.name or "").rpartition("/")[0], "")


def _scopes(model: nn.Module) -> dict[str, str]:
    """Paths of modules by the scopes that the TorchScript exporter writes in front of node names."""
    shown = {"": ""}  # what a path's last part is shown as
    scope_of = {"": ""}
    for path, module in model.named_modules():
        if not path:
            continue
        parent, _, name = path.rpartition(".")
        # A number is shown behind its parent's name.
        shown[path] = f"{shown[parent]}.{name}" if name.isdigit() and parent else name
        is_shown = not isinstance(module, _CONTAINERS)
        scope_of[path] = f"{scope_of[parent]}/{shown[path]}" if is_shown else scope_of[parent]
    return {
        scope: path
        for path, scope in scope_of.items()
        if path and not isinstance(model.get_submodule(path), _CONTAINERS)
    }
