"""The engine's ops as a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rimet.quantization import _ops

__all__ = ["dequantize", "quantize", "quantize_dequantize"]


def quantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """``clamp(round(tensor / scale) - offset, qmin, qmax)``; ``torch.ops.rimet.quantize``.

    :raises RuntimeError: the grid goes beyond what the dtype of ``tensor`` holds
    """
    if tensor.dtype is torch.float16 and max(qmax, -qmin) > 65504:
        raise RuntimeError(f"quantize: {tensor.dtype} does not hold the grid [{qmin}, {qmax}]")
    return _ops.quantize(tensor, scale, offset, qmin, qmax, block_size)


def quantize_dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float = 0.0,
) -> torch.Tensor:
    """Nearest values on the grid; ``torch.ops.rimet.quantize_dequantize``."""
    return _ops.quantize_dequantize(tensor, scale, offset, qmin, qmax, zero_point_shift, block_size)


def dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """``(tensor + offset) * scale``; ``torch.ops.rimet.dequantize``."""
    return _ops.dequantize(tensor, scale, offset, block_size)
