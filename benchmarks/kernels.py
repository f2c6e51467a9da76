"""The ops on the CPU: size, granularity, dtype, place in a model, growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Contestant, Reach, Remote, Row, Size, Timed

SECTION = "kernels"
ops = torch.ops.rimet

#: A block of ResNet-50's activations: 6.4 million elements, 25.7 MB in float32.
ACTIVATION = (32, 64, 56, 56)
MATRIX = (4096, 4096)


def normal(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def grid(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def quiet(call: Callable[[], object]) -> Callable[[], object]:
    """The call under no_grad; entering it is part of what is timed, for everybody."""

    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def written(shape: Sequence[int]) -> str:
    """As in a table: 4096x4096; a plain number for a vector."""
    return "x".join(map(str, shape))


def ste_round(x: Tensor) -> Tensor:
    """Straight-through rounding as people compose it."""
    return x + (x.round() - x).detach()


def split(
    x: Tensor, encoding: Sequence[int], block: Sequence[int] | None
) -> tuple[Tensor, list[int]]:
    """View of ``x`` with blocks as dimensions of their own, and the encoding's shape against it."""
    if block is None:
        return x, list(encoding)
    shape = [
        size for count, length in zip(encoding, block, strict=True) for size in (count, length)
    ]
    return x.view(shape), [size for count in encoding for size in (count, 1)]


# ------------------------------------------------------------------------------------------ forward


def forward(
    label: str,
    shape: Sequence[int],
    encoding: Sequence[int],
    bits: int,
    symmetric: bool,
    block: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    reaches: Sequence[Reach] = (),
) -> Row:
    """``quantize_dequantize`` of a tensor without gradients."""
    x = normal(shape, dtype)
    qmin, qmax = grid(bits, symmetric)
    scale = torch.full(tuple(encoding), 8.0 / (qmax - qmin))
    offset = torch.full(tuple(encoding), 0.0 if symmetric else -float((qmax + 1) // 2))
    axes = [len(shape) - len(encoding) + i for i, count in enumerate(encoding) if count > 1]

    def rimet() -> Callable[[], object]:
        args = (x, scale, offset, qmin, qmax, 0.0, None if block is None else list(block))
        return quiet(lambda: ops.quantize_dequantize(*args))

    def torch_own() -> Callable[[], object]:
        zero_point = (-offset).to(torch.int32)
        if not axes:
            one = (scale.view(()), zero_point.view(()))
            return quiet(lambda: torch.fake_quantize_per_tensor_affine(x, *one, qmin, qmax))
        many = (scale.flatten(), zero_point.flatten(), axes[0])
        return quiet(lambda: torch.fake_quantize_per_channel_affine(x, *many, qmin, qmax))

    def eager() -> Callable[[], object]:
        view, against = split(x, encoding, block)
        s, o = scale.view(against).to(dtype), offset.view(against).to(dtype)

        def call() -> object:
            return ((torch.round(view / s) - o).clamp_(qmin, qmax) + o) * s

        return quiet(call)

    parameters: dict[str, object] = {
        "shape": list(shape),
        "encoding": list(encoding),
        "bits": bits,
        "symmetric": symmetric,
        "block": None if block is None else list(block),
        "dtype": str(dtype).removeprefix("torch."),
    }
    contestants: list[Contestant | Remote] = [
        Contestant("rimet", rimet),
        Contestant("clone", lambda: quiet(x.clone)),
        Contestant("eager", eager),
        Remote("AIMET", "qdq", parameters),
    ]
    if block is None:  # torch has no blockwise fake_quantize
        contestants.insert(2, Contestant("torch", torch_own))
    label = f"{label}, {written(shape)}"
    return Row(SECTION, label, x.numel(), contestants, reaches=reaches)


# ----------------------------------------------------------------------------- forward and backward


def training(
    label: str,
    shape: Sequence[int],
    encoding: Sequence[int],
    bits: int,
    symmetric: bool,
    block: Sequence[int] | None = None,
    reaches: Sequence[Reach] = (),
) -> Row:
    """Forward and backward with learned min and max; gradients to the input and to the range."""
    x = normal(shape).requires_grad_()
    grad = torch.ones_like(x)
    qmin, qmax = grid(bits, symmetric)
    low = torch.full(tuple(encoding), -4.0, requires_grad=True)
    high = torch.full(tuple(encoding), 4.0, requires_grad=True)
    axes = [len(shape) - len(encoding) + i for i, count in enumerate(encoding) if count > 1]

    def rimet() -> Callable[[], object]:
        args = (qmin, qmax, symmetric, 0.0, None if block is None else list(block))

        def call() -> object:
            y = ops.quantize_dequantize_range(x, low, high, *args)
            return torch.autograd.grad(y, (x, low, high), grad)

        return call

    def clone() -> Callable[[], object]:
        def call() -> object:
            return torch.autograd.grad(x.clone(), x, grad)

        return call

    def torch_own() -> Callable[[], object]:
        scale = torch.full((max(encoding, default=1),), 8.0 / (qmax - qmin), requires_grad=True)
        zero = torch.full_like(scale, -float(qmin), requires_grad=True)
        learnable: Callable[..., Tensor] = (
            torch._fake_quantize_learnable_per_channel_affine
            if axes
            else torch._fake_quantize_learnable_per_tensor_affine
        )
        place = (axes[0],) if axes else ()

        def call() -> object:
            y = learnable(x, scale, zero, *place, qmin, qmax, 1.0)
            return torch.autograd.grad(y, (x, scale, zero), grad)

        return call

    def eager() -> Callable[[], object]:
        def call() -> object:
            view, against = split(x, encoding, block)
            s = ((high - low) / (qmax - qmin)).view(against)
            o = torch.zeros(()) if symmetric else ste_round(low.view(against) / s) - qmin
            y = (torch.clamp(ste_round(view / s) - o, qmin, qmax) + o) * s
            return torch.autograd.grad(y, (x, low, high), grad.view(y.shape))

        return call

    parameters: dict[str, object] = {
        "shape": list(shape),
        "encoding": list(encoding),
        "bits": bits,
        "symmetric": symmetric,
        "block": None if block is None else list(block),
    }
    contestants: list[Contestant | Remote] = [
        Contestant("rimet", rimet),
        Contestant("clone", clone),
        Contestant("eager", eager),
        Remote("AIMET", "module", parameters),
    ]
    if block is None:
        contestants.insert(2, Contestant("torch", torch_own))
    label = f"{label}, {written(shape)}"
    return Row(SECTION, label, x.numel(), contestants, reaches=reaches)


# --------------------------------------------------------------------------------------- other rows


def one_way(size: Size) -> Iterator[Row]:
    """``quantize`` and ``dequantize`` on their own, and the min-max reduction."""
    shape = size.shape(ACTIVATION, (2, 4, 8, 8))
    x = normal(shape)
    scale, offset = torch.tensor(8 / 255), torch.tensor(0.0)
    clone = Contestant("clone", lambda: quiet(x.clone))

    def eager_quantize() -> Callable[[], object]:
        return quiet(lambda: (torch.round(x / scale) - offset).clamp_(-128, 127))

    yield Row(
        SECTION,
        f"quantize, per-tensor 8 bit, forward, {written(shape)}",
        x.numel(),
        [
            Contestant("rimet", lambda: quiet(lambda: ops.quantize(x, scale, offset, -128, 127))),
            clone,
            Contestant("eager", eager_quantize),
            Remote(
                "AIMET",
                "quantize",
                {"shape": list(shape), "encoding": [], "bits": 8, "symmetric": True},
            ),
        ],
    )
    yield Row(
        SECTION,
        f"dequantize, per-tensor, forward, {written(shape)}",
        x.numel(),
        [
            Contestant("rimet", lambda: quiet(lambda: ops.dequantize(x, scale, offset))),
            clone,
            Contestant("eager", lambda: quiet(lambda: (x + offset) * scale)),
            Remote("AIMET", "dequantize", {"shape": list(shape), "encoding": []}),
        ],
    )


def after_convolution(size: Size) -> Iterator[Row]:
    """QDQ in the place where it stands in a model: on the output of a convolution just computed."""
    channels = 32
    for side in (64, 112):
        side = size.pick(side, 8)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        x = normal((1, channels, side, side))
        scale, offset = torch.tensor(8 / 255), torch.tensor(-128.0)
        zero_point = torch.tensor(128, dtype=torch.int32)

        def placed(
            op: Callable[[Tensor], Tensor], conv: torch.nn.Conv2d = conv, x: Tensor = x
        ) -> Callable[[], Timed]:
            state: dict[str, Tensor] = {}

            def before() -> None:
                with torch.no_grad():
                    state["y"] = conv(x)

            return lambda: Timed(quiet(lambda: op(state["y"])), before)

        def qdq(y: Tensor, s: Tensor = scale, o: Tensor = offset) -> Tensor:
            out: Tensor = ops.quantize_dequantize(y, s, o, 0, 255)
            return out

        def fake(y: Tensor, s: Tensor = scale, z: Tensor = zero_point) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(y, s, z, 0, 255)

        elements = channels * side * side
        yield Row(
            SECTION,
            f"QDQ per-tensor 8 bit right after a Conv2d, {channels}x{side}x{side}",
            elements,
            [
                Contestant("rimet", placed(qdq)),
                Contestant("mul(2)", placed(lambda y: y.mul(2))),
                Contestant("torch", placed(fake)),
                Remote("AIMET", "after_conv", {"channels": channels, "side": side}),
            ],
            unit="mul(2)",
            reaches=[Reach("rimet", "mul(2)", 1.5)],
            more_turns=7,
        )


def quantizer_module(size: Size) -> Iterator[Row]:
    """A quantizer module with its learned range, as a model holds it."""
    from rimet.quantization.affine import QuantizeDequantize

    def build(shape: Sequence[int]) -> Callable[[], object]:
        quantizer = QuantizeDequantize((1,), 8, False)
        quantizer.set_range(-4.0, 4.0)
        x = normal(shape)
        return quiet(lambda: quantizer(x))

    def fake(shape: Sequence[int]) -> Callable[[], object]:
        x, scale = normal(shape), torch.tensor(8 / 255)
        zero_point = torch.tensor(128, dtype=torch.int32)
        return quiet(lambda: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255))

    for shape in ((64,), size.shape(ACTIVATION, (2, 4, 8, 8))):
        x = normal(shape)
        small = shape == (64,)
        yield Row(
            SECTION,
            f"quantizer module, per-tensor 8 bit, no_grad, {written(shape)}",
            x.numel(),
            [
                Contestant("rimet", partial(build, shape)),
                Contestant("clone", partial(quiet, x.clone)),
                Contestant("torch", partial(fake, shape)),
                Remote(
                    "AIMET",
                    "module",
                    {
                        "shape": list(shape),
                        "encoding": [1],
                        "bits": 8,
                        "symmetric": False,
                        "backward": False,
                    },
                ),
            ],
            unit="torch" if small else "clone",
            reaches=[Reach("rimet", "torch", 3.0)] if small else (),
        )


def grouped_block(size: Size) -> Iterator[Row]:
    """LPBQ with learned ranges: two-level scales of blocks of 64, forward and backward."""
    from rimet.quantization.affine import GroupedBlockQuantizeDequantize

    rows_, columns = size.shape(MATRIX, (16, 128))
    encoding = (rows_, columns // 64)
    x = normal((rows_, columns)).requires_grad_()
    grad = torch.ones_like(x)

    def rimet() -> Callable[[], object]:
        quantizer = GroupedBlockQuantizeDequantize(
            encoding, 4, True, 8, block_size=(1, 64), block_grouping=(1, -1)
        )
        quantizer.set_range(-4 * block_spread(encoding), 4 * block_spread(encoding))
        leaves = (x, quantizer.min, quantizer.max)
        return lambda: torch.autograd.grad(quantizer(x), leaves, grad)

    yield Row(
        SECTION,
        f"grouped-block (LPBQ) 64, 4 bit, forward + backward, {written(x.shape)}",
        x.numel(),
        [
            Contestant("rimet", rimet),
            Contestant("clone", lambda: lambda: torch.autograd.grad(x.clone(), x, grad)),
            Remote("AIMET", "grouped_block", {"shape": list(x.shape), "encoding": list(encoding)}),
        ],
        reaches=[Reach("rimet", "AIMET", 1 / 8)],
    )


def block_spread(encoding: Sequence[int]) -> Tensor:
    """Ranges that differ from block to block, as those of weights do."""
    return torch.linspace(0.2, 1.0, encoding[1]).expand(tuple(encoding)).contiguous()


def floating_point(size: Size) -> Iterator[Row]:
    """Quantizers to floating-point formats: per tensor, and in blocks."""
    from rimet.quantization.float import FloatQuantizeDequantize

    matrix = size.shape(MATRIX, (16, 128))
    x = normal(matrix).requires_grad_()
    grad = torch.ones_like(x)
    cases: list[tuple[str, dict[str, object]]] = [
        ("float8 e4m3fn per-tensor", {"exponent_bits": 4, "mantissa_bits": 3, "finite": True}),
        (
            "float4 e2m1 blocks of 32",
            {
                "exponent_bits": 2,
                "mantissa_bits": 1,
                "finite": True,
                "shape": [matrix[0], matrix[1] // 32],
                "block_size": [1, 32],
            },
        ),
    ]
    for label, options in cases:
        for backward in (False, True):

            def rimet(
                options: dict[str, Any] = options, backward: bool = backward
            ) -> Callable[[], object]:
                quantizer = FloatQuantizeDequantize(**options)
                quantizer.maxval.fill_(4.0)
                if not backward:
                    return quiet(lambda: quantizer(x))
                return lambda: torch.autograd.grad(quantizer(x), x, grad)

            def clone(backward: bool = backward) -> Callable[[], object]:
                if not backward:
                    return quiet(x.clone)
                return lambda: torch.autograd.grad(x.clone(), x, grad)

            yield Row(
                SECTION,
                f"{label}, forward{' + backward' if backward else ''}, {written(matrix)}",
                x.numel(),
                [
                    Contestant("rimet", rimet),
                    Contestant("clone", clone),
                    Remote(
                        "AIMET",
                        "float_quantizer",
                        {"shape": list(matrix), "options": options, "backward": backward},
                    ),
                ],
            )


def growth(size: Size) -> Iterator[Row]:
    """Cost against the number of elements: a straight line, or something is wrong."""
    elements = 1000
    while elements <= size.pick(size.largest, 1000):
        yield forward("QDQ per-tensor 8 bit, forward", (elements,), (), 8, False)
        elements *= 10


def rows(size: Size) -> Iterator[Row]:
    activation = size.shape(ACTIVATION, (2, 4, 8, 8))
    matrix = size.shape(MATRIX, (16, 128))
    channels, columns = matrix
    yield forward(
        "QDQ per-tensor 8 bit, forward",
        (64,),
        (),
        8,
        False,
        reaches=[Reach("rimet", "torch", 1.5)],
    )
    yield training("QDQ per-tensor 8 bit, forward + backward", (64,), (1,), 8, False)
    yield forward(
        "QDQ per-tensor 8 bit, forward",
        activation,
        (),
        8,
        False,
        reaches=[Reach("rimet", "clone", 1.3), Reach("rimet", "AIMET", 1 / 10)],
    )
    yield training(
        "QDQ per-tensor 8 bit, forward + backward, learned range",
        activation,
        (1,),
        8,
        False,
        reaches=[Reach("rimet", "AIMET", 1 / 12)],
    )
    yield forward(
        "QDQ per-channel 4 bit, forward",
        matrix,
        (channels, 1),
        4,
        True,
        reaches=[Reach("rimet", "clone", 1.5)],
    )
    yield training(
        "QDQ per-channel 4 bit, forward + backward",
        matrix,
        (channels, 1),
        4,
        True,
        reaches=[Reach("rimet", "AIMET", 1 / 8)],
    )
    yield forward("QDQ last axis 8 bit, forward", matrix, (columns,), 8, True)
    yield training("QDQ last axis 8 bit, forward + backward", matrix, (columns,), 8, True)
    blocks = (channels, columns // 64)
    yield forward("QDQ blockwise 64, 4 bit, forward", matrix, blocks, 4, True, (1, 64))
    yield training(
        "QDQ blockwise 64, 4 bit, forward + backward",
        matrix,
        blocks,
        4,
        True,
        (1, 64),
        reaches=[Reach("rimet", "AIMET", 1 / 8)],
    )
    yield from grouped_block(size)
    yield from floating_point(size)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        label = f"QDQ per-tensor 8 bit, forward, {str(dtype).removeprefix('torch.')}"
        yield forward(label, activation, (), 8, False, dtype=dtype)
    yield from one_way(size)
    yield from after_convolution(size)
    yield from quantizer_module(size)
    yield from growth(size)
