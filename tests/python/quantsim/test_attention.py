"""Multi-head attention in a simulation: the steps of ``torch.nn.MultiheadAttention`` have the quantizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet.adaround import Adaround, AdaroundParameters
from rimet.quantsim import QuantizationSimModel
from rimet.seq_mse import apply_seq_mse
from torch import Tensor, nn

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]

# As aimet-torch 2.42.0 places them (default configuration), but for two that are called by nothing:
# param_quantizers.in_proj_weight and param_quantizers.in_proj_bias.
AIMETS = {
    *(f"{name}.param_quantizers.weight" for name in PROJECTIONS),
    *(f"{name}.output_quantizers.0" for name in PROJECTIONS),
    "qk_matmul.output_quantizers.0",
    "mask_add.output_quantizers.0",
    "key_padding_mask_add.output_quantizers.0",
    "softmax.input_quantizers.0",
    "softmax.output_quantizers.0",
    "qkv_matmul.output_quantizers.0",
    "mean.output_quantizers.0",
    "cat_bias_k.output_quantizers.0",
    "cat_bias_v.output_quantizers.0",
}
OF_MODEL_INPUTS = {f"{name}.input_quantizers.0" for name in ("q_proj", "k_proj", "v_proj")}


class Attention(nn.Module):
    def __init__(self, behind_a_layer: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16) if behind_a_layer else nn.Identity()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.attention(x, x, x)[0])
        return y


def attention(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention(**options).eval(), torch.randn(3, 5, 16)


@pytest.mark.parametrize("behind_a_layer", [False, True])
@pytest.mark.parametrize("quantize_functional_ops", [False, True])
def test_quantizers_stand_where_aimets_do(
    behind_a_layer: bool, quantize_functional_ops: bool
) -> None:
    model, x = attention(behind_a_layer=behind_a_layer)
    sim = QuantizationSimModel(model, x, quantize_functional_ops=quantize_functional_ops)
    prefix = "attention."
    found = {p.removeprefix(prefix) for p, _ in sim.named_quantizers() if p.startswith(prefix)}
    expected = AIMETS if behind_a_layer else AIMETS | OF_MODEL_INPUTS
    if quantize_functional_ops:  # dividing the scores by a number keeps their grid; masks have none
        masks = {f"{name}.output_quantizers.0" for name in ("mask_add", "key_padding_mask_add")}
        expected = expected - {"softmax.input_quantizers.0"} - masks
    assert found == expected
    weight: Any = sim.model.get_submodule("attention.q_proj").param_quantizers["weight"]
    assert tuple(weight.shape) == (16, 1) and weight.symmetric


def test_what_a_simulation_computes_and_gives_back() -> None:
    model, x = attention()
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    sims = {bits: QuantizationSimModel(model, x, None, bits, bits) for bits in (4, 16)}
    errors = {}
    for bits, sim in sims.items():
        sim.compute_encodings(lambda m: m(x))
        with torch.no_grad():
            y = sim.model(x)
            errors[bits] = float((y - model(x)).abs().max())
            assert torch.equal(copy.deepcopy(sim.model)(x), y)
            traced = torch.jit.trace(sim.model, x, check_trace=False)
            assert torch.equal(traced(x), y)
    assert errors[16] < 1e-3 < 0.02 < errors[4]
    original = QuantizationSimModel.get_original_model(sims[16].model)
    assert type(original.get_submodule("attention")) is nn.MultiheadAttention
    assert original.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in original.state_dict().items())
    rounded = QuantizationSimModel.get_original_model(sims[4].model, qdq_weights=True)
    rows = rounded.get_submodule("attention").in_proj_weight
    assert all(row.unique().numel() <= 16 for row in rows)


@pytest.mark.parametrize("low", [-torch.inf, -1e9])
def test_masks_leave_the_scores_their_range(low: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, -1] = True
    later = torch.ones(5, 5).triu(1).bool()
    masks: list[dict[str, Tensor]] = [
        {"attn_mask": torch.zeros(5, 5).masked_fill(later, low)},
        {"key_padding_mask": hidden},
        {"attn_mask": later, "key_padding_mask": hidden},
    ]
    for mask in masks:
        inputs = {"query": x, "key": x, "value": x, **mask}
        sim = QuantizationSimModel(model, inputs, None, 16, 16)
        sim.compute_encodings(lambda m, inputs=inputs: m(**inputs))
        with torch.no_grad():
            torch.testing.assert_close(
                sim.model(**inputs)[0], model(**inputs)[0], atol=1e-3, rtol=0
            )


def test_an_attention_module_itself_and_one_that_runs_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 16)
    whole = nn.MultiheadAttention(16, 2).eval()
    sim = QuantizationSimModel(whole, (x, x, x))
    sim.compute_encodings(lambda m: m(x, x, x))
    assert "q_proj.param_quantizers.weight" in dict(sim.named_quantizers())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = whole

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x)[0]
            y: Tensor = self.attention(x, x, x)[0]
            return y

    # The steps have one set of quantizers, like the projections, and like functions in a block that
    # runs twice; as AIMET has it, a module without parameters that runs twice has none.
    model, step = Twice(), "attention.softmax"
    for functional in (False, True):
        sim = QuantizationSimModel(model, x, None, 16, 16, quantize_functional_ops=functional)
        sim.compute_encodings(lambda m: m(x))
        names = dict(sim.named_quantizers())
        assert "attention.k_proj.param_quantizers.weight" in names
        assert (f"{step}.output_quantizers.0" in names) is functional
        assert any(step in entry for entry in sim.report.reused) is not functional
        assert not sim.report.unreached
        with torch.no_grad():
            torch.testing.assert_close(sim.model(x), model(x), atol=1e-3, rtol=0)


def test_a_model_that_fails_is_as_it_was() -> None:
    model, _ = attention()
    before = model.get_submodule("attention")
    with pytest.raises(RuntimeError, match="failed on dummy_input"):
        QuantizationSimModel(model, torch.randn(3, 5, 7), in_place=True)
    assert model.get_submodule("attention") is before


def test_techniques_treat_the_projections(tmp_path: Path) -> None:
    model, x = attention()
    paths = [f"attention.{name}" for name in PROJECTIONS]
    for symmetry in ("symqt", "asym"):
        sim = QuantizationSimModel(model, x, default_param_bw=4)
        report = apply_seq_mse(sim, [x, x], inp_symmetry=symmetry, progress=False)
        assert {*paths, "last"} == {layer.path for layer in report.treated}
    params = AdaroundParameters([x, x], 2, default_num_iterations=4, progress=False)
    module = model.get_submodule("attention")
    rounded = Adaround.apply_adaround(
        model, x, params, str(tmp_path), "rounded", param_bw_override_list=[(module, 3)]
    )
    rows = rounded.get_submodule("attention").in_proj_weight
    assert all(row.unique().numel() <= 8 for row in rows)
    sim = QuantizationSimModel(rounded, x, default_param_bw=4)
    sim.set_and_freeze_param_encodings(str(tmp_path / "rounded.encodings"))
    sim.compute_encodings(lambda m: m(x))
    with torch.no_grad():
        quantizer: Any = sim.model.get_submodule("attention.k_proj").param_quantizers["weight"]
        assert quantizer.bitwidth == 3
        assert torch.isfinite(sim.model(x)).all()
