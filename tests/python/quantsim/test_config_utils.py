"""Blockwise, grouped and float settings of a simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rimet.quantization.affine import GroupedBlockQuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_activation_quantizers_to_float,
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from torch import nn


def simulation() -> tuple[QuantizationSimModel, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    x = torch.randn(2, 8, 4, 4)
    return QuantizationSimModel(model, x), x


def test_a_number_is_the_block_along_the_input_channels() -> None:
    sim, x = simulation()
    original = QuantizationSimModel.get_original_model(sim.model)
    set_blockwise_quantization_for_weights(
        sim, [nn.Conv2d, nn.ConvTranspose2d, nn.Linear], bitwidth=4, symmetric=True, block_size=2
    )
    shapes = [sim.model[i].param_quantizers["weight"].shape for i in (0, 2, 4)]
    assert [tuple(s) for s in shapes] == [(4, 4, 1, 1), (2, 6, 1, 1), (4, 48)]
    sim.compute_encodings(lambda m: m(x))
    weight = sim.model[0].weight.detach()
    blocks = weight.reshape(4, 4, 2, 3, 3)
    highest = sim.model[0].param_quantizers["weight"].get_max().reshape(4, 4)
    assert (highest <= blocks.abs().amax((2, 3, 4)) + 1e-6).all()
    assert (sim.model(x) - original(x)).norm() < 0.3 * original(x).norm()


@pytest.mark.parametrize(
    "arg", [lambda m: isinstance(m, nn.Linear), "modules", [nn.Linear], nn.Linear]
)
def test_ways_to_choose_modules(arg: Any) -> None:
    sim, _ = simulation()
    chosen = [sim.model[4]] if arg == "modules" else arg
    set_blockwise_quantization_for_weights(sim, chosen, 8, True, (1, -1))
    assert tuple(sim.model[4].param_quantizers["weight"].shape) == (4, 1)
    assert tuple(sim.model[0].param_quantizers["weight"].shape) == (4, 1, 1, 1)


def test_grouped_blocks_have_integer_multiples_of_a_scale() -> None:
    sim, x = simulation()
    set_grouped_blockwise_quantization_for_weights(sim, [nn.Linear], 4, True, 8, 24)
    quantizer = sim.model[4].param_quantizers["weight"]
    assert isinstance(quantizer, GroupedBlockQuantizeDequantize)
    sim.compute_encodings(lambda m: m(x))
    scale = quantizer.get_scale()
    assert scale.shape == (4, 4)
    ratio = scale / (scale.amax(1, keepdim=True) / 16)
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-4)


def test_float_activations() -> None:
    sim, x = simulation()
    set_activation_quantizers_to_float(sim, lambda m: True, dtype=torch.float16)
    sim.compute_encodings(lambda m: m(x))
    out = sim.model[4].output_quantizers[0]
    assert out.bitwidth == 16 and sim.model[1].input_quantizers[0] is None
    with pytest.raises(ValueError):
        set_activation_quantizers_to_float(sim, lambda m: True)


def test_all_problems_are_named_and_nothing_changes() -> None:
    sim, _ = simulation()
    before = [sim.model[i].param_quantizers["weight"] for i in (0, 2, 4)]
    with pytest.raises(RuntimeError) as caught:
        set_blockwise_quantization_for_weights(sim, list(sim.model), 4, True, 3)
    for part in ("  - 0: blocks", "  - 1 (QuantizedReLU)", "  - 2: blocks"):
        assert part in str(caught.value)
    with pytest.raises(RuntimeError, match="do not divide"):
        set_grouped_blockwise_quantization_for_weights(sim, [nn.Linear], 4, True, 8, 24, 3)
    with pytest.raises(RuntimeError, match="mixture"):
        set_blockwise_quantization_for_weights(sim, [nn.Linear, sim.model[0]], 4, True, 2)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="no modules of the simulation"):
        set_blockwise_quantization_for_weights(sim, [nn.Linear(2, 2)], 4, True, 2)
    with pytest.raises(RuntimeError, match="entries"):
        set_blockwise_quantization_for_weights(sim, [nn.Linear], 4, True, (1, 2, 3))
    assert before == [sim.model[i].param_quantizers["weight"] for i in (0, 2, 4)]
