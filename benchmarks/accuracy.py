"""Accuracy with weights of few bits, beside AIMET's: ``python -m benchmarks.accuracy``.

The demo's network and a small transformer are trained on handwritten digits, once for each seed, and
quantized with one weight scale per tensor and 8-bit activations by each technique; last, in blocks
with integer scales (LPBQ). AIMET 2.42 makes the same calls on the same trained weights
(``accuracy_worker.py``). Printed: mean and standard deviation over the seeds of the accuracy on 600 test
images.

    python -m benchmarks.accuracy            # 5 seeds, some 10 minutes
    python -m benchmarks.accuracy --smoke    # one seed, hardly trained, no AIMET: does it still run?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_worker import EXAMPLES, SETTINGS, accuracy, make_model
from benchmarks.peer import find_python

sys.path.insert(0, str(EXAMPLES))

from digits import Split, load_digits, train, train_float_model

WORKER = Path(__file__).with_name("accuracy_worker.py")
RESULTS = Path(__file__).with_name("results") / "accuracy.json"
CALIBRATION = 256
#: Bits of a weight: few enough for rounding to nearest to lose something.
BITS = {"digits": 4, "transformer": 3}


def trained(name: str, data: Split, seed: int, epochs: int) -> torch.nn.Module:
    if name == "digits":
        return train_float_model(data, epochs=epochs, seed=seed)
    torch.manual_seed(seed)
    model = make_model(name, "rimet")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    train(model, data, optimizer, epochs=epochs, seed=seed)
    return model


def prepare(folder: Path, seeds: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Trains the models and writes them, with the data, for the workers; yields their accuracy."""
    training, test = load_digits()
    for name, bits in BITS.items():
        for seed in range(seeds):
            model = trained(name, training, seed, epochs)
            work = {
                "state": model.state_dict(),
                "bits": bits,
                "calibration": training.images[:CALIBRATION],
                "test": test.images,
                "labels": test.labels,
            }
            torch.save(work, folder / f"{name}-{seed}.pt")
            found = accuracy(model, work)
            yield {"model": name, "seed": seed, "setting": "FP32", "accuracy": found}


def work(
    python: Path | str, package: str, folder: Path, iterations: int, only: list[str]
) -> list[dict[str, Any]]:
    """Runs a worker to its end."""
    environment = dict(os.environ)
    if package != "rimet":
        environment.pop("PYTHONPATH", None)
    command = [str(python), "-W", "ignore", str(WORKER), package, str(folder)]
    done = subprocess.run(
        [*command, "--iterations", str(iterations), "--only", *only],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr[-2000:]}")
    return [{"package": package, **json.loads(line)} for line in done.stdout.splitlines()]


def summary(results: list[dict[str, Any]], model: str, setting: str, package: str) -> str:
    found = [
        r["accuracy"]
        for r in results
        if (r["model"], r["setting"], r["package"]) == (model, setting, package)
    ]
    if not found:
        return ""
    return f"{statistics.mean(found):.2f} ± {statistics.pstdev(found):.2f}"


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| model, weights | setting | rimet | AIMET |", "|---|---|---|---|"]
    for model, bits in BITS.items():
        for setting in ("FP32", *SETTINGS):
            own, peer = (summary(results, model, setting, p) for p in ("rimet", "aimet_torch"))
            if own:
                lines.append(f"| {model}, W{bits}A8 | {setting} | {own} | {peer} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, hardly trained, no AIMET")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=24, help="of training")
    parser.add_argument("--iterations", type=int, default=500, help="of AdaRound, per layer")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="only this setting")
    parser.add_argument("--no-aimet", action="store_true", help="leave AIMET out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    options = parser.parse_args(arguments)
    seeds, epochs, iterations = options.seeds, options.epochs, options.iterations
    if options.smoke:
        seeds, epochs, iterations = 1, 1, 2
    only = options.only or list(SETTINGS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [{"package": "rimet", **r} for r in prepare(folder, seeds, epochs)]
        results += work(sys.executable, "rimet", folder, iterations, only)
        peer = find_python()
        if options.smoke or options.no_aimet:
            print("AIMET: left out, as asked for")
        elif peer is None:
            print("AIMET: left out, no environment for it here (`make peers` creates one)")
        else:
            results += work(peer, "aimet_torch", folder, iterations, only)
    print(f"{seeds} seed(s), {epochs} epochs, AdaRound of {iterations} iterations\n")
    print(table(results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
