"""Finer settings of a simulation's quantizers: blockwise weights, low-power blocks, float
formats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rimet.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from rimet.quantization.encoding_analyzer import MinMaxEncodingAnalyzer
from rimet.quantsim.quantsim import QuantizationSimModel

__all__ = [
    "modules_with_in_out_channels",
    "set_activation_quantizers_to_float",
    "set_blockwise_quantization_for_weights",
    "set_grouped_blockwise_quantization_for_weights",
]

logger = logging.getLogger(__name__)

modules_with_in_out_channels = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules whose weight has an axis of input and one of output channels."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Selection = (
    type[nn.Module]
    | nn.Module
    | Sequence[type[nn.Module]]
    | Sequence[nn.Module]
    | Callable[[nn.Module], bool]
)


def _selected(sim: QuantizationSimModel, arg: Selection) -> Iterator[tuple[str, Any]]:
    """Quantized modules that a list of types, a list of modules or a predicate means."""
    if isinstance(arg, nn.Module | type):
        arg = [arg]  # type: ignore[assignment]
    if isinstance(arg, Sequence):
        if all(isinstance(item, type) and issubclass(item, nn.Module) for item in arg):
            types: Any = tuple(arg)

            def condition(module: nn.Module) -> bool:
                return isinstance(module, types)

        elif all(isinstance(item, nn.Module) for item in arg):
            chosen = {id(item) for item in arg}
            missing = chosen - {id(module) for module in sim.model.modules()}
            if missing:
                raise RuntimeError(
                    f"arg: {len(missing)} of {len(chosen)} modules are no modules of the simulation"
                )

            def condition(module: nn.Module) -> bool:
                return id(module) in chosen

        else:
            raise RuntimeError(
                "arg: expected a list of module types or a list of modules, got a mixture"
            )
    elif callable(arg):
        condition = arg  # type: ignore[assignment]
    else:
        raise RuntimeError(
            "arg: expected a list of module types, a list of modules or a function of a module, "
            f"got {type(arg).__name__}"
        )
    for path, module in sim.named_qmodules():
        if condition(module):  # type: ignore[arg-type]
            yield path, module


def _along_input_channels(
    module: nn.Module, argument: str, value: int | Sequence[int], rest: int, dims: int
) -> tuple[int, ...]:
    """A whole tuple from a single number, which stands at the axis of input channels.

    The axis of output channels gets 1, every other axis ``rest``.

    Raises:
        TypeError: ``value``, which the caller knows as ``argument``, is neither.
    """
    if isinstance(value, Sequence) and all(isinstance(item, int) for item in value):
        return tuple(value)
    if not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int or a sequence of ints, got {value!r}")
    out_axis, in_axis = (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)
    full = [rest] * dims
    full[out_axis], full[in_axis] = 1, value
    return tuple(full)


def _blocked_weights(
    sim: QuantizationSimModel, arg: Selection, block_size: int | Sequence[int]
) -> list[tuple[str, Any, tuple[int, ...], tuple[int, ...]]]:
    """(path, module, block size, number of blocks) of every weight meant; all problems at once."""
    found = []
    problems = []
    # A predicate says what it does not mind; modules and types were named on purpose.
    named = isinstance(arg, Sequence | nn.Module | type)
    for path, module in _selected(sim, arg):
        weight: Any = getattr(module, "weight", None)
        unsuitable = None
        if weight is None or "weight" not in module.param_quantizers:
            unsuitable = "has no weight"
        elif isinstance(block_size, int) and not isinstance(module, modules_with_in_out_channels):
            unsuitable = "has no axis of input channels; give block_size as a tuple"
        if unsuitable is not None:
            if named:
                problems.append(f"{path} ({type(module).__name__}): {unsuitable}")
            else:
                logger.info("%s stays as it is: it %s", path, unsuitable)
            continue
        if module.param_quantizers["weight"] is None:
            logger.info("%s: its weight is not quantized and stays so", path)
            continue
        sizes = _along_input_channels(module, "block_size", block_size, -1, weight.dim())
        if len(sizes) != weight.dim():
            problems.append(
                f"{path}: block_size has {len(sizes)} entries, its weight {weight.dim()} dimensions"
            )
            continue
        fits = all(
            b == -1 or (b > 0 and n % b == 0) for n, b in zip(weight.shape, sizes, strict=True)
        )
        if not fits:
            problems.append(
                f"{path}: blocks of {tuple(sizes)} do not divide its weight of shape "
                f"{tuple(weight.shape)}"
            )
            continue
        whole = tuple(n if b == -1 else b for n, b in zip(weight.shape, sizes, strict=True))
        count = tuple(n // b for n, b in zip(weight.shape, whole, strict=True))
        found.append((path, module, whole, count))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RuntimeError(f"block_size {block_size} does not suit these modules:\n{listed}")
    return found


def set_blockwise_quantization_for_weights(
    sim: QuantizationSimModel,
    arg: Selection,
    bitwidth: int,
    symmetric: bool,
    block_size: int | Sequence[int],
) -> None:
    """Gives each block of the weights its own range.

    Call it before :meth:`QuantizationSimModel.compute_encodings`.

    Args:
        sim: the simulation; its quantizers are replaced.
        arg: which modules: a list of types, a list of modules, or a predicate.
        bitwidth: bits of a weight.
        symmetric: whether the grids are symmetric.
        block_size: length of a block along the input channels (with one output channel to a block,
            and all of every other axis), or one number per dimension of the weight. -1 is the whole
            axis.

    Raises:
        RuntimeError: blocks that do not divide a weight, modules (unless a predicate chose them)
            without a weight; all are named, and nothing is changed.
    """
    for _, module, blocks, count in _blocked_weights(sim, arg, block_size):
        analyzer = MinMaxEncodingAnalyzer(count, block_size=blocks)
        quantizer = QuantizeDequantize(count, bitwidth, symmetric, analyzer, block_size=blocks)
        module.param_quantizers["weight"] = quantizer.to(module.weight.device)


def set_grouped_blockwise_quantization_for_weights(
    sim: QuantizationSimModel,
    arg: Selection,
    bitwidth: int,
    symmetric: bool,
    decompressed_bw: int,
    block_size: int | Sequence[int],
    block_grouping: int | Sequence[int] = -1,
) -> None:
    """Low-power blockwise quantization: scales of blocks are integer multiples of a scale per
    group.

    Call it before :meth:`QuantizationSimModel.compute_encodings`.

    Args:
        sim: the simulation; its quantizers are replaced.
        arg: which modules: a list of types, a list of modules, or a predicate.
        bitwidth: bits of a weight.
        symmetric: True; grouped grids are symmetric.
        decompressed_bw: bits of a weight times its integer scale; at least ``bitwidth``.
        block_size: see :func:`set_blockwise_quantization_for_weights`.
        block_grouping: blocks that share a scale, along the input channels, or one number per
            dimension. -1 is all blocks of the axis.

    Raises:
        RuntimeError: blocks that do not divide a weight, groups that do not divide the blocks,
            modules without a weight; all are named, and nothing is changed. An asymmetric grid, or
            ``decompressed_bw`` below ``bitwidth``.
    """
    made = []
    problems = []
    for path, module, blocks, count in _blocked_weights(sim, arg, block_size):
        groups = _along_input_channels(module, "block_grouping", block_grouping, 1, len(count))
        if len(groups) != len(count) or any(
            g != -1 and (g < 1 or n % g) for n, g in zip(count, groups, strict=True)
        ):
            problems.append(f"{path}: groups of {groups} do not divide {count} blocks")
            continue
        analyzer = MinMaxEncodingAnalyzer(count, block_size=blocks)
        quantizer = GroupedBlockQuantizeDequantize(
            count, bitwidth, symmetric, decompressed_bw, analyzer, blocks, groups
        )
        made.append((module, quantizer))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RuntimeError(
            f"block_grouping {block_grouping} does not suit these modules:\n{listed}"
        )
    for module, quantizer in made:
        module.param_quantizers["weight"] = quantizer.to(module.weight.device)


def set_activation_quantizers_to_float(
    sim: QuantizationSimModel,
    arg: Selection,
    exponent_bits: int | None = None,
    mantissa_bits: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Turns the enabled quantizers of inputs and outputs into floating-point ones.

    Args:
        sim: the simulation.
        arg: which modules: a list of types, a list of modules, or a predicate.
        exponent_bits: with ``mantissa_bits``, the number format.
        mantissa_bits: see above.
        dtype: the number format as a torch dtype (``torch.float16``, ``torch.bfloat16``) instead.

    Raises:
        ValueError: neither or both of the two ways to say the format.
    """
    from rimet.quantization.float import FloatQuantizeDequantize

    for _, module in _selected(sim, arg):
        for quantizers in (module.input_quantizers, module.output_quantizers):
            for index, quantizer in enumerate(quantizers):
                if quantizer is not None:
                    made = FloatQuantizeDequantize(exponent_bits, mantissa_bits, dtype=dtype)
                    device = next((p.device for p in quantizer.parameters()), None)
                    quantizers[index] = made if device is None else made.to(device)
