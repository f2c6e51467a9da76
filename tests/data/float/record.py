"""Record what AIMET's float quantizers give, as `float.safetensors` beside this file.

    .venv-peers/bin/python tests/data/float/record.py

Made with aimet-torch 2.42.0 and torch 2.11.0. One tensor per key ``<case>/<name>``; the file's
metadata say what each case is (JSON). AIMET casts gradients to the format on their way back, between
a multiplication and a division by the scale: incoming gradients are powers of two over the scale,
which survive that. Its composition for formats that are no dtype of torch ends in ``torch.round``,
through which no gradient passes: theirs are not recorded.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from aimet_torch import nn as aimet_nn
from aimet_torch.quantization.float import FloatQuantizeDequantize
from safetensors.torch import save_file
from torch import Tensor

warnings.simplefilter("ignore")

FORMATS: list[dict[str, Any]] = [
    {"exponent_bits": exponent, "mantissa_bits": mantissa, "finite": finite, "unsigned_zero": uz}
    for exponent, mantissa, finite, uz in (
        (5, 10, False, False),
        (8, 7, False, False),
        (4, 3, True, False),
        (4, 3, True, True),
        (5, 2, False, False),
        (5, 2, True, True),
        (4, 3, False, False),
        (2, 1, True, False),
        (2, 1, False, False),
        (3, 4, False, False),
        (6, 9, False, False),
    )
]
# Encoding shape and block size for an input of 6 x 48.
GRANULARITIES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((), None),
    ((6, 1), None),
    ((6, 3), (1, 16)),
    ((2, 12), (3, 4)),
]

tensors: dict[str, Tensor] = {}
cases: list[dict[str, Any]] = []
generator = torch.Generator().manual_seed(2142)


def keep(name: str, value: Tensor) -> None:
    tensors[name] = value.detach().as_subclass(Tensor).clone().contiguous()


def quantizer_case(
    form: dict[str, Any], shape: tuple[int, ...], block_size: tuple[int, ...] | None
) -> None:
    name = f"quantizer-{len(cases)}"
    quantizer = FloatQuantizeDequantize(**form, shape=shape, block_size=block_size)
    # From subnormals to far beyond the range.
    spread = torch.logspace(-4, 1.5, 48)
    x = torch.randn(6, 48, generator=generator) * spread
    # A range that is no power of two, and one per encoding.
    quantizer.maxval = 3.0 + 10 * torch.rand(shape, generator=generator)
    scale = quantizer.get_scale().detach()
    spread_scale = scale
    if block_size is not None:
        for axis, size in enumerate(block_size):
            spread_scale = spread_scale.repeat_interleave(size, axis)
    grad = torch.randint(0, 4, x.shape, generator=generator)
    grad = torch.tensor([1.0, -1.0, 0.5, -0.5])[grad] / spread_scale
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    keep(f"{name}/x", x)
    keep(f"{name}/maxval", quantizer.maxval)
    keep(f"{name}/scale", scale)
    keep(f"{name}/y", y)
    keep(f"{name}/grad", grad)
    has_gradient = quantizer._finfo.to_torch_dtype() is not None
    if has_gradient:
        keep(f"{name}/grad_x", leaf.grad)
    cases.append({"name": name, "kind": "quantizer", "format": form, "block_size": block_size})


def fp4_case(module: torch.nn.Module, kind: str, block_size: int) -> None:
    name = f"{kind}-{len(cases)}"
    with torch.no_grad():
        weight = torch.randn(module.weight.shape, generator=generator) * 0.3
        weight[0] = 0
        weight[1, 0] = 4.0
        module.weight.copy_(weight)
    quantized = aimet_nn.QuantizationMixin.from_module(module)
    quantized.param_quantizers["weight"] = None
    if kind == "mxfp4":
        quantized.set_weight_quantizer_to_mxfp4_int8(block_size)
    else:
        shape = (weight.shape[0], weight.shape[1] // 16, *(1 for _ in weight.shape[2:]))
        scale_q = (torch.rand(shape, generator=generator) * 4).to(torch.float8_e4m3fn)
        keep(f"{name}/scale_q", scale_q.float())
        quantized.set_weight_quantizer_to_nvfp4_int8(scale_q, 0.037)
    keep(f"{name}/weight", weight)
    keep(f"{name}/rounded", quantized.weight)
    cases.append({"name": name, "kind": kind, "block_size": block_size})


def main() -> None:
    for form, (shape, block_size) in itertools.product(FORMATS, GRANULARITIES):
        quantizer_case(form, shape, block_size)
    for block_size in (32, 16):
        fp4_case(torch.nn.Linear(64, 5, bias=False), "mxfp4", block_size)
        fp4_case(torch.nn.Conv2d(32, 4, 3, bias=False), "mxfp4", block_size)
    fp4_case(torch.nn.Linear(64, 5, bias=False), "nvfp4", 16)
    fp4_case(torch.nn.Conv2d(32, 4, 3, bias=False).eval(), "nvfp4", 16)
    versions = {name: importlib.metadata.version(name) for name in ("aimet-torch", "torch")}
    save_file(
        tensors,
        Path(__file__).with_name("float.safetensors"),
        {"cases": json.dumps(cases), "versions": json.dumps(versions)},
    )


if __name__ == "__main__":
    main()
