"""The kernels on a CUDA device: bytes per second, as a fraction of what a copy moves in the same run.

python -m benchmarks.cuda           beside AIMET (its Triton backend where it has one), if `make peers` was run
python -m benchmarks.cuda --no-aimet

Every sample is twenty launches and one wait. The tensors are larger than the device's cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import rimet
import torch
from torch import Tensor

from benchmarks.harness import Contestant, Remote, Row, Size, measure
from benchmarks.peer import AimetPeer, find_python

SECTION = "cuda"
#: Calls that are put on the stream before the clock is stopped.
CALLS = 20
#: Fraction of a copy's bandwidth that a kernel is to reach.
GOAL = 0.85
ops = torch.ops.rimet

LARGE = (1 << 26,)
MATRIX = (8192, 8192)
ACTIVATION = (128, 256, 56, 56)


@dataclass(frozen=True)
class Work:
    """A row, and the bytes that it must move: every input read once, every output written once."""

    row: Row
    bytes: int
    copy_bytes: int


def waiting(call: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` calls, done when the device is."""

    def run() -> object:
        with torch.no_grad():
            for _ in range(CALLS):
                call()
        torch.cuda.synchronize()
        return None

    return run


def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), device="cuda").to(dtype)


def work(
    label: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    passes: int,
    build: Callable[[Tensor], Callable[[], object]],
    remote: Remote | None = None,
) -> Work:
    """`passes`: how often the kernel goes over the tensor's memory, reading or writing."""
    numel, size = torch.Size(shape).numel(), torch.finfo(dtype).bits // 8

    def copy() -> Callable[[], object]:
        x = normal(shape, dtype)
        y = torch.empty_like(x)
        return waiting(lambda: y.copy_(x))

    contestants: list[Contestant | Remote] = [
        Contestant("rimet", lambda: waiting(build(normal(shape, dtype)))),
        Contestant("copy", copy),
    ]
    if remote is not None:
        contestants.append(remote)
    text = f"{label}, {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    row = Row(SECTION, text, numel, contestants, unit="copy")
    return Work(row, passes * numel * size, 2 * numel * size)


def aimet(
    shape: Sequence[int], encoding: Sequence[int], block: list[int] | None, dtype: torch.dtype
) -> Remote:
    parameters: dict[str, object] = {
        "shape": list(shape),
        "encoding": list(encoding),
        "bits": 8,
        "symmetric": True,
        "block": block,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cuda",
        "calls": CALLS,
    }
    return Remote("AIMET", "qdq", parameters)


def of_floats(
    name: str, shape: Sequence[int], block: int, fields: tuple[int, int, bool], dtype: torch.dtype
) -> list[Work]:
    """Forward and backward of a floating-point format, scales for blocks of the last axis."""
    encoding, blocks = (*shape[:-1], shape[-1] // block), [1] * (len(shape) - 1) + [block]
    plain = (*fields, False, blocks)

    def forward(x: Tensor) -> Callable[[], object]:
        scale = torch.full(encoding, 0.03, device=x.device)
        return lambda: ops.float_quantize_dequantize(x, scale, *plain)

    def backward(x: Tensor) -> Callable[[], object]:
        scale, grad = torch.full(encoding, 0.03, device=x.device), torch.randn_like(x)
        mask = [True] * 2
        return lambda: ops.float_quantize_dequantize_backward(grad, x, scale, *plain, mask)

    return [
        work(f"forward, {name}", shape, dtype, passes=2, build=forward),
        work(f"backward, {name}", shape, dtype, passes=3, build=backward),
    ]


def of_techniques(weight: Sequence[int], dtype: torch.dtype) -> list[Work]:
    """AdaRound over a 4-bit weight with a scale for each channel, and Sequential MSE's errors."""
    grid = (-8, 7)

    def encodings(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.full((weight[0], 1), 0.4, device=x.device)
        return scale, torch.zeros_like(scale)

    def soft_rounding(x: Tensor) -> Callable[[], object]:
        alpha, (scale, offset) = torch.randn_like(x), encodings(x)
        return lambda: ops.adaround_quantize_dequantize(x, alpha, scale, offset, *grid)

    def regularizer(x: Tensor) -> Callable[[], object]:
        return lambda: ops.adaround_regularizer(x, 8.0)

    def step(x: Tensor) -> Callable[[], object]:
        state, (scale, offset) = [torch.zeros_like(x) for _ in range(4)], encodings(x)
        grad, settings = (
            torch.randn_like(x),
            {"learning_rate": 1e-3, "reg_param": 0.01, "beta": 8.0},
        )
        return lambda: ops.adaround_step_(
            *state, grad, x, scale, offset, *grid, None, step=1, **settings
        )

    def output_gradient(x: Tensor) -> Callable[[], object]:
        target = torch.randn_like(x)
        return lambda: ops.reconstruction_gradient_(x, target, None, factor=0.1, relu=True)

    def error(x: Tensor) -> Callable[[], object]:
        target = torch.randn_like(x)
        return lambda: ops.reconstruction_error(x, target)

    return [
        work("AdaRound, soft rounding", weight, dtype, passes=3, build=soft_rounding),
        work("AdaRound, regularizer", weight, dtype, passes=1, build=regularizer),
        work("AdaRound, step", weight, dtype, passes=9, build=step),
        work("AdaRound, gradient of the output", weight, dtype, passes=3, build=output_gradient),
        work("Sequential MSE, error of rows", weight, dtype, passes=2, build=error),
    ]


def of_granularity(
    name: str,
    shape: Sequence[int],
    encoding: Sequence[int],
    block: list[int] | None,
    dtype: torch.dtype,
) -> list[Work]:
    """Forward, backward and min_max of 8-bit encodings."""
    grid = (-128, 127)

    def forward(x: Tensor) -> Callable[[], object]:
        scale = torch.full(tuple(encoding), 0.03, device=x.device)
        offset = torch.zeros_like(scale)
        return lambda: ops.quantize_dequantize(x, scale, offset, *grid, 0.0, block)

    def backward(x: Tensor) -> Callable[[], object]:
        low = torch.full(tuple(encoding), -3.8, device=x.device)
        high, grad = -low, torch.randn_like(x)
        plain = (*grid, True, 0.0, block, [True] * 3)
        return lambda: ops.quantize_dequantize_range_backward(grad, x, low, high, *plain)

    def min_max(x: Tensor) -> Callable[[], object]:
        return lambda: ops.min_max(x, encoding, block)

    remote = aimet(shape, encoding, block, dtype)
    return [
        work(f"forward, {name}", shape, dtype, passes=2, build=forward, remote=remote),
        work(f"backward, {name}", shape, dtype, passes=3, build=backward),
        work(f"min_max, {name}", shape, dtype, passes=1, build=min_max),
    ]


def works(small: bool) -> list[Work]:
    """Every granularity in every dtype that models are run in."""
    large, matrix, activation = LARGE, MATRIX, ACTIVATION
    if small:
        large, matrix, activation = (1 << 12,), (64, 64), (2, 8, 8, 8)
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found += of_granularity("per-tensor", large, (), None, dtype)
        found += of_granularity("per-channel", matrix, (matrix[0], 1), None, dtype)
        found += of_granularity("per-channel of the last axis", matrix, (matrix[1],), None, dtype)
        blocks = (matrix[0], matrix[1] // 64)
        found += of_granularity("blocks of 64", matrix, blocks, [1, 64], dtype)
        channels = (activation[1], 1, 1)
        found += of_granularity("per-channel of activations", activation, channels, None, dtype)
        found += of_floats("fp8 e4m3, per-channel", matrix, matrix[1], (4, 3, True), dtype)
        found += of_floats("fp4 e2m1, blocks of 32", matrix, 32, (2, 1, True), dtype)
    return found + of_techniques(matrix, torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.cuda", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it still run?")
    parser.add_argument("--no-aimet", action="store_true", help="leave AIMET out")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.cuda: no CUDA device on this machine; nothing was measured")
        return 0 if options.smoke else 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"rimet: {rimet.backend_info()['cuda']}")
    size = Size(toy=options.smoke, turns=2 if options.smoke else options.turns)
    python = None if options.no_aimet or options.smoke else find_python()
    print("AIMET:", "left out" if python is None else "in a process of its own, taking turns")
    print(f"\n{'':70}{'GB/s':>8}{'of copy':>9}{'':>5}{'AIMET takes':>13}")
    missed = 0
    with ExitStack() as stack:
        peer = stack.enter_context(AimetPeer(python, torch.get_num_threads())) if python else None
        for one in works(options.smoke):
            timings = measure(one.row, size, peer)
            seconds = timings["rimet"].median / CALLS
            speed = one.bytes / seconds
            fraction = speed / (one.copy_bytes * CALLS / timings["copy"].median)
            missed += fraction < GOAL
            other = timings.get("AIMET")
            ratio = f"{other.median / timings['rimet'].median:.1f}x" if other else "-"
            met = "yes" if fraction >= GOAL else "NO"
            print(
                f"{one.row.label:70}{speed / 1e9:8.0f}{fraction:9.0%}{met:>5}{ratio:>13}",
                flush=True,
            )
    print(f"\n{missed} rows below {GOAL:.0%} of a copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
