"""The affine ops against vectors recorded from aimet-torch 2.42.0.

The vectors and the script that made them are in ``tests/data/affine``. The slow reference of
``tests/python/reference.py`` is held against the same vectors, so that the two yardsticks of the
other tests cannot drift apart. Where rimet deliberately differs from AIMET, the difference has a
test of its own here, and a paragraph in ``docs/numerics.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import rimet  # noqa: F401  (registers torch.ops.rimet)
import torch
from torch import Tensor

from .golden import RECORD, Case, select

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference


def refused(case: Case) -> bool:
    return "error" in case.outputs


def narrow(case: Case) -> bool:
    """AIMET computes these in half precision; rimet computes them in float32."""
    return case.x.dtype in (torch.float16, torch.bfloat16)


def beyond_float32(case: Case) -> bool:
    """Grids on which rimet computes in float64."""
    return case.qmax - case.qmin > 2**24


def run(case: Case, namespace: Any) -> dict[str, Tensor]:
    """Forward and backward of the op; the leaves are the op's three tensors."""
    names = ("min", "max") if case.kind == "range" else ("scale", "offset")
    leaves = [case.inputs[name].clone().requires_grad_() for name in ("x", *names)]
    op = (
        namespace.quantize_dequantize_range
        if case.kind == "range"
        else getattr(namespace, case.kind)
    )
    y = op(*leaves, *case.settings)
    grads = torch.autograd.grad(y, leaves, case.inputs["grad"])
    return {
        "y": y.detach(),
        **dict(zip(("gx", *(f"g{name}" for name in names)), grads, strict=True)),
    }


def elementwise_terms(case: Case) -> tuple[Tensor, Tensor]:
    """The float64 terms whose sums are the gradients to scale and offset."""
    grad, scale, offset = (case.inputs[key] for key in ("grad", "scale", "offset"))
    scale, offset = (
        reference.spread(item.double(), case.x.shape, case.block_size) for item in (scale, offset)
    )
    gradient = getattr(reference, f"{case.kind}_grad")
    settings = tuple(item for item in case.settings if item is not case.block_size)
    _, gs, go = gradient(grad, case.x, scale, offset, *settings)
    return gs, go


def assert_sums_agree(actual: Tensor, expected: Tensor, terms: Tensor, case: Case) -> None:
    """Sums of n float32 terms, in whatever order, differ by at most n eps sum|terms|.

    The terms themselves carry two roundings (``x / scale`` and a product); the first is as large
    as the quotient, which ``level`` bounds.
    """
    encoding = case.inputs["scale"].shape
    size = reference.gather_sum(terms.nan_to_num(0, 0, 0).abs(), encoding, case.block_size)
    count = case.x.numel() / max(1, actual.numel())
    level = max(abs(case.qmin), abs(case.qmax), 1) + case.inputs["offset"].abs().max().item()
    weight = case.inputs["grad"].abs().max().item() * level * count
    allowed = 2**-23 * (count * size + 2 * weight)
    same = (actual.double() - expected.double()).abs() <= allowed
    assert (same | (actual.isnan() & expected.isnan())).all(), (actual, expected, allowed)


PRECISE = lambda case: not refused(case) and not narrow(case) and case.x.numel() > 0  # noqa: E731
AFFINE = ("quantize", "dequantize", "quantize_dequantize")


def test_record_is_of_the_pinned_aimet() -> None:
    assert RECORD["versions"]["aimet-torch"] == "2.42.0"


@pytest.mark.parametrize("case", select(*AFFINE, where=PRECISE))
def test_forward_is_aimets_bit_for_bit(case: Case) -> None:
    # Both divide, round to even, clamp, then multiply, each step correctly rounded in the same
    # dtype: nothing may differ. (== treats the two zeros as one: AIMET yields -0.0 here and there.)
    actual = run(case, torch.ops.rimet)["y"]
    assert actual.dtype == case.x.dtype
    torch.testing.assert_close(actual, case.outputs["y"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", select(*AFFINE, where=PRECISE))
def test_gradients_are_aimets(case: Case) -> None:
    actual = run(case, torch.ops.rimet)
    # Elementwise: at most one multiplication or division, correctly rounded on both sides.
    torch.testing.assert_close(actual["gx"], case.outputs["gx"], rtol=0, atol=0, equal_nan=True)
    if not case.x.isfinite().all():
        return  # AIMET's sums are NaN here; rimet's are tested below
    for key, terms in zip(("gscale", "goffset"), elementwise_terms(case), strict=True):
        assert actual[key].dtype == case.inputs[key[1:]].dtype
        assert_sums_agree(actual[key], case.outputs[key], terms, case)


@pytest.mark.parametrize("case", select(*AFFINE, where=PRECISE))
def test_reference_is_aimets(case: Case) -> None:
    wide = case.x.dtype == torch.float64 or beyond_float32(case)
    dtype = torch.float64 if wide else torch.float32
    tensors = [case.inputs[key] for key in ("x", "scale", "offset")]
    y = getattr(reference, case.kind)(*tensors, *case.settings, compute_dtype=dtype)
    y = y.to(case.x.dtype)
    torch.testing.assert_close(y, case.outputs["y"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    select(*AFFINE, where=lambda case: narrow(case) and not refused(case)),
)
def test_half_precision_is_within_one_level_of_aimet(case: Case) -> None:
    # AIMET divides in the tensor's own dtype on small grids, rimet in float32 on every grid. The
    # quotient of a level below 256 is off by up to 1/16 in float16, and by up to 1/32 in bfloat16
    # on the 4-bit grid, so an element close to a tie may fall on the other side: one level.
    # Larger grids are computed in float32 by AIMET as well. The result is rounded to the dtype; in
    # dequantize AIMET rounds the sum with the offset besides.
    actual, expected = run(case, torch.ops.rimet)["y"].double(), case.outputs["y"].double()
    step = 1.0 if case.kind == "quantize" else case.inputs["scale"].double()
    ulp = expected.nan_to_num(0, 0, 0).abs() * torch.finfo(case.x.dtype).eps
    off = torch.where(actual == expected, 0.0, actual - expected).abs()
    limit = 2 * ulp if case.kind == "dequantize" else step + ulp
    assert ((off <= limit) | (actual.isnan() & expected.isnan())).all()
    # Anything systematic would move far more than the few elements near a tie.
    assert (off > 2 * ulp).double().mean() <= 0.1


def bad_geometry(case: Case) -> bool:
    return refused(case) and case.block_size is not None


def coarse_levels(case: Case) -> bool:
    """AIMET's quantize refuses grids whose ends the tensor's dtype cannot hold."""
    return refused(case) and case.block_size is None


@pytest.mark.parametrize("case", select(*AFFINE, where=bad_geometry))
def test_geometry_that_aimet_refuses_is_refused(case: Case) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        run(case, torch.ops.rimet)


@pytest.mark.parametrize("case", select(*AFFINE, where=coarse_levels))
def test_levels_that_the_dtype_cannot_hold_are_rounded_to_it(case: Case) -> None:
    assert case.kind == "quantize"
    wide = torch.float64 if beyond_float32(case) else torch.float32
    tensors = [case.inputs[key] for key in ("x", "scale", "offset")]
    expected = reference.quantize(*tensors, *case.settings, compute_dtype=wide).to(case.x.dtype)
    actual = run(case, torch.ops.rimet)["y"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    select(
        "quantize_dequantize", where=lambda case: "shortcut_y" in case.outputs and PRECISE(case)
    ),
)
def test_difference_to_aimets_shortcut(case: Case) -> None:
    """torch.fake_quantize multiplies by 1 / scale: elements within 2 ulp of a tie may differ."""
    if beyond_float32(case):
        return  # the shortcut works in float32 here, which cannot hold the grid; rimet in float64
    actual, expected = run(case, torch.ops.rimet)["y"], case.outputs["shortcut_y"]
    scale = reference.spread(case.inputs["scale"].double(), case.x.shape)
    ratio = case.x.double() / scale
    from_tie = ((ratio - 0.5) - torch.round(ratio - 0.5)).abs()
    near_tie = from_tie <= 2 * 2**-23 * ratio.abs().clamp_min(1)
    nan = case.x.isnan()
    assert actual[nan].isnan().all(), "NaN stays NaN"
    assert not expected[nan].isnan().any(), "AIMET's shortcut turns NaN into the grid's lower end"
    off = (actual.double() - expected.double()).abs()
    step = scale * (1 + 2**-20)
    assert (off[~nan] <= torch.where(near_tie, step, 2**-22 * expected.abs())[~nan]).all()


@pytest.mark.parametrize(
    "case", select("quantize_dequantize", "quantize", where=lambda case: "special" in case.name)
)
def test_gradients_of_special_values(case: Case) -> None:
    """An infinite input is off the grid like any large one; AIMET's scale gradient is NaN there."""
    case.inputs["x"] = torch.where(case.x.isnan(), torch.zeros_like(case.x), case.x)
    actual = run(case, torch.ops.rimet)
    tensors = [case.inputs[key] for key in ("grad", "x", "scale", "offset")]
    gradient = getattr(reference, f"{case.kind}_grad")
    for value, expected in zip(
        (actual["gx"], actual["gscale"], actual["goffset"]),
        gradient(*tensors, *case.settings),
        strict=True,
    ):
        assert value.isfinite().all()
        # One rounding to the narrowest dtype on the way, and sums of ten float32 terms.
        eps = torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), expected, rtol=eps, atol=20 * 15 * 2**-23)


# ------------------------------------------------------------------------------------------- ranges


def usable(case: Case) -> bool:
    return bool(case.outputs["scale"].isfinite().all()) if "scale" in case.outputs else False


@pytest.mark.parametrize("case", select("range"))
def test_scale_and_offset_of_a_range(case: Case) -> None:
    scale, offset = torch.ops.rimet.range_to_scale_offset(
        case.inputs["min"], case.inputs["max"], case.qmin, case.qmax, case.symmetric
    )
    # One subtraction and one division, both correctly rounded in float32; then exact integers.
    rtol = 0.0
    if beyond_float32(case):
        # rimet derives these in float64, AIMET in float32: three roundings of 2^-24.
        assert scale.dtype == offset.dtype == torch.float64
        rtol = 2**-22
    for actual, key in ((scale, "scale"), (offset, "offset")):
        expected = case.outputs[key]
        torch.testing.assert_close(actual.float(), expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", select("range", where=usable))
def test_range_parametrized_forward_and_gradients(case: Case) -> None:
    actual = run(case, torch.ops.rimet)
    if beyond_float32(case):
        # AIMET rounds the scale to float32, then computes in float64; rimet derives the scale in
        # float64: a relative difference of 2^-24 in a step of 2^-32 of the range.
        torch.testing.assert_close(actual["y"], case.outputs["y"], rtol=2**-22, atol=2**-30)
    else:
        torch.testing.assert_close(actual["y"], case.outputs["y"], rtol=0, atol=0)
        torch.testing.assert_close(actual["gx"], case.outputs["gx"], rtol=0, atol=0)
    # The gradients to min and max are differences of sums over 30 elements, divided by the number
    # of steps; a bound on the terms: |grad| <= 4, |level| <= 2 N. The sums' order is free.
    steps = case.qmax - case.qmin
    scale = case.outputs["scale"]
    span = (case.inputs["min"].abs() / scale).max().item() + 2 * steps
    atol = 2**-23 * 30 * 4 * span / steps
    for key in ("gmin", "gmax"):
        # A grid of 2^32 levels: min / scale loses its last bits in AIMET's float32 chain.
        rtol = 1e-3 if beyond_float32(case) else 1e-5
        torch.testing.assert_close(actual[key], case.outputs[key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", select("range", where=usable))
def test_reference_range_is_aimets(case: Case) -> None:
    wide = torch.float64 if beyond_float32(case) else torch.float32
    low, high = case.inputs["min"], case.inputs["max"]
    y = reference.quantize_dequantize_range(case.x, low, high, *case.settings, compute_dtype=wide)
    tolerance = {"rtol": 2**-22, "atol": 2**-30} if beyond_float32(case) else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y.float(), case.outputs["y"], **tolerance)


@pytest.mark.parametrize("case", select("calibrate", where=lambda case: case.x.numel() > 0))
def test_min_max_of_degenerate_data(case: Case) -> None:
    low, high = torch.ops.rimet.min_max(case.x, [1])
    assert low.dtype == high.dtype == case.x.dtype
    if case.x.isnan().any():
        assert low.isnan().all() and high.isnan().all(), "NaN spreads, as in torch.amin"
        return
    assert low.item() == case.x.min().item()
    assert high.item() == case.x.max().item()
