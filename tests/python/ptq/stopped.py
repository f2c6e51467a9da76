"""Run by test_stopping.py in a process of its own: a technique that stops at a given place, says so,
and waits there to be killed or interrupted.

    python -m ptq.stopped TECHNIQUE PLACE RESULTS_DIR

Places: ``loop``, an engine loop that never ends; ``walk``, between two layers; ``write``, with half a
result in its file. All after two finished layers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from rimet import _core
from rimet._graph import streaming
from rimet.adaround import Adaround, AdaroundParameters
from rimet.ptq_results import LayerwiseReport
from rimet.quantsim import QuantizationSimModel
from rimet.seq_mse import apply_seq_mse
from torch import Tensor, nn

from .models import batches, small

FINISHED = 2
MEMORY_BUDGET = 0  # so that every activation is in a file


def adaround(sim: QuantizationSimModel, results_dir: str | None) -> LayerwiseReport:
    params = AdaroundParameters(
        batches(size=64),
        3,
        default_num_iterations=20,
        seed=3,
        results_dir=results_dir,
        memory_budget=MEMORY_BUDGET,
        progress=False,
    )
    return Adaround.round_simulation(sim, params)


def seq_mse(sim: QuantizationSimModel, results_dir: str | None) -> LayerwiseReport:
    return apply_seq_mse(
        sim,
        batches(size=64),
        results_dir=results_dir,
        memory_budget=MEMORY_BUDGET,
        progress=False,
    )


TECHNIQUES: dict[str, Callable[[QuantizationSimModel, str | None], LayerwiseReport]] = {
    "adaround": adaround,
    "seq_mse": seq_mse,
}
# The engine's function for one layer, and what makes it take for ever.
ENDLESS = {
    "adaround": ("adaround_layer", {"num_iterations": 10**12}),
    "seq_mse": ("seq_mse_layer", {"num_candidates": 10**6}),
}


def simulation() -> tuple[nn.Module, QuantizationSimModel]:
    """A model and its calibrated simulation."""
    model = small()
    sim = QuantizationSimModel(model, batches()[0], default_param_bw=4)
    for module in sim.qmodules():
        module.compute_param_encodings()
    return model, sim


def state(*models: nn.Module) -> list[Tensor]:
    """All parameters and buffers, ranges that are not set as -1."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return [t.detach().clone().nan_to_num(-1.0) for t in tensors]


def after(count: int, function: Any, then: Callable[..., Any]) -> Any:
    """The function; from its call number ``count`` (of 0, 1, ...) on, ``then`` in its place."""
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (function if calls <= count else then)(*args, **kwargs)

    return replaced


def here() -> None:
    print("here", flush=True)


def stop_in_loop(technique: str) -> None:
    name, changes = ENDLESS[technique]
    function = getattr(_core, name)

    def endless(*args: Any, **kwargs: Any) -> Any:
        def progress(done: int, report: Callable[[int], None] = kwargs["progress"]) -> None:
            if not told:
                told.append(True)
                here()
            report(done)

        told: list[bool] = []
        return function(*args, **{**kwargs, **changes, "progress": progress})

    setattr(_core, name, after(FINISHED, function, endless))


def wait(*args: Any, **kwargs: Any) -> None:
    here()
    while True:  # not signal.pause(), which a signal just before it would not end
        time.sleep(0.05)


def stop_in_walk(technique: str) -> None:
    sides = 2 if technique == "adaround" else 1
    come_to = streaming._Streamed.come_to
    # The walk comes to a layer once for each of its models.
    streaming._Streamed.come_to = after(FINISHED * sides, come_to, wait)  # type: ignore[method-assign]


def stop_in_write(technique: str) -> None:
    save = safetensors.torch.save_file

    def half(tensors: Any, path: os.PathLike[str], metadata: Any) -> None:
        save(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        wait()

    safetensors.torch.save_file = after(FINISHED, save, half)


def main(technique: str, place: str, results_dir: str) -> None:
    torch.set_num_threads(1)
    {"loop": stop_in_loop, "walk": stop_in_walk, "write": stop_in_write}[place](technique)
    model, sim = simulation()
    before = state(model, sim.model)
    try:
        TECHNIQUES[technique](sim, results_dir)
    except KeyboardInterrupt:
        unchanged = all(map(torch.equal, state(model, sim.model), before))
        quantizers = sum(q is not None for q in sim.quantizers())
        free = all(q.is_overwrite_allowed() for q in sim.quantizers())
        print(json.dumps({"unchanged": unchanged, "quantizers": quantizers, "free": free}))


if __name__ == "__main__":
    main(*sys.argv[1:])
