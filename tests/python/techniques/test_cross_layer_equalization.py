"""Cross-layer equalization: AIMET's sets, factors and biases; the function stays; what must not be
scaled is not.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.cross_layer_equalization import (
    ClsSetInfo,
    CrossLayerScaling,
    GraphSearchUtils,
    HighBiasFold,
    equalize_bn_folded_model,
    equalize_model,
    equalize_norm_linears,
    get_ordered_list_of_conv_modules,
)
from rimet.meta.connectedgraph import ConnectedGraph
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "techniques"))

from chains import CHAINS, make_chain

DATA = Path(__file__).parents[2] / "data" / "techniques"
GOLDEN = json.loads((DATA / "cross_layer_equalization.json").read_text())


def describe(model: nn.Module, infos: list[ClsSetInfo]) -> list[Any]:
    paths = {id(module): path for path, module in model.named_modules()}
    return [
        [
            (paths[id(p.layer1)], paths[id(p.layer2)], bool(p.relu_activation_between_layers))
            for p in info.cls_pair_info_list
        ]
        for info in infos
    ]


def check_against_golden(model: nn.Module, infos: list[ClsSetInfo], golden: list[Any]) -> None:
    expected = [[(a, b, activation) for a, b, _, activation in pairs] for pairs in golden]
    assert describe(model, infos) == expected
    for info, pairs in zip(infos, golden, strict=True):
        for pair, (_, _, factors, _) in zip(info.cls_pair_info_list, pairs, strict=True):
            assert pair.scale_factor.dtype == np.float32
            # AIMET computes in float32 and scales layer after layer: a few units in the last place.
            np.testing.assert_allclose(pair.scale_factor[: len(factors)], factors, rtol=2e-6)


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, *inputs: torch.Tensor) -> float:
    a, b = model(*inputs), other(*inputs)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_scaled_as_by_aimet(name: str) -> None:
    model, x = make_chain(name)
    infos = CrossLayerScaling.scale_model(model, dummy_input=x)
    check_against_golden(model, infos, GOLDEN["chains"][name]["sets"])


@pytest.mark.parametrize("name", CHAINS)
def test_scaling_keeps_the_function(name: str) -> None:
    model, x = make_chain(name)
    model, x = model.double(), x.double()
    original = copy.deepcopy(model)
    CrossLayerScaling.scale_model(model, dummy_input=x)
    assert error(model, original, x) < 1e-12  # float64: thousands of ulps would show
    fold_all_batch_norms(model, None, x)
    infos = CrossLayerScaling.scale_model(model, dummy_input=x)
    assert error(model, original, x) < 1e-12
    assert bool(infos) == (name not in ("relu6", "pool"))


@pytest.mark.parametrize("name", CHAINS)
def test_equalized_biases_are_aimets(name: str) -> None:
    model, x = make_chain(name)
    assert equalize_model(model, dummy_input=x) is None
    biases = {k: p for k, p in model.named_parameters() if k.endswith("bias")}
    expected = GOLDEN["chains"][name]["biases"]
    assert set(biases) == set(expected)
    for path, bias in biases.items():
        values = torch.tensor(expected[path])
        # Sums of some ten float32 terms, relative to the largest of the layer.
        tolerance = 1e-5 * float(values.abs().max())
        torch.testing.assert_close(bias.detach(), values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_torchvision_models_are_scaled_as_by_aimet(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    fold_all_batch_norms(model, None, x)
    original = copy.deepcopy(model)
    infos = CrossLayerScaling.scale_model(model, dummy_input=x)
    check_against_golden(model, infos, GOLDEN["models"][name])
    assert error(model, original, x) < 1e-4  # float32, tens of layers deep


def test_ranges_become_equal() -> None:
    model, x = make_chain("depthwise")
    CrossLayerScaling.scale_model(model, dummy_input=x)
    first, middle = model[0].weight, model[2].weight
    ranges = first.abs().amax((1, 2, 3)), middle.abs().amax((1, 2, 3))
    torch.testing.assert_close(*ranges)
    model, _ = make_chain("pair")
    CrossLayerScaling().scale_cls_set((model[0], model[1]))
    torch.testing.assert_close(
        model[0].weight.abs().amax((1, 2, 3)), model[1].weight.abs().amax((0, 2, 3))
    )


class Net(nn.Module):
    """Three convolutions that a given function runs."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.relu = nn.ReLU()
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


NOT_SCALED = {
    "used twice": lambda m, x: m.b(m.a(m.a(x))),
    "output used elsewhere": lambda m, x: (lambda y: m.b(y) + y)(m.a(x)),
    "activation used elsewhere": lambda m, x: (lambda y: m.b(y) + y)(m.relu(m.a(x))),
    "added to": lambda m, x: m.b(m.relu(m.a(x)) + 1),
    "weight used elsewhere": lambda m, x: m.b(m.a(x)) + m.a.weight.sum(),
    "functional": lambda m, x: F.conv2d(m.relu(m.a(x)), m.b.weight),
    "gelu": lambda m, x: m.b(F.gelu(m.a(x))),
    "clamped": lambda m, x: m.b(m.a(x).clamp(0, 1)),
}


@pytest.mark.parametrize("name", NOT_SCALED)
def test_not_scaled_wrongly(name: str) -> None:
    torch.manual_seed(0)
    model = Net(NOT_SCALED[name]).double()
    original = copy.deepcopy(model)
    x = torch.randn(2, 4, 5, 5).double()
    assert CrossLayerScaling.scale_model(model, dummy_input=x) == []
    assert error(model, original, x) == 0


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.c(m.relu(m.b(m.relu(m.a(x))))),
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        lambda m, x: m.c(m.b(m.a(x).relu_()).relu()),
    ],
    ids=["module", "function", "in place"],
)
def test_functional_and_reused_activations(run: Any) -> None:
    torch.manual_seed(0)
    model = Net(run).double()
    original = copy.deepcopy(model)
    x = torch.randn(2, 4, 5, 5).double()
    infos = CrossLayerScaling.scale_model(model, (2, 4, 5, 5), x)
    assert describe(model, infos) == [[("a", "b", True)], [("b", "c", True)]]
    assert error(model, original, x) < 1e-12


def test_sets_by_hand() -> None:
    torch.manual_seed(0)
    conv, depthwise, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1)
    scaling = CrossLayerScaling()
    factors = scaling.scale_cls_sets([(conv, depthwise, last), (depthwise, last)])
    assert isinstance(factors[0], tuple) and len(factors[0]) == 2
    assert isinstance(factors[1], np.ndarray)
    assert len(scaling.scale_cls_set_with_depthwise_layers((conv, depthwise, last))) == 2
    assert scaling.scale_cls_set_with_conv_layers((depthwise, last)).shape == (4,)

    before = copy.deepcopy(conv.state_dict())
    for cls_set, message in [
        ((conv,), "expected 2 or 3 layers, got 1"),
        ((conv, nn.Linear(4, 5)), "got Linear"),
        ((conv, nn.Conv2d(4, 4, 1), last), "expected a depthwise layer of 4 channels"),
        ((conv, nn.Conv2d(5, 4, 1)), "expected a last layer of 4 input channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaling.scale_cls_set(cls_set)
    assert all(torch.equal(value, before[key]) for key, value in conv.state_dict().items())


def test_channels_of_zeros_keep_their_scale() -> None:
    model, _ = make_chain("pair")
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight[:, 1] = 0
    factor = CrossLayerScaling().scale_cls_set((model[0], model[1]))
    assert factor[0] == 1 and factor[1] == 1 and factor[2] != 1
    assert model[0].weight.isfinite().all() and model[1].weight.isfinite().all()


def test_search() -> None:
    model, x = make_chain("depthwise")
    search = GraphSearchUtils(model, None, x)
    groups = search.find_layer_groups_to_scale()
    assert groups == [[model[i] for i in (0, 2, 4, 5, 6)]]
    sets = search.convert_layer_group_to_cls_sets(groups[0])
    assert sets == [(model[0], model[2], model[4]), (model[4], model[5], model[6])]
    assert search.is_relu_activation_present_in_cls_sets(sets) == [(True, True), (False, False)]
    graph = ConnectedGraph(model, x)
    assert search.does_module_have_relu_activation(graph, model[0])
    assert not search.does_module_have_relu_activation(graph, model[4])
    assert get_ordered_list_of_conv_modules(model, x) == [
        [path, model[int(path)]] for path in ("0", "2", "4", "5", "6")
    ]
    for call in (CrossLayerScaling.scale_model, equalize_model):
        with pytest.raises(ValueError, match="neither"):
            call(model)


def test_high_bias_fold_is_exact_without_padding_and_activation() -> None:
    model, x = make_chain("batch norm, no activation")
    model, x = model.double(), x.double()
    original = copy.deepcopy(model)
    equalize_model(model, dummy_input=x)
    assert error(model, original, x) < 1e-12
    # All that the normalizations added on average has moved on.
    assert model[0].bias.abs().max() > 0


def test_high_bias_fold_leaves_what_it_knows_nothing_about() -> None:
    model, _ = make_chain("pair")
    before = copy.deepcopy(model.state_dict())
    info = ClsSetInfo(ClsSetInfo.ClsSetLayerPairInfo(model[0], model[1], np.ones(4), True))
    HighBiasFold.bias_fold([info], {})
    HighBiasFold.bias_fold([info], {model[0]: nn.BatchNorm2d(4, affine=False)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="batch norm: expected 4 channels"):
        HighBiasFold.bias_fold([info], {model[0]: nn.BatchNorm2d(3)})


def test_equalize_bn_folded_model_is_the_second_half() -> None:
    whole, x = make_chain("batch norm")
    halves = copy.deepcopy(whole)
    equalize_model(whole, dummy_input=x)
    equalize_bn_folded_model(halves, None, fold_all_batch_norms(halves, None, x), x)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


class Attention(nn.Module):
    """Pre-norm attention and feed-forward, as transformers have it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = norm(8), norm(8), norm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.norm3(x) * 2


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norm_linear_chains(norm: Any) -> None:
    torch.manual_seed(0)
    model = Attention(norm).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) * 4 + 0.1).add_(0.01)
    original = copy.deepcopy(model)
    x = torch.randn(2, 5, 8).double()
    done = equalize_norm_linears(model, dummy_input=x)
    assert done == [(model.norm1, [model.q, model.k, model.v]), (model.norm2, [model.up])]
    assert error(model, original, x) < 1e-12
    columns = torch.cat([m.weight for m in (model.q, model.k, model.v)]).abs().amax(0)
    torch.testing.assert_close(columns, model.norm1.weight.abs())
    assert torch.equal(model.norm3.weight, original.norm3.weight)

    model = copy.deepcopy(original)
    equalize_model(model, dummy_input=x)
    assert error(model, original, x) == 0, "no part of equalize_model"
