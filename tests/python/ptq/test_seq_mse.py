"""Sequential MSE of whole models: both forms of the call, options, caches, reports."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet import seq_mse
from rimet.adaround import Adaround, AdaroundParameters
from rimet.nn import QuantizationMixin
from rimet.ptq_results import FingerprintMismatchError
from rimet.quantization.affine import QuantizeDequantize
from rimet.quantsim import QuantizationSimModel
from rimet.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from rimet.seq_mse import SeqMseParams, apply_seq_mse
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .models import batches, small, stop_after

TREATED = ["stem", "depthwise", "point", "up", "head"]


def simulation(bitwidth: int = 4, grid: str = "per-channel") -> QuantizationSimModel:
    sim = QuantizationSimModel(small(), batches()[0], default_param_bw=bitwidth)
    layers = [sim.model.point, sim.model.head]
    if grid == "blocks":
        set_blockwise_quantization_for_weights(sim, layers, bitwidth, True, 4)
    elif grid == "lpbq":
        set_grouped_blockwise_quantization_for_weights(sim, layers, bitwidth, True, 8, 4)
    return sim


def ranges(sim: QuantizationSimModel) -> dict[str, Tensor]:
    """Ends of the weights' grids; what was not calibrated is left out."""
    found = {}
    for path, module in sim.named_qmodules():
        quantizers: Any = module.param_quantizers
        quantizer = quantizers["weight"] if "weight" in quantizers else None
        if quantizer is not None and quantizer.is_initialized():
            found[path] = torch.cat([quantizer.min.flatten(), quantizer.max.flatten()]).detach()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("grid", ["per-channel", "blocks", "lpbq"])
@pytest.mark.parametrize("bitwidth", [3, 8])
def test_ranges_are_chosen_frozen_and_better(bitwidth: int, grid: str) -> None:
    sim = simulation(bitwidth, grid)
    weights = {n: p.clone() for n, p in sim.model.named_parameters() if n.endswith("weight")}
    report = apply_seq_mse(sim, batches(), progress=False)
    for name in TREATED:
        layer = report[name]
        assert layer.status == "treated" and layer.details["bitwidth"] == bitwidth
        assert layer.loss_after is not None and layer.loss_before is not None
        assert layer.loss_after <= layer.loss_before
    total = [
        sum(getattr(report[n], f"loss_{when}") for n in TREATED) for when in ("before", "after")
    ]
    assert bitwidth == 8 or total[1] < 0.95 * total[0]
    assert report["norm"].status == "skipped"
    chosen = ranges(sim)
    assert all(torch.equal(dict(sim.model.named_parameters())[n], w) for n, w in weights.items())
    sim.compute_encodings(lambda m: [m(x) for x in batches()])
    assert same({k: v for k, v in ranges(sim).items() if k in TREATED},
                {k: v for k, v in chosen.items() if k in TREATED})  # fmt: skip
    assert all(q.is_initialized() for q in sim.quantizers())


def test_later_layers_see_what_the_earlier_ones_became() -> None:
    """Layer by layer, on inputs of the simulation with weights quantized so far and activations not:
    the same by hand."""
    sim = simulation()
    apply_seq_mse(sim, batches(), 10, progress=False)
    expected = ranges(sim)

    hand = simulation()
    params = SeqMseParams(None, 10)
    for layer in (hand.model.stem, hand.model.depthwise, hand.model.point):
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        treated = [n for n in ("stem", "depthwise", "point") if ranges(hand).get(n) is not None]
        removed = []
        for path, module in hand.named_qmodules():
            removed.append(module._remove_activation_quantizers())
            if path not in treated:
                removed.append(module._remove_param_quantizers())
        for context in removed:
            context.__enter__()
        with torch.no_grad():
            for x in batches():
                hand.model(x)
        for context in reversed(removed):
            context.__exit__(None, None, None)
        handle.remove()
        layer.compute_param_encodings()
        seq_mse.optimize_module(layer, inputs, inputs, params)
    for name in ("stem", "depthwise", "point"):
        assert torch.equal(ranges(hand)[name], expected[name]), name


def test_the_form_of_aimet_2_0_warns_and_does_the_same() -> None:
    model = small()
    old, new = (QuantizationSimModel(model, batches()[0], default_param_bw=4) for _ in range(2))
    with pytest.warns(DeprecationWarning, match="2.0"):
        apply_seq_mse(model, old, batches(), SeqMseParams(2, 8), modules_to_exclude=[model.point])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = apply_seq_mse(
            new, batches()[:2], num_candidates=8, modules_to_exclude=[new.model.point],
            progress=False,
        )  # fmt: skip
    assert same(ranges(old), ranges(new))
    assert report["point"].reason == "excluded by the caller"
    assert new.model.point.param_quantizers["weight"].is_overwrite_allowed()


@pytest.mark.parametrize("inp_symmetry", ["symfp", "asym"])
@pytest.mark.parametrize("loss_fn", ["l1", "sqnr"])
def test_other_symmetries_and_losses_run_through_the_model(inp_symmetry: str, loss_fn: str) -> None:
    sim = simulation()
    report = apply_seq_mse(
        sim, batches(), inp_symmetry=inp_symmetry, loss_fn=loss_fn, progress=False
    )
    assert report.walk["streamed"] == {"float": True, "quant": True}
    assert all(report[n].loss_after <= report[n].loss_before for n in TREATED)  # type: ignore[operator]


def test_channels_with_one_range_take_the_widest_or_the_least_sum() -> None:
    """Against the losses of all candidates, computed one by one."""
    torch.manual_seed(1)
    layer: Any = QuantizationMixin.from_module(nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.7, 1, 6)[:, None])
    quantizer = QuantizeDequantize((), 3, True)
    layer.param_quantizers["weight"] = quantizer
    layer.compute_param_encodings()
    full = quantizer.min.detach().clone(), quantizer.max.detach().clone()
    x = torch.randn(200, 16) + 1
    losses = []
    for i in range(1, 21):
        quantizer.set_range(*(end / 20 * i for end in full))
        with torch.no_grad():
            change = quantizer(layer.weight).as_subclass(Tensor) - layer.weight
        losses.append((x @ change.T).square().sum(0))
    table = torch.stack(losses)
    expected = {"widest": table.argmin(0).max() + 1, "sum": table.sum(1).argmin() + 1}
    assert expected["widest"] > expected["sum"]
    for rule, candidate in expected.items():
        quantizer.allow_overwrite(True)
        quantizer.set_range(*full)
        params = SeqMseParams(1, inp_symmetry="symqt", shared_range=rule)
        seq_mse.optimize_module(layer, [x], [x], params)
        torch.testing.assert_close(quantizer.max.detach(), full[1] / 20 * candidate)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 16, 3, padding=1), nn.Linear(8, 6)])
def test_inference_mode_and_autocast_change_no_bit_of_a_first_layer(
    context: Any, layer: nn.Module
) -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    chosen = []
    for around in (context, torch.no_grad):
        sim = QuantizationSimModel(nn.Sequential(layer).eval(), data[0], default_param_bw=4)
        with around():
            apply_seq_mse(sim, data, progress=False)
        chosen.append(ranges(sim))
    assert same(*chosen)


def test_forward_fn_and_dict_batches() -> None:
    expected, dicts, called = simulation(), simulation(), simulation()
    apply_seq_mse(expected, batches(), progress=False)
    apply_seq_mse(dicts, [{"x": x} for x in batches()], progress=False)
    apply_seq_mse(
        called,
        [(x, "label") for x in batches()],
        forward_fn=lambda model, batch: model(batch[0]),
        progress=False,
    )
    assert same(ranges(dicts), ranges(expected)) and same(ranges(called), ranges(expected))


def test_cache_dir_is_aimets(tmp_path: Path) -> None:
    first, second = simulation(), simulation()
    apply_seq_mse(first, batches(), cache_dir=tmp_path, progress=False)
    assert (tmp_path / "running_module_names.txt").read_text().split() == TREATED
    assert set(load_file(tmp_path / "point.safetensors")) == {"min", "max"}
    report = apply_seq_mse(second, batches(), cache_dir=tmp_path, progress=False)
    assert [report[name].status for name in TREATED] == ["resumed"] * 5
    assert same(ranges(first), ranges(second))


def test_cache_dir_of_another_run_is_refused(tmp_path: Path) -> None:
    apply_seq_mse(simulation(), batches(), cache_dir=tmp_path, progress=False)
    (tmp_path / ".head.safetensors.abc.part").touch()  # a process was killed while it wrote this
    for sim, changes, words in (
        (simulation(), {"num_candidates": 5}, "another num_candidates;"),
        (simulation(8), {}, "another grids, another weights;"),
        (simulation(), {"data_loader": batches(seed=9)}, "another data;"),
    ):
        arguments: dict[str, Any] = {"data_loader": batches(), **changes}
        with pytest.raises(FingerprintMismatchError, match=words):
            apply_seq_mse(sim, cache_dir=tmp_path, progress=False, **arguments)
        assert not ranges(sim)
    assert not list(tmp_path.glob(".*"))


def test_cache_dir_of_aimet_is_taken_with_a_warning_if_its_shapes_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"min": torch.full((5, 1), -0.5), "max": torch.full((5, 1), 0.4375)}
    save_file(kept, tmp_path / "head.safetensors")
    (tmp_path / "running_module_names.txt").write_text("head\n")
    sim = simulation()
    report = apply_seq_mse(sim, batches(), cache_dir=tmp_path, progress=False)
    assert report["head"].status == "resumed" and report["stem"].status == "treated"
    assert "head.safetensors does not say what it was made from" in caplog.text
    assert torch.equal(sim.model.head.param_quantizers["weight"].min, kept["min"])
    save_file({"min": torch.zeros(7, 1), "max": torch.ones(7, 1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head.safetensors: min: .*\(5, 1\).*\(7, 1\)"):
        apply_seq_mse(simulation(), batches(), cache_dir=tmp_path, progress=False)


@pytest.mark.parametrize("folder", ["cache_dir", "results_dir"])
def test_results_are_refused_if_forward_fn_or_the_models_code_is_another(
    tmp_path: Path, folder: str
) -> None:
    def run(scale: float, activation: nn.Module) -> None:
        sim = simulation()
        sim.model.relu = activation
        apply_seq_mse(
            sim,
            batches(),
            forward_fn=lambda model, x: model(x * scale),
            progress=False,
            **{folder: tmp_path},  # type: ignore[arg-type]
        )

    run(1.0, nn.ReLU())
    with pytest.raises(FingerprintMismatchError, match="another forward_fn, .* at stem;"):
        run(2.0, nn.ReLU())
    with pytest.raises(FingerprintMismatchError, match="or model .* at depthwise;"):
        run(1.0, nn.Tanh())
    run(1.0, nn.ReLU())


@pytest.mark.parametrize("technique", ["seq_mse", "adaround"])
def test_a_sample_that_holds_nan_changes_nothing_and_is_said(
    technique: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = batches()
    data[1][0, 0, 0, 0] = float("nan")
    sim = simulation()
    for module in sim.qmodules():
        module.compute_param_encodings()
    before = ranges(sim)
    weight = sim.model.stem.weight.detach().clone()
    nearest = sim.model.stem.param_quantizers["weight"](weight).as_subclass(Tensor)
    if technique == "seq_mse":
        report = apply_seq_mse(sim, data, progress=False)
    else:
        params = AdaroundParameters(data, 3, 10, progress=False)
        report = Adaround.round_simulation(sim, params)
    assert same(ranges(sim), before)
    assert torch.equal(sim.model.stem.weight, weight if technique == "seq_mse" else nearest)
    assert report["stem"].loss_after is None and "NaN" in str(report["stem"].note)
    assert "stem: " in caplog.text and "hold infinities, NaN" in caplog.text
    json.loads(report.to_json(), parse_constant=pytest.fail)  # NaN is no JSON


def test_layers_that_cannot_be_treated_are_all_in_the_report() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
            self.recurrent = nn.LSTM(6, 5)
            self.table, self.last = nn.Embedding(3, 4), nn.Linear(5, 2)

        def forward(self, i: Tensor) -> Tensor:
            return self.last(self.recurrent(self.normed(self.table(i)))[0])

    x = torch.tensor([[0, 1, 2]])
    sim = QuantizationSimModel(Mixed().eval(), x, default_param_bw=4)
    report = apply_seq_mse(sim, [x], progress=False)
    assert [layer.path for layer in report.treated] == ["last"]
    assert report.skipped == {
        "table": "a QuantizedEmbedding is no Linear, Conv or ConvTranspose",
        "recurrent": "a QuantizedLSTM is no Linear, Conv or ConvTranspose",
        "normed": "it is not quantized",
    }


def test_an_error_leaves_the_simulation_uncalibrated() -> None:
    sim = simulation(grid="lpbq")
    for changes in ({"memory_budget": -1}, {"data_loader": []}):
        arguments: dict[str, Any] = {"data_loader": batches(), **changes}
        with pytest.raises(ValueError):
            apply_seq_mse(sim, progress=False, **arguments)
        assert not ranges(sim)


def test_an_interrupted_run_leaves_the_simulation_and_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sim = simulation(), simulation()
    apply_seq_mse(whole, batches(), progress=False)
    stop_after(monkeypatch, "seq_mse_layer", 3)
    with pytest.raises(KeyboardInterrupt):
        apply_seq_mse(sim, batches(), results_dir=tmp_path, progress=False)
    assert not ranges(sim)  # not even calibrated, as before
    monkeypatch.undo()
    report = apply_seq_mse(sim, batches(), results_dir=tmp_path, progress=False)
    assert [report[name].status for name in TREATED] == ["resumed"] * 3 + ["treated"] * 2
    assert same(ranges(sim), ranges(whole))
    with pytest.raises(FingerprintMismatchError, match="another data;"):
        apply_seq_mse(simulation(), batches(seed=9), results_dir=tmp_path, progress=False)


def test_adaround_after_sequential_mse_keeps_its_ranges() -> None:
    sim = simulation()
    apply_seq_mse(sim, batches(), progress=False)
    chosen = ranges(sim)
    Adaround.round_simulation(
        sim, AdaroundParameters(batches(), 3, default_num_iterations=20, progress=False)
    )
    assert same(ranges(sim), chosen)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inp_symmetry.*'both'"):
        SeqMseParams(1, inp_symmetry="both")
    with pytest.raises(ValueError, match=r"loss_fn.*'l2'"):
        SeqMseParams(1, loss_fn="l2")
    with pytest.raises(ValueError, match=r"shared_range.*'mean'"):
        SeqMseParams(1, shared_range="mean")
    with pytest.raises(ValueError, match=r"num_candidates.*0"):
        SeqMseParams(1, num_candidates=0)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"blocks": 1}))
    with pytest.raises(ValueError, match="blocks"):
        apply_seq_mse(simulation(), batches(), checkpoints_config=str(config))
    with pytest.raises(ValueError, match=r"modules_to_exclude.*Linear"):
        apply_seq_mse(simulation(), batches(), modules_to_exclude=[nn.Linear(2, 2)])
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="num_batches"):
        model = small()
        sim = QuantizationSimModel(model, batches()[0])
        apply_seq_mse(model, sim, batches(), SeqMseParams(7))


def test_memory_stays_within_the_budget() -> None:
    """Anonymous memory above the model's own, with data of four times the budget."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "benchmarks.ptq_memory", "seq_mse"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["seq_mse"] <= found["budget"] == 64 << 20
