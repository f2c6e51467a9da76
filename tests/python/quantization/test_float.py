"""Floating-point grids: formats, rounding, calibration, gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rimet.quantization import DequantizedTensor
from rimet.quantization.encoding_analyzer import MinMaxEncodingAnalyzer
from rimet.quantization.float import FloatFormat, FloatQuantizeDequantize, QuantizeDequantize
from rimet.quantization.float._format import TORCH_FORMATS
from torch import Tensor


def values_of(form: FloatFormat) -> list[float]:
    """All non-negative values of a format, by enumeration."""
    found = {0.0}
    for exponent in range(form.min_exponent, form.min_exponent + 2**form.exponent_bits + 2):
        for mantissa in range(2**form.mantissa_bits):
            found.add(math.ldexp(1 + mantissa / 2**form.mantissa_bits, exponent))
            found.add(math.ldexp(mantissa / 2**form.mantissa_bits, form.min_exponent))
    return sorted(value for value in found if value <= form.max)


SMALL = [
    FloatFormat(exponent, mantissa, finite, unsigned)
    for exponent, mantissa, (finite, unsigned) in itertools.product(
        (1, 2, 3, 4), (0, 1, 2, 3), ((False, False), (True, False), (True, True))
    )
    if exponent + mantissa > 1
]


@pytest.mark.parametrize("dtype", TORCH_FORMATS)
def test_formats_of_torch(dtype: torch.dtype) -> None:
    form = TORCH_FORMATS[dtype]
    info = torch.finfo(dtype)
    assert form.max == info.max and form.bitwidth == info.bits
    assert form.torch_dtype is dtype and FloatFormat.of_dtype(dtype) == form
    smallest_normal = {torch.float8_e4m3fnuz: 2.0**-7, torch.float8_e5m2fnuz: 2.0**-15}
    assert 2.0**form.min_exponent == smallest_normal.get(dtype, info.smallest_normal)


@pytest.mark.parametrize("dtype", TORCH_FORMATS)
def test_equals_the_saturating_cast_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    x = torch.randn(20000) * torch.logspace(-9, 6, 20000)
    expected = x.clamp(-largest, largest).to(dtype).to(torch.float32)
    y = FloatQuantizeDequantize(dtype=dtype)(x)
    assert torch.equal(y.as_subclass(Tensor), expected)


@pytest.mark.parametrize(
    ("form", "largest", "count"),
    [
        (FloatFormat(2, 1, True), 6.0, 8),
        (FloatFormat(3, 2, True), 28.0, 32),
        (FloatFormat(2, 3, True), 7.5, 32),
        (FloatFormat(4, 3, True), 448.0, 127),
        (FloatFormat(4, 3, True, True), 240.0, 128),
        (FloatFormat(5, 2, True, True), 57344.0, 128),
        (FloatFormat(4, 3), 240.0, 128),
    ],
)
def test_formats_by_their_standards(form: FloatFormat, largest: float, count: int) -> None:
    """Largest value, and the number of non-negative values: codes less those of NaN."""
    values = values_of(form)
    assert values[-1] == form.max == largest
    assert len(values) == count


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form.name)
def test_nearest_value_ties_to_even(form: FloatFormat) -> None:
    values = torch.tensor(values_of(form), dtype=torch.float64)
    quantizer = FloatQuantizeDequantize(
        form.exponent_bits, form.mantissa_bits, form.finite, form.unsigned_zero
    )
    on_grid = quantizer(values.float()).as_subclass(Tensor)
    assert torch.equal(on_grid.double(), values)
    middle = (values[:-1] + values[1:]) / 2
    y = quantizer(middle.float()).as_subclass(Tensor).double()
    even = torch.where(torch.arange(len(middle)) % 2 == 0, values[:-1], values[1:])
    if form.mantissa_bits:
        assert torch.equal(y, even)
    for nudge, neighbour in ((1 - 1e-6, values[:-1]), (1 + 1e-6, values[1:])):
        y = quantizer((middle * nudge).float()).as_subclass(Tensor).double()
        assert torch.equal(y, neighbour)
        assert torch.equal(
            quantizer(-(middle * nudge).float()).as_subclass(Tensor).double(), -neighbour
        )


@settings(max_examples=50, deadline=None)
@given(
    data=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=16),
    maxval=st.floats(2.0**-10, 2.0**10, width=32),
    form=st.sampled_from(SMALL),
)
def test_scaled_grid_is_a_fixed_point(data: list[float], maxval: float, form: FloatFormat) -> None:
    quantizer = FloatQuantizeDequantize(
        form.exponent_bits, form.mantissa_bits, form.finite, form.unsigned_zero
    )
    quantizer.maxval.fill_(maxval)
    x = torch.tensor(data)
    y = quantizer(x).as_subclass(Tensor)
    assert y.abs().max() <= maxval * (1 + 1e-6)
    torch.testing.assert_close(quantizer(y).as_subclass(Tensor), y, rtol=1e-6, atol=1e-30)
    clipped = x.clamp(-maxval, maxval)
    step = torch.maximum(clipped.abs(), torch.tensor(maxval / form.max * 2.0**form.min_exponent))
    assert ((y - clipped).abs() <= step * 2.0 ** -(form.mantissa_bits + 1) * (1 + 1e-5)).all()


def test_special_values() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 0.0, 3e38])
    for form, sign in (((4, 3, True, False), True), ((4, 3, True, True), False)):
        y = FloatQuantizeDequantize(*form)(x)
        largest = FloatFormat(*form).max
        assert y[:2].tolist() == [largest, -largest] and y[2].isnan() and y[5] == largest
        assert bool(y[3].signbit()) is sign and not y[4].signbit()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    quantizer = FloatQuantizeDequantize(dtype=torch.float8_e4m3fn)
    x = torch.randn(100).to(dtype)
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y.float(), quantizer(x.float()).float())


def test_gradients() -> None:
    quantizer = FloatQuantizeDequantize(dtype=torch.float8_e4m3fn)
    x = torch.tensor([1e6, -1e6, 1.0, 1e-30, 448.0, float("inf")], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0]
    # Where a user makes the range a parameter, it learns: d out / d scale.
    del quantizer.maxval
    quantizer.register_parameter("maxval", torch.nn.Parameter(torch.tensor(2.0)))
    x = torch.tensor([3.0, -4.0, 1.01, 0.3])
    y = quantizer(x)
    y.sum().backward()
    inside = torch.tensor([False, False, True, True])
    slope = torch.where(inside, y.detach() - x, y.detach()).as_subclass(Tensor) / 2.0
    torch.testing.assert_close(quantizer.maxval.grad, slope.sum())


# -- the module ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, "dtype"),
        ({"exponent_bits": 4}, ValueError, "mantissa_bits"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "dtype": torch.float16}, ValueError, "both"),
        ({"dtype": torch.float16, "finite": True}, ValueError, "both"),
        ({"dtype": torch.float32}, ValueError, "torch.float32"),
        ({"dtype": torch.int8}, ValueError, "torch.int8"),
        ({"exponent_bits": -1, "mantissa_bits": 3}, ValueError, "exponent_bits"),
        ({"exponent_bits": 11, "mantissa_bits": 52}, ValueError, "exponent_bits"),
        ({"exponent_bits": 4.5, "mantissa_bits": 3}, TypeError, "exponent_bits"),
        (
            {"exponent_bits": 4, "mantissa_bits": 3, "unsigned_zero": True},
            ValueError,
            "unsigned_zero",
        ),
        ({"dtype": torch.float16, "block_size": (1,)}, ValueError, "block_size"),
        ({"dtype": torch.float16, "encoding_analyzer": 3}, TypeError, "encoding_analyzer"),
        (
            {
                "exponent_bits": 4,
                "mantissa_bits": 3,
                "encoding_analyzer": MinMaxEncodingAnalyzer((4,)),
            },
            RuntimeError,
            "encoding_analyzer",
        ),
    ],
)
def test_bad_arguments(kwargs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FloatQuantizeDequantize(**kwargs)


def test_calibration() -> None:
    quantizer = FloatQuantizeDequantize(exponent_bits=2, mantissa_bits=1, finite=True, shape=(2, 1))
    assert quantizer.is_initialized() and quantizer.get_scale().flatten().tolist() == [1.0, 1.0]
    with quantizer.compute_encodings():
        for batch in (
            torch.tensor([[1.0, -3.0], [0.5, 0.25]]),
            torch.tensor([[2.0, 2.0], [0.1, 1.5]]),
        ):
            assert quantizer._forward_tensor(batch) is batch
            dynamic = quantizer(batch)
            assert torch.equal(dynamic.encoding.maxval, batch.abs().amax(1, True))
    assert quantizer.maxval.flatten().tolist() == [3.0, 1.5]
    quantizer.allow_overwrite(False)
    with quantizer.compute_encodings():
        quantizer(torch.full((2, 4), 100.0))
    assert quantizer.maxval.flatten().tolist() == [3.0, 1.5]


def test_half_precision_is_not_calibrated() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        quantizer = FloatQuantizeDequantize(dtype=dtype)
        assert quantizer.encoding_analyzer is None
        assert (quantizer.is_float16(), quantizer.is_bfloat16()) == (
            dtype is torch.float16,
            dtype is torch.bfloat16,
        )
        x = torch.randn(50) * 1000
        with quantizer.compute_encodings():
            y = quantizer(x)
        assert torch.equal(y.as_subclass(Tensor), x.to(dtype).float())
        assert quantizer.get_scale().item() == 1.0


def test_format_can_be_changed() -> None:
    quantizer = FloatQuantizeDequantize(exponent_bits=4, mantissa_bits=3)
    quantizer.exponent_bits = 5
    quantizer.mantissa_bits = 2
    assert quantizer.bitwidth == 8 and quantizer.maxval.item() == 57344.0
    quantizer.maxval.fill_(3.0)
    quantizer.mantissa_bits = 1
    assert quantizer.maxval.item() == 3.0, "a calibrated range belongs to the data"


def test_encodings_round_trip() -> None:
    source = QuantizeDequantize(
        exponent_bits=2, mantissa_bits=1, finite=True, shape=(3, 2), block_size=(1, 4)
    )
    x = torch.randn(3, 8)
    with source.compute_encodings():
        source(x)
    y = source(x)
    assert isinstance(y, DequantizedTensor)
    made = FloatQuantizeDequantize.from_encodings(y.encoding)
    torch.testing.assert_close(made(x), y)
    other = FloatQuantizeDequantize(dtype=torch.float8_e5m2, shape=(3, 2))
    other.set_encodings(y.encoding)
    torch.testing.assert_close(other(x), y)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        FloatQuantizeDequantize(dtype=torch.float8_e5m2).set_encodings(y.encoding)
    for bad in ("x", None):
        with pytest.raises(TypeError, match="FloatEncoding"):
            FloatQuantizeDequantize.from_encodings(bad)  # type: ignore[arg-type]


def test_legacy_encodings() -> None:
    quantizer = FloatQuantizeDequantize(exponent_bits=4, mantissa_bits=3)
    quantizer.set_legacy_encodings([{"bitwidth": 8, "dtype": "float"}])
    assert quantizer.exponent_bits == 4
    quantizer.set_legacy_encodings([{"bitwidth": 16, "dtype": "float"}])
    assert quantizer.is_float16() and quantizer.maxval.item() == 65504.0
    brain = FloatQuantizeDequantize(dtype=torch.bfloat16)
    brain.set_legacy_encodings(brain.get_legacy_encodings())
    assert brain.is_bfloat16()
    for bad, error in (
        ([{"bitwidth": 8, "dtype": "float"}], RuntimeError),
        ([{"bitwidth": 16, "dtype": "int"}], ValueError),
        ([], ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="encodings"):
            brain.set_legacy_encodings(bad)  # type: ignore[arg-type]


def test_input_of_the_wrong_kind() -> None:
    quantizer = FloatQuantizeDequantize(dtype=torch.float8_e4m3fn, shape=(3, 2), block_size=(1, 4))
    with pytest.raises(TypeError, match="floating-point"):
        quantizer(torch.arange(4))
    with pytest.raises(ValueError, match=r"block_size.* == 9, .* dimension 1"):
        quantizer(torch.randn(3, 9))
