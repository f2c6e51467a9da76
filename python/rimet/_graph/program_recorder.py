"""Records programs.

A model runs once while hooks see the calls of modules, and a dispatch mode the torch operators between
them. Recording where operators reach the dispatcher, and not at the functions that the author
wrote, sees everything that computes: the inside of ``torch.jit.script`` functions and of ``torch.vmap``,
autocast's casts, in-place writes, views, random numbers.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rimet import _core
from rimet._graph.inputs import ForwardFn, forward, tensors_in
from rimet._graph.program import (
    Program,
    Reason,
    ReplayError,
    geometry_of,
    own_run,
    signature_of,
    storage_of,
)
from rimet._graph.recorder import is_atomic
from rimet._graph.structure import Structure, flatten
from rimet.nn import BaseQuantizationMixin
from rimet.quantization.base import QuantizerBase

__all__ = ["leaf_paths", "record_program"]

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
        self.made_bytes = 0
        """Of the storages that steps have made."""
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
        storage = storage_of(tensor)
        memory = self.memories.get(storage._cdata)
        if memory is None:
            value, number = declare(what)
            memory = self.memories[storage._cdata] = _Memory(number, StorageWeakRef(storage))
        elif geometry_of(tensor) in memory.values:
            return memory.values[geometry_of(tensor)]
        else:
            value, _ = declare(what, memory.number)
        memory.values[geometry_of(tensor)] = value
        return value

    def lookup(self, tensor: torch.Tensor) -> int:
        """The value that a tensor is."""
        memory = self.memories.get(storage_of(tensor)._cdata)
        if memory is None:
            self.constants.append(tensor)
            return self.declare(tensor, self.builder.constant, len(self.constants) - 1)
        geometry = geometry_of(tensor)
        value = memory.values.get(geometry)
        if value is None:
            value = self.derive(tensor, memory)
        return value

    def derive(self, tensor: torch.Tensor, memory: _Memory) -> int:
        """A new way to look at known memory, which no recorded operator gave."""
        offset, size, stride, *kind = geometry_of(tensor)
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
        memories = [self.memories.get(storage_of(tensor)._cdata) for tensor in made]
        outputs: list[tuple[int | None, int | None]] = []
        for tensor, memory in zip(made, memories, strict=True):
            if memory is None:
                outputs.append((None, None))
            else:
                outputs.append((memory.values.get(geometry_of(tensor)), memory.number))
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
                storage = storage_of(tensor)
                memory = self.memories.get(storage._cdata)
                if memory is None:
                    memory = _Memory(number, StorageWeakRef(storage))
                    self.memories[storage._cdata] = memory
                    self.made_bytes += storage.nbytes()
            memory.values.setdefault(geometry_of(tensor), value)
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
        if storage_of(tensor)._cdata not in self.memories:
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
        memories = (self.memories.get(storage_of(t)._cdata) for t in made)
        return all(m and geometry_of(t) in m.values for m, t in zip(memories, made, strict=True))

    def writes_of(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """The known storages that a call writes to."""
        found = []
        for position, name in _written_arguments(function):
            argument = args[position] if position < len(args) else kwargs.get(name)
            for tensor in tensors_in(argument):
                memory = self.memories.get(storage_of(tensor)._cdata)
                if memory is not None:
                    found.append(memory.number)
        return found


class _Operators(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.operator = recorder.operator
        if "torch._dynamo" in sys.modules:
            self.operator = torch._dynamo.disable(recorder.operator)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, one to two seconds, to keep it out of this mode. Where nobody has imported
        # it yet, nobody compiles.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.operator(func, args, kwargs or {})


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
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks; what it computes is recorded operator by operator
        is_leaf = isinstance(module, BaseQuantizationMixin | QuantizerBase) or is_atomic(module)
        if id(module) in chosen or is_leaf:
            leaves[path] = module
            inside.update(parts)
    return leaves


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def record_program(
    model: nn.Module,
    batch: Any,
    forward_fn: ForwardFn = forward,
    wanted: Iterable[str] = (),
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
        # Models may catch what a part of them raises.
        handles.append(
            module.register_forward_hook(
                lambda *_: operator.delitem(recorder.scopes, -1), always_call=True
            )
        )

    try:
        leaves = leaf_paths(model, wanted)
        inside = {id(part) for leaf in leaves.values() for part in leaf.modules()}
        for path, module in model.named_modules():
            if path in leaves:
                watch_leaf(path, module)
            elif id(module) not in inside and not isinstance(module, torch.jit.ScriptModule):
                watch_scope(path, module)
        with own_run(model), _LeavingValues(recorder), _Operators(recorder):
            result = forward_fn(model, batch)
        tensors, structure = flatten(result)
        outputs = [recorder.lookup(tensor) for tensor in tensors]
    finally:
        for handle in handles:
            handle.remove()
    plain = recorder.builder.finish(outputs)
    program = Program(plain, recorder.extras, recorder.constants, signature, structure)
    program.made_bytes = recorder.made_bytes
    return program, result
