"""Blockwise, grouped and float settings of a simulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet.common import quantsim
from rimet.quantization.affine import GroupedBlockQuantizeDequantize
from rimet.quantization.float import FloatQuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_activation_quantizers_to_float,
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data" / "ptq"))
from blockwise_model import BLOCK_SIZE, make_model

EXPORTED = json.loads(
    (Path(__file__).resolve().parents[2] / "data" / "ptq" / "blockwise_export.json").read_text()
)


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


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    "arg",
    [
        is_linear,
        "module",
        "modules",
        "tuple of modules",
        [nn.Linear],
        (nn.Linear, nn.GELU),
        nn.Linear,
    ],
    ids=str,
)
def test_ways_to_choose_modules(arg: Any) -> None:
    """The same for all three functions; a container stands for none of its parts."""
    sim, x = simulation()
    linear = sim.model[4]
    by_name = {"module": linear, "modules": [linear], "tuple of modules": (linear, linear)}
    chosen = by_name.get(arg, arg) if isinstance(arg, str) else arg
    set_blockwise_quantization_for_weights(sim, chosen, 8, True, (1, -1))
    assert tuple(sim.model[4].param_quantizers["weight"].shape) == (4, 1)
    set_grouped_blockwise_quantization_for_weights(sim, chosen, 4, True, 8, 24)
    assert tuple(sim.model[4].param_quantizers["weight"].shape) == (4, 4)
    assert tuple(sim.model[0].param_quantizers["weight"].shape) == (4, 1, 1, 1)
    set_activation_quantizers_to_float(sim, chosen, exponent_bits=4, mantissa_bits=3)
    assert isinstance(sim.model[4].output_quantizers[0], FloatQuantizeDequantize)
    assert not any(isinstance(q, FloatQuantizeDequantize) for q in sim.model[0].input_quantizers)


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


def blockwise_simulation() -> tuple[QuantizationSimModel, torch.Tensor]:
    model, x = make_model()
    sim = QuantizationSimModel(model, x)
    set_grouped_blockwise_quantization_for_weights(
        sim, [sim.model[0], sim.model[4]], 4, True, 8, BLOCK_SIZE
    )
    set_blockwise_quantization_for_weights(sim, [sim.model[5]], 4, True, BLOCK_SIZE)
    sim.compute_encodings(lambda quantized: quantized(x))
    return sim, x


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_exported_blocks_are_aimets(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the weights, to the last bit of their scales (``tests/data/ptq/record_export.py``)."""
    monkeypatch.setattr(quantsim, "encoding_version", version)
    sim, x = blockwise_simulation()
    sim.export(str(tmp_path), "model", x, export_to_torchscript=True)
    document = json.loads((tmp_path / "model.encodings").read_text())
    entries = document.get("param_encodings") or document["encodings"]
    own = {entry["name"]: entry for entry in entries if entry["name"].endswith(".weight")}
    assert own == EXPORTED[version]
    # A quantizer by itself says the same, axes counted from the last one.
    quantizer: Any = sim.model[4].param_quantizers["weight"]
    entry = quantizer.get_encodings().to_qnn_encoding_dict(version)
    expected = {k: v for k, v in EXPORTED[version]["4.weight"].items() if k != "name"}
    if "axis" in expected:
        expected["axis"] -= 2
    assert entry == expected


def test_saved_blocks_are_aimets_and_can_be_loaded(tmp_path: Path) -> None:
    sim, _ = blockwise_simulation()
    sim.save_encodings_to_json(str(tmp_path), "blocks")
    saved = json.loads((tmp_path / "blocks.json").read_text())["param_encodings"]
    assert saved == EXPORTED["0.6.1"]
    fresh, _ = blockwise_simulation()
    for layer in (0, 4, 5):
        fresh.model[layer].param_quantizers["weight"].set_range(-1.0, 1.0)
    fresh.load_encodings(str(tmp_path / "blocks.json"))
    for layer in (0, 4, 5):
        own, other = (s.model[layer].param_quantizers["weight"] for s in (sim, fresh))
        torch.testing.assert_close(other.get_scale(), own.get_scale(), rtol=1e-6, atol=0)


def test_training_moves_ranges_and_keeps_integer_scales() -> None:
    sim, x = blockwise_simulation()
    torch.manual_seed(0)
    target = sim.model(x).detach() + torch.randn(2, 6)
    quantizers: list[Any] = [sim.model[i].param_quantizers["weight"] for i in (0, 4)]
    before = [q.max.detach().clone() for q in quantizers]
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (sim.model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for quantizer in quantizers:
            encoding = quantizer.get_encodings()
            integers = encoding.per_block_int_scale
            assert integers.dtype == torch.int64 or torch.equal(integers, integers.round())
            assert 1 <= integers.min() and integers.max() <= 2 ** (8 - 4)
            product = encoding.per_channel_scale * integers
            torch.testing.assert_close(product, encoding.scale, rtol=1e-6, atol=0)
    assert losses[-1] < 0.7 * losses[0]
    for quantizer, ranges in zip(quantizers, before, strict=True):
        moved = quantizer.max.detach() != ranges
        assert moved.float().mean() > 0.5


def test_block_sizes_that_are_no_integers_are_named() -> None:
    sim, _ = simulation()
    for size in (8.0, (1, 4.0), None):
        wrong: Any = size
        with pytest.raises(TypeError, match=r"block_size: expected an int or a sequence of ints"):
            set_blockwise_quantization_for_weights(sim, [nn.Linear], 4, True, wrong)
        with pytest.raises(TypeError, match=r"block_grouping: expected an int or a sequence"):
            set_grouped_blockwise_quantization_for_weights(sim, [nn.Linear], 4, True, 8, 4, wrong)
