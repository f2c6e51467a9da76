"""Statistics of several processes: every rank ends with the encodings of one process over all data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rimet.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    MseEncodingAnalyzer,
    PercentileEncodingAnalyzer,
    SqnrEncodingAnalyzer,
)

RANKS = 2


def make() -> list[EncodingAnalyzer[Any]]:
    return [
        MinMaxEncodingAnalyzer((4, 1)),
        PercentileEncodingAnalyzer((4, 1), percentile=99.0),
        SqnrEncodingAnalyzer((4, 1)),
        MseEncodingAnalyzer((1,)),
    ]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    # Ranges that differ from batch to batch, so that the histograms of the ranks have other edges. Five batches: one
    # rank sees one more than the other.
    return [torch.randn(4, 200, generator=generator) * 1.7**i + i for i in range(5)]


def answers(analyzers: list[EncodingAnalyzer[Any]]) -> list[torch.Tensor]:
    return [
        torch.stack(analyzer.compute_encodings(num_steps, symmetric))
        for analyzer in analyzers
        for num_steps, symmetric in ((15, True), (255, False))
    ]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        analyzers = make()
        idle = SqnrEncodingAnalyzer((4, 1))
        for i, batch in enumerate(batches()):
            if i % RANKS == rank:
                for analyzer in analyzers:
                    analyzer.update_stats(batch)
                if rank == 1:
                    idle.update_stats(batch)
        for analyzer in analyzers:
            analyzer.all_reduce()
        # A rank without data takes part, and gets the others'.
        idle.all_reduce()
        torch.save([*answers(analyzers), *answers([idle])], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    analyzers = make()
    idle = SqnrEncodingAnalyzer((4, 1))
    for i, batch in enumerate(batches()):
        for analyzer in analyzers:
            analyzer.update_stats(batch)
        if i % RANKS == 1:
            idle.update_stats(batch)
    expected = [*answers(analyzers), *answers([idle])]
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want)
