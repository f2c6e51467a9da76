"""The model whose export record_export.py records: used by it and by the test."""

from __future__ import annotations

import torch
from torch import nn

BLOCK_SIZE = 4


def make_model() -> tuple[nn.Sequential, torch.Tensor]:
    """Convolution and linear layers, and an input. Weights are made by arithmetic, so that they are the
    same in every version of torch.
    """
    model = nn.Sequential(
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.Linear(8, 6),
    ).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters(), 1):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(places * (0.7 + 0.1 * seed)) * (1 + places % 5) / 8
            parameter.copy_(values.reshape(parameter.shape).float())
        x = torch.sin(torch.arange(2 * 8 * 16, dtype=torch.float64)).reshape(2, 8, 4, 4).float()
    return model, x
