"""What a simulated forward holds in memory at most, by torch's own count of its allocations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from rimet import QuantizationSimModel
from rimet.batch_norm_fold import fold_all_batch_norms
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at a time while ``run`` runs, above what was there before."""
    run()  # what is made once is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        run()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_count_sees_what_is_held_together() -> None:
    x = torch.zeros(1000)

    def run() -> None:
        y = x + 1
        del y
        z = x + 1
        z = z + 1  # two of 4,000 bytes at a time

    assert 8000 <= peak_bytes(run) < 8100  # and the scalars


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256
    )


@pytest.mark.parametrize("make", [torchvision.models.resnet18, small_vit])
def test_a_simulated_forward_needs_little_more_than_the_models(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 3, 64, 64)
    fold_all_batch_norms(model, None, dummy_input=x)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    sim = QuantizationSimModel(copy.deepcopy(model), x, default_param_bw=4, default_output_bw=8)
    sim.compute_encodings(lambda m: m(x))
    with torch.no_grad():
        plain = peak_bytes(lambda: model(x))
        simulated = peak_bytes(lambda: sim.model(x))
    assert simulated <= 1.3 * plain + largest
    # One quantized weight is alive at least: the count did look at the simulation.
    assert simulated >= largest
