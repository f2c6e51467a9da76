"""The vectors of ``tests/data/affine``, as test parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "data" / "affine"
RECORD: dict[str, Any] = json.loads((FOLDER / "affine.json").read_text())
POOLS = load_file(str(FOLDER / "affine.safetensors"))
CASES: list[dict[str, Any]] = RECORD["cases"]


class Case:
    """One recorded case: tensors by name, settings with their defaults."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.name: str = entry["name"]
        self.kind: str = entry["kind"]
        self.qmin: int = entry.get("qmin", 0)
        self.qmax: int = entry.get("qmax", 0)
        self.block_size: list[int] | None = entry.get("block_size")
        self.shift: float = entry.get("shift", 0.0)
        self.symmetric: bool = entry.get("symmetric", False)
        self.inputs = {key: _tensor(place) for key, place in entry["in"].items()}
        self.outputs = {
            key: _tensor(value) if isinstance(value, list) else value
            for key, value in entry["out"].items()
        }

    @property
    def x(self) -> Tensor:
        return self.inputs["x"]

    @property
    def settings(self) -> tuple[Any, ...]:
        """What follows the tensors in a call of the op, and of the reference."""
        if self.kind == "dequantize":
            return (self.block_size,)
        if self.kind == "quantize":
            return (self.qmin, self.qmax, self.block_size)
        if self.kind == "range":
            return (self.qmin, self.qmax, self.symmetric, self.shift, self.block_size)
        return (self.qmin, self.qmax, self.shift, self.block_size)


def _tensor(place: list[Any]) -> Tensor:
    dtype, start, shape = place
    return POOLS[dtype][start : start + math.prod(shape)].view(shape).clone()


def select(*kinds: str, where: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    chosen = [Case(entry) for entry in CASES if entry["kind"] in kinds]
    params = [pytest.param(case, id=case.name) for case in chosen if where(case)]
    assert params, "no case left: the selection is wrong"
    return params
