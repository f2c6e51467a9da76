"""Records what AIMET chooses: run with the interpreter of the peers' environment.

    .venv-peers/bin/python tests/data/ptq/record.py

Writes ``seq_mse.safetensors`` (weights, inputs, chosen ranges), ``lpbq.safetensors`` (two-level
scales) and ``seq_mse_lpbq.safetensors`` (chosen ranges of a model with two-level scales), with the
versions in the metadata.
"""

from __future__ import annotations

import itertools
from importlib.metadata import version
from pathlib import Path

import aimet_torch.quantization.affine as affine
import torch
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.quantsim.config_utils import set_grouped_blockwise_quantization_for_weights
from aimet_torch.seq_mse import SeqMseParams, SequentialMse, apply_seq_mse
from safetensors.torch import save_file

HERE = Path(__file__).parent
VERSIONS = {name: version(name) for name in ("aimet-torch", "torch")}
LAYERS = {
    "linear": (lambda: torch.nn.Linear(16, 6), (40, 16)),
    "conv": (lambda: torch.nn.Conv2d(8, 6, 3, padding=1), (4, 8, 5, 5)),
    "depthwise": (lambda: torch.nn.Conv2d(6, 6, 3, groups=6), (4, 6, 6, 6)),
}


def quantizer_of(grid: str, weight: torch.Tensor, symmetric: bool) -> torch.nn.Module:
    shape = [weight.shape[0]] + [1] * (weight.dim() - 1)
    if grid == "per-tensor":
        return affine.QuantizeDequantize((), 4, symmetric)
    if grid == "per-channel":
        return affine.QuantizeDequantize(tuple(shape), 4, symmetric)
    shape[1] = weight.shape[1] // 4
    block = (1, 4, *weight.shape[2:])
    if grid == "blocks":
        return affine.QuantizeDequantize(tuple(shape), 4, symmetric, block_size=block)
    grouping = (1, -1, *[1] * (weight.dim() - 2))
    return affine.GroupedBlockQuantizeDequantize(
        tuple(shape), 4, True, 8, block_size=block, block_grouping=grouping
    )


def main() -> None:
    tensors = {}
    for name, (make, shape) in LAYERS.items():
        torch.manual_seed(len(name))
        layer = make()
        x = torch.randn(shape) + torch.randn(shape[:1] + (1,) * (len(shape) - 1))
        xq = x + 0.1 * torch.randn(shape)
        tensors |= {f"{name}.weight": layer.weight.detach(), f"{name}.x": x, f"{name}.xq": xq}
        grids = ["per-tensor", "per-channel"]
        if name != "depthwise":
            grids += ["blocks", "lpbq"]
        for grid, symmetric, inputs, loss in itertools.product(
            grids, (True, False), ("symqt", "symfp", "asym"), ("mse", "l1", "sqnr")
        ):
            if grid == "lpbq" and not symmetric:
                continue
            if name == "linear" and loss == "sqnr":
                continue  # takes the quantized output for the signal, unlike that of convolutions
            module = QuantizationMixin.from_module(make())
            module.weight = torch.nn.Parameter(layer.weight.detach().clone())
            quantizer = quantizer_of(grid, module.weight, symmetric)
            module.param_quantizers["weight"] = quantizer
            module._compute_param_encodings(overwrite=True)
            params = SeqMseParams(num_batches=1, inp_symmetry=inputs, loss_fn=loss)
            # Which inputs go where is decided ahead of this function.
            a, b = {"symqt": (xq, xq), "symfp": (x, x), "asym": (x, xq)}[inputs]
            SequentialMse.optimize_module(module, [a], [b], params)
            key = f"{name}/{grid}/{'symmetric' if symmetric else 'asymmetric'}/{inputs}/{loss}"
            tensors[f"{key}.min"] = quantizer.min.detach().clone()
            tensors[f"{key}.max"] = quantizer.max.detach().clone()
    save_file(tensors, HERE / "seq_mse.safetensors", VERSIONS)

    scales = {}
    for bits, decompressed in ((4, 8), (3, 6), (4, 4)):
        torch.manual_seed(bits)
        weight = torch.randn(6, 32) * torch.rand(6, 1) * torch.rand(1, 32)
        for grouping in (-1, 2, 1):
            quantizer = affine.GroupedBlockQuantizeDequantize(
                (6, 8), bits, True, decompressed, block_size=(1, 4), block_grouping=(1, grouping)
            )
            with quantizer.compute_encodings():
                quantizer(weight)
            encoding = quantizer.get_encodings()
            key = f"{bits}/{decompressed}/{grouping}"
            scales |= {
                f"{key}.weight": weight,
                f"{key}.scale": encoding.scale.detach(),
                f"{key}.per_channel_scale": encoding.per_channel_scale.detach(),
                f"{key}.per_block_int_scale": encoding.per_block_int_scale.detach().float(),
                f"{key}.output": quantizer(weight).detach().as_subclass(torch.Tensor),
            }
    scales = {name: tensor.contiguous().clone() for name, tensor in scales.items()}
    save_file(scales, HERE / "lpbq.safetensors", VERSIONS)
    record_model()


def record_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5))
    x = torch.randn(48, 64) + torch.randn(48, 1)
    sim = QuantizationSimModel(model, x, default_param_bw=4)
    first = sim.model.get_submodule("0")
    set_grouped_blockwise_quantization_for_weights(sim, [first], 4, True, 8, 16, -1)
    apply_seq_mse(sim, [x], 20)
    tensors = {"x": x}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.clone()
    for path in ("0", "2"):
        quantizer = sim.model.get_submodule(path).param_quantizers["weight"]
        tensors |= {f"{path}.min": quantizer.min.detach(), f"{path}.max": quantizer.max.detach()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, HERE / "seq_mse_lpbq.safetensors", VERSIONS)


if __name__ == "__main__":
    main()
