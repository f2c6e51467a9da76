"""Small tools around models: random inputs, devices, modes, the order in which modules run, and
quantizers taken away for a while.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rimet._graph import bind_inputs, move_to
from rimet._graph.recorder import evaluating
from rimet.nn import BaseQuantizationMixin
from rimet.nn.slots import flatten

__all__ = [
    "change_tensor_device_placement",
    "create_fake_data_loader",
    "create_rand_tensors_given_shapes",
    "disable_all_quantizers",
    "get_all_named_parameters",
    "get_all_quantizers",
    "get_device",
    "get_layer_name",
    "get_ordered_list_of_modules",
    "get_reused_modules",
    "in_eval_mode",
    "in_train_mode",
    "is_leaf_module",
    "is_torch_nn_module",
    "remove_activation_quantizers",
    "remove_all_quantizers",
    "remove_input_quantizers",
    "remove_output_quantizers",
    "remove_param_quantizers",
    "rgetattr",
    "rsetattr",
]

Modules = nn.Module | Iterable[nn.Module]


# -- inputs and devices ----------------------------------------------------------------------------


def create_rand_tensors_given_shapes(
    input_shape: tuple[int, ...] | list[tuple[int, ...]], device: torch.device | str
) -> list[torch.Tensor]:
    """Tensors of uniform random numbers in ``[0, 1)``.

    Args:
        input_shape: a shape, or a list of shapes.
        device: where they are made.
    """
    shapes = input_shape if isinstance(input_shape, list) else [input_shape]
    return [torch.rand(shape, device=device) for shape in shapes]


def create_fake_data_loader(
    dataset_size: int, batch_size: int, image_size: tuple[int, ...] = (1, 28, 28)
) -> DataLoader[Any]:
    """A loader of random images with labels 0 to 9: ``(images [batch, *image_size], labels
    [batch])``.

    Args:
        dataset_size: number of images.
        batch_size: images in a batch; the last one may be smaller.
        image_size: shape of an image.
    """
    images = torch.rand(dataset_size, *image_size)
    labels = torch.randint(0, 10, (dataset_size,))
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def get_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, or buffer if there are none; the CPU without
    either.
    """
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def change_tensor_device_placement(input_data: Any, device: torch.device | str) -> Any:
    """The same nested data with all tensors on ``device``.

    Args:
        input_data: a tensor, or lists, tuples and dicts of them; other values stay.
        device: where the tensors go.
    """
    return move_to(input_data, device)


# -- modules ---------------------------------------------------------------------------------------


def is_leaf_module(module: nn.Module) -> bool:
    """Whether a module has no parts."""
    return next(module.children(), None) is None


def is_torch_nn_module(module: nn.Module) -> bool:
    """Whether the class of a module is one of torch's own."""
    return type(module).__module__.startswith("torch.nn.")


def get_layer_name(model: nn.Module, layer: nn.Module) -> str:
    """Dotted path of a module in a model.

    Raises:
        KeyError: the model does not hold it.
    """
    for path, module in model.named_modules():
        if module is layer:
            return path
    raise KeyError(f"layer: expected a module of {type(model).__name__}, got {layer}")


def get_all_named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (dotted name, parameter); one that stands in several places comes with each name."""
    yield from model.named_parameters(remove_duplicate=False)


def get_ordered_list_of_modules(
    model: nn.Module,
    dummy_input: Any,
    fwd_func: Callable[[nn.Module, Any], Any] | None = None,
    ignore_duplicates: bool = False,
) -> list[list[Any]]:
    """``[path, module]`` of the modules without parts, in the order in which they run.

    Args:
        model: any module; run once in evaluation mode, without gradients.
        dummy_input: example input, as for :class:`rimet.QuantizationSimModel`.
        fwd_func: runs the model in place of a call with ``dummy_input``: ``fwd_func(model,
            dummy_input)``.
        ignore_duplicates: leave out further calls of a module.
    """
    ran: list[list[Any]] = []

    def note(path: str, module: nn.Module, *_: Any) -> None:
        ran.append([path, module])

    handles = [
        module.register_forward_hook(functools.partial(note, path))
        for path, module in model.named_modules()
        if is_leaf_module(module)
    ]
    try:
        with evaluating(model):
            if fwd_func is not None:
                fwd_func(model, dummy_input)
            else:
                args, kwargs = bind_inputs(model, dummy_input)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return (
        list({path: [path, module] for path, module in ran}.values()) if ignore_duplicates else ran
    )


def get_reused_modules(model: nn.Module, model_input: Any) -> list[tuple[str, nn.Module]]:
    """(path, module) of the modules without parts that run more than once in a forward pass.

    Args:
        model: any module.
        model_input: example input, as for :class:`rimet.QuantizationSimModel`.
    """
    seen: set[str] = set()
    reused: dict[str, nn.Module] = {}
    for path, module in get_ordered_list_of_modules(model, model_input):
        if path in seen:
            reused[path] = module
        seen.add(path)
    return list(reused.items())


def rgetattr(obj: Any, attr: str) -> Any:
    """``getattr`` along a dotted path."""
    return functools.reduce(getattr, attr.split("."), obj)


def rsetattr(obj: Any, attr: str, val: Any) -> None:
    """``setattr`` along a dotted path."""
    owner, _, name = attr.rpartition(".")
    setattr(rgetattr(obj, owner) if owner else obj, name, val)


# -- modes -----------------------------------------------------------------------------------------


def _each(modules: Modules) -> list[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else list(modules)


@contextlib.contextmanager
def _in_mode(modules: Modules, training: bool) -> Iterator[None]:
    chosen = _each(modules)
    modes = {part: part.training for module in chosen for part in module.modules()}
    try:
        for module in chosen:
            module.train(training)
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def in_eval_mode(module: Modules) -> contextlib.AbstractContextManager[None]:
    """Within this context a module, or several, are in evaluation mode; each part gets its own mode
    back.
    """
    return _in_mode(module, False)


def in_train_mode(module: Modules) -> contextlib.AbstractContextManager[None]:
    """Within this context a module, or several, are in training mode; each part gets its own mode
    back.
    """
    return _in_mode(module, True)


# -- quantizers ------------------------------------------------------------------------------------


def _quantized(modules: Modules) -> list[Any]:
    parts = (part for module in _each(modules) for part in module.modules())
    return [part for part in dict.fromkeys(parts) if isinstance(part, BaseQuantizationMixin)]


def get_all_quantizers(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """The slots of all quantized modules: those of parameters, inputs and outputs; ``None`` for an
    empty one.
    """
    parts = _quantized(model)
    return (
        [q for part in parts for q in flatten(part.param_quantizers)],
        [q for part in parts for q in flatten(part.input_quantizers)],
        [q for part in parts for q in flatten(part.output_quantizers)],
    )


def _removed(modules: Modules, method: str) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for part in _quantized(modules):
        stack.enter_context(getattr(part, method)())
    return stack


def remove_input_quantizers(modules: Modules) -> contextlib.ExitStack:
    """Takes the input quantizers away; used in a ``with`` statement, until the block ends.

    Args:
        modules: a module or several; the modules inside of them take part.
    """
    return _removed(modules, "_remove_input_quantizers")


def remove_output_quantizers(modules: Modules) -> contextlib.ExitStack:
    """Like :func:`remove_input_quantizers`, for outputs."""
    return _removed(modules, "_remove_output_quantizers")


def remove_param_quantizers(modules: Modules) -> contextlib.ExitStack:
    """Like :func:`remove_input_quantizers`, for parameters."""
    return _removed(modules, "_remove_param_quantizers")


def remove_activation_quantizers(modules: Modules) -> contextlib.ExitStack:
    """Like :func:`remove_input_quantizers`, for inputs and outputs."""
    return _removed(modules, "_remove_activation_quantizers")


def remove_all_quantizers(modules: Modules) -> contextlib.ExitStack:
    """Like :func:`remove_input_quantizers`, for inputs, outputs and parameters."""
    return _removed(modules, "_remove_all_quantizers")


def disable_all_quantizers(model: nn.Module) -> contextlib.ExitStack:
    """:func:`remove_all_quantizers` of one model."""
    return remove_all_quantizers(model)
