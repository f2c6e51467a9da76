"""QuantizationSimModel: an ordinary module that calibrates, trains, saves, loads, traces and
exports; clear errors.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import rimet
import torch
from rimet.common.defs import QuantizationDataType, QuantScheme
from rimet.common.quant_utils import get_conv_accum_bounds
from rimet.common.quantsim_config.utils import get_path_for_per_tensor_config
from rimet.nn import QuantizationMixin, UnknownModuleError
from rimet.nn.modules import custom
from rimet.quantization import encoding_analyzer
from rimet.quantization.base import QuantizerBase
from rimet.quantsim import (
    QuantizationSimModel,
    check_accumulator_overflow,
    compute_encodings_for_sims,
    load_checkpoint,
    load_encodings_to_sim,
    save_checkpoint,
)
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "quantsim"))

from models import build, wave


def make(name: str = "conv_bn_relu", **options: Any) -> tuple[QuantizationSimModel, Any]:
    model, inputs = build(name, custom)
    sim = QuantizationSimModel(model, inputs[0], **options)
    sim.compute_encodings(lambda m: m(*inputs))
    return sim, inputs[0]


# Numerics


def test_forward_is_the_composition_of_quantized_steps() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.1, -0.3]]))
        layer.bias.copy_(torch.tensor([0.1, -0.2]))
    x = torch.tensor([[0.3, -1.5, 2.0], [1.1, 0.7, -0.4]])
    sim = QuantizationSimModel(nn.Sequential(layer), x, default_param_bw=4)
    sim.compute_encodings(lambda m: m(x))

    def grid(values: torch.Tensor, low: float, high: float, steps: int) -> torch.Tensor:
        scale = (high - low) / steps
        zero = torch.as_tensor(low / scale).round()
        return ((values / scale).round().clamp(zero, zero + steps)) * scale

    weight = torch.stack(
        [grid(row, -8 / 7 * row.abs().max(), row.abs().max(), 15) for row in layer.weight]
    )
    # A symmetric range holds the largest magnitude on the side that it is on.
    weight[0] = grid(layer.weight[0], -1.0, 7 / 8, 15)
    expected = grid(x, -1.5, 2.0, 255) @ weight.T + layer.bias
    plain = layer(x)
    # The output's range is that of the values while input and output pass unquantized.
    observed = x @ weight.T + layer.bias
    expected = grid(expected, min(observed.min().item(), 0), observed.max().item(), 255)
    torch.testing.assert_close(sim.model(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(sim.model(x), plain)


needs_analyzers = pytest.mark.skipif(
    not hasattr(encoding_analyzer, "PercentileEncodingAnalyzer"),
    reason="percentile and SQNR analyzers are not part of this build",
)


@pytest.mark.parametrize("scheme", ["tf", QuantScheme.training_range_learning_with_tf_init])
def test_min_max_schemes_calibrate(scheme: Any) -> None:
    sim, x = make(quant_scheme=scheme)
    assert sim.model.conv1.input_quantizers[0].max.item() == pytest.approx(x.max().item(), rel=0.01)


@needs_analyzers
@pytest.mark.parametrize("scheme", ["tf_enhanced", "percentile"])
def test_every_scheme_calibrates(scheme: Any) -> None:
    sim, x = make(quant_scheme=scheme)
    assert all(q.is_initialized() for q in sim.quantizers())
    original = QuantizationSimModel.get_original_model(sim.model)
    assert (sim.model(x) - original(x)).abs().max() < 0.2 * original(x).abs().max()


@needs_analyzers
def test_percentile_value_cuts_ranges() -> None:
    model, inputs = build("conv_bn_relu", custom)
    sim = QuantizationSimModel(model, inputs[0], quant_scheme="percentile")
    sim.compute_encodings(lambda m: m(*inputs))
    whole = sim.model.conv1.input_quantizers[0].max.item()
    sim.set_percentile_value(90)
    sim.compute_encodings(lambda m: m(*inputs))
    assert sim.model.conv1.input_quantizers[0].max.item() < whole
    with pytest.raises(ValueError, match="90 to 100"):
        sim.set_percentile_value(10)


def test_wider_grids_are_closer() -> None:
    errors = []
    for bits in (4, 8, 16):
        sim, x = make("resnet_functional", default_output_bw=bits, default_param_bw=bits)
        original = QuantizationSimModel.get_original_model(sim.model)
        errors.append((sim.model(x) - original(x)).norm().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.skipif(
    importlib.util.find_spec("rimet.quantization.float") is None,
    reason="float quantizers are not part of this build",
)
def test_float16_simulation() -> None:
    model, inputs = build("conv_bn_relu", custom)
    sim = QuantizationSimModel(
        model,
        inputs[0],
        default_output_bw=16,
        default_param_bw=16,
        default_data_type=QuantizationDataType.float,
    )
    sim.compute_encodings(lambda m: m(*inputs))
    assert not any(p.requires_grad for p in sim.quantizer_parameters())
    torch.testing.assert_close(sim.model(*inputs), model(*inputs), rtol=5e-3, atol=5e-3)


# The model that comes in


def test_original_is_left_alone_unless_in_place() -> None:
    model, inputs = build("mobilenet_v2", custom)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.random.get_rng_state()
    sim = QuantizationSimModel(model, inputs[0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert [type(m) for m in model.modules()] == classes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sim.model is not model and sim.model.training
    assert QuantizationSimModel(model, inputs[0], in_place=True).model is model


def test_shared_modules_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer))
    sim = QuantizationSimModel(model, torch.randn(2, 4))
    assert sim.model[0] is sim.model[2][0]
    assert sim.model[0].weight is not layer.weight


def test_user_hooks_survive() -> None:
    model, inputs = build("conv_bn_relu", custom)
    seen: list[int] = []
    model.conv2.register_forward_hook(lambda *_: seen.append(1))
    sim = QuantizationSimModel(model, inputs[0])
    seen.clear()
    sim.compute_encodings(lambda m: m(*inputs))
    assert seen == [1]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, pair: Any, *, extra: dict[str, torch.Tensor], scale: float = 1.0) -> Any:
        first, (second,) = pair
        return {"out": self.a(first) + self.b(second) * scale, "rest": [extra["z"] * 2]}


def test_nested_inputs_and_keywords() -> None:
    pair = (torch.randn(2, 4), [torch.randn(2, 4)])
    kwargs = {"pair": pair, "extra": {"z": torch.randn(2)}}
    sim = QuantizationSimModel(Nested(), kwargs)
    sim.compute_encodings(lambda m: m(**kwargs))
    assert (
        sim.model.a.input_quantizers[0] is not None and sim.model.b.input_quantizers[0] is not None
    )
    sim2 = QuantizationSimModel(Nested(), (pair, {"extra": {"z": torch.randn(2)}}))
    assert sim2.model.a.input_quantizers[0] is not None


# Calibration


def test_modes_are_restored_and_parameters_are_calibrated_first() -> None:
    model, inputs = build("conv_bn_relu", custom)
    sim = QuantizationSimModel(model, inputs[0])
    sim.model.train()
    sim.model.bn1.eval()
    seen = {}

    def callback(m: nn.Module, args: Any) -> None:
        seen["args"] = args
        seen["training"] = any(module.training for module in m.modules())
        seen["grad"] = torch.is_grad_enabled()
        seen["weight"] = m.conv1.param_quantizers["weight"].is_initialized()
        m(*inputs)

    sim.compute_encodings(callback, None)
    assert seen == {"args": None, "training": False, "grad": False, "weight": True}
    assert sim.model.conv1.training and not sim.model.bn1.training


def test_a_callback_that_runs_nothing_is_an_error() -> None:
    model, inputs = build("conv_bn_relu", custom)
    sim = QuantizationSimModel(model, inputs[0])
    with pytest.raises(RuntimeError, match="did not run the model"):
        sim.compute_encodings(lambda m: None)
    with pytest.raises(TypeError, match="function of the model"):
        sim.compute_encodings(3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        sim.model(*inputs)


def test_several_sims_at_once() -> None:
    (model, inputs), (other, _) = build("conv_bn_relu", custom), build("conv_bn_relu", custom)
    sims = [QuantizationSimModel(m, inputs[0]) for m in (model, other)]
    compute_encodings_for_sims(sims, lambda models, args: [m(*args) for m in models], inputs)
    assert all(q.is_initialized() for sim in sims for q in sim.quantizers())


# An ordinary module


def test_state_dict_deepcopy_pickle_and_dtype() -> None:
    sim, x = make("concat")
    expected = sim.model(x)
    again = QuantizationSimModel(build("concat", custom)[0], x)
    again.model.load_state_dict(sim.model.state_dict())
    assert torch.equal(again.model(x), expected)
    keys = set(sim.quantizer_state_dict())
    assert keys < set(sim.model.state_dict()) and "head.param_quantizers.weight.min" in keys
    assert not any(key.endswith(("weight", "bias")) for key in keys)
    assert torch.equal(copy.deepcopy(sim.model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(sim.model))(x), expected)
    copied = copy.deepcopy(sim.model)
    assert copied.cat.output_quantizers[0] is copied.a.output_quantizers[0]  # the tie survives
    half = copy.deepcopy(sim.model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_checkpoint(tmp_path: Path) -> None:
    sim, x = make()
    save_checkpoint(sim, str(tmp_path / "sim.pkl"))
    assert torch.equal(load_checkpoint(str(tmp_path / "sim.pkl")).model(x), sim.model(x))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(TypeError, match="QuantizationSimModel"):
        load_checkpoint(str(tmp_path / "other.pkl"))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_training_moves_weights_and_ranges_and_reduces_the_loss(optimizer: Any) -> None:
    sim, x = make("resnet_functional", default_output_bw=4, default_param_bw=4)
    target = wave((2, 10), 0.7, 1.0)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trainer = optimizer(sim.model.parameters(), lr=2e-3, **options)
    before = {name: p.detach().clone() for name, p in sim.model.named_parameters()}
    sim.model.train()
    losses = []
    for _ in range(12):
        trainer.zero_grad()
        loss = (sim.model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        trainer.step()
    moved = {name for name, p in sim.model.named_parameters() if not torch.equal(p, before[name])}
    assert "conv1.weight" in moved and "fc.bias" in moved
    for kind in ("input_quantizers.0.max", "param_quantizers.weight.max"):
        assert any(name.endswith(kind) for name in moved), kind
    assert any("output_quantizers" in name for name in moved)
    assert min(losses[-4:]) < losses[0]


def _fused_step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, fused=True).step()


def _assign_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data.mul_(0.5),
        _assign_data,
        _fused_step,
        lambda w: w.detach().numpy().__imul__(0.5),
    ],
    ids=["p.data.mul_", "p.data =", "fused optimizer", "numpy"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_the_next_forward_uses_the_new_weight(change: Any, grad: bool) -> None:
    sim, x = make("mlp")
    weight = sim.model.fc1.weight
    with torch.set_grad_enabled(grad):
        before = sim.model(x)
        change(weight)
        after = sim.model(x)
        # The same forward by a model that was given the new weight before it ever ran.
        other, _ = make("mlp")
        other.model.load_state_dict(sim.model.state_dict())
        assert not torch.equal(after, before) and torch.equal(after, other.model(x))


def test_load_state_dict_brings_weights_and_ranges() -> None:
    sim, x = make("mlp")
    before = sim.model(x)
    state = copy.deepcopy(sim.model.state_dict())
    for name in ("fc1.weight", "fc1.param_quantizers.weight.max"):
        changed = {**state, name: state[name] * 0.5}
        sim.model.load_state_dict(changed)
        assert not torch.equal(sim.model(x), before), name
    sim.model.load_state_dict(state)
    assert torch.equal(sim.model(x), before)


def test_traced_and_exported_graphs_quantize_their_own_weights() -> None:
    """The ops of the weights are in the graph: a weight that is changed there is quantized anew."""
    sim, x = make("mobilenet_v2")
    script = torch.jit.trace(sim.model, (x,))
    program = torch.export.export(sim.model, (x,))
    exported = program.module()
    before = sim.model(x)
    weights = [
        name
        for name, module in sim.named_qmodules()
        if dict(module.param_quantizers.items()).get("weight") is not None
    ]
    assert len(weights) > 2
    with torch.no_grad():
        for name in weights:  # the graphs hold the very same parameters
            sim.model.get_parameter(f"{name}.weight").mul_(0.3)
        expected = sim.model(x)
        assert not torch.equal(expected, before)
        assert torch.equal(script(x), expected) and torch.equal(exported(x), expected)
    parameters = program.graph_signature.inputs_to_parameters
    quantized = {
        parameters[node.args[0].name]
        for node in program.graph.nodes
        if "rimet.quantize_dequantize" in str(node.target)
        and getattr(node.args[0], "name", None) in parameters
    }
    assert {f"{name}.weight" for name in weights} <= quantized


@pytest.mark.parametrize(
    "name",
    ["conv_bn_relu", "resnet_functional", "mobilenet_v2", "concat", "transformer", "shuffle"],
)
def test_torchscript_and_torch_export(name: str) -> None:
    sim, x = make(name)
    expected = sim.model(x)
    script = torch.jit.trace(sim.model, (x,))
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), expected)
    assert "rimet::" in str(script.inlined_graph)
    program = torch.export.export(sim.model, (x,))
    assert torch.equal(program.module()(x), expected)
    assert any("rimet" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(("name", "functional"), [("conv_bn_relu", False), ("mobilenet_v2", True)])
def test_ddp_with_two_processes(tmp_path: Path, name: str, functional: bool) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            import torch
            import torch.distributed as dist
            from torch.nn.parallel import DistributedDataParallel
            sys.path.insert(0, {str(Path(__file__).parents[2] / "data" / "quantsim")!r})
            from models import build
            from rimet.nn.modules import custom
            from rimet.quantsim import QuantizationSimModel

            torch.set_num_threads(1)
            rank = int(sys.argv[1])
            store = "file://" + sys.argv[2]
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            model, (x,) = build("{name}", custom)
            sim = QuantizationSimModel(model, x)
            assert bool(sim.report.functional_ops) == {functional}
            sim.compute_encodings(lambda m: m(x))
            ddp = DistributedDataParallel(sim.model.train())
            trainer = torch.optim.SGD(ddp.parameters(), lr=0.01)
            for step in range(3):
                trainer.zero_grad()
                ddp(x * (1 + rank)).square().mean().backward()
                trainer.step()
            flat = torch.cat([p.detach().flatten() for p in ddp.parameters()])
            both = [torch.empty_like(flat) for _ in range(2)]
            dist.all_gather(both, flat)
            assert torch.equal(both[0], both[1]), "ranks differ"
            trained = [n for n, p in ddp.named_parameters() if p.grad is not None]
            assert any("quantizers" in name for name in trained)
            assert any("functional" in name for name in trained) == {functional}
            dist.destroy_process_group()
            print("same", rank)
            """
        )
    )
    python_path = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all("same" in output for output in outputs), "\n".join(outputs)


def test_the_fused_encoder_layer_does_not_bypass_the_quantizers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = wave((2, 3, 8), 0.3, 1.0)
    sim = QuantizationSimModel(model, x, default_param_bw=4)
    sim.compute_encodings(lambda m: m(x))
    sim.exclude_layers_from_quantization([sim.model.layers[0].self_attn])
    with torch.no_grad():
        fused, quantized = model(x), sim.model(x)
    torch.testing.assert_close(
        quantized, sim.model(x).detach()
    )  # gradients switch the fused layer off
    assert (fused - quantized).abs().max() > 0.01
    plain = QuantizationSimModel.get_original_model(sim.model)
    assert plain.layers[0].activation_relu_or_gelu == 1
    with torch.no_grad():
        torch.testing.assert_close(plain(x), fused)


class UsesAnothersWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.idle = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.embed(tokens), self.head.weight)


def test_modules_that_others_compute_for_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="rimet"):
        sim = QuantizationSimModel(
            UsesAnothersWeight(), torch.tensor([1, 2]), quantize_functional_ops=False
        )
    assert sim.report.bypassed == ["head"]
    assert [r.msg for r in caplog.records if "head did not run itself" in r.msg]


def test_the_weight_of_a_functional_layer_is_quantized() -> None:
    model, tokens = UsesAnothersWeight(), torch.tensor([1, 2])
    sim = QuantizationSimModel(model, tokens, default_param_bw=4)
    assert sim.report.bypassed == []
    quantizer = sim.model.functional.linear_0.input_quantizers[1]
    assert quantizer.bitwidth == 4 and quantizer.shape == (5, 1) and quantizer.symmetric
    sim.compute_encodings(lambda m: m(tokens))
    with torch.no_grad():
        hidden, weight = sim.model.embed(tokens), quantizer(sim.model.head.weight)
        output = sim.model.functional.linear_0.output_quantizers[0](hidden @ weight.T)
        assert torch.equal(sim.model(tokens), output)


def test_modules_that_were_given_nothing_pass_nothing_on() -> None:
    """As the mask head of a detector that finds no objects in the calibration data."""

    class Detects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return self.head(y[x[:, 0] > 100])

    x = torch.randn(4, 2)
    sim = QuantizationSimModel(Detects(), x)
    with torch.no_grad():
        assert sim.model.head(x[:0]).shape == (0, 3)  # before any calibration
    sim.compute_encodings(lambda m: m(x))
    assert sim.model(x).shape == (0, 3)
    # Calibration brought no values: see test_unreached.py for what happens to the first.
    assert sim.report.unreached == ["head"]
    assert sim.model(torch.full((1, 2), 1e3)).shape == (1, 3)


# Files


def test_encodings_round_trip(tmp_path: Path) -> None:
    sim, x = make("concat")
    sim.save_encodings_to_json(str(tmp_path), "enc")
    content = json.loads((tmp_path / "enc.json").read_text())
    assert set(content) == {"activation_encodings", "param_encodings"}
    entry = content["activation_encodings"]["a"]["input"]["0"]
    quantizer = sim.model.a.input_quantizers[0]
    assert entry["dtype"] == "int" and entry["is_symmetric"] == "False" and entry["bitwidth"] == 8
    assert entry["min"] == quantizer.get_min().item() and entry["max"] == quantizer.get_max().item()
    assert entry["scale"] == quantizer.get_scale().item()
    assert entry["offset"] == quantizer.get_offset().item()
    weights = content["param_encodings"]["a.weight"]
    assert len(weights) == 8 and all(w["offset"] == -128 for w in weights)
    assert sorted(os.listdir(tmp_path)) == ["enc.json"]

    for source in (content, str(tmp_path / "enc.json"), tmp_path / "enc.json"):
        other = QuantizationSimModel(build("concat", custom)[0], x)
        other.load_encodings(source)
        torch.testing.assert_close(other.model(x), sim.model(x), rtol=0, atol=1e-6)


def test_loading_flags() -> None:
    sim, x = make()
    activations, params = sim.get_activation_param_encodings()
    fresh = QuantizationSimModel(build("conv_bn_relu", custom)[0], x)
    only = {"activation_encodings": {}, "param_encodings": {"conv1.weight": params["conv1.weight"]}}
    fresh.load_encodings(only, requires_grad=False, allow_overwrite=False)
    loaded = fresh.model.conv1.param_quantizers["weight"]
    assert loaded.is_initialized() and not loaded.min.requires_grad
    assert not fresh.model.relu1.output_quantizers[0].is_initialized()
    kept = loaded.max.clone()
    with torch.no_grad():
        fresh.model.conv1.weight.mul_(3)
    fresh.compute_encodings(lambda m: m(x))
    assert torch.equal(loaded.max, kept)
    fresh.load_encodings(only, partial=False)
    assert fresh.model.relu1.output_quantizers[0] is None
    # A range that may not be overwritten is not removed either.
    assert fresh.model.conv1.param_quantizers["weight"] is loaded


def test_loading_problems_are_named_together_and_change_nothing() -> None:
    sim, x = make()
    before = {
        k: v.clone() for k, v in sim.model.state_dict().items() if isinstance(v, torch.Tensor)
    }
    channel = {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "min": -1.0, "max": 1.0}
    bad = {
        "activation_encodings": {
            "nowhere": {"input": {"0": channel}},
            "conv1": {"output": {"0": channel}},
        },
        "param_encodings": {"conv1.bias": [channel], "conv1.weight": [channel] * 8},
    }
    with pytest.raises(RuntimeError) as caught:
        sim.load_encodings(bad)
    for part in ("nowhere", "conv1, output 0", "conv1.bias"):
        assert part in str(caught.value)
    with pytest.raises(RuntimeError, match="expected 8 encodings"):
        sim.load_encodings({"param_encodings": {"conv1.weight": [channel] * 3}}, strict=False)
    with pytest.raises(RuntimeError, match="got none"):
        sim.load_encodings({})
    with pytest.raises(RuntimeError, match="module 'nowhere' does not exist"):
        sim.load_encodings({"activation_encodings": {"nowhere": {}}})
    with pytest.raises(ValueError, match=r"param_encodings\[\"conv1.weight\"\]"):
        sim.load_encodings({"param_encodings": {"conv1.weight": [{"bitwidth": "eight"}]}})
    after = sim.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    sim.load_encodings(bad, strict=False)
    assert sim.model.conv1.param_quantizers["weight"].max.max().item() == pytest.approx(
        1.0, abs=0.01
    )


def test_a_file_that_is_not_json_is_named_with_the_position(tmp_path: Path) -> None:
    sim, _ = make()
    path = tmp_path / "broken.json"
    path.write_text('{"activation_encodings": {\n  "conv1": oops}}')
    for load in (sim.load_encodings, sim.set_and_freeze_param_encodings):
        with pytest.raises(ValueError, match=r"broken\.json.*not valid JSON.*line 2 column 12"):
            load(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"broken\.json"):
        sim.load_and_freeze_encodings(str(path))


def test_freezing(tmp_path: Path) -> None:
    sim, x = make()
    _, params = sim.get_activation_param_encodings()
    (tmp_path / "p.encodings").write_text(json.dumps({"param_encodings": params}))
    fresh = QuantizationSimModel(build("conv_bn_relu", custom)[0], x)
    fresh.set_and_freeze_param_encodings(str(tmp_path / "p.encodings"))
    quantizer = fresh.model.conv2.param_quantizers["weight"]
    assert quantizer.is_initialized() and not quantizer.is_overwrite_allowed()
    sim.save_encodings_to_json(str(tmp_path), "all")
    fresh.load_and_freeze_encodings(str(tmp_path / "all.json"))
    assert all(not q.is_overwrite_allowed() for q in fresh.quantizers())
    fresh.exclude_layers_from_quantization([fresh.model.conv2])
    with pytest.raises(RuntimeError, match="conv2"):
        fresh.load_and_freeze_encodings(str(tmp_path / "all.json"))
    fresh.load_and_freeze_encodings(str(tmp_path / "all.json"), ignore_when_quantizer_disabled=True)


def test_export_writes_a_torchscript_that_runs_with_the_ops_alone(tmp_path: Path) -> None:
    sim, x = make("resnet_functional")
    sim.export(str(tmp_path), "m", x, export_to_torchscript=True)
    assert sorted(os.listdir(tmp_path)) == [
        "m.encodings",
        "m.pth",
        "m.torchscript.pth",
        "m_torch.encodings",
    ]
    original = torch.load(tmp_path / "m.pth", weights_only=False)
    assert not any(isinstance(m, QuantizerBase) for m in original.modules())
    by_module = json.loads((tmp_path / "m_torch.encodings").read_text())
    assert set(by_module) == {
        "version",
        "activation_encodings",
        "param_encodings",
        "excluded_layers",
        "producer",
        "quantizer_args",
    }
    assert by_module["quantizer_args"]["quant_scheme"] == "min_max"
    by_tensor = json.loads((tmp_path / "m.encodings").read_text())
    assert by_tensor["version"] == "1.0.0"
    weight = next(e for e in by_tensor["param_encodings"] if e["name"] == "conv1.weight")
    assert (
        weight["enc_type"] == "PER_CHANNEL"
        and len(weight["scale"]) == 8
        and weight["is_sym"] is True
    )
    load_encodings_to_sim(sim, str(tmp_path / "m_torch.encodings"))

    torch.save((x, sim.model(x)), tmp_path / "io.pt")
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[2]); "
        "x, y = torch.load(sys.argv[1] + '/io.pt'); "
        "assert torch.equal(torch.jit.load(sys.argv[1] + '/m.torchscript.pth')(x), y); "
        "assert 'rimet' not in sys.modules; print('equal')"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), rimet.ops_library_path()]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "equal", result.stderr


def test_export_refusals(tmp_path: Path) -> None:
    sim, x = make()
    with pytest.raises(RuntimeError, match="use_embedded_encodings"):
        sim.export(str(tmp_path), "m", x, use_embedded_encodings=True)
    with pytest.raises(RuntimeError, match=r"0\.6\.1"):
        sim.export(str(tmp_path), "m", x, propagate_encodings=True, export_to_torchscript=True)
    model, inputs = build("unused", custom)
    fresh = QuantizationSimModel(model, inputs[0])
    with pytest.raises(RuntimeError, match="never.output_quantizers.0"):
        fresh.export(str(tmp_path), "m", inputs[0], export_to_torchscript=True)
    assert os.listdir(tmp_path) == []


def test_folding_and_the_way_back(tmp_path: Path) -> None:
    sim, x = make("mlp", default_param_bw=4)
    expected = sim.model(x)
    plain = QuantizationSimModel.get_original_model(sim.model)
    assert [type(m) for m in plain.modules()] == [
        type(m) for m in build("mlp", custom)[0].modules()
    ]
    assert torch.equal(plain(x), build("mlp", custom)[0](x))
    folded = QuantizationSimModel.get_original_model(sim.model, qdq_weights=True)
    assert folded.fc1.weight.unique().numel() <= 16 * 32
    assert not torch.equal(folded.fc1.weight, plain.fc1.weight)
    sim.export_weights_to_safetensors(str(tmp_path), "w")
    sim.fold_param_quantizers()
    torch.testing.assert_close(sim.model(x), expected)
    assert sim.model.fc1.param_quantizers["weight"] is None
    _, params = sim.get_activation_param_encodings()
    assert len(params["fc1.weight"]) == 32
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "w.safetensors")["fc1.weight"], folded.fc1.weight)


def test_exclusion() -> None:
    sim, x = make()
    sim.exclude_param_from_quantization("weight")
    weights = [
        m.param_quantizers["weight"] for m in sim.qmodules() if "weight" in m.param_quantizers
    ]
    assert weights and not any(weights)
    sim.exclude_layers_from_quantization([sim.model.conv1])
    assert type(sim.model.conv1) is nn.Conv2d and sim._excluded_layer_names == ["conv1"]
    sim.model(x)
    with pytest.raises(ValueError, match="from elsewhere"):
        sim.exclude_layers_from_quantization([nn.Linear(1, 1)])


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant_scheme": "min_max"}, ValueError, "quant_scheme"),
        ({"quant_scheme": 3}, ValueError, "quant_scheme"),
        ({"default_param_bw": 1}, ValueError, "default_param_bw"),
        ({"default_param_bw": 33}, ValueError, "default_param_bw"),
        ({"default_output_bw": 3}, ValueError, "default_output_bw"),
        ({"default_output_bw": 8.0}, ValueError, "default_output_bw"),
        ({"default_data_type": QuantizationDataType.float}, ValueError, "default_output_bw"),
        ({"default_data_type": 2}, ValueError, "default_data_type"),
        ({"config_file": "no_such_file.json"}, FileNotFoundError, "htp_v73"),
        (
            {"quant_scheme": QuantScheme.training_range_learning},
            NotImplementedError,
            "quant_scheme",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, inputs = build("mlp", custom)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        QuantizationSimModel(model, inputs[0], in_place=True, **options)
    assert [type(m) for m in model.modules()] == classes


def test_bad_models_and_inputs() -> None:
    model, inputs = build("mlp", custom)
    with pytest.raises(RuntimeError, match="without any tensor"):
        QuantizationSimModel(model, "abc")
    with pytest.raises(TypeError, match="torch.nn.Module"):
        QuantizationSimModel(3, inputs[0])  # type: ignore[arg-type]
    sim = QuantizationSimModel(model, inputs[0])
    with pytest.raises(RuntimeError, match="quantized modules: fc1"):
        QuantizationSimModel(sim.model, inputs[0])
    with pytest.raises(RuntimeError, match="failed on dummy_input"):
        QuantizationSimModel(model, torch.randn(2, 3), in_place=True)
    assert type(model.fc1) is nn.Linear and not model.fc1._forward_hooks


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


class Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x * x


def test_unknown_modules_are_named_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Square(), nn.Identity(), Cube())
    with pytest.raises(UnknownModuleError) as caught:
        QuantizationSimModel(
            model, torch.randn(1, 2), in_place=True, quantize_unknown_modules=False
        )
    for part in ("Square", "at 1", "Cube", "at 3", "implements", "ignore"):
        assert part in str(caught.value)
    assert type(model[0]) is nn.Linear
    QuantizationMixin.ignore(Square)
    QuantizationMixin.ignore(Cube)
    try:
        x = torch.randn(1, 2)
        sim = QuantizationSimModel(model, x)
        sim.compute_encodings(lambda m: m(x))
        assert type(sim.model[1]) is Square
    finally:
        QuantizationMixin._ignored_module_types -= {Square, Cube}


def test_problems_of_several_kinds_are_named_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Square(), nn.Sequential(Cube(), nn.Linear(3, 3)))
    with pytest.raises(UnknownModuleError) as caught:
        QuantizationSimModel(model, torch.randn(1, 2), quantize_unknown_modules=False)
    for part in ("failed on dummy_input", "Square at 1", "Cube at 2.0", "ignore(Square)"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    model[2][1] = QuantizationMixin.from_module(model[2][1])
    with pytest.raises(UnknownModuleError) as caught:
        QuantizationSimModel(model, torch.randn(1, 2), quantize_unknown_modules=False)
    for part in ("quantized modules: 2.1", "get_original_model", "Square at 1", "Cube at 2.0"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": {}}, ValueError, r"\$\.extra"),
        (
            {"params": {"bias": {"is_quantized": False}}},
            ValueError,
            r"\$\.params\.bias\.is_quantized",
        ),
        (
            {"supergroups": [{"op_list": ["Conv", "Nope"]}]},
            ValueError,
            r"\$\.supergroups\[0\]\.op_list\[1\]",
        ),
        ({"model_input": {"is_input_quantized": "False"}}, NotImplementedError, r"\$\.model_input"),
        (
            {
                "defaults": {
                    "ops": {},
                    "params": {"is_quantized": "True", "is_symmetric": "True"},
                    "strict_symmetric": "True",
                }
            },
            NotImplementedError,
            r"strict_symmetric",
        ),
    ],
)
def test_configuration_errors(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = {
        "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True"}},
        "params": {},
        "op_type": {},
        "supergroups": [],
        "model_input": {},
        "model_output": {},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, **change}))
    model, inputs = build("mlp", custom)
    with pytest.raises(error, match=message):
        QuantizationSimModel(model, inputs[0], config_file=str(path))
    path.write_text("{ broken")
    with pytest.raises(ValueError, match="not valid JSON"):
        QuantizationSimModel(model, inputs[0], config_file=str(path))


def test_accumulator_overflow() -> None:
    model = nn.Sequential(nn.Conv2d(50, 2, (1, 2)), nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(0.9)
        model[0].weight[1, 10:] = -1.0
        model[1].weight.fill_(1.0)
    name, used = check_accumulator_overflow(model, 8, 23)
    # 255 steps from -1 to 1: 0.9 is 115 of them. The second channel has 80 weights of -1, which are
    # -127.5 steps, to even: -128.
    assert (name, used) == ("0", pytest.approx(255 * max(100 * 115, 80 * 128) / 2**22))
    assert check_accumulator_overflow(nn.ReLU(), 8, 23) == (None, 0.0)
    weight = model[0].weight.detach().numpy()
    assert get_conv_accum_bounds(weight, 8, 23)[0] is False
    assert get_conv_accum_bounds(weight, 8, 22)[0] is True
    assert get_conv_accum_bounds(0 * weight, 8, 22) == (False, 0.0)


def test_an_uncalibrated_forward_names_the_quantizer() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    x = torch.randn(1, 3, 8, 8)
    sim = QuantizationSimModel(model, x)
    with pytest.raises(RuntimeError) as caught:
        sim.model(x)
    message = str(caught.value)
    assert message.startswith("0.input_quantizers.0: ") and "compute_encodings" in message


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("name", ["resnet_functional", "transformer", "reused", "unet"])
def test_configure_quantization_ops(name: str, functional: bool) -> None:
    """Placed anew, a simulation is one that was made with these arguments."""
    options = {"quantize_functional_ops": functional}
    model, inputs = build(name, custom)
    dummy = inputs if len(inputs) > 1 else inputs[0]
    sim = QuantizationSimModel(model, dummy, config_file="htp_v73", **options)
    sim.compute_encodings(lambda m: m(*inputs))
    sim.configure_quantization_ops(None, 16, 4, QuantizationDataType.int)
    wanted = QuantizationSimModel(
        model, dummy, default_output_bw=16, default_param_bw=4, config_file=None, **options
    )
    assert not any(quantizer.is_initialized() for quantizer in sim.quantizers())
    assert [path for path, _ in sim.named_quantizers()] == [p for p, _ in wanted.named_quantizers()]
    assert sim.quant_args == wanted.quant_args
    assert str(sim.report) == str(wanted.report)
    for each in (sim, wanted):
        each.compute_encodings(lambda m: m(*inputs))
    assert str(sim.model) == str(wanted.model)
    got, expected = sim.model(*inputs), wanted.model(*inputs)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="default_output_bw"):
        sim.configure_quantization_ops(None, 2, 4, QuantizationDataType.int)
    assert torch.equal(sim.model(*inputs), expected)


def test_what_is_wrong_with_a_configuration_names_its_file(tmp_path: Path) -> None:
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    file = tmp_path / "target.json"
    for content, kind, message in (
        (b"{", ValueError, "not valid JSON"),
        (b"{}", ValueError, r"\$\.defaults: expected this required key"),
        (b"\xff", ValueError, "not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(kind, match=f"target.json: quantsim configuration.*{message}"):
            QuantizationSimModel(model, x, config_file=str(file))
    content = Path(get_path_for_per_tensor_config()).read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content)  # as Windows editors save it
    QuantizationSimModel(model, x, config_file=str(file))


def test_every_place_of_an_unknown_class_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = nn.Sequential(Odd(), nn.Sequential(Odd(), nn.ReLU()))
    with pytest.raises(UnknownModuleError, match=r"Odd at 0, 1\.0\n"):
        QuantizationSimModel(model, torch.randn(2), quantize_unknown_modules=False)
