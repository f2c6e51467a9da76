"""From a placement plan to quantized modules: twins, quantizers, and putting them into the
model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rimet import _core
from rimet._graph import Recording, Twin
from rimet.common.defs import QuantScheme
from rimet.nn import BaseQuantizationMixin, QuantizationMixin, UnknownModuleError
from rimet.nn.functional_ops import FunctionalOp, make_opaque, make_scope
from rimet.nn.generic import generic_twin, is_generic
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


class Twins(NamedTuple):
    """The quantized twins of a model's modules, by the path at which a module is met first."""

    of: dict[str, nn.Module]
    ignored: dict[str, nn.Module]
    """Modules that shall stay as they are."""
    unknown: dict[type[nn.Module], tuple[list[str], UnknownModuleError]]
    """Classes of modules without parts that have no twin: where they stand."""
    wholes: dict[str, nn.Module]
    """Quantized modules whose steps are modules with quantizers of their own (multi-head attention): ``of`` has the
    steps. They stand in the model while it is recorded, so that the graph has the steps, too."""


def make_twins(
    model: nn.Module, quantize_unknown: bool = False, masks_are_functions: bool = False
) -> Twins:
    """Makes the quantized twin of every module that has one.

    The model is left as it is; twins share the parameters of their modules.

    Args:
        model: the model.
        quantize_unknown: whether modules without parts whose class is unknown get a generic twin.
        masks_are_functions: whether steps that put on masks are taken for the functions that they call,
            which have no quantizers where they do.
    """
    twins = Twins({}, {}, {}, {})
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside or isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule)):
            continue
        is_leaf = next(module.children(), None) is None and _runs(module)
        try:
            twin = QuantizationMixin.from_module(module)
        except UnknownModuleError as error:
            if not is_leaf or isinstance(module, nn.Identity):
                continue
            if not quantize_unknown:
                twins.unknown.setdefault(type(module), ([], error))[0].append(path)
                continue
            twin = generic_twin(module)
        if twin is not module:
            inside.update(id(part) for part in module.modules())
            steps = dict(steps_of(twin))
            if not steps:
                twins.of[path] = twin
                continue
            twins.wholes[path] = twin
            masks: tuple[str, ...] = getattr(twin, "_mask_steps", ())
            for name, step in steps.items():
                if not (masks_are_functions and name in masks):
                    twins.of[f"{path}.{name}" if path else name] = step
        elif is_leaf or type(module) in QuantizationMixin._ignored_module_types:
            twins.ignored[path] = module
    return twins


def steps_of(twin: nn.Module) -> list[tuple[str, nn.Module]]:
    """The quantized modules that a quantized module consists of, by name; of most there are none."""
    if not isinstance(twin, BaseQuantizationMixin):
        return []
    modules: Iterator[tuple[str, nn.Module]] = twin.named_modules()
    return [(name, m) for name, m in modules if name and isinstance(m, BaseQuantizationMixin)]


def take_apart(model: nn.Module, simulated: nn.Module) -> nn.Module:
    """Puts quantized modules without quantizers into a floating-point model wherever ``simulated`` has one that
    consists of steps, so that both have the steps' paths; returns the model.
    """
    wholes = [path for path, module in simulated.named_modules() if steps_of(module)]
    originals = [model.get_submodule(path) for path in wholes]
    return replace_modules(model, {id(m): QuantizationMixin.from_module(m) for m in originals})


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def problems_of(twins: Twins, others: Sequence[str]) -> RuntimeError | None:
    """One error for all that keeps a model from being simulated; ``others``: what is not about
    unknown modules.
    """
    if twins.unknown:
        return _UnknownModules(twins.unknown, others)
    return RuntimeError("\n\n".join(others)) if others else None


class _UnknownModules(UnknownModuleError):
    """Several module classes have no twin."""

    def __init__(
        self,
        unknown: dict[type[nn.Module], tuple[list[str], UnknownModuleError]],
        others: Sequence[str],
    ) -> None:
        self.unknown, self.others = unknown, others
        first = next(iter(unknown.values()))[1]
        super().__init__(first.module_cls, first.mixin_cls)

    def __reduce__(self) -> Any:
        return type(self), (self.unknown, self.others)

    def generate_err_msg(self) -> str:
        """Other problems; every class with the paths of its instances; the ways on for each."""
        places = "\n".join(
            f"  - {cls.__module__}.{cls.__qualname__} at "
            f"{', '.join(path or 'the model itself' for path in paths)}"
            for cls, (paths, _) in self.unknown.items()
        )
        advice = "\n\n".join(str(error) for _, error in self.unknown.values())
        unknown = f"These module classes have no quantized twin:\n{places}\n\n{advice}"
        return "\n\n".join((*self.others, unknown))


def describe_twin(twin: nn.Module) -> Twin:
    """What the graph needs to know about a twin."""
    assert isinstance(twin, BaseQuantizationMixin)
    if is_generic(twin):
        return Twin(1, 1, True, dynamic=True)
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


class QuantizerMaker:
    """Makes the quantizers of a plan, each once and on the device where it will be used."""

    def __init__(self, model: nn.Module, plan: _core.Plan, scheme: QuantScheme) -> None:
        self._plan = plan
        self._scheme = scheme
        self._made: dict[int, QuantizerBase] = {}
        # Of modules without parameters: the first device that is not the CPU.
        self.device = next(
            (
                tensor.device
                for tensor in (*model.parameters(), *model.buffers())
                if tensor.device.type != "cpu"
            ),
            torch.device("cpu"),
        )

    def quantizer(self, number: int | None, device: torch.device) -> QuantizerBase | None:
        """The quantizer of this number in the plan."""
        if number is None:
            return None
        if number not in self._made:
            spec = self._plan.quantizer(number)
            self._made[number] = make_quantizer(spec, self._scheme).to(device)
        return self._made[number]

    def make_all(self) -> None:
        """Makes every kind of quantizer in the plan, so that none can fail later."""
        for spec in self._plan.distinct_quantizers():
            make_quantizer(spec, self._scheme)

    def fill(self, module: Any, entry: dict[str, Any], device: torch.device) -> None:
        """Gives a quantized module the quantizers of its entry."""
        for kind in ("inputs", "outputs"):
            quantizers = [self.quantizer(number, device) for number in entry[kind]]
            slots = nn.ModuleList(quantizers)  # type: ignore[arg-type]
            setattr(module, f"{kind[:-1]}_quantizers", slots)
        for name, number in entry.get("params", {}).items():
            module.param_quantizers[name] = self.quantizer(number, device)
        module.supported_kernels = entry["supported_kernels"]


def apply_plan(twins: dict[str, nn.Module], plan: _core.Plan, maker: QuantizerMaker) -> None:
    """Gives the twins their quantizers. The model itself is not touched."""
    for entry in plan.modules():
        twin: Any = twins.get(entry["path"])
        if twin is None:
            continue
        own = next((*twin.parameters(recurse=False), *twin.buffers(recurse=False)).__iter__(), None)
        maker.fill(twin, entry, maker.device if own is None else own.device)


def make_functional(
    recording: Recording,
    twins: Twins,
    plan: _core.Plan,
    maker: QuantizerMaker,
) -> list[str]:
    """Makes scopes of the modules in whose forward functional operations have quantizers.

    All other modules whose forward calls torch functions are made known, too, so that a call is
    never taken for that of another module.

    Returns:
        Paths of the operations that have quantizers.
    """
    calls: dict[str, dict[str, list[str | None]]] = {}
    for scope, function, number in plan.calls():
        calls.setdefault(scope, {})[function] = [None] * number
    ops: dict[str, dict[str, FunctionalOp]] = {}
    for entry in plan.functions():
        if all(number is None for number in (*entry["inputs"], *entry["outputs"])):
            continue
        if entry["scope"] in twins.ignored or entry["scope"] not in recording.scopes:
            continue  # the hooks of the model itself are in no scope
        op = FunctionalOp(entry["function"], entry["in_place"])
        maker.fill(op, entry, maker.device)
        if all(number is None for number in entry["inputs"]):
            op.input_quantizers = nn.ModuleList()
        name = f"{entry['function']}_{entry['turn']}"
        ops.setdefault(entry["scope"], {})[name] = op
        calls[entry["scope"]][entry["function"]][entry["turn"]] = name
    if not ops:
        return []
    for path, module in recording.scopes.items():
        own = {function: tuple(names) for function, names in calls.get(path, {}).items()}
        if _runs(module) and (own or type(module) not in _CONTAINERS):
            make_scope(module, path, own, ops.get(path, {}))
    for path, module in recording.modules.items():
        if path in twins.of or isinstance(module, torch.jit.ScriptModule):
            continue
        if _runs(module):
            make_opaque(module)
    return [
        f"{path}{'.' if path else ''}{recording.scopes[path]._functional_name}.{name}"
        for path, named in ops.items()
        for name in named
    ]


def reused_without_parameters(
    recording: Recording, twins: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Modules with a twin but no parameters that ran several times, by path; the steps of a larger
    twin stay what they are.
    """
    return {
        module["path"]: recording.modules[module["path"]]
        for module in recording.graph.modules()
        if module["path"] in twins
        and len(module["calls"]) > 1
        and not module["params"]
        and recording.modules[module["path"]] is not twins[module["path"]]
    }


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it is the quantized twin of."""
    return QuantizationMixin.qcls_to_cls.get(type(module), type(module))


@contextlib.contextmanager
def put_wholes(model: nn.Module, twins: Twins) -> Iterator[nn.Module]:
    """Puts the quantized modules of which the graph has the steps in their places; an error takes them
    back. Gives the model, which may be such a module itself.
    """
    originals = {path: model.get_submodule(path) for path in twins.wholes}
    changed = replace_modules(model, {id(originals[p]): twin for p, twin in twins.wholes.items()})
    try:
        yield changed
    except BaseException:
        replace_modules(changed, {id(twin): originals[p] for p, twin in twins.wholes.items()})
        raise


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


def bypassed(recording: Recording, twins: dict[str, nn.Module], plan: _core.Plan) -> list[str]:
    """Paths of modules that did not run while a function outside of them used their parameters.

    Quantizers of such modules have nothing to quantize: the function takes the parameters as they
    are, unless it has a quantizer for its weight itself.
    """
    with_weight = {
        (entry["scope"], entry["function"], entry["turn"])
        for entry in plan.functions()
        if entry["quantizes_weight"]
    }
    idle = {
        module["path"]
        for module in recording.graph.modules()
        if module["path"] in twins and not module["calls"]
    }
    if not idle:
        return []
    nodes = recording.graph.nodes()
    used = {
        tensor["name"].rpartition(".")[0]
        for tensor in recording.graph.tensors()
        if tensor["kind"] == "parameter"
        for consumer in tensor["consumers"]
        if _place(nodes[consumer]) not in with_weight
    }
    return sorted(idle & used)


def _place(node: dict[str, Any]) -> tuple[str, str | None, int]:
    """Where a functional node stands, as a plan names it."""
    return node["scope"], node["function"], node["turn"]


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
