"""Programs: runs of a model as data, that can be run again without the model's own code.

A :class:`Program` is made by :func:`rimet._graph.program_recorder.record_program`. It is good for one input
signature (structure, shapes, dtypes), since sizes are baked into what the author computed from
them. Parameters and buffers are read anew in every run, so a program follows a model whose
weights change.

What leaves torch (``bool``, ``item``, ``tolist``, ``numpy``) may have decided about what ran next:
it is a guard, compared in every run.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rimet import _core
from rimet._graph.recorder import evaluating
from rimet._graph.structure import Structure, flatten

__all__ = [
    "Execution",
    "KnownOutcome",
    "Program",
    "Reason",
    "ReplayError",
    "Step",
    "bits_equal",
    "geometry_of",
    "own_run",
    "signature_of",
    "storage_of",
]


class Reason(enum.Enum):
    """Why a model cannot be replayed, or not on this batch."""

    LAYOUT = "a tensor without ordinary memory (sparse, nested) takes part"
    RESIZED = "a tensor's memory is resized or exchanged in place"
    REINTERPRETED = "a tensor's memory is read as another dtype than it was written as"
    OPERATOR = "an operator that cannot be called by its name takes part"
    INPUT = "the batch is not of the recorded signature"
    GUARD = "a value that left torch is not what it was when the program was recorded"
    SHAPE = "a tensor has another shape than it had when the program was recorded"
    STATE = "a parameter or buffer of the recorded model is gone"
    WRITTEN = "the run writes to parameters, buffers or other tensors that outlive it"
    OUTPUT = "the replay's result is not the model's own"


class ReplayError(RuntimeError):
    """A model cannot be replayed; run the model itself instead.

    Attributes:
        reason: what kind of obstacle it is.
        where: the module path, operator or value in question.
    """

    def __init__(self, reason: Reason, where: str) -> None:
        super().__init__(f"{reason.value}: {where}")
        self.reason = reason
        self.where = where


# Signatures


def geometry_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    if tensor.layout != torch.strided:
        raise ReplayError(Reason.LAYOUT, str(tensor.layout))
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError) as error:
        raise ReplayError(Reason.LAYOUT, type(tensor).__name__) from error


def signature_of(batch: Any) -> Hashable:
    """What a program is good for: structure, shapes, strides, dtypes and devices of a batch, values
    in it that are no tensors, and which of its tensors are one and the same.

    Raises:
        ReplayError: the batch holds sparse or nested tensors.
    """
    tensors, structure = flatten(batch)
    first: dict[tuple[Any, ...], int] = {}
    described = tuple(
        (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            first.setdefault((storage_of(tensor)._cdata, geometry_of(tensor)), position),
        )
        for position, tensor in enumerate(tensors)
    )
    return structure, described


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, 0.0 does not equal -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.dtype == torch.bool or not a.numel():
        return torch.equal(a, b)
    first, second = (
        t.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
        for t in (a, b)
    )
    return torch.equal(first, second)


# Programs

KnownOutcome = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Step:
    """A step as it is run: the engine's plain data with its callable and templates."""

    kind: str
    name: str
    scope: str
    inputs: list[int]
    outputs: list[int]
    is_random: bool
    expiring: list[int]
    arguments: Structure
    outcome: Structure
    shapes: list[torch.Size]
    function: Callable[..., Any] | None = None
    """The operator."""
    contents: torch.Tensor | None = None
    """What a guard compares with."""
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """Device types and dtypes of the autocast regions in which a module was called."""


class Program:
    """What a model did on batches of one signature. Made by :func:`record_program`.

    Attributes:
        plain: the engine's data: steps, values, liveness.
        signature: what batches it is good for.
        trusted: its result has equalled the model's own, see :func:`verify`.
        working_set: bytes that comparing the two took: the tensors live at once in the run of a batch,
            and the model's own result.
        made_bytes: what all tensors together took that the recorded run made.
        outside: values in memory that the run did not make: parameters, buffers, constants, and
            views of them.
        mutable: values in memory that the run writes to after it was made.
    """

    def __init__(
        self,
        plain: _core.Program,
        extras: list[dict[str, Any]],
        constants: list[torch.Tensor],
        signature: Hashable,
        result: Structure,
    ) -> None:
        self.plain = plain
        self.signature = signature
        self.trusted = False
        self.working_set = 0
        self.made_bytes = 0
        self.constants = constants
        self.result = result
        self.origins: list[tuple[str, int | None, str | None]] = plain.origins()
        self.outputs: list[int] = plain.outputs
        self.is_random: bool = plain.is_random
        self.outside = frozenset(plain.outside())
        self.mutable = frozenset(plain.mutable())
        self.steps = [
            Step(*step, **extra) for step, extra in zip(plain.steps(), extras, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def calls(self, path: str) -> list[int]:
        """Numbers of the steps that call the module at ``path``, in order."""
        return self.plain.calls(path)

    @property
    def written_state(self) -> list[str]:
        """Names of parameters and buffers, and descriptions of other tensors that outlive the run,
        that the run writes to.
        """
        written = []
        for kind, number, name in self.plain.written():
            if kind == "state" and name is not None:
                written.append(name)
            elif kind == "constant" and number is not None:
                shape = tuple(self.constants[number].shape)
                written.append(f"a tensor of shape {shape} outside of the model")
        return written

    @property
    def written_inputs(self) -> list[int]:
        """Positions of input tensors that the run writes to."""
        written = self.plain.written()
        return [n for kind, n, _ in written if kind == "input" and n is not None]

    def run(
        self,
        model: nn.Module,
        batch: Any,
        values: MutableMapping[int, torch.Tensor] | None = None,
        known: KnownOutcome | None = None,
    ) -> Any:
        """The model's result on a batch of this signature, by running the steps.

        Args:
            model: whose modules, parameters and buffers it runs on.
            batch: of this signature.
            values: where live tensors are kept, see :class:`Execution`.
            known: see :class:`Execution`.

        Raises:
            ReplayError: the batch has another signature, or a guard does not hold.
        """
        if signature_of(batch) != self.signature:
            raise ReplayError(Reason.INPUT, type(batch).__name__)
        execution = Execution(self, model, batch, values, known=known)
        execution.advance(len(self))
        return execution.result()


class Execution:
    """A run of a program that can stop before any step.

    Args:
        program: what to run.
        model: whose modules, parameters and buffers it runs on.
        batch: of the program's signature.
        values: where live tensors are kept, by value number; a dict if None.
        seed: of random numbers of its own, if the program draws some; None: torch's generator.
        known: asked for the outcome of a module's call ahead of making it: with its path and
            arguments, it answers None or what the module would. The run may write to the answer.

    Attributes:
        next_step: the step before which it stands.
    """

    def __init__(
        self,
        program: Program,
        model: nn.Module,
        batch: Any,
        values: MutableMapping[int, torch.Tensor] | None = None,
        seed: int | None = None,
        known: KnownOutcome | None = None,
    ) -> None:
        self.program = program
        self.model = model
        self._known = known
        self.values: MutableMapping[int, torch.Tensor] = {} if values is None else values
        self.next_step = 0
        self._generators: list[torch.Tensor] | None = None
        if seed is not None and program.is_random:
            with _forked_generators():
                torch.manual_seed(seed)
                self._generators = _generator_states()
        tensors = flatten(batch)[0]
        for value, (kind, position, _) in enumerate(program.origins):
            if kind == "input" and position is not None:
                self.values[value] = tensors[position]

    def advance(self, stop: int) -> None:
        """Runs the steps up to, and without, step ``stop``, in the mode the model is in and without
        gradients.

        Raises:
            ReplayError: a guard does not hold. The execution is of no use any more.
        """
        with self._running():
            while self.next_step < stop:
                self._step()

    def call(self) -> Any:
        """Runs the one step before which the run stands, and returns what it gives."""
        with self._running():
            return self._step()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with torch.no_grad(), _without_autocast(), _without_fused_attention():
            if self._generators is None:
                yield
                return
            with _forked_generators():
                _set_generator_states(self._generators)
                yield
                self._generators = _generator_states()

    def _step(self) -> Any:
        step = self.program.steps[self.next_step]
        outcome = self._run(step)
        self.next_step += 1
        for value in step.expiring:
            self.values.pop(value, None)
        return outcome

    def arguments(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of step ``number``, before which the run stands."""
        step = self.program.steps[number]
        return step.arguments.build([self._value(value) for value in step.inputs])

    def result(self) -> Any:
        """The run's result; it must have come to its end."""
        return self.program.result.build([self._value(v) for v in self.program.outputs])

    def _value(self, value: int) -> torch.Tensor:
        kind, number, name = self.program.origins[value]
        if kind == "state" and name is not None:
            return self._state(name)
        if kind == "constant" and number is not None:
            return self.program.constants[number]
        return self.values[value]

    def _state(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:
            raise ReplayError(Reason.STATE, name) from None
        tensor: torch.Tensor | None
        if isinstance(owner, torch.jit.ScriptModule):  # its tables are none of Python's
            tensor = getattr(owner, attribute, None)
        else:
            tensor = owner._parameters.get(attribute)
            if tensor is None:
                tensor = owner._buffers.get(attribute)
        if tensor is None:
            raise ReplayError(Reason.STATE, name)
        return tensor

    def _run(self, step: Step) -> Any:
        tensors = [self._value(value) for value in step.inputs]
        if step.kind == "guard":
            if step.contents is None or not bits_equal(tensors[0], step.contents):
                raise ReplayError(Reason.GUARD, f"{step.name} in {step.scope or 'the model'}")
            return None
        args, kwargs = step.arguments.build(tensors)
        if step.kind == "operator" and step.function is not None:
            outcome = step.function(*args, **kwargs)
        else:
            outcome = self._call_module(step, args, kwargs)
        made, structure = flatten(outcome)
        if not structure.matches(step.outcome):
            raise ReplayError(Reason.GUARD, f"{step.name} in {step.scope or 'the model'}")
        for value, tensor, shape in zip(step.outputs, made, step.shapes, strict=True):
            if tensor.shape != shape:
                where = f"{step.name} gives {tuple(tensor.shape)}, not {tuple(shape)}"
                raise ReplayError(Reason.SHAPE, where)
            if self.program.origins[value][0] in ("step", "input"):
                self.values[value] = tensor
        return outcome

    def _call_module(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.model.get_submodule(step.name)
        if step.autocast:
            with contextlib.ExitStack() as stack:
                for device, dtype in step.autocast:
                    stack.enter_context(torch.autocast(device, dtype))
                return module(*args, **kwargs)
        if self._known is not None and not step.is_random:
            outcome = self._known(step.name, args, kwargs)
            if outcome is not None:
                return outcome
        return module(*args, **kwargs)


def _without_autocast() -> contextlib.ExitStack:
    """Operators were recorded below autocast: the casts are steps of their own."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


# How a model runs itself


@contextlib.contextmanager
def own_run(model: nn.Module) -> Iterator[None]:
    """How a model runs itself when it is recorded, or compared with its replay: in evaluation mode,
    without gradients and fused attention, its random numbers drawn from a copy of the generator.
    """
    with evaluating(model), _without_fused_attention(), _forked_generators():
        yield


@contextlib.contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Torch's attention modules call their parts, as they do in training."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _forked_generators() -> contextlib.AbstractContextManager[None]:
    """Random numbers drawn in the context leave torch's generators as they were."""
    return torch.random.fork_rng(devices=_cuda_devices())


def _generator_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _cuda_devices())]


def _set_generator_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(), states[1:], strict=False):
        torch.cuda.set_rng_state(state, device)
