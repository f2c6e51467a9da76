"""Choices of AIMET 2.42 on the same weights and inputs (``tests/data/ptq/record.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rimet.nn
import torch
from rimet import QuantizationSimModel
from rimet.adaround.adaround_loss import AdaroundHyperParameters, AdaroundLoss
from rimet.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from rimet.quantsim.config_utils import set_grouped_blockwise_quantization_for_weights
from rimet.seq_mse import SeqMseParams, apply_seq_mse, get_candidates, optimize_module
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[2] / "data" / "ptq"
SEQ_MSE = load_file(DATA / "seq_mse.safetensors")
LPBQ = load_file(DATA / "lpbq.safetensors")
CASES = sorted(key.removesuffix(".max") for key in SEQ_MSE if key.endswith(".max"))
LAYERS = {
    "linear": lambda: nn.Linear(16, 6),
    "conv": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
}


def module_of(name: str, grid: str, symmetric: bool) -> Any:
    module: Any = rimet.nn.QuantizationMixin.from_module(LAYERS[name]())
    with torch.no_grad():
        module.weight.copy_(SEQ_MSE[f"{name}.weight"])
    weight = module.weight
    shape = [weight.shape[0]] + [1] * (weight.dim() - 1)
    if grid == "per-tensor":
        quantizer = QuantizeDequantize((), 4, symmetric)
    elif grid == "per-channel":
        quantizer = QuantizeDequantize(shape, 4, symmetric)
    else:
        shape[1] = weight.shape[1] // 4
        block = (1, 4, *weight.shape[2:])
        if grid == "blocks":
            quantizer = QuantizeDequantize(shape, 4, symmetric, block_size=block)
        else:
            grouping = (1, -1, *[1] * (weight.dim() - 2))
            quantizer = GroupedBlockQuantizeDequantize(
                shape, 4, True, 8, block_size=block, block_grouping=grouping
            )
    module.param_quantizers["weight"] = quantizer
    module.compute_param_encodings()
    return module


@pytest.mark.parametrize("case", CASES)
def test_sequential_mse_chooses_as_aimet(case: str) -> None:
    name, grid, symmetry, inputs, loss = case.split("/")
    module = module_of(name, grid, symmetry == "symmetric")
    params = SeqMseParams(num_batches=1, inp_symmetry=inputs, loss_fn=loss)
    optimize_module(module, [SEQ_MSE[f"{name}.x"]], [SEQ_MSE[f"{name}.xq"]], params)
    quantizer = module.param_quantizers["weight"]
    # The same candidate, so the same range to the last bit; none of the recorded cases is a tie.
    assert torch.equal(quantizer.max.detach(), SEQ_MSE[f"{case}.max"])
    assert torch.equal(quantizer.min.detach(), SEQ_MSE[f"{case}.min"])
    assert not quantizer.is_overwrite_allowed() and not quantizer.max.requires_grad


def test_sequential_mse_of_a_model_with_two_level_scales_chooses_as_aimet() -> None:
    recorded = load_file(DATA / "seq_mse_lpbq.safetensors")
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5))
    model.load_state_dict({name: recorded[name] for name in model.state_dict()})
    sim = QuantizationSimModel(model, recorded["x"], default_param_bw=4)
    first = sim.model.get_submodule("0")
    set_grouped_blockwise_quantization_for_weights(sim, [first], 4, True, 8, 16, -1)
    apply_seq_mse(sim, [recorded["x"]], 20, progress=False)
    for path in ("0", "2"):
        quantizer: Any = sim.model.get_submodule(f"{path}.param_quantizers.weight")
        for end in ("min", "max"):
            assert torch.equal(getattr(quantizer, end).detach(), recorded[f"{path}.{end}"])


def test_candidates_are_aimets() -> None:
    candidates = get_candidates(4, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -0.5]))
    expected = [([0.25, 0.5], [-0.25, -0.125]), ([0.5, 1.0], [-0.5, -0.25])]
    for (high, low), (a, b) in zip(candidates[:2], expected, strict=True):
        assert high.tolist() == a and low.tolist() == b


@pytest.mark.parametrize("case", sorted({key.rpartition(".")[0] for key in LPBQ}))
def test_two_level_scales_are_aimets_bit_for_bit(case: str) -> None:
    bits, decompressed, grouping = map(int, case.split("/"))
    recorded: dict[str, Tensor] = {
        key: LPBQ[f"{case}.{key}"]
        for key in ("weight", "scale", "per_channel_scale", "per_block_int_scale", "output")
    }
    quantizer = GroupedBlockQuantizeDequantize(
        (6, 8), bits, True, decompressed, block_size=(1, 4), block_grouping=(1, grouping)
    )
    with quantizer.compute_encodings():
        quantizer(recorded["weight"])
    encoding: Any = quantizer.get_encodings()
    assert torch.equal(encoding.scale, recorded["scale"])
    assert torch.equal(encoding.per_channel_scale, recorded["per_channel_scale"])
    assert torch.equal(encoding.per_block_int_scale.float(), recorded["per_block_int_scale"])
    assert torch.equal(quantizer(recorded["weight"]).as_subclass(Tensor), recorded["output"])


def test_adaround_loss_is_aimets() -> None:
    # Values of aimet-torch 2.42.0 for these tensors.
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    assert AdaroundLoss.compute_recon_loss(a, b).item() == pytest.approx(6.488396, rel=1e-6)
    torch.randn(4, 7, 3), torch.randn(4, 7, 3)
    alpha = torch.randn(10)
    settings = AdaroundHyperParameters(1000, 0.01, (20, 2), 0.2)
    recorded = {0: 0.0, 199: 0.0, 600: 0.09866848587989807, 999: 0.07889129221439362}
    expected = {0: 0.0, 199: 0.0}
    for step, value in recorded.items():
        got = float(AdaroundLoss.compute_round_loss(alpha, settings, step))
        assert got == pytest.approx(expected.get(step, value), rel=1e-4)
