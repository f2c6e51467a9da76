"""The recorded graph: reused modules, functional and in-place operations, views, nesting, linear
cost.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rimet import _core
from rimet._graph import Recording, Twin, bind_inputs, class_key, record
from rimet.common.connected_graph.connectedgraph import get_ordered_ops
from rimet.common.connected_graph.connectedgraph_utils import (
    CG_SPLIT,
    export_connected_graph,
    get_all_input_ops,
    get_all_ops_with_constant_inputs,
    get_all_output_ops,
)
from rimet.meta.connectedgraph import ConnectedGraph
from rimet.meta.connectedgraph_utils import (
    create_connected_graph_with_input_shapes,
    get_module_act_func_pair,
    get_ops_with_missing_modules,
)
from rimet.nn.modules import custom
from rimet.quantsim import QuantizationSimModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "quantsim"))

from models import build


def show(recording: Recording) -> list[str]:
    """One line per node: ``name#call(inputs)->outputs``, tensors by number."""
    return [
        "{}#{}({})->{}".format(
            node["module"] if node["module"] is not None else node["function"],
            node["call"],
            ",".join(str(t) for _, t, _ in node["inputs"] if t is not None),
            ",".join(map(str, node["outputs"])),
        )
        for node in recording.graph.nodes()
    ]


class Wrap(nn.Module):
    """A model whose forward is a function."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def test_reused_module_and_function_calls_are_numbered() -> None:
    model = Wrap(lambda m, x: F.relu(m.act(F.relu(m.act(x)))), act=nn.Tanh())
    assert show(record(model, (torch.randn(2),))) == [
        "act#0(0)->1",
        "relu#0(1)->2",
        "act#1(2)->3",
        "relu#1(3)->4",
    ]


def test_in_place_operations_make_new_values() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1)
        y += x
        F.relu(y, inplace=True)
        torch.mul(y, y, out=y)
        return m.act(y)

    recording = record(Wrap(forward, act=nn.ReLU(inplace=True)), (torch.randn(3),))
    assert show(recording) == [
        "mul#0(0)->1",
        "add#0(1)->2",
        "add#1(2,0)->3",
        "relu#0(3)->4",
        "mul#1(4,4,4)->5",
        "act#0(5)->6",
    ]
    assert [node["in_place"] for node in recording.graph.nodes()] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert recording.graph.tensors()[6]["output"] == 0


def test_a_write_through_a_view_reaches_the_whole() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        row = y[0]
        row.mul_(3)
        y[:, 1] = 0.0
        return y.sum()

    recording = record(Wrap(forward), (torch.randn(2, 2),))
    lines = show(recording)
    assert lines[0] == "add#0(0)->1" and lines[1] == "slice#0(1)->2"
    # `row` (2) is written: it gets value 3, and `y` (1), which shares its memory, value 4.
    assert lines[2] == "mul#0(2)->3,4"
    assert lines[3].startswith("index_put#0(4)->5")
    assert lines[4].startswith("sum#0(5)->")


def test_attributes_and_numbers_are_no_nodes() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        n = x.size(0) + x.shape[1] + x.dim() + len(x)
        if x.is_floating_point() and x.sum().item() > -1e9:
            x = x.to(x.dtype).reshape(n - 6, -1)
        return x.mT

    assert show(record(Wrap(forward), (torch.zeros(2, 3),))) == [
        "sum#0(0)->1",
        "item#0(1)->",
        "to#0(0)->2",
        "reshape#0(2)->3",
        "mT#0(3)->4",
    ]


@torch.jit.script
def gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * y + 1


def test_a_scripted_function_is_one_node() -> None:
    call = torch.jit.ScriptFunction.__call__

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(gate(torch.relu(x), y=x))

    recording = record(Wrap(forward), (torch.randn(2, 3),))
    assert show(recording) == [
        "relu#0(0)->1",
        "torch.jit.script(gate)#0(1,0)->2",
        "exp#0(2)->3",
    ]
    assert recording.unwatched == []
    assert torch.jit.ScriptFunction.__call__ is call


ONE = torch.ones(1)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        float,
        int,
        bool,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: 1.0 in x,
        lambda x: torch.equal(x, ONE),
    ],
)
def test_values_that_python_reads_have_a_consumer(read: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        read(y)
        return x + 1

    recording = record(Wrap(forward), (torch.ones(1),))
    names = [node["function"] for node in recording.graph.nodes()]
    assert names == ["relu", "item", "add"]
    assert recording.graph.tensors()[1]["consumers"] == [1]
    graph = ConnectedGraph(Wrap(forward), torch.ones(1))
    assert [op.type for op in graph.ordered_ops] == ["relu", "Add"]


@dataclasses.dataclass
class Output:
    value: torch.Tensor
    more: dict[str, Any]


def test_nested_inputs_and_outputs() -> None:
    def forward(m: Any, pair: Any, *, extra: Any) -> Output:
        a, (b, c) = pair
        out, (h, cell) = m.lstm(torch.stack([a, b]))
        return Output(out, {"h": [h, cell], "c": c, "e": extra["k"] * 2, "n": None})

    model = Wrap(forward, lstm=nn.LSTM(3, 2))
    a, b, c, k = (torch.randn(4, 3) for _ in range(4))
    recording = record(model, ((a, [b, c]),), {"extra": {"k": k}})
    assert (recording.num_inputs, recording.num_outputs) == (4, 5)
    assert show(recording) == ["stack#0(0,1)->4", "lstm#0(4)->5,6,7", "mul#0(3)->8"]
    outputs = {
        t["output"]: i for i, t in enumerate(recording.graph.tensors()) if t["output"] is not None
    }
    assert outputs == {0: 5, 1: 6, 2: 7, 3: 2, 4: 8}


def test_parameters_buffers_and_constants_are_told_apart() -> None:
    constant = torch.ones(2)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, m.w, m.b) + constant + torch.zeros(2)

    model = Wrap(forward)
    model.w = nn.Parameter(torch.randn(2, 2))
    model.register_buffer("b", torch.randn(2))
    recording = record(model, (torch.randn(1, 2),))
    kinds = [(t["kind"], t["name"]) for t in recording.graph.tensors()]
    assert kinds[:4] == [
        ("input", None),
        ("parameter", "w"),
        ("parameter", "b"),
        ("activation", None),
    ]
    assert ("constant", None) in kinds and len(recording.unwatched) == 1
    assert [n["function"] for n in recording.graph.nodes()] == ["linear", "add", "zeros", "add"]


def test_executed_path_and_scopes() -> None:
    inner = Wrap(lambda m, x: x.exp() if x.sum() > 0 else x.sin())
    model = Wrap(lambda m, x: m.inner(x) + m.inner(-x), inner=inner)
    nodes = record(model, (torch.ones(2),)).graph.nodes()
    computed = [
        (n["scope"], n["function"]) for n in nodes if n["function"] in ("exp", "sin", "add", "neg")
    ]
    assert computed == [("inner", "exp"), ("", "neg"), ("inner", "sin"), ("", "add")]


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        assert not m.training and not torch.is_grad_enabled()
        if x.numel() > 2:
            raise KeyError("boom")
        return m.drop(m.fc(x))

    model = Wrap(forward, fc=nn.Linear(2, 2), drop=nn.Dropout()).train()
    model.fc.eval()
    state = torch.random.get_rng_state()
    record(model, (torch.randn(1, 2, generator=torch.Generator().manual_seed(0)),))
    with pytest.raises(KeyError):
        record(model, (torch.zeros(2, 2),))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.drop.training and not model.fc.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_leaves_and_class_keys() -> None:
    attention = nn.MultiheadAttention(4, 2)
    model = Wrap(lambda m, x: m.mha(x, x, x)[0], mha=attention)
    whole = record(
        model,
        (torch.randn(3, 1, 4),),
        twin_of=lambda p, m: Twin(3, 1, False) if p == "mha" else None,
    )
    assert show(whole)[0].startswith("mha#0(0,0,0)->")
    parts = record(model, (torch.randn(3, 1, 4),))
    assert parts.graph.nodes()[0]["function"] == "multi_head_attention_forward"
    assert class_key(nn.Conv2d) == "nn.Conv2d"
    assert class_key(custom.Add) == "custom.Add"
    assert class_key(Wrap).endswith(".Wrap") and not class_key(Wrap).startswith("nn.")


def test_inputs_bind_like_a_call() -> None:
    class Model(nn.Module):
        def forward(self, x: Any, y: Any = None, *, z: Any = None) -> None: ...

    t = torch.zeros(1)
    assert bind_inputs(Model(), t) == ((t,), {})
    assert bind_inputs(Model(), [t, t]) == ((t, t), {})
    assert bind_inputs(Model(), {"x": t, "z": t}) == ((), {"x": t, "z": t})
    assert bind_inputs(Model(), {"a": t}) == (({"a": t},), {})
    assert bind_inputs(Model(), (t, {"z": t})) == ((t,), {"z": t})
    assert bind_inputs(Model(), (t, {"x": t})) == ((t, {"x": t}), {})
    with pytest.raises(RuntimeError, match="without any tensor"):
        bind_inputs(Model(), (1, "a"))

    class TakesMore(Model):
        """As models of transformers: some of the keywords are named."""

        def forward(self, x: Any, y: Any = None, **kwargs: Any) -> None: ...

    class TakesAll(Model):
        """As a wrapper that hands everything on."""

        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    assert bind_inputs(TakesMore(), {"x": t, "flag": True}) == ((), {"x": t, "flag": True})
    assert bind_inputs(TakesMore(), (t, {"y": t, "flag": 1})) == ((t,), {"y": t, "flag": 1})
    assert bind_inputs(TakesMore(), {"a": t}) == (({"a": t},), {})
    assert bind_inputs(TakesAll(), {"a": t}) == ((), {"a": t})
    assert bind_inputs(TakesAll(), (t, {"a": t})) == ((t, {"a": t}), {})
    assert bind_inputs(TakesAll(), {0: t}) == (({0: t},), {})


def test_cost_is_linear_in_the_number_of_nodes() -> None:
    def model(blocks: int) -> nn.Module:
        layers = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(blocks)]

        def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                x = layer(x) + x * 0.5
            return x

        return Wrap(forward, layers=nn.ModuleList(layers))

    def seconds(blocks: int) -> float:
        module, x = model(blocks), torch.randn(1, 2)
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            recording = record(
                module,
                (x,),
                twin_of=lambda p, m: (
                    Twin(1, 1, False)
                    if not p.endswith("s") and next(m.children(), None) is None
                    else None
                ),
            )
            best = min(best, time.perf_counter() - start)
        assert len(recording.graph) == 4 * blocks
        return best

    # 2,500 blocks are 10,000 nodes. A quadratic step would cost ten times more per node.
    assert seconds(2500) < 3 * 10 * seconds(250)


# AIMET's view


def test_connected_graph_of_a_residual_model() -> None:
    model, inputs = build("resnet_functional", custom)
    graph = ConnectedGraph(model, inputs)
    conv = graph.get_op_from_module_name("ResNet.conv1")
    assert conv is graph.get_op_from_module_name("conv1") and conv is not None
    assert (conv.type, conv.name, conv.dotted_name, conv.groups) == (
        "Conv",
        "Conv_0",
        "ResNet.conv1",
        1,
    )
    assert (conv.num_in_channels, conv.num_out_channels) == (3, 8)
    assert conv.get_module() is model.conv1
    assert [op.type for op in conv.output_ops] == ["BatchNormalization"]
    assert [p.name for p in conv.inputs] == ["input_0_to_Conv_0", "ResNet.conv1.weight"]
    assert (
        conv.inputs[0].is_model_input
        and conv.inputs[1].is_parm
        and not conv.inputs[0].is_quantized()
    )
    pool = graph.get_op_from_module_name("maxpool")
    assert pool is not None
    (split,) = pool.output_ops
    assert split.type == CG_SPLIT and [op.type for op in split.output_ops] == ["Conv", "Add"]
    assert get_all_input_ops(graph) == [conv]
    assert [op.dotted_name for op in get_all_output_ops(graph)] == ["ResNet.fc"]
    assert (
        graph.input_structure[0].op is conv and graph.output_structure.op.dotted_name == "ResNet.fc"
    )
    assert all(op.type != CG_SPLIT for op in graph.ordered_ops)
    ordered = get_ordered_ops([conv])
    position = {op: i for i, op in enumerate(ordered)}
    assert len(ordered) == len(graph.get_all_ops())
    assert all(position[a] < position[b] for a in ordered for b in a.output_ops)
    assert ConnectedGraph.get_op_type(nn.Linear) == "Gemm"
    assert graph.is_safe() and graph.get_product("Conv_0_to_BatchNormalization_1") is not None


def test_questions_to_the_graph(tmp_path: Path) -> None:
    model, inputs = build("shuffle", custom)
    assert [op.type for op in get_ops_with_missing_modules(model, inputs)] == ["Concat"]
    pairs = get_module_act_func_pair(model, inputs)
    assert pairs[model.branch[1]] is model.branch[2] and pairs[model.stem] is None
    graph = create_connected_graph_with_input_shapes(model, (2, 3, 6, 6))
    assert {op.type for op in get_all_ops_with_constant_inputs(graph)} == {
        "chunk",
        "view",
        "transpose",
    }
    export_connected_graph(graph, str(tmp_path), "graph")
    content = json.loads((tmp_path / "graph.json").read_text())
    assert {
        "name": "Shuffle.stem",
        "type": "Conv",
        "inputs": [],
        "outputs": ["chunk_1"],
        "is_functional": False,
    } in content["ops"]


def test_graph_of_a_simulation_survives_copies() -> None:
    model, inputs = build("conv_bn_relu", custom)
    sim = QuantizationSimModel(model, inputs[0])
    names = list(sim.connected_graph.get_all_ops())
    assert sim.connected_graph.get_op_from_module_name("conv1").get_module() is sim.model.conv1
    for other in (copy.deepcopy(sim), pickle.loads(pickle.dumps(sim))):
        assert list(other.connected_graph.get_all_ops()) == names
        assert (
            other.connected_graph.get_op_from_module_name("conv1").get_module() is other.model.conv1
        )


def test_no_hook_is_left_behind() -> None:
    from torch.nn.modules import module as torch_module

    scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), scripted)
    record(model, (torch.randn(1, 2),))
    assert not torch_module._has_any_global_hook()
    assert not torch_module._global_forward_hooks_with_kwargs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.children())


@pytest.mark.parametrize("builder_cls", [_core.GraphBuilder, _core.ProgramBuilder])
def test_a_recording_may_end_in_another_thread(
    builder_cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its garbage is collected there: a class bound to its thread would raise, out of reach."""
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    builders = [builder_cls()]
    thread = threading.Thread(target=builders.clear)
    thread.start()
    thread.join()
    assert not builders and not raised
