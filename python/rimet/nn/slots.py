"""What happens to a tensor at a quantizer slot of a quantized module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rimet.quantization.affine import Quantize, QuantizeDequantize, dequantize
from rimet.quantization.tensor import QuantizedTensorBase

__all__ = [
    "ParameterReplacement",
    "QuantizerRemoval",
    "flatten",
    "plain",
    "quantize",
    "quantize_each",
    "quantize_fresh",
    "values_of_bins",
    "wrong_slot",
]


def plain(x: Any) -> Any:
    """The dequantized plain tensor behind a (de)quantized tensor; anything else as it is."""
    if type(x) is not Tensor and isinstance(x, QuantizedTensorBase):
        return x.dequantize().as_subclass(Tensor)
    return x


def quantize(owner: Any, kind: str, key: int | str, quantizer: Any, x: Any) -> Any:
    """Pass ``x`` through ``quantizer`` if it is a floating-point tensor; integers, masks and
    non-tensors go by.

    :param owner: module that the slot belongs to, for the error message
    :param kind: such as ``"input_quantizers"``
    :param key: index or name of the slot
    :param quantizer: a :class:`rimet.quantization.base.QuantizerBase`
    :raises TypeError: what stands in the slot is no quantizer
    """
    if type(x) is not Tensor:
        if not isinstance(x, Tensor):
            return x
        x = plain(x)
    if not x.is_floating_point():
        return x
    try:
        forward = quantizer._forward_tensor
    except AttributeError:
        raise wrong_slot(owner, kind, key, quantizer) from None
    if isinstance(quantizer, Quantize):
        return values_of_bins(quantizer, forward(x))
    return forward(x)


def quantize_fresh(owner: Any, quantizer: Any, output: Any, inputs: Iterable[Any]) -> Any:
    """:func:`quantize` of a module's first result, which torch has just allocated if it is none of
    ``inputs``: nobody else holds it, so a quantizer may write into it.

    :param inputs: arguments of the call. Activations with ``inplace=True`` return one of them
    """
    if (
        type(quantizer) is QuantizeDequantize
        and type(output) is Tensor
        and quantizer._may_overwrite()
        and output.is_floating_point()
    ):
        place = output.data_ptr()
        if not any(isinstance(x, Tensor) and x.data_ptr() == place for x in inputs):
            return quantizer._overwrite(output)
    return quantize(owner, "output_quantizers", 0, quantizer, output)


def values_of_bins(quantizer: Quantize, bins: Tensor) -> Tensor:
    """What a quantizer that yields grid indices stands for in a quantized module: the values on the
    grid.
    """
    if quantizer._calibrating or quantizer._has_nothing_to_do(bins):
        return bins  # they are the values that came
    scale, offset = quantizer.get_scale(), quantizer.get_offset()
    assert scale is not None and offset is not None  # else it had raised
    return dequantize(bins, scale, offset, quantizer.block_size)


def wrong_slot(owner: Any, kind: str, key: int | str, quantizer: Any) -> TypeError:
    """The error about something in a slot that is no quantizer."""
    return TypeError(
        f"{type(owner).__name__}.{kind}[{key!r}]: expected a quantizer "
        f"(rimet.quantization.base.QuantizerBase) or None, got {type(quantizer).__name__}"
    )


def quantize_each(
    owner: Any, kind: str, quantizers: Mapping[str, Any], values: Iterable[Any]
) -> list[Any]:
    """The n-th value through the n-th quantizer. Values without a slot, and slots that are off,
    pass plain.
    """
    passed = []
    for i, x in enumerate(values):
        quantizer = quantizers.get(_KEYS[i] if i < 16 else str(i))
        if quantizer is not None:
            x = quantize(owner, kind, i, quantizer, x)
        elif type(x) is not Tensor:
            x = plain(x)
        passed.append(x)
    return passed


# Keys of a module list, without making a string in each call.
_KEYS = tuple(map(str, range(16)))


def flatten(modules: nn.Module) -> Iterator[nn.Module | None]:
    """Leaves of (nested) module lists and dictionaries, empty slots included."""
    for module in modules._modules.values():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield from flatten(module)
        else:
            yield module


class QuantizerRemoval:
    """Quantizers taken out of their slots, for good or, used as a context manager, until the block
    ends.
    """

    def __init__(self, container: nn.ModuleList | nn.ModuleDict, keys: Iterable[str]) -> None:
        self._slots = container._modules
        self._removed = {}
        for key in keys:
            self._removed[key] = self._slots[key]
            self._slots[key] = None  # type: ignore[assignment]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self._slots.update(self._removed)
        self._removed = {}


# Parameters that are replaced at the moment: id(module) -> [number of users, {name: (where,
# original)}].
# Out of the modules themselves, so that copies and pickles made meanwhile hold nothing of it.
_replaced: dict[int, list[Any]] = {}
_replaced_lock = threading.Lock()


class ParameterReplacement:
    """While entered, ``module.<name>`` is the given tensor. For forward methods that read
    ``self.<name>``.

    Several threads may run one module: the originals come back when the last of them leaves. (Each
    puts in what it
    computed from the originals, so they see equal values.)
    """

    def __init__(
        self, module: nn.Module, quantize_one: Callable[[str, Tensor], Tensor], names: Iterable[str]
    ):
        self._module = module
        self._quantize_one = quantize_one
        self._names = tuple(names)

    def __enter__(self) -> None:
        module = self._module
        with _replaced_lock:
            entry = _replaced.get(id(module))
            originals = dict(entry[1]) if entry else {}
        tensors = {}
        for name in self._names:
            original = originals[name][1] if name in originals else getattr(module, name)
            tensors[name] = self._quantize_one(name, original)
        with _replaced_lock:
            entry = _replaced.setdefault(id(module), [0, {}])
            entry[0] += 1
            for name, tensor in tensors.items():
                where = module._parameters if name in module._parameters else module.__dict__
                if name not in entry[1]:
                    entry[1][name] = (where, where.get(name))
                where[name] = tensor  # type: ignore[assignment]

    def __exit__(self, *exc: object) -> None:
        with _replaced_lock:
            entry = _replaced[id(self._module)]
            entry[0] -= 1
            if entry[0] == 0:
                del _replaced[id(self._module)]
                for name, (where, original) in entry[1].items():
                    where[name] = original
