"""Settings of the ONNX export, and the names of nodes and tensors in exported graphs.

Functions that make or read graphs need the packages of the extra ``rimet[onnx]``.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rimet import _core
from rimet._graph import bind_inputs
from rimet._onnx._require import require_onnx
from rimet.nn.modules import custom

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CustomMarker",
    "MarkerAttr",
    "OnnxExportApiArgs",
    "OnnxSaver",
    "OpToIOTensors",
    "PrunedInitializerInfo",
    "get_layers_in_io_tensor_map",
    "get_pytorch_name_from_onnx_name",
    "get_tensor_to_consumer_map",
    "map_torch_types_to_onnx",
    "pytorch_functional_name_to_onnx_dict",
    "recurrent_onnx_optypes",
    "restore_onnx_graph_initializers",
    "save_initializer_restored_onnx_graph",
]

logger = logging.getLogger(__name__)

#: Operators with a state.
recurrent_onnx_optypes = ["LSTM", "GRU", "RNN"]

#: Operators that calls of torch functions become.
pytorch_functional_name_to_onnx_dict = {"add": "Add", "cat": "Concat", "mul": "Mul", "div": "Div"}


def _onnx_types() -> dict[type[nn.Module], list[str]]:
    homes: dict[str, Any] = {"nn": nn, "custom": custom}
    types = {}
    for key, operators in _core.onnx_type_table():
        home, _, name = key.partition(".")
        module_cls = getattr(homes.get(home), name, None)
        if module_cls is not None:
            types[module_cls] = list(operators)
    return types


#: The operators that modules become: classes of torch, and elementwise operations as modules.
map_torch_types_to_onnx = _onnx_types()


@dataclass
class OnnxExportApiArgs:
    """Arguments of ``torch.onnx.export``.

    Args:
        opset_version: opset of the standard operators; None: the exporter's default.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
    """

    opset_version: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by their names."""
        return {
            "opset_version": self.opset_version,
            "input_names": self.input_names,
            "output_names": self.output_names,
        }


def _export_kwargs(
    onnx_export_args: OnnxExportApiArgs | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments of an export as a dict of its own.

    Raises:
        RuntimeError: neither :class:`OnnxExportApiArgs` nor a mapping.
    """
    if onnx_export_args is None:
        return {}
    if isinstance(onnx_export_args, OnnxExportApiArgs):
        return onnx_export_args.kwargs
    if isinstance(onnx_export_args, Mapping):
        return dict(onnx_export_args)
    raise RuntimeError(
        "onnx_export_args: expected OnnxExportApiArgs or a dict, got "
        f"{type(onnx_export_args).__name__}"
    )


class MarkerAttr(enum.Enum):
    """What a :class:`CustomMarker` says of its module."""

    NAME = 0
    IS_LEAF = 1
    IS_START = 2


class CustomMarker(nn.Module):
    """A module under a name: it computes what the module computes.

    Args:
        module: the module.
        identifier: its name.
        is_leaf: whether it has no parts.
    """

    def __init__(self, module: nn.Module, identifier: str, is_leaf: bool | str) -> None:
        super().__init__()
        self.marked_module = module
        self.identifier = identifier
        self.is_leaf = is_leaf

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's result."""
        return self.marked_module(*inputs, **kwargs)

    def __getitem__(self, item: Any) -> Any:
        marked: Any = self.marked_module
        return marked[item]


@dataclass
class OpToIOTensors:
    """The names of a node's inputs and outputs."""

    inputs: list[str]
    outputs: list[str]


@dataclass
class PrunedInitializerInfo:
    """A constant that the exporter has replaced by a copy of an equal one.

    Args:
        initializer: the constant under its own name.
        identity_node: the node that made the copy.
    """

    initializer: onnx.TensorProto
    identity_node: onnx.NodeProto


class OnnxSaver:
    """Graphs whose nodes are called as the modules of a model."""

    @classmethod
    def set_node_names(
        cls,
        onnx_model_path: str | os.PathLike[str],
        pytorch_model: nn.Module,
        dummy_input: Any,
        is_conditional: bool = False,
        module_marker_map: Mapping[str, Any] | None = None,
        onnx_export_args: OnnxExportApiArgs | Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a model to an ONNX file, its nodes called as the modules that they compute.

        A node is called ``layer1.conv``; the nodes of a module of several ``fc``, ``fc#1``, ...,
        ``fc#3.end``.

        Args:
            onnx_model_path: path of the file.
            pytorch_model: a model without quantizers.
            dummy_input: example input, as of :class:`rimet.QuantizationSimModel`.
            is_conditional, module_marker_map: for AIMET's callers; not needed here.
            onnx_export_args: arguments of ``torch.onnx.export``.

        Raises:
            ImportError: the packages of the extra ``rimet[onnx]`` are missing.
        """
        kwargs = _export_kwargs(onnx_export_args)
        require_onnx()
        from rimet._onnx.export import export_named_by_modules

        args, keywords = bind_inputs(pytorch_model, dummy_input)
        if keywords:
            kwargs["kwargs"] = {**keywords, **(kwargs.get("kwargs") or {})}
        export_named_by_modules(
            pytorch_model,
            pytorch_model,
            args,
            onnx_model_path,
            propagate_encodings=False,
            encoding_version="1.0.0",
            quantizer_args={},
            excluded_layers=(),
            kwargs=kwargs,
        )

    create_onnx_model_with_pytorch_layer_names = set_node_names

    @classmethod
    def load_simply_onnx_model(cls, filepath: str | os.PathLike[str]) -> onnx.ModelProto:
        """The model of an ONNX file."""
        require_onnx()
        import onnx

        return onnx.load(filepath)

    @classmethod
    def get_onnx_node_to_io_tensor_names_map(
        cls, onnx_model: onnx.ModelProto
    ) -> tuple[dict[str, OpToIOTensors], set[str]]:
        """For each node, by name, its inputs and outputs; and the names of the constants."""
        nodes = {
            node.name: OpToIOTensors(list(node.input), list(node.output))
            for node in onnx_model.graph.node
        }
        return nodes, {tensor.name for tensor in onnx_model.graph.initializer}

    @classmethod
    def check_onnx_node_names(cls, onnx_model: onnx.ModelProto, pytorch_model: nn.Module) -> None:
        """Names, in the log, the modules without parts that no node is called after."""
        named = {_layer_of(node.name) for node in onnx_model.graph.node}
        missing = [
            path
            for path, module in pytorch_model.named_modules()
            if path and next(module.children(), None) is None and path not in named
        ]
        if missing:
            logger.warning("no node is called after: %s", ", ".join(missing))


def _layer_of(node_name: str) -> str:
    """The module that a node is called after."""
    return node_name.partition("#")[0]


def get_layers_in_io_tensor_map(
    op_to_io_tensor_map: Mapping[str, OpToIOTensors],
) -> dict[str, list[str]]:
    """For each module, by name, the node that gives its result."""
    layers: dict[str, list[str]] = {}
    for node in op_to_io_tensor_map:
        layers[_layer_of(node)] = [node]
    return layers


def get_tensor_to_consumer_map(
    op_to_io_tensor_map: Mapping[str, OpToIOTensors],
) -> dict[str, str]:
    """For each tensor, by name, the first node that takes it."""
    consumers: dict[str, str] = {}
    for node, tensors in op_to_io_tensor_map.items():
        for tensor in tensors.inputs:
            consumers.setdefault(tensor, node)
    return consumers


def get_pytorch_name_from_onnx_name(onnx_name: str) -> str:
    """The path of the module in whose scope torch has named a node or tensor:
    ``/layer1/layer1.0/conv/Conv`` comes from ``layer1.0.conv``. Empty for names without a scope.
    """
    scopes = onnx_name.split("/")[1:-1]
    shown: list[str] = []
    for scope in scopes:
        # A number is shown behind its parent's name.
        if shown and scope.startswith(f"{shown[-1]}."):
            shown[-1] = scope
        else:
            shown.append(scope)
    return ".".join(shown)


def restore_onnx_graph_initializers(
    model: onnx.ModelProto, inplace: bool = False
) -> onnx.ModelProto:
    """Gives constants back that the exporter has replaced by copies of equal ones.

    Args:
        model: an exported model.
        inplace: whether the model itself is changed.

    Returns:
        The model, with a constant in the place of each ``Identity`` of a constant.
    """
    require_onnx()
    import onnx

    if not inplace:
        original, model = model, onnx.ModelProto()
        model.CopyFrom(original)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    pruned: list[PrunedInitializerInfo] = []
    for node in model.graph.node:
        is_copy = node.op_type == "Identity" and not node.domain and node.input[0] in constants
        if is_copy and node.output[0] not in outputs:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(constants[node.input[0]])
            tensor.name = node.output[0]
            constants[tensor.name] = tensor
            pruned.append(PrunedInitializerInfo(tensor, node))
    for info in pruned:
        model.graph.initializer.append(info.initializer)
        model.graph.node.remove(info.identity_node)
    return model


def save_initializer_restored_onnx_graph(
    original_model_path: str | os.PathLike[str], restored_model_path: str | os.PathLike[str]
) -> None:
    """Writes the model of a file to another one, see :func:`restore_onnx_graph_initializers`."""
    require_onnx()
    import onnx

    from rimet.quantsim._files import atomic_path

    model = restore_onnx_graph_initializers(onnx.load(original_model_path), inplace=True)
    with atomic_path(restored_model_path) as part:
        onnx.save(model, part)
