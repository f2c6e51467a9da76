"""``quantize_dequantize_range_``: the values of the op without underscore, where the input was."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from ops.test_registry import DTYPES, GEOMETRIES, OPS, tensors


def arguments(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[object, ...]]:
    geometry = GEOMETRIES[name]
    t = tensors(geometry, dtype)
    return t["x"], (t["min"], t["max"], 0, 15, False, 0.0, geometry.block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "expanded"])
def test_values_are_those_out_of_place(name: str, dtype: torch.dtype) -> None:
    x, rest = arguments(name, dtype)
    expected = OPS.quantize_dequantize_range(x.clone(), *rest)
    version, strides = x._version, x.stride()
    OPS.quantize_dequantize_range_(x, *rest)
    assert x.stride() == strides
    assert torch.equal(x, expected)
    assert x._version == version + 1


def test_a_grid_beyond_float32_in_float64_arithmetic() -> None:
    x = torch.linspace(-2, 2, 1001)
    rest = (torch.tensor(-1.0), torch.tensor(1.0), 0, 2**31 - 1, False)
    expected = OPS.quantize_dequantize_range(x, *rest)
    OPS.quantize_dequantize_range_(x, *rest)
    assert torch.equal(x, expected)


def test_elements_that_share_memory_are_refused() -> None:
    x, rest = arguments("expanded", torch.float32)
    before = x.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        OPS.quantize_dequantize_range_(x, *rest)
    assert torch.equal(x, before)


def test_a_bad_grid_leaves_the_input_alone() -> None:
    x = torch.randn(4)
    before = x.clone()
    with pytest.raises(ValueError, match="qm"):
        OPS.quantize_dequantize_range_(x, torch.tensor(-1.0), torch.tensor(1.0), 5, 5, False)
    assert torch.equal(x, before)


def test_no_gradient_through_it() -> None:
    x = torch.randn(4)
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    for wanted in (x, low, high):
        wanted.requires_grad_()
        with pytest.raises(RuntimeError, match="not implemented"):
            OPS.quantize_dequantize_range_(x, low, high, 0, 15, False)
        with torch.no_grad():
            OPS.quantize_dequantize_range_(x, low, high, 0, 15, False)
        wanted.requires_grad_(False)


def test_opcheck() -> None:
    x, rest = arguments("per-channel-0", torch.float32)
    opcheck(OPS.quantize_dequantize_range_.default, (x, *rest))
