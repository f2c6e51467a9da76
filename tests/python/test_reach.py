"""One model of each kind gets through all that its float model gets through: the part of
``python -m benchmarks.reach`` that CI runs.
"""

from __future__ import annotations

import pytest

from benchmarks.reach import failures, judge_apart
from benchmarks.reach_models import SMOKE, Entry, entries

ENTRIES = {entry.name: entry for entry in entries()}


@pytest.mark.parametrize("entry", [ENTRIES[name] for name in SMOKE], ids=lambda entry: entry.name)
def test_models_get_through(entry: Entry) -> None:
    result = judge_apart(entry, limit=240.0)
    assert failures({entry.name: result}) == []
    assert result["quantizers"] > 10 and len(result["sqnr"]) == 3


def test_names_are_unique() -> None:
    assert len(ENTRIES) == len(list(entries()))
