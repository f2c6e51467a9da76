"""Records the graph of a model by running it once.

Module calls are seen by forward hooks, functional operations by a ``TorchFunctionMode``; both
become events of ``rimet._core.GraphBuilder``. A ``torch.jit.script`` function, whose inside neither sees, is one
event. There is no tracing: the model computes on real tensors, so reused modules, control flow (the path that is executed), views, in-place operations and
nested inputs and outputs need no special treatment by its author. The cost grows linearly with the
number of operations.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from rimet import _core
from rimet._graph.inputs import tensors_in
from rimet.common.torch_functions import function_name

#: Where the hooks of the model itself run: in the forward of no module.
_OUTSIDE = "(outside of the model)"

# Functions that hand the values of a tensor to Python: each is a consumer of it, a node ``item``.
_READS_VALUES = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
    | {f"__{name}__" for name in ("bool", "int", "float", "complex", "index", "contains")}
    | {f"__{name}__" for name in ("array", "dlpack")}
)


class Twin(NamedTuple):
    """What the graph needs to know about the quantized twin of a module."""

    num_inputs: int
    num_outputs: int
    dynamic_inputs: bool
    dynamic: bool = False
    """Whether it has a quantizer for each tensor that goes in or comes out."""


@dataclass
class Recording:
    """The graph of one run, with the modules it speaks of."""

    graph: _core.Graph
    modules: dict[str, torch.nn.Module]
    """Every module that can be a node, by the path under which it was first met."""
    scopes: dict[str, torch.nn.Module]
    """Every other module, likewise: what runs in its forward are nodes of their own."""
    num_inputs: int
    num_outputs: int
    unwatched: list[str] = field(default_factory=list)
    """Places where a tensor appeared that no watched operation had made."""
    hands_on: list[str] = field(default_factory=list)
    """Paths of modules that returned the very tensor that they were given, in every call."""


def class_key(cls: type) -> str:
    """The name by which the engine's operator tables know a module class."""
    module, name = cls.__module__, cls.__qualname__
    if module.startswith("torch.nn.") and getattr(torch.nn, cls.__name__, None) is cls:
        return f"nn.{name}"
    if module.startswith("rimet.nn.modules.custom"):
        return f"custom.{name}"
    if module.startswith("torchvision."):
        return f"torchvision.{name}"
    return f"{module}.{name}"


def is_frozen_batch_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a ``torchvision.ops.FrozenBatchNorm2d``."""
    return class_key(type(module)) == "torchvision.FrozenBatchNorm2d"


def _describe(tensor: torch.Tensor) -> tuple[list[int], str]:
    try:
        shape = [int(size) for size in tensor.shape]
    except RuntimeError:  # a nested tensor has no regular shape
        shape = []
    return shape, str(tensor.dtype).removeprefix("torch.")


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _storage_key(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # tensor subclasses without storage
        return 0


# Activations have been seen at some ten thousands; masks are filled with -1e9, -1e10, or the least
# number there is.
_LARGEST_ACTIVATION = 1e8


def _is_unbounded(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds infinities, or numbers as large as masks are filled with."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.layout != torch.strided:
        return False
    limit = min(torch.finfo(tensor.dtype).max / 4, _LARGEST_ACTIVATION)
    low, high = torch.aminmax(tensor)
    return bool(low < -limit) or bool(high > limit)


class _Recorder:
    """Turns the events of a run into calls of the builder."""

    def __init__(self, model: torch.nn.Module, look_at_values: bool) -> None:
        self.look_at_values = look_at_values
        self.builder = _core.GraphBuilder()
        self.names = {id(t): name for name, t in model.named_parameters(remove_duplicate=True)}
        self.names.update((id(t), name) for name, t in model.named_buffers(remove_duplicate=True))
        # id of a live tensor object -> (the object, the number of its present value)
        self.values: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self.sharing: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self.scopes: list[str] = [_OUTSIDE]
        self.inside_leaf: list[tuple[str, list[tuple[torch.Tensor, int]]]] = []
        self.unwatched: list[str] = []
        # True while the recorder itself calls torch functions.
        self.looking = False
        # Path of a module that is a node -> whether each call returned the very tensor it was given.
        self.hands_on: dict[str, bool] = {}

    def bind(self, tensor: torch.Tensor, value: int) -> None:
        reference = weakref.ref(tensor)
        known = self.values.get(id(tensor))
        self.values[id(tensor)] = (reference, value)
        key = _storage_key(tensor)
        if key and not (known is not None and known[0]() is tensor):
            group = self.sharing.setdefault(key, [])
            if len(group).bit_count() == 1:  # only now and then: there may be thousands of views
                group[:] = [r for r in group if r() is not None]
            group.append(reference)

    def lookup(self, tensor: torch.Tensor) -> int:
        known = self.values.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        shape, dtype = _describe(tensor)
        name = self.names.get(id(tensor))
        if name is not None:
            value = self.builder.parameter(name, shape, dtype)
        else:
            value = self.builder.constant(shape, dtype)
            self.unwatched.append(self.scopes[-1])
        self.bind(tensor, value)
        return value

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[tuple[int, int | None, float | None]]:
        """The tensors and numbers among the arguments, each with its place."""
        found: list[tuple[int, int | None, float | None]] = []
        slot = 0

        def visit(value: Any) -> None:
            nonlocal slot
            if isinstance(value, torch.Tensor):
                found.append((slot, self.lookup(value), None))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found.append((slot, None, float(value)))
            elif isinstance(value, list | tuple) and next(tensors_in(value), None) is not None:
                for item in value:
                    visit(item)
                return
            elif isinstance(value, Mapping) and next(tensors_in(value), None) is not None:
                for item in value.values():
                    visit(item)
                return
            slot += 1

        for value in args:
            visit(value)
        for value in kwargs.values():
            if next(tensors_in(value), None) is not None:
                visit(value)
        return found

    def results(
        self, outcome: Any, written: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[tuple[list[int], str]]]:
        """The tensors that have a new value: what came out, what was written to, and what shares
        its memory.
        """
        tensors: dict[int, torch.Tensor] = {}
        for tensor in tensors_in(outcome):
            tensors.setdefault(id(tensor), tensor)
        for tensor in written:
            tensors.setdefault(id(tensor), tensor)
            for reference in self.sharing.get(_storage_key(tensor), ()):
                alias = reference()
                if alias is not None:
                    tensors.setdefault(id(alias), alias)
        listed = list(tensors.values())
        return listed, [_describe(tensor) for tensor in listed]

    def bind_all(self, tensors: list[torch.Tensor], values: list[int]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            self.bind(tensor, value)
        if self.look_at_values:
            self.looking = True
            for tensor, value in zip(tensors, values, strict=True):
                if _is_unbounded(tensor):
                    self.builder.mark_unbounded(value)
            self.looking = False

    # Events

    def enter_scope(self, path: str) -> None:
        self.scopes.append(path)
        self.builder.enter_scope()

    def leave_scope(self) -> None:
        self.scopes.pop()
        self.builder.leave_scope()

    def enter_leaf(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        outer = bool(self.inside_leaf)
        before = [] if outer else [(t, _version(t)) for t in tensors_in((args, dict(kwargs)))]
        self.inside_leaf.append((path, before))

    def leave_leaf(
        self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], outcome: Any
    ) -> None:
        _, before = self.inside_leaf.pop()
        if self.inside_leaf:
            return
        written = [tensor for tensor, version in before if _version(tensor) != version]
        same = not written and any(outcome is tensor for tensor, _ in before)
        self.hands_on[path] = self.hands_on.get(path, True) and same
        inputs = self.arguments(args, kwargs)
        tensors, described = self.results(outcome, written)
        self.bind_all(tensors, self.builder.call_module(path, inputs, described))

    def function(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        before: list[tuple[torch.Tensor, int]],
        outcome: Any,
    ) -> None:
        written = [tensor for tensor, version in before if _version(tensor) != version]
        name, scope = function_name(func), self.scopes[-1]
        if not written and next(tensors_in(outcome), None) is None:
            if name not in _READS_VALUES:
                return  # asked for a shape, a dtype, a flag
            name = "item"
        inputs = self.arguments(args, kwargs)
        tensors, described = self.results(outcome, written)
        self.bind_all(
            tensors, self.builder.call_function(name, scope, inputs, described, bool(written))
        )


class _Watch(TorchFunctionMode):
    """Sees every torch function that is called outside of the modules that are nodes themselves."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.recorder.inside_leaf or self.recorder.looking:
            return func(*args, **kwargs)
        before = [(tensor, _version(tensor)) for tensor in tensors_in((args, kwargs))]
        outcome = func(*args, **kwargs)
        self.recorder.function(func, args, kwargs, before, outcome)
        return outcome


@contextlib.contextmanager
def _watch_scripted(recorder: _Recorder) -> Iterator[None]:
    """Sees the calls of ``torch.jit.script`` functions too: torch hands them to no mode."""
    thread = threading.get_ident()
    call = torch.jit.ScriptFunction.__call__

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.inside_leaf or threading.get_ident() != thread:
            return call(function, *args, **kwargs)
        before = [(tensor, _version(tensor)) for tensor in tensors_in((args, kwargs))]
        outcome = call(function, *args, **kwargs)
        recorder.function(function, args, kwargs, before, outcome)
        return outcome

    torch.jit.ScriptFunction.__call__ = watched  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.jit.ScriptFunction.__call__ = call  # type: ignore[method-assign]


def is_atomic(module: torch.nn.Module) -> bool:
    """Whether a module is one operation by itself: a module of torch without parts, a compiled one,
    or torchvision's frozen batch normalization.
    """
    if isinstance(module, torch.jit.ScriptModule) or is_frozen_batch_norm(module):
        return True
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
    in_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(
        module, containers
    )
    return in_torch and not any(True for _ in module.children())


@contextlib.contextmanager
def in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; each module gets its own mode back."""
    with in_evaluation_mode(model), torch.no_grad():
        yield


def record(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    twin_of: Callable[[str, torch.nn.Module], Twin | None] = lambda path, module: None,
    class_of: Callable[[torch.nn.Module], type] = type,
    nodes: Collection[torch.nn.Module] = (),
    transparent: Collection[torch.nn.Module] = (),
    look_at_values: bool = False,
) -> Recording:
    """Runs ``model(*args, **kwargs)`` once, in evaluation mode and without gradients, and records
    its graph.

    Args:
        model: any module; it is left as it was, hooks and modes included.
        args: positional arguments.
        kwargs: keyword arguments.
        twin_of: tells, for a path and its module, the shape of the quantized twin, or None if the
            module has none. A module with a twin is one node; so is a module of ``torch.nn``
            without parts.
        class_of: the class that a module counts as.
        nodes: modules that are one node although they have no twin.
        transparent: modules that are no place of their own: the functions that they call count as
            called by the module that calls them.
        look_at_values: whether to note which tensors hold infinities or the largest numbers of
            their dtype.

    Returns:
        The recording.
    """
    kwargs = kwargs or {}
    recorder = _Recorder(model, look_at_values)
    modules: dict[str, torch.nn.Module] = {}
    scopes: dict[str, torch.nn.Module] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []
    whole = {id(module) for module in nodes}
    # Modules that need no look of their own.
    inside: set[int] = {id(module) for module in transparent}

    def watch_leaf(path: str, module: torch.nn.Module) -> None:
        def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.enter_leaf(path, args, kwargs)

        def after(_: torch.nn.Module, args: Any, kwargs: dict[str, Any], outcome: Any) -> None:
            recorder.leave_leaf(path, args, kwargs, outcome)

        # The hooks of its owner are no part of it: what they compute belongs to the module around.
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=True))

    compiled: dict[int, str] = {}

    def watch_compiled() -> None:
        """Compiled modules take no hooks of their own."""

        def before(module: torch.nn.Module, args: Any) -> None:
            if id(module) in compiled:
                recorder.enter_leaf(compiled[id(module)], args, {})

        def after(module: torch.nn.Module, args: Any, kwargs: Any, outcome: Any) -> None:
            if id(module) in compiled:
                recorder.leave_leaf(compiled[id(module)], args, kwargs, outcome)

        handles.append(register_module_forward_pre_hook(before))
        handles.append(register_module_forward_hook(after, with_kwargs=True))

    def watch_scope(path: str, module: torch.nn.Module) -> None:
        def before(_: torch.nn.Module, args: Any) -> None:
            recorder.enter_scope(path)

        def after(_: torch.nn.Module, args: Any, outcome: Any) -> None:
            recorder.leave_scope()

        handles.append(module.register_forward_pre_hook(before))
        # Models may catch what a part of them raises.
        handles.append(module.register_forward_hook(after, always_call=True, prepend=True))

    try:
        for path, module in model.named_modules():
            if id(module) in inside:
                continue
            twin = twin_of(path, module)
            if twin is None and not is_atomic(module) and id(module) not in whole:
                scopes[path] = module
                watch_scope(path, module)
                continue
            inside.update(id(part) for part in module.modules())
            modules[path] = module
            owned = module.named_parameters(recurse=False)
            params = [(name, [int(size) for size in param.shape]) for name, param in owned]
            groups = getattr(module, "groups", 1)
            shape = twin or Twin(1, 1, False)
            recorder.builder.module(
                path,
                class_key(class_of(module)),
                params,
                groups if isinstance(groups, int) else 1,
                shape.num_inputs,
                shape.num_outputs,
                shape.dynamic_inputs,
                shape.dynamic,
                twin is not None,
            )
            if isinstance(module, torch.jit.ScriptModule):
                compiled[id(module)] = path
            else:
                watch_leaf(path, module)
        if compiled:
            watch_compiled()
        position = -1
        for position, tensor in enumerate(tensors_in((args, dict(kwargs)))):
            shape_, dtype = _describe(tensor)
            recorder.bind_all([tensor], [recorder.builder.input(position, shape_, dtype)])
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(_watch_scripted(recorder))
            stack.enter_context(_Watch(recorder))
            outcome = model(*args, **kwargs)
        outputs = list(tensors_in(outcome))
        for index, tensor in enumerate(outputs):
            recorder.builder.output(recorder.lookup(tensor), index)
    finally:
        for handle in handles:
            handle.remove()
            # torch (2.11) forgets to take a removed global hook out of this, and then warns of global
            # hooks whenever a module is compiled.
            _global_forward_hooks_with_kwargs.pop(handle.id, None)
    return Recording(
        recorder.builder.finish(),
        modules,
        scopes,
        position + 1,
        len(outputs),
        recorder.unwatched,
        [path for path, same in recorder.hands_on.items() if same],
    )
