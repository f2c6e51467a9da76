"""``sim.export`` and ``sim.onnx``: floating-point graphs with encodings files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rimet.onnx
import torch
from rimet.common import quantsim
from rimet.common.defs import QuantizationDataType
from rimet.onnx_utils import OnnxExportApiArgs
from rimet.quantization.affine import QuantizeDequantize
from rimet.quantsim import QuantizationSimModel, QuantizationSimModelOnnxExporter
from torch import Tensor, nn

from export.onnx_runs import calibrated, run
from export.test_onnx_qdq import conv_relu_linear, lpbq, pytestmark  # noqa: F401


class Blocks(nn.Module):
    """Modules of several operators, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.norm = nn.GroupNorm(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[0](self.seq(x)))


def blocks() -> tuple[QuantizationSimModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    return calibrated(Blocks(), x), x


def names(section: Any) -> set[str]:
    return set(section) if isinstance(section, dict) else {entry["name"] for entry in section}


def test_files_of_export(tmp_path: Path) -> None:
    sim, x = blocks()
    arguments = {"input_names": ["x"], "output_names": ["y"]}
    sim.export(str(tmp_path / "new"), "m", x, onnx_export_args=arguments)
    assert arguments == {"input_names": ["x"], "output_names": ["y"]}
    files = {"m.pth", "m.onnx", "m.encodings", "m_torch.encodings"}
    assert {p.name for p in (tmp_path / "new").iterdir()} == files
    proto = onnx.load(tmp_path / "new" / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    nodes = [n.name for n in proto.graph.node if n.op_type in ("MatMul", "Add", "Relu")]
    assert nodes == ["seq.0", "seq.0#1.end", "seq.1", "layers.0", "layers.0#1.end", "norm#4.end"]
    document = json.loads((tmp_path / "new" / "m.encodings").read_text())
    assert names(document["activation_encodings"]) == {
        "x",
        "/seq/seq.1/Relu_output_0",
        "/layers/0#1.end/Add_output_0",
        "y",
    }
    assert names(document["param_encodings"]) == {"seq.0.weight", "layers.0.weight", "norm.weight"}
    original = torch.load(tmp_path / "new" / "m.pth", weights_only=False)
    np.testing.assert_allclose(run(proto, x)[0], original(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    weight = next(i for i in proto.graph.initializer if i.name == "seq.0.weight")
    quantized = sim.model.seq[0].param_quantizers["weight"](sim.model.seq[0].weight)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight).T, quantized.detach().numpy())


def test_same_bytes_each_time(tmp_path: Path) -> None:
    sim, x = blocks()
    written = []
    for _ in range(2):
        sim.export(str(tmp_path), "m", x)
        written.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert written[0] == written[1]


def test_failure_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are there stay as they are, and nothing is left beside them."""
    sim, x = blocks()
    before = {"m.onnx": "old model", "m.encodings": "old encodings", "m.onnx.data": "old data"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)

    def fail(model: Any, path: Path, external_data: str | None) -> None:
        path.write_text("half a")
        if external_data is not None:
            (path.parent / external_data).write_text("file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", fail)
    for external in (False, True):
        with pytest.raises(OSError, match="No space left"):
            sim.onnx.export(x, tmp_path / "m.onnx", dynamo=False, external_data=external)
        with pytest.raises(OSError, match="No space left"):
            rimet.onnx.export(sim, x, tmp_path / "m.onnx", dynamo=False, external_data=external)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_parameters_as_they_are(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    arguments = OnnxExportApiArgs(opset_version=16, input_names=["x"])
    sim.export(str(tmp_path), "m", x, onnx_export_args=arguments, apply_param_qdq=False)
    proto = onnx.load(tmp_path / "m.onnx")
    assert proto.opset_import[0].version == 16 and proto.graph.input[0].name == "x"
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(constants[name], parameter.detach().numpy())


def test_encodings_alone(tmp_path: Path) -> None:
    sim, x = blocks()
    sim.export(str(tmp_path), "m", x, export_model=False, filename_prefix_encodings="e")
    assert {p.name for p in tmp_path.iterdir()} == {"e.encodings", "e_torch.encodings"}


def test_propagated_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantsim, "encoding_version", "0.6.1")
    sim, x = blocks()
    sim.export(str(tmp_path), "m", x, propagate_encodings=True)
    found = json.loads((tmp_path / "m.encodings").read_text())["activation_encodings"]
    inner = {name for name, entry in found.items() if entry == [{"bitwidth": 8, "dtype": "int"}]}
    # Tensors between the operators of modules whose output is quantized; the first Linear's is not.
    assert inner == {
        "/layers.0/MatMul_output_0",
        "/norm/Reshape_output_0",
        "/norm/InstanceNormalization_output_0",
        "/norm/Reshape_1_output_0",
        "/norm/Mul_output_0",
    }


def test_float16_entries(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    is_float = QuantizationDataType.float
    sim = calibrated(
        model, x, default_param_bw=16, default_output_bw=16, default_data_type=is_float
    )
    sim.export(str(tmp_path), "m", x, onnx_export_args={"input_names": ["x"]})
    document = json.loads((tmp_path / "m.encodings").read_text())
    entry = {"name": "x", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}
    assert entry in document["activation_encodings"]
    sim.onnx.export(x, tmp_path / "n.onnx", dynamo=False)
    assert json.loads((tmp_path / "n.encodings").read_text())["activation_encodings"] == []


def test_sim_onnx(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x, setup=lpbq)
    exporter = sim.onnx
    assert isinstance(exporter, QuantizationSimModelOnnxExporter) and exporter.sim is sim
    for version, bias in (("1.0.0", None), ("1.0.0", True), ("2.0.0", None), ("2.1.0", False)):
        path = tmp_path / "m.onnx"
        exporter.export(x, path, encoding_version=version, export_int32_bias=bias, dynamo=False)
        document = json.loads(path.with_suffix(".encodings").read_text())
        assert document["version"] == version
        found = names(document.get("encodings") or document["param_encodings"])
        assert {"conv.weight", "fc.weight", "head.weight"} <= found
        with_bias = bias or bias is None and version == "2.0.0"
        assert ("fc.bias" in found) == bool(with_bias)
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node] == ["Conv", "Relu", "Flatten", "Gemm", "Gemm"]


@pytest.mark.parametrize("sign", ["unsigned", "signed", None])
def test_sign_of_activations(sign: Any, tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    path = tmp_path / "m.onnx"
    options: dict[str, Any] = {"encoding_version": "2.0.0", "dynamo": False, "input_names": ["x"]}
    sim.onnx.export(x, path, force_activation_as=sign, **options)
    entries = json.loads(path.with_suffix(".encodings").read_text())["encodings"]
    entry = next(e for e in entries if e["name"] == "x")
    zero_point = -int(sim.model.conv.input_quantizers[0].get_offset())
    signed = sign == "signed"
    assert entry["output_dtype"] == ("int8" if signed else "uint8")
    assert entry["y_zero_point"] == zero_point - (128 if signed else 0)


def test_tensor_quantized_for_some_uses(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    x = torch.randn(8, 4)
    sim = calibrated(Model(), x)
    sim.model.b.input_quantizers[0] = QuantizeDequantize((), 4, True)
    sim.compute_encodings(lambda m: m(x))
    sim.onnx.export(x, tmp_path / "m.onnx", dynamo=False, input_names=["x"])
    document = json.loads((tmp_path / "m.encodings").read_text())
    bitwidths = {e["name"]: e["bw"] for e in document["activation_encodings"]}
    assert bitwidths["x"] == 8 and bitwidths["x_dup_0"] == 4
    copy = next(n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Identity")
    assert (copy.input[0], copy.output[0]) == ("x", "x_dup_0")


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


def test_keyword_inputs(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(8, 4), "scale": torch.randn(8, 1)}
    sim = QuantizationSimModel(TwoArguments().eval(), inputs)
    sim.compute_encodings(lambda m: m(**inputs))
    sim.export(str(tmp_path), "m", inputs, onnx_export_args={"input_names": ["x", "scale"]})
    assert [i.name for i in onnx.load(tmp_path / "m.onnx").graph.input] == ["x", "scale"]


def test_class_methods(tmp_path: Path) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    with torch.no_grad():
        other = {name: p + 1 for name, p in model.named_parameters()}
        model.load_state_dict(other)
    QuantizationSimModel.export_onnx_model_and_encodings(
        str(tmp_path), "m", model, sim.model, x, None, False
    )
    constants = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    np.testing.assert_array_equal(constants["fc.weight"], other["fc.weight"].numpy())
    QuantizationSimModel.export_torch_script_model_and_encodings(
        str(tmp_path), "s", "s", model, sim.model, x
    )
    files = {p.name for p in tmp_path.iterdir()}
    assert {"m.onnx", "m.encodings", "m_torch.encodings", "s.torchscript.pth"} <= files
    script = torch.jit.load(tmp_path / "s.torchscript.pth")
    assert torch.equal(script(x), sim.model(x))


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = conv_relu_linear()
    sim = calibrated(model, x)
    with pytest.raises(ValueError, match="encoding_version: expected one of 0.6.1"):
        sim.onnx.export(x, tmp_path / "m.onnx", encoding_version="3.0.0")
    for file in (tmp_path / "m.encodings", io.BytesIO()):
        with pytest.raises((ValueError, TypeError), match="its encodings|not BytesIO"):
            sim.onnx.export(x, file, dynamo=False)  # type: ignore[arg-type]
    assert file.getvalue() == b""
    with pytest.raises(RuntimeError, match="expected OnnxExportApiArgs or a dict, got int"):
        sim.export(str(tmp_path), "m", x, onnx_export_args=3)
    with pytest.raises(RuntimeError, match="not calibrated"):
        QuantizationSimModel(model, x).export(str(tmp_path), "m", x)
    monkeypatch.setattr(quantsim, "encoding_version", "2.0.0")
    with pytest.raises(RuntimeError, match="0.6.1 and 1.0.0, got 2.0.0; sim.onnx.export"):
        sim.export(str(tmp_path), "m", x)
    assert list(tmp_path.iterdir()) == []
