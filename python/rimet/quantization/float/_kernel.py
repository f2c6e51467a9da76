"""Arithmetic of floating-point grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rimet.quantization.float._format import TORCH_FORMATS

__all__ = ["_float_qdq", "_float_quantize", "_scale_like"]


def _scale_like(
    input: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None
) -> torch.Tensor:
    """The scale of each element, in a shape that broadcasts against ``input``.

    :raises RuntimeError: the shapes do not fit
    """
    if block_size is None:
        try:
            fits = torch.broadcast_shapes(input.shape, scale.shape) == input.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise RuntimeError(
                f"scale: expected a shape that broadcasts to {tuple(input.shape)}, got "
                f"{tuple(scale.shape)}"
            )
        return scale
    if len(block_size) != scale.dim() or input.dim() < scale.dim():
        raise RuntimeError(
            f"block_size: expected one entry per dimension of scale {tuple(scale.shape)} and an "
            "input of at least as "
            f"many dimensions, got {tuple(block_size)} and {tuple(input.shape)}"
        )
    lead = input.dim() - scale.dim()
    for axis, (size, count) in enumerate(zip(block_size, scale.shape, strict=True)):
        dim = input.shape[lead + axis]
        size = dim // count if size == -1 else size
        if size * count != dim:
            raise RuntimeError(
                f"input: expected size {size} * {count} = {size * count} in dimension "
                f"{lead + axis}, got {dim}"
            )
        scale = scale.repeat_interleave(size, axis) if size > 1 and count > 1 else scale
    return scale


# Where torch has the format as a dtype, its cast rounds the same way in one pass (by way of float32
# only: a float64 would be rounded twice). A format is known by its values, which no two
# of them share.
_TORCH_DTYPES = {
    (form.mantissa_bits, form.min_exponent, form.max, form.unsigned_zero): dtype
    for dtype, form in TORCH_FORMATS.items()
}


def _round_to_format(
    input: torch.Tensor,
    mantissa_bits: int,
    min_exponent: int,
    max_value: float,
    unsigned_zero: bool,
) -> torch.Tensor:
    """Nearest values of a format, half to even, saturating."""
    dtype = _TORCH_DTYPES.get((mantissa_bits, min_exponent, max_value, unsigned_zero))
    if dtype is not None and input.dtype is torch.float32:
        return input.clamp(-max_value, max_value).to(dtype).to(torch.float32)
    exponent = torch.frexp(input).exponent.sub_(1).clamp_(min=min_exponent).sub_(mantissa_bits)
    # Scaling by a power of two in two halves: a single one need not be representable.
    half = torch.div(exponent, 2, rounding_mode="floor")
    index = torch.round(torch.ldexp(torch.ldexp(input, -half), half - exponent))
    rounded = torch.ldexp(torch.ldexp(index, half), exponent - half)
    rounded = rounded.clamp(-max_value, max_value)
    # frexp says nothing of the exponent of infinities and NaN.
    rounded = torch.where(
        input.isinf(), torch.copysign(torch.full_like(input, max_value), input), rounded
    )
    rounded = torch.where(input.isnan(), input, rounded)
    return rounded + 0.0 if unsigned_zero else rounded


class _FloatGrid(torch.autograd.Function):
    """Rounding to a format with a scale; straight-through within the grid, saturated outside."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        scale: torch.Tensor,
        mantissa_bits: int,
        min_exponent: int,
        max_value: float,
        unsigned_zero: bool,
        dequantize: bool,
    ) -> torch.Tensor:
        compute = torch.promote_types(input.dtype, torch.float32)
        if min_exponent - mantissa_bits < -126 and max_value != torch.finfo(torch.bfloat16).max:
            compute = torch.float64
        wide_scale = scale.to(compute)
        value = _round_to_format(
            input.to(compute) / wide_scale, mantissa_bits, min_exponent, max_value, unsigned_zero
        )
        ctx.save_for_backward(input, scale, value)
        ctx.max_value = max_value
        ctx.dequantize = dequantize
        return (value * wide_scale if dequantize else value).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        input, scale, value = ctx.saved_tensors
        wide = grad.to(value.dtype)
        ratio = input.to(value.dtype) / scale.to(value.dtype)
        inside = ratio.abs() <= ctx.max_value
        grad_input = grad_scale = None
        if ctx.dequantize:
            if ctx.needs_input_grad[0]:
                grad_input = torch.where(inside, wide, 0).to(input.dtype)
            if ctx.needs_input_grad[1]:
                slope = torch.where(inside, value - ratio, value)
                grad_scale = (wide * slope).sum_to_size(scale.shape).to(scale.dtype)
        else:
            if ctx.needs_input_grad[0]:
                grad_input = torch.where(inside, wide / scale.to(value.dtype), 0).to(input.dtype)
            if ctx.needs_input_grad[1]:
                slope = torch.where(inside, -ratio / scale.to(value.dtype), 0)
                grad_scale = (wide * slope).sum_to_size(scale.shape).to(scale.dtype)
        return grad_input, grad_scale, None, None, None, None, None


def _float_qdq(
    input: torch.Tensor,
    scale: torch.Tensor,
    mantissa_bits: int,
    min_exponent: int,
    max_value: float,
    unsigned_zero: bool = False,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    r"""Nearest values on a scaled floating-point grid.

    .. math:: out = scale \cdot clamp\left(s \cdot round\left(\frac{input}{scale \cdot s}\right),
    -max, max\right), \quad
        s = 2^{\max(\lfloor \log_2 |input / scale| \rfloor, min\_exponent) - mantissa\_bits}

    Half to even, saturating (infinities too), NaN stays. Computed in float32 (float64 for float64
    input, and for formats whose finest step float32 has as a subnormal only). Gradient:
    straight-through for ``|input| <= max * scale``, else zero; that of the scale is ``out / scale -
    input / scale`` inside and ``out / scale`` outside.

    :param input: floating-point tensor
    :param scale: positive; broadcasts against ``input``, or has one entry per block
    :param mantissa_bits: explicit bits of the mantissa
    :param min_exponent: exponent of the smallest normal value
    :param max_value: largest value of the format
    :param unsigned_zero: results of -0.0 become 0.0
    :param block_size: elements per block, one entry per dimension of ``scale``; ``-1``: whatever
        divides
    :return: shape and dtype of ``input``
    :raises RuntimeError: the shapes do not fit
    """
    return _FloatGrid.apply(  # type: ignore[no-any-return]
        input,
        _scale_like(input, scale, block_size),
        mantissa_bits,
        min_exponent,
        max_value,
        unsigned_zero,
        True,
    )


def _float_quantize(
    input: torch.Tensor,
    scale: torch.Tensor,
    mantissa_bits: int,
    min_exponent: int,
    max_value: float,
    unsigned_zero: bool = False,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """:func:`_float_qdq` without the multiplication by the scale at the end."""
    return _FloatGrid.apply(  # type: ignore[no-any-return]
        input,
        _scale_like(input, scale, block_size),
        mantissa_bits,
        min_exponent,
        max_value,
        unsigned_zero,
        False,
    )
