"""Imports point one way: the rule of docs/architecture.md, held by a check."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What each module of the engine may name.
ENGINE = {
    "error": set(),
    "encoding": {"error"},
    "kernels": {"encoding", "error"},
    "ops": {"encoding", "error", "kernels"},
    "calibration": {"encoding", "error", "kernels", "ops"},
    "graph": {"encoding", "error"},
    "ptq": {"calibration", "encoding", "error", "graph", "kernels", "ops"},
    "export": {"encoding", "error"},
    "nn": {"calibration", "encoding", "error", "ops"},
}
# Inside the package: lower layers first.
PACKAGE = ["common", "quantization", "nn", "_graph", "meta", "quantsim", "_onnx"]


def test_engine_layers() -> None:
    for module, allowed in ENGINE.items():
        folder = ROOT / "src" / module
        files = sorted(folder.rglob("*.rs")) if folder.is_dir() else [folder.with_suffix(".rs")]
        for file in files:
            # Tests may look around.
            text = file.read_text().split("#[cfg(test)]")[0]
            used = set(re.findall(r"crate::([a-z_]+)", text)) - {module}
            assert used <= allowed, f"{file.relative_to(ROOT)} uses {used - allowed}"
            assert "pyo3" not in text, f"{file.relative_to(ROOT)} names pyo3"


def test_package_layers() -> None:
    for level, package in enumerate(PACKAGE):
        above = set(PACKAGE[level + 1 :])
        for file in sorted((ROOT / "python" / "rimet" / package).rglob("*.py")):
            # Imports at module level only: one inside a function is not a dependency of the layer.
            lines = [
                line
                for line in file.read_text().split("if TYPE_CHECKING:")[0].splitlines()
                if not line.startswith((" ", "\t"))
            ]
            used = set(re.findall(r"(?:from|import) rimet\.([a-z_]+)", "\n".join(lines)))
            assert not used & above, f"{file.relative_to(ROOT)} imports {used & above}"
