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

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rimet import _core
from rimet._graph.inputs import bind_inputs, without_labels
from rimet._graph.recorder import in_evaluation_mode
from rimet._graph.replay import (
    Execution,
    ForwardFn,
    Program,
    ReplayError,
    own_run,
    record_program,
    signature_of,
    verify,
)
from rimet._graph.structure import Structure, flatten

logger = logging.getLogger(__name__)

__all__ = ["Activation", "StreamingWalk", "Visit", "WalkReport"]

#: The default budget is this share of the memory that is free when the walk begins.
DEFAULT_MEMORY_SHARE = 0.25


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still get: of the device, or of the machine and the control group
    the process is in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(free, 0)


# Live tensors


@dataclass
class _Parked:
    """A tensor of another device, in a mapped file meanwhile."""

    mapped: torch.Tensor
    device: torch.device


class _LiveTensors(MutableMapping[int, torch.Tensor]):
    """Tensors by number, under the budget of a store from one :meth:`settle` to the next."""

    def __init__(self, store: _core.ActivationStore, outside: frozenset[int] = frozenset()) -> None:
        self._store = store
        self._outside = outside
        self._tensors: dict[int, torch.Tensor | _Parked] = {}
        self._keys: dict[int, int] = {}
        self._unsettled: set[int] = set()

    def __getitem__(self, number: int) -> torch.Tensor:
        tensor = self._tensors[number]
        if isinstance(tensor, _Parked):
            self._load(tensor.mapped.untyped_storage()._cdata, tensor.device)
            tensor = self._tensors[number]
            assert isinstance(tensor, torch.Tensor)
        return tensor

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        if self._tensors.get(number) is not tensor:
            self._let_go(number)
            self._tensors[number] = tensor
            if number not in self._outside:
                self._unsettled.add(number)

    def __delitem__(self, number: int) -> None:
        del self._tensors[number]
        self._let_go(number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def settle(self) -> None:
        """Counts what is new, and moves what is over the budget to mapped files."""
        moved: dict[int, torch.Tensor] = {}
        for number in sorted(self._unsettled):
            tensor = self._tensors[number]
            assert isinstance(tensor, torch.Tensor)
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in moved and self._store.hold(key, size):
                self._keys[number] = key
                continue
            if key not in moved:
                moved[key] = self._store.spill(_bytes_of(storage, tensor.device))
                mapped_key = moved[key].untyped_storage()._cdata
                self._store.hold_mapped(mapped_key, size)
            else:
                mapped_key = moved[key].untyped_storage()._cdata
                self._store.hold(mapped_key, size)
            self._keys[number] = mapped_key
            mapped = _like(tensor, moved[key].untyped_storage(), torch.device("cpu"))
            on_cpu = tensor.device.type == "cpu"
            self._tensors[number] = mapped if on_cpu else _Parked(mapped, tensor.device)
        self._unsettled.clear()

    def _load(self, key: int, device: torch.device) -> None:
        """Brings a storage, with all tensors on it, back to its device."""
        parked = {
            number: tensor.mapped
            for number, tensor in self._tensors.items()
            if isinstance(tensor, _Parked) and tensor.mapped.untyped_storage()._cdata == key
        }
        source = next(iter(parked.values())).untyped_storage()
        loaded = _bytes_of(source, torch.device("cpu")).to(device).untyped_storage()
        for number, mapped in parked.items():
            self[number] = _like(mapped, loaded, device)

    def _let_go(self, number: int) -> None:
        self._unsettled.discard(number)
        key = self._keys.pop(number, None)
        if key is not None:
            self._store.release(key)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _like(
    tensor: torch.Tensor, storage: torch.UntypedStorage, device: torch.device
) -> torch.Tensor:
    """The same look at another storage."""
    made = torch.empty(0, dtype=tensor.dtype, device=device)
    with torch.no_grad():
        made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return made


class _LiveBatches(Sequence[Any]):
    """Nested values, one for each batch, their tensors under the budget of a store."""

    def __init__(self, store: _core.ActivationStore) -> None:
        self._store = store
        self._batches: list[tuple[Structure, _LiveTensors]] = []

    def append(self, value: Any) -> None:
        tensors, structure = flatten(value)
        live = _LiveTensors(self._store)
        live.update(enumerate(tensors))
        live.settle()
        self._batches.append((structure, live))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        structure, live = self._batches[index]
        value = structure.build([live[i] for i in range(len(live))])
        live.settle()
        return value

    def clear(self) -> None:
        for _, live in self._batches:
            live.clear()
        self._batches.clear()


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


class _Side:
    """A model and all batches, standing before one of its layers."""

    def __init__(self, model: nn.Module, walk: StreamingWalk) -> None:
        self.model = model
        self.walk = walk
        self.kept_inputs = _LiveBatches(walk._store)
        self.kept_outputs = _LiveBatches(walk._store)

    def order(self, paths: Sequence[str]) -> dict[str, int]:
        """The paths that run, each with the place of its first call."""
        raise NotImplementedError

    def come_to(self, path: str) -> None:
        """Runs all batches up to the first call of the layer."""
        self.kept_inputs.clear()
        self.kept_outputs.clear()

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments on a batch."""
        raise NotImplementedError

    def run_layer(self) -> None:
        """Runs the layer on all batches, and keeps inputs and outputs until it is left."""
        raise NotImplementedError

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
            for index, batch in enumerate(walk._batches)
        ]

    def start(self, program: Program, index: int, batch: Any) -> Execution:
        if program.written_inputs:
            tensors, structure = flatten(batch)
            for position in program.written_inputs:
                tensors[position] = tensors[position].clone()
            batch = structure.build(tensors)
        live = _LiveTensors(self.walk._store, program.outside)
        execution = Execution(program, self.model, batch, live, self.walk.seed + index)
        live.settle()
        return execution

    def order(self, paths: Sequence[str]) -> dict[str, int]:
        first = self.executions[0].program
        return {path: calls[0] for path in paths if (calls := first.calls(path))}

    def come_to(self, path: str) -> None:
        super().come_to(path)
        self.path = path
        for index in range(len(self.executions)):
            self.advance(index, path)

    def advance(self, index: int, path: str) -> None:
        execution = self.executions[index]
        try:
            execution.advance(self.first_call(execution, path))
        except ReplayError as error:
            # What this batch decides is not what the recorded one did: it gets a program of its own.
            logger.info("batch %d is recorded anew before %s: %s", index, path, error)
            batch = self.walk._batches[index]
            program, _ = record_program(self.model, batch, self.walk._forward, self.wanted)
            verify(program, self.model, batch, self.walk._forward)
            execution.values.clear()
            execution = self.executions[index] = self.start(program, index, batch)
            execution.advance(self.first_call(execution, path))
            self.walk.report.recorded_anew += 1
        self.settle(execution)

    def first_call(self, execution: Execution, path: str) -> int:
        calls = execution.program.calls(path)
        if not calls or calls[0] < execution.next_step:
            raise _OutOfOrder(path)
        return calls[0]

    @staticmethod
    def settle(execution: Execution) -> None:
        assert isinstance(execution.values, _LiveTensors)
        execution.values.settle()

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(self.kept_inputs):
            return self.kept_inputs[index]
        execution = self.executions[index]
        arguments = execution.arguments(execution.next_step)
        self.settle(execution)
        return arguments

    def run_layer(self) -> None:
        for execution in self.executions:
            arguments = execution.arguments(execution.next_step)
            step = execution.program.steps[execution.next_step]
            if not set(step.inputs).isdisjoint(step.outputs):  # the layer works in place
                tensors, structure = flatten(arguments)
                arguments = structure.build([tensor.clone() for tensor in tensors])
            self.kept_inputs.append(arguments)
            self.kept_outputs.append(execution.call())
            self.settle(execution)

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
        for index in range(len(self.walk._batches)):
            self._run_to_layer(index, before=True)

    def arguments(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.kept_inputs[index]

    def run_layer(self) -> None:
        for index in range(len(self.walk._batches)):
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
                self.walk._forward(self.model, self.walk._batches[index])
            return True
        except _LayerReached:
            return False
        finally:
            for handle in handles:
                handle.remove()


# Activation functions behind a layer


_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU6: "relu6",
    nn.ReLU: "relu",
    nn.PReLU: "prelu",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
}


@dataclass(frozen=True)
class Activation:
    """The activation function that alone takes a layer's result.

    Attributes:
        name: ``relu``, ``relu6``, ``prelu``, ``gelu``, ... as in ``torch.nn.functional``.
        module: the module that computes it, or None if a function does.
    """

    name: str
    module: nn.Module | None
    _function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The activation of a tensor, which is left as it was."""
        return self._function(input)


def _activation(program: Program, model: nn.Module, path: str) -> Activation | None:
    number = program.plain.single_consumer(path)
    if number is None:
        return None
    step = program.steps[number]
    if step.kind == "module":
        module = model.get_submodule(step.name)
        for cls, name in _ACTIVATIONS.items():
            if isinstance(module, cls):
                if getattr(module, "inplace", False):
                    return Activation(name, module, lambda x: module(x.clone()))
                return Activation(name, module, module)
        return None
    name = step.name.removeprefix("aten::").rstrip("_")
    if name == "hardtanh" and step.arguments.build([torch.empty(0)])[0][1:] == (0, 6):
        name = "relu6"
    if name not in _ACTIVATIONS.values() or len(step.inputs) != 1 or step.function is None:
        return None
    function = step.function

    def call(input: torch.Tensor) -> torch.Tensor:
        args, kwargs = step.arguments.build([input.clone() if step.name.endswith("_") else input])
        return function(*args, **kwargs)

    return Activation(name, None, call)


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
        peak_resident_bytes: the most bytes of live activations in memory at once.
        spilled_bytes: bytes written to mapped files.
    """

    visited: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    streamed: dict[str, bool] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    recorded_anew: int = 0
    memory_budget: int = 0
    peak_resident_bytes: int = 0
    spilled_bytes: int = 0


class Visit:
    """A layer, with what goes in and what comes out on each batch.

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
        length = len(side.walk._batches)
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
        memory_budget: bytes of live activations, batches included, that may be in memory at once;
            the rest is in memory-mapped files. None: a quarter of the memory that is free when the
            walk begins. What comes on top: the activations within one layer of one batch, what
            the technique itself needs, and storages of less than 16 KiB.
        scratch_dir: folder for these files, which have no names and vanish with the process,
            however it ends. None: the system's folder for temporary files. A folder in memory
            (tmpfs) saves none.
        seed: batch ``i`` draws its random numbers, if the model does so, from ``seed + i``.
        progress: label of a progress bar over the layers; None: no bar.

    Attributes:
        report: what the walk did.

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
        self.progress = progress
        self._source = batches
        self._forward_fn = forward_fn
        if memory_budget is None:
            memory_budget = int(free_memory(self._device()) * DEFAULT_MEMORY_SHARE)
        if memory_budget < 0:
            raise ValueError(f"memory_budget: expected at least 0 bytes, got {memory_budget}")
        folder = tempfile.gettempdir() if scratch_dir is None else os.fspath(scratch_dir)
        self._store = _core.ActivationStore(memory_budget, folder)
        self._batches = _LiveBatches(self._store)
        self._sides: dict[str, _Side] = {}
        self._records: dict[str, Program] = {}
        self.report = WalkReport(memory_budget=memory_budget)

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
            self._take_batches()
            order = self._order(paths)
            for path in tqdm(order, desc=self.progress, disable=self.progress is None):
                yield self._come_to(path, order)
                self.report.visited.append(path)

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
        if self._forward_fn is not None:
            return self._forward_fn(model, batch)
        args, kwargs = bind_inputs(model, batch)
        return model(*args, **kwargs)

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
            places.append(side.order(paths))
        for path in paths:
            if not all(path in place for place in places):
                self.report.not_run[path] = "it does not run as a module on the first batch"
                logger.warning("%s is not visited: %s", path, self.report.not_run[path])
        first = places[0]
        return sorted((p for p in paths if p not in self.report.not_run), key=first.__getitem__)

    def _programs(self, name: str, model: nn.Module, paths: list[str]) -> dict[Any, Program]:
        """A trusted program for each signature: recorded on its first batch, verified on its
        second.
        """
        by_signature: dict[Any, list[int]] = {}
        for index, batch in enumerate(self._batches):
            by_signature.setdefault(signature_of(batch), []).append(index)
        programs: dict[Any, Program] = {}
        for signature, members in by_signature.items():
            program, _ = record_program(model, self._batches[members[0]], self._forward, paths)
            self._records.setdefault(name, program)
            verify(program, model, self._batches[members[min(1, len(members) - 1)]], self._forward)
            programs[signature] = program
        return programs

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

    def _come_to(self, path: str, order: list[str]) -> Visit:
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
            activation = _activation(program, self._models[name], path)
            break
        return Visit(path, self._sides.get("float"), self._sides.get("quant"), activation)

    def _close(self) -> None:
        for side in self._sides.values():
            side.close()
        self._batches.clear()
        usage = self._store.usage()
        self.report.peak_resident_bytes = usage["peak_resident"]
        self.report.spilled_bytes = usage["spilled"]
