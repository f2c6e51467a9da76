"""What every quantized module has: quantizer slots, their calibration, their encodings, the way
back.
"""

from __future__ import annotations

import abc
import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rimet.nn import reuse
from rimet.nn.slots import (
    ParameterReplacement,
    QuantizerRemoval,
    flatten,
    plain,
    values_of_bins,
    wrong_slot,
)
from rimet.quantization.affine import Quantize, QuantizeDequantize
from rimet.quantization.float import FloatEncoding
from rimet.quantization.tensor import DequantizedTensor

__all__ = ["BaseQuantizationMixin", "UnknownModuleError"]

_C = TypeVar("_C", bound=type)

_SLOT_CONTAINERS = ("param_quantizers", "input_quantizers", "output_quantizers")


class UnknownModuleError(RuntimeError):
    """A module has no quantized twin, and nobody said that it may stay as it is.

    :param module_cls: class of the module
    :param mixin_cls: mixin that was asked for the twin
    """

    api_reference_url: ClassVar[str] = "docs/getting-started.md"

    def __init__(self, module_cls: type[nn.Module], mixin_cls: type[BaseQuantizationMixin]) -> None:
        self.module_cls = module_cls
        self.mixin_cls = mixin_cls
        super().__init__(self.generate_err_msg())

    def __reduce__(self) -> Any:
        return type(self), (self.module_cls, self.mixin_cls)

    def generate_err_msg(self) -> str:
        """The message: what is missing, and the two ways on."""
        name, mixin = self.module_cls.__name__, self.mixin_cls.__name__
        return (
            f"No quantized twin is registered for {self.module_cls.__module__}."
            f"{self.module_cls.__qualname__}.\n"
            f"- To quantize it, register a twin with @{mixin}.implements({name}), for instance:\n\n"
            f"{self.generate_code_example()}\n\n"
            f"- To leave it in floating point, call {mixin}.ignore({name}), or "
            f"{mixin}.ignore_unknown_modules() for every class without a twin.\n"
            f"See {self.api_reference_url}."
        )

    def generate_code_example(self) -> str:
        """Source of a quantized twin to start from, made from the signature of ``forward``."""
        name, mixin = self.module_cls.__name__, self.mixin_cls.__name__
        try:
            parameters = list(inspect.signature(self.module_cls.forward).parameters.values())[1:]
        except (TypeError, ValueError):
            parameters = []
        positional = [
            p.name
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
        stars: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*",
            inspect.Parameter.VAR_KEYWORD: "**",
        }
        bare = [p.replace(annotation=inspect.Parameter.empty).__str__() for p in parameters]
        keyword_only = [i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY]
        if keyword_only and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            bare.insert(keyword_only[0], "*")
        passed = [
            f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else stars.get(p.kind, "") + p.name
            for p in parameters
        ]
        lines = [
            f"@{mixin}.implements({name})",
            f"class Quantized{name}({mixin}, {name}):",
            "    def __quant_init__(self):",
            "        super().__quant_init__()",
            f"        self.input_quantizers = nn.ModuleList({[None] * len(positional)})",
            "        self.output_quantizers = nn.ModuleList([None])",
            "",
            f"    def forward({', '.join(['self', *bare])}):",
        ]
        for i, argument in enumerate(positional):
            lines += [
                f"        if self.input_quantizers[{i}] is not None:",
                f"            {argument} = self.input_quantizers[{i}]({argument})",
            ]
        lines += [
            "        with self._patch_quantized_parameters():",
            f"            output = super().forward({', '.join(passed)})",
            "        if self.output_quantizers[0] is not None:",
            "            output = self.output_quantizers[0](output)",
            "        return output",
        ]
        return "\n".join(lines)


# By metaclass, not by inheriting from abc.ABC: with anything between the mixin and `object`, FSDP2,
# which replaces the class of a module, finds another object layout.
class BaseQuantizationMixin(metaclass=abc.ABCMeta):
    """Adds quantizers for inputs, outputs and parameters to an ``nn.Module`` class.

    To be inherited from before the module class. All slots are ``None`` at first: without
    quantizers a quantized module
    computes what the original one does.
    """

    #: Quantizers of the arguments of ``forward``
    input_quantizers: nn.ModuleList
    #: Quantizers of what ``forward`` returns
    output_quantizers: nn.ModuleList
    #: Quantizers of the module's own parameters, by name
    param_quantizers: nn.ModuleDict

    # Module class -> quantized class, and back. Each family of mixins has its own.
    cls_to_qcls: ClassVar[dict[type[nn.Module], type[Any]]]
    qcls_to_cls: ClassVar[dict[type[Any], type[nn.Module]]]

    _ignore_unknown_modules: ClassVar[bool] = False
    _ignored_module_types: ClassVar[set[type[nn.Module]]] = set()

    # Of nn.Module, which stands behind this class in every subclass.
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    named_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__quant_init__()

    def __quant_init__(self) -> None:
        """Make the slots: one input, one output, each parameter. Called after ``__init__`` and by
        :meth:`from_module`.

        Override it, calling ``super().__quant_init__()`` first, where a module takes or returns
        another number of tensors.
        """
        self.param_quantizers = nn.ModuleDict(
            {name: None for name, _ in self.named_parameters(recurse=False)}  # type: ignore[misc]
        )
        self.input_quantizers = nn.ModuleList([None])  # type: ignore[list-item]
        self.output_quantizers = nn.ModuleList([None])  # type: ignore[list-item]

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module with quantized inputs, parameters and outputs."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    # -- parameters --------------------------------------------------------------------------------

    def _quantized_parameter(self, name: str, quantizer: Any, param: Tensor) -> Tensor:
        """A parameter as its quantizer leaves it, or out of an open
        :func:`rimet.reuse_quantized_params` block.
        """
        if reuse._any_open and (cached := reuse.lookup(self, name)) is not None:
            return cached
        # Calibration of a weight needs no data but its own: done when first needed.
        try:
            ready = quantizer._ready or quantizer.is_initialized()
        except AttributeError:
            raise wrong_slot(self, "param_quantizers", name, quantizer) from None
        if not ready:
            self._calibrate_parameter(quantizer, param)
        quantized: Tensor = quantizer._forward_tensor(
            param if type(param) is nn.Parameter else plain(param)
        )
        if isinstance(quantizer, Quantize):
            quantized = values_of_bins(quantizer, quantized)
        if reuse._any_open:
            reuse.store(self, name, quantized)
        return quantized

    def _quantized_parameters(self) -> dict[str, Tensor]:
        """Quantized tensors of those parameters that have a quantizer."""
        return {
            name: self._quantized_parameter(name, quantizer, getattr(self, name))
            for name, quantizer in self._modules["param_quantizers"]._modules.items()
            if quantizer is not None
        }

    def _patch_quantized_parameters(
        self, param_names: Iterable[str] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within this context, parameters with a quantizer read as quantized tensors.

        :param param_names: which parameters; all by default
        """
        slots = self._modules["param_quantizers"]._modules
        names = [
            name
            for name in (slots if param_names is None else param_names)
            if slots[name] is not None
        ]
        if torch.compiler.is_compiling():
            return self._swap_parameters({n: getattr(self, n) for n in names})
        return ParameterReplacement(
            self,  # type: ignore[arg-type]
            lambda name, param: self._quantized_parameter(name, slots[name], param),
            names,
        )

    @contextlib.contextmanager
    def _swap_parameters(self, originals: dict[str, Tensor]) -> Iterator[None]:
        # The form of `ParameterReplacement` that Dynamo follows: no lock, no lookup by identity.
        slots = self._modules["param_quantizers"]._modules
        for name, param in originals.items():
            self._parameters[name] = self._quantized_parameter(name, slots[name], param)
        try:
            yield
        finally:
            for name, param in originals.items():
                self._parameters[name] = param

    @torch.no_grad()
    def _calibrate_parameter(self, quantizer: Any, param: Tensor) -> None:
        with quantizer.compute_encodings():
            quantizer._forward_tensor(plain(param.detach()))

    def compute_param_encodings(self) -> None:
        """Set the range of every parameter quantizer from its parameter, unless ``allow_overwrite``
        forbids it.
        """
        reuse.forget(self)
        for name, quantizer in self._modules["param_quantizers"]._modules.items():
            param = getattr(self, name, None)
            if quantizer is None or param is None:
                continue
            self._check_slot("param_quantizers", name, quantizer)
            if quantizer.is_overwrite_allowed():
                self._calibrate_parameter(quantizer, param)

    @contextlib.contextmanager
    def compute_encodings(self) -> Iterator[None]:
        """Within this context, input and output quantizers observe; on leaving it, they set their
        ranges.

        Parameter quantizers are calibrated on entry and quantize from then on. Values pass the
        others unquantized.
        """
        self.compute_param_encodings()
        with contextlib.ExitStack() as stack:
            for quantizer in self._activation_quantizers():
                stack.enter_context(quantizer._calibrate(pass_through=True))
            yield

    def _activation_quantizers(self) -> Iterator[Any]:
        for kind in ("input_quantizers", "output_quantizers"):
            for i, quantizer in enumerate(flatten(self._modules[kind])):
                if quantizer is not None:
                    self._check_slot(kind, i, quantizer)
                    yield quantizer

    def _check_slot(self, kind: str, key: int | str, quantizer: Any) -> None:
        if not hasattr(quantizer, "_forward_tensor"):
            raise wrong_slot(self, kind, key, quantizer)

    @torch.no_grad()
    def fold_param_quantizers(self) -> None:
        """Replace each parameter by its quantized values, and take its quantizer away.

        The new parameter is a :class:`rimet.quantization.DequantizedTensor`: it keeps the encoding
        for export.
        Quantizers that are not calibrated stay.
        """
        reuse.forget(self)
        slots = self._modules["param_quantizers"]._modules
        for name, quantizer in slots.items():
            if quantizer is None or not quantizer.is_initialized():
                continue
            param = getattr(self, name)
            quantized = quantizer(plain(param))
            dequantized = quantized.dequantize()
            setattr(self, name, nn.Parameter(dequantized, requires_grad=param.requires_grad))
            slots[name] = None

    # -- classes -----------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def wrap(cls, module_cls: type[nn.Module]) -> type[Any]:
        """A quantized class for a module class."""

    @classmethod
    def implements(cls, module_cls: type[nn.Module]) -> Callable[[_C], _C]:
        """Decorator that registers a quantized class as the twin of ``module_cls``.

        :raises TypeError: ``module_cls`` is no ``nn.Module`` class
        """
        if not (isinstance(module_cls, type) and issubclass(module_cls, nn.Module)):
            raise TypeError(
                f"{cls.__name__}.implements: expected a torch.nn.Module class, got {module_cls!r}"
            )

        def register(quantized_cls: _C) -> _C:
            cls.cls_to_qcls[module_cls] = quantized_cls
            cls.qcls_to_cls[quantized_cls] = module_cls
            return quantized_cls

        return register

    @classmethod
    def ignore(cls, module_cls: type[nn.Module]) -> type[nn.Module]:
        """Leave modules of this class in floating point. Returns the class, so that it can be used
        as a decorator.

        :raises TypeError: ``module_cls`` is no ``nn.Module`` class
        """
        if not (isinstance(module_cls, type) and issubclass(module_cls, nn.Module)):
            raise TypeError(
                f"{cls.__name__}.ignore: expected a torch.nn.Module class, got {module_cls!r}"
            )
        cls._ignored_module_types.add(module_cls)
        quantized_cls = cls.cls_to_qcls.pop(module_cls, None)
        if quantized_cls is not None:
            cls.qcls_to_cls.pop(quantized_cls, None)
        return module_cls

    @classmethod
    def ignore_unknown_modules(cls, ignore: bool = True) -> None:
        """Leave modules without a twin in floating point instead of raising
        :class:`UnknownModuleError`."""
        cls._ignore_unknown_modules = ignore

    @classmethod
    def from_module(cls, module: nn.Module) -> Any:
        """The quantized twin of a module. It shares parameters, buffers, submodules, attributes and
        hooks with it.

        :param module: module whose class has a twin
        :return: the twin; ``module`` itself if its class is ignored
        :raises UnknownModuleError: the class has no twin
        """
        quantized_cls = cls.cls_to_qcls.get(type(module))
        if quantized_cls is None:
            if cls._ignore_unknown_modules or type(module) in cls._ignored_module_types:
                return module
            raise UnknownModuleError(type(module), cls)
        if "forward" in module.__dict__:
            warnings.warn(
                f"{type(module).__name__} has a `forward` set on the instance. It goes before "
                f"that of {quantized_cls.__name__}: nothing of this module will be quantized.",
                RuntimeWarning,
                stacklevel=2,
            )
        return cls._twin_of_class(module, quantized_cls)

    @staticmethod
    def _twin_of_class(module: nn.Module, quantized_cls: type[Any]) -> Any:
        twin: Any = object.__new__(quantized_cls)
        twin.__dict__.update(module.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[registry] = module.__dict__[registry].copy()
        twin.__quant_init__()
        return twin

    def get_original_module(self) -> nn.Module:
        """The module without quantizers, sharing parameters, buffers, submodules, attributes and
        hooks with this one.
        """
        return self._original_module(self.qcls_to_cls[type(self)])

    def _original_module(self, module_cls: type[nn.Module]) -> nn.Module:
        module = module_cls.__new__(module_cls)
        module.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            module.__dict__[registry] = self.__dict__[registry].copy()
        for container in _SLOT_CONTAINERS:
            module._modules.pop(container, None)
        module.__dict__.pop("_instance_kernel", None)
        return module

    # -- four-bit floating-point weights -----------------------------------------------------------

    def set_weight_quantizer_to_mxfp4_int8(self, block_size: int = 32) -> None:
        """Round the weight to MXFP4, and give it a per-channel 8-bit quantizer.

        MXFP4: e2m1 values times a power of two per block, ``2^floor(log2(max|w| / 4))``. A module
        without weight or without a slot for it is left as it is.

        :param block_size: input channels that share a scale; the number of them is a multiple
        :raises RuntimeError: the module is no ``Linear`` or ``Conv``, or the blocks do not fit

        Source: OCP Microscaling Formats (MX) specification 1.0, section 6.3.
        """
        weight = self._weight_for_fp4("MXFP4", block_size)
        if weight is None:
            return
        blocks = (
            weight.detach()
            .to(torch.float32)
            .reshape(len(weight), -1, block_size * weight[0, 0].numel())
        )
        largest = blocks.abs().amax(dim=2).reshape(*blocks.shape[:2], *(1,) * (weight.dim() - 2))
        exponent = torch.floor(torch.log2(torch.where(largest > 0, largest, 4.0) / 4))
        self._set_fp4_weight(weight, torch.exp2(exponent), block_size)

    def set_weight_quantizer_to_nvfp4_int8(
        self, scale_q: Tensor, meta_scale: Tensor | float
    ) -> None:
        """Round the weight to NVFP4, and give it a per-channel 8-bit quantizer.

        NVFP4: e2m1 values times ``meta_scale * scale_q``, with a ``scale_q`` for each 16 input
        channels. A module without weight or without a slot for it is left as it is.

        :param scale_q: scales, float8 e4m3, ``[out_channels, in_channels / 16, 1...]``; the kernel's
            positions share one
        :param meta_scale: one factor for all of them
        :raises RuntimeError: the module is no ``Linear`` or ``Conv``, or shapes or dtype do not fit
        """
        weight = self._weight_for_fp4("NVFP4", 16)
        if weight is None:
            return
        if scale_q.dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            raise RuntimeError(f"NVFP4: scale_q: expected dtype float8 e4m3, got {scale_q.dtype}")
        shape = (weight.shape[0], weight.shape[1] // 16, *(1,) * (weight.dim() - 2))
        if tuple(scale_q.shape) != shape:
            raise RuntimeError(
                f"NVFP4: scale_q: expected shape {shape}, got {tuple(scale_q.shape)}"
            )
        factor = torch.as_tensor(meta_scale, dtype=torch.float32, device=weight.device)
        if factor.dim():
            raise RuntimeError(
                f"NVFP4: meta_scale: expected one number, got shape {tuple(factor.shape)}"
            )
        self._set_fp4_weight(weight, factor * scale_q.to(weight.device, torch.float32), 16)

    def _weight_for_fp4(self, form: str, block_size: int) -> Tensor | None:
        weight = self._parameters.get("weight")
        if weight is None or "weight" not in self.param_quantizers:
            return None
        if not isinstance(self, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise RuntimeError(
                f"{form}: expected Linear, Conv1d, Conv2d or Conv3d, got {type(self).__name__}"
            )
        if block_size < 1 or weight.shape[1] % block_size:
            raise RuntimeError(
                f"{form}: block_size: expected a divisor of the {weight.shape[1]} input channels, "
                f"got {block_size}"
            )
        plain_weight: Tensor = plain(weight)
        return plain_weight

    @torch.no_grad()
    def _set_fp4_weight(self, weight: Tensor, scale: Tensor, block_size: int) -> None:
        reuse.forget(self)
        encoding = FloatEncoding(
            mantissa_bits=1,
            exponent_bits=2,
            finite=True,
            unsigned_zero=False,
            scale=scale,
            block_size=(1, block_size, *weight.shape[2:]),
        )
        rounded = DequantizedTensor._adopt_fresh(encoding.quantize_dequantize(weight), encoding)
        rest = (1,) * (weight.dim() - 2)
        requires_grad = self._parameters["weight"].requires_grad
        self._parameters["weight"] = nn.Parameter(rounded, requires_grad=requires_grad)
        self.param_quantizers["weight"] = QuantizeDequantize(
            (weight.shape[0], 1, *rest), qmin=-128, qmax=127, symmetric=True
        ).to(weight.device)

    # -- removal -----------------------------------------------------------------------------------

    def _remove_input_quantizers(
        self, indices: int | Iterable[int] | None = None
    ) -> QuantizerRemoval:
        """Take input quantizers away; used in a ``with`` statement, until the block ends.

        :param indices: which; all by default
        """
        return _remove(self.input_quantizers, indices)

    def _remove_output_quantizers(
        self, indices: int | Iterable[int] | None = None
    ) -> QuantizerRemoval:
        """Take output quantizers away; used in a ``with`` statement, until the block ends."""
        return _remove(self.output_quantizers, indices)

    def _remove_param_quantizers(self, keys: str | Iterable[str] | None = None) -> QuantizerRemoval:
        """Take parameter quantizers away; used in a ``with`` statement, until the block ends."""
        return _remove(self.param_quantizers, [keys] if isinstance(keys, str) else keys)

    def _remove_activation_quantizers(self) -> contextlib.ExitStack:
        """Take input and output quantizers away; used in a ``with`` statement, until the block
        ends.
        """
        stack = contextlib.ExitStack()
        stack.enter_context(self._remove_input_quantizers())
        stack.enter_context(self._remove_output_quantizers())
        return stack

    def _remove_all_quantizers(self) -> contextlib.ExitStack:
        """Take all quantizers away; used in a ``with`` statement, until the block ends."""
        stack = self._remove_activation_quantizers()
        stack.enter_context(self._remove_param_quantizers())
        return stack

    # -- encodings ---------------------------------------------------------------------------------

    def export_input_encodings(self, encoding_version: str) -> list[list[dict[str, Any]] | None]:
        """One entry per input quantizer, in the form of an encodings file; ``None`` without range
        or quantizer.

        :param encoding_version: ``"0.6.1"``, ``"1.0.0"``, ``"2.0.0"`` or ``"2.1.0"``
        """
        return [_exported(q, encoding_version) for q in flatten(self.input_quantizers)]

    def export_output_encodings(self, encoding_version: str) -> list[list[dict[str, Any]] | None]:
        """Like :meth:`export_input_encodings`, for outputs."""
        return [_exported(q, encoding_version) for q in flatten(self.output_quantizers)]

    def export_param_encodings(
        self, encoding_version: str
    ) -> dict[str, list[dict[str, Any]] | None]:
        """Like :meth:`export_input_encodings`, for parameters by name.

        A parameter that was folded exports the encoding it carries.
        """
        exported = {}
        for name, quantizer in self.param_quantizers.items():
            encoding = _exported(quantizer, encoding_version)
            carried = getattr(getattr(self, name), "encoding", None)
            if quantizer is None and carried is not None:
                encoding = carried.to_qnn_encoding_dict(encoding_version)
            exported[name] = encoding
        return exported

    def import_input_encodings(
        self,
        encodings: Mapping[str, Any],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool,
    ) -> None:
        """Load ranges of input quantizers.

        :param encodings: index (as a string) -> encoding dictionary, or list of them, as in a file
            of version 0.6.1
        :param strict: refuse an encoding for a slot without quantizer; otherwise such an encoding
            is left out
        :param partial: keep quantizers that ``encodings`` does not name; otherwise they are removed
        :param requires_grad: set on the quantizers that were loaded, unless ``None``
        :param allow_overwrite: whether calibration may change the loaded ranges later
        :raises RuntimeError: ``strict``, and there is no quantizer for an encoding

        Quantizers that do not allow to be overwritten stay as they are.
        """
        self._import("input_quantizers", encodings, strict, partial, requires_grad, allow_overwrite)

    def import_output_encodings(
        self,
        encodings: Mapping[str, Any],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool,
    ) -> None:
        """Like :meth:`import_input_encodings`, for outputs."""
        self._import(
            "output_quantizers", encodings, strict, partial, requires_grad, allow_overwrite
        )

    def import_param_encodings(
        self,
        encodings: Mapping[str, Any],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool,
    ) -> None:
        """Like :meth:`import_input_encodings`, for parameters by name."""
        reuse.forget(self)
        self._import("param_quantizers", encodings, strict, partial, requires_grad, allow_overwrite)

    def _import(
        self,
        kind: str,
        encodings: Mapping[str, Any],
        strict: bool,
        partial: bool,
        requires_grad: bool | None,
        allow_overwrite: bool,
    ) -> None:
        slots = self._modules[kind]._modules
        for key in list(slots):
            quantizer = slots[key]
            if quantizer is not None and not quantizer.is_overwrite_allowed():
                continue
            encoding = encodings.get(key)
            if not encoding:
                if not partial:
                    slots[key] = None
            elif quantizer is not None:
                quantizer.set_legacy_encodings(
                    [encoding] if isinstance(encoding, dict) else encoding
                )
                if requires_grad is not None:
                    quantizer.requires_grad_(requires_grad)
                quantizer.allow_overwrite(allow_overwrite)
            elif strict:
                raise RuntimeError(
                    f"{type(self).__name__}.{kind}[{key!r}]: the encodings hold an entry for it, "
                    "but there is no quantizer"
                )


def _exported(quantizer: Any, encoding_version: str) -> list[dict[str, Any]] | None:
    if quantizer is None or not quantizer.is_initialized():
        return None
    encoding: list[dict[str, Any]] = quantizer.get_encodings().to_qnn_encoding_dict(
        encoding_version
    )
    return encoding


def _remove(container: Any, keys: Any) -> QuantizerRemoval:
    if keys is None:
        keys = list(container._modules)
    elif isinstance(keys, int):
        keys = [keys]
    length = len(container)
    keys = [str(k + length if isinstance(k, int) and k < 0 else k) for k in keys]
    for key in keys:
        if key not in container._modules:
            raise KeyError(f"expected one of {list(container._modules)}, got {key!r}")
    return QuantizerRemoval(container, keys)
