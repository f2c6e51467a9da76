"""The process that times AIMET. Runs under an environment with aimet-torch; see ``peer.py``.

Speaks JSON lines: ``hello``, ``build`` (work and parameters to a handle), ``sample`` (seconds of
one call), ``release``. A new piece of work is a function in ``WORKS`` that takes the row's
parameters and returns the call to time.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Whatever AIMET prints must not get between the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import ptq_models  # noqa: E402  (beside this file)
import torch  # noqa: E402
import torchvision  # noqa: E402
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from aimet_torch.batch_norm_fold import fold_all_batch_norms  # noqa: E402
from aimet_torch.cross_layer_equalization import equalize_model  # noqa: E402
from aimet_torch.quantization import affine, encoding_analyzer  # noqa: E402
from aimet_torch.quantization.float import FloatQuantizeDequantize  # noqa: E402
from aimet_torch.quantsim import QuantizationSimModel  # noqa: E402
from aimet_torch.quantsim.config_utils import (  # noqa: E402
    set_grouped_blockwise_quantization_for_weights,
)
from aimet_torch.seq_mse import apply_seq_mse  # noqa: E402
from torch import Tensor  # noqa: E402

Call = Callable[[], object]
#: Runs untimed before each timed call, and the timed call.
Pair = tuple[Call, Call]
#: The same, and what runs untimed after it.
Triple = tuple[Call, Call, Call]


def _normal(shape: list[int], dtype: str = "float32") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def _grid(bits: int, symmetric: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def qdq(
    shape: list[int],
    encoding: list[int],
    bits: int,
    symmetric: bool,
    block: list[int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    calls: int = 1,
) -> Call:
    """The function ``quantize_dequantize`` without gradients, ``calls`` times."""
    x = _normal(shape, dtype).to(device)
    qmin, qmax = _grid(bits, symmetric)
    scale = torch.full(encoding, 8.0 / (qmax - qmin), device=device)
    offset = torch.full(encoding, 0.0 if symmetric else -float((qmax + 1) // 2), device=device)

    def call() -> Tensor:
        with torch.no_grad():
            for _ in range(calls):
                y = affine.quantize_dequantize(
                    x, scale, offset, qmin=qmin, qmax=qmax, block_size=block
                )
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return call


def module(
    shape: list[int],
    encoding: list[int],
    bits: int,
    symmetric: bool,
    block: list[int] | None = None,
    backward: bool = True,
) -> Call:
    """A quantizer module with learned range: forward under no_grad, or forward and backward."""
    x = _normal(shape).requires_grad_(backward)
    quantizer = affine.QuantizeDequantize(
        tuple(encoding), bits, symmetric, block_size=tuple(block) if block else None
    )
    quantizer.set_range(torch.full(encoding, -4.0), torch.full(encoding, 4.0))
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return quantizer(x)

        return forward
    grad = torch.ones_like(x)
    leaves = (x, quantizer.min, quantizer.max)
    return lambda: torch.autograd.grad(quantizer(x), leaves, grad)


def grouped_block(shape: list[int], encoding: list[int]) -> Call:
    """LPBQ with learned ranges, forward and backward."""
    x = _normal(shape).requires_grad_()
    quantizer = affine.GroupedBlockQuantizeDequantize(
        tuple(encoding), 4, True, 8, block_size=(1, shape[1] // encoding[1]), block_grouping=(1, -1)
    )
    spread = 4 * torch.linspace(0.2, 1.0, encoding[1]).expand(encoding).contiguous()
    quantizer.set_range(-spread, spread)
    grad = torch.ones_like(x)
    leaves = (x, quantizer.min, quantizer.max)
    return lambda: torch.autograd.grad(quantizer(x), leaves, grad)


def float_quantizer(shape: list[int], options: dict[str, Any], backward: bool) -> Call:
    """A quantizer to a floating-point format; gradients to the input."""
    x = _normal(shape).requires_grad_(backward)
    quantizer = FloatQuantizeDequantize(**options)
    quantizer.maxval.fill_(4.0)
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return quantizer(x)

        return forward
    grad = torch.ones_like(x)
    # AIMET's composition for formats that are no dtype of torch passes no gradient to the input.
    return lambda: torch.autograd.grad(quantizer(x), x, grad, allow_unused=True)


def quantize(shape: list[int], encoding: list[int], bits: int, symmetric: bool) -> Call:
    x = _normal(shape)
    qmin, qmax = _grid(bits, symmetric)
    scale, offset = torch.full(encoding, 8.0 / (qmax - qmin)), torch.zeros(encoding)

    def call() -> Tensor:
        with torch.no_grad():
            return affine.quantize(x, scale, offset, qmin=qmin, qmax=qmax)

    return call


def dequantize(shape: list[int], encoding: list[int]) -> Call:
    x = _normal(shape)
    scale, offset = torch.full(encoding, 0.03), torch.zeros(encoding)

    def call() -> Tensor:
        with torch.no_grad():
            return affine.dequantize(x, scale, offset)

    return call


def after_conv(channels: int, side: int) -> Pair:
    """QDQ of a convolution's output, right after it."""
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
    x = _normal([1, channels, side, side])
    scale, offset = torch.tensor(8 / 255), torch.tensor(-128.0)
    state: dict[str, Tensor] = {}

    def before() -> None:
        with torch.no_grad():
            state["y"] = conv(x)

    def call() -> Tensor:
        with torch.no_grad():
            return affine.quantize_dequantize(state["y"], scale, offset, qmin=0, qmax=255)

    return before, call


def nothing() -> None:
    pass


def analyzer(
    kind: str, shape: list[int], encoding: list[int], bits: int, symmetric: bool, encodings: bool
) -> Call:
    """Statistics of one batch, and the encodings from them if asked for."""
    x = _normal(shape)
    make = getattr(encoding_analyzer, f"{kind}EncodingAnalyzer")

    def call() -> object:
        one = make(tuple(encoding))
        one.update_stats(x)
        return one.compute_encodings(2**bits - 1, symmetric) if encodings else one

    return call


def _model(model: str, shape: list[int]) -> tuple[torch.nn.Module, Tensor]:
    return getattr(torchvision.models, model)(weights=None).eval(), torch.randn(shape)


def _simulate(model: torch.nn.Module, x: Tensor) -> Any:
    return QuantizationSimModel(model, x, default_param_bw=4, default_output_bw=8)


def change(model: str, shape: list[int], name: str) -> Pair:
    """Folding, equalizing, or making the simulation, on a fresh copy of a model."""
    original, x = _model(model, shape)
    changes: dict[str, Callable[[torch.nn.Module], object]] = {
        "fold": lambda m: fold_all_batch_norms(m, tuple(shape), dummy_input=x),
        "equalize": lambda m: equalize_model(m, tuple(shape), dummy_input=x),
        "simulate": lambda m: _simulate(m, x),
    }
    fresh: list[torch.nn.Module] = []

    def before() -> None:
        fresh[:] = [copy.deepcopy(original)]

    return before, lambda: changes[name](fresh[0])


def simulated_forward(model: str, shape: list[int]) -> Call:
    """A W4A8 simulation of a folded model, under no_grad."""
    network, x = _model(model, shape)
    fold_all_batch_norms(network, tuple(shape), dummy_input=x)
    sim = _simulate(network, x)
    sim.compute_encodings(lambda m, _: m(x), None)

    def call() -> object:
        with torch.no_grad():
            return sim.model(x)

    return call


def seq_mse(model: dict[str, Any], candidates: int, lpbq_block: int | None, output: str) -> Triple:
    """Sequential MSE of 4-bit weights; the weights on their grids are saved in ``output``."""
    original, batches = ptq_models.build(**model)
    state: dict[str, Any] = {}

    def before() -> None:
        state["sim"] = sim = QuantizationSimModel(
            original, dummy_input=batches[0], default_param_bw=4
        )
        if lpbq_block is not None:
            set_grouped_blockwise_quantization_for_weights(
                sim, [torch.nn.Linear], 4, True, 8, lpbq_block
            )

    def call() -> None:
        apply_seq_mse(state["sim"], batches, candidates)

    def after() -> None:
        torch.save(ptq_models.quantized_weights(state["sim"].model), output)

    return before, call, after


def adaround(model: dict[str, Any], iterations: int, output: str) -> Triple:
    """AdaRound of 4-bit weights; the rounded weights are saved in ``output``."""
    original, batches = ptq_models.build(**model)
    state: dict[str, Any] = {}

    folder = Path(output).parent / "aimet"
    folder.mkdir(exist_ok=True)

    def call() -> None:
        params = AdaroundParameters(batches, len(batches), default_num_iterations=iterations)
        state["model"] = Adaround.apply_adaround(
            original, batches[0], params, str(folder), "rounded"
        )

    def after() -> None:
        # The weights come soft-rounded; on their grids they are what the documented next steps make.
        sim = QuantizationSimModel(state["model"], dummy_input=batches[0], default_param_bw=4)
        sim.set_and_freeze_param_encodings(str(folder / "rounded.encodings"))
        torch.save(ptq_models.quantized_weights(sim.model), output)

    return nothing, call, after


WORKS: dict[str, Callable[..., Call | Pair | Triple]] = {
    "qdq": qdq,
    "module": module,
    "grouped_block": grouped_block,
    "float_quantizer": float_quantizer,
    "quantize": quantize,
    "dequantize": dequantize,
    "after_conv": after_conv,
    "analyzer": analyzer,
    "change": change,
    "simulated_forward": simulated_forward,
    "seq_mse": seq_mse,
    "adaround": adaround,
}


def main() -> None:
    built: dict[int, tuple[Call | None, Call, Call]] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        what = request["do"]
        if what == "hello":
            torch.set_num_threads(request["threads"])
            gc.disable()
            return {"versions": {name: version(name) for name in ("aimet-torch", "torch")}}
        if what == "build":
            work = WORKS[request["work"]](**request["parameters"])
            handle = max(built, default=0) + 1
            before, run, after = (
                (*work, nothing)[:3] if isinstance(work, tuple) else (None, work, nothing)
            )
            built[handle] = before, run, after
            return {"handle": handle}
        if what == "release":
            del built[request["handle"]]
            gc.collect()
            return {}
        before, run, after = built[request["handle"]]
        inner = request["inner"]
        if before is not None:
            before()
            inner = 1
        start = time.perf_counter()
        for _ in range(inner):
            run()
        seconds = (time.perf_counter() - start) / inner
        after()
        return {"seconds": seconds}

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
