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


def rows(size: Size) -> Iterator[Row]:
    activation = size.shape(ACTIVATION, (2, 4, 8, 8))
    matrix = size.shape(MATRIX, (16, 128))
    yield min_max("min-max, per-tensor", activation, (1,), None)
    yield min_max("min-max, per-channel", matrix, (matrix[0], 1), (1,))
