"""Recording, replay and placement: the cost of a node must not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import rimet._core as core
import torch
import torch.nn.functional as F
from rimet._graph import Twin, record
from rimet._graph.program_recorder import record_program
from rimet._graph.streaming import StreamingWalk
from rimet.common.quantsim_config.utils import resolve_config
from torch import nn

from benchmarks.harness import Contestant, Reach, Row, Size

SECTION = "capture"
#: Nodes of the small model whose cost, times the growth, is the unit.
BASE = 1_000


class Block(nn.Module):
    """Ten nodes: modules, functions, a view, an in-place operation, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.act = nn.ReLU()
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.first(x)))
        y = F.relu(self.second(y)).view(2, 4)
        x = x + y
        x *= 0.5
        return torch.cat([x, x], 1)[:, :4]


class Fan(nn.Module):
    """One tensor that all layers take: costs that grow with its consumers show here."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(nodes // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        return torch.cat([F.relu(layer(x)) for layer in self.layers])


def chain(nodes: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(nodes // 10)))


def recording(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: record(model, (x,))


def placing(model: nn.Module, x: torch.Tensor, functional: bool = False) -> Callable[[], object]:
    """Placement as in a simulation: every module without parts has a twin, and all of the plan is read."""
    twin = Twin(num_inputs=1, num_outputs=1, dynamic_inputs=False)
    leaves = {path for path, module in model.named_modules() if not any(module.children())}
    graph = record(model, (x,), twin_of=lambda path, _: twin if path in leaves else None).graph
    text = Path(resolve_config(None)).read_text(encoding="utf-8")
    config = core.QuantSimConfig(text)

    def place() -> None:
        plan = graph.place(config, 8, 8, False, functional)
        for _ in plan.modules():
            pass
        for _ in plan.functions():
            pass

    return place


def placing_functional(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return placing(model, x, functional=True)


def programming(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: record_program(model, x)


def replaying(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    program, _ = record_program(model, x)
    return lambda: program.run(model, x)


def walking(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]

    def walk() -> None:
        for visit in StreamingWalk(model, None, [x], memory_budget=1 << 24).visit(paths):
            len(visit.float_outputs)

    return walk


WORKS = {
    "record the graph": recording,
    "place quantizers": placing,
    "place quantizers, functions too": placing_functional,
    "record a program": programming,
    "replay a program": replaying,
    "streaming walk over all layers": walking,
}


def rows(size: Size) -> Iterator[Row]:
    base = size.pick(BASE, 20)
    for shape, make in (("chain", chain), ("fan", Fan)):
        for label, work in WORKS.items():
            for growth in (2, 5, 10) if not size.toy else (2,):
                yield row(shape, make, label, work, base, growth)


def row(
    shape: str,
    make: Callable[[int], nn.Module],
    label: str,
    work: Callable[[nn.Module, torch.Tensor], Callable[[], object]],
    base: int,
    growth: int,
) -> Row:
    """A model of ``growth * base`` nodes against ``growth`` runs on one of ``base`` nodes."""
    x = torch.randn(2, 4)

    def large() -> Callable[[], object]:
        return work(make(base * growth).eval(), x)

    def small() -> Callable[[], object]:
        run = work(make(base).eval(), x)

        def several() -> None:
            for _ in range(growth):
                run()

        return several

    return Row(
        SECTION,
        f"{label}, {shape} of {base * growth} nodes",
        base * growth,
        [Contestant("rimet", large), Contestant("linear", small)],
        unit="linear",
        # Caches are left behind on the way from 1,000 nodes to 10,000; a quadratic step anywhere shows as 10.
        reaches=[Reach("rimet", "linear", 1.5)],
    )
