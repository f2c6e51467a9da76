"""Modules whose computation is our own: attention, elementwise modules, initial states."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from typing import Any

import pytest
import rimet.elementwise_ops
import rimet.nn as rnn
import torch
import torch.nn.functional as F
from rimet.nn import QuantizationMixin, custom, fake_quant
from rimet.quantization.affine import QuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from torch import Tensor, nn

# -- multi-head attention --------------------------------------------------------------------------

ATTENTION = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 5},
]


def attention_inputs(options: dict[str, Any], batched: bool = True) -> tuple[Tensor, ...]:
    length, source, batch = 5, 4, 3
    shapes = [
        (length, batch, 8),
        (source, batch, options.get("kdim", 8)),
        (source, batch, options.get("vdim", 8)),
    ]
    tensors = [torch.randn(s) for s in shapes]
    if not batched:
        tensors = [t[:, 0] for t in tensors]
    elif options.get("batch_first"):
        tensors = [t.transpose(0, 1) for t in tensors]
    return tuple(tensors)


@pytest.mark.parametrize("options", ATTENTION, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both", "per_head"])
def test_attention_without_quantizers(options: dict[str, Any], batched: bool, masks: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    twin = QuantizationMixin.from_module(module)
    inputs = attention_inputs(options, batched)
    kwargs: dict[str, Any] = {}
    batch = 3 if batched else 1
    if masks in ("bool", "both"):
        kwargs["attn_mask"] = torch.rand(5, 4) > 0.7
        kwargs["attn_mask"][:, 0] = False
    if masks == "float":
        kwargs["attn_mask"] = torch.randn(5, 4)
    if masks == "per_head":
        kwargs["attn_mask"] = torch.randn(batch * 2, 5, 4)
    if masks in ("padding", "both"):
        padding = torch.tensor([[False, False, False, True]] * 3)
        kwargs["key_padding_mask"] = padding if batched else padding[0]
    for extra in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        # Not bit for bit: the original scales the query, and adds the mask in one operator with the
        # product; here each step is one of its own, as in AIMET.
        torch.testing.assert_close(
            twin(*inputs, **kwargs, **extra), module(*inputs, **kwargs, **extra)
        )


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_state(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    inputs = attention_inputs(options)
    expected = module(*inputs)
    twin = QuantizationMixin.from_module(module)
    assert not twin.training
    assert type(twin) is rnn.QuantizedMultiheadAttention
    assert "in_proj_weight" not in twin.state_dict()
    original = twin.get_original_module()
    assert type(original) is nn.MultiheadAttention
    assert {k: v.shape for k, v in original.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
    for name, value in module.state_dict().items():
        assert torch.equal(original.state_dict()[name], value)
    torch.testing.assert_close(original(*inputs), expected)
    # State dicts of both forms.
    for state in (module.state_dict(), twin.state_dict()):
        other = rnn.QuantizedMultiheadAttention(8, 2, **options).eval()
        other.load_state_dict(state)
        torch.testing.assert_close(other(*inputs), expected)
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        torch.testing.assert_close(copied(*inputs), expected)
    output, _ = twin(*inputs)
    output.sum().backward()
    for projection in (twin.q_proj, twin.v_proj, twin.out_proj):
        assert projection.weight.grad is not None


def test_attention_with_quantizers() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2).eval()
    twin = QuantizationMixin.from_module(module)
    x = torch.randn(5, 3, 8)

    def made(shape: tuple[int, ...] = (), symmetric: bool = False) -> Any:
        return QuantizeDequantize(shape, 6, symmetric)

    twin.q_proj.param_quantizers["weight"] = made((8, 1), True)
    twin.qk_matmul.output_quantizers[0] = made()
    twin.softmax.output_quantizers[0] = made()
    twin.out_proj.output_quantizers[0] = made()
    with torch.no_grad(), rnn.compute_encodings(twin):
        plain_output = twin(x, x, x)[0]
    output = twin(x, x, x)[0]

    def heads(t: Tensor) -> Tensor:
        return t.reshape(5, 6, 4).transpose(0, 1)

    wq, wk, wv = module.in_proj_weight.chunk(3)
    bq, bk, bv = module.in_proj_bias.chunk(3)
    wq = twin.q_proj.param_quantizers["weight"]._forward_tensor(wq)
    q, k, v = heads(F.linear(x, wq, bq)), heads(F.linear(x, wk, bk)), heads(F.linear(x, wv, bv))
    scores = twin.qk_matmul.output_quantizers[0]._forward_tensor(q @ k.transpose(1, 2))
    weights = torch.softmax(scores / math.sqrt(4), -1)
    weights = twin.softmax.output_quantizers[0]._forward_tensor(weights)
    attended = (weights @ v).transpose(0, 1).reshape(5, 3, 8)
    expected = F.linear(attended, module.out_proj.weight, module.out_proj.bias)
    expected = twin.out_proj.output_quantizers[0]._forward_tensor(expected)
    step = twin.out_proj.output_quantizers[0].get_scale().item()
    # A last bit in a product may move a value to the next bin.
    torch.testing.assert_close(output, expected, rtol=0, atol=1.01 * step)
    assert (output - expected).abs().gt(1e-5).float().mean() < 0.1
    assert not torch.equal(output, plain_output)


def test_attention_refuses_wrong_masks() -> None:
    twin = rnn.QuantizedMultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    with pytest.raises(RuntimeError, match=r"attn_mask: expected shape \(5, 5\)"):
        twin(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(RuntimeError, match=r"key_padding_mask: expected shape \(3, 5\)"):
        twin(x, x, x, key_padding_mask=torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match="is_causal"):
        twin(x, x, x, is_causal=True)


# -- recurrent layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("packed", [False, True])
def test_missing_state_is_observed(kind: str, packed: bool) -> None:
    """A quantizer of the initial state is calibrated although no state is passed: it sees zeros."""
    layer = getattr(rnn, f"Quantized{kind}")(3, 4, num_layers=2, bidirectional=True)
    for i in range(len(layer.input_quantizers)):
        layer.input_quantizers[i] = QuantizeDequantize((), 8, False)
    x: Any = torch.randn(5, 2, 3)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    with torch.no_grad(), layer.compute_encodings():
        before = layer(x)
    assert all(q.is_initialized() for q in layer.input_quantizers)
    layer.input_quantizers[0] = None
    with torch.no_grad():
        after = layer(x)
    data = [r.data if packed else r for r in (after[0], before[0])]
    assert torch.equal(*data)


def test_setting_a_parameter_of_a_recurrent_twin_leaves_the_original_alone() -> None:
    layer = nn.LSTM(3, 4)
    twin = QuantizationMixin.from_module(layer)
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    twin.weight_ih_l0 = nn.Parameter(torch.zeros_like(twin.weight_ih_l0))
    assert torch.equal(layer(x)[0], expected)
    assert not torch.equal(twin(x)[0], expected)


# -- elementwise modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_exported(kind: str) -> None:
    x = torch.randn(4, 2, 5)
    sim = QuantizationSimModel(nn.Sequential(getattr(nn, kind)(5, 3)), x)
    sim.compute_encodings(lambda m: m(x))
    before = list(sim.model[0]._flat_weights)
    program = torch.export.export(sim.model, (x,))
    assert torch.equal(program.module()(x)[0], sim.model(x)[0])
    assert str(program.graph).count("rimet.quantize_dequantize_range") >= 4
    after = sim.model[0]._flat_weights
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_depth_to_space() -> None:
    x = torch.arange(32.0).reshape(1, 8, 2, 2)
    assert torch.equal(custom.DepthToSpaceCRDMode([2, 2])(x), F.pixel_shuffle(x, 2))
    # The example of the ONNX operator, mode DCR: channels of a block lie c apart.
    y = custom.DepthToSpaceDCRMode(2)(x)
    for c in range(2):
        for i in range(4):
            for j in range(4):
                channel = (i % 2 * 2 + j % 2) * 2 + c
                assert y[0, c, i, j] == x[0, channel, i // 2, j // 2]


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_scatter_nd(reduction: int) -> None:
    data = torch.randn(3, 4, 2)
    indices = torch.tensor([[0, 3], [2, 1]])
    updates = torch.randn(2, 2)
    expected = data.clone()
    for index, update in zip(indices.tolist(), updates, strict=True):
        old = expected[tuple(index)].clone()
        expected[tuple(index)] = [update, old + update, old * update][reduction]
    before = data.clone()
    assert torch.equal(custom.ScatterND(reduction)(data, indices, updates), expected)
    assert torch.equal(data, before)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_gather_nd(batch: int) -> None:
    """Against the definition of the ONNX operator, element by element."""
    data = torch.randn(2, 3, 4, 5)
    lead = [2, 3][:batch]
    for k in range(1, 4 - batch + 1):
        indices = torch.stack(
            [torch.randint(data.shape[batch + i], (*lead, 2)) for i in range(k)], dim=-1
        )
        output = custom.GatherNd(batch)(data, indices)
        assert output.shape == (*lead, 2, *data.shape[batch + k :])
        for where in torch.cartesian_prod(*[torch.arange(n) for n in (*lead, 2)]).reshape(
            -1, batch + 1
        ):
            position = tuple(where.tolist())
            source = (*position[:batch], *indices[position].tolist())
            assert torch.equal(output[position], data[source])
    with pytest.raises(ValueError, match="GatherNd"):
        custom.GatherNd(batch)(data, torch.zeros(*lead, 2, 5, dtype=torch.int64))


def test_custom_gather() -> None:
    data = torch.randn(3, 4, 5)
    indices = torch.tensor([[0, -1], [2, 1]])
    for axis in (0, 1, 2, -1):
        picked = custom.CustomGather()(data, indices, axis)
        flat = indices.remainder(data.shape[axis]).flatten().tolist()
        parts = [data.select(axis, i) for i in flat]
        at = axis % 3
        expected = torch.stack(parts, at).unflatten(at, (2, 2))
        assert torch.equal(picked, expected)


def test_strided_slice_and_one_hot() -> None:
    x = torch.arange(30).reshape(5, 6)
    assert torch.equal(custom.StridedSlice()(x, ((1, 5, 2), (0, 6, 3))), x[1:5:2, 0:6:3])
    hot = custom.OneHot(3, -1.0, 2.5)(torch.tensor([2, 0]))
    assert hot.tolist() == [[-1, -1, 2.5], [2.5, -1, -1]]


@pytest.mark.parametrize("size", [1, 6, 8, 12])
def test_hadamard(size: int) -> None:
    module = custom.HadamardRotation(size)
    order = size & -size
    matrix = module.hadamard
    assert matrix.shape == (order, order) and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    x = torch.randn(3, size)
    torch.testing.assert_close(module(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(module(module(x)), x)
    with pytest.raises(ValueError, match="size"):
        custom.HadamardRotation(0)


def test_rms_norm() -> None:
    x = torch.randn(2, 3, 8)
    module = custom.RmsNorm([2, 3, 8], [2], 1e-6)
    torch.testing.assert_close(module(x), F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved: bool) -> None:
    """Rotation of pairs is a product of complex numbers."""
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    angle = torch.randn(7, 4, dtype=torch.float64)
    positions = torch.randint(7, (2, 5))
    output = custom.RotaryEmbedding(interleaved, 8, 10)(x, angle.cos(), angle.sin(), positions)
    pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(a, b) * torch.exp(1j * angle[positions])[:, None]
    parts = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
    torch.testing.assert_close(output, torch.cat((parts, x[..., 8:]), -1))


@pytest.mark.parametrize(
    "module", [custom.RoiAlign(2, 1.0, 1), custom.NonMaxSuppression(0.5, 0.1, 2)]
)
def test_modules_that_need_torchvision(module: nn.Module) -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.5, 4.0, 4.0], [5.0, 5.0, 7.0, 7.0]])
    inputs: tuple[Tensor, ...] = (boxes[None], torch.tensor([[[0.9, 0.8, 0.3]]]))
    if isinstance(module, custom.RoiAlign):
        inputs = (torch.ones(1, 2, 8, 8), boxes, torch.zeros(3, dtype=torch.int64))
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ImportError, match="pip install torchvision"):
            module(*inputs)
        return
    output = module(*inputs)
    if isinstance(module, custom.RoiAlign):
        assert torch.equal(output, torch.ones(3, 2, 2, 2))
    else:
        assert output.tolist() == [[0, 0, 0], [0, 0, 2]]


def test_quantized_batch_norm_refuses_to_quantize_what_it_updates() -> None:
    twin = custom.QuantizedBatchNorm()
    twin.input_quantizers[1] = QuantizeDequantize((), 8, False)
    with pytest.raises(RuntimeError, match="running statistics"):
        twin(torch.randn(3, 4), torch.zeros(4), torch.ones(4), training=True)


# -- names -----------------------------------------------------------------------------------------


def test_old_names() -> None:
    assert fake_quant.FakeQuantizationMixin is QuantizationMixin
    assert fake_quant.FakeQuantizedLinear is rnn.QuantizedLinear
    assert fake_quant.FakeQuantizedMaxPool2d is rnn.QuantizedMaxPool2d
    assert fake_quant.FakeQuantizedAdd is custom.QuantizedAdd
    assert rimet.elementwise_ops.Add is custom.Add


def test_wrapper_modules() -> None:
    made = custom.create_wrapper_module("Cosine", torch.cos)
    assert made.__module__ == __name__ and made.__name__ == "Cosine"
    x = torch.randn(3)
    assert torch.equal(made()(x), x.cos())
    for name in custom.__all__:
        value = getattr(custom, name)
        if isinstance(value, type):
            assert value.__module__ == "rimet.nn.modules.custom"
            assert pickle.loads(pickle.dumps(value)) is value
