"""Quantized twins, made on the fly, of module classes that rimet does not know."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rimet.nn.derived import Derived, derive
from rimet.nn.mixin import QuantizationMixin, run_kernel, run_with_parameters, twin_docstring
from rimet.nn.nested import map_arguments, map_results
from rimet.nn.slots import plain, quantize

__all__ = ["generic_twin", "is_generic"]


def _generic_class(original_cls: type[nn.Module]) -> Any:
    """The quantized class of an unknown one; it is not registered."""
    base_forward: Any = original_cls.forward

    def quantize_slot(self: Any, kind: str, slot: int, tensor: Tensor) -> Any:
        quantizer = self._modules[kind]._modules.get(str(slot))
        return plain(tensor) if quantizer is None else quantize(self, kind, slot, quantizer, tensor)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = self._active_kernel()
        if kernel is not None:
            return run_kernel(self, kernel, None, base_forward, args, kwargs)
        args, kwargs = map_arguments(
            lambda slot, tensor: quantize_slot(self, "input_quantizers", slot, tensor), args, kwargs
        )
        tensors = self._quantized_parameters()
        if tensors:
            outcome = run_with_parameters(self, base_forward, tensors, args, kwargs)
        else:
            outcome = base_forward(self, *args, **kwargs)
        return map_results(
            lambda index, tensor: quantize_slot(self, "output_quantizers", index, tensor), outcome
        )

    def get_original_module(self: Any) -> nn.Module:
        return self._original_module(original_cls)  # type: ignore[no-any-return]

    return derive(
        _generic_class,
        original_cls,
        (Derived, QuantizationMixin, original_cls),
        lambda: {
            "__doc__": twin_docstring(original_cls, ("each tensor",), 1),
            "forward": forward,
            "get_original_module": get_original_module,
        },
        name=f"Quantized{original_cls.__name__}",
    )


def generic_twin(module: nn.Module) -> Any:
    """A quantized twin of a module whose class has none: each tensor that goes in or comes out, and
    each parameter, can have a quantizer.

    The class is made on the fly and not registered: :meth:`QuantizationMixin.from_module` does not
    know it.
    """
    return QuantizationMixin._twin_of_class(module, _generic_class(type(module)))


def is_generic(module: nn.Module) -> bool:
    """Whether a module is a twin made by :func:`generic_twin`."""
    return getattr(type(module), "_maker", None) is _generic_class
