"""Functional quantization, its argument forms, backends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rimet.quantization import affine, get_backend, set_backend
from rimet.quantization.affine import (
    QuantizeDequantize,
    add_backend,
    dequantize,
    quantize,
    quantize_dequantize,
)
from rimet.quantization.affine.backends import native, torch_builtins

X = torch.tensor([-2.0, 0.0, 0.33, 99.0])
SCALE, OFFSET = torch.tensor(0.1), torch.tensor(-3.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "qmin", "qmax"),
    [
        ((8,), {}, 0, 255),
        ((8, True), {}, -128, 127),
        ((8,), {"signed": True}, -128, 127),
        ((8.0,), {}, 0, 255),
        ((), {"bitwidth": 4}, 0, 15),
        ((8, False, None), {}, 0, 255),
        ((), {"num_steps": 15}, 0, 15),
        ((), {"num_steps": 15, "signed": True}, -8, 7),
        ((), {"num_steps": 14, "signed": True}, -7, 7),
        ((0, 255), {}, 0, 255),
        ((-8, 7), {}, -8, 7),
        ((-8, 7, None), {}, -8, 7),
        ((0,), {"qmax": 3}, 0, 3),
        ((), {"qmin": -1, "qmax": 3}, -1, 3),
    ],
)
def test_forms(args: tuple[Any, ...], kwargs: dict[str, Any], qmin: int, qmax: int) -> None:
    index = (torch.round(X / 0.1) + 3).clamp(qmin, qmax)
    assert torch.equal(quantize(X, SCALE, OFFSET, *args, **kwargs), index)
    expected = (index - 3) * 0.1
    torch.testing.assert_close(quantize_dequantize(X, SCALE, OFFSET, *args, **kwargs), expected)
    torch.testing.assert_close(dequantize(index, SCALE, OFFSET), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((), {}, TypeError),
        (("8",), {}, TypeError),
        ((8.5,), {}, TypeError),
        ((True,), {}, TypeError),
        ((8,), {"foo": 1}, TypeError),
        ((8, True), {"signed": True}, TypeError),
        ((8,), {"num_steps": 3}, TypeError),
        ((0,), {"qmin": 1}, TypeError),
        ((8, True, None, 0.0, 1), {}, TypeError),
        ((8, True, 3), {}, TypeError),
        ((0,), {}, ValueError),
        ((-3,), {}, ValueError),
        ((), {"num_steps": 0}, ValueError),
        ((255, 0), {}, ValueError),
        ((8, 2), {}, ValueError),
    ],
)
@pytest.mark.parametrize("function", [quantize, quantize_dequantize])
def test_bad_arguments(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=function.__name__ + "|bitwidth|qmin"):
        function(X, SCALE, OFFSET, *args, **kwargs)


def test_zero_point_shift() -> None:
    y = quantize_dequantize(X, SCALE, OFFSET, 8, zero_point_shift=0.5)
    torch.testing.assert_close(y, torch.tensor([-0.25, 0.05, 0.35, 25.25]))
    with pytest.raises(RuntimeError, match="zero_point_shift"):
        quantize(X, SCALE, OFFSET, 8, zero_point_shift=0.5)


def test_indices_that_half_precision_cannot_hold() -> None:
    x = torch.tensor([3000.0]).half()
    with pytest.raises(RuntimeError, match=r"float16.*65535"):
        quantize(x, SCALE, OFFSET, 16)
    quantize(x, SCALE, OFFSET, 15)
    quantize_dequantize(x, SCALE, OFFSET, 16)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    blocks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    sizes = draw(st.lists(st.integers(1, 3), min_size=len(blocks), max_size=len(blocks)))
    lead = draw(st.lists(st.integers(1, 2), max_size=1))
    seed = draw(st.integers(0, 2**16))
    bits = draw(st.integers(2, 8))
    signed = draw(st.booleans())
    rest = draw(st.booleans())
    return tuple(lead), tuple(blocks), tuple(sizes), seed, bits, signed, rest


@settings(max_examples=60, deadline=None)
@given(problems())
def test_backends_agree_on_blocks_and_gradients(problem: tuple[Any, ...]) -> None:
    lead, blocks, sizes, seed, bits, signed, rest = problem
    torch.manual_seed(seed)
    shape = [*lead, *(count * size for count, size in zip(blocks, sizes, strict=True))]
    x = torch.randn(shape, dtype=torch.float64)
    scale = torch.rand(blocks, dtype=torch.float64) * 0.3 + 0.05
    offset = torch.randint(-3, 4, blocks).double()
    weight = torch.randn(shape, dtype=torch.float64)
    block_size = [-1 if rest and i % 2 else size for i, size in enumerate(sizes)]

    results = []
    for name in ("rimet", "torch_builtins"):
        with set_backend(name):
            leaves = [leaf.clone().requires_grad_() for leaf in (x, scale, offset)]
            y = quantize_dequantize(*leaves, bits, signed, block_size)
            q = quantize(x, scale, offset, bits, signed, block_size)
            back = dequantize(q, scale, offset, block_size)
            (y * weight).sum().backward()
            results.append([y.detach(), q, back, *(leaf.grad for leaf in leaves)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    y, _, back = results[0][:3]
    torch.testing.assert_close(y, back, rtol=1e-12, atol=1e-12)
    # A slow second opinion: each element with the scale at its block's index.
    for position in [
        tuple(int(i) for i in row)
        for row in torch.rand(3, len(shape)).mul(torch.tensor(shape)).long()
    ]:
        at = tuple(i // size for i, size in zip(position[len(lead) :], sizes, strict=True))
        index = torch.round(x[position] / scale[at]) - offset[at]
        low = -(2 ** (bits - 1)) if signed else 0
        expected = (index.clamp(low, low + 2**bits - 1) + offset[at]) * scale[at]
        torch.testing.assert_close(y[position], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["rimet", "torch_builtins"])
def test_shapes_that_do_not_fit(name: str) -> None:
    with set_backend(name):
        for scale, block in (
            (torch.ones(3), None),
            (torch.ones(2, 2), (2, 4)),
            (torch.ones(2, 2), (2,)),
            (torch.ones(1, 2, 2), (1, 2, 3)),
        ):
            for function in (quantize, quantize_dequantize):
                with pytest.raises((RuntimeError, ValueError)):
                    function(torch.randn(4, 5), scale, torch.zeros_like(scale), 8, block_size=block)


# -- backends --------------------------------------------------------------------------------------


def test_switching() -> None:
    assert get_backend() is native
    with set_backend("torch_builtins"):
        assert get_backend() is torch_builtins
        with set_backend("rimet"):
            assert get_backend() is native
        assert get_backend() is torch_builtins
    assert get_backend() is native
    switch = set_backend("torch_builtins")
    assert affine.get_backend() is torch_builtins
    with switch:
        pass
    assert get_backend() is native
    for name in ("nope", None):
        with pytest.raises(RuntimeError, match="backend"):
            set_backend(name)  # type: ignore[arg-type]
    assert get_backend() is native


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantizers_use_the_backend(symmetric: bool) -> None:
    quantizer = QuantizeDequantize((3, 1), 8, symmetric)
    quantizer.set_range(-1, 1)
    x = torch.randn(3, 50)
    expected = quantizer(x)
    with set_backend("torch_builtins"):
        y = quantizer(x)
    assert "RangeOp" not in str(y.grad_fn)
    torch.testing.assert_close(y, expected)


def test_adding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine.backends, "_backends", dict(affine.backends._backends))
    calls = []

    def record(*args: Any) -> Any:
        calls.append(args[3:])
        return args[0]

    mine = SimpleNamespace(quantize=record, quantize_dequantize=record, dequantize=record)
    add_backend("mine", mine)
    with pytest.raises(RuntimeError, match="exists"):
        add_backend("mine", mine)
    with pytest.raises(TypeError, match="dequantize"):
        add_backend("incomplete", SimpleNamespace(quantize=record, quantize_dequantize=record))
    with set_backend("mine"):
        quantize(X, SCALE, OFFSET, 8)
        quantize_dequantize(X, SCALE, OFFSET, -8, 7)
        dequantize(X, SCALE, OFFSET)
    assert calls == [(0, 255, None), (-8, 7, None, 0.0), (None,)]
