"""AdaRound of whole models: files, options, reports, resuming, and what happens on errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet.adaround import Adaround, AdaroundParameters, AdaroundWrapper
from rimet.common.defs import QuantScheme
from rimet.common.quantsim_config.utils import get_path_for_per_tensor_config
from rimet.ptq_results import FingerprintMismatchError
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from torch import Tensor, nn

from .models import Small, batches, small, stop_after

TREATED = ["stem", "depthwise", "point", "up", "head"]


def parameters(**changes: Any) -> AdaroundParameters:
    arguments: dict[str, Any] = {
        "data_loader": batches(),
        "num_batches": 3,
        "default_num_iterations": 60,
        "progress": False,
    }
    return AdaroundParameters(**{**arguments, **changes})


def state(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # Quantizers that were not calibrated have ranges of NaN, which equal nothing.
    return {name: tensor.detach().clone().nan_to_num(-1.0) for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_files_and_the_model_are_what_a_simulation_needs(tmp_path: Path) -> None:
    model, before = small(), state(small())
    x = batches()[0]
    rounded = Adaround.apply_adaround(model, x, parameters(), str(tmp_path), "small")
    assert same(state(model), before) and type(rounded) is Small
    assert not any("quantizer" in name for name, _ in rounded.named_modules())
    encodings = json.loads((tmp_path / "small.encodings").read_text())
    assert set(encodings) == {"param_encodings"}
    assert set(encodings["param_encodings"]) == {f"{name}.weight" for name in TREATED}
    stem = encodings["param_encodings"]["stem.weight"]
    assert len(stem) == 8 and stem[0]["bitwidth"] == 4 and stem[0]["is_symmetric"] == "True"

    sim = QuantizationSimModel(
        rounded, x, quant_scheme=QuantScheme.post_training_tf_enhanced, default_param_bw=4
    )
    sim.set_and_freeze_param_encodings(str(tmp_path / "small.encodings"))
    sim.compute_encodings(lambda m: [m(batch) for batch in batches()])
    for name in TREATED:
        module: Any = sim.model.get_submodule(name)
        quantizer = module.param_quantizers["weight"]
        # On the grid already: quantizing changes nothing beyond the last bits.
        on_grid = quantizer(module.weight).as_subclass(Tensor)
        torch.testing.assert_close(on_grid, module.weight, rtol=1e-6, atol=1e-7)
        original = model.get_submodule(name).weight
        step = (module.weight - original).abs() / quantizer.get_scale()
        clipped = (original > quantizer.get_max()) | (original < quantizer.get_min())
        assert step[~clipped].max() <= 1 + 1e-4

    report = json.loads((tmp_path / "small_report.json").read_text())
    layers = {layer["path"]: layer for layer in report["layers"]}
    for name in TREATED:
        assert layers[name]["status"] == "treated" and layers[name]["details"]["bitwidth"] == 4
        assert layers[name]["loss_after"] <= layers[name]["loss_before"]
    assert layers["norm"]["status"] == "skipped" and "LayerNorm" in layers["norm"]["reason"]
    assert report["walk"]["streamed"] == {"float": True, "quant": True}


def test_activation_functions_are_found_whether_modules_or_not(tmp_path: Path) -> None:
    """With a ReLU or ReLU6 behind it a layer is optimized on minibatches, without on the Gram
    matrix or, if that is dearer, minibatches."""
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    report = Adaround.round_simulation(sim, parameters())
    method = {name: report[name].details["method"] for name in TREATED}
    assert method["stem"] == method["depthwise"] == "minibatch"
    assert method["point"] == method["up"] == "gram"
    assert all(report[name].note is None or "nearest" in report[name].note for name in TREATED)


def test_overrides_ignored_modules_and_per_tensor_grids(tmp_path: Path) -> None:
    model = small()
    Adaround.apply_adaround(
        model, batches()[0], parameters(), str(tmp_path), "p",
        default_param_bw=3,
        param_bw_override_list=[(model.head, 8)],
        ignore_quant_ops_list=[model.point],
        default_config_file=get_path_for_per_tensor_config(),
    )  # fmt: skip
    encodings = json.loads((tmp_path / "p.encodings").read_text())["param_encodings"]
    widths = {name: [e["bitwidth"] for e in entry] for name, entry in encodings.items()}
    assert widths == {
        "stem.weight": [3], "depthwise.weight": [3], "up.weight": [3], "head.weight": [8]
    }  # fmt: skip
    report = json.loads((tmp_path / "p_report.json").read_text())
    reasons = {layer["path"]: layer["reason"] for layer in report["layers"]}
    assert reasons["point"] == "excluded by the caller" and reasons["stem"] is None


def test_with_cache_is_the_same(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"grouped_modules": {"0": ["stem"]}, "cache_on_cpu": "False"}))
    a = Adaround.apply_adaround(small(), batches()[0], parameters(), str(tmp_path), "a")
    b = Adaround.apply_adaround_with_cache(
        small(), batches()[0], parameters(), str(tmp_path), "b", checkpoints_config=str(config)
    )
    assert same(state(a), state(b))
    config.write_text(json.dumps({"grouped": {}}))
    with pytest.raises(ValueError, match=r"grouped_modules.*got grouped"):
        Adaround.apply_adaround_with_cache(
            small(), batches()[0], parameters(), str(tmp_path), "b", checkpoints_config=str(config)
        )


def test_progress_shows_layers_steps_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    report = Adaround.round_simulation(sim, parameters(progress=True))
    shown = capsys.readouterr().err
    assert "AdaRound" in shown and "5/5" in shown and "layer" in shown
    assert "stem" in shown and "/60" in shown
    assert report["head"].losses().startswith("head: loss ") and report["head"].losses() in shown


@pytest.mark.parametrize("grid", ["blocks", "lpbq"])
def test_a_simulation_with_blockwise_grids(grid: str) -> None:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    layers = [sim.model.point, sim.model.head]
    if grid == "blocks":
        set_blockwise_quantization_for_weights(sim, layers, 4, True, 4)
    else:
        set_grouped_blockwise_quantization_for_weights(sim, layers, 4, True, 8, 4)
    report = Adaround.round_simulation(sim, parameters(), [sim.model.stem])
    assert report["stem"].reason == "excluded by the caller"
    for name in ("point", "head"):
        assert report[name].status == "treated"
        module: Any = sim.model.get_submodule(name)
        quantizer = module.param_quantizers["weight"]
        torch.testing.assert_close(
            quantizer(module.weight).as_subclass(Tensor), module.weight, rtol=1e-6, atol=1e-7
        )
        ranges = quantizer.max.clone()
        sim.compute_encodings(lambda m: m(batches()[0]))
        assert torch.equal(quantizer.max, ranges)


def test_rounding_is_better_than_nearest() -> None:
    """On the model's output, too, with one input direction that dominates."""
    data = [batch + 3 for batch in batches()]
    model = small()
    expected = torch.cat([model(x) for x in data]).detach()

    def error(adaround: bool) -> float:
        sim = QuantizationSimModel(model, data[0], default_param_bw=3, default_output_bw=16)
        if adaround:
            Adaround.round_simulation(sim, parameters(data_loader=data, default_num_iterations=800))
        sim.compute_encodings(lambda m: [m(x) for x in data])
        got = torch.cat([sim.model(x) for x in data]).detach()
        return float((got - expected).square().mean())

    assert error(adaround=True) < 0.5 * error(adaround=False)


def test_an_interrupted_run_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    Adaround.round_simulation(whole, parameters())

    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    before = {name: p.clone() for name, p in sim.model.named_parameters() if "quant" not in name}
    stop_after(monkeypatch, "adaround_layer", 2)
    with pytest.raises(KeyboardInterrupt):
        Adaround.round_simulation(sim, parameters(results_dir=tmp_path / "results"))
    assert all(torch.equal(dict(sim.model.named_parameters())[n], p) for n, p in before.items())

    monkeypatch.undo()
    report = Adaround.round_simulation(sim, parameters(results_dir=tmp_path / "results"))
    assert [report[name].status for name in TREATED] == ["resumed"] * 2 + ["treated"] * 3
    assert same(state(sim.model), state(whole.model))

    again = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    with pytest.raises(FingerprintMismatchError, match="another num_iterations, another seed"):
        Adaround.round_simulation(
            again,
            parameters(
                results_dir=tmp_path / "results",
                seed=1,
                default_num_iterations=50,
                learning_rate=1e-2,
            ),
        )
    other = QuantizationSimModel(small(1), batches()[0], default_param_bw=4)
    with pytest.raises(FingerprintMismatchError, match="another weights;"):
        Adaround.round_simulation(other, parameters(results_dir=tmp_path / "results"))
    assert not list((tmp_path / "results").glob("*.part"))


def test_results_on_other_two_level_scales_are_refused(tmp_path: Path) -> None:
    def run(decompressed_bw: int) -> None:
        sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
        set_grouped_blockwise_quantization_for_weights(
            sim, [sim.model.head], 4, True, decompressed_bw, 4
        )
        Adaround.round_simulation(sim, parameters(results_dir=tmp_path))

    run(8)
    with pytest.raises(FingerprintMismatchError, match="another grids;"):
        run(6)


def test_an_error_of_a_layer_names_it() -> None:
    class Chosen(nn.Module):
        """How many rows the second layer gets depends on the weights of the first."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y[y[:, 0] > self.threshold])

    model = Chosen().eval()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        model.threshold = float(model.first(x)[:, 0].median())
        sim = QuantizationSimModel(model, x, default_param_bw=2)
    with pytest.raises(ValueError, match=r"second \(QuantizedLinear\): .*\[10, 2\]"):
        Adaround.round_simulation(sim, parameters(data_loader=[x], num_batches=1))


def test_a_memory_budget_of_nothing_changes_no_bit() -> None:
    results = []
    for budget in (None, 0):
        sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
        report = Adaround.round_simulation(sim, parameters(memory_budget=budget))
        results.append(state(sim.model))
    assert report.walk["memory_budget"] == 0
    assert same(*results)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_inference_mode_and_autocast_around_it(context: Any) -> None:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    with context():
        report = Adaround.round_simulation(sim, parameters())
    assert [layer.path for layer in report.treated] == TREATED
    assert all(layer.loss_after <= layer.loss_before for layer in report.treated)  # type: ignore[operator]


def test_data_that_is_not_finite_is_reported() -> None:
    data = batches()
    data[1][0, 0, 0, 0] = torch.nan
    sim = QuantizationSimModel(small(), data[0], default_param_bw=4)
    report = Adaround.round_simulation(sim, parameters(data_loader=data))
    assert "NaN" in str(report["stem"].note)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    layers = json.loads(report.to_json(), parse_constant=refuse)["layers"]
    assert layers[0]["path"] == "stem" and layers[0]["loss_before"] is None


def test_tied_weights_are_rounded_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    data = [torch.randn(40, 6)]
    sim = QuantizationSimModel(Tied().eval(), data[0], default_param_bw=4)
    report = Adaround.round_simulation(sim, parameters(data_loader=data, num_batches=1))
    assert report["b"].status == "skipped" and "that of a" in str(report["b"].reason)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_batches": 4}, ["num_batches", "3", "4"]),
        ({"num_batches": 0}, ["num_batches", "0"]),
        ({"num_batches": 4, "data_loader": iter(batches())}, ["num_batches", "3", "4"]),
        ({"default_num_iterations": 0}, ["num_iterations"]),
        ({"default_num_iterations": -3}, ["default_num_iterations", "-3"]),
        ({"default_warm_start": 1.5}, ["warm_start"]),
    ],
)
def test_bad_settings_are_named_and_leave_the_simulation(
    changes: dict[str, Any], words: list[str]
) -> None:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    before = {name: p.clone() for name, p in sim.model.named_parameters() if "quant" not in name}
    with pytest.raises(ValueError) as caught:
        Adaround.round_simulation(sim, parameters(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(torch.equal(dict(sim.model.named_parameters())[n], p) for n, p in before.items())


def test_modules_that_are_not_the_models_are_named(tmp_path: Path) -> None:
    for argument in ("ignore_quant_ops_list", "param_bw_override_list"):
        stranger: Any = nn.Linear(2, 2)
        value = [stranger] if argument.startswith("ignore") else [(stranger, 8)]
        with pytest.raises(ValueError, match=rf"{argument}.*Linear"):
            Adaround.apply_adaround(
                small(), batches()[0], parameters(), str(tmp_path), "x", **{argument: value}
            )
    assert not list(tmp_path.iterdir())


def test_wrapper_begins_at_the_weight_and_learns() -> None:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=4)
    sim.compute_encodings(lambda m: m(batches()[0]))
    layer: Any = sim.model.stem
    wrapper = AdaroundWrapper(layer)
    x = batches()[0]
    with layer._remove_param_quantizers():
        expected = layer(x)
    # Within the grid soft rounding gives the weight back; min-max grids clip nothing.
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-3, atol=1e-3)
    wrapper(x).square().sum().backward()
    assert wrapper.alpha.grad is not None and wrapper.alpha.grad.abs().max() > 0
    wrapper.use_soft_rounding = False
    rounded = wrapper.apply_adaround(wrapper.weight)
    quantizer = layer.param_quantizers["weight"]
    torch.testing.assert_close(quantizer(rounded).as_subclass(Tensor), rounded)
    assert wrapper.weight_name == "weight" and type(wrapper.get_original_module()) is nn.Conv2d
    with pytest.raises(ValueError, match="calibrated"):
        AdaroundWrapper(nn.Linear(2, 2))
