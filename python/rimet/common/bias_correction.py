"""What bias correction is told, whatever the framework."""

from __future__ import annotations

from typing import Any

from rimet.common.defs import ActivationType

__all__ = ["ConvBnInfoType"]


class ConvBnInfoType:
    """The batch normalizations next to a layer.

    Attributes:
        input_bn: the normalization whose output, or whose activation's output, the layer takes.
        output_bn: the normalization that takes the layer's output.
        in_activation_type: what stands between ``input_bn`` and the layer.
        out_activation_type: what stands behind ``output_bn``.
    """

    def __init__(
        self,
        input_bn: Any = None,
        output_bn: Any = None,
        in_activation_type: ActivationType = ActivationType.no_activation,
        out_activation_type: ActivationType = ActivationType.no_activation,
    ) -> None:
        self.input_bn = input_bn
        self.output_bn = output_bn
        self.in_activation_type = in_activation_type
        self.out_activation_type = out_activation_type
