"""Affine quantization composed of torch's own operators.

Several passes over memory, but nothing outside of torch: for tools that do not know the engine's
ops, and as a second opinion on them. Gradients follow from the composition, with rounding as the
identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["dequantize", "quantize", "quantize_dequantize"]


def straight_through_round(input: torch.Tensor) -> torch.Tensor:
    """Rounding half to even whose gradient is that of the identity.

    Written with operators alone, so that a traced graph has the gradient too: adding
    ``input - input`` changes no finite value.
    """
    value = input.detach()
    rounded = torch.round(value)
    return torch.where(value.isinf(), rounded, rounded + (input - value))


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating-point tensor, got {tensor.dtype}")
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _blocks(
    tensor: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Shapes of ``tensor`` and ``scale`` under which the scale broadcasts, one dimension pair per
    blocked dimension.
    """
    if block_size is None:
        return list(tensor.shape), list(scale.shape)
    if len(block_size) != scale.dim() or tensor.dim() < scale.dim():
        raise RuntimeError(
            f"block_size: expected one entry per dimension of scale {tuple(scale.shape)} and a "
            "tensor of at least as "
            f"many dimensions, got {tuple(block_size)} and {tuple(tensor.shape)}"
        )
    lead = tensor.dim() - scale.dim()
    split, expanded = list(tensor.shape[:lead]), []
    for axis, (size, count) in enumerate(zip(block_size, scale.shape, strict=True)):
        dim = tensor.shape[lead + axis]
        size = dim // count if size == -1 else size
        if size * count != dim:
            raise RuntimeError(
                f"tensor: expected size {size} * {count} = {size * count} in dimension "
                f"{lead + axis}, got {dim}"
            )
        split += [count, size]
        expanded += [count, 1]
    return split, expanded


def quantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """``clamp(round(tensor / scale) - offset, qmin, qmax)``, in the dtype of ``tensor``."""
    dtype = _compute_dtype(tensor)
    split, expanded = _blocks(tensor, scale, block_size)
    scale, offset = scale.to(dtype).reshape(expanded), offset.to(dtype).reshape(expanded)
    index = (straight_through_round(tensor.to(dtype).reshape(split) / scale) - offset).clamp(
        qmin, qmax
    )
    return index.reshape(tensor.shape).to(tensor.dtype)


def quantize_dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    qmin: int,
    qmax: int,
    block_size: Sequence[int] | None = None,
    zero_point_shift: float = 0.0,
) -> torch.Tensor:
    """Nearest values on the grid, in the dtype of ``tensor``."""
    dtype = _compute_dtype(tensor)
    split, expanded = _blocks(tensor, scale, block_size)
    scale, offset = scale.to(dtype).reshape(expanded), offset.to(dtype).reshape(expanded)
    index = (
        straight_through_round(tensor.to(dtype).reshape(split) / scale - zero_point_shift) - offset
    )
    value = (index.clamp(qmin, qmax) + offset + zero_point_shift) * scale
    return value.reshape(tensor.shape).to(tensor.dtype)


def dequantize(
    tensor: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """``(tensor + offset) * scale``, in the dtype of ``tensor``."""
    dtype = _compute_dtype(tensor)
    split, expanded = _blocks(tensor, scale, block_size)
    scale, offset = scale.to(dtype).reshape(expanded), offset.to(dtype).reshape(expanded)
    value = (tensor.to(dtype).reshape(split) + offset) * scale
    return value.reshape(tensor.shape).to(tensor.dtype)
