"""A quantized layer whose weight is rounded as learned variables say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rimet.common.defs import AdaroundConstants
from rimet.quantization.affine import AffineQuantizerBase

__all__ = ["AdaroundWrapper"]


class AdaroundWrapper(nn.Module):
    """Runs a quantized layer with soft-rounded weights, differentiable in :attr:`alpha`.

    Args:
        module: a quantized module whose weight quantizer is calibrated.

    Attributes:
        alpha: rounding variables, of the weight's shape; the soft rounding of the initial ones
            gives the weight itself.
        use_soft_rounding: False takes the level that each variable leans to.

    Raises:
        ValueError: a weight without a calibrated affine quantizer.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        quantizers = getattr(module, "param_quantizers", {})
        quantizer = quantizers["weight"] if "weight" in quantizers else None
        if not isinstance(quantizer, AffineQuantizerBase) or not quantizer.is_initialized():
            raise ValueError(
                "module: expected a quantized module with a calibrated affine quantizer of its "
                f"weight, got {type(module).__name__}"
            )
        self.module_to_wrap = module
        self.use_soft_rounding = True
        self._grid = (quantizer.qmin, quantizer.qmax)
        self._block_size = None if quantizer.block_size is None else list(quantizer.block_size)
        weight = module.weight.detach()
        scale, offset = quantizer.get_scale(), quantizer.get_offset()
        assert scale is not None and offset is not None
        self.register_buffer("_scale", scale.detach())
        self.register_buffer("_offset", offset.detach())
        ones = torch.ops.rimet.dequantize(
            torch.ones_like(weight), scale, torch.zeros_like(offset), self._block_size
        )
        position = weight / ones
        stretch = AdaroundConstants.ZETA - AdaroundConstants.GAMMA
        fraction = position - position.floor() - AdaroundConstants.GAMMA
        self.alpha = nn.Parameter(-torch.log(stretch / fraction - 1))

    @property
    def weight_name(self) -> str:
        """Name of the parameter that is rounded."""
        return "weight"

    @property
    def weight(self) -> Tensor:
        """The weight that is rounded."""
        weight: Tensor = self.module_to_wrap.weight
        return weight

    def apply_adaround(self, tensor: Tensor) -> Tensor:
        """The tensor, of the weight's shape, rounded as :attr:`alpha` says."""
        rounded: Tensor = torch.ops.rimet.adaround_quantize_dequantize(
            tensor,
            self.alpha,
            self._scale,
            self._offset,
            *self._grid,
            self.use_soft_rounding,
            self._block_size,
        )
        return rounded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with the rounded weight."""
        module = self.module_to_wrap
        rounded = self.apply_adaround(module.weight)
        with module._remove_param_quantizers("weight"):
            return torch.func.functional_call(module, {"weight": rounded}, args, kwargs)

    def get_original_module(self) -> nn.Module:
        """The layer without quantizers."""
        original: nn.Module = self.module_to_wrap.get_original_module()
        return original
