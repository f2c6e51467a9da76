"""What a simulation quantizes, and what it leaves in floating point and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from rimet import _core
from rimet.nn import BaseQuantizationMixin
from rimet.nn.generic import is_generic
from rimet.quantsim import _placing

if TYPE_CHECKING:
    from rimet._graph import Recording
    from rimet.quantsim.quantsim import QuantizationSimModel

__all__ = ["SimulationReport"]


@dataclass
class SimulationReport:
    """What a :class:`QuantizationSimModel` made of a model. ``print`` it.

    All paths are those of the simulated model.
    """

    num_quantizers: dict[str, int] = field(default_factory=dict)
    """Number of enabled quantizers by place: ``"input"``, ``"output"``, ``"param"``. One that
    several places share counts once, at the first of them."""
    functional_ops: list[str] = field(default_factory=list)
    """Functional operations with quantizers."""
    unquantized: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of the modules and functional operations that are left in floating point."""
    generic_twins: list[tuple[str, str]] = field(default_factory=list)
    """(path, class) of the modules whose class rimet does not know: they are quantized by the
    rules that hold for all modules."""
    bypassed: list[str] = field(default_factory=list)
    """Modules that did not run themselves although something computed with their parameters: these
    are not quantized."""
    reused: list[str] = field(default_factory=list)
    """Modules without parameters that run several times and have no quantizers, since one range
    would serve different tensors."""
    unreached: list[str] = field(default_factory=list)
    """Modules and functional operations with quantizers that the last ``compute_encodings`` left
    without range, since no data came there: their inputs and outputs stay in floating point."""

    @classmethod
    def _of(
        cls,
        sim: QuantizationSimModel,
        recording: Recording,
        twins: _placing.Twins,
        plan: _core.Plan,
        functional_ops: list[str],
    ) -> SimulationReport:
        report = cls(functional_ops=functional_ops, reused=plan.reused)
        report.num_quantizers = _count(sim.model)
        report.bypassed = _placing.bypassed(recording, twins.of, plan)
        for path, twin in twins.of.items():
            if is_generic(twin):
                original: Any = type(twin)
                original = original._original_cls
                name = f"{original.__module__}.{original.__qualname__}"
                report.generic_twins.append((path, name))
        for (scope, function, turn), reason in plan.left():
            report.unquantized.append((f"{scope}: {function} (call {turn})", reason))
        if not plan.functional:
            for node in recording.graph.nodes():
                if node["function"] is not None and not node["passthrough"]:
                    report._add_function(node)
        for path, module in recording.modules.items():
            if path not in twins.of and not isinstance(module, nn.Identity):
                if path in recording.hands_on:
                    reason = "returns what it is given"
                elif path in twins.ignored:
                    reason = f"{type(module).__name__} is ignored"
                else:
                    reason = f"{type(module).__name__} has no quantized twin"
                report.unquantized.append((path, reason))
        return report

    def _add_function(self, node: dict[str, Any]) -> None:
        if _core.function_has_module_form(node["function"]):
            place = f"{node['scope']}: {node['function']} (call {node['turn']})"
            self.unquantized.append((place, "quantize_functional_ops is off"))

    def warnings(self) -> Iterator[str]:
        """What should be looked at, a line each."""
        for path in self.bypassed:
            yield (
                f"{path} did not run itself: something else computed with its parameters, so they "
                "are not quantized"
            )
        for path in self.reused:
            yield (
                f"{path} runs more than once and holds no parameters: it gets no quantizers, since "
                "one range would serve different tensors"
            )

    def unreached_warning(self) -> str:
        """What to do about :attr:`unreached`."""
        return (
            f"{len(self.unreached)} modules saw no data in calibration, so their inputs and "
            f"outputs stay in floating point: {', '.join(self.unreached)}. Run compute_encodings "
            "on data that reaches them too, or load encodings for them"
        )

    def __str__(self) -> str:
        counts = self.num_quantizers
        lines = [
            f"quantizers: {counts['input']} of inputs, {counts['output']} of outputs, "
            f"{counts['param']} of parameters"
        ]
        sections: tuple[tuple[str, list[str]], ...] = (
            ("functional operations with quantizers", self.functional_ops),
            ("left in floating point", [f"{path}: {why}" for path, why in self.unquantized]),
            (
                "unknown module classes, quantized by the general rules",
                [f"{path or 'the model itself'}: {name}" for path, name in self.generic_twins],
            ),
            ("did not run themselves, parameters not quantized", self.bypassed),
            ("reused without parameters, not quantized", self.reused),
            ("saw no data in calibration, in floating point until they do", self.unreached),
        )
        for title, entries in sections:
            if entries:
                lines.append(f"{title} ({len(entries)}):")
                lines += [f"  {entry}" for entry in entries]
        return "\n".join(lines)


def _count(model: nn.Module) -> dict[str, int]:
    counts = {"input": 0, "output": 0, "param": 0}
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, BaseQuantizationMixin):
            continue
        for kind in counts:
            for quantizer in getattr(module, f"{kind}_quantizers").modules():
                if hasattr(quantizer, "_forward_tensor") and id(quantizer) not in seen:
                    seen.add(id(quantizer))
                    counts[kind] += 1
    return counts
