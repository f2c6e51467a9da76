"""The executor of layer-wise techniques, against the models themselves."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet._graph import streaming
from rimet._graph.live import DEFAULT_MEMORY_SHARE, free_memory
from rimet._graph.program import bits_equal
from rimet._graph.streaming import StreamingWalk
from rimet.quantsim import QuantizationSimModel
from torch import nn

from graph.architectures import ARCHITECTURES, Architecture, bert, swin


def calls_of(model: nn.Module, path: str, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """First input and output of a layer's first call, by running the model itself."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen.append((args[0].clone(), out.clone()))

    handle = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return seen[0]


def layers(model: nn.Module) -> list[str]:
    kinds = ("Linear", "Conv2d", "Conv1D")
    return [path for path, module in model.named_modules() if type(module).__name__ in kinds]


@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_architectures_stream_side_by_side(make: Callable[[], Architecture]) -> None:
    torch.manual_seed(0)
    model, batch = make()
    quant = copy.deepcopy(model)
    batches = [batch(8), batch(8), batch(5)]
    # GPT-2's head shares its weight with the embedding: to change it would change what ran before.
    paths = [path for path in layers(model) if path != "lm_head"]
    walk = StreamingWalk(model, quant, batches, memory_budget=1 << 16)
    visited = 0
    for visit in walk.visit(reversed(paths)):
        visited += 1
        if visited % 6 == 1:
            for i, each in enumerate(batches):
                x, y = calls_of(model, visit.path, each)
                assert bits_equal(visit.float_inputs[i], x)
                assert bits_equal(visit.float_outputs[i], y)
                assert bits_equal(visit.quant_inputs[i], calls_of(quant, visit.path, each)[0])
        with torch.no_grad():
            visit.quant_module.weight.mul_(1.05)
    assert walk.report.streamed == {"float": True, "quant": True}
    assert visited + len(walk.report.not_run) == len(paths)
    # Torchvision's Swin computes with the weights of its attention layers, and does not call them.
    assert all(".attn." in path for path in walk.report.not_run)
    assert walk.report.spilled_bytes > 0


@pytest.mark.parametrize("make", [bert, swin], ids=lambda make: make.__name__)
def test_simulations_stream(make: Callable[[], Architecture]) -> None:
    """Quantizers of modules and of functional operations run in the replay as in the simulation."""
    torch.manual_seed(0)
    model, batch = make()
    batches = [batch(3), batch(2)]
    sim = QuantizationSimModel(model, batch(1))

    def run(quant: nn.Module) -> None:
        for each in batches:
            quant(**each) if isinstance(each, dict) else quant(each)

    with torch.no_grad():
        sim.compute_encodings(run)
    walk = StreamingWalk(model, sim.model, batches)
    for number, visit in enumerate(walk.visit(layers(model))):
        if number % 5 == 4:
            for i, each in enumerate(batches):
                expected = calls_of(sim.model, visit.path, each)[0]
                assert bits_equal(visit.quant_inputs[i], expected)
        with torch.no_grad():
            visit.quant_module.weight.mul_(0.97)
    assert walk.report.streamed == {"float": True, "quant": True}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        x = self.act(self.conv(x))
        x = F.relu(self.conv2(x))
        x = x + self.conv3(x)
        return self.head(x.mean((2, 3)))


PATHS = ["conv", "conv2", "conv3", "head"]


def test_each_layer_runs_once() -> None:
    model = Net().train()
    counts: dict[str, int] = {}
    for path in PATHS:
        model.get_submodule(path).register_forward_hook(
            lambda *_, path=path: counts.update({path: counts.get(path, 0) + 1})
        )
    walk = StreamingWalk(model, None, [torch.randn(2, 2, 8, 8) for _ in range(5)])
    visits = [(v.path, v.float_outputs[4].shape[0], v.quant_inputs) for v in walk.visit(PATHS)]
    assert visits == [(path, 2, ()) for path in PATHS]
    # Recorded, verified, and then once for each batch. The verification's replay takes over what its
    # model's own run made.
    assert counts == dict.fromkeys(PATHS, 2 + 5)
    assert model.training and model.runs == 2


def test_following_activation() -> None:
    model = Net()
    walk = StreamingWalk(None, model, [torch.randn(2, 2, 8, 8)])
    found = {v.path: v.following_activation for v in walk.visit(PATHS)}
    x = torch.randn(10) * 5
    for path, name, reference in (("conv", "relu6", F.relu6), ("conv2", "relu", F.relu)):
        activation = found[path]
        assert activation is not None and activation.name == name
        before = x.clone()
        assert torch.equal(activation(x), reference(x)) and torch.equal(x, before)
    assert found["conv3"] is None and found["head"] is None


class Stateful(Net):
    """Cannot be replayed: it counts its runs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


def test_falls_back_to_running_up_to_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Stateful().eval()
    quant = copy.deepcopy(model)
    batches = [torch.randn(2, 2, 8, 8), torch.randn(3, 2, 8, 8)]
    walk = StreamingWalk(model, quant, batches)
    order = []
    for visit in walk.visit(reversed(PATHS)):
        order.append(visit.path)
        for i, batch in enumerate(batches):
            x, y = calls_of(model, visit.path, batch)
            assert bits_equal(visit.float_inputs[i], x) and bits_equal(visit.float_outputs[i], y)
            assert bits_equal(visit.quant_inputs[i], calls_of(quant, visit.path, batch)[0])
        with torch.no_grad():
            visit.quant_module.weight.mul_(1.1)
    assert order == PATHS
    assert walk.report.streamed == {"float": False, "quant": False}
    assert "count" in walk.report.reasons["float"] and "run up to each layer" in caplog.text


class Deciding(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        x = F.relu(self.conv2(x)) if x.mean() > 1 else torch.tanh(self.conv2(x))
        return self.head(self.conv3(x).mean((2, 3)))


@pytest.mark.parametrize("scales", [(0.1, 0.1, 30.0, 0.1), (0.1, 0.1, 30.0), (30.0, 0.1)])
def test_batches_that_decide_otherwise_get_programs_of_their_own(scales: tuple[float]) -> None:
    torch.manual_seed(0)
    model = Deciding().eval()
    batches = [torch.randn(2, 2, 8, 8) * scale for scale in scales]
    walk = StreamingWalk(model, None, batches)
    for visit in walk.visit(PATHS):
        for i, batch in enumerate(batches):
            assert bits_equal(visit.float_inputs[i], calls_of(model, visit.path, batch)[0])
    assert walk.report.streamed == {"float": True}
    assert walk.report.recorded_anew == 1


def test_forward_fn_dicts_and_labels() -> None:
    model = Net().eval()
    images = torch.randn(2, 2, 8, 8)
    labels = torch.zeros(2, dtype=torch.long)
    expected = calls_of(model, "head", images)[0]

    def first_input(batch: Any, **options: Any) -> torch.Tensor:
        walk = StreamingWalk(model, None, [batch], **options)
        (got,) = [visit.float_inputs[0].clone() for visit in walk.visit(["head"])]
        assert walk.report.streamed == {"float": True}
        return got

    assert torch.equal(first_input((images, labels)), expected)
    assert torch.equal(first_input([images, labels]), expected)
    assert torch.equal(first_input({"x": images}), expected)
    by_name = {"image": images, "label": labels, "id": "a"}
    got = first_input(by_name, forward_fn=lambda m, batch: m(batch["image"]))
    assert torch.equal(got, expected)


def test_wrong_arguments_are_named() -> None:
    model = Net()
    data = [torch.randn(2, 2, 8, 8)]
    with pytest.raises(ValueError, match="float_model, quant_model"):
        StreamingWalk(None, None, data)
    with pytest.raises(ValueError, match="'nothing'"):
        list(StreamingWalk(model, None, data).visit(["nothing"]))
    compiled = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="compiled"):
        list(StreamingWalk(compiled, None, [torch.randn(2, 2)]).visit(["0"]))
    with pytest.raises(ValueError, match="holds '0'"):
        list(StreamingWalk(nn.Sequential(Net()), None, data).visit(["0", ""]))
    with pytest.raises(ValueError, match="batches"):
        list(StreamingWalk(model, None, []).visit(["conv"]))
    with pytest.raises(ValueError, match="scratch_dir"):
        StreamingWalk(model, None, data, scratch_dir="/nowhere")
    with pytest.raises(ValueError, match="memory_budget"):
        StreamingWalk(model, None, data, memory_budget=-1)


def test_an_abandoned_walk_leaves_the_model_as_it_was() -> None:
    model = Net().train()
    walk = StreamingWalk(model, None, [torch.randn(2, 2, 8, 8)], memory_budget=0)
    visits = walk.visit(PATHS)
    next(visits)
    assert not model.training
    visits.close()
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert walk._store.usage()["mapped"] == 0


def test_a_share_of_free_memory_is_the_default_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "free_memory", lambda device: 4 << 20)
    walk = StreamingWalk(Net(), None, [torch.randn(2, 2, 8, 8)])
    assert walk.report.memory_budget == DEFAULT_MEMORY_SHARE * (4 << 20) == 1 << 20
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


def test_a_run_that_exceeds_the_budget_leaves_nothing_of_it_to_activations() -> None:
    batches = [torch.randn(4, 2, 64, 64) for _ in range(3)]
    walk = StreamingWalk(Net().eval(), None, batches, memory_budget=1 << 18)
    x = conv = 4 * 2 * 64 * 64 * 4
    for visit in walk.visit(["conv2"]):
        conv = visit.float_outputs[0].nbytes
        assert walk._store.usage()["resident"] < 1 << 14
    assert walk.report.working_set_bytes > x + conv > 1 << 18


def test_memory_is_kept_only_where_the_budget_holds_all_that_a_walk_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the recordings, of which nobody knows ahead what they take, and loading the batches."""
    apart: list[int] = []
    keep = streaming.large_blocks_apart
    monkeypatch.setattr(streaming, "large_blocks_apart", lambda: apart.append(1) or keep())
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    batches = [torch.randn(64, 256) for _ in range(8)]
    bytes_made = (1 + len(model)) * len(batches) * batches[0].nbytes

    def times(budget: int) -> int:
        apart.clear()
        walk = StreamingWalk(model, None, batches, memory_budget=budget)
        list(walk.visit([name for name, _ in model.named_children()]))
        return len(apart)

    # The batches, the recording; the verification, the order of layers, and each of them.
    assert times(2 * bytes_made + 1) == 2
    assert times(2 * bytes_made) == 2 + 2 + len(model)


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_activations_on_a_device(budget: int) -> None:
    torch.manual_seed(0)
    model = Net().eval().cuda()
    quant = copy.deepcopy(model)
    batches = [torch.randn(16, 2, 32, 32) for _ in range(3)]
    walk = StreamingWalk(model, quant, batches, memory_budget=budget)
    for visit in walk.visit(PATHS):
        for i, batch in enumerate(batches):
            x, y = calls_of(model, visit.path, batch.cuda())
            assert bits_equal(visit.float_inputs[i], x) and bits_equal(visit.float_outputs[i], y)
            assert bits_equal(visit.quant_inputs[i], calls_of(quant, visit.path, batch.cuda())[0])
        with torch.no_grad():
            visit.quant_module.weight.mul_(1.05)
    assert walk.report.streamed == {"float": True, "quant": True}
    assert (walk.report.spilled_bytes > 0) == (budget == 0)


# Memory and scratch files, in processes of their own

PROGRAM = Path(__file__).with_name("memory_of_a_walk.py")


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    # Without MKL's buffers, 6 MB that it takes and keeps for some alignments of a product's factors.
    environment = {**os.environ, "MKL_DISABLE_FAST_MM": "1"}
    command = [sys.executable, PROGRAM, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert found["streamed"] == {"float": True, "quant": True}
    assert found["data"] == 4 * found["budget"]
    assert found["peak_resident"] <= found["budget"]
    # A Linear's input and output, and the model's own result to compare with.
    assert found["working_set"] == 3 * found["batch"]
    # Seen: 13.3 of 16 MB. Without a budget, both streams and the batches would take 3 x 64 MB.
    assert found["above"] <= found["budget"]
    assert found["spilled"] > found["data"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_walk_leaves_no_files(tmp_path: Path, signal_number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, PROGRAM, tmp_path, "stop"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    # The files are there, mapped, though no folder shows them.
    assert str(tmp_path) in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not os.listdir(tmp_path)
