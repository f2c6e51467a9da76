"""Batch-norm folding: the folded model computes what the original did; what must not be folded is
not; pairs are AIMET's.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet import QuantizationSimModel
from rimet._graph import tensors_in
from rimet.batch_norm_fold import (
    find_all_batch_norms_to_fold,
    find_standalone_batchnorm_ops,
    fold_all_batch_norms,
    fold_all_batch_norms_to_scale,
    fold_given_batch_norms,
)
from rimet.common.batch_norm_fold import batch_norm_fold
from rimet.common.quantsim_config.utils import (
    get_path_for_per_channel_config,
    get_path_for_per_tensor_config,
)
from rimet.meta.connectedgraph import ConnectedGraph
from rimet.nn.modules import custom
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "quantsim"))

from models import MODELS, build

DATA = Path(__file__).parents[2] / "data" / "techniques"
GOLDEN = json.loads((DATA / "batch_norm_fold.json").read_text())["models"]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every normalization statistics and parameters that matter, some of them negative."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).mul(high - low).add(low).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                    module.running_var.copy_(uniform(module.running_var, 0.5, 2))
                if module.affine:
                    module.weight.copy_(uniform(module.weight, -1.5, 1.5))
                    module.bias.copy_(uniform(module.bias, -1, 1))
    return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def paths(model: nn.Module, pairs: Any) -> list[list[str]]:
    names = {id(module): path for path, module in model.named_modules()}
    return [[names[id(a)], names[id(b)]] for a, b in pairs]


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, *inputs: torch.Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    pairs = zip(tensors_in(model(*inputs)), tensors_in(other(*inputs)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


# float64 leaves no room for a wrong fold to hide behind rounding: 1e-12 is some thousand ulps.
EXACT = 1e-12

LAYERS: list[tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d, (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d, (2, 4, 9, 9)),
    (lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
    (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: str(case[0]()))
def test_fold_backward(case: Any) -> None:
    make, norm_cls, shape = case
    layer = make()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    model = randomize(nn.Sequential(layer, norm_cls(channels)).double())
    original = copy.deepcopy(model)
    weight, norm = layer.weight, model[1]
    assert fold_all_batch_norms(model, shape) == [(layer, norm)]
    assert type(model[1]) is nn.Identity
    assert layer.weight is weight, "the parameter of an optimizer stays the same object"
    assert isinstance(layer.bias, nn.Parameter)
    assert error(model, original, noise(*shape).double()) < EXACT


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: str(case[0]()))
def test_fold_forward_or_standalone(case: Any) -> None:
    make, norm_cls, shape = case
    layer = make()
    model = randomize(nn.Sequential(norm_cls(4), layer).double())
    original = copy.deepcopy(model)
    pairs = fold_all_batch_norms(model, shape)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    exact = not transposed and not any(getattr(layer, "padding", (0,)))
    assert len(pairs) == exact
    assert (type(model[0]) is nn.Identity) == exact
    assert error(model, original, noise(*shape).double()) < EXACT


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("affine", [True, False])
def test_standalone_norm_becomes_affine(affine: bool, eps: float) -> None:
    model = randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, eps=eps, affine=affine)).double())
    original = copy.deepcopy(model)
    x = noise(2, 3, 4, 4).double()
    assert fold_all_batch_norms(model, None, x) == []
    norm = model[1]
    assert torch.equal(norm.running_mean, torch.zeros(3).double())
    assert torch.equal(norm.running_var, torch.ones(3).double())
    assert not norm.track_running_stats
    assert error(model, original, x) < EXACT


def test_layer_between_two_norms_takes_both() -> None:
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomize(nn.Sequential(*layers).double())
    original = copy.deepcopy(model)
    outer, conv, inner = model[0], model[1], model[3]
    assert fold_all_batch_norms(model, (2, 3, 6, 6)) == [(conv, inner), (conv, outer)]
    assert [type(m) for m in model] == [nn.Identity, nn.Conv2d, nn.Identity, nn.Identity, nn.ReLU]
    assert error(model, original, noise(2, 3, 6, 6).double()) < EXACT


class Net(nn.Module):
    """Two convolutions, two norms and a Linear that a given function runs."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.norm3 = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def alias_of_conv1(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv1(x)
    view = y.view(y.shape[0], -1)
    z = m.norm1(y)
    return z + view.view_as(z)


def control_flow(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv1(x)
    return m.norm1(y) if y.sum() > 1e9 else m.norm1(y) * 2


def read_as_numbers(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv1(x)
    return m.norm1(y) * y.tolist()[0][0][0][0]


def read_as_array(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv1(x)
    return m.norm1(y) * float(y.numpy().mean())


@torch.jit.script
def scripted_mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean()


def changed_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv1(x)
    y.add_(1.0)
    return m.norm1(y)


NOT_FOLDED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "conv used twice": lambda m, x: m.norm2(m.conv1(m.norm1(m.conv1(x)))),
    "norm used twice": lambda m, x: m.norm1(m.conv2(m.norm1(m.conv1(x)))),
    "conv output used elsewhere": lambda m, x: (lambda y: m.norm1(y) + y)(m.conv1(x)),
    "conv output looked at": control_flow,
    "conv output read as numbers": read_as_numbers,
    "conv output read as an array": read_as_array,
    "conv output used by a scripted function": lambda m, x: (
        lambda y: m.norm1(y) * scripted_mean(y)
    )(m.conv1(x)),
    "alias of conv output used": alias_of_conv1,
    "changed in place between": changed_in_place,
    "relu between": lambda m, x: m.norm1(torch.relu(m.conv1(x))),
    "functional norm": lambda m, x: F.batch_norm(
        m.conv1(x), m.norm1.running_mean, m.norm1.running_var, m.norm1.weight, m.norm1.bias
    ),
    "norm parameters used elsewhere": lambda m, x: m.norm1(m.conv1(x)) + m.norm1.bias.sum(),
    "functional conv": lambda m, x: m.norm1(F.conv2d(x, m.conv1.weight, m.conv1.bias, padding=1)),
    "conv weight used elsewhere": lambda m, x: m.norm1(m.conv1(x)) * m.conv1.weight.mean(),
    "linear over the last of three dimensions": lambda m, x: m.norm3(m.fc(x[:, :, 0, :4])),
    "transposed between": lambda m, x: m.norm3(m.fc(x[:4, :, 0, 0]).t()),
    "unbatched": lambda m, x: m.norm3(m.conv1(x[0])[:, :, 0].T),
    "norm before padding": lambda m, x: m.conv1(m.norm1(x)),
    "functional padding between": lambda m, x: m.conv1(F.pad(m.norm1(x), (1, 1, 1, 1))),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_not_folded_wrongly(name: str) -> None:
    model = randomize(Net(NOT_FOLDED[name]).double())
    x = noise(4, 4, 4, 4).double()
    original = copy.deepcopy(model)
    assert fold_all_batch_norms(model, None, x) == []
    assert error(model, original, x) < EXACT


@pytest.mark.parametrize("backward", [True, False])
def test_fold_of_arrays(backward: bool) -> None:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    layers = (conv, norm) if backward else (norm, conv)
    model = randomize(nn.Sequential(*layers).double())
    expected = model(noise(2, 4, 5, 5).double())
    sigma = (norm.running_var + norm.eps).sqrt()
    arrays = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, sigma]
    weight, bias = batch_norm_fold(*(t.detach().numpy() for t in arrays), backward)
    got = F.conv2d(noise(2, 4, 5, 5).double(), torch.tensor(weight), torch.tensor(bias))
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="sigma"):
        batch_norm_fold(*(t.detach().numpy() for t in (*arrays[:5], sigma * 0)), backward)


def test_frozen_norms_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    norms = [ops.FrozenBatchNorm2d(4) for _ in range(3)]
    for norm in norms:
        for buffer in norm.buffers():
            buffer.copy_(torch.rand(4) + 0.5)
    layers = (nn.Conv2d(4, 4, 3, padding=1), norms[0], nn.ReLU(), norms[1], nn.Conv2d(4, 4, 1))
    model = nn.Sequential(*layers, nn.ReLU(), norms[2]).double().eval()
    original = copy.deepcopy(model)
    x = noise(2, 4, 5, 5).double()
    forward = (norms[1], layers[4])
    assert find_all_batch_norms_to_fold(model, None, x) == ([(layers[0], norms[0])], [forward])
    assert fold_all_batch_norms(model, None, x) == [(layers[0], norms[0]), (layers[4], norms[1])]
    assert model[6] is norms[2] and type(model[1]) is type(model[3]) is nn.Identity
    assert error(model, original, x) < EXACT
    fold_given_batch_norms(original, [(original[0], original[1])])
    assert error(model, original, x) < EXACT


def test_several_outputs() -> None:
    model = randomize(Net(lambda m, x: (lambda y: (m.norm1(y), y))(m.conv1(x))))
    original = copy.deepcopy(model)
    assert fold_all_batch_norms(model, (2, 4, 5, 5)) == []
    x = noise(2, 4, 5, 5)
    for ours, theirs in zip(model(x), original(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_shared_or_computed_stay() -> None:
    model = randomize(Net(lambda m, x: m.norm2(m.conv2(m.norm1(m.conv1(x))))).double())
    model.conv2.weight = model.conv1.weight
    original = copy.deepcopy(model)
    assert fold_all_batch_norms(model, (2, 4, 5, 5)) == []
    assert error(model, original, noise(2, 4, 5, 5).double()) < EXACT

    def computed() -> nn.Module:
        torch.manual_seed(0)
        model = randomize(Net(lambda m, x: m.norm2(m.conv2(m.norm1(m.conv1(x))))).double())
        nn.utils.parametrizations.weight_norm(model.conv1)
        prune.l1_unstructured(model.conv2, "weight", 0.5)
        return model

    model = computed()
    assert fold_all_batch_norms(model, (2, 4, 5, 5)) == []
    assert error(model, computed(), noise(2, 4, 5, 5).double()) < EXACT


def test_norm_without_running_statistics_stays() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    original = copy.deepcopy(model)
    assert fold_all_batch_norms(model, (2, 3, 6, 6)) == []
    assert model[1] is norm and error(model, original, noise(2, 3, 6, 6)) == 0


def test_module_that_did_not_run_is_left_alone() -> None:
    model = randomize(Net(lambda m, x: m.norm1(m.conv1(x))))
    before = copy.deepcopy(model.norm2.state_dict())
    assert paths(model, find_all_batch_norms_to_fold(model, (2, 4, 5, 5))[0]) == [
        ["conv1", "norm1"]
    ]
    fold_all_batch_norms(model, (2, 4, 5, 5))
    assert all(torch.equal(value, before[key]) for key, value in model.norm2.state_dict().items())


def test_norm_at_two_places_of_the_tree_is_replaced_at_both() -> None:
    model = randomize(Net(lambda m, x: m.norm1(m.conv1(x))))
    model.again = nn.Sequential(model.norm1)
    fold_all_batch_norms(model, (2, 4, 5, 5))
    assert type(model.norm1) is nn.Identity and type(model.again[0]) is nn.Identity


def test_half_precision_and_channels_last() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).bfloat16())
    model = model.to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    fold_all_batch_norms(model, (2, 4, 6, 6))
    fold_all_batch_norms(exact, (2, 4, 6, 6))
    assert model[0].weight.dtype is torch.bfloat16
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    # Rounded once: the same bits as the exact result rounded.
    assert torch.equal(model[0].weight, exact[0].weight.bfloat16())
    assert torch.equal(model[0].bias, exact[0].bias.bfloat16())


@pytest.mark.parametrize("name", MODELS)
def test_own_models_compute_the_same(name: str) -> None:
    model, inputs = build(name, custom)
    randomize(model)
    original = copy.deepcopy(model)
    fold_all_batch_norms(model, None, inputs)
    assert not find_all_batch_norms_to_fold(model, None, inputs)[0]
    # float32 sums of a few hundred terms, several layers deep.
    assert error(model, original, *inputs) < 1e-5


@pytest.mark.parametrize("name", GOLDEN)
def test_torchvision_pairs_are_aimets_and_the_function_stays(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = randomize(torchvision.models.get_model(name, weights=None))
    original = copy.deepcopy(model)
    names = {module: path for path, module in model.named_modules()}
    pairs = fold_all_batch_norms(model, (1, 3, 64, 64))
    assert [[names[layer], names[norm]] for layer, norm in pairs] == GOLDEN[name]
    # float32, up to a hundred layers deep.
    assert error(model, original, noise(1, 3, 64, 64)) < 1e-4


def test_find_and_standalone_ops() -> None:
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)]
    model = randomize(nn.Sequential(*layers))
    before = copy.deepcopy(model.state_dict())
    backward, forward = find_all_batch_norms_to_fold(model, (2, 3, 6, 6))
    assert (backward, forward) == ([], [(model[0], model[1])])
    standalone = find_standalone_batchnorm_ops(ConnectedGraph(model, torch.zeros(2, 3, 6, 6)))
    assert [op.get_module() for op in standalone] == [model[3]]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="neither"):
        fold_all_batch_norms(model, None)


def test_given_pairs() -> None:
    model = randomize(Net(lambda m, x: m.norm2(m.conv2(m.norm1(m.conv1(x))))).double())
    original = copy.deepcopy(model)
    x = noise(2, 4, 5, 5).double()
    fold_given_batch_norms(model, [(model.conv2, model.norm2)])
    assert isinstance(model.norm1, nn.BatchNorm2d) and type(model.norm2) is nn.Identity
    assert error(model, original, x) < EXACT

    before = copy.deepcopy(model)
    for pairs, message in [
        ([(model.conv1, model.norm1), (model.norm1, model.conv2)], "without padding"),
        ([(model.conv1, model.conv2)], "expected a layer"),
        ([(model.norm1, nn.ReLU())], "norm1 and .not in the model.*ReLU"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_given_batch_norms(model, pairs)
    assert error(model, before, x) == 0, "unchanged after an error"


def simulate(model: nn.Module, x: torch.Tensor, config: str) -> QuantizationSimModel:
    sim = QuantizationSimModel(
        model, x, default_param_bw=4, default_output_bw=16, config_file=config
    )
    sim.compute_encodings(lambda quantized: quantized(x))
    return sim


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 8, 8)),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 8, 8)),
        (nn.Linear(3, 4), (8, 3)),
    ],
    ids=["conv", "transposed", "linear"],
)
def test_fold_to_scale_keeps_the_integers(layer: Any, shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4)
    model = randomize(nn.Sequential(copy.deepcopy(layer), norm, nn.ReLU()))
    channel = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-0.5, 0.7, -1.5, 0.2]))
        # The lowest level of a signed grid has no counterpart above zero: keep off it, for the
        # channels whose sign changes.
        for weight in model[0].weight.unbind(channel):
            weight.mul_(weight.flatten()[weight.abs().argmax()].sign())
    x = noise(*shape)
    sim = simulate(model, x, get_path_for_per_channel_config())
    layer, norm = sim.model[0], sim.model[1]
    quantizer = layer.param_quantizers["weight"]
    assert quantizer(layer.weight).quantize().min() > quantizer.qmin
    integers = quantizer(layer.weight).quantize()
    expected = sim.model(x)

    assert fold_all_batch_norms_to_scale(sim) == [(layer, norm)]
    assert type(sim.model[1]) is nn.Identity
    sign = norm.weight.sign().reshape(quantizer.shape)
    assert torch.equal(quantizer(layer.weight).quantize(), integers * sign)
    # One step of a 16-bit activation grid: a sum that differs in its last bit may round elsewhere.
    step = sim.model[2].output_quantizers[0].get_scale().item()
    assert (sim.model(x) - expected).abs().max() <= 1.01 * step
    assert fold_all_batch_norms_to_scale(sim) == []


def test_fold_to_scale_moves_the_output_quantizer() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = noise(2, 3, 6, 6)
    sim = simulate(model, x, get_path_for_per_channel_config())
    quantizer = sim.model[1].output_quantizers[0]
    assert quantizer is not None
    fold_all_batch_norms_to_scale(sim)
    assert sim.model[0].output_quantizers[0] is quantizer


def test_fold_to_scale_refuses_what_it_cannot_keep() -> None:
    x = noise(2, 3, 6, 6)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    sim = simulate(model, x, get_path_for_per_tensor_config())
    before = copy.deepcopy(dict(sim.model.named_parameters()))
    with pytest.raises(RuntimeError, match="^0: expected a weight quantizer with a scale per"):
        fold_all_batch_norms_to_scale(sim)
    assert all(torch.equal(v, before[k]) for k, v in sim.model.named_parameters())

    model = randomize(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    sim = simulate(model, x, get_path_for_per_channel_config())
    with pytest.raises(RuntimeError, match="forward into a quantized layer"):
        fold_all_batch_norms_to_scale(sim)

    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3, groups=2))
    model = randomize(nn.Sequential(*layers, nn.BatchNorm2d(4)))
    sim = simulate(model, x, get_path_for_per_channel_config())
    expected = sim.model(x)
    with pytest.raises(RuntimeError, match="^2: .*transposed convolution with 2 groups"):
        fold_all_batch_norms_to_scale(sim)
    assert torch.equal(sim.model(x), expected)


@pytest.mark.parametrize("of", ["layer", "norm"])
def test_a_hook_that_computes_between_layer_and_norm_is_seen(of: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    if of == "layer":
        model[0].register_forward_hook(lambda module, args, output: output.tanh())
    else:
        model[1].register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    randomize(model)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert fold_all_batch_norms(model, None, x) == []
    torch.testing.assert_close(model(x), expected)
