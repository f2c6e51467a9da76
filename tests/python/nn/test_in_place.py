"""Output quantizers write in place only into what the same module has just allocated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rimet
import torch
import torch.nn.functional as F
from rimet import nn as qnn
from rimet.nn.functional_ops import FunctionalOp
from rimet.quantization import _ops
from rimet.quantization.affine import QuantizeDequantize
from torch import Tensor, nn

from .samples import ALL, Sample


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places that were written to in place, in order."""
    places: list[int] = []
    original = _ops.quantize_dequantize_range_

    def op(x: Tensor, *args: object) -> None:
        places.append(x.data_ptr())
        original(x, *args)

    monkeypatch.setattr(_ops, "quantize_dequantize_range_", op)
    return places


def with_quantizer(module: nn.Module) -> nn.Module:
    quantizer = QuantizeDequantize((), 4, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    module.output_quantizers[0] = quantizer  # type: ignore[index]
    return module


def twin(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return with_quantizer(qnn.QuantizationMixin.from_module(module))


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

ALLOCATING: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "conv_transpose": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
    "linear": (nn.Linear(5, 4), (3, 5)),
    "batch_norm": (nn.BatchNorm2d(3), (2, 3, 6, 6)),
    "layer_norm": (nn.LayerNorm(5), (3, 5)),
    "relu": (nn.ReLU(), (3, 5)),
    "softmax": (nn.Softmax(-1), (3, 5)),
    "pool": (nn.MaxPool2d(2), (2, 3, 6, 6)),
}
# What comes out is (a view of) what went in.
HANDING_ON: dict[str, nn.Module] = {
    "dropout": nn.Dropout().eval(),
    "flatten": nn.Flatten(0),
    "relu in place": nn.ReLU(inplace=True),
    "hardswish in place": nn.Hardswish(inplace=True),
    "unflatten": nn.Unflatten(1, (2, 2)),
}


@pytest.mark.parametrize("name", ALLOCATING)
def test_a_new_tensor_is_written_to(name: str, written: list[int]) -> None:
    module, shape = ALLOCATING[name]
    x = torch.randn(shape)
    before = x.clone()
    expected = twin(module.eval())(x).detach()  # with gradients: out of place
    assert not written
    with torch.no_grad():
        output = twin(module.eval())(x)
    assert written == [output.data_ptr()]
    assert torch.equal(output, expected) and torch.equal(x, before)


@pytest.mark.parametrize("name", HANDING_ON)
def test_an_argument_is_never_written_to(name: str, written: list[int]) -> None:
    module = twin(HANDING_ON[name])
    x = torch.randn(3, 4).abs_() * 3  # what activations leave alone
    reference = HANDING_ON[name](x.clone())
    before = x.clone()
    with torch.no_grad():
        output = module(x)
    assert not written
    if "in place" not in name:
        assert torch.equal(x, before)
    grid = 2 / 15
    assert torch.allclose(output, (reference / grid).round().clamp(-7, 8) * grid, atol=1e-6)
    assert not torch.equal(output, reference)


class Residual(nn.Module):
    """A view of a layer's input, and of its output, are read after the layer was quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.pass_on = nn.Sequential(nn.Identity(), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        skip = y.view(y.shape[0], -1)
        z = self.second(self.pass_on(y))
        z += y
        z = self.act(z).flatten(1)
        return F.relu(z + skip) * skip


def test_views_before_a_residual_addition(written: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3)
    sim = rimet.QuantizationSimModel(Residual().eval(), x)
    sim.compute_encodings(lambda m: m(x))
    expected = sim.model(x).detach()
    before = x.clone()
    assert not written
    with torch.no_grad():
        assert torch.equal(sim.model(x), expected)
    assert written and torch.equal(x, before)
    with torch.inference_mode():
        assert torch.equal(sim.model(x), expected)


@pytest.mark.parametrize(
    "call", [torch.add, torch.Tensor.__add__, lambda x, y: torch.sub(x, other=y)]
)
def test_functions_that_allocate(
    call: Callable[[Tensor, Tensor], Tensor], written: list[int]
) -> None:
    op = FunctionalOp("sub" if "lambda" in str(call) else "add")
    op.output_quantizers = nn.ModuleList([None])  # type: ignore[list-item]
    with_quantizer(op)
    x, y = torch.randn(4), torch.randn(4)
    copies = x.clone(), y.clone()
    with torch.no_grad():
        output = op(call, (x, y), {})
    assert written == [output.data_ptr()]
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


def test_functions_that_return_their_argument(written: list[int]) -> None:
    op = with_quantizer(FunctionalOp("relu"))
    x = torch.full((4,), 0.3)
    with torch.no_grad():
        output = op(F.relu, (x,), {"inplace": True})
    assert not written and output is not x
    assert torch.equal(x, torch.full((4,), 0.3))


def test_graphs_hold_no_write() -> None:
    """Traced and exported under ``no_grad``, and under a function transform."""
    module, shape = ALLOCATING["linear"]
    module, x = twin(module), torch.randn(shape)
    with torch.no_grad():
        expected = module(x)
        traced = torch.jit.trace(module, x)
        exported = torch.export.export(module, (x,))
        transformed = torch.func.functionalize(module)(x)
    for graph in (str(traced.inlined_graph), str(exported.graph)):
        assert "quantize_dequantize_range" in graph
        assert "quantize_dequantize_range_(" not in graph
        assert "quantize_dequantize_range_." not in graph
    for result in (traced(x), exported.module()(x), transformed):
        assert torch.allclose(result, expected, atol=0.2)  # a bin, where sums are ordered anew


def test_subclasses_of_the_quantizer_keep_their_forward(written: list[int]) -> None:
    class Doubling(QuantizeDequantize):
        def _forward_tensor(self, input: Tensor) -> Tensor:
            return 2 * super()._forward_tensor(input)

    module = twin(ALLOCATING["linear"][0])
    x = torch.randn(3, 5)
    with torch.no_grad():
        expected = 2 * module(x)
        written.clear()
        quantizer = Doubling((), 4, False)
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        module.output_quantizers[0] = quantizer  # type: ignore[index]
        assert torch.equal(module(x), expected)
    assert not written


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_nothing_but_the_output_changes(sample: Sample) -> None:
    """Every twin: arguments, parameters and buffers are what the original leaves of them."""

    def run(quantized: bool) -> list[Tensor]:
        module, inputs = sample.make()
        module = module.eval()
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        tensors += [*module.parameters(), *module.buffers()]
        if quantized:
            twin = qnn.QuantizationMixin.from_module(module)
            for i in range(len(twin.output_quantizers)):
                if not isinstance(twin.output_quantizers[i], nn.ModuleList):
                    twin.output_quantizers[i] = QuantizeDequantize((), 4, False)
                    twin.output_quantizers[i].set_range(torch.tensor(-1.0), torch.tensor(1.0))
            module = twin
        with torch.no_grad():
            module(*inputs)
        return tensors

    for left, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(left.nan_to_num() if left.is_floating_point() else left, expected)
