"""QDQ models: onnxruntime computes from them what the simulation computes."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rimet.onnx
import torch
import torch.nn.functional as F
import torchvision
import transformers
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.common.defs import QuantizationDataType
from rimet.quantization.affine import (
    GroupedBlockQuantizeDequantize,
    Quantize,
    QuantizeDequantize,
)
from rimet.quantization.float import FloatQuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from torch import Tensor, nn

from export.onnx_runs import assert_equal, calibrated, exported, run

pytestmark = [
    # Of torch.onnx itself: its older exporter is deprecated, its newer one uses what torch.export deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Constant folding:UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class ConvReluLinear(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8 * 6 * 6, 16, bias=bias)
        self.head = nn.Linear(16, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.relu(self.conv(x)).flatten(1)))


def conv_relu_linear(bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ConvReluLinear(bias), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prequantize", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_equals_simulation(dynamo: bool, prequantize: bool, bias: bool) -> None:
    model, x = conv_relu_linear(bias)
    sim = calibrated(model, x)
    proto = exported(
        sim, x, dynamo=dynamo, prequantize_constants=prequantize, export_int32_bias=False
    )
    assert_equal(proto, sim, x)


def set_all(**attributes: Any) -> Callable[[QuantizationSimModel], None]:
    """Sets attributes of all quantizers of activations."""

    def setup(sim: QuantizationSimModel) -> None:
        for module in sim.qmodules():
            for quantizer in (*module.input_quantizers, *module.output_quantizers):
                for name, value in attributes.items() if quantizer is not None else ():
                    setattr(quantizer, name, value)

    return setup


def blocks(sim: QuantizationSimModel) -> None:
    set_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 2)


def lpbq(sim: QuantizationSimModel) -> None:
    set_grouped_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 8, 2, -1)


def lpbq_in_groups(sim: QuantizationSimModel) -> None:
    """Two scales per output channel."""
    for layer in (sim.model.fc, sim.model.head):
        inputs = layer.in_features
        layer.param_quantizers["weight"] = GroupedBlockQuantizeDequantize(
            (layer.out_features, inputs // 4), 4, True, 8, None, (1, 4), (1, inputs // 8)
        )


def per_tensor(sim: QuantizationSimModel) -> None:
    for layer in (sim.model.conv, sim.model.fc, sim.model.head):
        layer.param_quantizers["weight"] = QuantizeDequantize((), 8, True)


def asymmetric_weights(sim: QuantizationSimModel) -> None:
    for layer in (sim.model.conv, sim.model.fc, sim.model.head):
        layer.param_quantizers["weight"].symmetric = False
        layer.param_quantizers["weight"].signed = False


def float8(sim: QuantizationSimModel) -> None:
    sim.model.fc.output_quantizers[0] = FloatQuantizeDequantize(dtype=torch.float8_e4m3fn)
    sim.model.fc.param_quantizers["weight"] = FloatQuantizeDequantize(
        dtype=torch.float8_e5m2, shape=(16, 1)
    )


GRIDS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "w8a8": ({}, None, 20),
    "w4a8": ({"default_param_bw": 4}, None, 21),
    "w8a16": ({"default_output_bw": 16}, None, 21),
    "w16a4": ({"default_param_bw": 16, "default_output_bw": 4}, None, 21),
    "w2a8": ({"default_param_bw": 2}, None, 25),
    "w32a8": ({"default_param_bw": 32}, None, 20),
    "symmetric": ({}, set_all(symmetric=True), 20),
    "symmetric signed": ({}, set_all(symmetric=True, signed=True), 20),
    "weights per tensor": ({}, per_tensor, 10),
    "weights asymmetric": ({}, asymmetric_weights, 20),
    "blocks": ({}, blocks, 21),
    "lpbq": ({}, lpbq, 21),
    "lpbq in groups": ({}, lpbq_in_groups, 21),
    "float8": ({}, float8, 20),
}


@pytest.mark.parametrize("sign", ["unsigned", "signed", None])
@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str, sign: Any) -> None:
    model, x = conv_relu_linear()
    kwargs, setup, opset = GRIDS[name]
    sim = calibrated(model, x, setup=setup, **kwargs)
    options = {"dynamo": False, "opset_version": opset, "export_int32_bias": False}
    for prequantize in (False, True):
        proto = exported(
            sim, x, prequantize_constants=prequantize, force_activation_as=sign, **options
        )
        assert proto.opset_import[0].version == opset
        # Flips are frequent on 16 bits alone.
        assert_equal(proto, sim, x, share=0.25 if name == "w8a16" else 0.02)


def test_int32_bias() -> None:
    """Biases as integers: what comes out is what the simulation computes with biases so rounded."""
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    proto = exported(sim, x, dynamo=False)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    input_scale = {
        "conv": sim.model.conv.input_quantizers[0],
        "fc": sim.model.relu.output_quantizers[0],
        "head": sim.model.fc.output_quantizers[0],
    }
    for name, quantizer in input_scale.items():
        layer = getattr(sim.model, name)
        scale = quantizer.get_scale() * layer.param_quantizers["weight"].get_scale().flatten()
        integers = torch.round(layer.bias.double() / scale.double())
        assert constants[f"{name}.bias_q"].dtype == np.int32
        np.testing.assert_array_equal(constants[f"{name}.bias_q"], integers.detach().numpy())
        np.testing.assert_array_equal(constants[f"{name}.bias_scale"], scale.detach().numpy())
        assert not constants[f"{name}.bias_zero_point"].any()
        with torch.no_grad():
            layer.bias.copy_(integers.float() * scale)
    assert_equal(proto, sim, x)


def test_int32_bias_of_blocks() -> None:
    """The scale of a channel's bias is that of its groups of blocks, or its largest block's."""
    model, x = conv_relu_linear()
    for setup in (blocks, lpbq):
        sim = calibrated(model, x, setup=setup)
        proto = exported(sim, x, dynamo=False, opset_version=21)
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        weight = sim.model.fc.param_quantizers["weight"]
        scale = weight.get_per_channel_scale() if setup is lpbq else weight.get_scale().amax(1)
        expected = sim.model.relu.output_quantizers[0].get_scale() * scale.flatten()
        np.testing.assert_array_equal(constants["fc.bias_scale"], expected.detach().numpy())


def test_lpbq_scale_is_dequantized() -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x, setup=lpbq)
    proto = exported(sim, x, dynamo=False, opset_version=21)
    node = next(n for n in proto.graph.node if n.name == "fc.weight_scale_dq")
    assert list(node.input) == [
        "fc.weight_scale_q",
        "fc.weight_meta_scale",
        "fc.weight_meta_zero_point",
    ]
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    integers = constants["fc.weight_scale_q"]
    assert integers.dtype == np.uint8 and 1 <= integers.min() and integers.max() <= 16


class Functional(nn.Module):
    """Functions, a module that runs twice, an output that is used inside too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu(self.conv(x)) + x
        y += 1.0
        z = F.relu(F.conv2d(y, self.conv.weight, padding=1))
        z = torch.cat([self.relu(z), y], dim=1)
        z = F.max_pool2d(F.pad(z, (1, 1, 1, 1)), 2).permute(0, 2, 3, 1).reshape(-1, 4)
        return self.fc(z) * 0.5, y


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_functional_operations(dynamo: bool, functional: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 6)
    sim = calibrated(Functional(), x, quantize_functional_ops=functional)
    proto = exported(sim, x, dynamo=dynamo, export_int32_bias=False)
    # A flip in front of max-pooling and a Linear of four inputs moves a row of four elements.
    assert_equal(proto, sim, x, share=0.05)


@pytest.mark.parametrize("dynamo", [False, True])
def test_without_quantizers(dynamo: bool) -> None:
    model, x = conv_relu_linear()
    model.eval()
    proto = exported(model, x, dynamo=dynamo)
    assert not {node.op_type for node in proto.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    np.testing.assert_allclose(run(proto, x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_folded_parameters_have_their_grid() -> None:
    model, x = conv_relu_linear()
    for setup in (None, lpbq):
        sim = calibrated(model, x, setup=setup)
        options = {"dynamo": False, "opset_version": 21, "prequantize_constants": True}
        before = exported(sim, x, **options)
        sim.fold_param_quantizers()
        folded = sim.model.conv.weight
        after = exported(sim, x, **options)
        assert sim.model.conv.weight is folded
        assert sim.model.conv.param_quantizers["weight"] is None
        constants = [
            {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
            for proto in (before, after)
        ]
        assert constants[0].keys() == constants[1].keys()
        for name, array in constants[0].items():
            np.testing.assert_array_equal(array, constants[1][name], err_msg=name)


@pytest.mark.parametrize("dynamo", [False, True])
def test_dynamic_batch(dynamo: bool) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    shapes: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}}
    )
    proto = exported(
        sim,
        x,
        dynamo=dynamo,
        input_names=["x"],
        output_names=["y"],
        export_int32_bias=False,
        **shapes,
    )
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert_equal(proto, sim, torch.randn(5, 4, 6, 6))


def test_shared_tensor_with_two_grids() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.a(x), self.b(x), x + 0

    torch.manual_seed(0)
    x = torch.randn(8, 4)
    sim = calibrated(Model(), x, quantize_functional_ops=False)
    sim.model.b.input_quantizers[0] = QuantizeDequantize((), 4, True)
    with torch.no_grad():
        sim.compute_encodings(lambda m: m(x))
    proto = exported(
        sim, x, dynamo=False, opset_version=21, input_names=["x"], export_int32_bias=False
    )
    assert_equal(proto, sim, x)
    names = {i.name for i in proto.graph.initializer}
    assert {"x_scale", "x_1_scale"} <= names


def test_float16_quantizers_are_left_out() -> None:
    model, x = conv_relu_linear()
    kwargs = {"default_data_type": QuantizationDataType.float}
    sim = calibrated(model, x, default_param_bw=16, default_output_bw=16, **kwargs)
    proto = exported(sim, x, dynamo=False)
    assert [n.op_type for n in proto.graph.node] == ["Conv", "Relu", "Flatten", "Gemm", "Gemm"]


def test_idle_quantizers_are_left_out() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[0] < 9 else self.b(x)

    x = torch.randn(8, 4)
    sim = calibrated(Branches(), x)
    assert sim.report.unreached
    assert_equal(exported(sim, x, dynamo=False, export_int32_bias=False), sim, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.attention(x, x, x, need_weights=False)[0])[0]


@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:UserWarning")
def test_attention_and_recurrence() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    sim = calibrated(Attention(), x)
    assert_equal(exported(sim, x, dynamo=False, export_int32_bias=False), sim, x)


def test_hugging_face_encoder() -> None:
    # torch's older exporter does not take the model itself, with or without quantizers.
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        return_dict=False,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    tokens = torch.arange(12).reshape(2, 6)
    sim = calibrated(model, tokens)
    proto = exported(sim, tokens, dynamo=True, export_int32_bias=False)
    assert sum(n.op_type == "DequantizeLinear" for n in proto.graph.node) > 40
    # Normalizations divide by small deviations: flips of one step grow to a few.
    assert_equal(proto, sim, tokens, steps=3.0)


def test_torchvision_model() -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(width_mult=0.1, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    fold_all_batch_norms(model, x.shape, x)
    sim = calibrated(model, x)
    proto = exported(sim, x, dynamo=False, export_int32_bias=False)
    assert_equal(proto, sim, x, steps=3.0)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"opset_version": 26}, ValueError, "expected 7 to 25, got 26"),
    ({"opset_version": "21"}, ValueError, "expected 7 to 25, got '21'"),
    ({"opset_version": 9}, RuntimeError, "channels from opset 13"),
    ({"opset_version": 12}, RuntimeError, "channels from opset 13"),
    ({"force_activation_as": "int"}, ValueError, "'unsigned', 'signed' or None, got 'int'"),
    ({"export_params": False}, NotImplementedError, "export_params"),
    ({"keep_initializers_as_inputs": True}, NotImplementedError, "keep_initializers_as_inputs"),
    ({"do_constant_folding": False}, NotImplementedError, "do_constant_folding"),
    ({"verify": True}, ValueError, "verify: expected False"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS)
def test_bad_arguments(
    kwargs: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    with pytest.raises(error, match=message):
        rimet.onnx.export(sim, x, tmp_path / "model.onnx", dynamo=False, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_bad_models(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    path = tmp_path / "model.onnx"
    with pytest.raises(RuntimeError, match="expected a torch.nn.Module"):
        rimet.onnx.export(lambda x: x, x, path)  # type: ignore[arg-type]
    sim = QuantizationSimModel(model, x)
    with pytest.raises(RuntimeError, match="conv.input_quantizers.0: is not calibrated"):
        rimet.onnx.export(sim, x, path)
    sim = calibrated(model, x, default_param_bw=3)
    with pytest.raises(RuntimeError, match="conv.param_quantizers.weight: expected 2, 4, 8, 16"):
        rimet.onnx.export(sim, x, path)
    sim = calibrated(model, x, setup=blocks)
    with pytest.raises(RuntimeError, match="blocks from opset 21 on, got opset_version 20"):
        rimet.onnx.export(sim, x, path)
    sim = calibrated(model, x, default_output_bw=32)
    with pytest.raises(RuntimeError, match="no 32-bit integers"):
        rimet.onnx.export(sim, x, path, dynamo=False)
    sim = calibrated(model, x)
    sim.model.conv.param_quantizers["weight"] = QuantizeDequantize((), -127, 127, True)
    sim.model.fc.output_quantizers[0] = QuantizeDequantize((), 0, 10, False)
    sim.compute_encodings(lambda m: m(x))
    with pytest.raises(
        RuntimeError, match=r"(?s)conv.param_quantizers.weight: .*-127.*fc.output_.*\[0, 10\]"
    ):
        rimet.onnx.export(sim, x, path)
    sim = calibrated(model, x)
    sim.model.fc.param_quantizers["weight"] = QuantizeDequantize((), 32, False)
    sim.compute_encodings(lambda m: m(x))
    with pytest.raises(RuntimeError, match="fc.weight.*no unsigned integers of 32 bits"):
        rimet.onnx.export(sim, x, path, dynamo=False)
    sim = calibrated(model, x)
    sim.model.fc.param_quantizers["weight"] = Quantize((), 8, True)
    with pytest.raises(RuntimeError, match="weight: expected a QuantizeDequantize, got a Quantize"):
        rimet.onnx.export(sim, x, path)
    half = calibrated(model, x).model.half()
    with pytest.raises(RuntimeError, match="expected float32 parameters, got torch.float16"):
        rimet.onnx.export(half, x.half(), path)
    assert list(tmp_path.iterdir()) == []


def test_model_is_unchanged_by_an_error(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    before = sim.model(x)
    sim.model.train()
    attributes = {path: set(q.__dict__) for path, q in sim.named_quantizers()}
    with pytest.raises(RuntimeError):
        rimet.onnx.export(sim, torch.randn(1, 1), tmp_path / "model.onnx", dynamo=False)
    assert {path: set(q.__dict__) for path, q in sim.named_quantizers()} == attributes
    assert sim.model.training and torch.equal(sim.model(x), before)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    model, x = conv_relu_linear()
    with pytest.raises(ImportError, match=r"onnxscript.*pip install 'rimet\[onnx\]'"):
        rimet.onnx.export(model, x, "model.onnx")


def test_external_data(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    rimet.onnx.export(sim, x, tmp_path / "new" / "m.onnx", dynamo=False, external_data=True)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["m.onnx", "m.onnx.data"]
    whole = onnx.load(tmp_path / "new" / "m.onnx")
    inside = exported(sim, x, dynamo=False)
    assert [i.name for i in whole.graph.initializer] == [i.name for i in inside.graph.initializer]
    np.testing.assert_array_equal(run(whole, x)[0], run(inside, x)[0])


@pytest.mark.parametrize(("name", "opset"), [("lpbq", 21), ("w2a8", 25), ("w8a8", 13)])
def test_opsets_of_the_newer_exporter(name: str, opset: int) -> None:
    model, x = conv_relu_linear()
    kwargs, setup, _ = GRIDS[name]
    sim = calibrated(model, x, setup=setup, **kwargs)
    proto = exported(sim, x, dynamo=True, opset_version=opset, export_int32_bias=False)
    # torch implements its operators for opset 18 and may not get below it.
    assert proto.opset_import[0].version == (opset if opset >= 18 else 18)
    assert_equal(proto, sim, x)


class SameTensorTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"a": y, "b": y, "c": y.t(), "d": x}


@pytest.mark.parametrize("dynamo", [False, True])
def test_tensor_that_is_several_outputs(dynamo: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    sim = calibrated(SameTensorTwice(), x)
    proto = exported(sim, x, dynamo=dynamo, export_int32_bias=False)
    assert_equal(proto, sim, x)


def test_names_of_outputs_come_from_the_model() -> None:
    """As torch's newer exporter names them without quantizers."""
    model, x = conv_relu_linear()
    names = [
        [output.name for output in exported(m, x).graph.output]
        for m in (model.eval(), calibrated(model, x))
    ]
    assert names[0] == names[1]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


@pytest.mark.parametrize("dynamo", [False, True])
def test_example_inputs_as_of_the_simulation(dynamo: bool) -> None:
    """``args`` may be what the simulation was made with."""
    torch.manual_seed(0)
    x, scale = torch.randn(8, 4), torch.rand(8, 1)
    options: dict[str, Any] = {"verbose": False} if dynamo else {}
    for inputs in ([x, scale], (x, scale), {"x": x, "scale": scale}, (x, {"scale": scale})):
        sim = QuantizationSimModel(Scaled().eval(), inputs)
        sim.compute_encodings(lambda m: m(x, scale))
        file = io.BytesIO()
        rimet.onnx.export(sim, inputs, file, dynamo=dynamo, export_int32_bias=False, **options)
        assert_equal(onnx.load_model_from_string(file.getvalue()), sim, x, scale)


class OfBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(batch["x"]) * batch["scale"]


@pytest.mark.parametrize("dynamo", [False, True])
def test_dict_as_positional_input(dynamo: bool) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4), "scale": torch.rand(8, 1)}
    sim = QuantizationSimModel(OfBatches().eval(), batch)
    sim.compute_encodings(lambda m: m(batch))
    options: dict[str, Any] = {"verbose": False} if dynamo else {}
    for inputs in (batch, (batch,), (batch, {})):
        file = io.BytesIO()
        rimet.onnx.export(sim, inputs, file, dynamo=dynamo, export_int32_bias=False, **options)
        (got,) = run(onnx.load_model_from_string(file.getvalue()), *batch.values())
        np.testing.assert_array_equal(got, sim.model(batch).detach().numpy())


class Padded(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.relu()
        return F.pad(x, (1, 1), value=0.0) * 1, F.pad(x, (1, 1), value=-3.0) * 1


@pytest.mark.parametrize("opset", [10, 20])
def test_padding_with_a_value_off_the_grid(opset: int) -> None:
    """Only padding with a value of the grid leaves a tensor on it."""
    x = torch.randn(4, 6)
    sim = calibrated(Padded(), x)
    for op in sim.model.functional.children():
        if op.function != "relu":
            op.output_quantizers[0] = None
    proto = exported(sim, x, dynamo=False, opset_version=opset, export_int32_bias=False)
    assert_equal(proto, sim, x)
    outputs = {n.output[0]: n for n in proto.graph.node}
    pads = [n for n in proto.graph.node if n.op_type == "Pad"]
    derived = [
        any(n.op_type == "QuantizeLinear" and n.input[0] == pad.output[0] for n in outputs.values())
        for pad in pads
    ]
    assert derived == [True, False]
