"""The mixin behind all quantized modules, and the forward methods it builds for them."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rimet.nn.base import BaseQuantizationMixin
from rimet.nn.functional_ops import outside_functional_mode
from rimet.nn.slots import flatten, plain, quantize, quantize_each, quantize_fresh
from rimet.quantization.tensor import QuantizedTensorBase

__all__ = [
    "QuantizationMixin",
    "QuantizationMixinMeta",
    "run_kernel",
    "run_with_parameters",
    "twin_docstring",
]

Kernel = Callable[..., Any]

# Whether any kernel was ever set: all that a forward pass reads in a process without kernels.
_any_kernel = False


class QuantizationMixinMeta(ABCMeta):
    """Gives a quantized class that defines no ``forward`` the one that suits its module class.

    A class without ``forward`` of its own, and with a single module class behind the mixin, gets a
    forward pass in which the
    n-th positional argument passes the n-th input quantizer and the n-th result the n-th output
    quantizer.
    """

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> QuantizationMixinMeta:
        cls = super().__new__(mcs, name, bases, namespace, **kwargs)
        # `forward` that resolves to the abstract one although a module class stands behind: the
        # mixin comes first in the
        # method resolution order, and would hide the module's own.
        if (
            issubclass(cls, nn.Module)
            and "forward" not in namespace
            and getattr(cls.forward, "__isabstractmethod__", False)
        ):
            base = next(
                b
                for b in cls.__mro__
                if issubclass(b, nn.Module)
                and b is not cls
                and not issubclass(b, BaseQuantizationMixin)
            )
            cls.forward = build_forward(base)  # type: ignore[attr-defined]
            made: Any = cls
            made.__abstractmethods__ = made.__abstractmethods__ - {"forward"}
        if issubclass(cls, nn.Module) and "forward" in cls.__dict__:
            cls.forward = outside_functional_mode(cls.forward)  # type: ignore[attr-defined]
        return cls


class QuantizationMixin(BaseQuantizationMixin, metaclass=QuantizationMixinMeta):
    """Quantizes the inputs, parameters and outputs of a module class.

    A class ``class QuantizedFoo(QuantizationMixin, Foo)`` computes ``Foo`` on quantize-dequantized
    tensors, in
    floating point, and returns plain tensors:

        output = Q_out(Foo.forward(Q_in(input); Q_w(weight)))

    where each ``Q`` is a quantizer in its slot, or nothing where the slot is ``None``. Only
    floating-point tensors are quantized.

    A module class of your own gets a twin by :meth:`implements`::

        @QuantizationMixin.implements(Foo)
        class QuantizedFoo(QuantizationMixin, Foo):
            def __quant_init__(self):
                super().__quant_init__()
                self.input_quantizers = nn.ModuleList([None, None])

    Without a ``forward`` of its own the class gets one that goes by position. Inside a hand-written
    one,
    ``with self._patch_quantized_parameters():`` makes parameters read as quantized.

    Differences from AIMET: results are plain tensors; tensors passed as keyword arguments are
    quantized too.
    """

    cls_to_qcls: ClassVar[dict[type[nn.Module], type[Any]]] = {}
    qcls_to_cls: ClassVar[dict[type[Any], type[nn.Module]]] = {}

    _default_kernel: ClassVar[Kernel | None] = None
    # Set on single modules by `set_kernel`. Not part of copies and pickles.
    _instance_kernel: Kernel | None = None

    def __nullary__(self) -> None:
        """``__quant_init__`` of a module without quantized input."""
        self._quant_init_slots(0, 1)

    def __unary__(self) -> None:
        """``__quant_init__`` of a module with one quantized input."""
        self._quant_init_slots(1, 1)

    def __binary__(self) -> None:
        """``__quant_init__`` of a module with two quantized inputs."""
        self._quant_init_slots(2, 1)

    def __ternary__(self) -> None:
        """``__quant_init__`` of a module with three quantized inputs."""
        self._quant_init_slots(3, 1)

    def _quant_init_slots(self, inputs: int, outputs: int) -> None:
        BaseQuantizationMixin.__quant_init__(self)
        self.input_quantizers = nn.ModuleList([None] * inputs)  # type: ignore[list-item]
        self.output_quantizers = nn.ModuleList([None] * outputs)  # type: ignore[list-item]

    # -- kernels -----------------------------------------------------------------------------------

    @classmethod
    def set_default_kernel(cls, kernel: Kernel | None) -> None:
        """Let all modules of this class compute with ``kernel``, unless :meth:`set_kernel` says
        otherwise.

        :param kernel: takes the arguments of the torch function that the module calls, with
            quantized tensors (that know their ``encoding``) in the place of parameters and of those
            inputs that have a quantizer here (what another module has quantized is a plain tensor),
            and ``output_encodings``: the encoding of the output quantizer, or ``None``. Returns a
            tensor, quantized or not. ``None`` takes the kernel away.
        :raises TypeError: ``kernel`` is not callable

        Kernels are not used while the module calibrates.
        """
        cls._default_kernel = _checked_kernel(cls, kernel)

    @classmethod
    def get_default_kernel(cls) -> Kernel | None:
        """The kernel of the class, or ``None``."""
        return cls._default_kernel

    def set_kernel(self, kernel: Kernel | None) -> None:
        """Let this module compute with ``kernel``; see :meth:`set_default_kernel`."""
        _checked_kernel(type(self), kernel)
        self.__dict__.pop("_instance_kernel", None)
        if kernel is not None:
            self.__dict__["_instance_kernel"] = kernel

    def get_kernel(self) -> Kernel | None:
        """The kernel of this module, else that of its class, else ``None``."""
        kernel = self._instance_kernel
        return type(self)._default_kernel if kernel is None else kernel

    def __getstate__(self) -> Any:
        inherited = getattr(super(), "__getstate__", None)  # of object, from Python 3.11 on
        state = self.__dict__ if inherited is None else inherited()
        if isinstance(state, dict) and "_instance_kernel" in state:
            state = {key: value for key, value in state.items() if key != "_instance_kernel"}
        return state

    def _active_kernel(self) -> Kernel | None:
        kernel = self.get_kernel()
        if kernel is not None and any(
            getattr(q, "_calibrating", False)
            for kind in ("input_quantizers", "output_quantizers")
            for q in flatten(self._modules[kind])
        ):
            return None
        return kernel

    # -- the interface of the base, restated for documentation -------------------------------------

    @classmethod
    def wrap(cls, module_cls: type[nn.Module]) -> type[Any]:
        """The quantized class of ``module_cls``; made and registered now if there is none yet.

        A class made here has one input, one output, and a slot for each parameter.

        :raises TypeError: ``module_cls`` is no ``nn.Module`` class
        """
        if not (isinstance(module_cls, type) and issubclass(module_cls, nn.Module)):
            raise TypeError(
                f"{cls.__name__}.wrap: expected a torch.nn.Module class, got {module_cls!r}"
            )
        existing = cls.cls_to_qcls.get(module_cls)
        if existing is not None:
            return existing
        wrapped = QuantizationMixinMeta(
            f"Quantized{module_cls.__name__}",
            (cls, module_cls),
            {
                "__module__": module_cls.__module__,
                "__doc__": twin_docstring(module_cls, ("input",), 1),
            },
        )
        return cls.implements(module_cls)(wrapped)


def _checked_kernel(cls: type, kernel: Kernel | None) -> Any:
    global _any_kernel
    if kernel is not None and not callable(kernel):
        raise TypeError(f"{cls.__name__}: kernel: expected a callable, got {type(kernel).__name__}")
    _any_kernel = _any_kernel or kernel is not None
    # Wrapped, so that reading it through an instance does not bind it as a method.
    return kernel if kernel is None or not inspect.isfunction(kernel) else staticmethod(kernel)


class _KernelMode(TorchFunctionMode):
    """Replaces the one call of the module's torch function by a call of the kernel."""

    def __init__(self, module: Any, function: Any, kernel: Kernel) -> None:
        super().__init__()
        self.module = module
        self.function = function
        self.kernel = kernel
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.done or not self.is_wanted(func):
            return func(*args, **kwargs)
        self.done = True
        return self.call(args, kwargs)

    def is_wanted(self, func: Any) -> bool:
        name = getattr(func, "__name__", "")
        if isinstance(self.function, frozenset):
            return name in self.function
        if self.function is not None:
            return func is self.function
        return name != "__get__"  # reading an attribute such as `x.shape`

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        params = {
            id(getattr(module, name)): quantizer
            for name, quantizer in module._modules["param_quantizers"]._modules.items()
        }
        inputs = iter(list(module._modules["input_quantizers"]._modules.values()))
        # Sizes of packed sequences stand between the inputs of recurrent layers.
        recurrent = isinstance(self.function, frozenset)

        def enter(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(enter(t) for t in x)
            if id(x) in params:
                return param(x)
            if recurrent and not (isinstance(x, Tensor) and x.is_floating_point()):
                return x
            quantizer = next(inputs, None)
            if not isinstance(x, Tensor):
                return x
            if quantizer is not None and x.is_floating_point():
                return quantizer(plain(x))
            return x.quantize() if isinstance(x, QuantizedTensorBase) else x

        def param(x: Any) -> Any:
            quantizer = params.get(id(x))
            if quantizer is None:
                return x
            if not quantizer.is_initialized():
                module._calibrate_parameter(quantizer, x)
            return quantizer(x)

        args = tuple(enter(x) for x in args)
        kwargs = {key: param(x) for key, x in kwargs.items()}
        encodings = tuple(
            None if q is None else q.get_encodings()
            for q in module._modules["output_quantizers"]._modules.values()
        )
        kwargs["output_encodings"] = encodings[0] if len(encodings) == 1 else encodings
        return self.kernel(*args, **kwargs)


def run_kernel(
    module: Any, kernel: Kernel, function: Any, base_forward: Any, args: Any, kwargs: Any
) -> Any:
    """``base_forward(module, *args, **kwargs)`` with ``kernel`` in the place of ``function``.

    :param function: torch function; ``None``: the first one that is called
    :raises RuntimeError: the function was not called
    """
    mode = _KernelMode(module, function, kernel)
    with mode:
        output = base_forward(module, *args, **kwargs)
    if not mode.done:
        raise RuntimeError(
            f"{type(module).__name__}: the kernel was not used, because the forward pass did not "
            f"call {getattr(function, '__name__', function) or 'any torch function'}"
        )
    if isinstance(output, (tuple, list)):
        return type(output)(plain(x) for x in output)
    return plain(output)


# -- forward methods -------------------------------------------------------------------------------


def twin_docstring(module_cls: type[nn.Module], inputs: tuple[str, ...], outputs: int) -> str:
    """Docstring of a quantized class that is made, not written."""
    return (
        f"Quantized :class:`{module_cls.__module__}.{module_cls.__qualname__}`.\n\n"
        "Constructor and forward take the same arguments. "
        f"``input_quantizers``: {', '.join(inputs) or 'none'}. ``output_quantizers``: {outputs}.\n"
        "``param_quantizers``: one for each parameter."
    )


def quantize_outputs(module: Any, output: Any, shared: bool = False) -> Any:
    """The result of a forward pass through the output quantizers.

    :param shared: the first quantizer serves all results; otherwise the n-th result has the n-th
        quantizer
    """
    slots = module._modules["output_quantizers"]._modules
    if isinstance(output, Tensor):
        quantizer = slots.get("0")
        return (
            output
            if quantizer is None
            else quantize(module, "output_quantizers", 0, quantizer, output)
        )
    if isinstance(output, (tuple, list)) and any(q is not None for q in slots.values()):
        if shared:
            quantizer = slots["0"]
            values: Any = [quantize(module, "output_quantizers", 0, quantizer, x) for x in output]
        else:
            values = list(quantize_each(module, "output_quantizers", slots, output))
        # Named tuples of Python take their fields one by one, those of torch as a sequence.
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def run_with_parameters(
    module: Any,
    base_forward: Callable[..., Any],
    tensors: dict[str, Any],
    args: Any,
    kwargs: Any,
    pure: bool = False,
) -> Any:
    """``base_forward(module, *args, **kwargs)`` with other tensors in place of some parameters.

    The module is left alone: the method runs on a second object with the same attributes, so that
    other threads, hooks and
    exceptions see nothing of it. Attributes that the method sets are set on the module afterwards.

    :param pure: the method is known to set none
    """
    if torch.compiler.is_compiling():
        # Dynamo does not follow the making of that object, but does follow this.
        own, others = module._parameters, module.__dict__  # recurrent layers read `_flat_weights`
        places = {name: own if name in own else others for name in tensors}
        originals = {name: place[name] for name, place in places.items()}
        for name, tensor in tensors.items():
            places[name][name] = tensor
        try:
            return base_forward(module, *args, **kwargs)
        finally:
            for name, original in originals.items():
                places[name][name] = original
    view = object.__new__(type(module))
    attributes = view.__dict__
    attributes.update(module.__dict__)
    attributes.update(tensors)
    if pure:
        return base_forward(view, *args, **kwargs)
    before = [*map(id, attributes.values())]
    output = base_forward(view, *args, **kwargs)
    if before != [*map(id, attributes.values())]:
        _write_back(module, attributes, tensors)
    return output


def _write_back(module: Any, attributes: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in [n for n in module.__dict__ if n not in attributes]:
        del module.__dict__[name]
    for name, value in attributes.items():
        if name not in tensors:
            module.__dict__[name] = value


def quantize_arguments(
    module: Any,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    skipped: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """Arguments of ``forward`` through the input quantizers, whether given by position or by name.

    :param skipped: how many arguments stand before the first one with a quantizer
    """
    slots = module._modules["input_quantizers"]._modules
    if skipped:
        args = (
            *map(plain, args[:skipped]),
            *quantize_each(module, "input_quantizers", slots, args[skipped:]),
        )
    else:
        args = tuple(quantize_each(module, "input_quantizers", slots, args))
    if kwargs:
        kwargs = {key: plain(value) for key, value in kwargs.items()}
        for i, name in enumerate(names):
            quantizer = slots.get(str(i))
            if quantizer is not None and name in kwargs:
                kwargs[name] = quantize(module, "input_quantizers", i, quantizer, kwargs[name])
    return args, kwargs


def build_forward(
    module_cls: type[nn.Module],
    *,
    inputs: tuple[str, ...] | None = None,
    function: Any = None,
    call: Callable[..., Any] | None = None,
    parameters: tuple[str, ...] | None = None,
    shared_output: bool = False,
    variadic: bool = False,
    pure: bool = False,
    fresh: bool = False,
    signature: inspect.Signature | None = None,
) -> Callable[..., Any]:
    """The forward method of the quantized twin of ``module_cls``.

    :param inputs: names of the arguments that have input quantizers; by default the arguments in
        their order
    :param function: torch function that stands for the module when a kernel is set; by default the
        first one called
    :param call: the module's forward as a function ``call(module, input, *parameters)``, for
        modules with one input. Spares
        the second object of :func:`run_with_parameters`. What it returns is always ``fresh``
    :param parameters: names of the parameters that ``call`` takes, ``("weight",)`` or ``("weight",
        "bias")``; empty: the class has none
    :param shared_output: the first output quantizer serves all results
    :param variadic: there may be more inputs than ``inputs``
    :param pure: the original sets no attributes in its forward pass
    :param fresh: the original returns one tensor that torch has just allocated and nobody else
        holds, or else one of its arguments; so its output quantizer may write into it
    :param signature: signature under which arguments can be named; by default that of the original
    """
    base_forward: Any = module_cls.forward
    own_signature = inspect.signature(base_forward)
    if inputs is None:
        inputs = tuple(own_signature.parameters)[1:]

    forward: Any
    if call is not None:
        forward = _forward_call(call, parameters or (), base_forward, inputs, function)
    elif parameters == () and len(inputs) == 1 and not shared_output and not variadic:
        forward = _forward_unary(base_forward, inputs, function, fresh)
    else:
        arguments = list(own_signature.parameters)[1:]
        skipped = arguments.index(inputs[0]) if inputs and inputs[0] in arguments else 0
        forward = _forward_general(
            base_forward, inputs, function, shared_output, skipped, parameters == (), pure, fresh
        )
    if signature is not None:
        forward = _by_position(forward, signature)
    forward.__signature__ = signature or own_signature
    forward.__doc__ = f"Forward of :class:`{module_cls.__qualname__}` on quantized tensors."
    forward.__qualname__ = f"Quantized{module_cls.__name__}.forward"
    return forward  # type: ignore[no-any-return]


def _by_position(forward: Any, signature: inspect.Signature) -> Any:
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            bound = signature.bind(self, *args, **kwargs)
            args, kwargs = bound.args[1:], bound.kwargs
        return forward(self, *args, **kwargs)

    return renamed


def _forward_general(
    base_forward: Any,
    inputs: tuple[str, ...],
    function: Any,
    shared_output: bool,
    skipped: int,
    stateless: bool,
    pure: bool,
    fresh: bool,
) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _any_kernel and (kernel := self._active_kernel()) is not None:
            return run_kernel(self, kernel, function, base_forward, args, kwargs)
        args, kwargs = quantize_arguments(self, inputs, args, kwargs, skipped)
        tensors = None if stateless else self._quantized_parameters()
        if tensors:
            output = run_with_parameters(self, base_forward, tensors, args, kwargs, pure)
        else:
            output = base_forward(self, *args, **kwargs)
        if (
            fresh
            and isinstance(output, Tensor)
            and (quantizer := self._modules["output_quantizers"]._modules["0"]) is not None
        ):
            return quantize_fresh(self, quantizer, output, (*args, *kwargs.values()))
        return quantize_outputs(self, output, shared_output)

    return forward


def _forward_unary(base_forward: Any, inputs: tuple[str, ...], function: Any, fresh: bool) -> Any:
    """One input, one output, no parameters."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _any_kernel and (kernel := self._active_kernel()) is not None:
            return run_kernel(self, kernel, function, base_forward, args, kwargs)
        modules = self._modules
        if len(args) == 1 and not kwargs:
            (x,) = args
            quantizer = modules["input_quantizers"]._modules.get("0")
            if quantizer is not None:
                x = quantize(self, "input_quantizers", 0, quantizer, x)
            elif type(x) is not Tensor:
                x = plain(x)
            args = (x,)
            output = base_forward(self, x)
        else:
            args, kwargs = quantize_arguments(self, inputs, args, kwargs)
            output = base_forward(self, *args, **kwargs)
        quantizer = modules["output_quantizers"]._modules.get("0")
        if quantizer is None:
            return output
        if not isinstance(output, Tensor):
            return quantize_outputs(self, output)
        if fresh:
            return quantize_fresh(self, quantizer, output, (*args, *kwargs.values()))
        return quantize(self, "output_quantizers", 0, quantizer, output)

    return forward


def _forward_call(
    call: Callable[..., Any],
    names: tuple[str, ...],
    base_forward: Any,
    inputs: tuple[str, ...],
    function: Any,
) -> Any:
    """One input, one output, and the module's forward as a function of its parameters: a weight,
    perhaps a bias.
    """
    (input_name,) = inputs or ("input",)
    has_slot = bool(inputs)
    with_bias = "bias" in names

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _any_kernel and (kernel := self._active_kernel()) is not None:
            return run_kernel(self, kernel, function, base_forward, args, kwargs)
        if len(args) == 1 and not kwargs:
            (x,) = args
        elif not args and len(kwargs) == 1 and input_name in kwargs:
            x = kwargs[input_name]
        else:
            return base_forward(self, *args, **kwargs)  # raises the error of the original
        modules = self._modules
        quantizer = modules["input_quantizers"]._modules.get("0") if has_slot else None
        if quantizer is not None:
            x = quantize(self, "input_quantizers", 0, quantizer, x)
        elif type(x) is not Tensor:
            x = plain(x)
        slots = modules["param_quantizers"]._modules
        own = self._parameters
        weight = own.get("weight")
        if weight is None:
            weight = self.weight  # it may be absent, or an attribute (weight_norm, FSDP)
        if (quantizer := slots.get("weight")) is not None:
            weight = self._quantized_parameter("weight", quantizer, weight)
        elif type(weight) is not nn.Parameter:
            weight = plain(weight)
        if not with_bias:
            output = call(self, x, weight)
        else:
            bias = own.get("bias")
            if bias is None:
                bias = self.bias
            if (quantizer := slots.get("bias")) is not None:
                bias = self._quantized_parameter("bias", quantizer, bias)
            elif bias is not None and type(bias) is not nn.Parameter:
                bias = plain(bias)
            output = call(self, x, weight, bias)
        quantizer = modules["output_quantizers"]._modules.get("0")
        if quantizer is not None:
            output = quantize_fresh(self, quantizer, output, ())
        return output

    return forward
