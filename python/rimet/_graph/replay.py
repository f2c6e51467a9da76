"""Runs of a model that can be run again without the model's own code.

:func:`record_program` runs a model once and records what it does: calls of modules, and between
them torch operators as they reach the dispatcher. Recording there, and not at the functions that the
author wrote, sees everything that computes: the inside of ``torch.jit.script`` functions and of
``torch.vmap``, in-place writes, views, random numbers. The result is a :class:`Program` for one
input signature (structure, shapes, dtypes), since sizes are baked into what the author computed
from them. Parameters and buffers are read anew in every run, so a program follows a model whose
weights change.

What leaves torch (``bool``, ``item``, ``tolist``, ``numpy``) may have decided about what ran next:
it is a guard, compared in every run. Still a program is a guess until its result has equalled the
model's own, bit for bit, on a real batch: :func:`verify`. :class:`Replay` does all of that in the
place of a model.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rimet import _core
from rimet._graph.inputs import bind_inputs, tensors_in
from rimet._graph.recorder import evaluating, is_atomic
from rimet._graph.structure import Structure, flatten
from rimet.nn import BaseQuantizationMixin
from rimet.quantization.base import QuantizerBase

logger = logging.getLogger(__name__)

__all__ = [
    "Execution",
    "ForwardFn",
    "Program",
    "Reason",
    "Replay",
    "ReplayError",
    "bits_equal",
    "forked_generators",
    "forward",
    "leaf_paths",
    "own_run",
    "record_program",
    "signature_of",
    "verify",
    "without_fused_attention",
]

ForwardFn = Callable[[nn.Module, Any], Any]


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


# Batches and signatures


def forward(model: nn.Module, batch: Any) -> Any:
    """How a batch goes into a model when the user does not say: see
    :func:`rimet._graph.inputs.bind_inputs`.
    """
    args, kwargs = bind_inputs(model, batch)
    return model(*args, **kwargs)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
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
            first.setdefault((_storage(tensor)._cdata, _geometry(tensor)), position),
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


@dataclass
class _Step:
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
        outside: values in memory that the run did not make: parameters, buffers, constants, and
            views of them.
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
        self.constants = constants
        self.result = result
        self.origins: list[tuple[str, int | None, str | None]] = plain.origins()
        self.outputs: list[int] = plain.outputs
        self.is_random: bool = plain.is_random
        self.outside = frozenset(plain.outside())
        self.steps = [
            _Step(*step, **extra) for step, extra in zip(plain.steps(), extras, strict=True)
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

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's result on a batch of this signature, by running the steps.

        Raises:
            ReplayError: the batch has another signature, or a guard does not hold.
        """
        if signature_of(batch) != self.signature:
            raise ReplayError(Reason.INPUT, type(batch).__name__)
        execution = Execution(self, model, batch)
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
    ) -> None:
        self.program = program
        self.model = model
        self.values: MutableMapping[int, torch.Tensor] = {} if values is None else values
        self.next_step = 0
        self._generators: list[torch.Tensor] | None = None
        if seed is not None and program.is_random:
            with forked_generators():
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
        with torch.no_grad(), _without_autocast(), without_fused_attention():
            if self._generators is None:
                yield
                return
            with forked_generators():
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
        tensor: torch.Tensor | None = owner._parameters.get(attribute)
        if tensor is None:
            tensor = owner._buffers.get(attribute)
        if tensor is None:
            raise ReplayError(Reason.STATE, name)
        return tensor

    def _run(self, step: _Step) -> Any:
        tensors = [self._value(value) for value in step.inputs]
        if step.kind == "guard":
            if step.contents is None or not bits_equal(tensors[0], step.contents):
                raise ReplayError(Reason.GUARD, f"{step.name} in {step.scope or 'the model'}")
            return None
        args, kwargs = step.arguments.build(tensors)
        if step.kind == "operator" and step.function is not None:
            outcome = step.function(*args, **kwargs)
        else:
            module = self.model.get_submodule(step.name)
            if step.autocast:
                with contextlib.ExitStack() as stack:
                    for device, dtype in step.autocast:
                        stack.enter_context(torch.autocast(device, dtype))
                    outcome = module(*args, **kwargs)
            else:
                outcome = module(*args, **kwargs)
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


def _without_autocast() -> contextlib.ExitStack:
    """Operators were recorded below autocast: the casts are steps of their own."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


# Recording


#: Operators that change how a tensor looks at its memory, and nothing else. What looks at memory in a
#: new way is derived when it is used.
_METADATA_ONLY = {"aten::detach_"}
_MEMORY_CHANGING = ("aten::resize", "aten::set_", "aten::_resize", "aten::set.")
#: Methods through which a tensor's contents leave torch unseen by the dispatcher.
_LEAVING = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "__array__",
    torch.Tensor.__dlpack__: "__dlpack__",
}


@cache
def _written_arguments(function: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(function._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write)


@cache
def _is_callable(function: Any) -> bool:
    """Whether an operator overload is what its name stands for."""
    namespace, _, rest = function.name().partition("::")
    name, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
        return getattr(packet, overload or "default") is function
    except AttributeError:
        return False


@dataclass
class _Memory:
    """A storage of the run, and the ways in which its values look at it."""

    number: int
    weak: StorageWeakRef
    """As long as it is held, no other storage gets the same address."""
    values: dict[tuple[Any, ...], int] = field(default_factory=dict)


class _Recorder:
    """Turns the events of a run into calls of the builder. Tensors are known by what memory they look at,
    and how: objects come and go between torch's layers."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.builder = _core.ProgramBuilder()
        self.memories: dict[int, _Memory] = {}
        self.extras: list[dict[str, Any]] = []
        self.constants: list[torch.Tensor] = []
        self.scopes: list[str] = [""]
        self.depth = 0
        """How many calls of leaves, or of the recorder's own, are running."""
        self.written: set[int] = set()
        """Storages that the running leaf has written to."""
        self.is_random = False
        """The running leaf has drawn random numbers."""
        for names in (model.named_parameters, model.named_buffers):
            for name, tensor in names():
                self.declare(tensor, self.builder.state, name)
        for position, tensor in enumerate(flatten(batch)[0]):
            self.declare(tensor, self.builder.input, position)

    def declare(self, tensor: torch.Tensor, declare: Callable[..., Any], what: Any) -> int:
        """A value that no step made."""
        storage = _storage(tensor)
        memory = self.memories.get(storage._cdata)
        if memory is None:
            value, number = declare(what)
            memory = self.memories[storage._cdata] = _Memory(number, StorageWeakRef(storage))
        elif _geometry(tensor) in memory.values:
            return memory.values[_geometry(tensor)]
        else:
            value, _ = declare(what, memory.number)
        memory.values[_geometry(tensor)] = value
        return value

    def lookup(self, tensor: torch.Tensor) -> int:
        """The value that a tensor is."""
        memory = self.memories.get(_storage(tensor)._cdata)
        if memory is None:
            self.constants.append(tensor)
            return self.declare(tensor, self.builder.constant, len(self.constants) - 1)
        geometry = _geometry(tensor)
        value = memory.values.get(geometry)
        if value is None:
            value = self.derive(tensor, memory)
        return value

    def derive(self, tensor: torch.Tensor, memory: _Memory) -> int:
        """A new way to look at known memory, which no recorded operator gave."""
        offset, size, stride, *kind = _geometry(tensor)
        bases = (value for known, value in memory.values.items() if [*known[3:]] == kind)
        base = next(bases, None)
        if base is None:
            raise ReplayError(Reason.REINTERPRETED, f"{tensor.dtype} in {self.scopes[-1]}")
        arguments = flatten(((tensor, size, stride, offset), {}))[1]
        function = torch.ops.aten.as_strided.default
        return self.step("operator", function, arguments, [base], tensor, [])[0]

    def step(
        self,
        kind: str,
        called: Any,
        arguments: Structure,
        inputs: list[int],
        outcome: Any,
        writes: Iterable[int],
        **extra: Any,
    ) -> list[int]:
        """Records a call and binds what came of it."""
        made, structure = flatten(outcome)
        memories = [self.memories.get(_storage(tensor)._cdata) for tensor in made]
        outputs: list[tuple[int | None, int | None]] = []
        for tensor, memory in zip(made, memories, strict=True):
            if memory is None:
                outputs.append((None, None))
            else:
                outputs.append((memory.values.get(_geometry(tensor)), memory.number))
        function = called if kind == "operator" else None
        bound = self.builder.step(
            kind,
            called if function is None else function.name(),
            self.scopes[-1],
            inputs,
            outputs,
            list(writes),
            self.is_random,
        )
        self.extras.append(
            {
                "arguments": arguments,
                "outcome": structure,
                "shapes": [tensor.shape for tensor in made],
                "function": function,
                **extra,
            }
        )
        for tensor, memory, (value, number) in zip(made, memories, bound, strict=True):
            if memory is None:
                # Two results may share memory that was new to both.
                storage = _storage(tensor)
                memory = self.memories.setdefault(
                    storage._cdata, _Memory(number, StorageWeakRef(storage))
                )
            memory.values.setdefault(_geometry(tensor), value)
        return [value for value, _ in bound]

    # Events

    def enter_leaf(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, arguments = flatten((args, kwargs))
        inputs = [self.lookup(tensor) for tensor in tensors]
        self.depth += 1
        self.written.clear()
        self.is_random = False
        return inputs, arguments

    def leave_leaf(self, path: str, entered: Any, outcome: Any) -> None:
        self.depth -= 1
        inputs, arguments = entered
        autocast = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )
        self.step("module", path, arguments, inputs, outcome, self.written, autocast=autocast)
        self.is_random = False

    def operator(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if self.depth:
            self.written.update(self.writes_of(function, args, kwargs))
            self.is_random = self.is_random or is_random
            return function(*args, **kwargs)
        name = function.name()
        if name.startswith(_MEMORY_CHANGING):
            raise ReplayError(Reason.RESIZED, f"{name} in {self.scopes[-1] or 'the model'}")
        if torch.Tag.inplace_view in function.tags or name in _METADATA_ONLY:
            return function(*args, **kwargs)
        if not _is_callable(function):
            raise ReplayError(Reason.OPERATOR, name)
        if name == "aten::lift_fresh":
            return self.fresh(function(*args, **kwargs))
        tensors, arguments = flatten((args, kwargs))
        inputs = [self.lookup(tensor) for tensor in tensors]
        writes = self.writes_of(function, args, kwargs)
        outcome = function(*args, **kwargs)
        if writes or not self.is_known(outcome):
            self.is_random = is_random
            self.step("operator", function, arguments, inputs, outcome, writes)
            self.is_random = False
        return outcome

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made of Python's numbers: every run gets its own, since it may be written to."""
        if _storage(tensor)._cdata not in self.memories:
            with self.unwatched():
                constant = tensor.clone()
            value = self.lookup(constant)
            function = torch.ops.aten.clone.default
            arguments = flatten(((tensor,), {}))[1]
            self.step("operator", function, arguments, [value], tensor, [])
        return tensor

    def guard(self, name: str, tensor: torch.Tensor) -> None:
        """The contents of a tensor leave torch."""
        if self.depth:
            return
        with self.unwatched():
            contents = tensor.detach().clone()
        inputs = [self.lookup(tensor)]
        self.step("guard", name, flatten(())[1], inputs, (), [], contents=contents)

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def is_known(self, outcome: Any) -> bool:
        """Whether an outcome is nothing but values that were there already."""
        made, structure = flatten(outcome)
        if not made or structure.num_tensors != structure.num_leaves:
            return False
        memories = (self.memories.get(_storage(t)._cdata) for t in made)
        return all(m and _geometry(t) in m.values for m, t in zip(memories, made, strict=True))

    def writes_of(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """The known storages that a call writes to."""
        found = []
        for position, name in _written_arguments(function):
            argument = args[position] if position < len(args) else kwargs.get(name)
            for tensor in tensors_in(argument):
                memory = self.memories.get(_storage(tensor)._cdata)
                if memory is not None:
                    found.append(memory.number)
        return found


class _Operators(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.operator(func, args, kwargs or {})


class _LeavingValues(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and func in _LEAVING:
            self.recorder.guard(_LEAVING[func], args[0])
        return func(*args, **(kwargs or {}))


def leaf_paths(model: nn.Module, wanted: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The modules that are called as a whole in a replay, by their first path: those wanted,
    quantized modules and quantizers, and modules of torch without parts. Never one that holds a
    wanted one.
    """
    chosen = {id(model.get_submodule(path)) for path in wanted}
    leaves: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        parts = [id(part) for part in module.modules() if part is not module]
        if not chosen.isdisjoint(parts):
            continue
        is_leaf = isinstance(module, BaseQuantizationMixin | QuantizerBase) or is_atomic(module)
        if id(module) in chosen or is_leaf:
            leaves[path] = module
            inside.update(parts)
    return leaves


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def record_program(
    model: nn.Module, batch: Any, forward_fn: ForwardFn = forward, wanted: Iterable[str] = ()
) -> tuple[Program, Any]:
    """Runs ``forward_fn(model, batch)`` once, in evaluation mode and without gradients, and records
    it.

    The cost grows linearly with the number of operators. Torch's fused paths of attention modules
    are switched off meanwhile, since they pass over the modules that they fuse.

    Args:
        model: any module; hooks and modes are left as they were.
        batch: what ``forward_fn`` takes; nested as it likes.
        forward_fn: runs the model.
        wanted: paths of modules that are to be called as a whole.

    Returns:
        The program, not trusted yet, and the run's result.

    Raises:
        ReplayError: the run cannot be repeated.
    """
    signature = signature_of(batch)
    recorder = _Recorder(model, batch)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch_leaf(path: str, module: nn.Module) -> None:
        entered: list[Any] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not recorder.depth and not _in_functorch():
                entered.append(recorder.enter_leaf(args, kwargs))

        def after(_: nn.Module, args: Any, outcome: Any) -> None:
            if recorder.depth == 1 and entered:
                recorder.leave_leaf(path, entered.pop(), outcome)

        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    def watch_scope(path: str, module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: recorder.scopes.append(path)))
        handles.append(
            module.register_forward_hook(lambda *_: operator.delitem(recorder.scopes, -1))
        )

    try:
        leaves = leaf_paths(model, wanted)
        inside = {id(part) for leaf in leaves.values() for part in leaf.modules()}
        for path, module in model.named_modules():
            if path in leaves:
                watch_leaf(path, module)
            elif id(module) not in inside:
                watch_scope(path, module)
        with own_run(model), _LeavingValues(recorder), _Operators(recorder):
            result = forward_fn(model, batch)
        tensors, structure = flatten(result)
        outputs = [recorder.lookup(tensor) for tensor in tensors]
    finally:
        for handle in handles:
            handle.remove()
    plain = recorder.builder.finish(outputs)
    return Program(plain, recorder.extras, recorder.constants, signature, structure), result


@contextlib.contextmanager
def own_run(model: nn.Module) -> Iterator[None]:
    """How a model runs itself when it is recorded, or compared with its replay: in evaluation mode,
    without gradients and fused attention, its random numbers drawn from a copy of the generator.
    """
    with evaluating(model), without_fused_attention(), forked_generators():
        yield


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """Torch's attention modules call their parts, as they do in training."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def forked_generators() -> contextlib.AbstractContextManager[None]:
    """Random numbers drawn in the context leave torch's generators as they were."""
    return torch.random.fork_rng(devices=_cuda_devices())


def _generator_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _cuda_devices())]


def _set_generator_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(), states[1:], strict=False):
        torch.cuda.set_rng_state(state, device)


def verify(program: Program, model: nn.Module, batch: Any, forward_fn: ForwardFn = forward) -> None:
    """Runs a batch both ways, and trusts the program from then on if the results are the same bits.

    Best done with another batch than the recorded one.

    Raises:
        ReplayError: they are not, or a guard does not hold.
    """
    _, error = _compare(program, model, batch, forward_fn)
    if error is not None:
        raise error


def _compare(
    program: Program, model: nn.Module, batch: Any, forward_fn: ForwardFn
) -> tuple[Any, ReplayError | None]:
    """The model's own result on a batch, and what speaks against the replay's."""
    copied = batch
    if program.written_inputs:  # both runs need inputs that the other has not written to
        tensors, structure = flatten(batch)
        copied = structure.build([tensor.clone() for tensor in tensors])
    with own_run(model):
        own = forward_fn(model, batch)
    written = program.written_state
    if written:
        return own, ReplayError(Reason.WRITTEN, ", ".join(written))
    try:
        with own_run(model):
            replayed = program.run(model, copied)
    except ReplayError as error:
        return own, error
    tensors, structure = flatten(own)
    others, other_structure = flatten(replayed)
    if not structure.matches(other_structure):
        return own, ReplayError(Reason.OUTPUT, "other containers or values")
    for position, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if not bits_equal(tensor, other):
            return own, ReplayError(Reason.OUTPUT, f"output {position}")
    program.trusted = True
    return own, None


class Replay:
    """Runs a model by its records where that is proven to be the same, and itself elsewhere.

    The first batch of a signature is recorded, the second verifies the record, later ones are
    replayed. Where the model cannot be replayed it runs itself, the log says why, and
    :attr:`reasons` keeps it.

    Args:
        model: run in evaluation mode and without gradients.
        forward_fn: runs the model on a batch.

    Attributes:
        programs: by signature.
        reasons: by signature, why there is no use in replaying.
        replayed: how many batches were replayed.
    """

    def __init__(self, model: nn.Module, forward_fn: ForwardFn = forward) -> None:
        self.model = model
        self.forward_fn = forward_fn
        self.programs: dict[Hashable, Program] = {}
        self.reasons: dict[Hashable, ReplayError] = {}
        self.replayed = 0

    def __call__(self, batch: Any) -> Any:
        """``forward_fn(model, batch)``."""
        try:
            signature = signature_of(batch)
        except ReplayError as error:
            signature = None
            self._give_up(signature, error)
        if signature not in self.reasons:
            return self._by_record(signature, batch)
        with own_run(self.model):
            return self.forward_fn(self.model, batch)

    def _by_record(self, signature: Hashable, batch: Any) -> Any:
        program = self.programs.get(signature)
        try:
            if program is None:
                recorded = record_program(self.model, batch, self.forward_fn)
                self.programs[signature], result = recorded
                return result
            if program.trusted:
                with own_run(self.model):
                    result = program.run(self.model, batch)
                self.replayed += 1
                return result
        except ReplayError as error:
            self._give_up(signature, error)
            with own_run(self.model):
                return self.forward_fn(self.model, batch)
        result, obstacle = _compare(program, self.model, batch, self.forward_fn)
        if obstacle is not None:
            self._give_up(signature, obstacle)
        return result

    def _give_up(self, signature: Hashable, error: ReplayError) -> None:
        logger.warning("%s runs itself: %s", type(self.model).__name__, error)
        self.reasons[signature] = error
