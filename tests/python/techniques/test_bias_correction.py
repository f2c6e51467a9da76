"""Bias correction against plain torch: means of layers, closed forms, the naive way of doing it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rimet import QuantizationSimModel
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.bias_correction import correct_bias, find_all_conv_bn_with_activation
from rimet.common.defs import ActivationType, QuantScheme
from rimet.common.quantsim_config.utils import get_path_for_per_tensor_config
from rimet.quantsim import QuantParams
from torch import nn


class Net(nn.Module):
    """Plain, depthwise and transposed convolutions, a residual and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.relu1 = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU6()
        self.point, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm1(self.stem(x)))
        x = x + self.relu2(self.norm2(self.depthwise(x)))
        return self.fc(self.flatten(self.pool(self.up(self.point(x)))))


LAYERS = ["stem", "depthwise", "point", "up", "fc"]


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-1, 1)
    model.train()
    for _ in range(30):
        model(torch.randn(16, 3, 8, 8))
    return model.eval()


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def params(weight_bw: int = 4, act_bw: int = 8) -> QuantParams:
    return QuantParams(
        weight_bw=weight_bw,
        act_bw=act_bw,
        quant_scheme=QuantScheme.post_training_tf,
        config_file=get_path_for_per_tensor_config(),
    )


def simulate(
    model: nn.Module, data: list[torch.Tensor], weight_bw: int = 4, act_bw: int = 8
) -> Any:
    sim = QuantizationSimModel(
        model,
        data[0],
        quant_scheme=QuantScheme.post_training_tf,
        default_param_bw=weight_bw,
        default_output_bw=act_bw,
        config_file=get_path_for_per_tensor_config(),
    )
    sim.compute_encodings(lambda quantized: [quantized(x) for x in data])
    return sim


@torch.no_grad()
def layer_means(model: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean output per channel of each layer, float64."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in LAYERS}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: seen[path].append(out.double())
        )
        for path in LAYERS
    ]
    for x in data:
        model(x)
    for handle in handles:
        handle.remove()
    means = {}
    for path, outputs in seen.items():
        out = torch.cat(outputs).transpose(0, 1).flatten(1)
        means[path] = out.mean(1)
    return means


def test_means_are_restored_layer_by_layer() -> None:
    model = make()
    fold_all_batch_norms(model, None, batches(1)[0])
    original = copy.deepcopy(model)
    data = batches(8, 8, 3)
    # Activations on a grid so fine that ranges calibrated anew make no difference.
    correct_bias(model, params(act_bw=16), 19, data, 19)
    expected = layer_means(original, data)
    before = layer_means(simulate(original, data, act_bw=16).model, data)
    after = layer_means(simulate(model, data, act_bw=16).model, data)
    for path in LAYERS:
        shift = (before[path] - expected[path]).abs().max()
        left = (after[path] - expected[path]).abs().max()
        # What is left are steps of the 16-bit grids. The pooling in front of the last layer cuts more
        # off with its old range, found before correction, than with the new one.
        assert left < (0.2 if path == "fc" else 0.02) * shift, path
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, original.get_parameter(name))
        assert same == (not name.endswith("bias")), name


def test_equals_the_naive_way() -> None:
    """Running the whole simulation anew for each layer gives the same biases."""
    model = make()
    fold_all_batch_norms(model, None, batches(1)[0])
    data = batches(6, 6, 6)
    reference = copy.deepcopy(model)
    sim = simulate(reference, data[:2])
    expected = layer_means(reference, data)
    for path in LAYERS:
        layer: Any = sim.model.get_submodule(path)
        with torch.no_grad(), layer._remove_output_quantizers():
            shift = layer_means(sim.model, data)[path] - expected[path]
            layer.bias.sub_(shift.float())
    correct_bias(model, params(), 12, data, 18)
    for path in LAYERS:
        bias, other = model.get_submodule(path).bias, sim.model.get_submodule(path).bias
        # Means of some thousand float32 numbers around 1, in two orders of summation.
        torch.testing.assert_close(bias, other, rtol=0, atol=2e-6)


def test_quantized_outputs_come_closer() -> None:
    model = make()
    fold_all_batch_norms(model, None, batches(1)[0])
    original = copy.deepcopy(model)
    data, held_out = batches(32), batches(1, 64)[1]
    correct_bias(model, params(weight_bw=3), 32, data, 32)
    with torch.no_grad():
        expected = original(held_out)
        before = simulate(original, data, 3).model(held_out)
        after = simulate(model, data, 3).model(held_out)
    assert (after - expected).square().mean() < 0.5 * (before - expected).square().mean()


def clipped_mean(mean: float, spread: float, high: float) -> float:
    """By numeric integration."""
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    return float(((mean + spread * z).clamp(0, high) * density).sum())


def test_analytic_correction_is_the_closed_form() -> None:
    model = make()
    layers = [model.stem, model.norm1, model.relu1, model.depthwise, model.norm2, model.relu2]
    chain = nn.Sequential(*layers, model.point).eval()
    info = find_all_conv_bn_with_activation(chain, (1, 3, 8, 8))
    fold_all_batch_norms(chain, (1, 3, 8, 8))
    original = copy.deepcopy(chain)
    data = batches(8)
    correct_bias(chain, params(), 8, data, 8, info, perform_only_empirical_bias_corr=False)

    sim = simulate(original, data)
    for index, norm, high in ((3, model.norm1, math.inf), (6, model.norm2, 6.0)):
        layer, quantized = original[index], sim.model[index]
        weight = quantized.param_quantizers["weight"](quantized.weight).double()
        noise = (weight - layer.weight.double()).sum((2, 3))
        mean = torch.tensor(
            [
                clipped_mean(beta, abs(gamma), high)
                for gamma, beta in zip(norm.weight.tolist(), norm.bias.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )
        shift = noise[:, 0] * mean if layer.groups > 1 else noise @ mean
        expected = (layer.bias.double() - shift).float()
        torch.testing.assert_close(chain[index].bias, expected, rtol=0, atol=1e-6)
    # The first layer has no normalization in front: it is corrected empirically.
    assert not torch.equal(chain[0].bias, original[0].bias)


def test_find_neighbours() -> None:
    model = make()
    found = find_all_conv_bn_with_activation(model, (1, 3, 8, 8))
    assert list(found) == [model.stem, model.depthwise]
    stem, depthwise = found[model.stem], found[model.depthwise]
    assert (stem.input_bn, stem.output_bn) == (None, model.norm1)
    assert stem.out_activation_type is ActivationType.relu
    assert stem.in_activation_type is ActivationType.no_activation
    assert (depthwise.input_bn, depthwise.output_bn) == (model.norm1, model.norm2)
    assert depthwise.in_activation_type is ActivationType.relu
    assert depthwise.out_activation_type is ActivationType.relu6


def test_labels_ignored_layers_and_samples() -> None:
    model = make()
    fold_all_batch_norms(model, None, batches(1)[0])
    original = copy.deepcopy(model)
    labelled = [(x, torch.zeros(len(x))) for x in batches(4, 4, 4)]
    drawn = []

    def loader() -> Any:
        for batch in labelled:
            drawn.append(batch)
            yield batch

    correct_bias(model, params(), 4, loader(), 6, layers_to_ignore=[model.point])
    assert torch.equal(model.point.bias, original.point.bias)
    assert not torch.equal(model.up.bias, original.up.bias)
    assert len(drawn) <= 3
    other = copy.deepcopy(original)
    correct_bias(other, params(), 4, [x for x, _ in labelled], 6, layers_to_ignore=[other.point])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layer_without_bias_gets_one_and_a_reused_layer_keeps_its_own() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.again(self.first(x)))

    torch.manual_seed(0)
    model = Reused().eval()
    before = model.again.bias.clone()
    correct_bias(model, params(), 16, [torch.randn(16, 6)], 16)
    assert isinstance(model.first.bias, nn.Parameter) and model.first.bias.abs().max() > 0
    assert torch.equal(model.again.bias, before)


def test_errors_leave_the_model() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected at least one sample"):
        correct_bias(model, params(), 4, [], 4)
    foreign: Any = [nn.ReLU(), "up"]
    with pytest.raises(ValueError, match="layers_to_ignore: expected modules.*ReLU, str from"):
        correct_bias(model, params(), 4, batches(4), 4, layers_to_ignore=foreign)
    with pytest.raises(ValueError, match="round_mode: expected 'nearest', got 'stochastic'"):
        correct_bias(model, QuantParams(round_mode="stochastic"), 4, batches(4), 4)
    with pytest.raises(RuntimeError):
        correct_bias(model, params(), 4, [torch.zeros(4, 5, 8, 8)], 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
