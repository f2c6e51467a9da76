"""A process that runs Sequential MSE and AdaRound on data of four times the memory budget.

Prints a line of JSON: the budget, and for each technique the peak of anonymous resident memory above
what the process held just before, in bytes. Names of techniques as arguments: only those.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rimet.adaround import Adaround, AdaroundParameters
from rimet.quantsim import QuantizationSimModel
from rimet.seq_mse import apply_seq_mse
from torch import Tensor, nn


class Loader:
    """Batches made when they are asked for."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for seed in range(self.count):
            yield torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) * 1024


@contextmanager
def peak_above() -> Iterator[Callable[[], int]]:
    """The peak within the block, above what there was at its beginning."""
    own = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: peak - own
    finally:
        done.set()
        sampler.join()


def main(toy: bool, only: list[str]) -> None:
    rows, width, batches = (64, 32, 4) if toy else (4096, 512, 32)
    size = rows * width * 4 * batches
    budget = size // 4

    def layers() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def seq_mse(model: nn.Module, loader: Loader, budget: int) -> None:
        sim = QuantizationSimModel(model, dummy_input=torch.randn(1, width), default_param_bw=4)
        apply_seq_mse(sim, loader, memory_budget=budget, progress=False)

    def adaround(model: nn.Module, loader: Loader, budget: int) -> None:
        params = AdaroundParameters(
            loader, len(loader), default_num_iterations=20, memory_budget=budget, progress=False
        )
        sim = QuantizationSimModel(model, dummy_input=torch.randn(1, width), default_param_bw=4)
        Adaround.round_simulation(sim, params)

    found = {"budget": budget}
    for technique in (seq_mse, adaround):
        if only and technique.__name__ not in only:
            continue
        # Code and buffers of the first call of anything are no activations.
        technique(layers(), Loader(2, (rows, width)), budget)
        model = layers()
        with peak_above() as peak:
            technique(model, Loader(batches, (rows, width)), budget)
        found[technique.__name__] = peak()
    print(json.dumps(found))


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--toy"]
    main("--toy" in sys.argv, names)
