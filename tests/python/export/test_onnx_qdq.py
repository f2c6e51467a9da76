"""QDQ models: onnxruntime computes from them what the simulation computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export.onnx_runs import calibrated, different, exported

pytestmark = [
    # Of torch.onnx itself: its older exporter is deprecated, its newer one uses what torch.export deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class ConvReluLinear(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8 * 6 * 6, 16, bias=bias)
        self.head = nn.Linear(16, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.relu(self.conv(x)).flatten(1)))


def conv_relu_linear(bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ConvReluLinear(bias), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("prequantize", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_equals_simulation(dynamo: bool, prequantize: bool) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    proto = exported(
        sim, x, dynamo=dynamo, prequantize_constants=prequantize, export_int32_bias=False
    )
    assert different(proto, sim, x) == [(0.0, 0.0)]
