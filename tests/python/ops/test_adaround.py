"""AdaRound's ops: independent references, gradients, the fused step against torch's Adam."""

from __future__ import annotations

from typing import Any

import pytest
import rimet
import torch
from reference import spread
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.rimet
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# name -> input shape, encoding shape, block size
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[int] | None]] = {
    "per-tensor": ((33, 7), (), None),
    "per-channel": ((6, 5, 3, 3), (6, 1, 1, 1), None),
    "transposed": ((4, 6, 3, 3), (6, 1, 1), None),
    "blocks": ((6, 48), (6, 3), [1, 16]),
    "blocks-of-few": ((5, 12), (5, 6), [1, 2]),
    "per-element": ((3, 40), (3, 40), None),
    "threads": ((70_001,), (), None),
    "empty": ((0, 4), (), None),
}
QMIN, QMAX = -8, 7


def tensors(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Weights beyond the grid's ends too, and rounding variables beyond the clamp."""
    shape, encoding, block = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(3)

    def normal(size: tuple[int, ...], deviation: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * deviation

    found = {
        "x": normal(shape, 4.0).to(dtype),
        "alpha": normal(shape, 2.0).to(dtype),
        "grad": normal(shape, 1.0).to(dtype),
        "scale": 0.3 + torch.rand(encoding, generator=generator),
        "offset": torch.floor(torch.rand(encoding, generator=generator) * 5 - 2),
    }
    return {key: tensor.to(device) for key, tensor in found.items()} | {"block": block}


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """Nagel et al. 2020, equation 23."""
    return (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)


def soft_rounded(x: Tensor, alpha: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Nagel et al. 2020, equation 22, in float64; differentiable."""
    level = torch.floor(x / scale) + rectified_sigmoid(alpha) - offset
    return (level.clamp(QMIN, QMAX) + offset) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_soft_rounding_is_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    t = tensors(name, dtype, device)
    got = OPS.adaround_quantize_dequantize(
        t["x"], t["alpha"], t["scale"], t["offset"], QMIN, QMAX, True, t["block"]
    )
    assert got.dtype == dtype and got.shape == t["x"].shape
    scale, offset = (spread(t[k].double(), t["x"].shape, t["block"]) for k in ("scale", "offset"))
    # floor(x / s) is decided in the compute type; near an integer float64 could decide otherwise.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = t["x"].to(compute)
    base = torch.floor(x / scale.to(compute)).double()
    level = base + rectified_sigmoid(t["alpha"].double()) - offset
    expected = (level.clamp(QMIN, QMAX) + offset) * scale
    # Half precision rounds the result, to 8 bits in bfloat16; float32's sigmoid has two units.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["per-channel", "blocks", "blocks-of-few"])
def test_hard_rounding_takes_the_upper_level_where_alpha_is_not_negative(
    name: str, device: str
) -> None:
    t = tensors(name, torch.float32, device)
    t["alpha"].view(-1)[::7] = 0.0
    got = OPS.adaround_quantize_dequantize(
        t["x"], t["alpha"], t["scale"], t["offset"], QMIN, QMAX, False, t["block"]
    )
    scale, offset = (spread(t[k], t["x"].shape, t["block"]) for k in ("scale", "offset"))
    level = torch.floor(t["x"] / scale) + (t["alpha"] >= 0) - offset
    assert torch.equal(got, (level.clamp(QMIN, QMAX) + offset) * scale)


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "empty"])
def test_gradient_of_alpha_is_autograds(name: str, device: str) -> None:
    t = tensors(name, torch.float64, device)
    alpha = t["alpha"].clone().requires_grad_()
    x = t["x"].clone().requires_grad_()
    y = OPS.adaround_quantize_dequantize(
        x, alpha, t["scale"], t["offset"], QMIN, QMAX, True, t["block"]
    )
    # Weights are constants of the problem: they get no gradient.
    got, none = torch.autograd.grad(y, (alpha, x), t["grad"], allow_unused=True)
    assert none is None
    reference = t["alpha"].clone().requires_grad_()
    scale, offset = (spread(t[k].double(), t["x"].shape, t["block"]) for k in ("scale", "offset"))
    z = soft_rounded(t["x"], reference, scale, offset)
    (expected,) = torch.autograd.grad(z, reference, t["grad"])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_where_nothing_is_clamped(device: str) -> None:
    x = torch.rand(3, 8, dtype=torch.float64, device=device) * 2
    alpha = (torch.rand(3, 8, dtype=torch.float64, device=device) - 0.5).requires_grad_()
    scale, offset = torch.full((), 0.5).to(x), torch.zeros(()).to(x)
    assert torch.autograd.gradcheck(
        lambda a: OPS.adaround_quantize_dequantize(x, a, scale, offset, -8, 7), (alpha,)
    )
    assert torch.autograd.gradcheck(lambda a: OPS.adaround_regularizer(a, 3.0), (alpha,))


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regularizer_and_its_gradient(dtype: torch.dtype, beta: float, device: str) -> None:
    """Nagel et al. 2020, equation 24."""
    generator = torch.Generator().manual_seed(0)
    alpha = (torch.randn(40_001, generator=generator) * 2).to(dtype)
    alpha[:3] = torch.tensor([0.0, 50.0, -50.0], dtype=dtype)  # undecided, up, down
    alpha = alpha.to(device)
    leaf = alpha.clone().requires_grad_()
    got = OPS.adaround_regularizer(leaf, beta)
    (got_grad,) = torch.autograd.grad(got, leaf, torch.full_like(got, 0.5))
    reference = alpha.double().requires_grad_()
    expected = (1 - (2 * rectified_sigmoid(reference) - 1).abs() ** beta).sum()
    (expected_grad,) = torch.autograd.grad(expected, reference, torch.full_like(expected, 0.5))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float32 terms: a logarithm within 2e-7 is multiplied by beta. Half precision rounds gradients.
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    torch.testing.assert_close(got.double(), expected, rtol=min(tolerance, 2e-5), atol=0)
    torch.testing.assert_close(got_grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reg_param", [0.0, 0.01])
@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "empty"])
def test_fused_step_is_torchs_adam(name: str, reg_param: float, device: str) -> None:
    t = tensors(name, torch.float64, device)
    grid = (QMIN, QMAX, t["block"])
    reference = torch.nn.Parameter(t["alpha"].clone())
    optimizer = torch.optim.Adam([reference], lr=0.01)
    state = [t["alpha"].clone(), torch.zeros_like(t["x"]), torch.zeros_like(t["x"])]
    output = torch.empty_like(t["x"])
    scale, offset = (spread(t[k].double(), t["x"].shape, t["block"]) for k in ("scale", "offset"))
    target = t["x"] + 0.1 * t["grad"]
    output.copy_(soft_rounded(t["x"], state[0], scale, offset))
    for step in range(1, 8):
        beta = 10.0 - step
        grad = 2 * (output - target)
        OPS.adaround_step_(
            *state, output, grad, t["x"], t["scale"], t["offset"], *grid,
            step=step, learning_rate=0.01, reg_param=reg_param, beta=beta,
        )  # fmt: skip
        optimizer.zero_grad()
        y = soft_rounded(t["x"], reference, scale, offset)
        undecided = (1 - (2 * rectified_sigmoid(reference) - 1).abs() ** beta).sum()
        ((y - target).square().sum() + reg_param * undecided).backward()
        optimizer.step()
        torch.testing.assert_close(state[0], reference.detach(), rtol=1e-9, atol=1e-9)
        expected = soft_rounded(t["x"], reference.detach(), scale, offset)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruction_gradient_is_autograds(dtype: torch.dtype, relu: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(7, 3, 70, 60, generator=generator).to(device, dtype)
    output = torch.randn(5, 3, 70, 60, generator=generator).to(device, dtype)
    output.view(-1)[::11] = 0.0  # ReLU's corner has gradient 0, as torch's
    samples = torch.tensor([6, 0, 0, 3, 5], device=device)
    f = torch.relu if relu else torch.clone
    leaf = output.double().requires_grad_()
    loss = 0.5 * 0.3 * (f(leaf) - f(target.double()[samples])).square().sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    # Half precision rounds the result once.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)
    other_layout = target.to(memory_format=torch.channels_last)
    for t, chosen in ((target, samples), (other_layout, samples), (target[samples], None)):
        got = output.clone()
        OPS.reconstruction_gradient_(got, t, chosen, factor=0.3, relu=relu)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_reconstruction_gradient_of_nothing_and_of_nan(device: str) -> None:
    empty = torch.empty(0, 4, device=device)
    OPS.reconstruction_gradient_(empty, empty, None, factor=1.0, relu=True)
    output = torch.tensor([[float("nan"), 1.0, -1.0]], device=device)
    target = torch.tensor([[1.0, float("nan"), float("nan")]], device=device)
    OPS.reconstruction_gradient_(output, target, None, factor=1.0, relu=True)
    assert output.isnan().tolist() == [[True, True, False]]


def _step(t: dict[str, Any], call: Any = None) -> list[Tensor]:
    state = [t["alpha"].clone(), torch.zeros_like(t["x"]), torch.zeros_like(t["x"])]
    output = torch.empty_like(t["x"])
    for step in (1, 2, 3):
        (call or OPS.adaround_step_)(
            *state, output, t["grad"], t["x"], t["scale"], t["offset"], QMIN, QMAX, t["block"],
            step=step, learning_rate=0.01, reg_param=0.01, beta=8.0,
        )  # fmt: skip
    return [*state, output]


def test_grids_beyond_float32_are_computed_in_float64(device: str) -> None:
    x = torch.tensor([0.1, -3.7, 123.456], device=device)
    alpha = torch.tensor([0.3, -0.2, 0.0], device=device)
    scale, offset = torch.tensor(1e-7, device=device), torch.tensor(0.0, device=device)
    ends = (-(2**31), 2**31 - 1)
    got = OPS.adaround_quantize_dequantize(x, alpha, scale, offset, *ends)
    wide = scale.double()
    expected = (torch.floor(x.double() / wide) + rectified_sigmoid(alpha.double())) * wide
    # The result is rounded to float32 once; steps of 1e-7 are far below that.
    torch.testing.assert_close(got, expected.float(), rtol=1e-7, atol=0)
    state = [alpha.clone(), torch.zeros_like(x), torch.zeros_like(x)]
    output, grad = torch.empty_like(x), torch.full_like(x, 1e7)
    OPS.adaround_step_(
        *state, output, grad, x, scale, offset, *ends, None,
        step=1, learning_rate=0.01, reg_param=0.0, beta=2.0,
    )  # fmt: skip
    # Adam's first step is the learning rate against the gradient's sign; float32 rounds alpha.
    torch.testing.assert_close(state[0], alpha - 0.01, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_instruction_sets_and_threads_give_the_same_bits(name: str) -> None:
    t = tensors(name, torch.float32)
    expected = [*_step(t), OPS.adaround_regularizer(t["alpha"], 5.0)]
    threads = torch.get_num_threads()
    try:
        for isa in ("portable", "avx2", "avx512"):
            if rimet._core.force_cpu_isa(isa):
                for n in (1, 3):
                    torch.set_num_threads(n)
                    got = [*_step(t), OPS.adaround_regularizer(t["alpha"], 5.0)]
                    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        rimet._core.force_cpu_isa(None)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["per-tensor", "per-channel", "transposed", "blocks"])
def test_devices_without_kernels_compute_the_same(name: str) -> None:
    t = tensors(name, torch.float32)
    key = torch._C.DispatchKey.CompositeExplicitAutograd

    def composite(op: Any) -> Any:
        return lambda *args, **kwargs: op.default._op_dk(key, *args, **kwargs)

    # The sigmoid of torch and that of the kernel differ in the last bits.
    for a, b in zip(_step(t, composite(OPS.adaround_step_)), _step(t), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    arguments = (t["x"], t["alpha"], t["scale"], t["offset"], QMIN, QMAX)
    for soft in (True, False):
        a = composite(OPS.adaround_quantize_dequantize)(*arguments, soft, t["block"])
        b = OPS.adaround_quantize_dequantize(*arguments, soft, t["block"])
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    a, b = t["grad"].contiguous().clone(), t["grad"].contiguous().clone()
    composite(OPS.reconstruction_gradient_)(a, t["x"], None, factor=0.3, relu=True)
    OPS.reconstruction_gradient_(b, t["x"], None, factor=0.3, relu=True)
    assert torch.equal(a, b)
    a = composite(OPS.adaround_regularizer)(t["alpha"], 6.0)
    torch.testing.assert_close(a, OPS.adaround_regularizer(t["alpha"], 6.0), rtol=1e-5, atol=0)


def test_opcheck(device: str) -> None:
    t = tensors("per-channel", torch.float32, device)
    alpha = t["alpha"].clone().requires_grad_()
    arguments = (t["x"], alpha, t["scale"], t["offset"], QMIN, QMAX, True, t["block"])
    opcheck(OPS.adaround_quantize_dequantize.default, arguments)
    opcheck(OPS.adaround_regularizer.default, (alpha, 4.0))
    state = [torch.zeros_like(t["x"]) for _ in range(4)]
    opcheck(
        OPS.adaround_step_.default,
        (*state, t["grad"], t["x"], t["scale"], t["offset"], QMIN, QMAX, None),
        {"step": 1, "learning_rate": 0.01, "reg_param": 0.0, "beta": 2.0},
        # It is no function of its inputs to be traced through autograd, but an optimizer's step.
        test_utils=("test_schema", "test_faketensor"),
    )
    opcheck(
        OPS.reconstruction_gradient_.default,
        (torch.randn(2, 5, device=device), torch.randn(2, 5, device=device), None),
        {"factor": 1.0, "relu": True},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, s: OPS.adaround_quantize_dequantize(x, x[:1], s, s, 0, 5), ValueError, ["alpha"]),
        (lambda x, s: OPS.adaround_quantize_dequantize(x, x, s, s, 5, 5), ValueError, ["qmin"]),
        (
            lambda x, s: OPS.adaround_quantize_dequantize(x, x.double(), s, s, 0, 5),
            TypeError,
            ["alpha", "Float"],
        ),
        (lambda x, s: OPS.adaround_regularizer(x, 0.5), ValueError, ["beta", "0.5"]),
        (lambda x, s: OPS.adaround_regularizer(x.int(), 2.0), TypeError, ["float16"]),
        (
            lambda x, s: OPS.adaround_step_(
                x, x, x, x.t(), x, x, s, s, 0, 5, None,
                step=1, learning_rate=0.1, reg_param=0.0, beta=2.0,
            ),
            ValueError,
            ["layout"],
        ),
        (
            lambda x, s: OPS.adaround_step_(
                x, x, x, x, x, x, s, s, 0, 5, None,
                step=0, learning_rate=0.1, reg_param=0.0, beta=2.0,
            ),
            ValueError,
            ["step", "0"],
        ),
        (
            lambda x, s: OPS.reconstruction_gradient_(x, x[:3], None, factor=1.0, relu=True),
            ValueError,
            ["[3, 4]", "[4, 4]"],
        ),
        (
            lambda x, s: OPS.reconstruction_gradient_(x.t(), x, None, factor=1.0, relu=True),
            ValueError,
            ["contiguous"],
        ),
        (
            lambda x, s: OPS.reconstruction_gradient_(
                x, x.clone(), torch.tensor([0, 1, 2, 4]), factor=1.0, relu=True
            ),
            IndexError,
            ["samples", "below 4"],
        ),
        (
            lambda x, s: OPS.reconstruction_gradient_(x, x.double(), None, factor=1.0, relu=True),
            TypeError,
            ["Double"],
        ),
    ],
)  # fmt: skip
def test_hostile_input_is_a_typed_error(
    call: Any, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 4), torch.tensor(0.5))
    assert all(word in str(caught.value) for word in words), str(caught.value)
