"""rimet.compat: AIMET's defaults under rimet's names."""

from __future__ import annotations

import pytest
import rimet
import rimet.compat as compat
import torch
from rimet.compat.quantsim import QuantizationSimModel
from rimet.nn import UnknownModuleError
from torch import nn


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu() + x


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_defaults_are_aimets() -> None:
    x = torch.randn(2, 4)
    sim = QuantizationSimModel(Adds(), x)
    assert isinstance(sim, rimet.QuantizationSimModel) and sim.report.functional_ops == []
    assert rimet.QuantizationSimModel(Adds(), x).report.functional_ops != []
    assert QuantizationSimModel(Adds(), x, quantize_functional_ops=True).report.functional_ops
    with pytest.raises(UnknownModuleError, match="Odd"):
        compat.QuantizationSimModel(nn.Sequential(nn.Linear(4, 4), Odd()), x)


def test_names_are_rimets() -> None:
    assert set(rimet.__all__) == set(compat.__all__)
    assert set(rimet.quantsim.__all__) == set(compat.quantsim.__all__)
    assert compat.nn is rimet.nn and compat.quantsim.QuantizationSimModel is QuantizationSimModel
