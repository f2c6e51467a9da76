"""Programs: runs that are recorded, verified and run again."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet._graph import record
from rimet._graph.program import Reason, ReplayError, bits_equal, signature_of
from rimet._graph.program_recorder import record_program
from rimet._graph.replay import Replay, verify
from rimet._graph.structure import flatten
from torch import nn

from graph.architectures import ARCHITECTURES, Architecture


def own(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def assert_same(a: Any, b: Any) -> None:
    (first, structure), (second, other) = flatten(a), flatten(b)
    assert structure.matches(other)
    assert first and all(bits_equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_recorded_with_batch_1_and_run_on_others(make: Callable[[], Architecture]) -> None:
    torch.manual_seed(0)
    model, batch = make()
    replay = Replay(model)
    replay(batch(1))
    for size in (8, 8, 8, 5, 5, 5):
        now = batch(size)
        assert_same(replay(now), own(model, now))
    assert not replay.reasons
    # One batch to record and one to verify, for each of the two sizes.
    assert replay.replayed == 2
    assert len(replay.programs) == 3
    # A record belongs to one batch size: that of size 1 must refuse another one.
    program = replay.programs[signature_of(batch(1))]
    with pytest.raises(ReplayError) as caught:
        program.run(model, batch(2))
    assert caught.value.reason is Reason.INPUT


class Views(nn.Module):
    """In-place writes through views, sizes baked in, a mask made of numbers, a parameter of its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(6))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.fc(x).view(2, -1, 3)
        x[:, 0] += 1
        first = x.select(2, 0)
        first.mul_(2)
        x.unsqueeze_(0)
        x = x.squeeze(0).detach().flatten(1) + self.shift.detach()
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        mask[0] = 3
        y = self.act(x * mask)
        return {"y": (y, x.t()), "list": [first]}


def test_views_and_in_place_writes() -> None:
    torch.manual_seed(0)
    model = Views()
    program, _ = record_program(model, torch.randn(2, 6))
    verify(program, model, torch.randn(2, 6))
    for _ in range(2):
        x = torch.randn(2, 6)
        before = x.clone()
        assert_same(program.run(model, x), own(model, x))
        assert torch.equal(x, before)


def test_parameters_are_read_anew() -> None:
    model = Views()
    x = torch.randn(2, 6)
    program, _ = record_program(model, x)
    with torch.no_grad():
        model.shift.add_(1)
        model.fc.weight = nn.Parameter(torch.randn(6, 6))
    assert_same(program.run(model, x), own(model, x))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.ReLU()).train()
    state = torch.get_rng_state()
    program, _ = record_program(model, torch.randn(2, 3, generator=torch.Generator()))
    verify(program, model, torch.randn(2, 3, generator=torch.Generator()))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x.relu() * 2


class Everything(nn.Module):
    """What torch functions alone do not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = scripted(x)
        x = x + torch.vmap(lambda row: row.cumsum(0) + torch.tensor(1.0))(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, x)
        return torch.einsum("ij,kj->ik", y.float(), x.repeat(1, y.size(1) // x.size(1) or 1)[:, :2])


def test_scripted_functions_vmap_and_autocast() -> None:
    model = Everything()
    torch.manual_seed(0)
    program, _ = record_program(model, torch.randn(2, 2))
    verify(program, model, torch.randn(2, 2))
    names = [step.name for step in program.steps]
    assert "aten::relu" in names and "aten::cumsum" in names
    x = torch.randn(2, 2)
    assert_same(program.run(model, x), own(model, x))


def test_compiled_modules_are_recorded_by_their_operators() -> None:
    part = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    model = nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 2))
    program, _ = record_program(model, torch.randn(2, 3))
    verify(program, model, torch.randn(2, 3))
    assert [step.name for step in program.steps if step.kind == "module"] == ["0", "2"]
    assert "aten::relu" in [step.name for step in program.steps]
    graph = record(model, (torch.randn(2, 3),)).graph
    assert [node["module"] for node in graph.nodes()] == ["0", "1", "2"]


class Branching(nn.Module):
    def __init__(self, leave: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.leave = leave

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.leave(x) else x * 2


@pytest.mark.parametrize(
    "leave",
    [
        lambda x: x.sum() > 0,
        lambda x: x.sum().item() > 0,
        lambda x: x.tolist()[0] > 0,
        lambda x: x.numpy()[0] > 0,
        lambda x: len(x[x > 0]) > 0,
        lambda x: torch.equal(x, x.abs()),
    ],
    ids=["bool", "item", "tolist", "numpy", "shape", "equal"],
)
def test_values_that_leave_tensors_are_guards(leave: Callable[[torch.Tensor], Any]) -> None:
    model = Branching(leave)
    positive, negative = torch.ones(3), -torch.ones(3)
    program, _ = record_program(model, positive)
    assert torch.equal(program.run(model, positive), positive + 1)
    with pytest.raises(ReplayError) as caught:
        program.run(model, negative)
    assert caught.value.reason in (Reason.GUARD, Reason.SHAPE)
    replay = Replay(model)
    for x in (positive, negative, negative, positive):
        assert torch.equal(replay(x), own(model, x))


def test_random_numbers_are_drawn_again() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5, training=True) + torch.randn_like(x)

    model = Noise()
    program, _ = record_program(model, torch.ones(50))
    assert program.is_random
    verify(program, model, torch.ones(50))
    torch.manual_seed(3)
    expected = model(torch.ones(50))
    torch.manual_seed(3)
    assert torch.equal(program.run(model, torch.ones(50)), expected)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


class Remembering(nn.Module):
    """Keeps a tensor from run to run, where nobody sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last, self.last = self.last, x
        return x + last


class Sparse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse().to_dense() * 2


class Resizing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.resize_(4).fill_(2)
        return y


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Counting, Reason.WRITTEN),
        (Remembering, Reason.OUTPUT),
        (Sparse, Reason.LAYOUT),
        (Resizing, Reason.RESIZED),
    ],
)
def test_what_cannot_be_replayed_says_why(make: Callable[[], nn.Module], reason: Reason) -> None:
    model, twin = make(), make()
    replay = Replay(model)
    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(replay(x), own(twin, x))
    (error,) = replay.reasons.values()
    assert error.reason is reason
    assert not replay.replayed


def test_shared_modules_and_keyword_arguments() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.again = self.fc

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor, times: int) -> Any:
            for _ in range(times):
                x = self.again(self.fc(x)) * scale
            return x

    model = Shared()

    def batch(times: int) -> dict[str, Any]:
        return {"x": torch.randn(2, 4), "scale": torch.randn(2, 1), "times": times}

    program, _ = record_program(model, batch(2))
    verify(program, model, batch(2))
    assert len(program.calls("fc")) == 4
    with pytest.raises(ReplayError):
        program.run(model, batch(3))


def test_one_tensor_in_two_places_is_a_signature_of_its_own() -> None:
    x, y = torch.randn(3), torch.randn(3)
    assert signature_of((x, x)) != signature_of((x, y))
    assert signature_of((x, y)) == signature_of((y, x))
    assert signature_of((x, 1)) != signature_of((x, True))
    assert signature_of(x.double()) != signature_of(x)
    assert hash(signature_of({"a": [x, None]})) == hash(signature_of({"a": [y, None]}))


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class Costly(nn.Module):
    """Linear layers whose results are kept, written to afterwards, and used by a second call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = (Counted(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.sin(self.first(x)))
        x += 1
        y: torch.Tensor = self.shared(torch.cos(self.shared(x)))
        return y


def test_a_verification_runs_costly_modules_once_where_memory_allows() -> None:
    torch.manual_seed(0)
    model = Costly()
    layers = [model.first, model.second, model.shared]
    names = ["first", "second", "shared"]
    # The second's result is written to after it was made: a copy is kept.
    for keep_bytes, expected in ((1 << 20, [1, 1, 2]), (0, [2, 2, 4])):
        program, _ = record_program(model, torch.randn(3, 4), wanted=names)
        for layer in layers:
            layer.calls = 0
        verify(program, model, torch.randn(3, 4), keep_bytes=keep_bytes)
        assert program.trusted
        assert [layer.calls for layer in layers] == expected
        x = torch.randn(3, 4)
        assert_same(program.run(model, x), own(model, x))


def test_a_wrong_record_is_found_out_with_kept_results_too() -> None:
    torch.manual_seed(0)
    model = Costly()
    program, _ = record_program(model, torch.randn(3, 4), wanted=["first", "second", "shared"])
    sine = next(step for step in program.steps if step.name == "aten::sin")
    sine.function = torch.ops.aten.cos.default
    with pytest.raises(ReplayError) as caught:
        verify(program, model, torch.randn(3, 4), keep_bytes=1 << 20)
    assert caught.value.reason is Reason.OUTPUT


def test_recording_does_not_import_torchs_compiler() -> None:
    """It takes one to two seconds, which every first call of a technique paid."""
    program = """
        import sys, torch
        from rimet._graph.program_recorder import record_program

        record_program(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), torch.ones(1, 2))
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
