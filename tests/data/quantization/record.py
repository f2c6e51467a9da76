"""Record what AIMET's quantizers and encodings give, as `golden.json` beside this file.

    .venv-peers/bin/python tests/data/quantization/record.py

Made with aimet-torch 2.42.0 and torch 2.11.0. Numbers are float32 values written in full.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantization import affine
from aimet_torch.quantization import float as floating

warnings.simplefilter("ignore")

AFFINE = [
    # shape, qmin, qmax, symmetric, block_size, zero_point_shift, input shape
    ((), 0, 255, False, None, 0.0, (3, 8)),
    ((), -128, 127, True, None, 0.0, (3, 8)),
    ((), -128, 127, False, None, 0.0, (3, 8)),
    ((), 0, 255, True, None, 0.0, (3, 8)),
    ((), -7, 7, True, None, 0.0, (3, 8)),
    ((), -2, 1, True, None, 0.0, (3, 8)),
    ((), 0, 65535, False, None, 0.0, (3, 8)),
    ((), 0, 15, False, None, 0.5, (3, 8)),
    ((), -8, 7, True, None, 0.5, (3, 8)),
    ((3, 1), -8, 7, True, None, 0.0, (3, 8)),
    ((3, 1), 0, 15, False, None, 0.0, (3, 8)),
    ((8,), 0, 15, False, None, 0.0, (3, 8)),
    ((3, 2), -8, 7, True, (1, 4), 0.0, (3, 8)),
    ((3, 2), 0, 15, False, (1, 4), 0.0, (3, 8)),
    ((3, 1), -8, 7, True, (1, -1), 0.0, (3, 8)),
    ((1, 2, 1, 1), -8, 7, True, (2, 2, 1, 1), 0.0, (2, 4, 1, 1)),
]
FLOAT = [
    {"exponent_bits": 4, "mantissa_bits": 3},
    {"exponent_bits": 4, "mantissa_bits": 3, "finite": True},
    {"exponent_bits": 4, "mantissa_bits": 3, "finite": True, "unsigned_zero": True},
    {"exponent_bits": 5, "mantissa_bits": 2},
    {"exponent_bits": 5, "mantissa_bits": 2, "finite": True, "unsigned_zero": True},
    {"exponent_bits": 2, "mantissa_bits": 1, "finite": True},
    {"exponent_bits": 2, "mantissa_bits": 1},
    {"exponent_bits": 3, "mantissa_bits": 2},
    {"exponent_bits": 5, "mantissa_bits": 10},
    {"exponent_bits": 8, "mantissa_bits": 7},
]


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def entry(encoding: Any, version: str) -> Any:
    """The entry of a file, or null where the version cannot express the encoding."""
    try:
        return encoding.to_qnn_encoding_dict(version)
    except (RuntimeError, AssertionError, TypeError):
        return None


def files(encoding: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    encoding._hint_input_shape(shape)
    return {version: entry(encoding, version) for version in ("0.6.1", "1.0.0", "2.0.0", "2.1.0")}


def affine_case(case: tuple[Any, ...]) -> dict[str, Any]:
    shape, qmin, qmax, symmetric, block_size, shift, input_shape = case
    quantizer = affine.QuantizeDequantize(
        shape, qmin, qmax, symmetric, block_size=block_size, zero_point_shift=shift
    )
    x = torch.randn(input_shape)
    weight = torch.randn(input_shape)
    with quantizer.compute_encodings():
        dynamic = quantizer(x)
    calibrated = {"min": plain(quantizer.min), "max": plain(quantizer.max)}
    # A range that clips on both sides, so that the gradients of both ends count.
    with torch.no_grad():
        quantizer.min.mul_(0.6)
        quantizer.max.mul_(0.7)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    (y * weight).sum().backward()
    encoding = quantizer.get_encodings()
    return {
        "shape": shape, "qmin": qmin, "qmax": qmax, "symmetric": symmetric,
        "block_size": block_size, "zero_point_shift": shift, "input_shape": input_shape,
        "x": plain(x), "weight": plain(weight), "dynamic": plain(dynamic), "calibrated": calibrated,
        "min": plain(quantizer.min), "max": plain(quantizer.max), "y": plain(y),
        "grad_x": plain(leaf.grad), "grad_min": plain(quantizer.min.grad),
        "grad_max": plain(quantizer.max.grad), "scale": plain(quantizer.get_scale()),
        "offset": plain(quantizer.get_offset()), "get_min": plain(quantizer.get_min()),
        "get_max": plain(quantizer.get_max()), "granularity": encoding.granularity,
        "encoding_min": plain(encoding.min), "encoding_max": plain(encoding.max),
        "state": plain(dict(quantizer.state_dict())), "files": files(encoding, input_shape),
    }  # fmt: skip


def grouped_case(grouping: tuple[int, ...] | None) -> dict[str, Any]:
    quantizer = affine.GroupedBlockQuantizeDequantize(
        (4, 4), 4, True, 8, block_size=(1, 4), block_grouping=grouping
    )
    x, weight = torch.randn(4, 16), torch.randn(4, 16)
    with quantizer.compute_encodings():
        quantizer(x)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    (y * weight).sum().backward()
    encoding = quantizer.get_encodings()
    return {
        "block_grouping": grouping, "x": plain(x), "weight": plain(weight), "y": plain(y),
        "min": plain(quantizer.min), "max": plain(quantizer.max),
        "scale": plain(quantizer.get_scale()),
        "per_channel_scale": plain(quantizer.get_per_channel_scale()),
        "per_block_int_scale": plain(encoding.per_block_int_scale), "grad_x": plain(leaf.grad),
        "grad_min": plain(quantizer.min.grad), "grad_max": plain(quantizer.max.grad),
        "state": plain(dict(quantizer.state_dict())), "files": files(encoding, (4, 16)),
    }  # fmt: skip


def float_case(form: dict[str, Any]) -> dict[str, Any]:
    quantizer = floating.FloatQuantizeDequantize(**form)
    largest = quantizer.maxval.item()
    x = torch.cat(
        [
            torch.randn(24) * torch.logspace(-5, 2, 24),
            torch.tensor(
                [0.0, -0.0, largest, -2 * largest, 2.0**-9, 1.5 * 2.0**-10, 1.0625, 1.1875]
            ),
        ]
    )
    x = x.clamp(-3e38, 3e38)
    encoding = quantizer.get_encodings()
    return {
        "format": form, "maxval": largest, "bitwidth": quantizer.bitwidth, "x": plain(x),
        "y": plain(quantizer(x)), "state": plain(dict(quantizer.state_dict())),
        "files": files(encoding, (32,)),
    }  # fmt: skip


def float_calibrated() -> dict[str, Any]:
    quantizer = floating.FloatQuantizeDequantize(
        exponent_bits=2, mantissa_bits=1, finite=True, shape=(3, 2), block_size=(1, 4)
    )
    x = torch.randn(3, 8) * 3
    with quantizer.compute_encodings():
        quantizer(x)
    return {
        "x": plain(x),
        "maxval": plain(quantizer.maxval),
        "scale": plain(quantizer.get_scale()),
        "y": plain(quantizer(x)),
        "files": files(quantizer.get_encodings(), (3, 8)),
    }


def main() -> None:
    torch.manual_seed(2142)
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("aimet-torch", "torch")},
        "affine": [affine_case(case) for case in AFFINE],
        "grouped": [grouped_case(grouping) for grouping in ((1, 4), (1, 2), (1, -1), (2, 2), None)],
        "float": [float_case(form) for form in FLOAT],
        "float_calibrated": float_calibrated(),
    }
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
