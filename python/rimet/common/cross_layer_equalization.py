"""What cross-layer equalization is told and tells, whatever the framework."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

__all__ = ["ClsLayerType", "ClsSetInfo", "ScaleFactor"]

ScaleFactor = np.ndarray | tuple[np.ndarray, ...]
"""Of a pair of layers ``[channels]``; of three layers two of them."""


class ClsLayerType(Enum):
    """What a layer can be in a set."""

    Unsupported = 0
    Conv = 1
    DepthwiseConv = 2


class ClsSetInfo:
    """What became of a set of layers: one pair, or two where a depthwise layer stands between.

    Attributes:
        cls_pair_info_list: the pairs, in order of execution.
    """

    class ClsSetLayerPairInfo:
        """Two consecutive layers.

        Attributes:
            layer1, layer2: the layers.
            scale_factor: ``[channels]``; the outputs of ``layer1`` were divided by it, the inputs
                of ``layer2`` multiplied.
            relu_activation_between_layers: whether an activation stands between.
        """

        def __init__(
            self,
            layer1: Any,
            layer2: Any,
            scale_factor: np.ndarray,
            relu_activation_between_layers: bool,
        ) -> None:
            self.layer1 = layer1
            self.layer2 = layer2
            self.scale_factor = scale_factor
            self.relu_activation_between_layers = relu_activation_between_layers

    def __init__(
        self,
        cls_pair_1: ClsSetInfo.ClsSetLayerPairInfo,
        cls_pair_2: ClsSetInfo.ClsSetLayerPairInfo | None = None,
    ) -> None:
        self.cls_pair_info_list = [cls_pair_1] if cls_pair_2 is None else [cls_pair_1, cls_pair_2]
