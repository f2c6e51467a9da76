"""Quantizers for functional operations: ``F.relu(x)``, ``x + y``, ``torch.cat`` inside a model's
own forward methods.

A :class:`FunctionalMode` (a ``TorchFunctionMode``) is on while a model with such quantizers runs.
Each module whose forward calls torch functions is a *scope*: its class is replaced by a subclass
(:func:`make_scope`) whose forward tells the mode where it is, and a child ``functional`` holds a
:class:`FunctionalOp` for each call that has quantizers. A call is known by its scope, the name of
the function, and how often that was called before in the same forward: ``functional.add_0`` is the
first addition. Inside quantized modules, and inside others that are one operation of the graph
(:func:`make_opaque`), the mode is off.

The scopes stay what they were otherwise: state dicts, copies, pickles, ``torch.jit.trace``,
``torch.compile`` and ``torch.export`` take them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rimet import _core
from rimet.common.torch_functions import canonical_name
from rimet.nn.base import BaseQuantizationMixin
from rimet.nn.derived import Derived, derive
from rimet.nn.nested import map_arguments, map_results
from rimet.nn.slots import quantize, quantize_fresh

logger = logging.getLogger(__name__)

__all__ = [
    "FunctionalMode",
    "FunctionalOp",
    "FunctionalOps",
    "make_opaque",
    "make_scope",
    "outside_functional_mode",
    "restore",
]

_modes = torch._C._len_torch_function_stack
_mode_at = torch._C._get_function_stack_at
_push_mode = torch._C._push_on_torch_function_stack
_pop_mode = torch._C._pop_torch_function_stack
_get_tracing_state = torch._C._get_tracing_state


#: Functions of single tensors that return one torch has just allocated, or else (activations told
#: to work in place) one of their arguments: the output quantizer may write into it.
_FRESH = frozenset(
    "add sub mul div matmul bmm linear conv1d conv2d conv3d relu relu6 gelu silu sigmoid tanh "
    "softmax hardswish hardsigmoid leaky_relu elu layer_norm group_norm batch_norm rms_norm "
    "scaled_dot_product_attention".split()
)


class FunctionalOp(BaseQuantizationMixin, nn.Module):
    """The quantizers of one call of a torch function.

    :param function: canonical name of the function, such as ``"add"``
    :param in_place: the call writes its result into its first argument, and so does the quantizer
    """

    cls_to_qcls: ClassVar[dict[type[nn.Module], type[Any]]] = {}
    qcls_to_cls: ClassVar[dict[type[Any], type[nn.Module]]] = {}

    def __init__(self, function: str, in_place: bool = False) -> None:
        super().__init__()
        self.function = function
        self.in_place = in_place

    @classmethod
    def wrap(cls, module_cls: type[nn.Module]) -> type[Any]:
        """Not for functions.

        :raises TypeError: always; a function has no module class
        """
        raise TypeError(f"FunctionalOp.wrap: expected no module class, got {module_cls!r}")

    def get_original_module(self) -> nn.Module:
        """The operation without quantizers: one that only calls the function."""
        return FunctionalOp(self.function, self.in_place)

    def forward(  # type: ignore[override]
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``func(*args, **kwargs)`` on quantized tensors, its results quantized."""
        if self.in_place and "out" not in kwargs:
            return self._run_in_place(func, args, kwargs)
        args, kwargs = self._quantize_inputs(args, kwargs)
        outcome = func(*args, **kwargs)
        if self.in_place:  # `out`, with which there are no gradients
            return outcome.copy_(self._quantize_result(0, outcome))
        if type(outcome) is Tensor:
            if self.function in _FRESH:
                quantizer = self._modules["output_quantizers"]._modules.get("0")
                if quantizer is None:
                    return outcome
                return quantize_fresh(self, quantizer, outcome, (*args, *kwargs.values()))
            return self._quantize_result(0, outcome)
        return map_results(self._quantize_result, outcome)

    def _run_in_place(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = "" if args else next(iter(kwargs))
        target = args[0] if args else kwargs[name]
        args, kwargs = self._quantize_inputs(args, kwargs)
        first = args[0] if args else kwargs[name]
        if first is target and torch.is_grad_enabled():
            # The gradient may need the result before quantization: it must not be overwritten.
            first = target.clone()
        outcome = func(first, *args[1:], **kwargs) if args else func(**{**kwargs, name: first})
        quantized = self._quantize_result(0, outcome)
        return target if quantized is target else target.copy_(quantized)

    def _quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._modules["input_quantizers"]._modules:
            return args, kwargs
        return map_arguments(self._quantize_input, args, kwargs)

    def _quantize_input(self, slot: int, tensor: Tensor) -> Any:
        quantizer = self._modules["input_quantizers"]._modules.get(str(slot))
        if quantizer is None:
            return tensor
        return quantize(self, "input_quantizers", slot, quantizer, tensor)

    def _quantize_result(self, index: int, tensor: Tensor) -> Any:
        quantizer = self._modules["output_quantizers"]._modules.get(str(index))
        if quantizer is None:
            return tensor
        return quantize(self, "output_quantizers", index, quantizer, tensor)

    def extra_repr(self) -> str:
        """The function, for ``repr``."""
        return f"{self.function}, in_place=True" if self.in_place else self.function


class FunctionalOps(nn.Module):
    """The functional operations with quantizers of one scope, by name."""

    def forward(self, x: Any) -> Any:
        """``x`` itself: a model that runs its children one after the other passes here, too."""
        return x


class _Frame:
    """Where the mode is: in one forward of one scope."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope
        self.calls: dict[str, tuple[str | None, ...]] = scope._functional_calls
        # How often each function was called before in this forward.
        self.counts: dict[str, int] = {}


class FunctionalMode(TorchFunctionMode):
    """Hands calls of torch functions over to the :class:`FunctionalOp` that is there for them."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        # Of the forward methods that are running, innermost last; None: the mode is off.
        self.frames: list[_Frame | None] = [frame]

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        frame = self.frames[-1]
        if frame is not None:
            function = canonical_name(func)
            calls = frame.calls.get(function)  # type: ignore[arg-type]
            if calls is not None and _get_tracing_state() is not None and _computes_size(args):
                return func(*args, **kwargs)
            if calls is not None:
                turn = frame.counts.get(function, 0)  # type: ignore[arg-type]
                frame.counts[function] = turn + 1  # type: ignore[index]
                if turn < len(calls):
                    name = calls[turn]
                    if name is not None:
                        ops = frame.scope._modules[frame.scope._functional_name]
                        return ops._modules[name](func, args, kwargs)
                elif not torch.compiler.is_dynamo_compiling():
                    _warn_unrecorded(frame.scope, function, turn)
            elif not torch.compiler.is_dynamo_compiling():
                _warn_unrecorded(frame.scope, function, 0)
        return func(*args, **kwargs)


# What arithmetic on sizes is made of, as torch.jit.trace writes it down.
_SIZE_ARITHMETIC = frozenset(
    f"aten::{name}"
    for name in (
        *("add", "sub", "rsub", "mul", "div", "floor_divide", "remainder", "pow", "neg", "abs"),
        *("floor", "ceil", "to", "detach", "minimum", "maximum"),
    )
)


def _computes_size(args: tuple[Any, ...]) -> bool:
    """Whether a call computes a number from sizes of tensors alone.

    Under ``torch.jit.trace`` sizes are tensors, so that ``x.size(1) + 1`` is a torch function; in
    the recorded run it was a sum of integers, and it does not count.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(tensors) and all(_is_size(tensor) for tensor in tensors)


def _is_size(tensor: Tensor) -> bool:
    if tensor.dim():
        return False
    pending, is_size = [torch._C._get_value_trace(tensor)], False  # type: ignore[attr-defined]
    while pending:
        node = pending.pop().node()
        if node.kind() == "prim::NumToTensor":
            is_size = True
        elif node.kind() in _SIZE_ARITHMETIC:
            pending += node.inputs()
        elif node.kind() != "prim::Constant":
            return False
    return is_size


_warned: set[tuple[str, str | None]] = set()


def _warn_unrecorded(scope: Any, function: str | None, turn: int) -> None:
    """Says once that a call is not in the record: another path through the model was taken."""
    key = (scope._functional_path, function)
    if key in _warned or function is None or not _core.function_has_module_form(function):
        return
    _warned.add(key)
    logger.warning(
        "%s called %s (call %d) where the recorded run did not: it stays in floating point. Make "
        "the simulation with a dummy_input that takes this path",
        scope._functional_path or "the model",
        function,
        turn,
    )


def _current() -> FunctionalMode | None:
    """The mode that is on in this thread, whether other modes stand above it or not."""
    for depth in range(_modes() - 1, -1, -1):
        mode = _mode_at(depth)
        if type(mode) is FunctionalMode:
            return mode
    return None


def outside_functional_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward method that runs with the mode off: it is one operation of the graph."""

    @functools.wraps(forward)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth = _modes()
        if depth == 0:
            return forward(self, *args, **kwargs)
        top = _mode_at(depth - 1)
        if type(top) is FunctionalMode:
            _pop_mode()
            try:
                return forward(self, *args, **kwargs)
            finally:
                _push_mode(top)
        mode = _current()
        if mode is None:
            return forward(self, *args, **kwargs)
        mode.frames.append(None)
        try:
            return forward(self, *args, **kwargs)
        finally:
            mode.frames.pop()

    return alone


# -- modules whose class is replaced ---------------------------------------------------------------


def _scope_class(original_cls: type[nn.Module]) -> Any:
    """The class of scopes that were of ``original_cls``."""
    bases: tuple[type, ...] = (Derived, original_cls)
    if issubclass(original_cls, nn.ModuleDict):
        bases = (Derived, _DictWithoutFunctional, original_cls)
    elif issubclass(original_cls, nn.Sequential | nn.ModuleList):
        bases = (Derived, _ListWithoutFunctional, original_cls)
    base_forward: Callable[..., Any] = original_cls.forward

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = _Frame(self)
        mode = _current() if _modes() else None
        if mode is None:
            with FunctionalMode(frame):
                return base_forward(self, *args, **kwargs)
        mode.frames.append(frame)
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            mode.frames.pop()

    return derive(_scope_class, original_cls, bases, lambda: {"forward": forward})


def _opaque_class(original_cls: type[nn.Module]) -> Any:
    """The class of modules that were of ``original_cls`` and run with the mode off."""
    forward = outside_functional_mode(original_cls.forward)
    return derive(
        _opaque_class, original_cls, (Derived, original_cls), lambda: {"forward": forward}
    )


class _ListWithoutFunctional:
    """For scopes that are lists: the child that holds the operations is no item."""

    _modules: dict[str, Any]
    _functional_name: str

    def __len__(self) -> int:
        return len(self._modules) - (self._functional_name in self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        name = self._functional_name
        return iter([module for key, module in self._modules.items() if key != name])


class _DictWithoutFunctional(_ListWithoutFunctional):
    """For scopes that are dictionaries: the child that holds the operations is no item."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Keys of the items."""
        return [key for key in self._modules if key != self._functional_name]

    def values(self) -> list[nn.Module]:
        """The items."""
        return [self._modules[key] for key in self.keys()]

    def items(self) -> list[tuple[str, nn.Module]]:
        """Keys and items."""
        return [(key, self._modules[key]) for key in self.keys()]


def make_scope(
    module: nn.Module,
    path: str,
    calls: Mapping[str, tuple[str | None, ...]],
    ops: Mapping[str, FunctionalOp],
) -> None:
    """Make a module a scope, in place.

    :param path: its path in the model, for messages
    :param calls: canonical name of a function -> for each of its calls in the recorded forward, the
        name of the operation, or ``None`` if it has no quantizers
    :param ops: the operations by name; a child ``functional`` will hold them (``functional_ops`` if
        that name is taken)
    """
    scope: Any = module
    scope._functional_name = "functional_ops" if hasattr(module, "functional") else "functional"
    scope._functional_calls = dict(calls)
    scope._functional_path = path
    if ops:
        child = FunctionalOps()
        for name, op in ops.items():
            child.add_module(name, op)
        scope.add_module(scope._functional_name, child)
    module.__class__ = _scope_class(type(module))


def make_opaque(module: nn.Module) -> None:
    """Let a module run with the mode off, in place: it is one operation of the graph."""
    module.__class__ = _opaque_class(type(module))


def restore(model: nn.Module) -> None:
    """Take back :func:`make_scope` and :func:`make_opaque` in all parts of a model."""
    for module in list(model.modules()):
        maker = getattr(type(module), "_maker", None)
        if maker is _scope_class:
            scope: Any = module
            scope._modules.pop(scope._functional_name, None)
            for name in ("_functional_name", "_functional_calls", "_functional_path"):
                del scope.__dict__[name]
        if maker is _scope_class or maker is _opaque_class:
            module.__class__ = type(module)._original_cls  # type: ignore[attr-defined]
