"""Every op of the namespace: samples, an independent reference, opcheck, gradients, shapes on Meta.

The list of ops comes from torch's registry, so an op without an entry here fails the first test.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import rimet
import torch
from torch.library import opcheck

OPS = torch.ops.rimet
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Ops that are the backward of another one: checked through it.
BACKWARD = {
    "quantize_backward",
    "dequantize_backward",
    "quantize_dequantize_backward",
    "quantize_dequantize_range_backward",
    "range_to_scale_offset_backward",
    "float_quantize_backward",
    "float_quantize_dequantize_backward",
    "grouped_block_scale_backward",
    "adaround_quantize_dequantize_backward",
    "adaround_regularizer_backward",
}
# Not a tensor op.
PLAIN = {"_version"}


@dataclass
class Geometry:
    """Shapes of an input and its encodings, and how the input lies in memory."""

    input: tuple[int, ...]
    encoding: tuple[int, ...]
    block: list[int] | None = None
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda t: t


GEOMETRIES = {
    "per-tensor": Geometry((3, 5, 7), ()),
    "per-tensor-one": Geometry((129,), (1,)),
    "scalar": Geometry((), ()),
    "empty": Geometry((0, 4), ()),
    "per-channel-0": Geometry((6, 3, 5, 5), (6, 1, 1, 1)),
    "per-channel-1": Geometry((4, 6, 3, 3), (6, 1, 1)),
    "per-channel-last": Geometry((5, 40), (40,)),
    "per-element": Geometry((4, 9), (4, 9)),
    "blocks": Geometry((6, 48), (6, 3), [1, 16]),
    "blocks-of-conv": Geometry((4, 8, 3, 3), (4, 2, 1, 1), [1, 4, 3, 3]),
    "blocks-inferred": Geometry((4, 12), (2, 3), [-1, -1]),
    "blocks-of-few": Geometry((5, 12), (5, 6), [1, 2]),
    "channels-last": Geometry(
        (2, 20, 4, 5), (20, 1, 1), None, lambda t: t.to(memory_format=torch.channels_last)
    ),
    "transposed": Geometry((8, 40), (8, 1), None, lambda t: t.t().contiguous().t()),
    "strided": Geometry((6, 10), (6, 1), None, lambda t: t.repeat_interleave(2, dim=1)[:, ::2]),
    "expanded": Geometry((4, 6), (), None, lambda t: t[:1].expand_as(t)),
    "chunks": Geometry((70_001,), ()),
    "long-runs": Geometry((3, 40_000), (3, 1)),
}


def tensors(
    g: Geometry, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """An input around the grid, with its encodings as (scale, offset) and as (min, max)."""
    generator = torch.Generator().manual_seed(seed)

    def rand(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    # Scales that are not powers of two; offsets are integers; the range holds zero.
    scale = (0.05 + rand(g.encoding)).float()
    offset = torch.floor(rand(g.encoding) * 8 - 12).float()
    x = (torch.randn(g.input, generator=generator, dtype=torch.float64) * 4).to(dtype)
    grad = torch.randn(g.input, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "x": g.layout(x.to(device)),
        "grad": g.layout(grad.to(device)),
        "scale": scale.to(device),
        "offset": offset.to(device),
        "min": -(0.2 + 3 * rand(g.encoding)).float().to(device),
        "max": (0.2 + 3 * rand(g.encoding)).float().to(device),
    }


def on_cpu(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Where the references compute."""
    return [argument.detach().cpu() for argument in arguments]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


QMIN, QMAX = 0, 15
# E3M2 of OCP: small enough for the data to go beyond it.
FORMAT = (3, 2, True, False)
FORMAT_VALUES = reference.float_values(*FORMAT)

# name -> (names of its tensors, call of the op, call of the reference)
ENTRIES: dict[str, tuple[list[str], Callable[..., Any], Callable[..., Any]]] = {
    "quantize": (
        ["x", "scale", "offset"],
        lambda g, x, s, o: OPS.quantize(x, s, o, QMIN, QMAX, g.block),
        lambda g, x, s, o, **k: reference.quantize(x, s, o, QMIN, QMAX, block_size=g.block, **k),
    ),
    "dequantize": (
        ["x", "scale", "offset"],
        lambda g, x, s, o: OPS.dequantize(x, s, o, g.block),
        lambda g, x, s, o, **k: reference.dequantize(x, s, o, block_size=g.block, **k),
    ),
    "quantize_dequantize": (
        ["x", "scale", "offset"],
        lambda g, x, s, o: OPS.quantize_dequantize(x, s, o, QMIN, QMAX, 0.0, g.block),
        lambda g, x, s, o, **k: reference.quantize_dequantize(
            x, s, o, QMIN, QMAX, block_size=g.block, **k
        ),
    ),
    "quantize_dequantize_range": (
        ["x", "min", "max"],
        lambda g, x, a, b: OPS.quantize_dequantize_range(x, a, b, QMIN, QMAX, False, 0.0, g.block),
        lambda g, x, a, b, **k: reference.quantize_dequantize_range(
            x, a, b, QMIN, QMAX, False, block_size=g.block, **k
        ),
    ),
    "float_quantize": (
        ["x", "scale"],
        lambda g, x, s: OPS.float_quantize(x, s, *FORMAT, g.block),
        lambda g, x, s, **k: reference.float_quantize(x, s, FORMAT_VALUES, block_size=g.block, **k),
    ),
    "float_quantize_dequantize": (
        ["x", "scale"],
        lambda g, x, s: OPS.float_quantize_dequantize(x, s, *FORMAT, g.block),
        lambda g, x, s, **k: reference.float_quantize_dequantize(
            x, s, FORMAT_VALUES, block_size=g.block, **k
        ),
    ),
}
GRADIENTS: dict[str, Callable[..., Any]] = {
    "quantize": lambda g, grad, x, s, o: reference.quantize_grad(
        grad, x, s, o, QMIN, QMAX, block_size=g.block
    ),
    "dequantize": lambda g, grad, x, s, o: reference.dequantize_grad(
        grad, x, s, o, block_size=g.block
    ),
    "quantize_dequantize": lambda g, grad, x, s, o: reference.quantize_dequantize_grad(
        grad, x, s, o, QMIN, QMAX, block_size=g.block
    ),
    "quantize_dequantize_range": lambda g, grad, x, a, b: reference.quantize_dequantize_range_grad(
        grad, x, a, b, QMIN, QMAX, False, block_size=g.block
    ),
    "float_quantize": lambda g, grad, x, s: reference.float_quantize_grad(
        grad, x, s, FORMAT_VALUES, block_size=g.block
    ),
    "float_quantize_dequantize": lambda g, grad, x, s: reference.float_quantize_dequantize_grad(
        grad, x, s, FORMAT_VALUES, block_size=g.block
    ),
}
OTHER = {"range_to_scale_offset", "min_max", "grouped_block_scale"}
# Ops of the techniques, with samples, references and gradients in files of their own.
ELSEWHERE = {
    "test_adaround": {
        "adaround_quantize_dequantize",
        "adaround_regularizer",
        "adaround_step_",
        "reconstruction_gradient_",
    },
    "test_seq_mse": {"reconstruction_error", "row_dot"},
    "test_in_place": {"quantize_dequantize_range_"},
}


def test_every_op_is_listed() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rimet::")
    }
    elsewhere = set().union(*ELSEWHERE.values())
    assert registered == set(ENTRIES) | OTHER | elsewhere | BACKWARD | PLAIN
    assert set(GRADIENTS) == set(ENTRIES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", ENTRIES)
def test_forward_is_the_reference_bit_for_bit(
    name: str, geometry: str, dtype: torch.dtype, device: str
) -> None:
    g = GEOMETRIES[geometry]
    names, op, ref = ENTRIES[name]
    data = tensors(g, dtype, device=device)
    arguments = [data[n] for n in names]
    result = op(g, *arguments)
    assert result.dtype == dtype and result.shape == arguments[0].shape
    # The reference in the kernel's precision: the same operations, so the same bits.
    expected = ref(g, *on_cpu(arguments), compute_dtype=compute_dtype(dtype))
    torch.testing.assert_close(result.cpu(), expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g != "empty"])
@pytest.mark.parametrize("name", ENTRIES)
def test_gradients_are_the_closed_form(
    name: str, geometry: str, dtype: torch.dtype, device: str
) -> None:
    g = GEOMETRIES[geometry]
    names, op, _ = ENTRIES[name]
    data = tensors(g, dtype, device=device)
    arguments = [data[n].detach().to(dtype).requires_grad_() for n in names]
    result = op(g, *arguments)
    got = torch.autograd.grad(result, arguments, data["grad"])
    expected = GRADIENTS[name](g, *on_cpu([data["grad"], *arguments]))
    # The reference is float64; float32 terms carry 2^-24 each and cancel by at most a few digits.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for a, b, argument in zip(got, expected, arguments, strict=True):
        assert a.shape == argument.shape and a.dtype == argument.dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a.cpu().double(), b.double(), rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("name", ["quantize", "quantize_dequantize", "dequantize"])
def test_smooth_directions_pass_gradcheck(name: str, device: str) -> None:
    # Dequantize is smooth everywhere; the others are constant off the grid, where x clips.
    g = Geometry((3, 4), (3, 1))
    data = tensors(g, torch.float64, device=device)
    scale = data["scale"].double().requires_grad_()
    offset = data["offset"].double().requires_grad_()
    x = torch.full((3, 4), 1e3, dtype=torch.float64, device=device).requires_grad_()
    _, op, _ = ENTRIES[name]
    assert torch.autograd.gradcheck(lambda *a: op(g, *a), (x, scale, offset))


@pytest.mark.parametrize("geometry", ["per-tensor", "per-channel-0", "blocks", "channels-last"])
@pytest.mark.parametrize("name", ENTRIES)
def test_opcheck(name: str, geometry: str, device: str) -> None:
    g = GEOMETRIES[geometry]
    names, _, _ = ENTRIES[name]
    data = tensors(g, torch.float32, device=device)
    arguments = [data[n].detach().requires_grad_() for n in names]
    plain: dict[str, tuple[Any, ...]] = {
        "quantize": (QMIN, QMAX, g.block),
        "dequantize": (g.block,),
        "quantize_dequantize": (QMIN, QMAX, 0.0, g.block),
        "quantize_dequantize_range": (QMIN, QMAX, False, 0.0, g.block),
        "float_quantize": (*FORMAT, g.block),
        "float_quantize_dequantize": (*FORMAT, g.block),
    }
    opcheck(getattr(OPS, name).default, (*arguments, *plain[name]))


def test_opcheck_of_the_others(device: str) -> None:
    low = torch.tensor([-1.0, -2.0], device=device)
    high = torch.tensor([1.0, 0.5], device=device)
    opcheck(
        OPS.range_to_scale_offset.default,
        (low.requires_grad_(), high.requires_grad_(), 0, 255, False),
    )
    opcheck(OPS.min_max.default, (torch.randn(4, 6, device=device), [4, 2], [1, 3]))
    scale = torch.rand(4, 6, device=device).requires_grad_()
    opcheck(OPS.grouped_block_scale.default, (scale, [1, 3], 16))


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g != "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_min_max(geometry: str, dtype: torch.dtype, device: str) -> None:
    g = GEOMETRIES[geometry]
    x = tensors(g, dtype, device=device)["x"]
    for got, expected in zip(
        OPS.min_max(x, g.encoding, g.block),
        reference.min_max(x.cpu(), g.encoding, g.block),
        strict=True,
    ):
        assert got.dtype == dtype and got.shape == g.encoding
        assert torch.equal(got.cpu(), expected.to(dtype))


@pytest.mark.parametrize("symmetric", [False, True])
def test_range_to_scale_offset(symmetric: bool, device: str) -> None:
    data = tensors(Geometry((7,), (7,)), torch.float32, device=device)
    low, high = data["min"].requires_grad_(), data["max"].requires_grad_()
    got = OPS.range_to_scale_offset(low, high, -8, 7, symmetric)
    expected = reference.range_to_scale_offset(
        *on_cpu([low, high]), -8, 7, symmetric, compute_dtype=torch.float32
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b.float())


GROUPINGS: dict[str, tuple[tuple[int, ...], list[int], int]] = {
    "rows": ((4, 6), [1, -1], 16),
    "some": ((4, 6, 1, 1), [2, 3, 1, -1], 16),
    "each-its-own": ((4, 6), [1, 1], 16),
    "all": ((30, 40), [-1, -1], 256),
    "one-level": ((4, 6), [1, 3], 1),
    "scalar": ((), [], 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", GROUPINGS)
def test_grouped_block_scale(name: str, dtype: torch.dtype) -> None:
    shape, grouping, levels = GROUPINGS[name]
    generator = torch.Generator().manual_seed(5)

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)

    scale = rand(*shape) + 0.01
    if scale.dim() > 1:
        scale[1] = scale[0]  # largest scales that are equal share the gradient
        scale[0, 0] = 1e-4  # below the first level
    got = OPS.grouped_block_scale(scale.requires_grad_(), grouping, levels)
    expected = reference.grouped_block_scale(scale, grouping, levels)
    weights = [rand(*tensor.shape) for tensor in expected]
    for a, b in zip(got, expected, strict=True):
        # The same operations in the same order: the same bits.
        assert a.shape == b.shape and torch.equal(a, b)
    (grad,) = torch.autograd.grad(got, scale, weights)
    wide = scale.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        reference.grouped_block_scale(wide, grouping, levels), wide, [w.double() for w in weights]
    )
    # Float32 terms against float64 ones; the reference takes differences of two large sums.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        grad.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item()
    )
    # Devices without kernels of their own.
    composite = torch._C.DispatchKey.CompositeExplicitAutograd
    plain = OPS.grouped_block_scale.default._op_dk(composite, scale.detach(), grouping, levels)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a.detach(), b)
    other = OPS.grouped_block_scale_backward.default._op_dk(
        composite, *weights, scale.detach(), grouping, levels
    )
    torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())
    (alone,) = torch.autograd.grad(
        OPS.grouped_block_scale(scale, grouping, levels)[1], scale, weights[1]
    )
    assert alone.isfinite().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_instruction_sets_give_the_same_bits(isa: str, geometry: str) -> None:
    g = GEOMETRIES[geometry]
    if not rimet._core.force_cpu_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        for dtype in DTYPES:
            data = tensors(g, dtype)
            for name, (names, op, _) in ENTRIES.items():

                def run() -> list[torch.Tensor]:
                    arguments = [data[n].detach().requires_grad_() for n in names]  # noqa: B023
                    y = op(g, *arguments)  # noqa: B023
                    return [y.detach(), *torch.autograd.grad(y, arguments, data["grad"])]  # noqa: B023

                rimet._core.force_cpu_isa(isa)
                narrow = run()
                rimet._core.force_cpu_isa(None)
                for a, b in zip(narrow, run(), strict=True):
                    assert torch.equal(a, b), name
    finally:
        rimet._core.force_cpu_isa(None)


def test_threads_do_not_change_the_sums() -> None:
    g = GEOMETRIES["chunks"]
    data = tensors(g, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            arguments = [data[k].detach().requires_grad_() for k in ("x", "min", "max")]
            y = OPS.quantize_dequantize_range(*arguments, 0, 15, False)
            results.append(torch.autograd.grad(y, arguments, data["grad"]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_devices_without_kernels_compute_the_same() -> None:
    # The fallback in tensor ops serves them; called here on CPU tensors under its own key.
    for geometry in ("per-tensor", "per-channel-1", "blocks", "channels-last", "strided"):
        g = GEOMETRIES[geometry]
        data = tensors(g, torch.float32)
        x, a, b = data["x"], data["min"], data["max"]
        kernel = torch.ops.rimet.quantize_dequantize_range.default._op_dk
        y = kernel(
            torch._C.DispatchKey.CompositeExplicitAutograd, x, a, b, 0, 15, False, 0.0, g.block
        )
        assert torch.equal(y, OPS.quantize_dequantize_range(x, a, b, 0, 15, False, 0.0, g.block))


@pytest.mark.parametrize(
    "fields", [FORMAT, (4, 3, True, True), (8, 7, False, False), (3, 0, True, False)]
)
@pytest.mark.parametrize("name", ["float_quantize", "float_quantize_dequantize"])
def test_devices_without_float_kernels_compute_the_same(name: str, fields: tuple[Any, ...]) -> None:
    composite = torch._C.DispatchKey.CompositeExplicitAutograd
    for geometry in ("per-tensor", "per-channel-1", "blocks", "channels-last", "strided"):
        g = GEOMETRIES[geometry]
        for dtype in DTYPES:
            data = tensors(g, dtype)
            x, scale, grad = data["x"], data["scale"], data["grad"]
            position = torch.arange(x.numel()).view(x.shape)
            for i, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
                x = g.layout(x.masked_fill(position % 20 == i, value))
            op, backward = getattr(OPS, name).default, getattr(OPS, f"{name}_backward").default
            arguments = (*fields, g.block)
            expected = op(x, scale, *arguments)
            got = op._op_dk(composite, x, scale, *arguments)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            x = data["x"]
            expected = backward(grad, x, scale, *arguments, [True, True])
            got = backward._op_dk(composite, grad, x, scale, *arguments, [True, True])
            assert torch.equal(got[0], expected[0])
            # Sums in another order.
            torch.testing.assert_close(
                got[1], expected[1], rtol=1e-4, atol=1e-4 * expected[1].abs().max().item()
            )


def test_grids_beyond_float32_are_computed_in_float64(device: str) -> None:
    x = torch.tensor([0.1, -3.7, 123.456, 2e9], dtype=torch.float32, device=device)
    scale, offset = torch.tensor(1e-7, device=device), torch.tensor(0.0, device=device)
    y = OPS.quantize_dequantize(x, scale, offset, -(2**31), 2**31 - 1)
    s = scale.double()
    expected = ((x.double() / s).round().clamp(-(2**31), 2**31 - 1) * s).float()
    assert torch.equal(y, expected)


def test_nan_and_infinity(device: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3] * 9, device=device)
    scale, offset = torch.tensor(0.1, device=device), torch.tensor(0.0, device=device)
    y = OPS.quantize_dequantize(x, scale, offset, -8, 7)
    assert y[0].isnan() and torch.equal(y[1:4].cpu(), torch.tensor([7.0, -8.0, 3.0]) * 0.1)
    low, high = OPS.min_max(x, [])
    assert low.isnan() and high.isnan()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, s: OPS.quantize(x, s, s, 5, 5), ValueError, ["qmin", "quantize"]),
        (lambda x, s: OPS.quantize(x, s, s[:1], 0, 5), ValueError, ["offset", "[3]"]),
        (lambda x, s: OPS.quantize(x, s, s, 0, 5), ValueError, ["scale", "[4, 6]", "[3]"]),
        (lambda x, s: OPS.quantize(x, s, s, 0, 5, [4]), ValueError, ["block_size", "6"]),
        (lambda x, s: OPS.quantize(x, s, s, 0, 5, [1, 2]), ValueError, ["block_size", "1 dim"]),
        (lambda x, s: OPS.quantize(x.int(), s, s, 0, 5, [2]), TypeError, ["float16"]),
        (lambda x, s: OPS.quantize(x, s.int(), s.int(), 0, 5, [2]), TypeError, ["scale"]),
        (lambda x, s: OPS.quantize_dequantize(x, s, s, 0, 5, 0.3, [2]), ValueError, ["shift"]),
        (lambda x, s: OPS.quantize(x, s, s, 0, 2**40, [2]), ValueError, ["32 bits"]),
        (lambda x, s: OPS.min_max(x[:0], [1]), ValueError, ["empty", "[0, 6]"]),
        (lambda x, s: OPS.float_quantize(x, s, 9, 2), ValueError, ["exponent_bits", "0 to 8"]),
        (lambda x, s: OPS.float_quantize(x, s, 4, 3), ValueError, ["scale", "[4, 6]", "[3]"]),
        (
            lambda x, s: OPS.float_quantize(x.int(), s, 4, 3, True, False, [2]),
            TypeError,
            ["float16"],
        ),
        (lambda x, s: OPS.float_quantize(x, s.int(), 4, 3), TypeError, ["scale"]),
        (
            lambda x, s: OPS.float_quantize_dequantize(x, s[:1], 4, 3, False, True),
            ValueError,
            ["unsigned_zero", "float_quantize_dequantize"],
        ),
        (lambda x, s: OPS.grouped_block_scale(s, [2], 16), ValueError, ["block_grouping", "3"]),
        (
            lambda x, s: OPS.grouped_block_scale(s, [1, 1], 16),
            ValueError,
            ["block_grouping", "one"],
        ),
        (lambda x, s: OPS.grouped_block_scale(s, [1], 0), ValueError, ["levels"]),
        (lambda x, s: OPS.grouped_block_scale(s.int(), [1], 2), TypeError, ["scale"]),
    ],
)
def test_hostile_input_is_a_typed_error(
    call: Callable[..., Any], error: type[Exception], words: list[str], device: str
) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 6, device=device), torch.rand(3, device=device))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_double_backward_is_refused(device: str) -> None:
    x = torch.randn(8, requires_grad=True, device=device)
    scale, offset = torch.tensor(0.1, device=device), torch.tensor(0.0, device=device)
    y = OPS.quantize_dequantize(x * 2, scale, offset, -8, 7)
    (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative|not implemented"):
        grad.sum().backward()


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.low = torch.nn.Parameter(torch.tensor(-1.0))
        self.high = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.ops.rimet.quantize_dequantize_range(
            y, self.low, self.high, -8, 7, True, 0.0, None
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_trace_compile_export_autocast(tmp_path: Any, device: str) -> None:
    module, x = _Module().eval().to(device), torch.randn(2, 3, 8, 8, device=device)
    expected = module(x)
    path = str(tmp_path / "module.pt")
    torch.jit.save(torch.jit.trace(module, x), path)
    assert torch.equal(torch.jit.load(path)(x), expected)
    assert torch.equal(torch.jit.script(module)(x), expected)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    result = compiled(x)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert module.low.grad is not None
    with torch.autocast(device, dtype=torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", ENTRIES)
def test_threads_of_python_get_the_same_results(name: str) -> None:
    names, op, _ = ENTRIES[name]
    jobs = [
        (GEOMETRIES[geometry], seed)
        for geometry in ("chunks", "long-runs", "per-channel-1", "blocks")
        for seed in range(3)
    ]

    def run(job: tuple[Geometry, int]) -> list[torch.Tensor]:
        g, seed = job
        data = tensors(g, torch.float32, seed)
        arguments = [data[n].requires_grad_() for n in names]
        y = op(g, *arguments)
        return [y.detach(), *torch.autograd.grad(y, arguments, data["grad"])]

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, jobs * 4))
    for i, result in enumerate(results):
        for got, want in zip(result, expected[i % len(jobs)], strict=True):
            assert torch.equal(got, want)


def test_threads_of_python_get_the_same_encodings() -> None:
    def run(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(128, 3000, generator=generator)
        low, high = OPS.min_max(x, (128, 60), [1, 50])
        low.requires_grad_(), high.requires_grad_()
        scale, offset = OPS.range_to_scale_offset(low, high, QMIN, QMAX, False)
        results = [offset, *OPS.grouped_block_scale(scale, [1, -1], 16)]
        weights = [torch.randn(r.shape, generator=generator) for r in results]
        gradients = torch.autograd.grad(results, (low, high), weights)
        return [low.detach(), high.detach(), *(r.detach() for r in results), *gradients]

    expected = [run(seed) for seed in range(6)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, list(range(6)) * 6))
    for i, result in enumerate(results):
        for got, want in zip(result, expected[i % 6], strict=True):
            assert torch.equal(got, want)


def test_ops_release_the_gil() -> None:
    # Nobody is made to give up the GIL, so that the other thread counts on only where it is given up:
    # in its own sleep, and inside the op.
    interval = sys.getswitchinterval()
    counter = itertools.count()
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            next(counter)
            time.sleep(0)

    x, scale, offset = torch.randn(2_000_000), torch.tensor(0.1), torch.tensor(0.0)
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(200):
            before = next(counter)
            OPS.quantize_dequantize(x, scale, offset, -8, 7)
            if next(counter) > before + 1:
                break
        else:
            pytest.fail("no other thread ran during 200 calls")
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
