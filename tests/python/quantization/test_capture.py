"""Quantizer modules under torch.jit, torch.compile, torch.export and functorch."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rimet.quantization import DequantizedTensor, QuantizedTensor
from rimet.quantization.affine import GroupedBlockQuantizeDequantize, Quantize, QuantizeDequantize
from rimet.quantization.float import FloatQuantizeDequantize


def quantizers() -> list[Any]:
    made: list[Any] = [
        QuantizeDequantize((), 8, False),
        QuantizeDequantize((3, 1), 4, True),
        QuantizeDequantize((3, 2), 4, True, block_size=(1, 4)),
        Quantize((), 8, False),
        GroupedBlockQuantizeDequantize(
            (3, 2), 4, True, 8, block_size=(1, 4), block_grouping=(1, 2)
        ),
    ]
    for quantizer in made:
        quantizer.set_range(-1.3, 1.1)
    made.append(FloatQuantizeDequantize(dtype=torch.float8_e4m3fn))
    return made


X = torch.linspace(-2, 2, 24).view(3, 8)
EVERY = pytest.mark.parametrize("quantizer", quantizers(), ids=repr)
AFFINE = pytest.mark.parametrize("quantizer", quantizers()[:5], ids=repr)


@AFFINE
def test_trace_and_save(quantizer: Any) -> None:
    with torch.no_grad():
        expected = quantizer(X).as_subclass(torch.Tensor)
        traced = torch.jit.trace(quantizer, (X,))
        assert type(traced(X)) is torch.Tensor and torch.equal(traced(X), expected)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        assert torch.equal(torch.jit.load(buffer)(X), expected)
    assert "rimet::" in str(traced.graph)


def test_scripting_is_refused_in_words() -> None:
    model = torch.nn.Sequential(quantizers()[0])
    with pytest.raises(RuntimeError, match=r"QuantizeDequantize.*torch\.jit\.trace"):
        torch.jit.script(model)
    assert type(model(X)) is DequantizedTensor


@AFFINE
def test_compile(quantizer: Any) -> None:
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    y = compiled(x)
    expected = quantizer(X)
    assert torch.equal(y, expected.as_subclass(torch.Tensor))
    y.sum().backward()
    mine = quantizer.min.grad.clone()
    quantizer.zero_grad()
    expected.sum().backward()
    torch.testing.assert_close(mine, quantizer.min.grad)
    # The range is a parameter, not a constant of the graph.
    quantizer.set_range(-0.5, 0.5)
    assert torch.equal(compiled(X), quantizer(X).as_subclass(torch.Tensor))
    quantizer.set_range(-1.3, 1.1)
    torch._dynamo.reset()


@EVERY
def test_export(quantizer: Any) -> None:
    program = torch.export.export(quantizer, (X,))
    y = program.module()(X)
    assert type(y) is torch.Tensor
    assert torch.equal(y, quantizer(X).as_subclass(torch.Tensor))


def test_eager_results_know_their_encoding() -> None:
    for quantizer in quantizers():
        kind = QuantizedTensor if type(quantizer) is Quantize else DequantizedTensor
        y = quantizer(X)
        assert type(y) is kind and y.encoding.producer is quantizer


def test_tensor_path_is_plain_and_equal() -> None:
    for quantizer in quantizers():
        y = quantizer._forward_tensor(X)
        assert type(y) is torch.Tensor
        assert torch.equal(y, quantizer(X).as_subclass(torch.Tensor))
        assert type(quantizer._forward_tensor(quantizer(X))) is torch.Tensor


def test_fake_tensors_pass() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert quantizer(torch.empty(3, 4)).shape == (3, 4)


def test_tensor_path_is_plain_while_calibrating() -> None:
    for quantizer in quantizers():
        with quantizer.compute_encodings():
            y = quantizer._forward_tensor(DequantizedTensor(X))
        assert type(y) is torch.Tensor
