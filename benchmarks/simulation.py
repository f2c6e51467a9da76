"""A real model: folding, equalizing, making its simulation, and what a simulated forward costs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import rimet
import torch
import torchvision
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.cross_layer_equalization import equalize_model
from torch import Tensor, nn

from benchmarks.harness import Contestant, Reach, Remote, Row, Size, Timed

SECTION = "simulation"
#: As the engine's weights and activations in the issue's row: W4A8.
BITS = {"default_param_bw": 4, "default_output_bw": 8}


def make(model: str, shape: list[int]) -> tuple[nn.Module, Tensor]:
    """A torchvision model with random weights, in evaluation mode, and an input."""
    torch.manual_seed(0)
    return getattr(torchvision.models, model)(weights=None).eval(), torch.randn(shape)


def changing(model: str, shape: list[int], change: Callable[[nn.Module, Tensor], object]) -> Timed:
    """``change`` on a fresh copy of a model each time; making the copy is not timed."""
    original, x = make(model, shape)
    fresh: list[nn.Module] = []

    def before() -> None:
        fresh[:] = [copy.deepcopy(original)]

    return Timed(lambda: change(fresh[0], x), before)


def fold(model: nn.Module, x: Tensor) -> object:
    return fold_all_batch_norms(model, None, dummy_input=x)


def equalize(model: nn.Module, x: Tensor) -> object:
    return equalize_model(model, dummy_input=x)


def simulate(model: nn.Module, x: Tensor) -> object:
    return rimet.QuantizationSimModel(model, x, **BITS)


CHANGES = {"fold": fold, "equalize": equalize, "simulate": simulate}
LABELS = {"fold": "fold", "equalize": "fold and equalize", "simulate": "make the simulation"}


def rows(size: Size) -> Iterator[Row]:
    # What the library says of the layers it leaves alone is no part of a table.
    logging.getLogger("rimet").setLevel(logging.ERROR)
    side = size.pick(64, 32)
    for model in ("resnet18",) if size.toy else ("resnet18", "resnet50", "mobilenet_v2"):
        for name in CHANGES:
            yield change_row(model, [1, 3, side, side], name)
    yield forward_row("resnet18", [size.pick(8, 1), 3, side, side])


def change_row(model: str, shape: list[int], name: str) -> Row:
    return Row(
        SECTION,
        f"{LABELS[name]}, {model} {'x'.join(map(str, shape))}",
        1,
        [
            Contestant("rimet", lambda: changing(model, shape, CHANGES[name])),
            Contestant("forward", lambda: forward(model, shape)),
            Remote("AIMET", "change", {"model": model, "shape": shape, "name": name}),
        ],
        unit="forward",
        reaches=[Reach("rimet", "AIMET", 1 / 3)],
    )


def forward(model: str, shape: list[int]) -> Callable[[], object]:
    """The floating-point forward."""
    network, x = make(model, shape)
    fold(network, x)

    def run() -> Tensor:
        with torch.no_grad():
            return network(x)

    return run


def simulated(model: str, shape: list[int], reuse: bool = False) -> Callable[[], object]:
    """The simulated forward; ``reuse``: with the weights quantized once, before."""
    network, x = make(model, shape)
    fold(network, x)
    sim = rimet.QuantizationSimModel(network, x, **BITS)
    sim.compute_encodings(lambda m: m(x))

    def run() -> Tensor:
        with torch.no_grad():
            return sim.model(x)

    if not reuse:
        return run
    block = rimet.reuse_quantized_params(sim.model)
    block.__enter__()

    def run_reusing(block: object = block) -> Tensor:  # holds the block: it ends with the row
        return run()

    return run_reusing


def forward_row(model: str, shape: list[int]) -> Row:
    return Row(
        SECTION,
        f"simulated forward W4A8, folded {model} {'x'.join(map(str, shape))}",
        1,
        [
            Contestant("rimet", lambda: simulated(model, shape)),
            Contestant("forward", lambda: forward(model, shape)),
            Contestant("reuse", lambda: simulated(model, shape, reuse=True)),
            Remote("AIMET", "simulated_forward", {"model": model, "shape": shape}),
        ],
        unit="forward",
        reaches=[Reach("rimet", "forward", 1.5), Reach("reuse", "forward", 1.2)],
    )
