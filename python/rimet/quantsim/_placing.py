"""From a placement plan to quantized modules: twins, quantizers, and putting them into the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rimet._graph import Recording, Twin
from rimet.common.defs import QuantScheme
from rimet.nn import BaseQuantizationMixin, QuantizationMixin, UnknownModuleError
from rimet.quantization.affine import QuantizeDequantize
from rimet.quantization.base import QuantizerBase
from rimet.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    PercentileEncodingAnalyzer,
    TfEnhancedEncodingAnalyzer,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

_ANALYZERS: dict[QuantScheme, Callable[[tuple[int, ...]], EncodingAnalyzer[Any]]] = {
    QuantScheme.min_max: MinMaxEncodingAnalyzer,
    QuantScheme.training_range_learning_with_tf_init: MinMaxEncodingAnalyzer,
    QuantScheme.post_training_tf_enhanced: TfEnhancedEncodingAnalyzer,
    QuantScheme.training_range_learning_with_tf_enhanced_init: TfEnhancedEncodingAnalyzer,
    QuantScheme.post_training_percentile: PercentileEncodingAnalyzer,
}


def analyzer_for(scheme: QuantScheme, shape: tuple[int, ...]) -> EncodingAnalyzer[Any]:
    """The encoding analyzer that a quantization scheme stands for.

    Raises:
        NotImplementedError: the scheme has no way to find a first range
            (``training_range_learning``).
    """
    if scheme not in _ANALYZERS:
        raise NotImplementedError(
            f"quant_scheme: {scheme} says nothing about the range to start from; use "
            "training_range_learning_with_tf_init or training_range_learning_with_tf_enhanced_init"
        )
    return _ANALYZERS[scheme](shape)


def make_twins(model: nn.Module) -> dict[str, nn.Module]:
    """Makes the quantized twin of every module that has one, by the path at which the module is met
    first.

    The model is left as it is; twins share the parameters of their modules.

    Raises:
        UnknownModuleError: modules without parts whose class has no twin; all of them are named.
    """
    twins: dict[str, nn.Module] = {}
    inside: set[int] = set()
    unknown: dict[type[nn.Module], tuple[str, UnknownModuleError]] = {}
    for path, module in model.named_modules():
        if id(module) in inside or isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule)):
            continue
        try:
            twin = QuantizationMixin.from_module(module)
        except UnknownModuleError as error:
            is_leaf = next(module.children(), None) is None
            runs = type(module).forward is not nn.Module.forward
            if is_leaf and runs and not isinstance(module, nn.Identity):
                unknown.setdefault(type(module), (path, error))
            continue
        if twin is not module:
            twins[path] = twin
            inside.update(id(part) for part in module.modules())
    if unknown:
        raise _UnknownModules(unknown)
    return twins


class _UnknownModules(UnknownModuleError):
    """Several module classes have no twin."""

    def __init__(self, unknown: dict[type[nn.Module], tuple[str, UnknownModuleError]]) -> None:
        self.unknown = unknown
        first = next(iter(unknown.values()))[1]
        super().__init__(first.module_cls, first.mixin_cls)

    def __reduce__(self) -> Any:
        return type(self), (self.unknown,)

    def generate_err_msg(self) -> str:
        """Every class with the path of its first instance, then the ways on for each."""
        places = "\n".join(
            f"  - {cls.__module__}.{cls.__qualname__} at {path or 'the model itself'}"
            for cls, (path, _) in self.unknown.items()
        )
        advice = "\n\n".join(str(error) for _, error in self.unknown.values())
        return f"These module classes have no quantized twin:\n{places}\n\n{advice}"


def describe_twin(twin: nn.Module) -> Twin:
    """What the graph needs to know about a twin."""
    assert isinstance(twin, BaseQuantizationMixin)
    return Twin(
        len(twin.input_quantizers), len(twin.output_quantizers), takes_any_number(type(twin))
    )


def takes_any_number(twin_cls: type) -> bool:
    """Whether a twin's list of input quantizers grows with its arguments (Concat)."""
    from rimet.nn.registry import REGISTRY

    spec = REGISTRY.get(QuantizationMixin.qcls_to_cls.get(twin_cls))  # type: ignore[arg-type]
    return spec is not None and spec.variadic


def make_quantizer(spec: dict[str, Any], scheme: QuantScheme) -> QuantizerBase:
    """Makes the quantizer that a plan describes."""
    shape = tuple(spec["shape"])
    if spec["dtype"] == "float":
        from rimet.quantization.float import FloatQuantizeDequantize

        if spec["bitwidth"] == 32:
            dtype = torch.float32
        elif spec["bitwidth"] == 16:
            dtype = torch.float16
        else:
            raise ValueError(
                f"default_data_type: expected 16 or 32 bits for float, got {spec['bitwidth']}"
            )
        floating: QuantizerBase = FloatQuantizeDequantize(dtype=dtype)
        return floating.requires_grad_(False)
    constraints = spec["constraints"]
    if constraints is not None:
        scheme = QuantScheme.min_max
    quantizer = QuantizeDequantize(
        shape, spec["bitwidth"], spec["symmetric"], analyzer_for(scheme, shape)
    )
    if constraints is not None:
        low, high = constraints
        if high is not None:
            if abs(low + high) <= 1e-8 + 1e-5 * abs(high):
                quantizer.symmetric = True
            quantizer.set_range(torch.full(shape, low), torch.full(shape, high))
            quantizer.requires_grad_(False)
        else:
            with torch.no_grad():
                quantizer.min.fill_(low)
            quantizer.min.requires_grad_(False)
        quantizer.allow_overwrite(min=False, max=high is None)
    return quantizer


def apply_plan(
    model: nn.Module, twins: dict[str, nn.Module], plan: dict[str, Any], scheme: QuantScheme
) -> None:
    """Gives the twins their quantizers. The model itself is not touched."""
    default = next(
        (
            tensor.device
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.device.type != "cpu"
        ),
        torch.device("cpu"),
    )
    made: dict[int, QuantizerBase] = {}

    def quantizer(number: int | None, device: torch.device) -> QuantizerBase | None:
        if number is None:
            return None
        if number not in made:
            made[number] = make_quantizer(plan["quantizers"][number], scheme).to(device)
        return made[number]

    for entry in plan["modules"]:
        twin: Any = twins[entry["path"]]
        own = next((*twin.parameters(recurse=False), *twin.buffers(recurse=False)).__iter__(), None)
        device = default if own is None else own.device
        twin.input_quantizers = nn.ModuleList(quantizer(n, device) for n in entry["inputs"])  # type: ignore[misc]
        twin.output_quantizers = nn.ModuleList(quantizer(n, device) for n in entry["outputs"])  # type: ignore[misc]
        for name, number in entry["params"]:
            twin.param_quantizers[name] = quantizer(number, device)
        twin.supported_kernels = entry["supported_kernels"]


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """Puts ``replacements[id(module)]`` in the place of ``module`` wherever it stands; returns the
    model.
    """
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return model


def bypassed(recording: Recording, twins: dict[str, nn.Module]) -> list[str]:
    """Paths of modules that did not run while a function outside of them used their parameters.

    Quantizers of such modules have nothing to quantize: the function takes the parameters as they
    are.
    """
    idle = {
        module["path"]
        for module in recording.graph.modules()
        if module["path"] in twins and not module["calls"]
    }
    if not idle:
        return []
    used = {
        tensor["name"].rpartition(".")[0]
        for tensor in recording.graph.tensors()
        if tensor["kind"] == "parameter" and tensor["consumers"]
    }
    return sorted(idle & used)


def forbid_fast_paths(model: nn.Module) -> None:
    """Keeps torch's fused encoder layer from computing around the quantized modules inside of it.

    ``nn.TransformerEncoderLayer`` hands its parts' weights to one fused kernel in evaluation mode
    without gradients, unless its activation is none that the kernel knows.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def allow_fast_paths(model: nn.Module) -> None:
    """Takes :func:`forbid_fast_paths` back."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            activation = module.activation
            if activation is nn.functional.relu or isinstance(activation, nn.ReLU):
                module.activation_relu_or_gelu = 1
            elif activation is nn.functional.gelu or isinstance(activation, nn.GELU):
                module.activation_relu_or_gelu = 2
