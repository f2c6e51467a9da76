"""The examples in smoke mode, in processes of their own: what they print and write is right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rimet
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # two short trainings, in processes of their own

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
ROWS = [
    "FP32",
    "W8A8",
    "W4A8 per-tensor",
    "W4A8 per-channel",
    "W4A4",
    "W4A4, QAT 1 epochs",
]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    package = str(Path(rimet.__file__).parents[1])
    environment = dict(os.environ, PYTHONPATH=package, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("quickstart")
    done = run("quickstart.py", "--smoke", "--no-rust", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_table_has_every_row_and_column(quickstart: tuple[Path, str]) -> None:
    _, printed = quickstart
    assert re.search(r"accuracy +vs FP32 +size +calibration +forward", printed)
    for name in ROWS:
        row = re.search(
            rf"^{re.escape(name)} +\d+\.\d\d %.* (\d+\.\d) KiB.* (\d+\.\d\d) x$",
            printed,
            re.MULTILINE,
        )
        assert row, f"no row {name!r} in:\n{printed}"


def test_numbers_are_consistent(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    report = json.loads((out / "quickstart.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ROWS
    for row in rows.values():
        assert f"{row['accuracy']:.2f} %" in printed
    # Six epochs are enough to tell digits apart, and eight bits to keep that.
    assert rows["FP32"]["accuracy"] > 80
    assert abs(rows["W8A8"]["accuracy"] - rows["FP32"]["accuracy"]) <= 1.5
    assert rows["FP32"]["calibration_ms"] is None
    assert all(rows[name]["calibration_ms"] > 0 for name in ROWS[1:])


def test_weights_are_treated_in_every_way(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    rows = json.loads((out / "quickstart.json").read_text())["treated"]
    names = [
        "FP32",
        "W4A8 per-tensor",
        "  Sequential MSE",
        "  AdaRound",
        "  CLE, AdaRound",
        "W4A8 LPBQ, blocks of 8",
    ]
    assert [row["name"] for row in rows] == names
    # A barely trained model: two points are a dozen of its test images.
    nearest = rows[1]["accuracy"]
    assert all(row["accuracy"] >= nearest - 2 for row in rows[2:])
    assert all(row["name"] in printed for row in rows)


def test_unbalanced_model_recovers(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    rows = json.loads((out / "quickstart.json").read_text())["unbalanced"]
    names = ["FP32, unbalanced", "W8A8 per-tensor", "  equalized, corrected"]
    assert [row["name"] for row in rows] == names
    floating, plain, recovered = (row["accuracy"] for row in rows)
    assert plain < floating - 10
    # One point in the full run; this model has hardly been trained.
    assert recovered >= floating - 2.5
    assert f"{recovered:.2f} %" in printed


def test_sizes_follow_from_the_model(
    quickstart: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = quickstart
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from digits import DigitsNet
    from rimet.batch_norm_fold import fold_all_batch_norms
    from torch import nn

    model = DigitsNet().eval()
    fold_all_batch_norms(model, (1, 1, 8, 8))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = sum(m.weight.numel() for m in layers)
    biases = sum(m.bias.numel() for m in layers)
    channels = sum(m.weight.shape[0] for m in layers)
    sizes = {
        row["name"]: row["size_kib"] * 1024
        for row in json.loads((out / "quickstart.json").read_text())["rows"]
    }
    assert sizes["FP32"] == 4 * (weights + biases)
    assert sizes["W4A8 per-tensor"] == weights / 2 + 4 * biases + 4 * len(layers)
    assert sizes["W4A8 per-channel"] == weights / 2 + 4 * biases + 4 * channels
    assert sizes["W8A8"] == weights + 4 * biases + 4 * channels


def test_files(quickstart: tuple[Path, str]) -> None:
    out, _ = quickstart
    encodings = json.loads((out / "digits_w4a4_torch.encodings").read_text())
    weight = encodings["param_encodings"]["classifier.weight"]
    assert {entry["bitwidth"] for entry in weight} == {4}
    assert len(weight) == 10  # one per class: per-channel
    assert "0" in encodings["activation_encodings"]["classifier"]["output"]
    tensors = load_file(out / "digits_io.safetensors")
    assert tensors["input"].shape == (600, 1, 8, 8)
    assert tensors["logits"].shape == (600, 10)
    script = torch.jit.load(str(out / "digits_w4a4.torchscript.pth"))
    assert "rimet::quantize_dequantize" in str(script.inlined_graph)


def test_onnx_file(quickstart: tuple[Path, str]) -> None:
    """onnxruntime sorts the images as the simulation does."""
    out, printed = quickstart
    assert (out / "digits_w4a4.onnx").stat().st_size < 64 * 1024
    report = json.loads((out / "quickstart.json").read_text())
    found = report["onnxruntime"]
    # Sums in another order may move a value to the next step; that may tip the scales for an image.
    assert found["same_class"] >= 99.5
    assert abs(found["accuracy"] - report["rows"][-1]["accuracy"]) <= 0.5
    assert f"{found['accuracy']:.2f} % accuracy" in printed


def test_fresh_process_agreed(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    assert "600 x 10 logits agree bit for bit" in printed
    assert "Logits agree bit for bit between this process, a fresh Python process." in printed
    assert json.loads((out / "quickstart.json").read_text())["logits_agree"] == {"python": True}


def test_fresh_process_notices_one_flipped_bit(
    quickstart: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = quickstart
    tensors = load_file(out / "digits_io.safetensors")
    tensors["logits"].view(torch.int32)[7, 3] ^= 1
    save_file(tensors, tmp_path / "io.safetensors")
    done = run(
        "run_torchscript.py",
        out / "digits_w4a4.torchscript.pth",
        tmp_path / "io.safetensors",
        rimet.ops_library_path(),
    )
    assert done.returncode == 1
    assert "1 of 6000" in done.stdout


def test_fresh_process_needs_the_ops(quickstart: tuple[Path, str]) -> None:
    """Without the ops library the file does not load: nothing else in the process provides them."""
    out, _ = quickstart
    code = "import sys, torch; torch.jit.load(sys.argv[1])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out / "digits_w4a4.torchscript.pth")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "rimet" in done.stderr


def test_rust_program_agrees(quickstart: tuple[Path, str]) -> None:
    out, _ = quickstart
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    program = target / "release" / "examples" / "load_torchscript"
    if not program.exists():
        pytest.skip("the Rust program is not built: cargo build --release --examples")
    libraries = str(Path(torch.__file__).parent / "lib")
    samples = [str(out / name) for name in ("digits_w4a4.torchscript.pth", "digits_io.safetensors")]
    done = subprocess.run(
        [str(program), *samples],
        env=dict(os.environ, LD_LIBRARY_PATH=libraries, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout


def test_quickstart_says_when_there_is_no_cargo(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import quickstart, shutil; from pathlib import Path;"
        "quickstart.subprocess.run = lambda *a, **k: quickstart.subprocess.CompletedProcess(a, 0);"
        "print(quickstart.run_elsewhere(Path('a'), Path('b'), rust=True))"
    )
    package = str(Path(rimet.__file__).parents[1])
    empty = tmp_path / "bin"
    empty.mkdir()
    assert shutil.which("cargo", path=str(empty)) is None
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES)],
        env=dict(os.environ, PYTHONPATH=package, PATH=str(empty)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "there is no cargo here" in done.stdout
    assert "{'python': True}" in done.stdout


def test_qat_example(tmp_path: Path) -> None:
    done = run("qat.py", "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    moved = re.search(r"(\d+) of (\d+) range parameters moved", done.stdout)
    assert moved and moved[1] == moved[2] and int(moved[1]) > 0
    assert "the same logits" in done.stdout
    assert (tmp_path / "qat_w4a4.pt").exists()
