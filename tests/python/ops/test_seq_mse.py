"""Sequential MSE's ops: sums along rows, against float64 torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rimet
import torch
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.rimet
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(5,), (3, 4), (2, 3, 17), (2, 70_001), (300, 130), (4, 0), (0, 5)]
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mse": (
        lambda a, b: OPS.reconstruction_error(a, b, "mse"),
        lambda a, b: (a - b).square().sum(-1),
    ),
    "l1": (lambda a, b: OPS.reconstruction_error(a, b, "l1"), lambda a, b: (a - b).abs().sum(-1)),
    "mse, no target": (
        lambda a, b: OPS.reconstruction_error(a),
        lambda a, b: a.square().sum(-1),
    ),
    "l1, no target": (
        lambda a, b: OPS.reconstruction_error(a, None, "l1"),
        lambda a, b: a.abs().sum(-1),
    ),
    "dot": (lambda a, b: OPS.row_dot(a, b), lambda a, b: (a * b).sum(-1)),
}


def pair(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return a, b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float64(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    op, reference = CASES[case]
    a, b = pair(shape, dtype, device)
    got = op(a, b)
    assert got.dtype == torch.float64 and got.shape == shape[:-1]
    # Terms are rounded to float32, and up to 256 of them are added in it before float64 takes over.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    size = max(1.0, shape[-1])
    torch.testing.assert_close(
        got, reference(a.double(), b.double()), rtol=tolerance, atol=tolerance * size**0.5
    )


def test_a_strided_tensor_is_read_as_it_is_indexed(device: str) -> None:
    a, b = pair((40, 30), torch.float32, device)
    got = OPS.row_dot(a.t(), b.t())
    torch.testing.assert_close(got, (a.double() * b.double()).sum(0), rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_threads_rows_or_the_instruction_set() -> None:
    a, b = pair((3, 140_003), torch.float32)
    expected = OPS.reconstruction_error(a, b, "mse")
    threads = torch.get_num_threads()
    try:
        for isa in ("portable", "avx2", "avx512"):
            if rimet._core.force_cpu_isa(isa):
                for n in (1, 3):
                    torch.set_num_threads(n)
                    assert torch.equal(OPS.reconstruction_error(a, b, "mse"), expected)
                    assert torch.equal(OPS.reconstruction_error(a[1:2], b[1:2]), expected[1:2])
    finally:
        rimet._core.force_cpu_isa(None)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_devices_without_kernels_compute_the_same(case: str) -> None:
    a, b = pair((7, 90), torch.float32)
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    if case == "dot":
        got = OPS.row_dot.default._op_dk(key, a, b)
    else:
        loss, _, none = case.partition(", ")
        got = OPS.reconstruction_error.default._op_dk(key, a, None if none else b, loss)
    torch.testing.assert_close(got, CASES[case][0](a, b), rtol=1e-6, atol=1e-6)


def test_opcheck(device: str) -> None:
    a, b = pair((4, 9), torch.float32, device)
    opcheck(OPS.reconstruction_error.default, (a, b, "mse"))
    opcheck(OPS.reconstruction_error.default, (a, None, "l1"))
    opcheck(OPS.row_dot.default, (a, b))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a: OPS.reconstruction_error(a, a[:2]), ValueError, ["[4, 9]", "[2, 9]"]),
        (lambda a: OPS.reconstruction_error(a, a, "l2"), ValueError, ["loss", "l2"]),
        (lambda a: OPS.reconstruction_error(a.sum()), ValueError, ["dimension"]),
        (lambda a: OPS.row_dot(a, a.double()), TypeError, ["Double"]),
        (lambda a: OPS.row_dot(a.int(), a.int()), TypeError, ["float16"]),
    ],
)
def test_hostile_input_is_a_typed_error(
    call: Callable[[Tensor], object], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 9))
    assert all(word in str(caught.value) for word in words), str(caught.value)
