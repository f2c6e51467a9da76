"""Quantized tensors: which operators keep an encoding, conversions, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet.quantization import DequantizedTensor, EncodingError, QuantizedTensor
from rimet.quantization.affine import AffineEncoding, QuantizeDequantize
from rimet.quantization.float import FloatQuantizeDequantize
from rimet.quantization.tensor import QuantizedTensorBase
from torch import Tensor

PER_TENSOR = AffineEncoding(torch.tensor(0.1), torch.tensor(-10.0), 8)
PER_CHANNEL = AffineEncoding(torch.tensor([[0.1], [0.2]]), torch.zeros(2, 1), 8, True, True)

Op = Callable[[Any], Any]


def make(cls: type[QuantizedTensorBase], encoding: AffineEncoding) -> Any:
    x = torch.linspace(-1, 1, 6).view(2, 3)
    values = encoding.quantize(x) if cls is QuantizedTensor else encoding.quantize_dequantize(x)
    return cls(values, encoding=encoding)


@pytest.fixture(params=[QuantizedTensor, DequantizedTensor])
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


KEEP_ANY: dict[str, Op] = {
    "contiguous": lambda a: a.contiguous(),
    "clone": lambda a: a.clone(),
    "detach": lambda a: a.detach(),
    "requires_grad_": lambda a: a.clone().requires_grad_(),
    "half": lambda a: a.half(),
    "bfloat16": lambda a: a.bfloat16(),
    "double": lambda a: a.double(),
    "to dtype": lambda a: a.to(torch.float64),
    "to device": lambda a: a.to("cpu"),
    "cpu": lambda a: a.cpu(),
    "type_as": lambda a: a.type_as(torch.zeros(1, dtype=torch.float64)),
    "identity": lambda a: torch.nn.Identity()(a),
    "deepcopy": copy.deepcopy,
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "dropout in eval": lambda a: F.dropout(a, 0.5, False),
}
KEEP_PER_TENSOR: dict[str, Op] = {
    "t": lambda a: a.t(),
    "T": lambda a: a.T,
    "view": lambda a: a.view(-1),
    "reshape": lambda a: a.reshape(3, 2),
    "index": lambda a: a[0],
    "slice": lambda a: a[:, 1:],
    "mask": lambda a: a[torch.tensor([True, False])],
    "unsqueeze": lambda a: a.unsqueeze(0),
    "unsqueeze_": lambda a: a.clone().unsqueeze_(0),
    "flatten": lambda a: a.flatten(),
    "torch.flatten": torch.flatten,
    "permute": lambda a: a.permute(1, 0),
    "torch.permute": lambda a: torch.permute(a, (1, 0)),
    "transpose": lambda a: a.transpose(0, 1),
    "expand": lambda a: a.expand(2, 2, 3),
    "repeat": lambda a: a.repeat(2, 1),
    "tile": lambda a: a.tile(2),
    "gather": lambda a: a.gather(0, torch.zeros(1, 3, dtype=torch.long)),
    "index_select": lambda a: a.index_select(0, torch.tensor([0])),
    "take": lambda a: a.take(torch.tensor([0, 1])),
    "narrow": lambda a: a.narrow(0, 0, 1),
    "flip": lambda a: a.flip(0),
    "movedim": lambda a: a.movedim(0, 1),
    "swapaxes": lambda a: a.swapaxes(0, 1),
    "chunk": lambda a: a.chunk(2, 1)[0],
    "split": lambda a: a.split(1)[1],
    "torch.split": lambda a: torch.split(a, 1)[1],
}
LOSE: dict[str, Op] = {
    "add": lambda a: a + 1,
    "add tensors": lambda a: a + a,
    "neg": lambda a: -a,
    "relu": lambda a: a.relu(),
    "F.relu": F.relu,
    "abs": lambda a: a.abs(),
    "max": lambda a: a.max(),
    "mean": lambda a: a.mean(),
    "cat": lambda a: torch.cat([a, a]),
    "stack": lambda a: torch.stack([a, a]),
    "where": lambda a: torch.where(a > 0, a, a),
    "linear": lambda a: F.linear(a, torch.ones(4, 3)),
    "cumsum": lambda a: a.cumsum(0),
    "new_zeros": lambda a: a.new_zeros(2),
    "zeros_like": torch.zeros_like,
    "empty_like": torch.empty_like,
    "data": lambda a: a.data,
    "tensor * tensor": lambda a: a * torch.tensor(3.0),
    "2 / a": lambda a: 2 / a,
    "a // 2": lambda a: a // 2,
    "pad": lambda a: F.pad(a, (1, 1)),
    "sort": lambda a: a.sort()[0],
    "pooling": lambda a: F.max_pool1d(a, 2),
    "to int": lambda a: a.to(torch.int8),
    "long": lambda a: a.long(),
    "bool": lambda a: a.bool(),
    "compare": lambda a: a > 0,
}


@pytest.mark.parametrize("name", KEEP_ANY)
@pytest.mark.parametrize("encoding", [PER_TENSOR, PER_CHANNEL])
def test_kept_whatever_the_granularity(cls: Any, encoding: AffineEncoding, name: str) -> None:
    a = make(cls, encoding)
    out = KEEP_ANY[name](a)
    assert type(out) is cls
    assert out.encoding.scale.shape == encoding.scale.shape
    torch.testing.assert_close(out.encoding.scale.float(), encoding.scale, rtol=1e-2, atol=0)
    assert out.encoding.scale.dtype == out.dtype
    assert a.encoding is encoding


@pytest.mark.parametrize("name", KEEP_PER_TENSOR)
def test_kept_if_per_tensor(cls: Any, name: str) -> None:
    a, b = make(cls, PER_TENSOR), make(cls, PER_CHANNEL)
    op = KEEP_PER_TENSOR[name]
    out = op(a)
    assert type(out) is cls and out.encoding is not None
    plain = op(a.as_subclass(Tensor))
    assert torch.equal(out.as_subclass(Tensor), plain)
    assert type(op(b)) is cls and op(b).encoding is None
    # Dequantizing commutes with picking and rearranging.
    if cls is QuantizedTensor:
        expected = op(a.dequantize()).as_subclass(Tensor)
        assert torch.equal(out.dequantize().as_subclass(Tensor), expected)
    with pytest.raises(EncodingError, match="no encoding"):
        op(b).quantized_repr()


@pytest.mark.parametrize("name", LOSE)
@pytest.mark.parametrize("encoding", [PER_TENSOR, PER_CHANNEL])
def test_plain_after_all_else(cls: Any, encoding: AffineEncoding, name: str) -> None:
    out = LOSE[name](make(cls, encoding))
    assert type(out) is Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda a: a.add_(1),
        lambda a: a.mul_(2),
        lambda a: a.__setitem__(0, 1.0),
        lambda a: a.copy_(torch.zeros(2, 3)),
        lambda a: torch.relu_(a),
        lambda a: F.relu(a, inplace=True),
        lambda a: a.view(-1).zero_(),
        lambda a: a.as_subclass(Tensor).fill_(7.0),
    ],
)
def test_writing_loses_the_encoding(cls: Any, write: Op) -> None:
    a = make(cls, PER_TENSOR).clone()
    assert a.encoding is not None
    write(a)
    assert type(a) is cls and a.encoding is None


def test_unpacking_and_numbers(cls: Any) -> None:
    a = make(cls, PER_TENSOR)
    assert a[0, 0].item() == a.tolist()[0][0] == a.numpy()[0, 0]
    assert a.shape == (2, 3) and a.dtype == torch.float32 and len(a) == 2
    assert cls.__name__ in repr(a)


# -- scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "factor"),
    [
        (lambda a: a * 2, 2.0),
        (lambda a: 2 * a, 2.0),
        (lambda a: a.mul(2.5), 2.5),
        (lambda a: torch.mul(a, 3), 3.0),
        (lambda a: a / 4, 0.25),
        (lambda a: torch.div(a, 4), 0.25),
        (lambda a: a * -2, -2.0),
        (lambda a: a / -2, -0.5),
    ],
)
def test_a_number_scales_the_grid(op: Op, factor: float) -> None:
    a = make(DequantizedTensor, PER_TENSOR)
    out = op(a)
    assert type(out) is DequantizedTensor
    assert out.encoding.scale.item() == pytest.approx(0.1 * abs(factor))
    # The tensor really lies on that grid.
    again = out.encoding.quantize_dequantize(out.as_subclass(Tensor))
    torch.testing.assert_close(again, out.as_subclass(Tensor))
    torch.testing.assert_close(again, a.as_subclass(Tensor) * factor)


def test_no_grid_for_some_factors() -> None:
    a, symmetric = make(DequantizedTensor, PER_TENSOR), make(DequantizedTensor, PER_CHANNEL)
    assert type(symmetric * 2) is DequantizedTensor
    # -128 of a symmetric grid has no mirror image.
    assert type(symmetric * -2) is Tensor
    for factor in (0, float("inf"), float("nan")):
        assert type(a * factor) is Tensor
    assert type(a / 0) is Tensor
    assert type(make(QuantizedTensor, PER_TENSOR) * 2) is Tensor
    assert type(torch.div(a, 2, rounding_mode="floor")) is Tensor


def test_embedding_brings_the_scales_of_its_rows() -> None:
    index = torch.tensor([[0, 1], [1, 1]])
    out = F.embedding(index, make(DequantizedTensor, PER_TENSOR))
    assert type(out) is DequantizedTensor and out.encoding is not None
    table = make(DequantizedTensor, PER_CHANNEL)
    out = F.embedding(index, table)
    assert out.encoding.scale.shape == (2, 2, 1)
    again = out.encoding.quantize_dequantize(out.as_subclass(Tensor))
    torch.testing.assert_close(again, out.as_subclass(Tensor))


# -- conversions -----------------------------------------------------------------------------------


def test_conversions() -> None:
    x = torch.linspace(-2, 30, 9)
    q = QuantizedTensor(PER_TENSOR.quantize(x), encoding=PER_TENSOR)
    d = q.dequantize()
    assert type(d) is DequantizedTensor and d.encoding is PER_TENSOR
    assert q.quantize() is q and d.dequantize() is d
    assert torch.equal(d.quantize().as_subclass(Tensor), q.as_subclass(Tensor))
    assert d.quantized_repr().dtype == q.quantized_repr().dtype == torch.uint8
    assert torch.equal(d.quantized_repr(), q.quantized_repr())


def test_without_an_encoding(cls: Any) -> None:
    for a in (cls([1.0, 2.0]), torch.ones(2).as_subclass(cls), make(cls, PER_TENSOR).new_empty(2)):
        assert type(a) is cls and a.encoding is None
        with pytest.raises(EncodingError, match=cls.__name__):
            a.quantized_repr()
    with pytest.raises(EncodingError):
        QuantizedTensor([1.0]).dequantize()
    with pytest.raises(EncodingError):
        DequantizedTensor([1.0]).quantize()
    with pytest.raises(TypeError, match="encoding"):
        cls([1.0]).encoding = 3


def test_integer_form_of_16_bits_from_half_precision() -> None:
    """float16 cannot count to 65535, the integers can."""
    quantizer = QuantizeDequantize((), 16, False)
    quantizer.set_range(-1, 1)
    y = quantizer(torch.linspace(-0.9, 0.9, 7).half())
    assert y.dtype == torch.float16
    ints = y.quantized_repr()
    assert ints.dtype == torch.int32
    scale, offset = quantizer.get_scale(), quantizer.get_offset()
    torch.testing.assert_close(
        (ints + offset) * scale, y.float().as_subclass(Tensor), atol=2e-5, rtol=0
    )


def test_gradient_flows_through_conversions() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    x = torch.tensor([-5.0, 0.3, 0.5], requires_grad=True)
    y = quantizer(x)
    y.quantize().dequantize().sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0]))


def test_encoding_is_that_of_the_call() -> None:
    """It is computed when asked for, but from the range there was."""
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    x = torch.randn(10)
    with torch.no_grad():
        without_grad = quantizer(x)
    with_grad = quantizer(x)
    with torch.inference_mode():
        inference = quantizer(x)
    quantizer.set_range(-100, 100)
    for y in (without_grad, with_grad, inference):
        assert y.encoding.scale.item() == pytest.approx(2 / 255)
        assert y.encoding is y.encoding and y.encoding.producer is quantizer
    assert with_grad.encoding.scale.requires_grad and not without_grad.encoding.scale.requires_grad


def test_copies_are_independent() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(-1, 1)
    y = quantizer(torch.randn(4)).detach()
    duplicate = copy.deepcopy(y)
    duplicate.encoding.scale.mul_(2)
    assert y.encoding.scale.item() == pytest.approx(2 / 255)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is DequantizedTensor and loaded.encoding.producer is None
    assert torch.equal(loaded.dequantize(), y)
    with pytest.raises(RuntimeError, match="leaf"):
        copy.deepcopy(quantizer(torch.randn(4)))


def test_a_parameter_can_be_one() -> None:
    parameter = torch.nn.Parameter(make(DequantizedTensor, PER_CHANNEL))
    assert isinstance(parameter, torch.nn.Parameter) and isinstance(parameter, DequantizedTensor)
    assert parameter.encoding.granularity == "perchannel"
    linear = torch.nn.Linear(3, 2)
    linear.weight = parameter
    linear(torch.randn(4, 3)).sum().backward()
    assert parameter.grad is not None


def test_quantizers_take_quantized_tensors() -> None:
    first, second = QuantizeDequantize((), 8, False), QuantizeDequantize((), 4, True)
    first.set_range(-1, 1)
    x = torch.randn(5)
    with second.compute_encodings():
        second(first(x))
    y = second(first(x))
    assert torch.equal(y, second(first(x).as_subclass(Tensor)))
    assert y.encoding.producer is second
    halves = FloatQuantizeDequantize(dtype=torch.float16)
    assert type(halves(y)) is DequantizedTensor
