"""``rimet.utils``: what AIMET's functions of these names give (values read off aimet-torch 2.42)."""

from __future__ import annotations

import pytest
import torch
from rimet import utils
from rimet.nn import BaseQuantizationMixin
from rimet.quantization.base import QuantizerBase
from rimet.quantsim import QuantizationSimModel
from torch import nn


@pytest.fixture
def model() -> nn.Sequential:
    relu = nn.ReLU()
    inner = nn.Sequential(relu, nn.ReLU())
    made = nn.Sequential(nn.Conv2d(1, 2, 3), inner, nn.Flatten())
    made.add_module("again", relu)
    return made


X = torch.arange(50.0).reshape(2, 1, 5, 5) / 25


def test_random_inputs_and_devices(model: nn.Sequential) -> None:
    (one,) = utils.create_rand_tensors_given_shapes((2, 3), "cpu")
    assert one.shape == (2, 3) and 0 <= one.min() and one.max() < 1
    shapes: list[tuple[int, ...]] = [(2, 3), (1,)]
    assert [t.shape for t in utils.create_rand_tensors_given_shapes(shapes, "cpu")] == shapes
    batches = list(utils.create_fake_data_loader(10, 4, (1, 8, 8)))
    assert [tuple(images.shape) for images, _ in batches] == [
        (4, 1, 8, 8),
        (4, 1, 8, 8),
        (2, 1, 8, 8),
    ]
    assert all(labels.dtype == torch.int64 and 0 <= labels.min() <= 9 for _, labels in batches)
    assert utils.get_device(model) == torch.device("cpu") == utils.get_device(nn.ReLU())
    assert utils.get_device(nn.Linear(2, 2, device="meta")).type == "meta"
    moved = utils.change_tensor_device_placement({"a": [X, (X, 1)]}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == 1


def test_order_names_and_reuse(model: nn.Sequential) -> None:
    order = utils.get_ordered_list_of_modules(model, X)
    assert [path for path, _ in order] == ["0", "1.0", "1.1", "2", "1.0"]
    assert order[1][1] is order[4][1] is model[1][0]  # type: ignore[index]
    once = utils.get_ordered_list_of_modules(model, X, ignore_duplicates=True)
    assert [path for path, _ in once] == ["0", "1.0", "1.1", "2"]
    by_hand = utils.get_ordered_list_of_modules(model, X, lambda m, x: m[0](x))  # type: ignore[index]
    assert [path for path, _ in by_hand] == ["0"]
    assert utils.get_reused_modules(model, X) == [("1.0", model[3])]
    assert all(not module._forward_hooks for module in model.modules())
    assert utils.get_layer_name(model, model[1][1]) == "1.1"  # type: ignore[index]
    with pytest.raises(KeyError, match="expected a module of Sequential"):
        utils.get_layer_name(model, nn.ReLU())
    assert [utils.is_leaf_module(m) for m in (model, model[0])] == [False, True]
    assert utils.is_torch_nn_module(model) and not utils.is_torch_nn_module(
        QuantizationSimModel(model, X).model[0]
    )


def test_attributes_and_parameters(model: nn.Sequential) -> None:
    assert utils.rgetattr(model, "0.weight") is model[0].weight
    utils.rsetattr(model, "1.1", nn.Tanh())
    assert isinstance(model[1][1], nn.Tanh)  # type: ignore[index]
    utils.rsetattr(model, "note", 3)
    assert model.note == 3
    tied = nn.ModuleDict({"a": model[0], "b": model[0]})
    names = [name for name, _ in utils.get_all_named_parameters(tied)]
    assert names == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_modes_come_back_part_by_part(model: nn.Sequential) -> None:
    model.train()
    model[1].eval()
    with utils.in_eval_mode(model):
        assert not any(m.training for m in model.modules())
    with pytest.raises(ZeroDivisionError), utils.in_train_mode([model[0], model[1]]):
        assert all(m.training for m in model.modules())
        raise ZeroDivisionError
    assert model.training and model[0].training and not model[1].training
    assert not model[1][1].training  # type: ignore[index]


def test_quantizers_are_away_until_the_block_ends(model: nn.Sequential) -> None:
    sim = QuantizationSimModel(model, X, quantize_functional_ops=False)
    sim.compute_encodings(lambda m: m(X))
    slots = utils.get_all_quantizers(sim.model)
    quantizers = [q for q in sim.model.modules() if isinstance(q, QuantizerBase)]
    assert [sum(q is not None for q in each) for each in slots] == [1, 1, 1]
    assert len(slots[0]) == 2  # the bias has a slot, too
    conv = sim.model[0]

    def present() -> int:
        return sum(1 for _ in sim.quantizers())

    # (function, left of 3 without those of the model, of the convolution)
    for remove, of_model, of_conv in (
        (utils.remove_param_quantizers, 2, 2),
        (utils.remove_input_quantizers, 2, 2),
        (utils.remove_output_quantizers, 2, 3),
        (utils.remove_activation_quantizers, 1, 2),
        (utils.remove_all_quantizers, 0, 1),
    ):
        for chosen, left in (
            (sim.model, of_model),
            (conv, of_conv),
            ([conv], of_conv),
            (list(sim.model.modules()), of_model),
        ):
            with remove(chosen):
                assert present() == left
            assert present() == 3
    with torch.no_grad(), utils.disable_all_quantizers(sim.model):
        assert torch.equal(sim.model(X), model(X))
    assert [q for q in sim.model.modules() if isinstance(q, QuantizerBase)] == quantizers
    utils.remove_all_quantizers(sim.model)  # without a block they stay away
    assert present() == 0
    assert any(isinstance(m, BaseQuantizationMixin) for m in sim.model.modules())
