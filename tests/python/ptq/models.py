"""A small model with what the techniques meet: activations as modules and functions, a residual
connection, grouped and depthwise convolutions, a layer that cannot be treated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rimet import _core
from rimet.nn.modules import custom
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.add = custom.Add()
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.stem(x))
        y = self.add(y, self.point(torch.nn.functional.relu6(self.depthwise(y))))
        y = self.pool(self.up(y)).flatten(1)
        return self.head(self.norm(y))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().eval()


def batches(count: int = 3, size: int = 8, seed: int = 1) -> list[Tensor]:
    """The last one is shorter."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [size // 2 + 1]
    return [torch.randn(n, 3, 6, 6, generator=generator) for n in sizes]


def stop_after(monkeypatch: pytest.MonkeyPatch, engine: str, layers: int) -> None:
    """The engine's function for one layer raises KeyboardInterrupt after so many layers."""
    treat = getattr(_core, engine)
    done = 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == layers:
            raise KeyboardInterrupt
        done += 1
        return treat(*args, **kwargs)

    monkeypatch.setattr(_core, engine, stopping)
