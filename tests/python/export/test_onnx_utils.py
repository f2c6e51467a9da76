"""Names of nodes and tensors: ``rimet.onnx_utils``."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from rimet import onnx_utils
from rimet.onnx_utils import CustomMarker, OnnxSaver
from rimet.quantsim import QuantizationSimModel
from torch import nn

from export.onnx_runs import run
from export.test_onnx_qdq import pytestmark  # noqa: F401
from export.test_sim_export import Blocks, blocks


def test_named_nodes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Blocks().eval(), torch.randn(2, 5, 8)
    path = tmp_path / "m.onnx"
    OnnxSaver.set_node_names(path, model, x, onnx_export_args={"input_names": ["x"]})
    proto = OnnxSaver.load_simply_onnx_model(path)
    np.testing.assert_allclose(run(proto, x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    nodes, constants = OnnxSaver.get_onnx_node_to_io_tensor_names_map(proto)
    assert {"seq.0.weight", "seq.0.bias", "layers.0.weight"} <= constants
    assert nodes["seq.0"].inputs == ["x", "seq.0.weight"]
    assert nodes["seq.0#1.end"].outputs == ["/seq/0#1.end/Add_output_0"]
    assert onnx_utils.get_layers_in_io_tensor_map(nodes)["seq.0"] == ["seq.0#1.end"]
    assert onnx_utils.get_tensor_to_consumer_map(nodes)["x"] == "seq.0"
    for layer, last, count in (("seq.0", "seq.0#1.end", 2), ("seq.1", "seq.1", 1)):
        found = QuantizationSimModel.find_op_names_for_layer(layer, nodes, None, None)
        assert found[0] == [last] and len(found[1]) == count
    assert QuantizationSimModel.find_op_names_for_layer("seq", nodes, None, None) == ([], [])
    with caplog.at_level(logging.WARNING):
        OnnxSaver.check_onnx_node_names(proto, model)
    assert not caplog.records
    model.add_module("idle", nn.ReLU())
    OnnxSaver.check_onnx_node_names(proto, model)
    assert caplog.records[0].getMessage() == "no node is called after: idle"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/conv/Conv", "conv"),
        ("/layer1/layer1.0/conv1/Conv_output_0", "layer1.0.conv1"),
        ("/l.0/MatMul", "l.0"),
        ("/a/b/c", "a.b"),
        ("conv#1.end", ""),
    ],
)
def test_paths_of_names(name: str, path: str) -> None:
    """As AIMET 2.42 answers."""
    assert onnx_utils.get_pytorch_name_from_onnx_name(name) == path


def test_restored_initializers(tmp_path: Path) -> None:
    weight = helper.make_tensor("a.bias", TensorProto.FLOAT, [2], [1.0, 2.0])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    nodes = [
        helper.make_node("Identity", ["a.bias"], ["b.bias"]),
        helper.make_node("Add", ["x", "a.bias"], ["s"]),
        helper.make_node("Add", ["s", "b.bias"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    onnx_utils.save_initializer_restored_onnx_graph(tmp_path / "m.onnx", tmp_path / "r.onnx")
    restored = onnx.load(tmp_path / "r.onnx")
    assert [t.name for t in restored.graph.initializer] == ["a.bias", "b.bias"]
    assert [n.op_type for n in restored.graph.node] == ["Add", "Add"]
    onnx.checker.check_model(restored)
    values = torch.tensor([3.0, 4.0])
    np.testing.assert_array_equal(run(restored, values)[0], run(model, values)[0])
    assert len(model.graph.node) == 3


def test_operators_of_modules() -> None:
    """Some rows of AIMET's table."""
    types = onnx_utils.map_torch_types_to_onnx
    assert types[nn.Linear] == ["Gemm", "MatMul"]
    assert types[nn.PixelShuffle] == ["DepthToSpace"]
    assert types[nn.ReLU6] == ["Clip"]


def test_markers() -> None:
    sim, x = blocks()
    assert sim.run_modules_for_traced_custom_marker([sim.model.seq[0]], x) is None
    marker = sim._module_marker_map["seq.0"]
    original = QuantizationSimModel.get_original_model(sim.model)
    torch.testing.assert_close(marker(x), original.seq[0](x))
    with pytest.raises(RuntimeError, match="Linear did not run"):
        sim.run_modules_for_traced_custom_marker([nn.Linear(1, 1)], x)
    named = CustomMarker(nn.Sequential(nn.ReLU()), "relu", False)
    assert isinstance(named[0], nn.ReLU) and torch.equal(named(x), x.relu())
