"""The executor of layer-wise techniques: walks a model once, all batches at a time.

A technique that treats one layer after the other needs each layer's inputs on all calibration
batches: as the floating-point model computes them, and as the simulation does with the layers so
far treated. Running the model anew for each layer costs the square of the depth.
:class:`StreamingWalk` carries the live activations of all batches from layer to layer instead, each
layer running once per batch and model, and keeps them within a memory budget (see the engine's
``ActivationStore``). Where a model cannot be replayed, it is run up to the layer after all, and the
report says why.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rimet import _core
from rimet._graph.activation import Activation, following_activation
from rimet._graph.inputs import ForwardFn, forward, without_labels
from rimet._graph.live import (
    DEFAULT_MEMORY_SHARE,
    LiveBatches,
    LiveTensors,
    bytes_of,
    free_memory,
    large_blocks_apart,
)
from rimet._graph.program import (
    Execution,
    Program,
    Reason,
    ReplayError,
    own_run,
    signature_of,
)
from rimet._graph.program_recorder import record_program
from rimet._graph.recorder import in_evaluation_mode
from rimet._graph.replay import verify
from rimet._graph.structure import flatten
from rimet.nn.reuse import reuse_quantized_params

logger = logging.getLogger(__name__)

__all__ = ["Activation", "StreamingWalk", "Visit", "WalkReport"]

#: Of the budget, for what a technique makes of a layer's inputs.
TECHNIQUE_SHARE = 0.25
#: Of the budget: where all that a walk reads and makes takes less, nothing need go back to the system
#: meanwhile. The rest is for the technique and the runs.
SMALL_SHARE = 0.5


class _Lazy(Sequence[torch.Tensor]):
    """A tensor for each batch, loaded when it is asked for."""

    def __init__(self, length: int, load: Callable[[int], torch.Tensor]) -> None:
        self._length = length
        self._load = load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._load(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"batch {index} of {self._length}")
        return self._load(index % self._length)


def _first_tensor(value: Any) -> torch.Tensor:
    tensors, _ = flatten(value)
    if not tensors:
        raise ValueError("the layer was called without tensors, or gave none")
    return tensors[0]


# One model's side of the walk


class _Side(abc.ABC):
    """A model and all batches, standing before one of its layers."""

    def __init__(self, model: nn.Module, walk: StreamingWalk) -> None:
        self.model = model
        self.walk = walk
        self.kept_inputs = LiveBatches(walk._store)
        self.kept_outputs = LiveBatches(walk._store)

    @abc.abstractmethod
    def order(self, paths: Sequence[str]) -> dict[str, int]:
        """The paths that run, each with the place of its first call."""

    def come_to(self, path: str) -> None:
        """Runs all batches up to the first call of the layer."""
        self.kept_inputs.clear()
        self.kept_outputs.clear()

    @abc.abstractmethod
    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments on a batch."""

    @abc.abstractmethod
    def run_layer(self) -> None:
        """Runs the layer on all batches, and keeps inputs and outputs until it is left."""

    def close(self) -> None:
        self.kept_inputs.clear()
        self.kept_outputs.clear()


class _Streamed(_Side):
    """Carries the live tensors of all batches forward."""

    def __init__(
        self,
        model: nn.Module,
        walk: StreamingWalk,
        programs: dict[Any, Program],
        wanted: Sequence[str],
    ) -> None:
        super().__init__(model, walk)
        self.wanted = wanted
        self.path = ""
        self.executions = [
            self.start(programs[signature_of(batch)], index, batch)
            for index, batch in enumerate(walk.batches)
        ]

    def start(self, program: Program, index: int, batch: Any) -> Execution:
        if program.written_inputs:
            tensors, structure = flatten(batch)
            for position in program.written_inputs:
                tensors[position] = tensors[position].clone()
            batch = structure.build(tensors)
        live = LiveTensors(self.walk._store, program.outside, program.mutable)
        execution = Execution(program, self.model, batch, live, self.walk.seed + index)
        live.settle()
        return execution

    def order(self, paths: Sequence[str]) -> dict[str, int]:
        first = self.executions[0].program
        return {path: calls[0] for path in paths if (calls := first.calls(path))}

    def come_to(self, path: str) -> None:
        super().come_to(path)
        self.path = path
        with contextlib.ExitStack() as stack:
            for module in self.modules_on_the_way(path):
                stack.enter_context(reuse_quantized_params(module))
            for index in range(len(self.executions)):
                self.advance(index, path)

    def modules_on_the_way(self, path: str) -> list[nn.Module]:
        """What runs before the layer, each once: its parameters are quantized once for all
        batches.
        """
        first = self.executions[0]
        steps = first.program.steps[first.next_step : self.first_call(first, path)]
        names = dict.fromkeys(step.name for step in steps if step.kind == "module")
        return [self.model.get_submodule(name) for name in names]

    def advance(self, index: int, path: str) -> None:
        execution = self.executions[index]
        try:
            execution.advance(self.first_call(execution, path))
        except ReplayError as error:
            # What this batch decides is not what the recorded one did: it gets a program of its own.
            logger.info("batch %d is recorded anew before %s: %s", index, path, error)
            batch = self.walk.batches[index]
            program, _ = record_program(self.model, batch, self.walk._forward, self.wanted)
            verify(program, self.model, batch, self.walk._forward)
            execution.values.clear()
            execution = self.executions[index] = self.start(program, index, batch)
            execution.advance(self.first_call(execution, path))
            self.walk.report.recorded_anew += 1
        self.values_of(execution).settle()

    def first_call(self, execution: Execution, path: str) -> int:
        calls = execution.program.calls(path)
        if not calls or calls[0] < execution.next_step:
            raise _OutOfOrder(path)
        return calls[0]

    @staticmethod
    def values_of(execution: Execution) -> LiveTensors:
        assert isinstance(execution.values, LiveTensors)
        return execution.values

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(self.kept_inputs):
            return self.kept_inputs[index]
        execution = self.executions[index]
        arguments = execution.arguments(execution.next_step)
        self.values_of(execution).settle()
        return arguments

    def run_layer(self) -> None:
        store = self.walk._store
        for execution in self.executions:
            values = self.values_of(execution)
            step = execution.program.steps[execution.next_step]
            is_in_place = not set(step.inputs).isdisjoint(step.outputs)
            arguments = execution.arguments(execution.next_step)
            values.settle()
            inputs = LiveTensors(store)
            for position, (value, tensor) in enumerate(
                zip(step.inputs, flatten(arguments)[0], strict=True)
            ):
                if is_in_place:
                    inputs[position] = tensor.clone()
                elif value in values:
                    inputs.share(position, values, value)
                else:  # a parameter, buffer or constant
                    inputs[position] = tensor
            self.kept_inputs.append_live(step.arguments, inputs)
            given, structure = flatten(execution.call())
            values.settle()
            outputs = LiveTensors(store)
            for position, (value, tensor) in enumerate(zip(step.outputs, given, strict=True)):
                if value in values:
                    outputs.share(position, values, value)
                else:  # nothing else needs it
                    outputs[position] = tensor
            self.kept_outputs.append_live(structure, outputs)

    def close(self) -> None:
        super().close()
        for execution in self.executions:
            execution.values.clear()


class _OutOfOrder(Exception):
    """A batch runs the layers in another order than the first one, or not all of them."""


class _LayerReached(BaseException):
    """Ends a run of a model; no `except Exception` of the model's stops it."""


class _Reruns(_Side):
    """Runs the model up to the layer, for every layer anew."""

    def __init__(self, model: nn.Module, walk: StreamingWalk) -> None:
        super().__init__(model, walk)
        self.path = ""

    def order(self, paths: Sequence[str]) -> dict[str, int]:
        places: dict[str, int] = {}

        def notice(path: str) -> None:
            places.setdefault(path, len(places))

        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(
                lambda *_, path=path: notice(path)
            )
            for path in paths
        ]
        self._run(0, handles)
        return places

    def come_to(self, path: str) -> None:
        super().come_to(path)
        self.path = path
        for index in range(len(self.walk.batches)):
            self._run_to_layer(index, before=True)

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.kept_inputs[index]

    def run_layer(self) -> None:
        for index in range(len(self.walk.batches)):
            self._run_to_layer(index, before=False)

    def _run_to_layer(self, index: int, before: bool) -> None:
        layer = self.model.get_submodule(self.path)

        def keep_arguments(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tensors, structure = flatten((args, kwargs))
            self.kept_inputs.append(structure.build([tensor.clone() for tensor in tensors]))
            raise _LayerReached

        def keep_outcome(_: nn.Module, args: Any, outcome: Any) -> None:
            self.kept_outputs.append(outcome)
            raise _LayerReached

        if before:
            handle = layer.register_forward_pre_hook(keep_arguments, prepend=True, with_kwargs=True)
        else:
            handle = layer.register_forward_hook(keep_outcome)
        if self._run(index, [handle]):
            raise RuntimeError(f"{self.path} did not run on batch {index}")

    def _run(self, index: int, handles: list[Any]) -> bool:
        """Runs a batch; whether it came to its end."""
        try:
            with own_run(self.model):
                torch.manual_seed(self.walk.seed + index)
                self.walk._forward(self.model, self.walk.batches[index])
            return True
        except _LayerReached:
            return False
        finally:
            for handle in handles:
                handle.remove()


# The walk


@dataclass
class WalkReport:
    """What a walk did.

    Attributes:
        visited: paths of the layers visited, in order.
        not_run: paths of layers that were asked for but not visited, and why.
        streamed: for ``float`` and ``quant``: whether the model was replayed.
        reasons: for ``float`` and ``quant``: why it was run up to each layer instead.
        recorded_anew: batches that got a program of their own on the way, since a value in them had
            decided otherwise.
        memory_budget: bytes for live activations.
        working_set_bytes: the part of the budget that is set aside for running one batch.
        peak_resident_bytes: the most bytes of live activations in memory at once.
        spilled_bytes: bytes written to mapped files.
    """

    visited: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    streamed: dict[str, bool] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    recorded_anew: int = 0
    memory_budget: int = 0
    working_set_bytes: int = 0
    peak_resident_bytes: int = 0
    spilled_bytes: int = 0


class Visit:
    """A layer, with what goes in and what comes out on each batch, until the next visit begins.

    Attributes:
        path: the layer's path in both models.
        float_module: the layer of the floating-point model; None without such a model.
        quant_module: the layer of the simulation, which may be changed; None without one.
        following_activation: the activation function that alone takes the layer's result, or None.
        float_inputs: first tensor argument of the layer in the floating-point model, by batch.
        quant_inputs: the same in the simulation, computed with all changes made so far.
    """

    def __init__(
        self,
        path: str,
        float_side: _Side | None,
        quant_side: _Side | None,
        following_activation: Activation | None,
    ) -> None:
        self.path = path
        self.float_module = float_side and float_side.model.get_submodule(path)
        self.quant_module = quant_side and quant_side.model.get_submodule(path)
        self.following_activation = following_activation
        self._float_side = float_side
        self.float_inputs = self._inputs(float_side)
        self.quant_inputs = self._inputs(quant_side)

    @staticmethod
    def _inputs(side: _Side | None) -> Sequence[torch.Tensor]:
        if side is None:
            return ()
        length = len(side.walk.batches)
        return _Lazy(length, lambda i: _first_tensor(side.arguments(i)))

    @property
    def float_outputs(self) -> Sequence[torch.Tensor]:
        """First tensor that the layer of the floating-point model gives, by batch. The layer runs
        when this is first read.
        """
        side = self._float_side
        if side is None:
            return ()
        if not len(side.kept_outputs):
            with side.walk._running():
                side.run_layer()
        return _Lazy(len(side.kept_outputs), lambda i: _first_tensor(side.kept_outputs[i]))

    def float_arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments of the layer in the floating-point model on a batch, positional and by
        keyword.
        """
        if self._float_side is None:
            raise ValueError("float_arguments: expected a walk with a float_model, got none")
        return self._float_side.arguments(index)


class StreamingWalk:
    """Visits layers in the order of execution, with their inputs on all batches.

    Usage::

        walk = StreamingWalk(float_model, sim.model, batches)
        for visit in walk.visit(paths):
            treat(visit.quant_module, visit.float_outputs, visit.quant_inputs)

    What is changed in ``visit.quant_module`` (and nowhere else) takes effect in what the layers
    behind it are given. Both models are in evaluation mode during the walk.

    Args:
        float_model: the floating-point model, or None.
        quant_model: the simulation, with the same paths, or None.
        batches: calibration data, iterated over once. Without ``forward_fn`` a batch is a tensor, a
            tuple or list of positional arguments, or a dict of keyword arguments; moved to the
            model's device; what a tuple holds beyond the positional arguments of ``forward``
            (labels) is left out.
        forward_fn: called with a model and a batch, runs the model on the batch.
        memory_budget: bytes of activations that may be in memory at once, batches and the run of one
            batch included; the rest is in memory-mapped files. None: a quarter of the memory that is
            free when the walk begins. What comes on top: the run of one batch where it alone takes
            more than the budget (see :attr:`WalkReport.working_set_bytes`), memory that a module
            takes within its forward, what the technique itself needs, and storages of less than
            16 KiB.
        scratch_dir: folder for these files, which have no names and vanish with the process,
            however it ends. None: the system's folder for temporary files. A folder in memory
            (tmpfs) saves none.
        seed: batch ``i`` draws its random numbers, if the model does so, from ``seed + i``.
        progress: label of a progress bar over the layers; None: no bar.

    Attributes:
        report: what the walk did.
        technique_bytes: the part of the budget that is set aside for what the technique makes of a
            layer's inputs. It is the same memory as that for running one batch: they take turns.

    Raises:
        ValueError: neither model, no batches, a path that is no module, or one inside another.
    """

    def __init__(
        self,
        float_model: nn.Module | None,
        quant_model: nn.Module | None,
        batches: Iterable[Any],
        forward_fn: ForwardFn | None = None,
        memory_budget: int | None = None,
        scratch_dir: str | os.PathLike[str] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> None:
        models = {"float": float_model, "quant": quant_model}
        self._models = {name: model for name, model in models.items() if model is not None}
        if not self._models:
            raise ValueError("float_model, quant_model: expected at least one model, got None")
        self.seed = seed
        self._source = batches
        self._forward_fn = forward_fn
        if memory_budget is None:
            memory_budget = int(free_memory(self._device()) * DEFAULT_MEMORY_SHARE)
        if memory_budget < 0:
            raise ValueError(f"memory_budget: expected at least 0 bytes, got {memory_budget}")
        folder = tempfile.gettempdir() if scratch_dir is None else os.fspath(scratch_dir)
        self._store = _core.ActivationStore(memory_budget, folder)
        self._store.reserve(memory_budget // 2)  # until it is known what a run takes
        self.technique_bytes = int(memory_budget * TECHNIQUE_SHARE)
        self._batches = LiveBatches(self._store)
        self._sides: dict[str, _Side] = {}
        self._records: dict[str, Program] = {}
        self._working_set = 0
        self._walked_bytes = 0
        """Of the batches, and of all that running the models on them makes."""
        self._progress = progress
        self._bar: Any = None
        self.report = WalkReport(memory_budget=memory_budget)

    @property
    def batches(self) -> Sequence[Any]:
        """The batches, as they go into the models; loaded when first asked for."""
        if not len(self._batches):
            with large_blocks_apart():
                self._take_batches()
        return self._batches

    def note(self, text: str) -> None:
        """Shows a short text, such as the last loss, beside the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def visit(self, paths: Iterable[str]) -> Iterator[Visit]:
        """Walks once; yields the layers in the order in which they first run.

        Args:
            paths: of the layers to visit, in any order; neither may be inside another.
        """
        paths = list(dict.fromkeys(paths))
        self._check(paths)
        with contextlib.ExitStack() as stack:
            for model in self._models.values():
                stack.enter_context(in_evaluation_mode(model))
            stack.callback(self._close)
            order = self._order(paths)
            self._bar = stack.enter_context(
                tqdm(order, self._progress, disable=self._progress is None, unit="layer")
            )
            for path in self._bar:
                with self._running():
                    visit = self._come_to(path)
                yield visit
                self.report.visited.append(path)
                self._account()

    def _device(self) -> torch.device:
        for model in self._models.values():
            for tensor in (*model.parameters(), *model.buffers()):
                return tensor.device
        return torch.device("cpu")

    def _check(self, paths: list[str]) -> None:
        for model in self._models.values():
            modules = {}
            for path in paths:
                try:
                    modules[path] = model.get_submodule(path)
                except AttributeError:
                    raise ValueError(
                        f"paths: expected paths of modules, got {path!r}, which is none"
                    ) from None
                if isinstance(modules[path], torch.jit.ScriptModule):
                    raise ValueError(f"paths: expected layers, got {path!r}, a compiled module")
            chosen = {id(module): path for path, module in modules.items()}
            for path, module in modules.items():
                inner = (chosen.get(id(part)) for part in module.modules() if part is not module)
                held = next((p for p in inner if p is not None), None)
                if held is not None:
                    raise ValueError(f"paths: expected layers, got {path!r}, which holds {held!r}")

    def _take_batches(self) -> None:
        device = self._device()
        model = next(iter(self._models.values()))
        for batch in self._source:
            if self._forward_fn is None:
                batch = without_labels(model, batch)
                tensors, structure = flatten(batch)
                batch = structure.build([tensor.to(device) for tensor in tensors])
            self._batches.append(batch)
        if not len(self._batches):
            raise ValueError("batches: expected at least one batch, got none")

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        return (self._forward_fn or forward)(model, batch)

    def _order(self, paths: list[str]) -> list[str]:
        """Prepares both sides; returns the paths that run, in order."""
        places: list[dict[str, int]] = []
        for name, model in self._models.items():
            try:
                side: _Side = _Streamed(model, self, self._programs(name, model, paths), paths)
                self.report.streamed[name] = True
            except ReplayError as error:
                side = self._rerun(name, str(error))
            self._sides[name] = side
            with self._running():
                places.append(side.order(paths))
        if all(self.report.streamed.values()):
            self._store.reserve(max(self._working_set, self.technique_bytes))
        usage = self._store.usage()
        if usage["spilled"] or usage["resident"] > self._store.limit():
            # Memory for the activations: the batches themselves are hardly needed any more.
            self._batches.evict()
        for path in paths:
            if not all(path in place for place in places):
                self.report.not_run[path] = "it does not run as a module on the first batch"
                logger.warning("%s is not visited: %s", path, self.report.not_run[path])
        first = places[0]
        return sorted((p for p in paths if p not in self.report.not_run), key=first.__getitem__)

    def _programs(self, name: str, model: nn.Module, paths: list[str]) -> dict[Any, Program]:
        """A trusted program for each signature: recorded on its first batch, verified on its
        last.
        """
        by_signature: dict[Any, list[int]] = {}
        for index, batch in enumerate(self.batches):
            by_signature.setdefault(signature_of(batch), []).append(index)
            self._walked_bytes += bytes_of(flatten(batch)[0])
        programs: dict[Any, Program] = {}
        for signature, members in by_signature.items():
            with large_blocks_apart():
                program = record_program(model, self.batches[members[0]], self._forward, paths)[0]
            self._records.setdefault(name, program)
            self._walked_bytes += len(members) * program.made_bytes
            self._give_back()
            free = self._store.limit() - self._store.usage()["resident"]
            with self._running():
                try:
                    verify(program, model, self.batches[members[-1]], self._forward, max(free, 0))
                except ReplayError as error:
                    if error.reason not in (Reason.GUARD, Reason.SHAPE):
                        raise
                    # It decides otherwise, and will get a program of its own. This one needs its proof
                    # still.
                    verify(program, model, self.batches[members[0]], self._forward)
            self._give_back()
            self._working_set = max(self._working_set, program.working_set)
            programs[signature] = program
        return programs

    @property
    def _is_small(self) -> bool:
        """Whether the budget holds even if the allocator keeps all memory that the walk ever uses."""
        most = self.report.memory_budget * SMALL_SHARE
        return all(self.report.streamed.values()) and self._walked_bytes < most

    def _running(self) -> contextlib.AbstractContextManager[None]:
        """A context for runs of a model."""
        # Fresh pages for every layer take a sixth of the time of Sequential MSE.
        return contextlib.nullcontext() if self._is_small else large_blocks_apart()

    def _give_back(self) -> None:
        """After a run of the whole model."""
        if not self._is_small:
            self._store.trim()

    def _rerun(self, name: str, reason: str) -> _Side:
        model = self._models[name]
        logger.warning(
            "%s (%s) cannot be replayed, so it is run up to each layer: %s",
            type(model).__name__,
            name,
            reason,
        )
        self.report.streamed[name] = False
        self.report.reasons[name] = reason
        return _Reruns(model, self)

    def _come_to(self, path: str) -> Visit:
        for name, side in self._sides.items():
            try:
                side.come_to(path)
            except (ReplayError, _OutOfOrder) as error:
                side.close()
                why = f"{error}, at {path}"
                if isinstance(error, _OutOfOrder):
                    why = f"not all batches run the layers in the same order, at {path}"
                self._sides[name] = self._rerun(name, why)
                self._sides[name].come_to(path)
        activation = None
        for name, program in self._records.items():
            activation = following_activation(program, self._models[name], path)
            break
        return Visit(path, self._sides.get("float"), self._sides.get("quant"), activation)

    def _close(self) -> None:
        for side in self._sides.values():
            side.close()
        self._batches.clear()
        self._account()

    def _account(self) -> None:
        usage = self._store.usage()
        self.report.working_set_bytes = self._working_set
        self.report.peak_resident_bytes = usage["peak_resident"]
        self.report.spilled_bytes = usage["spilled"]
