"""Affine quantizers: construction, calibration, range, gradients, hostile input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rimet.quantization import DequantizedTensor, QuantizedTensor
from rimet.quantization.affine import (
    AffineEncoding,
    AffineQuantizerBase,
    Dequantize,
    GroupedBlockQuantizeDequantize,
    MinMaxQuantizer,
    Quantize,
    QuantizeDequantize,
    ScaleOffsetQuantizer,
)
from rimet.quantization.encoding_analyzer import MinMaxEncodingAnalyzer
from rimet.quantization.float import FloatQuantizeDequantize

ALL = (Quantize, QuantizeDequantize, Dequantize)


def grid(x: torch.Tensor, low: float, high: float, qmin: int, qmax: int, symmetric: bool) -> Any:
    """Scale, offset, indices and values by the formulas, in float64."""
    scale = max(abs(high - low) / (qmax - qmin), 2.0**-23)
    if symmetric:
        offset = -float(round((qmin + qmax) / 2))  # half to even
    else:
        ratio = torch.tensor(low / scale, dtype=torch.float64)
        offset = float(torch.round(ratio).item() - qmin)
        offset = min(max(offset, -qmax), -qmin)
    index = (torch.round(x.double() / scale) - offset).clamp(qmin, qmax)
    return scale, offset, index, (index + offset) * scale


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_both_forms_of_arguments(cls: type[AffineQuantizerBase]) -> None:
    for signed_form in (
        cls((), 8, True),
        cls((), -128, 127, True),
        cls((), bitwidth=8, symmetric=True),
    ):
        assert (signed_form.qmin, signed_form.qmax, signed_form.symmetric) == (-128, 127, True)
        assert (signed_form.bitwidth, signed_form.signed) == (8, True)
    unsigned = cls(shape=(), qmin=0, qmax=15, symmetric=False)
    assert (unsigned.bitwidth, unsigned.signed) == (4, False)
    assert cls(5, 8, True).shape == (5,)
    assert cls([5, 1], 8, True).shape == (5, 1)
    assert cls(torch.Size([5]), 8, True).min.shape == (5,)
    assert (
        repr(cls((), 8, True)) == f"{cls.__name__}(shape=(), qmin=-128, qmax=127, symmetric=True)"
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (((), 8), {}, TypeError, "bitwidth"),
        (((),), {}, TypeError, "qmin"),
        (((), 8, 1), {}, TypeError, "symmetric"),
        (((), 8, True), {"foo": 1}, TypeError, "foo"),
        (((), 8.5, True), {}, TypeError, "bitwidth"),
        (((), 127, -128, True), {}, ValueError, "qmin"),
        (((), 3, 3, True), {}, ValueError, "qmax"),
        (((), 0, True), {}, ValueError, "bitwidth"),
        (((), -1, True), {}, ValueError, "bitwidth"),
        ((("a",), 8, True), {}, TypeError, "shape"),
        ((None, 8, True), {}, TypeError, "shape"),
        ((1.5, 8, True), {}, TypeError, "shape"),
        (((-1,), 8, True), {}, ValueError, "shape"),
        (((0,), 8, True), {}, ValueError, "shape"),
        (((2, 2), 8, True), {"block_size": (1,)}, ValueError, "block_size"),
        (((2, 2), 8, True), {"block_size": (1, 0)}, ValueError, r"block_size\[1\]"),
        (((2, 2), 8, True), {"block_size": (1, -3)}, ValueError, r"block_size\[1\]"),
        (((2, 2), 8, True), {"block_size": (1, 2.5)}, TypeError, r"block_size\[1\]"),
        (((), 8, True), {"zero_point_shift": 0.25}, ValueError, "zero_point_shift"),
        (((), 8, True), {"encoding_analyzer": "x"}, TypeError, "encoding_analyzer"),
        (
            ((3,), 8, True),
            {"encoding_analyzer": MinMaxEncodingAnalyzer((4,))},
            RuntimeError,
            "encoding_analyzer",
        ),
    ],
)
def test_bad_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        QuantizeDequantize(*args, **kwargs)


@pytest.mark.parametrize("cls", [Quantize, Dequantize])
def test_shifted_grid_is_for_quantize_dequantize(cls: type[AffineQuantizerBase]) -> None:
    with pytest.raises(RuntimeError, match="zero_point_shift"):
        cls((), 8, True, zero_point_shift=0.5)


def test_grid_attributes_can_be_set() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.bitwidth = 4
    assert (quantizer.qmin, quantizer.qmax) == (0, 15)
    quantizer.signed = True
    assert (quantizer.qmin, quantizer.qmax) == (-8, 7)
    quantizer.symmetric = True
    quantizer.bitwidth = 16
    assert (quantizer.qmin, quantizer.qmax, quantizer.symmetric) == (-(2**15), 2**15 - 1, True)
    with pytest.raises(ValueError, match="bitwidth"):
        quantizer.bitwidth = 0
    strict = QuantizeDequantize((), -7, 7, True)
    for attribute in ("bitwidth", "signed"):
        with pytest.raises(RuntimeError, match=attribute):
            getattr(strict, attribute)
        with pytest.raises(RuntimeError, match=attribute):
            setattr(strict, attribute, 4)
    assert (strict.qmin, strict.qmax) == (-7, 7)


def test_protocols() -> None:
    assert isinstance(QuantizeDequantize((), 8, True), MinMaxQuantizer)
    assert not isinstance(QuantizeDequantize((), 8, True), ScaleOffsetQuantizer)


# -- initialization --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_uninitialized(cls: type[AffineQuantizerBase]) -> None:
    quantizer = cls((3, 1), 8, True)
    assert not quantizer.is_initialized()
    for getter in ("min", "max", "scale", "offset", "encodings", "legacy_encodings"):
        assert getattr(quantizer, f"get_{getter}")() is None
    for call in (quantizer, quantizer._forward_tensor):
        with pytest.raises(
            RuntimeError, match=rf"{cls.__name__}\(shape=\(3, 1\).*compute_encodings"
        ):
            call(torch.randn(3, 4))


def test_initialized_by_any_kind_of_write() -> None:
    def write_copy(q: QuantizeDequantize) -> None:
        with torch.no_grad():
            q.min.copy_(torch.tensor(-1.0))
            q.max.fill_(1.0)

    def write_data(q: QuantizeDequantize) -> None:
        q.min.data = torch.tensor(-1.0)
        q.max.data.fill_(1.0)

    def write_numpy(q: QuantizeDequantize) -> None:
        q.min.detach().numpy()[...] = -1.0
        q.max.detach().numpy()[...] = 1.0

    def write_parameter(q: QuantizeDequantize) -> None:
        q.min = torch.nn.Parameter(torch.tensor(-1.0))
        q.max = torch.nn.Parameter(torch.tensor(1.0))

    def write_range(q: QuantizeDequantize) -> None:
        q.set_range(-1, 1)

    for write in (write_copy, write_data, write_numpy, write_parameter, write_range):
        quantizer = QuantizeDequantize((), 8, False)
        assert not quantizer.is_initialized()
        write(quantizer)
        assert quantizer.is_initialized(), write.__name__
        assert quantizer(torch.tensor(5.0)).item() == pytest.approx(1.0, abs=0.01)
    half_way = QuantizeDequantize((), 8, False)
    half_way.min.data.fill_(-1.0)
    assert not half_way.is_initialized()
    assert [flag.item() for flag in list(half_way.get_extra_state().values())[:2]] == [True, False]


def test_registered_parameters_count_too() -> None:
    class WithThreshold(QuantizeDequantize):
        def __init__(self) -> None:
            super().__init__((), 8, True)
            self.register_quantization_parameter("threshold", torch.nn.Parameter(torch.ones(2)))

    quantizer = WithThreshold()
    quantizer.min.data.fill_(-1.0)
    quantizer.max.data.fill_(1.0)
    assert not quantizer.is_initialized()
    assert not copy.deepcopy(quantizer).is_initialized()
    with torch.no_grad():
        quantizer.threshold.mul_(2)
    assert quantizer.is_initialized()


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_takes_all_batches() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    with quantizer.compute_encodings():
        for batch in (torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 3.0]).view(2, 1)):
            assert quantizer._forward_tensor(batch) is batch
    assert (quantizer.min.item(), quantizer.max.item()) == (-1.0, 3.0)
    # A second calibration starts from nothing.
    with quantizer.compute_encodings():
        quantizer(torch.tensor([-0.25, 0.25]))
    assert (quantizer.min.item(), quantizer.max.item()) == (-0.25, 0.25)


def test_calibrating_call_quantizes_with_its_own_range() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    x = torch.linspace(-20, 40, 50)
    with quantizer.compute_encodings():
        y = quantizer(x)
    assert isinstance(y, DequantizedTensor)
    scale = 60 / 255
    assert y.encoding.scale.item() == pytest.approx(scale)
    assert (y - x).abs().max() <= scale / 2 + 1e-5


def test_calibration_of_a_model_passes_data_through() -> None:
    """What `rimet.nn` uses, so that layers written by users see unquantized data too."""
    x = torch.randn(50)
    for quantizer in (
        Quantize((), 4, True),
        FloatQuantizeDequantize(exponent_bits=2, mantissa_bits=1),
    ):
        with quantizer._calibrate(pass_through=True):
            assert quantizer(x) is x and quantizer._forward_tensor(x) is x
        assert quantizer(x) is not x and quantizer.is_initialized()
        with quantizer.compute_encodings():
            assert quantizer(x) is not x


def test_nothing_changes_without_data_or_after_an_exception() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    with quantizer.compute_encodings():
        pass
    with quantizer.compute_encodings():
        quantizer(torch.zeros(0, 3))
    assert not quantizer.is_initialized()
    with pytest.raises(KeyError), quantizer.compute_encodings():
        quantizer(torch.randn(4))
        raise KeyError
    assert not quantizer.is_initialized()
    quantizer.set_range(-2, 2)
    with pytest.raises(KeyError), quantizer.compute_encodings():
        quantizer(torch.randn(4) * 100)
        raise KeyError
    assert quantizer.min.item() == -2.0
    assert quantizer(torch.tensor(100.0)).item() < 2.1, "still calibrating"


def test_nested_calibration_belongs_to_the_outer_context() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    with quantizer.compute_encodings():
        quantizer(torch.tensor([-1.0]))
        with quantizer.compute_encodings():
            quantizer(torch.tensor([7.0]))
        assert not quantizer.is_initialized()
    assert (quantizer.min.item(), quantizer.max.item()) == (-1.0, 7.0)


def test_a_copy_made_while_calibrating_does_not_calibrate() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    with quantizer.compute_encodings():
        duplicate = copy.deepcopy(quantizer)
        assert duplicate(torch.tensor(50.0)).item() < 1.1


def test_allow_overwrite() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    quantizer.allow_overwrite(False)
    assert not quantizer.is_overwrite_allowed()
    with quantizer.compute_encodings():
        y = quantizer(torch.tensor([-50.0, 50.0]))
    assert y.abs().max() < 1.1
    assert (quantizer.min.item(), quantizer.max.item()) == (-1.0, 1.0)
    quantizer.allow_overwrite(max=True)
    assert (quantizer.is_overwrite_allowed("min"), quantizer.is_overwrite_allowed("max")) == (
        False,
        True,
    )
    with quantizer.compute_encodings():
        quantizer(torch.tensor([-50.0, 50.0]))
    assert (quantizer.min.item(), quantizer.max.item()) == (-1.0, 50.0)
    # An explicit range is no calibration.
    quantizer.allow_overwrite(False)
    quantizer.set_range(-3, 3)
    assert quantizer.min.item() == -3.0
    with pytest.raises(TypeError, match="bool"):
        quantizer.allow_overwrite(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one positional"):
        quantizer.allow_overwrite(True, False)
    with pytest.raises(KeyError, match="nope"):
        quantizer.allow_overwrite(nope=True)
    with pytest.raises(KeyError):
        quantizer.is_overwrite_allowed("nope")


# -- range -----------------------------------------------------------------------------------------


def test_set_range_refuses_what_does_not_fit() -> None:
    quantizer = QuantizeDequantize((3, 1), 8, True)
    quantizer.set_range(torch.tensor([[-1.0], [-2.0], [-3.0]]), 4)
    assert quantizer.max.flatten().tolist() == [4.0, 4.0, 4.0]
    with pytest.raises(RuntimeError, match=r"max: expected a shape that broadcasts to \(3, 1\)"):
        quantizer.set_range(-9, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="min: expected numbers, got NaN"):
        quantizer.set_range(float("nan"), 1)
    assert quantizer.min.flatten().tolist() == [-1.0, -2.0, -3.0], "changed in part"


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e4, 1e4, width=32),
    width=st.floats(0, 1e4, width=32),
    bitwidth=st.integers(1, 16),
    symmetric=st.booleans(),
    unsigned=st.booleans(),
)
def test_grid_follows_the_formulas(
    low: float, width: float, bitwidth: int, symmetric: bool, unsigned: bool
) -> None:
    qmin, qmax = (
        (0, 2**bitwidth - 1) if unsigned else (-(2 ** (bitwidth - 1)), 2 ** (bitwidth - 1) - 1)
    )
    quantizer = QuantizeDequantize((), qmin, qmax, symmetric)
    quantizer.set_range(low, low + width)
    low32, high32 = quantizer.min.item(), quantizer.max.item()
    x = torch.linspace(low32 - width, high32 + width, 31)
    scale, offset, _, _ = grid(x, low32, high32, qmin, qmax, symmetric)
    assert quantizer.get_scale().item() == pytest.approx(scale, rel=1e-6)
    # A ratio next to a half may round either way in float32.
    ratio = low32 / scale
    if symmetric or abs(ratio - math.floor(ratio) - 0.5) > 1e-6 * max(abs(ratio), 1):
        assert quantizer.get_offset().item() == offset

    # By its own scale and offset, values are on the grid, in range, and a fixed point.
    y = quantizer(x).as_subclass(torch.Tensor)
    encoding = quantizer.get_encodings()
    index = y.double() / encoding.scale.double() - encoding.offset.double()
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-2 if bitwidth > 12 else 1e-3)
    assert index.round().min() >= qmin and index.round().max() <= qmax
    assert torch.equal(quantizer(y).as_subclass(torch.Tensor), y)
    assert (
        encoding.min.item() <= 1e-6 * width + 1e-30 or symmetric or encoding.offset.item() == -qmin
    )


@settings(max_examples=40, deadline=None)
@given(
    data=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    bitwidth=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_calibrated_grid_covers_the_data(data: list[float], bitwidth: int, symmetric: bool) -> None:
    x = torch.tensor(data)
    quantizer = QuantizeDequantize((), bitwidth, symmetric)
    with quantizer.compute_encodings():
        quantizer(x)
    scale = quantizer.get_scale()
    error = (quantizer(x).as_subclass(torch.Tensor) - x).abs().max()
    # Two bits, symmetric: the positive side is clipped by up to half a step more, by design.
    steps = 1.0 if symmetric and bitwidth == 2 else 0.5
    assert error <= steps * scale * (1 + 1e-5)
    assert quantizer(torch.zeros(1)).item() == 0.0


# -- forward ---------------------------------------------------------------------------------------


def test_three_kinds_agree() -> None:
    x = torch.randn(4, 6) * 2
    made = []
    for cls in ALL:
        quantizer = cls((4, 1), 4, False)
        quantizer.set_range(-1.5, torch.tensor([[1.0], [2.0], [0.5], [3.0]]))
        made.append(quantizer)
    quantize, both, dequantize = made
    q = quantize(x)
    assert isinstance(q, QuantizedTensor) and q.dtype == torch.float32
    assert torch.equal(q.as_subclass(torch.Tensor).round(), q.as_subclass(torch.Tensor))
    expected = both(x).as_subclass(torch.Tensor)
    assert torch.equal(dequantize(q).as_subclass(torch.Tensor), expected)
    assert torch.equal(q.dequantize().as_subclass(torch.Tensor), expected)
    assert torch.equal(both(x).quantized_repr(), q.quantized_repr())
    assert q.quantized_repr().dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1.3, 0.7)
    x = torch.linspace(-2, 1, 100) * 0.999  # no ties
    assert quantizer(x.to(dtype)).dtype == dtype
    assert quantizer.to(dtype)(x).dtype == torch.float32
    assert quantizer.get_scale().dtype == quantizer.get_offset().dtype == torch.float32
    assert quantizer.get_scale(torch.float64).dtype == torch.float64
    scale, offset, _, expected = grid(x, quantizer.min.item(), quantizer.max.item(), 0, 255, False)
    assert quantizer.get_offset().item() == offset
    torch.testing.assert_close(
        quantizer(x).as_subclass(torch.Tensor),
        expected.float(),
        rtol=1e-6,
        atol=1.01 * scale * 1e-3,
    )


@pytest.mark.parametrize(
    "value", [None, 1.0, "x", torch.arange(4), torch.zeros(2, dtype=torch.cfloat)]
)
def test_input_of_the_wrong_kind(value: Any) -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    for call in (quantizer, quantizer._forward_tensor):
        with pytest.raises((TypeError, RuntimeError)):
            call(value)
    with pytest.raises((TypeError, RuntimeError, AttributeError)), quantizer.compute_encodings():
        quantizer(value)


def test_shapes_that_do_not_fit() -> None:
    channel = QuantizeDequantize((3, 1), 8, True)
    channel.set_range(-1, 1)
    with pytest.raises((RuntimeError, ValueError)):
        channel(torch.randn(4, 5))
    block = QuantizeDequantize((3, 2), 8, True, block_size=(2, 4))
    block.set_range(-1, 1)
    assert block(torch.randn(5, 6, 8)).shape == (5, 6, 8)
    for shape in ((6, 9), (7, 8), (8,)):
        with pytest.raises((RuntimeError, ValueError)):
            block(torch.randn(shape))
        with pytest.raises((RuntimeError, ValueError)), block.compute_encodings():
            block(torch.randn(shape))
    with pytest.raises((RuntimeError, ValueError), match=r"dimension 1.*got 2 \* 4"):
        block(torch.randn(6, 9))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    quantizer = QuantizeDequantize((), 8, True)
    quantizer.set_range(-1, 1)
    assert quantizer(torch.zeros(shape)).shape == shape


def test_strided_input() -> None:
    quantizer = QuantizeDequantize((1, 6), 4, True)
    quantizer.set_range(-torch.arange(1.0, 7), torch.arange(1.0, 7))
    x = torch.randn(6, 4)
    expected = quantizer(x.t().contiguous()).as_subclass(torch.Tensor)
    assert torch.equal(quantizer(x.t()).as_subclass(torch.Tensor), expected)
    wide = torch.randn(4, 12)
    expected = quantizer(wide[:, ::2].contiguous()).as_subclass(torch.Tensor)
    assert torch.equal(quantizer(wide[:, ::2]).as_subclass(torch.Tensor), expected)


def test_nan_and_infinity_pass_as_documented() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    y = quantizer(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert y[0].isnan()
    assert y[1].item() == quantizer.get_max().item()
    assert y[2].item() == quantizer.get_min().item()


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_against_the_closed_form(symmetric: bool) -> None:
    torch.manual_seed(0)
    qmin, qmax = (-8, 7) if symmetric else (0, 15)
    quantizer = QuantizeDequantize((), qmin, qmax, symmetric).double()
    quantizer.set_range(-1.31, 0.83)
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(200, dtype=torch.float64)
    (quantizer(x) * weight).sum().backward()

    low, high = quantizer.min.item(), quantizer.max.item()
    scale, offset, index, y = grid(x.detach(), low, high, qmin, qmax, symmetric)
    raw = torch.round(x.detach() / scale) - offset
    inside = (raw >= qmin) & (raw <= qmax)
    # With rounding as the identity: d y / d scale, and d y / d offset where it is learned.
    slope = torch.where(inside, y / scale - x.detach() / scale, index + offset)
    d_scale = (slope * weight).sum()
    d_offset = (torch.where(inside, 0.0, scale) * weight).sum() if not symmetric else 0.0
    steps = qmax - qmin
    # scale = (max - min) / steps; offset = round(min / scale) - qmin, rounding as the identity.
    d_min = -d_scale / steps + d_offset * (1 / scale + low / scale**2 / steps)
    d_max = d_scale / steps - d_offset * low / scale**2 / steps
    assert torch.equal(x.grad, torch.where(inside, weight, 0.0))
    torch.testing.assert_close(quantizer.min.grad, d_min, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(quantizer.max.grad, d_max, rtol=1e-6, atol=1e-9)


def test_range_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096)
    quantizer = QuantizeDequantize((), 3, True)
    with quantizer.compute_encodings():
        quantizer(x)

    def loss() -> torch.Tensor:
        return ((quantizer(x) - x) ** 2).mean()

    start = loss().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    # The best 3-bit range of a normal distribution clips far inside of its extremes.
    assert loss().item() < 0.5 * start


def test_no_gradient_reaches_frozen_ranges() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    quantizer.requires_grad_(False)
    x = torch.randn(5, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and quantizer.min.grad is None


# -- encodings -------------------------------------------------------------------------------------


def test_from_and_set_encodings() -> None:
    source = QuantizeDequantize((3, 2), -8, 7, True, block_size=(1, 4))
    source.set_range(-torch.rand(3, 2) - 0.1, torch.rand(3, 2) + 0.1)
    encoding = source.get_encodings()
    x = torch.randn(3, 8)
    for cls in ALL:
        made = cls.from_encodings(encoding)
        assert type(made) is cls and made.block_size == (1, 4) and made.symmetric
        torch.testing.assert_close(made.get_scale(), encoding.scale)
    target = QuantizeDequantize((3, 2), 0, 255, False)
    target.set_encodings(encoding)
    assert (target.qmin, target.qmax, target.block_size) == (-8, 7, (1, 4))
    torch.testing.assert_close(target(x), source(x))
    for call in (target.set_encodings, QuantizeDequantize.from_encodings):
        for bad in ("x", None):
            with pytest.raises(TypeError, match="AffineEncoding"):
                call(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        target.set_encodings(AffineEncoding(torch.ones(2), torch.zeros(2), 8))


@pytest.mark.parametrize("cls", [QuantizeDequantize, GroupedBlockQuantizeDequantize])
def test_gradient_scaling(cls: Any) -> None:
    kwargs = {"decompressed_bw": 8} if cls is GroupedBlockQuantizeDequantize else {}
    results = []
    for scaled in (False, True):
        quantizer = cls((3, 2), bitwidth=4, symmetric=True, block_size=(1, 8), **kwargs)
        assert quantizer.gradient_scaling is False
        quantizer.gradient_scaling = scaled
        quantizer.set_range(torch.full((3, 2), -1.1), torch.full((3, 2), 1.0))
        x = torch.linspace(-2, 2, 48).reshape(3, 16).requires_grad_()
        y = quantizer(x)
        y.as_subclass(torch.Tensor).square().sum().backward()
        results.append((y.detach(), x.grad, quantizer.min.grad, quantizer.max.grad))
    plain, scaled = results
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])
    # Eight elements share a scale; qmax is 7.
    for a, b in zip(plain[2:], scaled[2:], strict=True):
        torch.testing.assert_close(b, a / math.sqrt(8 * 7))


def test_grouped_from_encodings() -> None:
    source = GroupedBlockQuantizeDequantize(
        (4, 4), 4, True, 8, block_size=(1, 4), block_grouping=(1, -1)
    )
    x = torch.randn(4, 16)
    with source.compute_encodings():
        source(x)
    encoding = source.get_encodings()
    made = GroupedBlockQuantizeDequantize.from_encodings(encoding)
    assert (made.block_grouping, made.decompressed_bw) == ((1, -1), 8)
    torch.testing.assert_close(made(x), source(x))
    assert (encoding.per_block_int_scale <= 16).all() and (encoding.per_block_int_scale >= 1).all()
    assert (encoding.per_block_int_scale.amax(1) == 16).all()
    torch.testing.assert_close(
        encoding.per_block_int_scale * encoding.per_channel_scale, encoding.scale
    )
    plain = QuantizeDequantize.from_encodings(encoding)
    torch.testing.assert_close(plain(x), source(x))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"symmetric": False}, RuntimeError, "symmetric"),
        ({"decompressed_bw": 3}, RuntimeError, "decompressed_bw"),
        ({"block_grouping": (1, 3)}, RuntimeError, r"block_grouping\[1\].*divisor of 4.*3"),
        ({"block_grouping": (1, 0)}, RuntimeError, "block_grouping"),
        ({"block_grouping": (2,)}, RuntimeError, "block_grouping"),
        ({"block_grouping": 2}, TypeError, "block_grouping"),
    ],
)
def test_grouped_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good = {
        "shape": (4, 4), "bitwidth": 4, "symmetric": True, "decompressed_bw": 8,
        "block_size": (1, 4), "block_grouping": (1, 4),
    }  # fmt: skip
    GroupedBlockQuantizeDequantize(**good)
    with pytest.raises(error, match=words):
        GroupedBlockQuantizeDequantize(**{**good, **change})


def test_legacy_encodings() -> None:
    source = QuantizeDequantize((2, 1), 8, False)
    source.set_range(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[1.0], [3.0]]))
    legacy = source.get_legacy_encodings()
    assert [entry["is_symmetric"] for entry in legacy] == ["False", "False"]
    target = QuantizeDequantize((2, 1), 4, True)
    target.set_legacy_encodings(legacy)
    assert (target.qmin, target.qmax, target.symmetric) == (0, 255, False)
    torch.testing.assert_close(target.get_scale(), source.get_scale())
    assert torch.equal(target.get_offset(), source.get_offset())


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        (None, TypeError),
        ("x", TypeError),
        ([1, 2], TypeError),
        ([], ValueError),
        ([{}, {}], ValueError),
        ([{"bitwidth": 8, "is_symmetric": "True", "min": -1.0, "max": 1.0}], ValueError),
        ([{"bitwidth": 16, "dtype": "float"}] * 2, ValueError),
        (
            [
                {"bitwidth": 8, "is_symmetric": "True", "min": -1.0, "max": 1.0},
                {"bitwidth": 4, "is_symmetric": "True", "min": -1.0, "max": 1.0},
            ],
            ValueError,
        ),
    ],
)
def test_bad_legacy_encodings(entries: Any, error: type[Exception]) -> None:
    quantizer = QuantizeDequantize((2, 1), 8, True)
    with pytest.raises(error, match="encodings"):
        quantizer.set_legacy_encodings(entries)
    assert not quantizer.is_initialized() and quantizer.qmax == 127
