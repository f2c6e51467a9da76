"""Bounds of what integer arithmetic needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["get_conv_accum_bounds"]


def get_conv_accum_bounds(
    weights: npt.NDArray[np.floating], quant_bw: int, accum_bw: int
) -> tuple[bool, float]:
    """How much of an integer accumulator one layer can use up.

    Activations are taken to be unsigned integers of ``quant_bw`` bits, all at their largest where
    the weight is positive and zero elsewhere, or the other way round; weights to be on a symmetric
    grid of ``quant_bw`` bits over the whole tensor.

    Args:
        weights: weight with output channels first, (out, in, ...).
        quant_bw: bits of weights and activations.
        accum_bw: bits of the accumulator, sign included.

    Returns:
        Whether some output channel can leave the accumulator's range, and the largest part of the
        range that one can use (above 1: an overflow).
    """
    levels = 2**quant_bw - 1
    limit = 2.0 ** (accum_bw - 1)
    largest = float(np.abs(weights).max(initial=0.0))
    scale = 2 * largest / levels or 1e-5  # a weight of zeros has no scale
    steps = np.round(weights.reshape(len(weights), -1).astype(np.float64) / scale)
    highest = levels * np.maximum(steps, 0).sum(1)
    lowest = levels * np.minimum(steps, 0).sum(1)
    exceeded = bool((highest >= limit).any() or (lowest < -limit).any())
    return exceeded, float(np.maximum(highest, -lowest).max(initial=0.0) / limit)
