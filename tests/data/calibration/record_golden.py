"""Record what AIMET's analyzers answer, into golden.npz beside this file.

Run with the Python of an environment that holds aimet-torch 2.42.0 (`make peers`). The versions are stored with the
data. Names in the file: ``<data>/batch<i>`` are inputs, ``<data>/<analyzer>/<layout>/<num_steps>/<sym|asym>`` the
encodings as ``[2, encodings]`` (min, max), ``<data>/counts/<layout>`` the histograms of the first batch.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from aimet_torch.quantization import encoding_analyzer as aimet

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "tensor": ((1,), None),
    "scalar": ((), None),
    "channel": ((4, 1), None),
    "block": ((4, 3), (1, 100)),
}
ANALYZERS = {
    "min_max": lambda shape, block: aimet.MinMaxEncodingAnalyzer(shape, block),
    "percentile_100": lambda shape, block: aimet.PercentileEncodingAnalyzer(shape, 256, 100, block),
    "percentile_99.9": lambda shape, block: aimet.PercentileEncodingAnalyzer(
        shape, 256, 99.9, block
    ),
    "percentile_95": lambda shape, block: aimet.PercentileEncodingAnalyzer(shape, 256, 95, block),
    "sqnr": lambda shape, block: aimet.SqnrEncodingAnalyzer(shape, block_size=block),
    "sqnr_gamma_1": lambda shape, block: aimet.SqnrEncodingAnalyzer(
        shape, 512, gamma=1.0, block_size=block
    ),
    "tf_enhanced": lambda shape, block: aimet.TfEnhancedEncodingAnalyzer(shape, block),
}


def data() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(4, 300, generator=generator) * scale

    tails = normal() / torch.rand(4, 300, generator=generator).clamp(min=0.02)
    special = normal()
    special[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    special[2, 5] = float("nan")
    channels = normal() * torch.tensor([[0.01], [1.0], [30.0], [500.0]])
    return {
        "normal": [normal()],
        "tails": [tails],
        "relu": [normal().relu()],
        "shifted": [normal(0.5) + 7.0],
        "negative": [-normal().abs() - 0.25],
        "channels": [channels],
        "constant": [torch.full((4, 300), 3.0)],
        "zero": [torch.zeros(4, 300)],
        "tiny": [normal(1e-9)],
        "special": [special],
        "growing": [normal(), normal(1.7) + 0.3, normal(3.0)],
        "repeated": [normal(2.0), normal(), normal(0.5)],
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store: dict[str, np.ndarray] = {
        "versions": np.array([f"{n} {version(n)}" for n in ("aimet-torch", "torch", "numpy")])
    }
    for name, batches in data().items():
        for i, batch in enumerate(batches):
            store[f"{name}/batch{i}"] = batch.numpy()
        for layout, (shape, block) in LAYOUTS.items():
            for kind, make in ANALYZERS.items():
                if name == "special" and kind == "min_max":
                    continue
                analyzer = make(shape, block)
                for batch in batches:
                    analyzer.update_stats(batch)
                for num_steps in (3, 15, 255, 65535):
                    for symmetric in (False, True):
                        low, high = analyzer.compute_encodings(num_steps, symmetric)
                        key = f"{name}/{kind}/{layout}/{num_steps}/{'sym' if symmetric else 'asym'}"
                        store[key] = torch.stack([low.flatten(), high.flatten()]).numpy()
            first = aimet.PercentileEncodingAnalyzer(shape, 256, 100, block)
            stats = first.observer.collect_stats(batches[0])
            store[f"{name}/counts/{layout}"] = torch.stack([s.histogram for s in stats]).numpy()
            store[f"{name}/edges/{layout}"] = torch.stack([s.bin_edges for s in stats]).numpy()
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **store)
    print(f"{len(store)} entries, {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
