"""State dicts, copies, devices and dtypes of quantizers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from rimet.quantization.affine import (
    Dequantize,
    GroupedBlockQuantizeDequantize,
    Quantize,
    QuantizeDequantize,
)
from rimet.quantization.float import FloatQuantizeDequantize
from torch import nn


def quantizers() -> list[Any]:
    made: list[Any] = [
        Quantize((), 8, False),
        QuantizeDequantize((3, 1), 4, True),
        QuantizeDequantize((3, 2), -7, 7, True, block_size=(1, 4)),
        QuantizeDequantize((), 8, True, zero_point_shift=0.5),
        Dequantize((), 8, False),
        GroupedBlockQuantizeDequantize(
            (3, 2), 4, True, 8, block_size=(1, 4), block_grouping=(1, 2)
        ),
        FloatQuantizeDequantize(dtype=torch.float8_e4m3fn, shape=(3, 1)),
        FloatQuantizeDequantize(dtype=torch.bfloat16),
    ]
    torch.manual_seed(0)
    for quantizer in made:
        with quantizer.compute_encodings():
            quantizer(torch.randn(3, 8))
    return made


X = torch.linspace(-2, 2, 24).view(3, 8)


@pytest.mark.parametrize("quantizer", quantizers(), ids=repr)
def test_round_trips(quantizer: Any) -> None:
    expected = quantizer(X).as_subclass(torch.Tensor)
    for duplicate in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert duplicate.is_initialized()
        assert torch.equal(duplicate(X).as_subclass(torch.Tensor), expected)
        assert repr(duplicate) == repr(quantizer)
        for mine, other in zip(duplicate.parameters(), quantizer.parameters(), strict=True):
            assert mine is not other and torch.equal(mine, other)
    assert torch.equal(quantizer.double().float()(X).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("quantizer", quantizers()[:5], ids=repr)
def test_the_state_brings_the_grid_along(quantizer: Any) -> None:
    fresh = type(quantizer)(quantizer.shape, 2, False)
    result = fresh.load_state_dict(quantizer.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert repr(fresh) == repr(quantizer)
    assert torch.equal(fresh(X), quantizer(X))


@pytest.mark.parametrize("make", [lambda: QuantizeDequantize((), 8, False), copy.deepcopy])
def test_uninitialized_stays_so(make: Any) -> None:
    source = QuantizeDequantize((), 8, False)
    for duplicate in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), source.half()):
        assert not duplicate.is_initialized()
    target = QuantizeDequantize((), 8, False)
    target.set_range(-1, 1)
    target.load_state_dict(source.state_dict())
    assert not target.is_initialized()
    with pytest.raises(RuntimeError, match="compute_encodings"):
        target(X)


def test_uninitialized_state_of_aimet() -> None:
    """AIMET's uninitialized parameters hold -1 and 1, and are marked in the extra state."""
    target = QuantizeDequantize((), 8, False)
    state = {
        "min": torch.tensor(-1.0),
        "max": torch.tensor(1.0),
        "_extra_state": {**target.get_extra_state(), "min": torch.tensor(False)},
    }
    state["_extra_state"]["max"] = torch.tensor(True)
    target.load_state_dict(state)
    assert not target.is_initialized()
    assert target.max.item() == 1.0


def test_ranges_alone_are_enough() -> None:
    ranges = {"min": torch.tensor(-1.0), "max": torch.tensor(2.0)}
    target = QuantizeDequantize((), 4, True)
    target.load_state_dict(ranges)
    assert target.is_initialized() and target.qmax == 7
    assert list(ranges) == ["min", "max"], "the caller's dict was changed"
    model = nn.Sequential(QuantizeDequantize((), 4, True))
    model.load_state_dict({f"0.{key}": value for key, value in ranges.items()})
    assert model[0].is_initialized()


def test_what_is_missing_is_said() -> None:
    target = QuantizeDequantize((), 4, True)
    with pytest.raises(RuntimeError, match=r"Missing key.*max"):
        target.load_state_dict({"min": torch.tensor(-1.0)})
    result = target.load_state_dict({"min": torch.tensor(-1.0)}, strict=False)
    assert result.missing_keys == ["max"]
    assert not target.is_initialized()
    with pytest.raises(RuntimeError, match="size mismatch for min"):
        target.load_state_dict(QuantizeDequantize((3,), 4, True).state_dict())


def test_state_inside_a_model() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict(
            {"a": QuantizeDequantize((), 8, False), "b": QuantizeDequantize((2, 1), 4, True)}
        )

    source, target = model(), model()
    source["a"].set_range(-1, 1)  # type: ignore[index]
    state = source.state_dict()
    assert list(state) == ["a.min", "a.max", "a._extra_state", "b.min", "b.max", "b._extra_state"]
    target.load_state_dict(state)
    assert [quantizer.is_initialized() for quantizer in target.values()] == [True, False]  # type: ignore[operator]


def test_ready_shortcut_does_not_go_stale() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    quantizer(X)
    quantizer.min.data.fill_(-3.0)
    assert quantizer(torch.tensor(-9.0)).item() == pytest.approx(-3.0, abs=0.02)
    quantizer.register_quantization_parameter("min", nn.Parameter(torch.tensor(float("nan"))))
    assert not quantizer.is_initialized()


def test_meta_device() -> None:
    quantizer = QuantizeDequantize((3, 1), 8, True)
    quantizer.set_range(-1, 1)
    meta = copy.deepcopy(quantizer).to("meta")
    y = meta(torch.empty(3, 4, device="meta"))
    assert y.shape == (3, 4) and y.device.type == "meta"


def test_functional_call_uses_the_given_parameters() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    y = torch.func.functional_call(
        quantizer, {"min": torch.tensor(-4.0), "max": torch.tensor(4.0)}, (torch.tensor([9.0]),)
    )
    assert y.item() == pytest.approx(4.0, abs=0.05)


def test_made_on_the_meta_device_then_loaded() -> None:
    source = QuantizeDequantize((3, 1), 4, True)
    source.set_range(-1, 1)
    with torch.device("meta"):
        target = QuantizeDequantize((3, 1), 8, True)
    target = target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    assert target.is_initialized()
    assert torch.equal(target(X), source(X))
