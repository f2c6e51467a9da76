"""Re-estimation of batch-norm statistics against means and variances computed directly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rimet import QuantizationSimModel
from rimet.batch_norm_fold import fold_all_batch_norms_to_scale
from rimet.bn_reestimation import DEFAULT_NUM_BATCHES, reestimate_bn_stats
from rimet.common.quantsim_config.utils import get_path_for_per_channel_config
from torch import nn


def make() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.BatchNorm2d(4, momentum=None),
    ]
    return nn.Sequential(*layers)


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 4, 4, generator=generator) * (i + 1) + i for i in range(count)]


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_averages_over_batches_and_handle() -> None:
    model = make()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = statistics(model)
    handle = reestimate_bn_stats(model, batches(), num_batches=3)
    with torch.no_grad():
        outputs = [model[0](x) for x in batches()[:3]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3), unbiased=True) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    # Its input is normalized and dropout is off: variance 128/127 by Bessel's correction.
    torch.testing.assert_close(model[3].running_var, torch.full((4,), 128 / 127), rtol=1e-4, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[3].momentum) == (0.1, None)
    assert int(model[1].num_batches_tracked) == 0
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))

    with reestimate_bn_stats(model, batches()):
        assert not torch.equal(model[1].running_mean, before[0])
    assert torch.equal(model[1].running_mean, before[0])
    assert DEFAULT_NUM_BATCHES == 100


@pytest.mark.parametrize("form", ["labelled", "keyword", "forward_fn"])
def test_forms_of_batches(form: str) -> None:
    expected, model = make(), make()
    reestimate_bn_stats(expected, batches())
    forward_fn: Any = None
    data: list[Any] = [(x, torch.zeros(8)) for x in batches()]
    if form == "keyword":
        data = [{"input": x} for x in batches()]
    elif form == "forward_fn":
        forward_fn = lambda model, batch: model(batch[0])  # noqa: E731
    reestimate_bn_stats(model, data, forward_fn=forward_fn)
    assert torch.equal(model[1].running_mean, expected[1].running_mean)


def test_norm_that_runs_twice_and_one_that_does_not_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.idle = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.untracked = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.untracked(self.norm(x) + 3))

    model = Twice()
    x = torch.randn(16, 2) + 1
    reestimate_bn_stats(model, [x])
    # The second call sees what was normalized: mean 0.
    torch.testing.assert_close(model.norm.running_mean, x.mean(0) / 2)
    assert torch.equal(model.idle.running_var, torch.ones(2))


def test_errors_restore() -> None:
    model = make()
    before = statistics(model)
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_bn_stats(model, [])

    def fail(model: nn.Module, batch: Any) -> None:
        model(batch)
        raise KeyError("no")

    with pytest.raises(KeyError):
        reestimate_bn_stats(model, batches(), forward_fn=fail)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    assert model[1].momentum == 0.1 and not model[1]._forward_hooks


def test_simulation_then_fold_to_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    sim = QuantizationSimModel(
        model, batches()[0], config_file=get_path_for_per_channel_config(), default_output_bw=16
    )
    sim.compute_encodings(lambda quantized: [quantized(x) for x in batches()])
    reestimate_bn_stats(sim.model, batches())
    expected = copy.deepcopy(sim.model)(batches()[0])
    assert not torch.equal(expected, model(batches()[0]))
    fold_all_batch_norms_to_scale(sim)
    step = sim.model[2].output_quantizers[0].get_scale().item()
    # A sum that differs in its last bit may round to the next level.
    assert (sim.model(batches()[0]) - expected).abs().max() <= 1.01 * step
