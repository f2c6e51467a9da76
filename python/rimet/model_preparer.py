"""Models in which every operation that can be quantized is a module of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rimet._graph.recorder import evaluating
from rimet.nn.modules import custom

__all__ = ["prepare_model", "prepare_pt_transformer_for_quantsim"]

# Functions whose further arguments are attributes of the module: name -> (class, the function's
# parameters after the input).
_STATEFUL: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "celu": (nn.CELU, ("alpha", "inplace")),
    "elu": (nn.ELU, ("alpha", "inplace")),
    "gelu": (nn.GELU, ("approximate",)),
    "glu": (nn.GLU, ("dim",)),
    "hardshrink": (nn.Hardshrink, ("lambd",)),
    "hardsigmoid": (nn.Hardsigmoid, ("inplace",)),
    "hardswish": (nn.Hardswish, ("inplace",)),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "log_softmax": (nn.LogSoftmax, ("dim",)),
    "logsigmoid": (nn.LogSigmoid, ()),
    "relu": (nn.ReLU, ("inplace",)),
    "relu6": (nn.ReLU6, ("inplace",)),
    "rrelu": (nn.RReLU, ("lower", "upper", "training", "inplace")),
    "selu": (nn.SELU, ("inplace",)),
    "sigmoid": (nn.Sigmoid, ()),
    "silu": (nn.SiLU, ("inplace",)),
    "softmax": (nn.Softmax, ("dim",)),
    "softmin": (nn.Softmin, ("dim",)),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softshrink": (nn.Softshrink, ("lambd",)),
    "softsign": (nn.Softsign, ()),
    "tanh": (nn.Tanh, ()),
    "tanhshrink": (nn.Tanhshrink, ()),
}

# Functions whose module takes the same arguments.
_STATELESS: dict[str, Any] = {
    "adaptive_avg_pool2d": custom.AdaptiveAvgPool2d,
    "add": custom.Add,
    "addmm": custom.Addmm,
    "avg_pool2d": custom.AvgPool2d,
    "baddbmm": custom.Baddbmm,
    "batch_norm": custom.BatchNorm,
    "bmm": custom.Bmm,
    "cumsum": custom.CumSum,
    "div": custom.Divide,
    "exp": custom.Exponential,
    "floordiv": custom.FloorDivide,
    "grid_sample": custom.GridSample,
    "group_norm": custom.GroupNorm,
    "interpolate": custom.Interpolate,
    "masked_fill": custom.MaskedFill,
    "matmul": custom.MatMul,
    "max_pool2d": custom.MaxPool2d,
    "max_pool2d_with_indices": custom.MaxPool2d,
    "mean": custom.Mean,
    "mul": custom.Multiply,
    "norm": custom.Norm,
    "pad": custom.Pad,
    "_pad": custom.Pad,
    "pow": custom.Pow,
    "rsqrt": custom.RSqrt,
    "scaled_dot_product_attention": custom.ScaledDotProductAttention,
    "square": custom.Square,
    "sub": custom.Subtract,
    "subtract": custom.Subtract,
    "sum": custom.Sum,
    "truediv": custom.Divide,
    "where": custom.Where,
}


class _Tracer(fx.Tracer):
    """Follows the model's forward, except into the modules that are excluded."""

    def __init__(
        self, modules_to_exclude: Collection[nn.Module], classes_to_exclude: Collection[Any]
    ) -> None:
        super().__init__()
        self._excluded = {id(module) for module in modules_to_exclude}
        self._excluded_classes = set(classes_to_exclude)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of a module are one node."""
        if id(m) in self._excluded or type(m) in self._excluded_classes:
            return True
        of_rimet = type(m).__module__ == custom.__name__
        return of_rimet or super().is_leaf_module(m, module_qualified_name)


def prepare_model(
    model: nn.Module,
    modules_to_exclude: Sequence[nn.Module] | None = None,
    module_classes_to_exclude: Sequence[Callable[..., Any]] | None = None,
    concrete_args: dict[str, Any] | None = None,
) -> fx.GraphModule:
    """Makes modules of a model's functional operations and of the further calls of reused modules.

    ``F.relu(x)`` in a module ``block`` becomes a module ``block.module_relu``, the second call of
    ``block.act`` a module ``block.module_act_1``; ``nn.SiLU`` becomes
    ``custom.CustomSiLU``. A simulation does not need this
    (see ``quantize_functional_ops`` of :class:`rimet.QuantizationSimModel`); it is for those who
    want the modules. The model is traced symbolically: control flow that depends on data is not
    possible.

    Args:
        model: the model; left as it is, but its parts are shared with the result.
        modules_to_exclude: modules that are not looked into.
        module_classes_to_exclude: classes of such modules.
        concrete_args: values of arguments that the trace shall take as given; see
            ``torch.fx.symbolic_trace``.

    Returns:
        A graph module that computes the same.

    Raises:
        torch.fx.proxy.TraceError: the model cannot be traced symbolically.
    """
    tracer = _Tracer(modules_to_exclude or (), module_classes_to_exclude or ())
    with evaluating(model), torch.enable_grad():
        graph = tracer.trace(model, concrete_args)
    prepared = fx.GraphModule(tracer.root, graph, type(model).__name__)
    seen: set[str] = set()
    for node in list(prepared.graph.nodes):
        if node.op in ("call_function", "call_method"):
            _replace_function(prepared, node)
        elif node.op == "call_module":
            if node.target in seen:
                _replace_reused(prepared, node)
            seen.add(node.target)
    prepared.graph.lint()
    prepared.recompile()
    for module in list(prepared.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, custom.CustomSiLU())
    return prepared


def _scope(node: fx.Node) -> str:
    """Path of the module in whose forward a node was made."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path: str = stack[-1][0] if stack else ""
    return path


def _replace_function(prepared: fx.GraphModule, node: fx.Node) -> None:
    made = _module_for(prepared, node)
    if made is None:
        return
    module, args, kwargs = made
    scope = _scope(node)
    try:
        parent: nn.Module = prepared.get_submodule(scope)
    except AttributeError:  # a scope of which nothing else is left
        parent, scope = prepared, ""
    name = f"module_{node.name}"
    parent.add_module(name, module)
    _replace_node(prepared, node, f"{scope}.{name}" if scope else name, args, kwargs)


def _module_for(
    prepared: fx.GraphModule, node: fx.Node
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The module for a functional node and the arguments to call it with; None if there is none."""
    function = node.target if isinstance(node.target, str) else node.target.__name__
    if function == "boolean_dispatch" or function == "fn":
        function = re.sub(r"(_\d+)+$", "", node.name)
    if function in _STATEFUL:
        cls, names = _STATEFUL[function]
        given: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        source = node.args[0] if node.args else given.pop("input")
        if any(isinstance(value, fx.Node) for value in given.values()):
            return None  # settings that are computed
        module = cls()
        for key, value in given.items():
            if hasattr(module, key) and key != "training":
                setattr(module, key, value)
        return module, (source,), {}
    if function in ("cat", "concat", "concatenate"):
        tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]
        if not isinstance(tensors, list | tuple):
            return None  # their number is not known
        axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return custom.Concat(axis), tuple(tensors), {}
    if function == "conv2d":
        return _convolution(prepared, node)
    if function in _STATELESS:
        return _STATELESS[function](), node.args, dict(node.kwargs)
    return None


_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _convolution(
    prepared: fx.GraphModule, node: fx.Node
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """``nn.Conv2d`` if weight and bias are parameters of the model, else ``custom.DynamicConv2d``."""
    given: dict[str, Any] = {**dict(zip(_CONV2D, node.args, strict=False)), **node.kwargs}
    source = given.pop("input")
    weight, bias = given.pop("weight"), given.pop("bias", None)
    if any(isinstance(p, fx.Node) and p.op != "get_attr" for p in (weight, bias)):
        args = (source, weight) if bias is None else (source, weight, bias)
        return custom.DynamicConv2d(**given), args, {}

    def value(parameter: fx.Node) -> nn.Parameter:
        owner, _, name = str(parameter.target).rpartition(".")
        found = getattr(prepared.get_submodule(owner), name)
        return found if isinstance(found, nn.Parameter) else nn.Parameter(found)

    kernel = value(weight)
    out_channels, in_channels, *size = kernel.shape
    module = nn.Conv2d(
        in_channels * given.get("groups", 1),
        out_channels,
        tuple(size),  # type: ignore[arg-type]
        bias=bias is not None,
        **given,
    )
    module.weight = kernel
    if bias is not None:
        module.bias = value(bias)
    return module, (source,), {}


def _replace_reused(prepared: fx.GraphModule, node: fx.Node) -> None:
    path = str(node.target)
    parent_path, _, name = path.rpartition(".")
    counter = re.search(r"_(\d+)$", node.name)
    new_name = f"module_{name}_{counter.group(1) if counter else 1}"
    parent = prepared.get_submodule(parent_path)
    parent.add_module(new_name, copy.deepcopy(prepared.get_submodule(path)))
    new_path = f"{parent_path}.{new_name}" if parent_path else new_name
    _replace_node(prepared, node, new_path, node.args, dict(node.kwargs))


def _replace_node(
    prepared: fx.GraphModule,
    node: fx.Node,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    with prepared.graph.inserting_after(node):
        new = prepared.graph.call_module(path, args, kwargs)
    node.replace_all_uses_with(new)
    prepared.graph.erase_node(node)


def prepare_pt_transformer_for_quantsim(transformer_model: nn.Module) -> nn.Module:
    """Makes modules of the activation functions inside torch's transformer layers, in place.

    Args:
        transformer_model: a model with ``nn.TransformerEncoderLayer`` or
            ``nn.TransformerDecoderLayer``.

    Returns:
        The model.

    Raises:
        ValueError: an activation function that has no module.
    """
    modules = {F.relu: nn.ReLU, F.gelu: nn.GELU}
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for path, layer in transformer_model.named_modules():
        if isinstance(layer, layers) and not isinstance(layer.activation, nn.Module):
            cls = modules.get(layer.activation)
            if cls is None:
                raise ValueError(
                    f"{path}.activation: expected relu or gelu, got {layer.activation!r}"
                )
            layer.activation = cls()  # type: ignore[assignment]
    return transformer_model
