"""The CUDA kernels on the CPU: the same source, the same launches, a stand-in for the driver.

CPU tensors are handed to the ops' CUDA implementations, so everything between the dispatcher and the
GPU's arithmetic runs: csrc, the launcher, block geometry, the kernels' indexing, barriers and reductions.
What a GPU alone can show is in the tests marked ``cuda``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import rimet
import torch
from hypothesis import given, settings
from torch import Tensor

from . import test_adaround, test_seq_mse
from .test_registry import (
    ENTRIES,
    FORMAT,
    GEOMETRIES,
    GRADIENTS,
    OPS,
    Geometry,
    compute_dtype,
    tensors,
)

CUDA = torch._C.DispatchKey.CUDA
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# The others are served by tensor ops on CUDA too.
WITH_KERNELS = [
    name
    for name in ENTRIES
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"rimet::{name}", "CUDA")
]

# Beside the geometries of every device: what the kernels cut into parts, and odd ends of 16-byte accesses.
ON_CUDA = GEOMETRIES | {
    "parts-of-columns": Geometry((3000, 5), (5,)),
    "tiles-of-columns": Geometry((7, 2003), (2003,)),
    "kept-around-columns": Geometry((4, 6, 5), (4, 1, 5)),
    "runs-of-many-rows": Geometry((40, 3, 50), (3, 1)),
    "short-runs": Geometry((300, 9), (300, 1)),
    "columns-of-blocks": Geometry((64, 12), (4, 12), [16, 1]),
    "misaligned": Geometry((1027,), (), None, lambda t: torch.cat([t[:1], t])[1:]),
    "misaligned-rows": Geometry(
        (5, 64), (5, 1), None, lambda t: torch.cat([t[:1], t]).flatten()[64:].view(5, 64)
    ),
}


def through_cuda(op: Any) -> Callable[..., Any]:
    """The op's CUDA implementation, whatever its tensors are."""
    return lambda *args, **kwargs: op.default._op_dk(CUDA, *args, **kwargs)


class CudaOps:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return through_cuda(getattr(OPS, name))


CUDA_OPS = CudaOps()


@pytest.fixture(scope="module", autouse=True)
def driver(host_driver_library: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if torch.cuda.is_available():
        pytest.skip("the real driver serves this process")
    # Read once, when the first CUDA op comes along: nothing else in this process does without a device.
    os.environ["RIMET_LIBCUDA"] = os.environ["RIMET_LIBNVRTC"] = str(host_driver_library)
    os.environ["RIMET_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    kernels, reason = rimet._core.cuda_status(-1)
    assert kernels, reason
    return ctypes.CDLL(str(host_driver_library))


def plain(name: str, block: list[int] | None) -> tuple[Any, ...]:
    return {
        "quantize": (0, 15, block),
        "dequantize": (block,),
        "quantize_dequantize": (0, 15, 0.5, block),
        "quantize_dequantize_range": (0, 15, False, 0.0, block),
        "float_quantize": (*FORMAT, block),
        "float_quantize_dequantize": (*FORMAT, block),
    }[name]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values (-0 is 0), NaN where the other has it; dtype, shape and layout too."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ON_CUDA)
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_forward_is_the_reference_bit_for_bit(
    name: str, geometry: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = ON_CUDA[geometry]
    names, op, ref = ENTRIES[name]
    data = tensors(g, dtype)
    arguments = [data[n] for n in names]
    expected = ref(g, *arguments, compute_dtype=compute_dtype(dtype)).to(dtype)
    monkeypatch.setitem(op.__globals__, "OPS", CUDA_OPS)
    torch.testing.assert_close(op(g, *arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [g for g in ON_CUDA if g != "empty"])
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_gradients_are_the_closed_form(name: str, geometry: str, dtype: torch.dtype) -> None:
    g = ON_CUDA[geometry]
    data = tensors(g, dtype)
    encodings = [data[n].to(compute_dtype(dtype)) for n in ENTRIES[name][0][1:]]
    x, grad = data["x"], data["grad"]
    # A shift of 0 here: GRADIENTS' references have none.
    rest = (0, 15, 0.0, g.block) if name == "quantize_dequantize" else plain(name, g.block)
    backward = getattr(CUDA_OPS, f"{name}_backward")
    everything = [True] * (1 + len(encodings))
    got = backward(grad, x, *encodings, *rest, everything)
    expected = GRADIENTS[name](g, grad, x, *encodings)
    # As in test_registry; half precision rounds the gradient of x once more.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    half = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0.0)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        scale = max(1.0, b.abs().max().item())
        rtol = max(tolerance, half if i == 0 else 0.0)
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=tolerance * scale)
    # The gradient of x is the CPU kernel's to the bit, alone or with the sums; the sums come out alike.
    on_cpu = getattr(OPS, f"{name}_backward")(grad, x, *encodings, *rest, everything)
    assert same(got[0], on_cpu[0])
    alone = backward(grad, x, *encodings, *rest, [True] + [False] * len(encodings))
    assert same(alone[0], got[0]) and all(sums is None for sums in alone[1:])
    again = backward(grad, x, *encodings, *rest, [False] + [True] * len(encodings))
    assert again[0] is None
    assert all(same(a, b) for a, b in zip(again[1:], got[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [g for g in ON_CUDA if g != "empty"])
def test_min_max(geometry: str, dtype: torch.dtype) -> None:
    g = ON_CUDA[geometry]
    x = tensors(g, dtype)["x"]
    got = CUDA_OPS.min_max(x, g.encoding, g.block)
    for a, b in zip(got, reference.min_max(x, g.encoding, g.block), strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (0, 255), (-(2**31), 2**31 - 1)])
def test_range_to_scale_offset(symmetric: bool, qmin: int, qmax: int) -> None:
    special = [0.0, 1e-30, 1.0, -1.0, 3.4e38, float("inf"), float("nan")]
    low, high = torch.tensor(list(product(special, special)) * 9).unbind(1)
    low, high = low.contiguous(), high.contiguous()
    for a, b in zip(
        CUDA_OPS.range_to_scale_offset(low, high, qmin, qmax, symmetric),
        OPS.range_to_scale_offset(low, high, qmin, qmax, symmetric),
        strict=True,
    ):
        assert same(a, b)
    gs, go = torch.randn_like(low), torch.randn_like(low)
    arguments = (gs, go, low, high, qmin, qmax, symmetric)
    for a, b in zip(
        CUDA_OPS.range_to_scale_offset_backward(*arguments),
        OPS.range_to_scale_offset_backward(*arguments),
        strict=True,
    ):
        assert same(a, b)


HOSTILE = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e30, 6e4, 2.5]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, ...], list[int]]:
    """Input and gradient in any memory order, at any offset, with hostile values; an encoding's shape and block."""
    parts = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    broadcast = draw(st.integers(0, len(parts) - 1))
    order = draw(st.permutations(range(len(parts))))
    dtype = draw(st.sampled_from(DTYPES))
    offset = draw(st.integers(0, 3))
    sizes = [groups * block for groups, block in parts]
    numel = torch.Size(sizes).numel()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor() -> Tensor:
        values = (torch.randn(numel + offset, generator=generator) * 5).to(dtype)[offset:]
        return values.view([sizes[i] for i in order]).permute(
            [order.index(i) for i in range(len(sizes))]
        )

    x, grad = tensor(), tensor()
    for value in draw(st.lists(st.sampled_from(HOSTILE), max_size=6)):
        index = torch.randint(numel, (1,), generator=generator)
        x.as_strided((numel,), (1,), x.storage_offset())[index] = value
    kept = parts[broadcast:]
    return x, grad, tuple(groups for groups, _ in kept), [block for _, block in kept]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(WITH_KERNELS), st.sampled_from([True, False]))
def test_any_geometry_and_hostile_values_give_what_the_cpu_gives(
    case: tuple[Tensor, Tensor, tuple[int, ...], list[int]], name: str, wide: bool
) -> None:
    x, grad, encoding, block = case
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(encoding, generator=generator) + 0.1
    second = torch.floor(torch.rand(encoding, generator=generator) * 8 - 12)
    if name.endswith("range"):
        first, second = -first, -second
    is_float = name.startswith("float")
    encodings = (first,) if is_float else (first, second)
    rest = plain(name, block)
    if wide and is_float:
        rest = (8, 3, False, False, block)  # float64 inside
    elif wide and name != "dequantize":
        rest = (-(2**31), 2**31 - 1, *rest[2:])
    arguments = (x, *encodings, *rest)
    mask = [True] * (1 + len(encodings))
    assert same(getattr(CUDA_OPS, name)(*arguments), getattr(OPS, name)(*arguments))
    got, expected = (
        getattr(ops, f"{name}_backward")(grad, *arguments, mask) for ops in (CUDA_OPS, OPS)
    )
    assert same(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        # The same terms in another order: float32 sums of up to 256, of terms up to 1e30.
        magnitude = expected[1].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, magnitude), equal_nan=True)
    for a, b in zip(
        CUDA_OPS.min_max(x, encoding, block), OPS.min_max(x, encoding, block), strict=True
    ):
        assert same(a, b)


@pytest.mark.parametrize(
    "fields",
    [
        (4, 3, True, False),
        (4, 3, True, True),
        (5, 2, False, False),
        (2, 1, True, False),
        (3, 0, True, False),
        (0, 4, True, False),
        (5, 10, False, False),
        (8, 7, False, False),
        (8, 23, False, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_format_is_the_cpus(fields: tuple[Any, ...], dtype: torch.dtype) -> None:
    # Every bit pattern of 16-bit types; of the others values over the whole range, ties among them.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype) if dtype.itemsize == 2 else bits.view(torch.bfloat16).to(dtype)
    x = torch.cat([x, x * (1 + 2**-7)])
    for scale in (torch.tensor(1.0), torch.tensor(0.3)):
        for name in ("float_quantize", "float_quantize_dequantize"):
            got, expected = (getattr(ops, name)(x, scale, *fields, None) for ops in (CUDA_OPS, OPS))
            assert same(got, expected)
            # The signs of zeros too.
            numbers = ~expected.isnan()
            assert torch.equal(got.signbit()[numbers], expected.signbit()[numbers])


# ---- the ops of the techniques ------------------------------------------------------------------------------


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element behind a 16-byte boundary."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("place", [lambda t: t, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in test_adaround.GEOMETRIES if n != "empty"])
def test_adaround_is_the_cpus(
    name: str, dtype: torch.dtype, place: Callable[[Tensor], Tensor]
) -> None:
    t = test_adaround.tensors(name, dtype)
    t |= {key: place(t[key]) for key in ("x", "alpha", "grad")}
    encodings = (t["scale"], t["offset"], test_adaround.QMIN, test_adaround.QMAX)

    def results(ops: Any) -> list[Tensor]:
        arguments = (t["x"], t["alpha"], *encodings)
        found = [ops.adaround_quantize_dequantize(*arguments, soft, t["block"]) for soft in (0, 1)]
        found.append(ops.adaround_quantize_dequantize_backward(t["grad"], *arguments, t["block"]))
        for beta in (1.0, 7.5):
            grad = torch.tensor(0.25, dtype=compute_dtype(dtype))
            found.append(ops.adaround_regularizer_backward(grad, t["alpha"], beta))
        return found + test_adaround._step(t, ops.adaround_step_)

    for got, expected in zip(results(CUDA_OPS), results(OPS), strict=True):
        if dtype == torch.float64:
            # Each side's own exponential and logarithm.
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        else:
            assert same(got, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruction_gradient_is_the_cpus(dtype: torch.dtype, relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    target, output = (torch.randn(n, 7, 601, generator=generator).to(dtype) for n in (4, 3))
    output[0, 0, : len(HOSTILE)] = torch.tensor(HOSTILE).to(dtype)
    for samples in (torch.tensor([3, 1, 1]), None):
        t = target if samples is not None else target[:3]
        got, expected = output.clone(), output.clone()
        CUDA_OPS.reconstruction_gradient_(got, t, samples, factor=0.3, relu=relu)
        OPS.reconstruction_gradient_(expected, t, samples, factor=0.3, relu=relu)
        assert same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 40_001, 300_000])
def test_adaround_regularizer(n: int, dtype: torch.dtype) -> None:
    alpha = (torch.randn(n, generator=torch.Generator().manual_seed(2)) * 2).to(dtype)
    got = CUDA_OPS.adaround_regularizer(alpha, 5.0)
    h = test_adaround.rectified_sigmoid(alpha.double())
    expected = (1 - (2 * h - 1).abs() ** 5).sum()
    assert got.dtype == compute_dtype(dtype)
    # As on the CPU: float32 terms, of which up to 256 are added before float64 takes over.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


def test_adaround_with_hostile_values() -> None:
    special = torch.tensor([*HOSTILE, 1e5, -1e5]).repeat(11)
    x, alpha, grad = (special.roll(shift) for shift in (0, 1, 5))
    encodings = (torch.tensor(0.3), torch.tensor(1.0), -8, 7)
    t = {"x": x, "alpha": alpha, "grad": grad, "block": None}
    t |= {"scale": encodings[0], "offset": encodings[1]}
    for got, expected in zip(
        [
            CUDA_OPS.adaround_quantize_dequantize(x, alpha, *encodings, True, None),
            *test_adaround._step(t, CUDA_OPS.adaround_step_),
        ],
        [
            OPS.adaround_quantize_dequantize(x, alpha, *encodings, True, None),
            *test_adaround._step(t),
        ],
        strict=True,
    ):
        assert same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*test_seq_mse.SHAPES, (3, 4, 130), (1, 300_001)], ids=str)
@pytest.mark.parametrize("case", test_seq_mse.CASES)
def test_row_sums(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_seq_mse, "OPS", CUDA_OPS)
    test_seq_mse.test_sums_are_those_of_float64(case, shape, dtype, "cpu")


def test_launches_of_the_techniques(driver: ctypes.CDLL) -> None:
    t = test_adaround.tensors("threads", torch.float32)
    rows = torch.randn(5, 1000), torch.randn(1, 200_000)
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: test_adaround._step(t, CUDA_OPS.adaround_step_), 3),  # one for each of three steps
        (lambda: CUDA_OPS.adaround_regularizer(t["alpha"][:5000], 2.0), 1),
        (lambda: CUDA_OPS.adaround_regularizer(t["alpha"], 2.0), 2),  # partial sums are combined
        (lambda: CUDA_OPS.row_dot(rows[0], rows[0]), 1),
        (lambda: CUDA_OPS.reconstruction_error(rows[1]), 2),
    ]
    for call, launches in calls:
        before = driver.host_driver_launches()
        call()
        assert driver.host_driver_launches() - before == launches


def test_gradients_of_no_elements_are_zero() -> None:
    x = torch.empty(0, 6)
    gx, gs, go = CUDA_OPS.quantize_dequantize_backward(
        x, x, torch.ones(6), torch.zeros(6), 0, 15, 0.0, None, [True] * 3
    )
    assert (
        gx.shape == (0, 6) and torch.equal(gs, torch.zeros(6)) and torch.equal(go, torch.zeros(6))
    )


def test_sums_do_not_depend_on_the_order_of_threads() -> None:
    # The stand-in runs the threads of a block forwards and backwards in turn: a missing barrier shows.
    for geometry in ("chunks", "long-runs", "parts-of-columns", "tiles-of-columns", "blocks"):
        g = ON_CUDA[geometry]
        data = tensors(g, torch.float32)
        arguments = (data["grad"], data["x"], data["min"], data["max"], 0, 15, False, 0.0, g.block)
        results = [
            CUDA_OPS.quantize_dequantize_range_backward(*arguments, [True] * 3)
            # One more launch in between, so that both directions are met whatever a call takes.
            for _ in range(3)
            if CUDA_OPS.quantize_dequantize(
                torch.ones(1), torch.ones(1), torch.zeros(1), 0, 1, 0.0, None
            ).numel()
        ]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), geometry


@pytest.mark.parametrize(
    ("geometry", "forward", "backward"),
    [
        ("per-tensor", 1, 1),
        ("chunks", 1, 2),  # partial results are combined
        ("per-channel-0", 2, 2),  # ranges become scale and offset first
        ("per-channel-1", 2, 3),
        ("blocks", 2, 2),
        ("parts-of-columns", 2, 3),
    ],
)
def test_launches(geometry: str, forward: int, backward: int, driver: ctypes.CDLL) -> None:
    g = ON_CUDA[geometry]
    data = tensors(g, torch.float32)
    arguments = (data["x"], data["min"], data["max"], 0, 15, False, 0.0, g.block)
    before = driver.host_driver_launches()
    CUDA_OPS.quantize_dequantize_range(*arguments)
    between = driver.host_driver_launches()
    CUDA_OPS.quantize_dequantize_range_backward(data["grad"], *arguments, [True] * 3)
    assert (between - before, driver.host_driver_launches() - between) == (forward, backward)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, s: CUDA_OPS.quantize(x, s, s, 5, 5, None), ValueError, ["qmin", "quantize"]),
        (lambda x, s: CUDA_OPS.quantize(x, s, s, 0, 5, None), ValueError, ["scale", "[4, 6]"]),
        (lambda x, s: CUDA_OPS.quantize(x.int(), s, s, 0, 5, [2]), TypeError, ["float16"]),
        (lambda x, s: CUDA_OPS.min_max(x[:0], [1], None), ValueError, ["empty", "[0, 6]"]),
        (lambda x, s: CUDA_OPS.adaround_regularizer(x, 0.5), ValueError, ["beta", "0.5"]),
        (lambda x, s: CUDA_OPS.adaround_regularizer(x.int(), 2.0), TypeError, ["float16"]),
        (lambda x, s: CUDA_OPS.row_dot(x, x[:2]), ValueError, ["[4, 6]", "[2, 6]"]),
    ],
)
def test_hostile_input_is_a_typed_error(
    call: Callable[..., Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 6), torch.rand(3))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---- processes of their own: what is read once -------------------------------------------------------------

SCRIPT = """
import torch, rimet
x = torch.linspace(-2, 2, 301).view(7, 43).requires_grad_()
low, high = torch.full((7, 1), -1.0), torch.full((7, 1), 1.5)
ops, key = torch.ops.rimet, torch._C.DispatchKey.CUDA
plain = (0, 15, False, 0.0, None)
with torch.no_grad():
    y = ops.quantize_dequantize_range.default._op_dk(key, x, low, high, *plain)
    assert torch.equal(y, ops.quantize_dequantize_range(x, low, high, *plain))
    pair = ops.range_to_scale_offset.default._op_dk(key, low, high, 0, 15, False)
    for a, b in zip(pair, ops.range_to_scale_offset(low, high, 0, 15, False)):
        assert torch.equal(a, b)
    a, b = ops.min_max.default._op_dk(key, x, (7, 1), None)
    assert torch.equal(a, x.amin(1, True)) and torch.equal(b, x.amax(1, True))
print(*rimet._core.cuda_status(-1))
"""


# The engine's whole optimization of a layer on CPU tensors, whose ops are those of CUDA from some point on.
LOOP = """
import ctypes, os, torch
from rimet import _core
from rimet._weight_layers import linear_map
ops, key = torch.ops.rimet, torch._C.DispatchKey.CUDA
torch.manual_seed(0)
layer = torch.nn.Conv2d(4, 6, 3, padding=1)
x = [torch.randn(8, 4, 7, 7) for _ in range(5)]
y = [layer(x) for x in x]
scale = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 2

def optimize(activation):
    found = _core.adaround_layer(
        linear_map(layer), layer.weight, layer.bias, x, y, scale, torch.zeros_like(scale),
        qmin=-2, qmax=1, block_size=None, activation=activation, num_iterations=150, reg_param=0.01,
        beta_range=(20.0, 2.0), warm_start=0.2, learning_rate=1e-2, early_stop=1e-9, seed=0,
    )
    return found["weight"], found["loss_before"], found["loss_after"]

cpu = [optimize(activation) for activation in (None, ("relu", [], None))]
library = torch.library.Library("rimet", "IMPL")
names = ("adaround_quantize_dequantize", "adaround_step_", "adaround_regularizer", "reconstruction_error")
for name in (*names, "reconstruction_gradient_"):
    op = getattr(ops, name).default
    library.impl(name, lambda *args, op=op, **kwargs: op._op_dk(key, *args, **kwargs), "CPU")
driver = ctypes.CDLL(os.environ["RIMET_LIBCUDA"]) if "libcuda_host" in os.environ["RIMET_LIBCUDA"] else None
cuda = [optimize(activation) for activation in (None, ("relu", [], None))]
for a, b in zip(cpu, cuda):
    if driver:
        assert torch.equal(a[0], b[0]), (a, b)
        assert driver.host_driver_launches() >= 300
    assert abs(a[1] - b[1]) <= 1e-5 * a[1] and b[2] < b[1] and abs(a[2] - b[2]) <= 0.05 * a[2]
print(*_core.cuda_status(-1))
"""


def run(script: str = SCRIPT, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_tensor_ops_take_over_and_say_why(host_driver_library: Path) -> None:
    assert "RIMET_CUDA_KERNELS=0" in run(RIMET_CUDA_KERNELS="0")
    assert "no CUDA driver" in run(RIMET_LIBCUDA="/nowhere/libcuda.so.1")
    text = run(RIMET_LIBNVRTC="/nowhere/libnvrtc.so")
    assert text.startswith("False") and "NVRTC cannot be opened" in text


def test_adarounds_loop_takes_the_kernels_or_else_tensor_ops(host_driver_library: Path) -> None:
    assert run(LOOP).startswith("True")
    assert "no CUDA driver" in run(LOOP, RIMET_LIBCUDA="/nowhere/libcuda.so.1")


def test_nvrtc_of_torch_compiles_and_the_cache_keeps(
    host_driver_library: Path, tmp_path: Path
) -> None:
    environment = {"RIMET_CACHE_DIR": str(tmp_path), "RIMET_LIBNVRTC": ""}
    nvrtc = os.environ.pop("RIMET_LIBNVRTC")
    del environment["RIMET_LIBNVRTC"]
    try:
        text = run(**environment)
        assert text.startswith("True") and "sm_90" in text and "libnvrtc" in text
        kept = sorted((tmp_path / "cuda").iterdir())
        assert kept and all(file.read_bytes().startswith(b"\x7fELF") for file in kept)
        times = [file.stat().st_mtime_ns for file in kept]
        # A file that is of no use is compiled anew; the others are read.
        kept[0].write_bytes(b"rubbish")
        run(**environment)
        assert sorted((tmp_path / "cuda").iterdir()) == kept
        assert kept[0].read_bytes().startswith(b"\x7fELF")
        assert [file.stat().st_mtime_ns for file in kept][1:] == times[1:]
    finally:
        os.environ["RIMET_LIBNVRTC"] = nvrtc


def test_no_cuda_library_is_linked() -> None:
    needed = subprocess.run(
        ["readelf", "-d", rimet.ops_library_path()], capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in needed.splitlines() if "NEEDED" in line]
    assert lines and not any("cuda" in line or "nvrtc" in line for line in lines), lines
