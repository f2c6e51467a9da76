"""Placement of quantizers and their encodings against the golden file recorded with AIMET."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet.common.quantsim_config import utils
from rimet.model_preparer import prepare_model
from rimet.nn import BaseQuantizationMixin
from rimet.nn.modules import custom
from rimet.quantsim import QuantizationSimModel

DATA = Path(__file__).parents[2] / "data" / "quantsim"
sys.path.insert(0, str(DATA))

from models import MODELS, PREPARED, build, describe  # noqa: E402

RECORDED = json.loads((DATA / "golden.json").read_text())
GOLDEN = RECORDED["models"]
CONFIGS: dict[str, tuple[Any, int, int]] = {
    "default": (None, 8, 8),
    "per_tensor_w4a16": (utils.get_path_for_per_tensor_config(), 16, 4),
    "htp_v73_w8a16": ("htp_v73", 16, 8),
    "htp_v69_w8a8": ("htp_v69", 8, 8),
    "enpu_v7_w4a8": ("enpu_v7", 8, 4),
}

# Weights in which each range holds only one magnitude: AIMET takes that magnitude for the scale (so
# the range is wider by the number of steps), rimet for the end of the range. Both grids hold the
# weight exactly.
DIFFERENT_RANGES = {"conv3d.bn.params.weight", "activations.layers.11.params.weight"}


def assert_same(got: Any, expected: Any, place: str) -> None:
    """Placement exactly; ranges within what the order of float32 sums in a convolution can move."""
    if isinstance(expected, dict) and "bitwidth" in expected:
        assert isinstance(got, dict), f"{place}: expected a quantizer of its own, got {got}"
        for key in ("bitwidth", "symmetric", "shape"):
            assert got[key] == expected[key], f"{place}.{key}: {got[key]} != {expected[key]}"
        assert ("min" in got) == ("min" in expected), f"{place}: calibrated {'min' in got}"
        for key in ("min", "max"):
            if key in expected and place not in DIFFERENT_RANGES:
                a, b = torch.tensor(got[key]), torch.tensor(expected[key])
                scale = max(map(abs, expected["min"] + expected["max"]))
                torch.testing.assert_close(
                    a, b, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, key=key: f"{place}.{key}: {m}"
                )
    elif isinstance(expected, dict):
        assert set(got) == set(expected), f"{place}: {sorted(set(got) ^ set(expected))}"
        for key in expected:
            assert_same(got[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{place}: {got} != {expected}"
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{place}[{index}]")
    else:
        assert got == expected, f"{place}: {got} != {expected}"


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_placement_and_encodings_equal_aimets(name: str, config: str) -> None:
    path, output_bw, param_bw = CONFIGS[config]
    model, inputs = build(name, custom)
    dummy = inputs if len(inputs) > 1 else inputs[0]
    sim = QuantizationSimModel(
        model,
        dummy,
        config_file=path,
        default_output_bw=output_bw,
        default_param_bw=param_bw,
        quantize_functional_ops=False,
    )
    sim.compute_encodings(lambda m: m(*inputs))
    got = describe(sim.model, lambda m: isinstance(m, BaseQuantizationMixin))
    assert_same(got, GOLDEN[name][config], name)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("name", PREPARED)
def test_prepared_models_have_aimets_placement_and_encodings(name: str, functional: bool) -> None:
    model, inputs = build(name, custom)
    dummy = inputs if len(inputs) > 1 else inputs[0]
    prepared = prepare_model(model)
    torch.testing.assert_close(prepared(*inputs), model(*inputs), rtol=0, atol=0)
    sim = QuantizationSimModel(prepared, dummy, quantize_functional_ops=functional)
    assert sim.report.functional_ops == []
    sim.compute_encodings(lambda m: m(*inputs))
    got = describe(sim.model, lambda m: isinstance(m, BaseQuantizationMixin))
    expected = dict(RECORDED["prepared"][name])
    if name == "shuffle":
        # AIMET has a quantizer for the 2 in `channels // 2`, which no tensor ever reaches.
        del expected["module_floordiv"], got["module_floordiv"]
    assert_same(got, expected, name)
