"""Encodings against those AIMET answered (tests/data/calibration/record_golden.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rimet.quantization import encoding_analyzer as analyzers

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "calibration" / "golden.npz")
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "tensor": ((1,), None),
    "scalar": ((), None),
    "channel": ((4, 1), None),
    "block": ((4, 3), (1, 100)),
}
ANALYZERS: dict[str, Callable[[Any, Any], analyzers.EncodingAnalyzer[Any]]] = {
    "min_max": analyzers.MinMaxEncodingAnalyzer,
    "percentile_100": lambda s, b: analyzers.PercentileEncodingAnalyzer(s, 256, 100, b),
    "percentile_99.9": lambda s, b: analyzers.PercentileEncodingAnalyzer(s, 256, 99.9, b),
    "percentile_95": lambda s, b: analyzers.PercentileEncodingAnalyzer(s, 256, 95, b),
    "sqnr": lambda s, b: analyzers.SqnrEncodingAnalyzer(s, block_size=b),
    "sqnr_gamma_1": lambda s, b: analyzers.SqnrEncodingAnalyzer(s, 512, gamma=1.0, block_size=b),
    "tf_enhanced": analyzers.TfEnhancedEncodingAnalyzer,
}
NAMES = sorted({key.split("/")[0] for key in GOLDEN.files if "/" in key})
MULTIPLE = {"growing", "repeated"}


def batches(name: str) -> list[torch.Tensor]:
    found = []
    while f"{name}/batch{len(found)}" in GOLDEN:
        found.append(torch.from_numpy(GOLDEN[f"{name}/batch{len(found)}"]))
    return found


def cases(name: str, kind: str, layout: str) -> list[tuple[int, bool, np.ndarray, np.ndarray]]:
    """(num_steps, symmetric, what AIMET answered, what rimet does)."""
    analyzer = ANALYZERS[kind](*LAYOUTS[layout])
    for batch in batches(name):
        analyzer.update_stats(batch)
    found = []
    for num_steps in (3, 15, 255, 65535):
        for symmetric in (False, True):
            key = f"{name}/{kind}/{layout}/{num_steps}/{'sym' if symmetric else 'asym'}"
            if key in GOLDEN:
                low, high = analyzer.compute_encodings(num_steps, symmetric)
                assert low.shape == high.shape == LAYOUTS[layout][0]
                ours = torch.stack([low.flatten(), high.flatten()]).numpy()
                found.append((num_steps, symmetric, GOLDEN[key], ours))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_first_batch_is_counted_on_the_same_bins(name: str, layout: str) -> None:
    shape, block = LAYOUTS[layout]
    stats = analyzers.PercentileEncodingAnalyzer(shape, 256, 100, block).update_stats(
        batches(name)[0]
    )
    counts = torch.stack([s.histogram for s in stats]).numpy()
    edges = torch.stack([s.bin_edges for s in stats]).numpy()
    # Bit for bit: the same float32 operations.
    np.testing.assert_array_equal(counts, GOLDEN[f"{name}/counts/{layout}"])
    np.testing.assert_array_equal(edges, GOLDEN[f"{name}/edges/{layout}"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ANALYZERS)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in MULTIPLE])
def test_one_batch(name: str, kind: str, layout: str) -> None:
    for num_steps, symmetric, expected, ours in cases(name, kind, layout):
        # Last places of float32, over the width of the range: sums are taken in another order.
        width = expected[1] - expected[0]
        assert (np.abs(ours - expected) <= 2e-6 * width).all(), (num_steps, symmetric)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["min_max", "percentile_100"])
@pytest.mark.parametrize("name", sorted(MULTIPLE))
def test_the_whole_range_of_several_batches(name: str, kind: str, layout: str) -> None:
    for num_steps, symmetric, expected, ours in cases(name, kind, layout):
        width = expected[1] - expected[0]
        assert (np.abs(ours - expected) <= 2e-6 * width).all(), (num_steps, symmetric)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["percentile_99.9", "percentile_95"])
@pytest.mark.parametrize("name", sorted(MULTIPLE))
def test_percentile_of_several_batches(name: str, kind: str, layout: str) -> None:
    # AIMET moves the counts it has to new bins with every growth, rimet lays each batch onto a lattice whose bins are
    # at most as wide: up to one bin of the batch, one of the result and one of AIMET's lie between the answers.
    everything = torch.cat([b.flatten() for b in batches(name)])
    slack = 3 * (everything.max() - everything.min()).item() / 256
    for num_steps, symmetric, expected, ours in cases(name, kind, layout):
        # A symmetric range moves on both sides, by more on the one that decides.
        assert (np.abs(ours - expected) <= slack * (2 if symmetric else 1)).all(), num_steps


@pytest.mark.parametrize("layout", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["sqnr", "sqnr_gamma_1", "tf_enhanced"])
@pytest.mark.parametrize("name", sorted(MULTIPLE))
def test_search_over_several_batches(name: str, kind: str, layout: str) -> None:
    """Where neighbouring candidates are nearly equal, another may win: it must be as good on the data itself."""
    data = torch.stack(batches(name)).double()
    rows = data.transpose(0, 1).flatten(1) if layout == "channel" else data.reshape(1, -1)
    gamma = 1.0 if kind == "sqnr_gamma_1" else 3.0

    def noise(ends: np.ndarray, num_steps: int) -> torch.Tensor:
        low, high = torch.from_numpy(ends).double()[..., None]
        delta = (high - low) / num_steps
        bounded = rows.clamp(low, high)
        on_grid = ((bounded - low) / delta).round() * delta + low
        weight = torch.where(bounded == rows, 1.0, gamma)
        return (weight * (on_grid - rows) ** 2).mean(1)

    for num_steps, symmetric, expected, ours in cases(name, kind, layout):
        if num_steps == 65535:
            # Bins are far wider than steps: the estimate itself is no finer than this.
            width = expected[1] - expected[0]
            assert (np.abs(ours - expected) <= 0.02 * width).all(), symmetric
            continue
        theirs, mine = noise(expected, num_steps), noise(ours, num_steps)
        # The estimate knows values to a bin: at 8 bits, two bins of 512 to a step.
        slack = 1.1 if num_steps == 255 else 1.03
        assert (mine <= theirs * slack).all(), (num_steps, symmetric, mine / theirs)
