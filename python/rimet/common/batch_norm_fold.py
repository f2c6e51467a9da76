"""Batch-norm folding on arrays, whatever the framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rimet import _core
from rimet.common.bias_correction import ConvBnInfoType

__all__ = [
    "BN_OP_TYPES",
    "CONV_OP_TYPES",
    "LINEAR_OP_TYPES",
    "ConvBnInfoType",
    "batch_norm_fold",
]

#: Operator types of layers and of batch normalizations, in all the frameworks AIMET knew.
CONV_OP_TYPES = ["Conv1d", "Conv2D", "DepthwiseConv2dNative", "Conv", "ConvTranspose", "Conv3d"]
LINEAR_OP_TYPES = ["Dense", "Gemm", "MatMul"]
BN_OP_TYPES = ["FusedBatchNormV3", "FusedBatchNorm", "BatchNormalization", "BatchNorm3d"]

_Array = npt.NDArray[Any]


def batch_norm_fold(
    weight: _Array,
    bias: _Array,
    gamma: _Array,
    beta: _Array,
    mu: _Array,
    sigma: _Array,
    fold_backward: bool,
) -> tuple[_Array, _Array]:
    """Folds a batch normalization into a convolution; see :mod:`rimet.batch_norm_fold`.

    Args:
        weight: (out, in, height, width).
        bias: (out,).
        gamma: factor of the normalization per channel: of the layer's outputs if it is folded
            backward, else of its inputs.
        beta: its shift.
        mu: its running mean.
        sigma: the square root of its running variance (epsilon included).
        fold_backward: the normalization stands behind the convolution, not in front of it.

    Returns:
        The new weight and bias, in the dtype of ``weight``.

    Raises:
        ValueError: a weight of other than four dimensions, or a ``sigma`` of zero.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight: expected four dimensions, got shape {weight.shape}")
    if not np.all(sigma):
        raise ValueError("sigma: expected numbers other than zero")
    as_tensor = torch.from_numpy
    variance = as_tensor(np.square(sigma.astype(np.float64)))
    norm = (as_tensor(gamma), as_tensor(beta), as_tensor(mu), variance, 0.0)
    layer = (as_tensor(weight), as_tensor(bias), 1, False)
    direction = "backward" if fold_backward else "forward"
    folded, shifted = _core.fold_batch_norm(layer, norm, direction)
    return folded.numpy(), shifted.numpy()
