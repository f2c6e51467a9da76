"""Small chains of layers on which cross-layer equalization is compared with AIMET.

Used by the script that records the golden file and by the test. Numbers are made by a formula, so
both see the same ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Conv = nn.Conv2d


def block(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    return [Conv(inputs, outputs, kernel, groups=groups), nn.BatchNorm2d(outputs), nn.ReLU()]


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "pair": lambda: [Conv(3, 4, 3, padding=1), Conv(4, 5, 1)],
    "relu": lambda: [Conv(3, 4, 1), nn.ReLU(), Conv(4, 5, 3, bias=False), nn.ReLU(), Conv(5, 6, 1)],
    "relu6": lambda: [Conv(3, 4, 1), nn.ReLU6(), Conv(4, 5, 1)],
    "prelu": lambda: [Conv(3, 4, 1), nn.PReLU(4), Conv(4, 5, 1)],
    "pool": lambda: [Conv(3, 4, 1), nn.MaxPool2d(2), Conv(4, 5, 1)],
    "identity": lambda: [Conv(3, 4, 1), nn.Identity(), Conv(4, 5, 1)],
    "depthwise": lambda: [
        *[Conv(3, 4, 1), nn.ReLU(), Conv(4, 4, 3, groups=4), nn.ReLU(), Conv(4, 5, 1)],
        *[Conv(5, 5, 3, groups=5), Conv(5, 6, 1)],
    ],
    "depthwise first": lambda: [Conv(3, 3, 3, groups=3), nn.ReLU(), Conv(3, 5, 1), Conv(5, 6, 1)],
    "two depthwise": lambda: [
        *[Conv(3, 4, 1), Conv(4, 4, 3, groups=4), Conv(4, 4, 3, groups=4), Conv(4, 5, 1)],
    ],
    "grouped": lambda: [Conv(3, 4, 1), Conv(4, 8, 1, groups=2), Conv(8, 4, 1), Conv(4, 4, 1)],
    "transposed": lambda: [
        *[nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3, bias=False)],
        *[nn.ConvTranspose2d(5, 5, 3, groups=5), Conv(5, 6, 1)],
    ],
    "batch norm": lambda: [*block(3, 4, 3), *block(4, 6), *block(6, 6, 3, groups=6), Conv(6, 3, 1)],
    "batch norm, no activation": lambda: [*block(3, 4)[:2], *block(4, 6)[:2], Conv(6, 3, 1)],
}


def make_chain(name: str) -> tuple[nn.Sequential, torch.Tensor]:
    """The model, in evaluation mode, and an input."""
    model = nn.Sequential(*CHAINS[name]()).eval()
    with torch.no_grad():
        for offset, tensor in enumerate((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                index = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
                # Channels of very different ranges.
                uneven = 1 + 10 * torch.sin(index * 0.7 + offset).abs()
                tensor.copy_(torch.sin(index * 1.3 + offset) * uneven / 5)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.abs_().add_(0.5)
                module.bias.mul_(2)
                module.weight.mul_(0.2)
    return model, torch.sin(torch.arange(3 * 12 * 12.0)).reshape(1, 3, 12, 12)
