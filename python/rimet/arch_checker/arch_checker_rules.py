"""The checks that the architecture checker comes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rimet._graph.parameters import LAYERS, is_padded
from rimet.batch_norm_fold import find_standalone_batchnorm_ops
from rimet.common.connected_graph.operation import Op
from rimet.meta.connectedgraph import ConnectedGraph
from rimet.meta.connectedgraph_utils import ActivationTypes

__all__ = ["NODE_CHECK_DICT", "PATTERN_CHECK_LIST"]

_CHANNELS = 32
_CONVOLUTIONS = tuple(cls for cls in LAYERS if cls is not nn.Linear)


def _check_conv_channel_32_base(module: Any) -> bool:
    return module.in_channels % _CHANNELS == 0 and module.out_channels % _CHANNELS == 0


def _check_conv_channel_larger_than_32(module: Any) -> bool:
    return module.in_channels >= _CHANNELS and module.out_channels >= _CHANNELS


def _check_prelu(module: nn.Module) -> bool:
    return False


def _check_silu(module: nn.Module) -> bool:
    return False


def _check_batch_norm_fold(connected_graph: ConnectedGraph) -> list[Op]:
    standalone = find_standalone_batchnorm_ops(connected_graph)
    return [op for op in connected_graph.ordered_ops if op in standalone]


def _behind(op: Op) -> Op | None:
    """The operation that alone takes the output, or None."""
    following = op.output_ops
    return following[0] if len(following) == 1 else None


def _check_intermediate_padding(connected_graph: ConnectedGraph) -> list[Op]:
    failed: list[Op] = []
    passed = (*ActivationTypes, nn.modules.batchnorm._BatchNorm)
    for op in connected_graph.ordered_ops:
        if not isinstance(op.get_module(), _CONVOLUTIONS):
            continue
        following = _behind(op)
        while following is not None and isinstance(following.get_module(), passed):
            following = _behind(following)
        module = None if following is None else following.get_module()
        ordinary = not isinstance(module, nn.modules.conv._ConvTransposeNd)
        if following and isinstance(module, _CONVOLUTIONS) and ordinary and is_padded(module):
            failed.append(following)
    return failed


def _check_foldable_bn_with_split(connected_graph: ConnectedGraph) -> list[Op]:
    failed = []
    for op in connected_graph.ordered_ops:
        following = _behind(op)
        inputs = op.input_ops
        if (
            op.type == "Concat"
            and following is not None
            and isinstance(following.get_module(), nn.modules.batchnorm._BatchNorm)
            and inputs
            and all(isinstance(i.get_module(), _CONVOLUTIONS) for i in inputs)
        ):
            failed.append(following)
    return failed


NODE_CHECK_DICT: dict[type, list[Callable[[Any], bool]]] = {
    nn.Conv2d: [_check_conv_channel_32_base, _check_conv_channel_larger_than_32],
    nn.PReLU: [_check_prelu],
    nn.SiLU: [_check_silu],
}
"""Module class to the checks on its modules; True means passed."""

PATTERN_CHECK_LIST: list[Callable[[ConnectedGraph], Any]] = [
    _check_batch_norm_fold,
    _check_intermediate_padding,
    _check_foldable_bn_with_split,
]
"""Checks on the graph; each gives the operations that fail."""
