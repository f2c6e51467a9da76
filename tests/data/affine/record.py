"""Record what aimet-torch does with affine grids, for ``tests/python/parity``.

Run under an environment that holds aimet-torch 2.42.0 (``make peers``)::

    .venv-peers/bin/python tests/data/affine/record.py

Writes two files beside this script. ``affine.safetensors`` holds one flat tensor per dtype.
``affine.json`` holds the versions and one entry per case, in which a tensor is
``[dtype, start, shape]``: a slice of the flat tensor of that dtype. Equal tensors are stored once.
What AIMET refuses is recorded as the exception's type.

AIMET sends ``quantize_dequantize`` through ``torch.fake_quantize_*`` when neither scale nor offset
wants a gradient, no blocks are asked for and the shift is 0. That kernel multiplies by
``1 / scale`` in float32 and casts to an integer, so its result is recorded apart, as
``shortcut_y``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantization import affine
from aimet_torch.quantization.encoding_analyzer import MinMaxEncodingAnalyzer
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).with_name("affine")
Shape = tuple[int, ...]
Slice = tuple[str, int, Shape]

pools: dict[str, list[Tensor]] = {}
places: dict[tuple[str, bytes], int] = {}
cases: list[dict[str, Any]] = []
generator = torch.Generator().manual_seed(2024)


# ------------------------------------------------------------------------------------------ storage


def keep(value: Tensor) -> Slice:
    """Store a tensor's elements unless they are there already; return where."""
    value = value.detach().as_subclass(Tensor).clone()
    dtype, flat = str(value.dtype).removeprefix("torch."), value.reshape(-1)
    content = (dtype, flat.view(torch.uint8).numpy().tobytes())
    if content not in places:
        pool = pools.setdefault(dtype, [])
        places[content] = sum(item.numel() for item in pool)
        pool.append(flat)
    return dtype, places[content], tuple(value.shape)


def add(
    name: str, kind: str, inputs: dict[str, Tensor], outputs: dict[str, Any], **plain: Any
) -> None:
    """Append a case; tensors become slices, plain values that are false are left out."""
    if any(case["name"] == name for case in cases):
        raise ValueError(f"case {name} twice")
    cases.append(
        {
            "name": name,
            "kind": kind,
            **{key: value for key, value in plain.items() if value},
            "in": {key: keep(value) for key, value in inputs.items()},
            "out": {
                key: keep(value) if isinstance(value, Tensor) else value
                for key, value in outputs.items()
            },
        }
    )


@contextlib.contextmanager
def counting_shortcuts() -> Iterator[list[str]]:
    """Note which ``torch.fake_quantize_*`` functions are called inside."""
    seen: list[str] = []
    originals: dict[str, Callable[..., Tensor]] = {}

    def wrap(name: str) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            seen.append(name)
            return originals[name](*args)

        return call

    for name in ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"):
        originals[name] = getattr(torch, name)
        setattr(torch, name, wrap(name))
    try:
        yield seen
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The outputs of ``run``, or the type of what it raised."""
    try:
        return run()
    except Exception as error:
        return {"error": type(error).__name__}


# ------------------------------------------------------------------------------------------- inputs


def normal(shape: Shape, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def edges(scale: float, offset: int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """Grid points, exact middles between them, both ends and beyond, and signed zero."""
    levels = sorted(
        {*range(qmin, min(qmin + 4, qmax)), *range(max(qmax - 3, qmin), qmax + 1), -offset}
    )
    points = [(level + offset + part) * scale for level in levels for part in (-0.5, 0.0, 0.5)]
    ends = [(qmin + offset - 5) * scale, (qmax + offset + 7) * scale]
    spread = (qmax - qmin) * scale / 3
    middle = (qmin + qmax + 2 * offset) / 2 * scale
    values = torch.tensor([*points, *ends, 0.0, -0.0], dtype=torch.float64)
    return torch.cat([values, normal((24,), spread, torch.float64) + middle]).to(dtype)


def specials(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    inf, nan = float("inf"), float("nan")
    return torch.tensor(
        [nan, inf, -inf, info.max, info.min, info.tiny, info.tiny / 2, -0.0, 1.0, -1.0], dtype=dtype
    )


# ------------------------------------------------------------------------------------ the functions


def functional(
    name: str,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Shape | None = None,
    shift: float = 0.0,
) -> None:
    """Record the three functions with all their gradients on one set of inputs."""
    grad = normal(tuple(x.shape), dtype=x.dtype)
    plain = {"qmin": qmin, "qmax": qmax, "block_size": block_size, "shift": shift}

    def differentiate(
        call: Callable[[Tensor, Tensor, Tensor], Tensor], value: Tensor
    ) -> dict[str, Any]:
        leaves = [item.clone().requires_grad_() for item in (value, scale, offset)]
        y = call(*leaves)
        gx, gs, go = torch.autograd.grad(y, leaves, grad)
        return {"y": y, "gx": gx, "gscale": gs, "goffset": go}

    def qdq(a: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return affine.quantize_dequantize(
            a, s, o, qmin=qmin, qmax=qmax, block_size=block_size, zero_point_shift=shift
        )

    def quantize(a: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return affine.quantize(a, s, o, qmin=qmin, qmax=qmax, block_size=block_size)

    def dequantize(a: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return affine.dequantize(a, s, o, block_size=block_size)

    inputs = {"x": x, "scale": scale, "offset": offset, "grad": grad}
    with counting_shortcuts() as seen:
        outputs = attempt(lambda: differentiate(qdq, x))
    if seen:
        raise AssertionError("AIMET took its shortcut although scale and offset want gradients")
    with counting_shortcuts() as seen:
        leaf = x.clone().requires_grad_()
        quick = attempt(lambda: {"y": qdq(leaf, scale, offset)})
        if seen and "y" in quick:
            (gx,) = torch.autograd.grad(quick["y"], leaf, grad)
            outputs |= {"shortcut_y": quick["y"], "shortcut_gx": gx}
    add(f"{name}/qdq", "quantize_dequantize", inputs, outputs, shortcut=seen[:1], **plain)
    if shift or name.endswith("/binary"):
        return
    add(
        f"{name}/quantize", "quantize", inputs, attempt(lambda: differentiate(quantize, x)), **plain
    )
    level = torch.round(x.double() / scale.flatten()[0]) - offset.flatten()[0]
    level = torch.nan_to_num(level.clamp(qmin, qmax), nan=float(qmin)).to(x.dtype)
    add(
        f"{name}/dequantize",
        "dequantize",
        inputs | {"x": level},
        attempt(lambda: differentiate(dequantize, level)),
        **plain,
    )


def grid(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def per_tensor() -> None:
    for bits, signed in itertools.product((2, 4, 8, 16), (False, True)):
        qmin, qmax = grid(bits, signed)
        for label, step in (("binary", 2.0**-5), ("decimal", 0.0371)):
            offset = 0 if signed else -(2 ** (bits - 1)) + 1
            name = f"tensor/{'int' if signed else 'uint'}{bits}/{label}"
            x = edges(step, offset, qmin, qmax, torch.float32)
            functional(name, x, torch.tensor(step), torch.tensor(float(offset)), qmin, qmax)
    for shape in ((1,), (1, 1)):
        x = normal((3, 5))
        functional(
            f"tensor/shape{len(shape)}", x, torch.full(shape, 0.07), torch.zeros(shape), -8, 7
        )
    strict = edges(0.0371, 0, -127, 127, torch.float32)
    functional("tensor/strict", strict, torch.tensor(0.0371), torch.tensor(0.0), -127, 127)
    far = edges(0.0371, -40, 3, 90, torch.float32)
    functional("tensor/grid3to90", far, torch.tensor(0.0371), torch.tensor(-40.0), 3, 90)
    for dtype in (torch.float32, torch.float64):
        qmin, qmax = grid(32, True)
        x = normal((40,), 0.3, dtype)
        scale, offset = torch.tensor(2.0**-31 * 0.9, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        functional(f"tensor/int32/{dtype}".replace("torch.", ""), x, scale, offset, qmin, qmax)


def other_dtypes() -> None:
    for dtype, (bits, signed) in itertools.product(
        (torch.float16, torch.bfloat16, torch.float64), ((4, True), (8, False), (16, False))
    ):
        qmin, qmax = grid(bits, signed)
        offset = 0.0 if signed else -float(2 ** (bits - 1))
        # A scale of few significant bits is the same number in every dtype.
        step = 0.75 * 2.0 ** (-bits)
        name = f"{str(dtype)[6:]}/{'int' if signed else 'uint'}{bits}"
        x = edges(step, int(offset), qmin, qmax, dtype)
        functional(name, x, torch.tensor(step), torch.tensor(offset), qmin, qmax)


def per_channel() -> None:
    shape = (3, 4, 5)
    for axis, (bits, signed) in itertools.product((0, 1, 2), ((4, True), (8, False))):
        qmin, qmax = grid(bits, signed)
        dims = [1, 1, 1]
        dims[axis] = shape[axis]
        scale = torch.rand(dims, generator=generator) * 0.1 + 0.02
        offset = torch.zeros(dims) if signed else -torch.arange(shape[axis]).view(dims) * 20.0 - 60
        name = f"channel{axis}/{'int' if signed else 'uint'}{bits}"
        functional(name, normal(shape), scale, offset, qmin, qmax)
    # Trailing shape shorter than the input, and two axes at once.
    functional(
        "channel/trailing",
        normal(shape),
        torch.rand(5, generator=generator) + 0.1,
        torch.zeros(5),
        -8,
        7,
    )
    both = torch.rand((3, 1, 5), generator=generator) * 0.2 + 0.05
    functional("channel/two-axes", normal(shape), both, torch.full((3, 1, 5), -7.0), 0, 15)


def blockwise() -> None:
    layouts: list[tuple[str, Shape, Shape, Shape]] = [
        ("columns", (6, 16), (6, 4), (1, 4)),
        ("tiles", (8, 12), (2, 3), (4, 4)),
        ("fill", (8, 12), (2, 3), (-1, -1)),
        ("leading", (3, 4, 12), (2, 3), (2, 4)),
        ("conv", (6, 8, 3, 3), (6, 2, 1, 1), (1, 4, -1, -1)),
    ]
    for name, shape, encoding, block in layouts:
        scale = torch.rand(encoding, generator=generator) * 0.1 + 0.02
        offset = torch.randint(-6, 1, encoding, generator=generator).float()
        functional(f"block/{name}/int4", normal(shape, 0.5), scale, offset, -8, 7, block)
    functional(
        "block/columns/shift",
        normal((6, 16), 0.5),
        torch.full((6, 4), 0.11),
        torch.zeros(6, 4),
        -2,
        1,
        (1, 4),
        0.5,
    )
    bad = torch.full((6, 5), 0.1)
    functional("block/indivisible", normal((6, 16)), bad, torch.zeros(6, 5), -8, 7, (1, 3))


def shifted() -> None:
    for bits in (2, 4):
        qmin, qmax = grid(bits, True)
        for dtype in (torch.float32, torch.float64):
            for step in (0.25, 0.0371):
                x = edges(step, 0, qmin, qmax, dtype)
                name = f"shift/int{bits}/{str(dtype)[6:]}/{step}"
                scale, offset = torch.tensor(step, dtype=dtype), torch.tensor(0.0, dtype=dtype)
                functional(name, x, scale, offset, qmin, qmax, None, 0.5)


def special_values() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        scale, offset = torch.tensor(0.25), torch.tensor(-3.0)
        functional(f"special/{str(dtype)[6:]}/uint4", specials(dtype), scale, offset, 0, 15)
        functional(
            f"special/{str(dtype)[6:]}/int4", specials(dtype), scale, torch.tensor(0.0), -8, 7
        )
    functional("empty", torch.zeros(0), torch.tensor(0.25), torch.tensor(0.0), -8, 7)


# ----------------------------------------------------------------------------------- the quantizers


def ranged(
    name: str,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    block_size: Shape | None = None,
    shift: float = 0.0,
) -> None:
    """Record a quantizer module of the given range: scale, offset, output, gradients."""
    grad = normal(tuple(x.shape), dtype=x.dtype)

    def run() -> dict[str, Any]:
        quantizer = affine.QuantizeDequantize(
            tuple(low.shape), qmin, qmax, symmetric, block_size=block_size, zero_point_shift=shift
        )
        quantizer.set_range(low, high)
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        gx, gmin, gmax = torch.autograd.grad(y, (leaf, quantizer.min, quantizer.max), grad)
        scale, offset = quantizer.get_scale(), quantizer.get_offset()
        return {"y": y, "gx": gx, "gmin": gmin, "gmax": gmax, "scale": scale, "offset": offset}

    add(
        name,
        "range",
        {"x": x, "min": low, "max": high, "grad": grad},
        attempt(run),
        qmin=qmin,
        qmax=qmax,
        symmetric=symmetric,
        block_size=block_size,
        shift=shift,
    )


def ranges() -> None:
    limits = {
        "around-zero": (-1.3, 2.1),
        "offset-clamped-low": (0.4, 2.0),
        "offset-clamped-high": (-2.0, -0.4),
        "from-zero": (0.0, 1.7),
        "to-zero": (-1.7, 0.0),
        "tiny": (-1e-6, 1e-6),
        "at-minimum-scale": (0.0, 255 * 2.0**-23),
        "below-minimum-scale": (-1e-9, 2e-9),
        "empty": (0.0, 0.0),
        "one-point": (0.7, 0.7),
        "reversed": (1.1, -0.9),
        "huge": (-1e38, 1e38),
        "overflowing": (-3e38, 3e38),
        "infinite": (-float("inf"), float("inf")),
        "nan": (float("nan"), 1.0),
    }
    grids = {
        "uint8": (0, 255),
        "int8": (-128, 127),
        "strict8": (-127, 127),
        "int2": (-2, 1),
        "uint1": (0, 1),
    }
    x = torch.cat([normal((24,)), torch.tensor([0.0, -0.0, 5.0, -5.0, 1e-8, -1e-8])])
    for (label, (low, high)), (kind, (qmin, qmax)), symmetric in itertools.product(
        limits.items(), grids.items(), (False, True)
    ):
        if kind not in ("uint8", "int8") and label not in (
            "around-zero",
            "offset-clamped-low",
            "empty",
        ):
            continue
        name = f"range/{label}/{kind}/{'symmetric' if symmetric else 'asymmetric'}"
        ranged(name, x, torch.tensor([low]), torch.tensor([high]), qmin, qmax, symmetric)
    for symmetric in (False, True):
        tail = "symmetric" if symmetric else "asymmetric"
        shape = (3, 4, 5)
        for axis in range(3):
            dims = tuple(size if index == axis else 1 for index, size in enumerate(shape))
            low, high = (
                -torch.rand(dims, generator=generator),
                torch.rand(dims, generator=generator),
            )
            ranged(f"range/channel{axis}/{tail}", normal(shape), low, high, -8, 7, symmetric)
        low, high = (
            -torch.rand((6, 4), generator=generator),
            torch.rand((6, 4), generator=generator),
        )
        ranged(f"range/block/{tail}", normal((6, 16)), low, high, -8, 7, symmetric, (1, 4))
        ranged(f"range/shift/{tail}", normal((6, 16)), low, high, -2, 1, symmetric, (1, 4), 0.5)
        wide = torch.tensor([-1.0]), torch.tensor([1.25])
        ranged(f"range/int16/{tail}", x, *wide, *grid(16, True), symmetric)
        ranged(f"range/int32/{tail}", x, *wide, *grid(32, True), symmetric)


def calibrations() -> None:
    """Record min-max calibration of data whose range is degenerate."""
    inf, nan = float("inf"), float("nan")
    data = {
        "zeros": torch.zeros(4),
        "one-positive": torch.full((4,), 3.0),
        "one-negative": torch.full((4,), -3.0),
        "one-tiny": torch.full((4,), 1e-9),
        "one-large": torch.full((4,), 1e30),
        "all-positive": torch.tensor([0.5, 1.0, 2.0]),
        "all-negative": torch.tensor([-0.5, -1.0, -2.0]),
        "ordinary": torch.tensor([-0.75, 0.1, 2.0]),
        "tiny": torch.tensor([-1e-8, 1e-8]),
        "subnormal": torch.tensor([-1e-40, 1e-40]),
        "plus-inf": torch.tensor([-1.0, 1.0, inf]),
        "minus-inf": torch.tensor([-1.0, 1.0, -inf]),
        "both-inf": torch.tensor([-inf, 1.0, inf]),
        "nan": torch.tensor([-1.0, nan, 1.0]),
        "all-nan": torch.tensor([nan, nan]),
        "empty": torch.zeros(0),
        "half-max": torch.tensor([-65504.0, 65504.0], dtype=torch.float16),
        "half-inf": torch.tensor([-1.0, inf], dtype=torch.float16),
        "double": torch.tensor([-0.75, 0.1, 2.0], dtype=torch.float64),
    }
    for (label, x), (kind, qmin, qmax, shift), symmetric in itertools.product(
        data.items(),
        (
            ("uint8", 0, 255, 0.0),
            ("int8", -128, 127, 0.0),
            ("strict8", -127, 127, 0.0),
            ("int2", -2, 1, 0.0),
            ("int2-shift", -2, 1, 0.5),
            ("int32", -(2**31), 2**31 - 1, 0.0),
        ),
        (False, True),
    ):
        usual = symmetric != (kind == "uint8")
        if not usual and label not in ("zeros", "ordinary", "all-positive", "all-negative"):
            continue

        def analyze(
            x: Tensor = x,
            qmin: int = qmin,
            qmax: int = qmax,
            shift: float = shift,
            symmetric: bool = symmetric,
        ) -> dict[str, Any]:
            analyzer = MinMaxEncodingAnalyzer((1,))
            analyzer.update_stats(x)
            low, high = analyzer.compute_encodings(qmax - qmin - int(2 * shift), symmetric)
            return {"analyzer_min": low, "analyzer_max": high}

        def calibrate(
            x: Tensor = x,
            qmin: int = qmin,
            qmax: int = qmax,
            shift: float = shift,
            symmetric: bool = symmetric,
        ) -> dict[str, Any]:
            quantizer = affine.QuantizeDequantize(
                (1,), qmin, qmax, symmetric, zero_point_shift=shift
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with quantizer.compute_encodings():
                    quantizer(x)
            outputs: dict[str, Any] = {
                "warned": bool(caught),
                "initialized": quantizer.is_initialized(),
            }
            if quantizer.is_initialized():
                outputs |= {"min": quantizer.min, "max": quantizer.max}
                outputs |= {"scale": quantizer.get_scale(), "offset": quantizer.get_offset()}
            return outputs

        outputs = attempt(calibrate)
        found = attempt(analyze)
        if "error" in found:
            found = {"analyzer_error": found["error"]}
        name = f"calibrate/{label}/{kind}/{'symmetric' if symmetric else 'asymmetric'}"
        add(
            name,
            "calibrate",
            {"x": x},
            outputs | found,
            qmin=qmin,
            qmax=qmax,
            shift=shift,
            symmetric=symmetric,
        )


def main() -> None:
    torch.set_num_threads(1)
    for section in (
        per_tensor,
        other_dtypes,
        per_channel,
        blockwise,
        shifted,
        special_values,
        ranges,
        calibrations,
    ):
        section()
    record = {
        "versions": {name: version(name) for name in ("aimet-torch", "torch", "numpy")}
        | {"python": platform.python_version()},
        "cases": cases,
    }
    packed = {dtype: torch.cat(pool) for dtype, pool in sorted(pools.items())}
    save_file(packed, OUT.with_suffix(".safetensors"))
    OUT.with_suffix(".safetensors").chmod(0o644)
    text = json.dumps(record, separators=(",", ":")).replace('{"name"', '\n{"name"')
    OUT.with_suffix(".json").write_text(text + "\n")
    sizes = ", ".join(f"{name} {len(value)}" for name, value in packed.items())
    print(f"{len(cases)} cases; {sizes}")


if __name__ == "__main__":
    main()
