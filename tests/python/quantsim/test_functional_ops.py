"""Quantizers for functional operations: the model computes what its author's source says, with
each result on a grid; and it stays an ordinary module.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rimet.nn import QuantizationMixin
from rimet.nn.functional_ops import FunctionalOp
from rimet.quantsim import QuantizationSimModel
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(x))
        y += x
        y = self.relu(y)
        return torch.cat([y, x * 0.5], 1)[:, ::2]


class Net(nn.Module):
    """Functional calls in nested modules, a container with calls of its own, a shared block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.rest = nn.Sequential(Block(), nn.Sequential(self.first))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rest(self.first(x))
        y = F.interpolate(y, scale_factor=0.5).flatten(2).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(y, y, y)).softmax(-1)


def simulate(
    model: nn.Module, *inputs: torch.Tensor, **options: Any
) -> tuple[QuantizationSimModel, torch.Tensor]:
    torch.manual_seed(0)
    sim = QuantizationSimModel(model.eval(), inputs, **options)
    sim.compute_encodings(lambda m: m(*inputs))
    with torch.no_grad():
        return sim, sim.model(*inputs)


@pytest.fixture(scope="module")
def net() -> tuple[Net, torch.Tensor, QuantizationSimModel, torch.Tensor]:
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(2, 4, 4, 4)
    return model, x, *simulate(model, x)


# Numerics


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.a(x) * torch.sigmoid(self.b(y))
        return torch.matmul(z, x.t()) + 1.0


def test_each_result_is_on_its_grid() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    model = Residual()
    sim, output = simulate(model, x, y, default_output_bw=4)
    ops = sim.model.functional
    assert list(ops._modules) == ["sigmoid_0", "mul_0", "matmul_0", "add_0"]

    def grid(name: str, value: torch.Tensor) -> torch.Tensor:
        quantizer = getattr(ops, name).output_quantizers[0]
        scale, low = quantizer.get_scale(), quantizer.get_min()
        steps = ((value - low) / scale).round().clamp(0, 15)
        return steps * scale + low

    with torch.no_grad():
        z = grid("mul_0", sim.model.a(x) * grid("sigmoid_0", sim.model.b(y).sigmoid()))
        quantized_x = sim.model.functional.matmul_0.input_quantizers[1](x)
        z = grid("matmul_0", z @ quantized_x.t())
        torch.testing.assert_close(output, grid("add_0", z + 1.0))


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 1.7
        view = y[:, 1:]
        y.add_(0.3)
        view.mul_(x[:, 1:])
        F.relu(y, inplace=True)
        return y, view


def test_in_place_results_are_written_back_and_seen_through_views() -> None:
    x = torch.randn(5, 6)
    sim, (y, view) = simulate(InPlace(), x, default_output_bw=4)
    assert len(torch.unique(y)) <= 16
    assert torch.equal(view, y[:, 1:]) and view.data_ptr() == y[:, 1:].data_ptr()
    # The caller's tensors are not written to.
    assert torch.equal(x, x.clone())
    ops = sim.model.functional
    assert ops.add_0.in_place and ops.mul_1.in_place and not ops.mul_0.in_place


def test_in_place_operations_train() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4)
    sim, _ = simulate(Net(), x)
    sim.model.train()
    sim.model(x)[..., 0].sum().backward()
    for name, parameter in sim.model.named_parameters():
        assert parameter.grad is not None, name
    reached = {n for n, p in sim.model.named_parameters() if p.grad.abs().max() > 0}
    assert "first.conv.weight" in reached
    assert any(".functional." in name for name in reached)


def test_module_and_function_are_quantized_alike() -> None:
    class Modular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.conv(x))

    class Functional(Modular):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.conv(x))

    x = torch.randn(2, 4, 6, 6)
    modular, functional = Modular(), Functional()
    functional.load_state_dict(modular.state_dict())
    (a, expected), (b, output) = simulate(modular, x), simulate(functional, x)
    assert torch.equal(output, expected)
    # The supergroup Conv + Relu leaves one output quantizer, whichever form the Relu has.
    assert b.model.conv.output_quantizers[0] is None is a.model.conv.output_quantizers[0]


# Placement


def test_off_gives_aimets_placement() -> None:
    x = torch.randn(2, 4, 4, 4)
    sim = QuantizationSimModel(Net(), x, quantize_functional_ops=False)
    assert not any(isinstance(m, FunctionalOp) for m in sim.model.modules())
    assert type(sim.model) is Net and type(sim.model.first) is Block
    assert sim.report.reused == ["first.relu", "rest.0.relu"]
    assert any("quantize_functional_ops is off" in why for _, why in sim.report.unquantized)


def test_names_and_report(net: Any) -> None:
    model, _, sim, _ = net
    assert list(sim.model.first.functional._modules) == [
        "relu_0",
        "add_0",
        "relu_1",
        "mul_0",
        "cat_0",
    ]
    # Behind a quantizer, a factor of one half only rescales the grid.
    assert "mul_0" not in sim.model.rest[0].functional._modules
    assert "functional.interpolate_0" in sim.report.functional_ops
    assert "first.functional.cat_0" in sim.report.functional_ops
    # The block runs twice in a forward: one set of quantizers, no second name for it.
    assert not any(name.startswith("rest.1") for name in sim.report.functional_ops)
    text = str(sim.report)
    assert "functional operations with quantizers" in text
    assert f"{sim.report.num_quantizers['output']} of outputs" in text
    assert sum(sim.report.num_quantizers.values()) == sum(1 for _ in sim.quantizers())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        mask = (1 - keep.float()) * torch.finfo(torch.float32).min
        scores = self.q(x) @ x.transpose(-1, -2)
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
        return torch.softmax(scores + mask[None], -1)


def test_masks_do_not_spoil_ranges() -> None:
    x = torch.randn(1, 3, 4)
    keep = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])
    # Calibrated without padding, used with it.
    sim = QuantizationSimModel(Masked(), (x, torch.ones_like(keep)), default_output_bw=16)
    sim.compute_encodings(lambda m: m(x, torch.ones_like(keep)))
    with torch.no_grad():
        output = sim.model(x, keep)
        expected = QuantizationSimModel.get_original_model(sim.model)(x, keep)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=0)  # weights have 8 bits
    assert output[0, 2, 2] == 0
    reasons = dict(sim.report.unquantized)
    assert "a mask" in reasons[": mul (call 0)"]
    assert "such as a mask" in reasons[": add (call 0)"]
    assert sim.report.functional_ops == ["functional.matmul_0", "functional.softmax_0"]


def test_a_mask_that_was_added_before_does_not_spoil_ranges() -> None:
    """As in LongT5: the mask goes into the position bias, and with it into each layer's scores."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            bias = self.bias + torch.where(keep > 0, 0.0, -1e10)
            scores = x @ x.transpose(-1, -2)
            scores += bias
            return torch.softmax(scores, -1)

    inputs = torch.randn(1, 3, 4), torch.tensor([[1, 1, 0]])
    sim, output = simulate(Biased(), *inputs, default_output_bw=16)
    torch.testing.assert_close(output, Biased.forward(sim.model, *inputs), atol=1e-3, rtol=0)
    reasons = dict(sim.report.unquantized)
    assert "such as a mask" in reasons[": add (call 0)"]
    assert "infinities or the largest" in reasons[": add (call 1)"]


def test_another_path_passes_unquantized_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Paths(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(x)
            return x.exp() if x.sum() > 0 else F.gelu(x)

    x = torch.ones(2, 3)
    sim, _ = simulate(Paths(), x)
    with caplog.at_level("WARNING", logger="rimet"):
        first = sim.model(-x)
        sim.model(-x)
    assert [
        r.getMessage().startswith("the model called gelu (call 0)") for r in caplog.records
    ] == [True]
    tanh = sim.model.functional.tanh_0.output_quantizers[0]
    assert torch.equal(first, F.gelu(tanh(torch.tanh(-x))))


# Containers and collisions


class ScaledWhenExported(nn.Module):
    """As models of transformers, which leave a mask of ones out unless they are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return F.relu(x * x.abs() if torch.compiler.is_exporting() else x)


def test_another_path_taken_in_export_warns(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 4)
    sim, _ = simulate(nn.Sequential(ScaledWhenExported()), x)
    torch.export.export(sim.model, (x,))
    assert "0 called mul (call 0) where the recorded run did not" in caplog.text


class ListNet(nn.Sequential):
    """A container whose forward goes over its items and calls a function itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = F.relu(layer(x)) + x
        return x * len(self)


class DictNet(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for _, layer in self.items()], -1) / len(self)


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.functional = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.functional(x).tanh()


@pytest.mark.parametrize(
    "model",
    [
        ListNet(nn.Linear(4, 4), nn.Linear(4, 4)),
        DictNet({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)}),
        nn.Sequential(nn.Linear(4, 4), act := nn.Sigmoid(), nn.Linear(4, 4), act),
        Taken(),
    ],
    ids=["list", "dict", "reused", "name taken"],
)
def test_containers_hold_operations_beside_their_items(model: nn.Module) -> None:
    x = torch.randn(3, 4)
    sim, output = simulate(model, x, default_output_bw=16, default_param_bw=16)
    assert sim.report.functional_ops
    torch.testing.assert_close(output, model(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(copy.deepcopy(sim.model)(x), output, rtol=0, atol=0)


# An ordinary module


def test_state_copies_and_files(net: Any, tmp_path: Path) -> None:
    model, x, sim, expected = net
    key = "first.functional.cat_0.output_quantizers.0.min"
    assert key in sim.model.state_dict() and key in sim.quantizer_state_dict()
    fresh = QuantizationSimModel(model, x)
    fresh.model.load_state_dict(sim.model.state_dict())
    sim.save_encodings_to_json(str(tmp_path), "net")
    content = json.loads((tmp_path / "net.json").read_text())
    assert "0" in content["activation_encodings"]["first.functional.cat_0"]["output"]
    loaded = QuantizationSimModel(model, x)
    loaded.load_encodings(str(tmp_path / "net.json"))
    with torch.no_grad():
        for other in (
            fresh.model,
            loaded.model,
            copy.deepcopy(sim.model),
            copy.deepcopy(sim).model,
            pickle.loads(pickle.dumps(sim.model)),
        ):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
        assert torch.equal(copy.deepcopy(sim.model.first)(x), sim.model.first(x))


def test_classes_go_by_their_names(net: Any) -> None:
    model, x, sim, _ = net
    assert isinstance(sim.model, Net) and isinstance(sim.model.first, Block)
    assert type(sim.model).__name__ == "Net" and type(sim.model).__module__ == Net.__module__
    assert str(sim.model).startswith("Net(")
    original = QuantizationSimModel.get_original_model(sim.model)
    assert type(original) is Net and [type(m) for m in original.modules()] == [
        type(m) for m in model.modules()
    ]
    assert set(original.state_dict()) == set(model.state_dict())
    assert torch.equal(original(x), model(x))
    assert vars(original).keys() == vars(model).keys()


# Strict export counts entering any mode as a side effect, though the mode is left again.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(net: Any, strict: bool) -> None:
    _, x, sim, expected = net
    program = torch.export.export(sim.model, (x,), strict=strict)
    assert torch.equal(program.module()(x), expected)
    assert "rimet.quantize_dequantize_range" in str(program.graph)


def test_torchscript(net: Any) -> None:
    _, x, sim, expected = net
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(sim.model, x, check_trace=False), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), expected)


class ComputesWithSizes(nn.Module):
    """Sizes are tensors while torch.jit.trace runs: arithmetic on them must not count as calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = (x.size(1) + 1) * 2 // 4
        scale = torch.tensor(0.5) + 1  # a tensor without dimensions that is no size
        y = x[:, : half + 1] + 0.5
        return (y + x.shape[0] / 2) * scale


def test_sizes_that_are_traced_are_no_operations() -> None:
    x = torch.randn(3, 8)
    sim, output = simulate(ComputesWithSizes(), x, default_output_bw=4)
    assert {name for name, _ in sim.model.functional.named_children()} == {
        "add_1",
        "add_2",
        "mul_0",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        script = torch.jit.trace(sim.model, (x,))
    assert torch.equal(script(x), output)


def test_compiled_whole(net: Any) -> None:
    _, x, sim, expected = net
    with torch.no_grad():
        compiled = torch.compile(sim.model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)


def test_parts_that_copy_themselves_are_copied() -> None:
    """A parametrized module has a ``__deepcopy__`` of its own, which knows nothing of scopes."""
    x = torch.randn(2, 4)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    sim, output = simulate(nn.Sequential(layer, Residue()), x)
    copied = copy.deepcopy(sim.model)
    assert torch.equal(copied(x), output)


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x


def test_exclusion_and_ignored_classes() -> None:
    x = torch.randn(2, 4, 4, 4)
    sim, _ = simulate(Net(), x)
    sim.exclude_layers_from_quantization([sim.model.first])
    assert not any(
        isinstance(m, FunctionalOp) and any(q is not None for q in m.output_quantizers)
        for m in sim.model.first.modules()
    )
    sim.model(x)
    QuantizationMixin.ignore(Block)
    try:
        sim, _ = simulate(Net(), x)
        assert not any(name.startswith("first") for name in sim.report.functional_ops)
        assert type(sim.model.first.conv) is not nn.Conv2d
    finally:
        QuantizationMixin._ignored_module_types.discard(Block)


@torch.jit.script
def scripted_gate(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


class CallsScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(scripted_gate(self.first(x))) + 1


def test_a_scripted_function_is_named_and_its_result_quantized_by_the_next() -> None:
    x = torch.randn(16, 4)
    sim, output = simulate(CallsScripted(), x)
    ((place, reason),) = sim.report.unquantized
    assert place == ": torch.jit.script(scripted_gate) (call 0)" and "torch.jit.script" in reason
    assert "scripted_gate" in str(sim.report)
    quantizer = sim.model.last.input_quantizers[0]
    gated = scripted_gate(sim.model.first(x))
    assert quantizer.get_max().item() == pytest.approx(gated.max().item(), rel=0.01)
    with torch.no_grad():
        assert torch.equal(sim.model.functional.add_0.output_quantizers[0](output), output)
    script = torch.jit.trace(sim.model, (x,))
    assert torch.equal(script(x), output)
    assert torch.equal(torch.export.export(sim.model, (x,)).module()(x), output)


# Unknown module classes


class Hooked(nn.Module):
    """Hooks compute in the forward of the module around theirs; those of the model, in none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        self.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.first.register_forward_hook(lambda module, args, output: F.relu(output))
        self.inner.register_forward_hook(lambda module, args, output: F.relu(output) + 1)
        self.register_forward_hook(lambda module, args, output: F.relu(output) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.inner(F.relu(self.first(x) - 0.1)))


def test_what_hooks_compute_is_quantized_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(5, 4)
    model = Hooked().eval()
    sim, output = simulate(model, x, default_output_bw=16, default_param_bw=16)
    names = ("mul_0", "relu_0", "sub_0", "relu_1", "relu_2", "add_0", "sigmoid_0")
    assert set(sim.report.functional_ops) == {f"functional.{name}" for name in names}
    assert not sim.report.unreached and not caplog.records
    torch.testing.assert_close(output, model(x), atol=1e-3, rtol=0)
    plain = nn.Linear(4, 4)
    plain.register_forward_hook(lambda module, args, output: F.relu(output))
    assert not simulate(plain, x)[0].report.functional_ops


class Scale(nn.Module):
    """A leaf of a class that rimet does not know, with a parameter and nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], *, bias: torch.Tensor) -> Any:
        return {"sum": pair[0] * self.weight + bias, "rest": [pair[1] * 2]}


class Drop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x


class UsesUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.drop = Scale(), Drop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.scale((x, x + 1), bias=x)
        return self.drop(parts["sum"]) - parts["rest"][0]


def test_unknown_modules_are_quantized_by_the_general_rules() -> None:
    x = torch.randn(3, 4)
    sim, output = simulate(UsesUnknown(), x, default_output_bw=4, default_param_bw=4)
    scale: Any = sim.model.scale
    assert type(scale).__name__ == "QuantizedScale" and isinstance(scale, Scale)
    assert sim.report.generic_twins == [("scale", f"{__name__}.Scale")]
    assert ("drop", "returns what it is given") in sim.report.unquantized
    assert scale.param_quantizers["weight"].bitwidth == 4
    # The first slot is the model's input, the second comes from a quantizer, the third is `bias`.
    assert [q is not None for q in scale.input_quantizers] == [True, False, True]
    with torch.no_grad():
        parts = scale((x, x + 1), bias=x)
    assert len(parts["sum"].unique()) <= 12 and len(parts["rest"][0].unique()) <= 12
    assert Scale not in QuantizationMixin.cls_to_qcls
    for other in (copy.deepcopy(sim.model), pickle.loads(pickle.dumps(sim.model))):
        assert torch.equal(other(x), output)
    original = QuantizationSimModel.get_original_model(sim.model)
    assert type(original.scale) is Scale and type(original.drop) is Drop


@dataclass
class Normed:
    values: torch.Tensor
    largest: float = field(init=False)

    def __post_init__(self) -> None:
        self.largest = float(self.values.detach().max())


class Nested(nn.Module):
    """Of a class that rimet does not know, with integers and containers among its results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> Any:
        y = x[index] * self.weight
        return y.argmax(-1), {0: y}, Normed(y), defaultdict(list, {"y": y + 1})


class UsesNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.nested = nn.Linear(4, 4), Nested()

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> Any:
        return self.nested(index, self.first(x))


def test_integers_of_unknown_modules_have_no_quantizers_and_containers_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = (torch.tensor([2, 0]), torch.randn(3, 4))
    sim = QuantizationSimModel(UsesNested().eval(), inputs)
    sim.compute_encodings(lambda m: m(*inputs))
    nested: Any = sim.model.nested
    assert [q is not None for q in nested.input_quantizers] == [False, False]
    assert [q is not None for q in nested.output_quantizers] == [False, True, True]
    assert not sim.report.unreached and not caplog.records
    index, by_number, normed, by_name = sim.model(*inputs)
    assert index.dtype == torch.int64 and by_number[0] is normed.values
    assert type(normed) is Normed and isinstance(normed.largest, float)
    assert by_name["other"] == []
