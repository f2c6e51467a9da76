"""Quantizers and encodings against values recorded from AIMET (tests/data/quantization)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet.quantization import affine
from rimet.quantization import float as floating

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "quantization" / "golden.json").read_text()
)
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")


def close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """AIMET composes the same arithmetic of float32 operators, each with its own rounding."""
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().as_subclass(torch.Tensor)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol
    )


def same_file(actual: Any, expected: Any) -> None:
    """Equal structure, keys, integers and strings; floats within float32's precision."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict) and set(actual) == set(expected)
        for key, value in expected.items():
            same_file(actual[key], value)
    elif isinstance(expected, list):
        assert isinstance(actual, list) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same_file(one, other)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-7)
    else:
        assert type(actual) is type(expected) and actual == expected


def check_files(encoding: Any, case: dict[str, Any], input_shape: Any) -> None:
    encoding._hint_input_shape(tuple(input_shape))
    for version in VERSIONS:
        expected = case["files"][version]
        if expected is not None:
            same_file(encoding.to_qnn_encoding_dict(version), expected)


def load_state(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """A state dict as AIMET writes it: parameters and `_extra_state`, everything a tensor."""
    extra = {key: torch.tensor(value) for key, value in state["_extra_state"].items()}
    values = {key: torch.tensor(value) for key, value in state.items() if key != "_extra_state"}
    module.load_state_dict({**values, "_extra_state": extra})


def make(case: dict[str, Any], cls: type = affine.QuantizeDequantize) -> Any:
    return cls(
        tuple(case["shape"]),
        case["qmin"],
        case["qmax"],
        case["symmetric"],
        block_size=case["block_size"],
        zero_point_shift=case["zero_point_shift"],
    )


@pytest.fixture(params=range(len(GOLDEN["affine"])))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = GOLDEN["affine"][request.param]
    return found


def test_calibration_finds_the_same_range(case: dict[str, Any]) -> None:
    quantizer = make(case)
    x = torch.tensor(case["x"])
    with quantizer.compute_encodings():
        dynamic = quantizer(x)
        assert torch.equal(quantizer._forward_tensor(x), x)
    close(quantizer.min, case["calibrated"]["min"])
    close(quantizer.max, case["calibrated"]["max"])
    close(dynamic, case["dynamic"])


def test_values_and_gradients(case: dict[str, Any]) -> None:
    quantizer = make(case)
    load_state(quantizer, case["state"])
    x = torch.tensor(case["x"], requires_grad=True)
    y = quantizer(x)
    (y * torch.tensor(case["weight"])).sum().backward()
    close(y, case["y"])
    close(x.grad, case["grad_x"])
    # Differences of nearly equal numbers, summed: the relative error is that of the summands.
    close(quantizer.min.grad, case["grad_min"], atol=2e-5)
    close(quantizer.max.grad, case["grad_max"], atol=2e-5)


def test_grid(case: dict[str, Any]) -> None:
    quantizer = make(case)
    load_state(quantizer, case["state"])
    close(quantizer.get_scale(), case["scale"])
    close(quantizer.get_offset(), case["offset"], rtol=0, atol=0)
    close(quantizer.get_min(), case["get_min"])
    close(quantizer.get_max(), case["get_max"])
    encoding = quantizer.get_encodings()
    assert encoding.granularity == case["granularity"]
    close(encoding.min, case["encoding_min"])
    close(encoding.max, case["encoding_max"])
    check_files(encoding, case, case["input_shape"])


def test_state_dict_is_the_same(case: dict[str, Any]) -> None:
    quantizer = make(case)
    quantizer.set_range(torch.tensor(case["min"]), torch.tensor(case["max"]))
    state = quantizer.state_dict()
    expected = case["state"]
    assert list(state) == list(expected)
    assert state["_extra_state"].keys() == expected["_extra_state"].keys()
    for key, value in expected["_extra_state"].items():
        assert isinstance(state["_extra_state"][key], torch.Tensor)
        assert state["_extra_state"][key].tolist() == value
    assert state["min"].tolist() == expected["min"]


@pytest.mark.parametrize("index", range(len(GOLDEN["grouped"])))
def test_grouped_block(index: int) -> None:
    case = GOLDEN["grouped"][index]
    quantizer = affine.GroupedBlockQuantizeDequantize(
        (4, 4), 4, True, 8, block_size=(1, 4), block_grouping=case["block_grouping"]
    )
    x = torch.tensor(case["x"])
    with quantizer.compute_encodings():
        quantizer(x)
    close(quantizer.min, case["min"])
    close(quantizer.get_scale(), case["scale"])
    close(quantizer.get_per_channel_scale(), case["per_channel_scale"])
    encoding = quantizer.get_encodings()
    close(encoding.per_block_int_scale, case["per_block_int_scale"], rtol=0, atol=0)
    check_files(encoding, case, (4, 16))

    x.requires_grad_()
    y = quantizer(x)
    (y * torch.tensor(case["weight"])).sum().backward()
    close(y, case["y"])
    close(x.grad, case["grad_x"])
    close(quantizer.min.grad, case["grad_min"], atol=2e-5)
    close(quantizer.max.grad, case["grad_max"], atol=2e-5)


@pytest.mark.parametrize("index", range(len(GOLDEN["float"])))
def test_float_format(index: int) -> None:
    case = GOLDEN["float"][index]
    quantizer = floating.FloatQuantizeDequantize(**case["format"])
    assert quantizer.maxval.item() == case["maxval"]
    assert quantizer.bitwidth == case["bitwidth"]
    y = quantizer(torch.tensor(case["x"]))
    expected = torch.tensor(case["y"])
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    assert torch.equal(y.as_subclass(torch.Tensor).signbit(), expected.signbit())
    check_files(quantizer.get_encodings(), case, (32,))
    state = quantizer.state_dict()
    assert list(state) == list(case["state"])
    extra = case["state"]["_extra_state"]
    assert {key: value.tolist() for key, value in state["_extra_state"].items()} == extra
    load_state(quantizer, case["state"])


def test_float_calibrated_per_block() -> None:
    case = GOLDEN["float_calibrated"]
    quantizer = floating.FloatQuantizeDequantize(
        exponent_bits=2, mantissa_bits=1, finite=True, shape=(3, 2), block_size=(1, 4)
    )
    x = torch.tensor(case["x"])
    with quantizer.compute_encodings():
        quantizer(x)
    close(quantizer.maxval, case["maxval"])
    close(quantizer.get_scale(), case["scale"])
    close(quantizer(x), case["y"])
    check_files(quantizer.get_encodings(), case, (3, 8))
