"""How far models get: ``python -m benchmarks.reach``.

The models of :mod:`benchmarks.reach_models` pass through folding, equalization, simulation,
calibration, a quantized forward, ``deepcopy``, TorchScript (trace, save, load) and
``torch.export``, each with default arguments. A step counts against what the unmodified float
model passes, and it is passed if its result computes what it should. The outcome is a table:
``docs/reach.md``.

    python -m benchmarks.reach --write              # all models, writes docs/reach.md
    python -m benchmarks.reach --only resnet bert   # those whose names hold one of these
    python -m benchmarks.reach --smoke              # the few that CI runs
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import math
import multiprocessing
import os
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rimet._graph import bind_inputs, tensors_in
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.cross_layer_equalization import equalize_model
from rimet.quantsim import QuantizationSimModel
from torch import nn

from benchmarks.reach_models import FAMILIES, SMOKE, Entry, entries

ROOT = Path(__file__).resolve().parents[1]
BITS = (16, 8, 4)
STEPS = (
    "fold",
    "equalize",
    "simulate",
    "calibrate",
    "forward",
    "deepcopy",
    "torchscript",
    "export",
)
#: Least SQNR at W16A16, in dB.
REQUIRED = 60.0
#: Least SQNR of what should compute the same but for float rounding, in dB.
SAME = 80.0
#: Standard deviation of the parameters that are zero in a new model.
INITIAL_STD = 0.02


# -- models ----------------------------------------------------------------------------------------


def settle(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Gives a new model statistics that are not degenerate.

    Parameters that are zero (biases, class tokens, whole heads) become normal random numbers: else
    tokens that a mask hides, and class tokens, are constant, and the LayerNorm behind them divides
    by the square root of its epsilon. Batch norms get the second moment of the sample as variance.
    Their mean stays zero: with the means of the sample, too, a deep random network was measured to
    amplify noise on its input by tens of dB.
    """

    def scale(norm: Any, args: tuple[torch.Tensor]) -> None:
        norm.running_var.fill_(args[0].square().mean())

    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            parameter.normal_(std=INITIAL_STD)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(scale) for norm in norms]
    run(model)
    for handle in handles:
        handle.remove()


class Runner:
    """Calls models on the example input; where ``observe`` names modules, gives what these return
    beside the result.

    Each call starts from the same seed: ViLT picks patches at random in evaluation mode too.
    """

    def __init__(self, sample: Any, observe: tuple[str, ...]) -> None:
        self.sample = sample
        self.observe = observe

    def __call__(self, model: nn.Module) -> Any:
        """The result of a model."""
        args, kwargs = bind_inputs(model, self.sample)
        torch.manual_seed(0)
        return model(*args, **kwargs)

    def observed(self, model: nn.Module) -> Any:
        """What is compared of a model."""
        if not self.observe:
            return self(model)
        seen: list[Any] = []
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda module, args, output: seen.append(output)
            )
            for path in self.observe
        ]
        self(model)
        for handle in handles:
            handle.remove()
        return seen

    def scripted(self, model: nn.Module) -> Any:
        """The result of a model that was traced, saved and loaded."""
        args, kwargs = bind_inputs(model, self.sample)
        options: dict[str, Any] = {"check_trace": False, "strict": False}
        options |= {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
        buffer = io.BytesIO()
        torch.manual_seed(0)
        torch.jit.save(torch.jit.trace(model, **options), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        torch.manual_seed(0)
        return loaded(*args, **kwargs)

    def exported(self, model: nn.Module) -> Any:
        """The result of a model that was exported."""
        args, kwargs = bind_inputs(model, self.sample)
        exported = torch.export.export(model, args, kwargs).module()
        torch.manual_seed(0)
        return exported(*args, **kwargs)


def sqnr(expected: Any, got: Any) -> float:
    """Ratio of signal to quantization noise over all floating-point results, in dB.

    Raises:
        ValueError: numbers or shapes of the tensors differ, or there is no signal.
    """
    signal, noise = 0.0, 0.0
    for a, b in zip(tensors_in(expected), tensors_in(got), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"expected a result of shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.is_floating_point():
            a, b = a.double(), b.double()
            finite = a.isfinite()
            signal += a[finite].square().sum().item()
            noise += (a - b)[finite].square().sum().item()
    if not signal:
        raise ValueError("expected a result that is not zero")
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _require_same(expected: Any, got: Any) -> None:
    """Raises unless two results are the same but for float rounding."""
    numbers = [t for t in tensors_in(expected) if t.is_floating_point() and t.any()]
    ratio = sqnr(expected, got) if numbers else math.inf
    if not ratio >= SAME:
        raise ValueError(f"expected the same result, got {ratio:.1f} dB")


# -- steps -----------------------------------------------------------------------------------------


def judge(entry: Entry) -> dict[str, Any]:
    """Takes one model through all steps.

    Returns:
        For each step ``[float model passes, rimet passes]``, the errors, the number of quantizers,
        what is left in floating point, and the SQNR by bit-width.
    """
    torch.manual_seed(0)
    model, sample = entry.make()
    model.eval()
    run = Runner(sample, entry.observe)
    result: dict[str, Any] = {"steps": {}, "errors": {}, "sqnr": {}}

    def attempt(name: str, action: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, action()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
            result["errors"][name] = text
            return False, None

    def step(
        name: str, ours: Callable[[], Any], plain: Callable[[], Any] | None = None
    ) -> tuple[bool, Any]:
        float_passes = plain is None or attempt(f"{name} of the float model", plain)[0]
        passes, value = attempt(name, ours)
        result["steps"][name] = [float_passes, passes]
        return passes, value

    with torch.no_grad():
        if not entry.trained:
            settle(model, run)
        expected, output = run.observed(model), run(model)

        def changed(change: Callable[..., Any]) -> nn.Module:
            other = copy.deepcopy(model)
            change(other, None, sample)
            _require_same(expected, run.observed(other))
            return other

        passes, folded = step("fold", lambda: changed(fold_all_batch_norms))
        step("equalize", lambda: changed(equalize_model))
        base = folded if passes else model

        def simulate(bits: int) -> QuantizationSimModel:
            torch.manual_seed(0)
            return QuantizationSimModel(base, sample, default_output_bw=bits, default_param_bw=bits)

        _, sim = step("simulate", lambda: simulate(BITS[0]))
        if sim is None or not step("calibrate", lambda: sim.compute_encodings(run))[0]:
            return result
        passes, got = step("forward", lambda: run(sim.model))
        if not passes:
            return result

        def measure(bits: int) -> float:
            other = sim if bits == BITS[0] else simulate(bits)
            if other is not sim:
                other.compute_encodings(run)
            return sqnr(expected, run.observed(other.model))

        for bits in BITS:
            passes, ratio = attempt(f"SQNR at {bits} bits", lambda bits=bits: measure(bits))  # type: ignore[misc]
            result["sqnr"][str(bits)] = ratio if passes else None
        result["quantizers"] = sum(sim.report.num_quantizers.values())
        result["functional"] = len(sim.report.functional_ops)
        reasons: dict[str, dict[str, int]] = {}
        for path, reason in sim.report.unquantized:
            what = path.rpartition(": ")[2].partition(" (call")[0] if "(call" in path else "module"
            counts = reasons.setdefault(reason, {})
            counts[what] = counts.get(what, 0) + 1
        result["left"] = reasons
        step(
            "deepcopy",
            lambda: _require_same(got, run(copy.deepcopy(sim.model))),
            lambda: _require_same(output, run(copy.deepcopy(model))),
        )
        step(
            "torchscript",
            lambda: _require_same(got, run.scripted(sim.model)),
            lambda: _require_same(output, run.scripted(model)),
        )
        step(
            "export",
            lambda: _require_same(got, run.exported(sim.model)),
            lambda: _require_same(output, run.exported(model)),
        )
    return result


def _judge_quietly(entry: Entry) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        result = judge(entry)
    except Exception as error:  # the model itself
        result = {"steps": {}, "errors": {"model": repr(error)[:300]}, "sqnr": {}}
    return {"family": entry.family, **result, "seconds": time.process_time() - start}


def _send_judgement(name: str, to: Connection) -> None:
    # torch.export prints the graph of a model that it fails on.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    to.send(_judge_quietly(next(entry for entry in entries() if entry.name == name)))


def judge_apart(entry: Entry, limit: float) -> dict[str, Any]:
    """:func:`judge` in a process of its own, which gives its memory back and may die.

    Args:
        entry: the model.
        limit: seconds after which the process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once.
    context.set_forkserver_preload(
        [
            "rimet.quantsim",
            "rimet.cross_layer_equalization",
            "torchvision",
            "transformers.modeling_utils",
            "torch._dynamo",
        ]
    )
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_judgement, args=(entry.name, send))
    process.start()
    send.close()
    problem = f"took more than {limit:.0f} s"
    try:
        if receive.poll(limit):
            result: dict[str, Any] = receive.recv()
            return result
    except EOFError:
        problem = "the process died"
    finally:
        process.kill()
        process.join()
    return {"family": entry.family, "steps": {}, "errors": {"model": problem}, "sqnr": {}}


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """What falls short, a line for each: steps that only the float model passes, models that did not
    run, SQNR below :data:`REQUIRED` or rising with fewer bits.
    """
    lines = []
    for name, result in results.items():
        if "model" in result["errors"]:
            lines.append(f"{name}: {result['errors']['model']}")
        for step, (plain, ours) in result["steps"].items():
            if plain and not ours:
                lines.append(f"{name}: {step}: {result['errors'][step]}")
        ratios = [result["sqnr"].get(str(bits)) for bits in BITS]
        measured = [math.nan if ratio is None else ratio for ratio in ratios]
        if result["sqnr"] and not (
            measured[0] >= REQUIRED and measured[0] > measured[1] > measured[2]
        ):
            lines.append(f"{name}: SQNR {', '.join(f'{ratio:.1f}' for ratio in measured)} dB")
    return lines


# -- table -----------------------------------------------------------------------------------------

#: Reason that the report gives for what is left in floating point -> its letter in the table.
LETTERS = {
    "a mask, or computed from integers and constants alone": "c",
    "adds what integers and constants alone determine, such as a mask": "m",
    "its result holds infinities or the largest numbers of its dtype": "u",
    "compiled by torch.jit.script; what uses its result quantizes its input": "s",
    "returns what it is given": "i",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results as a Markdown table."""

    def mark(pair: list[bool] | None) -> str:
        words = ("no", "yes")
        return "-" if pair is None else f"{words[pair[0]]} / {words[pair[1]]}"

    def decibel(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    def left(reasons: dict[str, dict[str, int]]) -> str:
        return ", ".join(
            f"{count} {what} ({LETTERS.get(reason, reason)})"
            for reason, counts in reasons.items()
            for what, count in counts.items()
        )

    lines = [
        "| model | " + " | ".join(STEPS) + " | quantizers | of functions | "
        "W16A16 | W8A8 | W4A4 | left in floating point |",
        "|---|" + "---|" * (len(STEPS) + 6),
    ]
    for name, result in results.items():
        cells = [mark(result["steps"].get(step)) for step in STEPS]
        cells += [str(result.get("quantizers", "-")), str(result.get("functional", "-"))]
        cells += [decibel(result["sqnr"].get(str(bits))) for bits in BITS]
        lines.append(f"| {name} | {' | '.join(cells)} | {left(result.get('left', {}))} |")
    return "\n".join(lines)


def totals(results: dict[str, dict[str, Any]]) -> str:
    """One sentence on all results."""
    pairs = [pair for result in results.values() for pair in result["steps"].values()]
    plain = sum(a for a, _ in pairs)
    both = sum(a and b for a, b in pairs)
    whole = sum(
        "model" not in result["errors"] and all(b or not a for a, b in result["steps"].values())
        for result in results.values()
    )
    good = sum((r["sqnr"].get(str(BITS[0])) or 0.0) >= REQUIRED for r in results.values())
    return (
        f"{len(results)} models. The float models pass {plain} of {len(pairs)} steps, rimet {both} "
        f"of those {plain}; {whole} models pass every step that their float model passes. SQNR at "
        f"W16A16 is at least {REQUIRED:.0f} dB for {good} models."
    )


HEADER = """# Reach

Made by `python -m benchmarks.reach --write`, at commit {commit}, with torch {torch}, torchvision {torchvision} and
transformers {transformers}. {totals}

**Steps.** Each cell says whether the unmodified float model passes the step, and whether rimet does. Both run with their
default arguments. A step is passed if its result is right: a folded or equalized model computes what it did, a copy, a traced, saved
and loaded and an exported simulation what the simulation does ({same:.0f} dB, that is, float rounding). The float model passes `fold`,
`equalize`, `simulate`, `calibrate` and `forward` if it runs.

**Models.** Torchvision's are built with their default arguments, on small images (detectors also work with fewer proposals, MViT and
MaxViT with the size of image that they need); those of transformers from small configurations (`benchmarks/reach_models.py`). Every
process has one thread, and every run of a model starts from the same seed (ViLT picks patches at random).

**Initialisation.** Weights are random, as the constructors draw them (seed 0), but for two things. Parameters that are zero in a new model
(biases, class tokens, whole classification heads) are normal random numbers with a standard deviation of {std}. Batch norms have the second moment of their input as
variance, and a mean of zero; with the batch's own mean as well, ResNet-50 has 36 dB at W16A16 instead of 80, while 16-bit noise on its input alone already gives 41: a random network with those statistics amplifies noise
by itself. The models under "trained weights" are taken as they are, with the statistics that training gave them.

**SQNR** of the output, in dB, folded, per-channel weights (the default configuration), calibrated on the input it is measured on. For detectors it is that of the backbone and the heads, as the
choice of boxes depends on the values.

Why zero parameters matter: in a new DeBERTa the hidden states of the tokens that the mask hides are zero, as are those of a new DeiT's class
tokens, so that what the first LayerNorm sees of them is nothing but the rounding of one quantizer (the residual addition in front of it), which it divides by the square root of its epsilon. With zeros, DeBERTa has
50.3 dB at W16A16 with that single quantizer on and all others off; the tokens that the mask does not hide have 92 dB.

Why EfficientNetV2-S with random weights stays below 60: no quantizer is to blame, there are 576 of them. Each of a sample of 60 alone gives at least 77.7 dB.
Kind by kind, all others off: weights of convolutions 60.5, their outputs 66.8, SiLU 68.9, additions 69.6, multiplications 72.3, the input 77.9, all else above 84; these noise powers add
up to 58.5 dB, and all together give 57.3. The network amplifies noise: white noise at 96 dB on its input leaves 89 dB at its output. AIMET 2.42 gets 54.2 dB on the same folded model and
input (14.0 at W8A8, -53.3 at W4A4), rimet with AIMET's placement (`quantize_functional_ops=False`) 59.4. The same architecture after 60 steps of training is under "trained weights".

**Left in floating point**, with the reason: {letters}. `sim.report` says it for each operation.
"""


def _commit() -> str:
    """The commit of this tree, marked if the code was changed since."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=, changed"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def page(results: dict[str, dict[str, Any]], commit: str) -> str:
    """The text of ``docs/reach.md``."""
    import torchvision
    import transformers

    parts = [
        HEADER.format(
            commit=commit,
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            transformers=transformers.__version__,
            totals=totals(results),
            same=SAME,
            std=INITIAL_STD,
            letters="; ".join(f"({letter}) {reason}" for reason, letter in LETTERS.items()),
        )
    ]
    missing = [entry.name for entry in entries() if entry.name not in results]
    if missing:
        parts.append(f"Not run for this page, so not judged: {', '.join(missing)}.\n")
    short = failures(results)
    if short:
        lines = "\n".join(f"- {line}" for line in short).replace(f"{ROOT}/", "")
        parts.append(f"What falls short:\n\n{lines}\n")
    for family in FAMILIES:
        members = {name: r for name, r in results.items() if r["family"] == family}
        if members:
            parts.append(f"## {family[0].upper()}{family[1:]}\n\n{table(members)}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the number of :func:`failures`."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.reach")
    parser.add_argument("--only", nargs="*", help="parts of the names of models")
    parser.add_argument("--smoke", action="store_true", help="the few models that CI runs")
    parser.add_argument(
        "--json", type=Path, help="keeps the results; a run that was cut off goes on"
    )
    parser.add_argument("--write", action="store_true", help="write docs/reach.md")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one model")
    options = parser.parse_args(argv)
    kept: dict[str, Any] = {"commit": _commit(), "results": {}}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text())
    results: dict[str, dict[str, Any]] = kept["results"]
    if kept["commit"] != _commit():
        parser.error(f"{options.json} holds results of commit {kept['commit']}, not {_commit()}")
    for entry in entries():
        chosen = entry.name in SMOKE if options.smoke else True
        if options.only:
            chosen = any(part.lower() in entry.name.lower() for part in options.only)
        if not chosen or entry.name in results:
            continue
        result = judge_apart(entry, options.limit)
        results[entry.name] = result
        ratios = [None if r is None else round(r, 1) for r in result["sqnr"].values()]
        print(f"{entry.name}: {ratios} dB, {result.get('seconds', 0):.1f} s", flush=True)
        for line in failures({entry.name: result}):
            print(f"  {line}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))
    if options.write:
        (ROOT / "docs" / "reach.md").write_text(page(results, kept["commit"]))
    print(totals(results))
    return len(failures(results))


if __name__ == "__main__":
    raise SystemExit(main())
