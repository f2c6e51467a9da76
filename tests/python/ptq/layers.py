"""Layers of every kind that AdaRound and Sequential MSE treat, with inputs, and their grids."""

from __future__ import annotations

from collections.abc import Callable

import rimet.nn
import torch
from rimet.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from torch import Tensor, nn

# name -> (layer, shape of its input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 6), (24, 12)),
    "linear of tokens": (lambda: nn.Linear(8, 5, bias=False), (6, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (6, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 5)),
    "conv2d with few places": (lambda: nn.Conv2d(16, 8, 3), (4, 16, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (4, 2, 3, 4, 4)),
    "dilated, rectangular": (
        lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        (4, 4, 7, 6),
    ),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (5, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (5, 6, 5, 5)),
    "padding same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (5, 4, 5, 5)),
    "padding reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (5, 4, 5, 5),
    ),
    "transposed1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (5, 4, 6),
    ),
    "transposed2d, grouped": (
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4, dilation=(1, 2)),
        (4, 8, 3, 4),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (3, 2, 3, 2, 3)),
}

# More columns than Sequential MSE's bounds have directions.
WIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, wide": (lambda: nn.Linear(96, 20), (40, 96)),
    "linear, square": (lambda: nn.Linear(256, 256), (64, 256)),
}

# Many channels and three taps: fewer operations by minimal filtering than by a convolution.
FILTERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "odd places": (lambda: nn.Conv2d(64, 64, 3, padding=1), (5, 64, 5, 6)),
    "two places between zeros": (lambda: nn.Conv2d(64, 64, 3, padding=1), (9, 64, 2, 2)),
    "filtered, reflect": (
        lambda: nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        (3, 64, 4, 4),
    ),
    "filtered, 1d": (lambda: nn.Conv1d(96, 64, 3, bias=False), (9, 96, 10)),
}

# More weights than 32 samples have inputs: computed by rows.
ONE_PLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one place": (lambda: nn.Conv2d(64, 96, 3, stride=2), (5, 64, 4, 4)),
}


def axes(layer: nn.Module) -> tuple[int, int]:
    """Axes of output and input channels of a layer's weight."""
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return (1, 0) if transposed else (0, 1)


def quantized(
    name: str, grid: str, bitwidth: int = 4, symmetric: bool = True, seed: int = 0
) -> tuple[nn.Module, Tensor, Tensor]:
    """A quantized layer whose weight quantizer is calibrated, inputs, and noisy inputs."""
    torch.manual_seed(seed)
    make, shape = (LAYERS | WIDE | FILTERED | ONE_PLACE)[name]
    layer = make()
    qlayer = rimet.nn.QuantizationMixin.from_module(layer)
    out_axis, in_axis = axes(layer)
    weight = qlayer.weight
    encodings = [1] * weight.dim()
    block = None
    if grid != "per-tensor":
        encodings[out_axis] = weight.shape[out_axis]
    if grid in ("blocks", "lpbq"):
        encodings[in_axis] = weight.shape[in_axis] // 2
        block = [n // e for n, e in zip(weight.shape, encodings, strict=True)]
    if grid == "lpbq":
        groups = [1] * weight.dim()
        groups[in_axis] = -1
        quantizer = GroupedBlockQuantizeDequantize(
            encodings, bitwidth, True, 2 * bitwidth, block_size=block, block_grouping=groups
        )
    else:
        quantizer = QuantizeDequantize(encodings, bitwidth, symmetric, block_size=block)
    qlayer.param_quantizers["weight"] = quantizer
    qlayer.compute_param_encodings()
    # Correlated inputs: otherwise nearest rounding is nearly the best there is.
    x = torch.randn(shape) + 2 * torch.randn(shape[:1] + (1,) * (len(shape) - 1))
    return qlayer, x, x + 0.1 * torch.randn(shape)
