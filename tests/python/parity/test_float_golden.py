"""Float quantizers against values recorded from AIMET (`tests/data/float/record.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rimet import nn as rnn
from rimet.quantization.float import FloatFormat, FloatQuantizeDequantize
from safetensors import safe_open
from torch import Tensor

PATH = Path(__file__).parents[2] / "data" / "float" / "float.safetensors"
with safe_open(PATH, "pt") as file:
    CASES: list[dict[str, Any]] = json.loads(file.metadata()["cases"])
    TENSORS: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}
QUANTIZERS = [case for case in CASES if case["kind"] == "quantizer"]
WEIGHTS = [case for case in CASES if case["kind"] != "quantizer"]


@pytest.mark.parametrize("case", QUANTIZERS, ids=lambda case: case["name"])
def test_quantizer(case: dict[str, Any]) -> None:
    def get(key: str) -> Tensor:
        return TENSORS[f"{case['name']}/{key}"]

    form = FloatFormat(**case["format"])
    x = get("x").requires_grad_()
    # On AIMET's own scale: the same bits.
    y = torch.ops.rimet.float_quantize_dequantize(x, get("scale"), *form.fields, case["block_size"])
    assert torch.equal(y, get("y"))
    y.backward(get("grad"))
    if f"{case['name']}/grad_x" in TENSORS:
        # AIMET multiplies by the scale and divides by it again: two roundings.
        torch.testing.assert_close(x.grad, get("grad_x"), rtol=2.0**-22, atol=0)
    # AIMET's scale goes through a logarithm: a few units in the last place from the quotient.
    quantizer = FloatQuantizeDequantize(
        **case["format"], shape=tuple(get("maxval").shape), block_size=case["block_size"]
    )
    quantizer.maxval.copy_(get("maxval"))
    torch.testing.assert_close(quantizer.get_scale(), get("scale"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case["name"])
def test_four_bit_weights(case: dict[str, Any]) -> None:
    weight = TENSORS[f"{case['name']}/weight"]
    out_channels, in_channels, *kernel = weight.shape
    module: Any = (
        rnn.QuantizedConv2d(in_channels, out_channels, kernel)
        if kernel
        else rnn.QuantizedLinear(in_channels, out_channels)
    )
    with torch.no_grad():
        module.weight.copy_(weight)
    if case["kind"] == "mxfp4":
        module.set_weight_quantizer_to_mxfp4_int8(case["block_size"])
    else:
        scale_q = TENSORS[f"{case['name']}/scale_q"].to(torch.float8_e4m3fn)
        module.set_weight_quantizer_to_nvfp4_int8(scale_q, 0.037)
    rounded = module.weight.detach().as_subclass(Tensor)
    assert torch.equal(rounded, TENSORS[f"{case['name']}/rounded"])
