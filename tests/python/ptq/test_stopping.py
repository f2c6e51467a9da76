"""AdaRound and Sequential MSE killed or interrupted in the middle, and taken up again."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from .stopped import FINISHED, TECHNIQUES, simulation, state

ORDER = ["stem", "depthwise", "point", "up", "head"]


@contextmanager
def stopped(technique: str, place: str, results: Path, scratch: Path) -> Iterator[subprocess.Popen]:
    """A process that waits at the place."""
    tests = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "TMPDIR": str(scratch),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch.parent / "torch"),  # torch makes one on import
        "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq.stopped", technique, place, str(results)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.wait()


@functools.cache
def uninterrupted(technique: str) -> list[torch.Tensor]:
    _, sim = simulation()
    TECHNIQUES[technique](sim, None)
    return state(sim.model)


@pytest.mark.parametrize(
    ("technique", "place", "signal_number"),
    [
        ("adaround", "loop", signal.SIGKILL),
        ("seq_mse", "loop", signal.SIGKILL),
        ("adaround", "loop", signal.SIGINT),
        ("seq_mse", "loop", signal.SIGINT),
        ("adaround", "walk", signal.SIGINT),
        ("seq_mse", "write", signal.SIGKILL),
    ],
)
def test_a_stopped_run_is_taken_up_with_the_same_bits(
    technique: str, place: str, signal_number: signal.Signals, tmp_path: Path
) -> None:
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    with stopped(technique, place, results, scratch) as process:
        assert len(list(results.glob("[!.]*.safetensors"))) == FINISHED
        assert len(list(results.glob(".*.part"))) == (place == "write")
        assert str(scratch) in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal_number)
        output, _ = process.communicate(timeout=120)
    assert not os.listdir(scratch)

    model, sim = simulation()
    if signal_number == signal.SIGINT:
        quantizers = sum(quantizer is not None for quantizer in sim.quantizers())
        expected = {"unchanged": True, "quantizers": quantizers, "free": True}
        assert process.returncode == 0 and json.loads(output) == expected
    else:
        assert process.returncode == -signal.SIGKILL

    before = state(model)
    report = TECHNIQUES[technique](sim, str(results))
    status = ["resumed"] * FINISHED + ["treated"] * (len(ORDER) - FINISHED)
    assert [report[path].status for path in ORDER] == status
    assert all(map(torch.equal, state(model), before))
    assert sorted(file.name for file in results.iterdir()) == sorted(
        ["manifest.json", *(f"{path}.safetensors" for path in ORDER)]
    )
    assert all(map(torch.equal, state(sim.model), uninterrupted(technique)))
