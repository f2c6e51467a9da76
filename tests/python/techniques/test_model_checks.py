"""ModelValidator and ArchChecker: what they find, what they say, what users add."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet.arch_checker.arch_checker import ArchChecker
from rimet.arch_checker.constants import ArchCheckerReportConstants
from rimet.model_validator.model_validator import ModelValidator
from rimet.model_validator.validation_checks import (
    validate_for_missing_modules,
    validate_for_reused_modules,
)
from rimet.nn.modules import custom
from torch import nn


class Careless(nn.Module):
    """A reused activation and a functional addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.first(x))
        return (x + self.relu(self.second(x))).flatten(1)


X = torch.zeros(2, 3, 8, 8)


@pytest.fixture
def fresh_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks added by a test go away with it."""
    nodes = {cls: list(checks) for cls, checks in ArchChecker._node_check_dict.items()}
    monkeypatch.setattr(ArchChecker, "_node_check_dict", nodes)
    monkeypatch.setattr(ArchChecker, "_pattern_checks", list(ArchChecker._pattern_checks))
    monkeypatch.setattr(ArchChecker, "_export_dir", ArchChecker._export_dir)
    monkeypatch.setattr(
        ModelValidator, "_validation_checks", list(ModelValidator._validation_checks)
    )


def test_validator_names_what_it_finds(caplog: pytest.LogCaptureFixture) -> None:
    model = Careless()
    assert not ModelValidator.validate_model(model, X)
    assert "relu (2 times)" in caplog.text
    assert "Add in the model itself" in caplog.text
    assert "validate_for_reused_modules, validate_for_missing_modules failed" in caplog.text
    assert "flatten" not in caplog.text, "moves data only"

    assert validate_for_reused_modules(model, X, layers_to_exclude=[model.relu])
    assert validate_for_missing_modules(model, X, layers_to_exclude=[model])
    assert not validate_for_missing_modules(model, X, layers_to_exclude=[model.relu])


def test_validator_passes_a_modular_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    assert ModelValidator.validate_model(model, X)


def test_validator_runs_checks_of_the_user(
    fresh_checks: None, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    def no_convolutions(model: nn.Module, model_input: Any, **kwargs: Any) -> bool:
        seen.append((model, kwargs))
        return False

    ModelValidator.add_check(no_convolutions)
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert not ModelValidator.validate_model(model, X, layers_to_exclude=None)
    assert seen == [(model, {"layers_to_exclude": None})]
    assert "no_convolutions failed" in caplog.text


class Arch(nn.Module):
    """One of everything that the checker knows."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.norm = nn.Conv2d(3, 33, 3, padding=1), nn.BatchNorm2d(33)
        self.prelu, self.silu = nn.PReLU(), nn.SiLU()
        self.padded = nn.Conv2d(33, 64, 3, padding=1)
        self.left, self.right = nn.Conv2d(64, 32, 1), nn.Conv2d(64, 32, 1)
        self.concat, self.behind_concat = custom.Concat(axis=1), nn.BatchNorm2d(64)
        self.pool, self.standalone = nn.AvgPool2d(2), nn.BatchNorm2d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.padded(self.prelu(self.norm(self.narrow(x))))
        x = F.relu(x)
        x = self.behind_concat(self.concat(self.left(x), self.right(x)))
        return self.standalone(self.pool(self.silu(x)))


def report(folder: Path) -> list[tuple[str, str, str]]:
    """The rows of the report, read as a person would."""
    text = (folder / "arch_checker_report.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [[html.unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]
    if cells:
        assert cells[0] == ArchCheckerReportConstants.OUTPUT_CSV_HEADER
    return [(row[0], row[1], row[2]) for row in cells[1:]]


def test_report(fresh_checks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert (
        ArchChecker.check_model_arch(Arch().eval(), torch.zeros(1, 3, 8, 8), str(tmp_path)) is None
    )
    messages = ArchCheckerReportConstants.ERR_MSG_DICT
    found = [
        (place, next(name for name, text in messages.items() if text["Issue"] == issue))
        for place, issue, advice in report(tmp_path)
    ]
    assert found == [
        ("Arch.narrow", "_check_conv_channel_32_base"),
        ("Arch.narrow", "_check_conv_channel_larger_than_32"),
        ("Arch.prelu", "_check_prelu"),
        ("Arch.padded", "_check_conv_channel_32_base"),
        ("Arch.silu", "_check_silu"),
        ("Arch.behind_concat", "_check_batch_norm_fold"),
        ("Arch.standalone", "_check_batch_norm_fold"),
        ("Arch.padded", "_check_intermediate_padding"),
        ("Arch.behind_concat", "_check_foldable_bn_with_split"),
    ]
    assert "9 issues, report in" in caplog.text
    assert not list(tmp_path.glob(".*")), "no half file is left"


def test_nothing_to_report(fresh_checks: None, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    ArchChecker.set_export_dir(str(tmp_path))
    ArchChecker.check_model_arch(model, torch.zeros(1, 32, 8, 8))
    assert report(tmp_path) == []
    assert "No issues." in (tmp_path / "arch_checker_report.html").read_text()


def test_checks_of_the_user(fresh_checks: None, tmp_path: Path) -> None:
    def no_relu(module: nn.Module) -> bool:
        return False

    def first_is_wrong(connected_graph: Any) -> list[Any]:
        return [connected_graph.ordered_ops[0]]

    ArchChecker.add_node_check(nn.ReLU, no_relu)
    ArchChecker.add_node_check(nn.ReLU, lambda module: True)
    ArchChecker.add_pattern_check(first_is_wrong)
    ArchChecker.add_pattern_check(lambda graph: None)
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU())
    ArchChecker.check_model_arch(model, torch.zeros(1, 32, 8, 8), str(tmp_path))
    rows = report(tmp_path)
    assert [row[0] for row in rows] == ["Sequential.1", "Sequential.0"]
    assert rows[0][1] == "Undefined issue from check: no_relu"
    assert rows[1][2] == "Undefined recommendation from check: first_is_wrong"
