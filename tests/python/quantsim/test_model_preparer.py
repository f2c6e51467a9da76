"""prepare_model: functional operations and further calls of reused modules become modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rimet.model_preparer import prepare_model, prepare_pt_transformer_for_quantsim
from rimet.nn.modules import custom
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.SiLU()
        self.kernel = nn.Parameter(torch.randn(3, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(x))
        y = F.leaky_relu(F.conv2d(y, self.kernel, padding=1, groups=3), 0.3)
        y = self.relu(y + x)
        return torch.cat([self.act(y), F.softmax(y, 1)], dim=1).mean((2, 3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.block(x)) * 2


def test_names_classes_and_values() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 4, 4)
    prepared = prepare_model(model)
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-6, atol=1e-6)
    modules = dict(prepared.named_modules())
    classes = {
        "block.module_conv2d": nn.Conv2d,
        "block.module_leaky_relu": nn.LeakyReLU,
        "block.module_add": custom.Add,
        "block.module_relu_1": nn.ReLU,
        "block.module_softmax": nn.Softmax,
        "block.module_cat": custom.Concat,
        "block.module_mean": custom.Mean,
        "block.act": custom.CustomSiLU,
        "module_mul": custom.Multiply,
    }
    assert {path: type(modules.get(path)) for path in classes} == classes
    assert modules["block.module_leaky_relu"].negative_slope == 0.3
    assert modules["block.module_softmax"].dim == 1
    assert modules["block.module_conv2d"].weight is model.block.kernel
    assert modules["block.module_relu_1"] is not modules["block.relu"]
    assert type(model.block.act) is nn.SiLU and "module_add" not in dict(model.named_modules())


def test_exclusion_and_what_cannot_be_traced() -> None:
    model = Net().eval()
    for options in (
        {"modules_to_exclude": [model.block]},
        {"module_classes_to_exclude": [Block]},
    ):
        prepared = prepare_model(model, **options)  # type: ignore[arg-type]
        assert type(prepared.block) is Block

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(torch.fx.proxy.TraceError):
        prepare_model(Branches())


def test_activations_of_transformer_layers_become_modules() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    expected = layer(x)
    assert isinstance(prepare_pt_transformer_for_quantsim(layer).activation, nn.GELU)
    torch.testing.assert_close(layer(x), expected)
    other = nn.TransformerEncoderLayer(8, 2, 16, activation=torch.tanh)
    with pytest.raises(ValueError, match="relu or gelu"):
        prepare_pt_transformer_for_quantsim(other)
