"""Per-layer results: kept, taken over, refused, reported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet._graph.streaming import StreamingWalk
from rimet.ptq_results import (
    FingerprintMismatchError,
    LayerwiseRun,
    data_hash,
    fingerprint,
    layer_seed,
)
from torch import nn


class Interrupted(BaseException):
    pass


def technique(folder: Path | None, fingerprint: dict[str, str], stop_at: str | None = None) -> Any:
    """Draws random weights for three layers; the last is skipped."""
    run = LayerwiseRun("Dice", folder, fingerprint)
    results = {}
    for path in ("", "block.0", "é/1"):
        with run.layer(path, "Linear") as layer:
            if path == stop_at:
                raise Interrupted
            if layer.stored is None:
                generator = torch.Generator().manual_seed(layer_seed(3, path))
                weight = torch.randn(4, 3, generator=generator)
                layer.done({"weight": weight.T}, loss_before=2.0, loss_after=1.0, steps=5)
        results[path] = layer.tensors["weight"]
    run.skip("head", "Identity", "it has no weight")
    return results, run.report


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    expected, report = technique(None, {})
    assert [layer.path for layer in report.treated] == ["", "block.0", "é/1"]
    with pytest.raises(Interrupted):
        technique(tmp_path, {"seed": "3"}, stop_at="é/1")
    results, report = technique(tmp_path, {"seed": "3"})
    assert all(torch.equal(results[path], expected[path]) for path in expected)
    assert [layer.status for layer in report.layers] == ["resumed"] * 2 + ["treated", "skipped"]
    # Everything is there now: a third run computes nothing.
    results, report = technique(tmp_path, {"seed": "3"})
    assert all(torch.equal(results[path], expected[path]) for path in expected)
    assert [layer.status for layer in report.treated] == ["resumed"] * 3
    assert report.treated[1].loss_after == 1.0 and report.treated[1].details == {"steps": 5}


def test_report(tmp_path: Path) -> None:
    _, report = technique(None, {})
    assert report.skipped == {"head": "it has no weight"}
    report.save(tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["format"], document["version"]) == ("rimet-layer-report", 1)
    assert document["layers"][3]["reason"] == "it has no weight"
    assert document["layers"][0]["loss_before"] == 2.0
    assert report["head"].status == "skipped" and report["head"].kind == "Identity"
    with pytest.raises(KeyError):
        report["neck"]


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    data = data_hash([torch.ones(2, 3)])
    own = fingerprint(model, {"bits": 4}, 0, data)
    LayerwiseRun("Dice", tmp_path, own)
    LayerwiseRun("Dice", tmp_path, fingerprint(model, {"bits": 4}, 0, data))

    def differing(*arguments: Any, technique: str = "Dice") -> list[str]:
        with pytest.raises(FingerprintMismatchError) as caught:
            LayerwiseRun(technique, tmp_path, fingerprint(*arguments))
        assert str(tmp_path) in str(caught.value)
        return caught.value.differing

    assert differing(model, {"bits": 8}, 0, data) == ["bits"]
    assert differing(model, {"bits": 4}, 1, data_hash([torch.zeros(2, 3)])) == ["seed", "data"]
    assert differing(model, {"bits": 4}, 0, data, technique="Cards") == ["technique"]
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert differing(model, {"bits": 4}, 0, data) == ["weights"]
    (tmp_path / "manifest.json").write_text('{"format": "rimet-layer-results", "version": 9}')
    with pytest.raises(ValueError, match="manifest.json"):
        LayerwiseRun("Dice", tmp_path, own)


def test_hash_of_data_knows_values_shapes_and_nesting() -> None:
    batches: list[Any] = [
        torch.ones(2, 3),
        torch.ones(3, 2),
        torch.ones(2, 3).double(),
        [torch.ones(2, 3)],
        {"x": torch.ones(2, 3)},
        {"x": torch.ones(2, 3), "n": 1},
        torch.zeros(2, 3),
    ]
    assert len({data_hash([batch]) for batch in batches}) == len(batches)
    assert data_hash([batches[0].T.contiguous().T]) == data_hash([batches[0]])


def test_a_layer_that_nothing_was_done_to_is_an_error() -> None:
    run = LayerwiseRun("Dice")
    with (
        pytest.raises(RuntimeError, match="fc: neither done nor skipped"),
        run.layer("fc", "Linear"),
    ):
        pass
    assert not run.report.layers


def test_layer_seeds_differ_by_layer_and_seed() -> None:
    seeds = {layer_seed(seed, path) for seed in (0, 1) for path in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_walk_that_is_stopped_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    original = copy.deepcopy(model.state_dict())
    batches = [torch.randn(5, 6), torch.randn(3, 6)]

    def treat(folder: Path | None, stop_at: str | None = None) -> nn.Module:
        """Adds noise to each layer that depends on what the layers so far treated give it."""
        quant = copy.deepcopy(model)
        walk = StreamingWalk(model, quant, batches)
        run = LayerwiseRun("Noise", folder, fingerprint(model, {}, 7, data_hash(walk.batches)))
        for visit in walk.visit(["0", "1", "2", "3"]):
            with run.layer(visit.path, "Linear") as layer:
                if visit.path == stop_at:
                    raise KeyboardInterrupt
                if layer.stored is None:
                    generator = torch.Generator().manual_seed(layer_seed(7, visit.path))
                    noise = torch.randn(6, 6, generator=generator)
                    weight = (
                        visit.quant_module.weight.detach() + noise * visit.quant_inputs[1].std()
                    )
                    layer.done({"weight": weight})
            visit.quant_module.weight = nn.Parameter(layer.tensors["weight"])
        return quant

    expected = treat(None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        treat(tmp_path, stop_at="2")
    resumed = treat(tmp_path).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
