"""Calibration: statistics of a batch, and encodings from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.harness import Contestant, Remote, Row, Size
from benchmarks.kernels import ACTIVATION, MATRIX, normal, ops, quiet, written

SECTION = "calibration"


def min_max(
    label: str, shape: Sequence[int], encoding: Sequence[int], dims: Sequence[int] | None
) -> Row:
    """Smallest and largest element. The unit is a sum, which also reads everything once."""
    x = normal(shape)

    def eager() -> Callable[[], object]:
        if dims is None:
            return quiet(lambda: torch.aminmax(x))
        return quiet(lambda: (torch.amin(x, tuple(dims)), torch.amax(x, tuple(dims))))

    return Row(
        SECTION,
        f"{label}, {written(shape)}",
        x.numel(),
        [
            Contestant("rimet", lambda: quiet(lambda: ops.min_max(x, list(encoding)))),
            Contestant("sum", lambda: quiet(x.sum)),
            Contestant("torch", eager),
            Remote(
                "AIMET",
                "analyzer",
                {
                    "kind": "MinMax",
                    "shape": list(shape),
                    "encoding": list(encoding),
                    "bits": 8,
                    "symmetric": False,
                    "encodings": False,
                },
            ),
        ],
        unit="sum",
    )


def histogram(
    label: str,
    kind: str,
    shape: Sequence[int],
    encoding: Sequence[int],
    symmetric: bool,
    encodings: bool,
) -> Row:
    """An analyzer made, shown one batch and, if asked, giving 8-bit encodings. The unit is a sum."""
    x = normal(shape)

    def analyzer() -> Callable[[], object]:
        from rimet.quantization import encoding_analyzer

        make = getattr(encoding_analyzer, f"{kind}EncodingAnalyzer")

        def call() -> object:
            one = make(tuple(encoding))
            one.update_stats(x)
            return one.compute_encodings(255, symmetric) if encodings else one

        return call

    return Row(
        SECTION,
        f"{label}, {written(shape)}",
        x.numel(),
        [
            Contestant("rimet", analyzer),
            Contestant("sum", lambda: quiet(x.sum)),
            Remote(
                "AIMET",
                "analyzer",
                {
                    "kind": kind,
                    "shape": list(shape),
                    "encoding": list(encoding),
                    "bits": 8,
                    "symmetric": symmetric,
                    "encodings": encodings,
                },
            ),
        ],
        unit="sum",
    )


def rows(size: Size) -> Iterator[Row]:
    activation = size.shape(ACTIVATION, (2, 4, 8, 8))
    matrix = size.shape(MATRIX, (16, 128))
    yield min_max("min-max, per-tensor", activation, (1,), None)
    yield min_max("min-max, per-channel", matrix, (matrix[0], 1), (1,))
    weight = size.shape((512, 512, 3, 3), (8, 4, 3, 3))
    channel = (weight[0], 1, 1, 1)
    yield histogram("SQNR, per-channel, with encodings", "Sqnr", weight, channel, True, True)
    yield histogram(
        "SQNR, per-channel, asymmetric, with encodings", "Sqnr", weight, channel, False, True
    )
    yield histogram(
        "percentile statistics, per-tensor", "Percentile", activation, (1,), False, False
    )
    yield histogram("SQNR statistics, per-tensor", "Sqnr", activation, (1,), False, False)
