"""Parts of a model that calibration never reached: they run, in floating point, and are named."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rimet.nn import QuantizationMixin
from rimet.quantization.affine import Quantize, QuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from torch import nn


class Expert(nn.Module):
    """A module and a functional operation, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.act(self.up(x)))
        y += x
        return F.gelu(y)


class Mixture(nn.Module):
    """Each token goes to one of two experts; one without tokens does not run, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        chosen = (x[:, 0] > 0).long()
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens = torch.where(chosen == index)[0]
            if len(tokens):
                out[tokens] = expert(x[tokens])
        return out


class Second(nn.Module):
    """The tokens of the second expert alone: a path that can be traced."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        expert: torch.Tensor = self.mixture.experts[1](self.mixture.first(x))  # type: ignore[index, operator]
        return expert


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Tokens for one expert each."""
    torch.manual_seed(3)
    tokens = torch.randn(64, 4)
    torch.manual_seed(0)
    chosen = Mixture().first(tokens)[:, 0].detach()
    return {"0": tokens[chosen < -0.2][:8], "1": tokens[chosen > 0.2][:8], "both": tokens}


def simulate(inputs: dict[str, torch.Tensor], calibrate: str | None) -> QuantizationSimModel:
    torch.manual_seed(0)
    sim = QuantizationSimModel(Mixture().eval(), inputs["both"])
    if calibrate is not None:
        sim.compute_encodings(lambda model: model(inputs[calibrate]))
    return sim


UNREACHED = [
    "experts.1.act",
    "experts.1.down",
    "experts.1.functional.add_0",
    "experts.1.functional.gelu_0",
]


def test_one_warning_and_the_report_name_what_saw_no_data(
    inputs: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rimet"):
        sim = simulate(inputs, "0")
    (record,) = caplog.records
    assert all(path in record.getMessage() for path in sim.report.unreached)
    assert "compute_encodings" in record.getMessage()
    # `up` has a quantizer for its weight only: the activation behind it quantizes the result.
    assert sim.report.unreached == UNREACHED
    assert "saw no data in calibration, in floating point until they do (4)" in str(sim.report)


def test_its_weights_are_quantized_and_its_activations_are_not(
    inputs: dict[str, torch.Tensor],
) -> None:
    sim = simulate(inputs, "0")
    x = inputs["1"]
    first, expert = sim.model.first, sim.model.experts[1]
    y = first(x)
    up = F.linear(y, expert.up.param_quantizers["weight"](expert.up.weight), expert.up.bias)
    down = F.linear(
        up.relu(), expert.down.param_quantizers["weight"](expert.down.weight), expert.down.bias
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(sim.model(x), F.gelu(down + y), rtol=0, atol=0)
    assert not torch.equal(sim.model(x), Second(simulate(inputs, "both").model)(x))


def test_data_that_reaches_it_later_gives_it_ranges(inputs: dict[str, torch.Tensor]) -> None:
    sim = simulate(inputs, "0")
    ranges = {
        path: quantizer.get_min()
        for path, quantizer in sim.named_quantizers()
        if "experts.0" in path
    }
    sim.compute_encodings(lambda model: model(inputs["1"]))
    assert sim.report.unreached == []
    assert all(quantizer.is_initialized() for quantizer in sim.quantizers())
    for path, quantizer in sim.named_quantizers():
        if path in ranges:  # no data this time, but ranges from before
            assert torch.equal(quantizer.get_min(), ranges[path])


@pytest.mark.parametrize("how", ["load_encodings", "set_range", "load_state_dict", "in place"])
def test_a_range_by_any_way_ends_it(inputs: dict[str, torch.Tensor], how: str) -> None:
    whole, sim = simulate(inputs, "both"), simulate(inputs, "0")
    whole.compute_encodings(lambda model: model(inputs["0"]))  # the ranges that `sim` has
    whole.compute_encodings(lambda model: model(inputs["1"]))
    sources = dict(whole.named_quantizers())
    if how == "load_encodings":
        activations, params = whole.get_activation_param_encodings()
        sim.load_encodings({"activation_encodings": activations, "param_encodings": params})
    elif how == "load_state_dict":
        sim.model.load_state_dict(whole.model.state_dict())
    else:
        for path, quantizer in sim.named_quantizers():
            low, high = sources[path].min, sources[path].max
            if how == "set_range":
                quantizer.set_range(low, high)
            else:
                quantizer.min.data.copy_(low)
                quantizer.max.data.copy_(high)
    # Encodings files hold scales in decimals.
    tolerance = 1e-6 if how == "load_encodings" else 0
    x = inputs["1"]
    torch.testing.assert_close(sim.model(x), whole.model(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "form", ["deepcopy", "pickle", "state dict", "torch.jit", "torch.export", "torch.compile"]
)
def test_it_stays_so_in_copies_and_graphs(inputs: dict[str, torch.Tensor], form: str) -> None:
    sim = simulate(inputs, "0")
    x = inputs["1"]
    model = Second(sim.model).eval()
    made: torch.nn.Module
    with torch.no_grad():
        if form == "deepcopy":
            made = copy.deepcopy(model)
        elif form == "pickle":
            made = pickle.loads(pickle.dumps(model))
        elif form == "state dict":
            made = Second(simulate(inputs, None).model)
            made.load_state_dict(model.state_dict())
        elif form == "torch.jit":
            buffer = io.BytesIO()
            torch.jit.save(torch.jit.trace(model, x), buffer)
            buffer.seek(0)
            made = torch.jit.load(buffer)
        elif form == "torch.export":
            made = torch.export.export(model, (x,)).module()
        else:
            torch._dynamo.reset()
            made = torch.compile(model, backend="eager", fullgraph=True)
        expected = model(x)
        assert expected.isfinite().all()
        assert torch.equal(made(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_files_leave_it_out(inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    sim = simulate(inputs, "0")
    sim.export(str(tmp_path), "mixture", inputs["0"], export_to_torchscript=True)
    sections = json.loads((tmp_path / "mixture_torch.encodings").read_text())
    assert not [name for name in sections["activation_encodings"] if name.startswith("experts.1")]
    assert "experts.1.up.weight" in sections["param_encodings"]
    assert any(name.startswith("experts.0") for name in sections["activation_encodings"])


def test_without_any_calibration_it_is_an_error_as_before(inputs: dict[str, torch.Tensor]) -> None:
    sim = simulate(inputs, None)
    with pytest.raises(RuntimeError, match=r"was called before its range was set"):
        sim.model(inputs["0"])
    with pytest.raises(RuntimeError, match="not calibrated"):
        sim.export("unused", "unused", inputs["0"], export_to_torchscript=True)


def test_quantizers_outside_of_a_simulation_raise_as_in_aimet() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    with quantizer.compute_encodings():
        pass
    with pytest.raises(RuntimeError, match="called before its range was set"):
        quantizer(torch.ones(3))


def test_modules_with_forwards_of_their_own_run_too() -> None:
    """A twin written by hand calls its quantizers; one that gives grid indices is dequantized."""

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.twice = nn.ReLU(), Twice()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twice(x) if x.sum() > 0 else self.relu(x)

    @QuantizationMixin.implements(Twice)
    class QuantizedTwice(QuantizationMixin, Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            if self.input_quantizers[0] is not None:
                x = self.input_quantizers[0](x)
            result: torch.Tensor = self.output_quantizers[0](super().forward(x))
            return result

    try:
        x = torch.tensor([0.1, 0.7])
        sim = QuantizationSimModel(Branch(), x)
        relu = QuantizationSimModel(Branch(), -x)
        relu.model.relu.output_quantizers[0] = Quantize((), 8, False)
        for simulation in (sim, relu):
            reached = simulation.model.relu if simulation is sim else simulation.model.twice
            simulation.compute_encodings(lambda model, reached=reached: reached(torch.ones(2)))
        assert torch.equal(sim.model(x), 2 * x)
        assert torch.equal(relu.model(-x), torch.zeros(2))
    finally:
        QuantizationMixin.cls_to_qcls.pop(Twice)
        QuantizationMixin.qcls_to_cls.pop(QuantizedTwice)
