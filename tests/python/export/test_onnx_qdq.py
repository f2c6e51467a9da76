"""QDQ models: onnxruntime computes from them what the simulation computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rimet.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from rimet.quantization.float import FloatQuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from torch import Tensor, nn

from export.onnx_runs import assert_equal, calibrated, exported

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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prequantize", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_equals_simulation(dynamo: bool, prequantize: bool, bias: bool) -> None:
    model, x = conv_relu_linear(bias)
    sim = calibrated(model, x)
    proto = exported(
        sim, x, dynamo=dynamo, prequantize_constants=prequantize, export_int32_bias=False
    )
    assert_equal(proto, sim, x)


def set_all(**attributes: Any) -> Callable[[QuantizationSimModel], None]:
    """Sets attributes of all quantizers of activations."""

    def setup(sim: QuantizationSimModel) -> None:
        for module in sim.qmodules():
            for quantizer in (*module.input_quantizers, *module.output_quantizers):
                for name, value in attributes.items() if quantizer is not None else ():
                    setattr(quantizer, name, value)

    return setup


def blocks(sim: QuantizationSimModel) -> None:
    set_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 2)


def lpbq(sim: QuantizationSimModel) -> None:
    set_grouped_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 8, 2, -1)


def lpbq_in_groups(sim: QuantizationSimModel) -> None:
    """Two scales per output channel."""
    for layer in (sim.model.fc, sim.model.head):
        inputs = layer.in_features
        layer.param_quantizers["weight"] = GroupedBlockQuantizeDequantize(
            (layer.out_features, inputs // 4), 4, True, 8, None, (1, 4), (1, inputs // 8)
        )


def per_tensor(sim: QuantizationSimModel) -> None:
    for layer in (sim.model.conv, sim.model.fc, sim.model.head):
        layer.param_quantizers["weight"] = QuantizeDequantize((), 8, True)


def asymmetric_weights(sim: QuantizationSimModel) -> None:
    for layer in (sim.model.conv, sim.model.fc, sim.model.head):
        layer.param_quantizers["weight"].symmetric = False
        layer.param_quantizers["weight"].signed = False


def float8(sim: QuantizationSimModel) -> None:
    sim.model.fc.output_quantizers[0] = FloatQuantizeDequantize(dtype=torch.float8_e4m3fn)
    sim.model.fc.param_quantizers["weight"] = FloatQuantizeDequantize(
        dtype=torch.float8_e5m2, shape=(16, 1)
    )


GRIDS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "w8a8": ({}, None, 20),
    "w4a8": ({"default_param_bw": 4}, None, 21),
    "w8a16": ({"default_output_bw": 16}, None, 21),
    "w16a4": ({"default_param_bw": 16, "default_output_bw": 4}, None, 21),
    "w2a8": ({"default_param_bw": 2}, None, 25),
    "w32a8": ({"default_param_bw": 32}, None, 20),
    "symmetric": ({}, set_all(symmetric=True), 20),
    "symmetric signed": ({}, set_all(symmetric=True, signed=True), 20),
    "weights per tensor": ({}, per_tensor, 10),
    "weights asymmetric": ({}, asymmetric_weights, 20),
    "blocks": ({}, blocks, 21),
    "lpbq": ({}, lpbq, 21),
    "lpbq in groups": ({}, lpbq_in_groups, 21),
    "float8": ({}, float8, 20),
}


@pytest.mark.parametrize("sign", ["unsigned", "signed", None])
@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str, sign: Any) -> None:
    model, x = conv_relu_linear()
    kwargs, setup, opset = GRIDS[name]
    sim = calibrated(model, x, setup=setup, **kwargs)
    options = {"dynamo": False, "opset_version": opset, "export_int32_bias": False}
    for prequantize in (False, True):
        proto = exported(
            sim, x, prequantize_constants=prequantize, force_activation_as=sign, **options
        )
        assert proto.opset_import[0].version == opset
        assert_equal(proto, sim, x)
