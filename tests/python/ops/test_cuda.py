"""What only a CUDA device can show: the same bits, streams, graphs, compiled models, large tensors."""

from __future__ import annotations

from typing import Any

import pytest
import rimet
import torch
from torch import Tensor

from . import test_adaround, test_seq_mse
from .test_registry import ENTRIES, GEOMETRIES, OPS, tensors

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PLAIN = (-8, 7, False, 0.0, None)


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(shape, generator=generator).to("cuda", dtype),
        "grad": torch.randn(shape, generator=generator).to("cuda", dtype),
        "min": torch.tensor(-1.5, device="cuda"),
        "max": torch.tensor(1.25, device="cuda"),
    }


def test_kernels_are_in_use() -> None:
    info = rimet.backend_info()
    assert info["cuda_kernels"], info["cuda"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", ENTRIES)
def test_elementwise_results_are_those_of_the_cpu(
    name: str, geometry: str, dtype: torch.dtype
) -> None:
    g = GEOMETRIES[geometry]
    names, op, _ = ENTRIES[name]
    results = []
    for device in ("cpu", "cuda"):
        data = tensors(g, dtype, device=device)
        arguments = [data[n].detach().requires_grad_() for n in names]
        y = op(g, *arguments)
        (gx,) = torch.autograd.grad(y, arguments[:1], data["grad"])
        results.append([y.detach().cpu(), gx.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", test_adaround.GEOMETRIES)
def test_adarounds_results_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        t = test_adaround.tensors(name, dtype, device)
        alpha = t["alpha"].clone().requires_grad_()
        arguments = (t["scale"], t["offset"], test_adaround.QMIN, test_adaround.QMAX)
        soft = OPS.adaround_quantize_dequantize(t["x"], alpha, *arguments, True, t["block"])
        (of_soft,) = torch.autograd.grad(soft, alpha, t["grad"])
        (of_regularizer,) = torch.autograd.grad(OPS.adaround_regularizer(alpha, 7.5), alpha)
        output = t["grad"].contiguous()
        OPS.reconstruction_gradient_(output, t["x"], None, factor=0.3, relu=True)
        found = [soft.detach(), of_soft, of_regularizer, output, *test_adaround._step(t)]
        results.append([tensor.cpu() for tensor in found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adarounds_step_and_row_sums_are_captured_into_a_graph() -> None:
    t = test_adaround.tensors("blocks", torch.float32, "cuda")
    alpha = t["alpha"].clone().requires_grad_()

    def work() -> list[Tensor]:
        loss = OPS.adaround_regularizer(alpha, 4.0)
        (grad,) = torch.autograd.grad(loss, alpha)
        error = OPS.reconstruction_error(t["x"], t["grad"], "l1")
        return [loss.detach(), grad, error, *test_adaround._step(t)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_row_sums_are_repeatable() -> None:
    a, b = test_seq_mse.pair((3, 1_000_003), torch.float32, "cuda")
    first = OPS.reconstruction_error(a, b)
    assert all(torch.equal(first, OPS.reconstruction_error(a, b)) for _ in range(10))


def test_sums_are_repeatable() -> None:
    data = activation(32, 64, 56, 56)
    arguments = [data[n].requires_grad_() for n in ("x", "min", "max")]

    def gradients() -> tuple[Tensor, ...]:
        y = OPS.quantize_dequantize_range(*arguments, *PLAIN)
        return torch.autograd.grad(y, arguments, data["grad"])

    first = gradients()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_work_is_put_on_the_current_stream() -> None:
    data = activation(1 << 22)
    expected = OPS.quantize_dequantize_range(data["x"], data["min"], data["max"], *PLAIN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The input is ready only when the stream gets there.
        late = torch.zeros_like(data["x"])
        torch.cuda._sleep(50_000_000)
        late.copy_(data["x"])
        result = OPS.quantize_dequantize_range(late, data["min"], data["max"], *PLAIN)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_graph_capture_after_one_warm_up() -> None:
    data = activation(64, 1000)
    arguments = [data[n].requires_grad_() for n in ("x", "min", "max")]

    def step() -> tuple[Tensor, ...]:
        y = OPS.quantize_dequantize_range(*arguments, *PLAIN)
        return (y, *torch.autograd.grad(y, arguments, data["grad"]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        arguments[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_compile_with_reduced_overhead() -> None:
    data = activation(256, 512)
    low, high = data["min"], data["max"]

    def model(x: Tensor) -> Tensor:
        return OPS.quantize_dequantize_range(x * 2.0, low, high, *PLAIN) + 1.0

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        assert torch.equal(compiled(data["x"]), model(data["x"]))


def test_other_devices_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    data = {name: tensor.to("cuda:1") for name, tensor in activation(1000).items()}
    arguments = [data[n].requires_grad_() for n in ("x", "min", "max")]
    assert torch.cuda.current_device() == 0
    y = OPS.quantize_dequantize_range(*arguments, *PLAIN)
    torch.autograd.grad(y, arguments, data["grad"])
    on_cpu = OPS.quantize_dequantize_range(*(a.detach().cpu() for a in arguments), *PLAIN)
    assert torch.equal(y.detach().cpu(), on_cpu)


def test_more_elements_than_32_bits_count() -> None:
    n = (1 << 32) + 1029
    if torch.cuda.mem_get_info()[0] < 6 * n:
        pytest.skip("too little device memory")
    x = torch.zeros(n, device="cuda", dtype=torch.float16)
    x[-1029:] = torch.linspace(-3, 3, 1029)
    low, high = torch.tensor(-1.5, device="cuda"), torch.tensor(1.25, device="cuda")
    y = OPS.quantize_dequantize_range(x, low, high, *PLAIN)
    assert torch.equal(
        y[-1029:], OPS.quantize_dequantize_range(x[-1029:].clone(), low, high, *PLAIN)
    )
    a, b = OPS.min_max(x, ())
    assert a.item() == -3 and b.item() == 3
