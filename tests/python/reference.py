"""Slow, obvious reference for the ops of ``torch.ops.rimet``.

Every function spells its formula out with whole-tensor torch arithmetic and shares no code with
rimet, so that the two can only agree by both being right. `docs/numerics.md` states the same
formulas in prose.

Conventions
-----------
* ``offset`` is minus the ``zero_point`` of torch and ONNX.
* Everything is computed, and returned, in ``compute_dtype``: float64 by default (the exact answer,
  for comparisons within a tolerance), ``torch.float32`` to follow the kernels operation by
  operation (for bit-exact comparisons of float32 results; round the result to the input's dtype
  for float16 and bfloat16).
* The *encoding* (scale, offset, min, max) broadcasts against the input as in torch. With
  ``block_size``, one entry per encoding dimension, element ``j`` of a trailing input dimension
  belongs to block ``j // block``; ``-1`` stands for "input size over encoding size"; leading input
  dimensions broadcast.
* Sums over the elements that share an encoding are taken in float64, whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Block = Sequence[int] | None

_FLOAT32_EPS = 2.0**-23


# ----------------------------------------------------------------------------------------- geometry


def spread(encoding: Tensor, shape: Sequence[int], block_size: Block = None) -> Tensor:
    """Repeat ``encoding`` until it has one value per element of an input of shape ``shape``."""
    shape = tuple(shape)
    if not block_size:
        return encoding.expand(shape)
    rank = encoding.dim()
    if len(block_size) != rank or rank > len(shape):
        raise ValueError(
            f"block_size {tuple(block_size)} and {tuple(encoding.shape)} against {shape}"
        )
    trailing = shape[len(shape) - rank :]
    for dim, (size, count, block) in enumerate(
        zip(trailing, encoding.shape, block_size, strict=True)
    ):
        if block == -1:
            if size % count:
                raise ValueError(f"dimension {dim}: {count} blocks do not divide {size}")
            block = size // count
        if block * count != size:
            raise ValueError(f"dimension {dim}: {count} blocks of {block} do not make {size}")
        encoding = encoding.repeat_interleave(block, dim=dim)
    return encoding.expand(shape)


def owners(encoding_shape: Sequence[int], shape: Sequence[int], block_size: Block = None) -> Tensor:
    """Flat index, for each element of the input, of the encoding it belongs to."""
    numbers = torch.arange(torch.Size(encoding_shape).numel()).view(tuple(encoding_shape))
    return spread(numbers, shape, block_size)


def gather_sum(values: Tensor, encoding_shape: Sequence[int], block_size: Block = None) -> Tensor:
    """Sum ``values`` over the elements of each encoding; the adjoint of :func:`spread`."""
    owner = owners(encoding_shape, values.shape, block_size).reshape(-1)
    total = torch.zeros(torch.Size(encoding_shape).numel(), dtype=torch.float64)
    total.index_add_(0, owner, values.reshape(-1).double())
    return total.view(tuple(encoding_shape)).to(values.dtype)


def min_max(x: Tensor, shape: Sequence[int], block_size: Block = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each encoding's elements. NaN spreads, infinities count."""
    owner = owners(shape, x.shape, block_size).reshape(-1)
    flat = x.reshape(-1)
    groups = [flat[owner == index] for index in range(torch.Size(shape).numel())]
    low = torch.stack([group.min() for group in groups]).view(tuple(shape))
    high = torch.stack([group.max() for group in groups]).view(tuple(shape))
    return low, high


# ------------------------------------------------------------------------------------------ forward


def quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``clamp(round(x / scale) - offset, qmin, qmax)``, ties to even."""
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    return (torch.round(x / s) - o).clamp(qmin, qmax)


def dequantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``(x + offset) * scale``."""
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    return (x + o) * s


def quantize_dequantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    zero_point_shift: float = 0.0,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``(clamp(round(x / scale - shift) - offset, qmin, qmax) + offset + shift) * scale``."""
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    q = (torch.round(x / s - zero_point_shift) - o).clamp(qmin, qmax)
    return (q + (o + zero_point_shift)) * s


def minimum_scale(qmin: int, qmax: int) -> float:
    """Smallest scale a range may yield: float32 epsilon, less on grids of over 83886 steps."""
    return min(_FLOAT32_EPS, 0.01 / (qmax - qmin))


def symmetric_offset(qmin: int, qmax: int) -> int:
    """Offset that puts zero in the middle of the grid; Python's ``round`` sends halves to even."""
    return -round((qmin + qmax) / 2)


def range_to_scale_offset(
    min: Tensor,
    max: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``scale = |max - min| / N``, bounded from below; ``offset`` from ``min``, or the middle."""
    low, high = min.detach().to(compute_dtype), max.detach().to(compute_dtype)
    scale = ((high - low) / (qmax - qmin)).abs().clamp_min(minimum_scale(qmin, qmax))
    if symmetric:
        return scale, torch.full_like(scale, symmetric_offset(qmin, qmax))
    return scale, (torch.round(low / scale) - qmin).clamp(-qmax, -qmin)


def quantize_dequantize_range(
    x: Tensor,
    min: Tensor,
    max: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    zero_point_shift: float = 0.0,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """:func:`quantize_dequantize` with the scale and offset of a range."""
    scale, offset = range_to_scale_offset(min, max, qmin, qmax, symmetric, compute_dtype)
    return quantize_dequantize(
        x, scale, offset, qmin, qmax, zero_point_shift, block_size, compute_dtype
    )


# ----------------------------------------------------------------------- straight-through gradients


def quantize_grad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounding counts as identity; elements off the grid pass nothing on."""
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    g = grad.detach().to(compute_dtype)
    level = torch.round(x / s) - o
    inside = (level >= qmin) & (level <= qmax)
    zero = torch.zeros_like(g)
    gx = torch.where(inside, g / s, zero)
    gs = torch.where(inside, -(g / s) * (x / s), zero)
    go = torch.where(inside, -g, zero)
    return gx, _sum(gs, scale, block_size), _sum(go, offset, block_size)


def dequantize_grad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The product rule; nothing is rounded here."""
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    g = grad.detach().to(compute_dtype)
    gx = g * s
    return gx, _sum(g * (x + o), scale, block_size), _sum(gx, offset, block_size)


def quantize_dequantize_grad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    zero_point_shift: float = 0.0,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """On the grid ``(g, g * rounding error, 0)``; off it ``(0, g * clamped level, g * scale)``.

    With ``zero_point_shift`` the clamped level leaves the shift out, as AIMET does.
    """
    x, s, o = _aligned(x, scale, offset, block_size, compute_dtype)
    g = grad.detach().to(compute_dtype)
    ratio = x / s - zero_point_shift
    rounded = torch.round(ratio)
    level = rounded - o
    inside = (level >= qmin) & (level <= qmax)
    clamped = torch.minimum(torch.maximum(rounded, o + qmin), o + qmax)
    zero = torch.zeros_like(g)
    gx = torch.where(inside, g, zero)
    gs = g * torch.where(inside, rounded - ratio, clamped)
    go = torch.where(inside, zero, g * s)
    return gx, _sum(gs, scale, block_size), _sum(go, offset, block_size)


def range_to_scale_offset_grad(
    grad_scale: Tensor,
    grad_offset: Tensor,
    min: Tensor,
    max: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Chain rule through ``|max - min| / N``, the scale's bound and the rounded, clamped offset.

    A bound passes the gradient where its argument is on or above it; ``|0|`` passes none.
    """
    low, high = min.detach().to(compute_dtype), max.detach().to(compute_dtype)
    gs, go = grad_scale.detach().to(compute_dtype), grad_offset.detach().to(compute_dtype)
    signed = (high - low) / (qmax - qmin)
    bound = minimum_scale(qmin, qmax)
    scale = signed.abs().clamp_min(bound)
    through_low = torch.zeros_like(low)
    if not symmetric:
        free = torch.round(low / scale) - qmin
        go = torch.where((free >= -qmax) & (free <= -qmin), go, torch.zeros_like(go))
        through_low = go / scale
        gs = gs - go * low / scale / scale
    gs = torch.where(signed.abs() >= bound, gs * signed.sign(), torch.zeros_like(gs))
    gmax = gs / (qmax - qmin)
    return through_low - gmax, gmax


def quantize_dequantize_range_grad(
    grad: Tensor,
    x: Tensor,
    min: Tensor,
    max: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    zero_point_shift: float = 0.0,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the input, ``min`` and ``max``."""
    scale, offset = range_to_scale_offset(min, max, qmin, qmax, symmetric, compute_dtype)
    gx, gs, go = quantize_dequantize_grad(
        grad, x, scale, offset, qmin, qmax, zero_point_shift, block_size, compute_dtype
    )
    gmin, gmax = range_to_scale_offset_grad(gs, go, min, max, qmin, qmax, symmetric, compute_dtype)
    return gx, gmin, gmax


# ---------------------------------------------------------------------------------- floating point


def float_values(
    exponent_bits: int, mantissa_bits: int, finite: bool, unsigned_zero: bool
) -> Tensor:
    """Non-negative values of a format of IEEE 754 or OCP in the order of their codes, code by code."""
    bias = 2 ** (exponent_bits - 1) - (0 if unsigned_zero else 1)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                values.append(2.0 ** (1 - bias) * fraction)
            elif finite or exponent < 2**exponent_bits - 1:
                values.append(2.0 ** (exponent - bias) * (1 + fraction))
    if finite and not unsigned_zero and 1 + exponent_bits + mantissa_bits >= 8:
        values.pop()  # the code of NaN
    return torch.tensor(values, dtype=torch.float64)


def _nearest(ratio: Tensor, values: Tensor) -> Tensor:
    """The nearest of ``values``, of two equally near ones that of the even code; saturating."""
    size = ratio.double().abs()
    above = torch.searchsorted(values, size.nan_to_num().contiguous()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    middle = (low + high) / 2  # exact: neighbours differ by one unit in the last place
    take_high = (size > middle) | ((size == middle) & (above % 2 == 0))
    nearest = torch.copysign(torch.where(take_high, high, low), ratio.double())
    return torch.where(ratio.isnan(), ratio.double(), nearest)


def float_quantize(
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The nearest value of the format to ``x / scale``."""
    x, s, _ = _aligned(x, scale, scale, block_size, compute_dtype)
    return _nearest(x / s, values).to(compute_dtype)


def float_quantize_dequantize(
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    block_size: Block = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """:func:`float_quantize` times the scale."""
    s = spread(scale.detach().to(compute_dtype), x.shape, block_size)
    return float_quantize(x, scale, values, block_size, compute_dtype) * s


def float_quantize_grad(
    grad: Tensor, x: Tensor, scale: Tensor, values: Tensor, block_size: Block = None
) -> tuple[Tensor, Tensor]:
    """``x / scale`` where that is within the largest value, constant outside."""
    x, s, _ = _aligned(x, scale, scale, block_size, torch.float64)
    g = torch.where((x / s).abs() <= values[-1], grad.detach().double(), 0.0)
    return g / s, _sum(-g * x / s / s, scale, block_size)


def float_quantize_dequantize_grad(
    grad: Tensor, x: Tensor, scale: Tensor, values: Tensor, block_size: Block = None
) -> tuple[Tensor, Tensor]:
    """Within the largest value ``(g, g * rounding error)``; outside ``(0, g * largest value)``."""
    x, s, _ = _aligned(x, scale, scale, block_size, torch.float64)
    g = grad.detach().double()
    nearest = _nearest(x / s, values)
    inside = (x / s).abs() <= values[-1]
    gs = g * torch.where(inside, nearest - x / s, nearest)
    return torch.where(inside, g, 0.0), _sum(gs, scale, block_size)


# ------------------------------------------------------------------------------------ grouped blocks


def grouped_block_scale(
    scale: Tensor, block_grouping: Sequence[int], levels: int
) -> tuple[Tensor, Tensor]:
    """Two-level scales, written with operators that autograd differentiates; rounding as identity."""
    groups = [1 if g == -1 else n // g for n, g in zip(scale.shape, block_grouping, strict=True)]
    owner = owners(groups, scale.shape, [-1] * scale.dim()) if groups else torch.tensor(0)
    largest = torch.stack(
        [scale[owner == group].amax() for group in range(torch.Size(groups).numel())]
    )
    group_scale = largest / levels
    ratio = scale / group_scale[owner]
    rounded = ratio + (ratio.round() - ratio).detach()
    return rounded.clamp(1, levels) * group_scale[owner], group_scale.view(groups)


# ------------------------------------------------------------------------------------------ helpers


def _aligned(
    x: Tensor, scale: Tensor, offset: Tensor, block_size: Block, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    s = spread(scale.detach().to(dtype), x.shape, block_size)
    o = spread(offset.detach().to(dtype), x.shape, block_size)
    return x.detach().to(dtype), s, o


def _sum(values: Tensor, encoding: Tensor, block_size: Block) -> Tensor:
    return gather_sum(values, encoding.shape, block_size)
