"""AdaRound and Sequential MSE: time, reconstruction error, growth with depth, memory.

The unit of a row is its floor: what is left of the work if everything else cost nothing. For AdaRound
that is, for each layer, the forward pass and the weight gradient of as many minibatches as there are
iterations; for Sequential MSE each layer's forward pass on all data for each candidate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rimet.adaround import Adaround, AdaroundParameters
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import set_grouped_blockwise_quantization_for_weights
from rimet.seq_mse import apply_seq_mse
from torch import Tensor, nn

from benchmarks import ptq_models
from benchmarks.harness import KEEP_MEMORY, Contestant, Finding, Reach, Remote, Row, Size, Timed

SECTION = "ptq"
BITS = 4
#: Samples of one step of AdaRound.
MINIBATCH = 32
Model = Mapping[str, Any]


def rows(size: Size) -> Iterator[Row]:
    iterations, candidates = size.pick(100, 2), size.pick(20, 2)
    for folded in (False, True) if not size.toy else (True,):
        label = "ResNet-18, batch norms folded" if folded else "ResNet-18"
        for number, batch in splits(size, 64):
            model = {
                "name": "resnet18",
                "arguments": [folded],
                "shape": [batch, 3, 64, 64],
                "num_batches": number,
            }
            data = f"{number} x {batch} images"
            yield adaround(f"{label}, {data}", model, iterations)
            yield seq_mse(f"{label}, {data}", model, candidates)
    # BERT's widths; one layer, since AIMET takes minutes for each.
    width = size.pick(768, 64)
    for number, batch in splits(size, 64):
        encoder = {
            "name": "encoder",
            "arguments": [1, width],
            "shape": [batch, size.pick(128, 4), width],
            "num_batches": number,
        }
        data = f"{number} x {batch} sequences"
        yield seq_mse(f"encoder, {data}", encoder, candidates)
        block = size.pick(64, 16)
        yield seq_mse(f"encoder, LPBQ, {data}", encoder, candidates, lpbq_block=block)
    for depth in (10, 20, 40, 80) if not size.toy else (2,):
        yield growth(depth, size)
    yield memory(size)


def splits(size: Size, samples: int) -> list[tuple[int, int]]:
    """Numbers and sizes of batches. AIMET runs each candidate of each layer batch by batch, so what it
    takes depends on how the samples are split.
    """
    return [(samples, 1), (samples // 16, 16)] if not size.toy else [(1, 2)]


def seq_mse(label: str, model: Model, candidates: int, lpbq_block: int | None = None) -> Row:
    """Sequential MSE of all layers. The simulation is made ahead of each call."""
    output = Output()

    def build() -> Timed:
        original, batches = ptq_models.build(**model)
        simulations: list[QuantizationSimModel] = []

        def before() -> None:
            simulations[:] = [simulation(original, batches, lpbq_block)]

        def run() -> None:
            apply_seq_mse(simulations[0], batches, candidates, progress=False)
            output.weights = simulations[0].model

        return Timed(run, before)

    parameters = {
        "model": dict(model),
        "candidates": candidates,
        "lpbq_block": lpbq_block,
        "output": str(output.aimets),
    }
    return Row(
        SECTION,
        f"Sequential MSE, {label}, {candidates} candidates",
        0,
        [
            Contestant("rimet", build),
            Contestant("floor", lambda: forward_passes(model, candidates)),
            Remote("AIMET", "seq_mse", parameters),
        ],
        unit="floor",
        reaches=[Reach("rimet", "AIMET", 1 / 15)],
        lasting_turns=3,
        findings=lambda: errors(model, output),
    )


def adaround(label: str, model: Model, iterations: int) -> Row:
    """AdaRound of all layers, the simulation and its ranges included."""
    output = Output()

    def build() -> Callable[[], None]:
        original, batches = ptq_models.build(**model)

        def run() -> None:
            params = AdaroundParameters(
                batches, len(batches), default_num_iterations=iterations, progress=False
            )
            with tempfile.TemporaryDirectory() as folder:
                output.weights = Adaround.apply_adaround(
                    original, batches[0], params, folder, "rounded", default_param_bw=BITS
                )

        return run

    parameters = {"model": dict(model), "iterations": iterations, "output": str(output.aimets)}
    return Row(
        SECTION,
        f"AdaRound, {label}, {iterations} iterations",
        0,
        [
            Contestant("rimet", build),
            Contestant("floor", lambda: minibatches(model, iterations)),
            Remote("AIMET", "adaround", parameters),
        ],
        unit="floor",
        reaches=[Reach("rimet", "AIMET", 1 / 4)],
        lasting_turns=3,
        findings=lambda: errors(model, output),
    )


def growth(depth: int, size: Size) -> Row:
    """A chain of equal layers against as many layers in chains of ten."""
    width, base = size.pick(256, 8), size.pick(10, 2)
    candidates = size.pick(20, 2)
    output = Output()

    def model(depth: int) -> dict[str, Any]:
        shape = [size.pick(256, 4), width]
        return {"name": "chain", "arguments": [depth, width], "shape": shape, "num_batches": 4}

    def build(depth: int, times: int) -> Timed:
        original, batches = ptq_models.build(**model(depth))
        simulations: list[QuantizationSimModel] = []
        # What the first call of anything costs is no part of the growth.
        few, inputs = ptq_models.build(**model(2))
        apply_seq_mse(simulation(few, inputs), inputs, candidates, progress=False)

        def before() -> None:
            simulations[:] = [simulation(original, batches) for _ in range(times)]

        def run() -> None:
            for sim in simulations:
                apply_seq_mse(sim, batches, candidates, progress=False)
            if times == 1:
                output.weights = simulations[0].model

        return Timed(run, before)

    parameters = {
        "model": model(depth),
        "candidates": candidates,
        "lpbq_block": None,
        "output": str(output.aimets),
    }
    return Row(
        SECTION,
        f"Sequential MSE, chain of {depth} layers",
        depth,
        [
            Contestant("rimet", lambda: build(depth, 1)),
            Contestant("linear", lambda: build(base, depth // base)),
            Remote("AIMET", "seq_mse", parameters),
        ],
        unit="linear",
        reaches=[Reach("rimet", "linear", 1.5)],
        lasting_turns=3,
        findings=lambda: errors(model(depth), output),
    )


def memory(size: Size) -> Row:
    """Both techniques with data of four times the memory budget, in a process of its own."""
    measured: list[dict[str, float]] = []

    def run() -> None:
        command = [sys.executable, "-m", "benchmarks.ptq_memory", *(["--toy"] if size.toy else [])]
        # With the allocator as it is by default: what is freed goes back to the system.
        environment = {key: text for key, text in os.environ.items() if key not in KEEP_MEMORY}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        measured[:] = [json.loads(done.stdout)]

    def found() -> list[Finding]:
        (values,) = measured
        return [
            Finding(
                f"{technique}: peak RssAnon above the model's own, over the budget",
                values[technique] / values["budget"],
                values[technique] <= values["budget"],
            )
            for technique in ("seq_mse", "adaround")
        ]

    return Row(
        SECTION,
        "process with data of four times the memory budget",
        0,
        [Contestant("rimet", lambda: run)],
        unit="rimet",
        lasting_turns=1,
        findings=found,
    )


# Floors


def layer_inputs(model: Model) -> list[tuple[nn.Module, Tensor]]:
    """Every layer with its input on all batches."""
    original, batches = ptq_models.build(**model)
    kept: dict[nn.Module, list[Tensor]] = {}
    for module in original.modules():
        if isinstance(module, ptq_models.LAYERS):
            module.register_forward_hook(
                lambda module, args, _: kept.setdefault(module, []).append(args[0])
            )
    with torch.no_grad():
        for batch in batches:
            original(batch)
    return [(module, torch.cat(inputs)) for module, inputs in kept.items()]


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return torch.conv2d(
            x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    return nn.functional.linear(x, layer.weight)


def forward_passes(model: Model, times: int) -> Callable[[], None]:
    work = layer_inputs(model)

    def run() -> None:
        with torch.no_grad():
            for layer, x in work:
                for _ in range(times):
                    forward(layer, x)

    return run


def minibatches(model: Model, times: int) -> Callable[[], None]:
    work = [(layer, x[:MINIBATCH]) for layer, x in layer_inputs(model)]

    def run() -> None:
        for layer, x in work:
            for _ in range(times):
                output = forward(layer, x)
                torch.autograd.grad(output, layer.weight, output)

    return run


# Quality


class Output:
    """What came out: our weights, and the file that AIMET's process writes."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.aimets = Path(self._folder.name) / "weights.pt"
        #: A rounded model or the model of a simulation.
        self.weights: nn.Module | None = None


def simulation(
    original: nn.Module, batches: Sequence[Tensor], lpbq_block: int | None = None
) -> QuantizationSimModel:
    sim = QuantizationSimModel(original, dummy_input=batches[0], default_param_bw=BITS)
    if lpbq_block is not None:
        set_grouped_blockwise_quantization_for_weights(
            sim, [nn.Linear], BITS, True, 2 * BITS, lpbq_block
        )
    return sim


def errors(model: Model, output: Output) -> list[Finding]:
    """Reconstruction error over that of AIMET's weights: on average, and of the worst layer."""
    if output.weights is None or not output.aimets.exists():
        return []
    original, batches = ptq_models.build(**model)
    simulated = any(hasattr(module, "param_quantizers") for module in output.weights.modules())
    read = ptq_models.quantized_weights if simulated else ptq_models.weights
    ours = ptq_models.reconstruction_errors(original, batches, read(output.weights))
    theirs = ptq_models.reconstruction_errors(original, batches, torch.load(output.aimets))
    ratios = {path: ours[path] / theirs[path] for path in ours}
    worst = max(ratios, key=lambda path: ratios[path])
    mean = statistics.geometric_mean(ratios.values())
    return [
        Finding("reconstruction error over AIMET's, mean over layers", mean, mean <= 1),
        Finding(f"the same, worst layer ({worst})", ratios[worst], ratios[worst] <= 1.02),
    ]
