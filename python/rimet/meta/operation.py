"""Operations of a torch model's graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rimet import _core
from rimet._graph import class_key
from rimet.common.connected_graph.connectedgraph_utils import CG_SPLIT
from rimet.common.connected_graph.operation import Op as _Op
from rimet.nn import BaseQuantizationMixin

__all__ = ["Op"]


class Op(_Op):
    """One operation of a torch model.

    Args:
        name: see :class:`rimet.common.connected_graph.operation.Op`.
        dotted_name: as above.
        output_shape: as above.
        is_anonymous: as above.
        op_type: as above.
        residing_module: the module whose forward calls it.
    """

    def __init__(
        self,
        name: str,
        dotted_name: str,
        output_shape: Sequence[int] | None,
        is_anonymous: bool,
        op_type: str,
        residing_module: nn.Module | None,
    ) -> None:
        super().__init__(name, dotted_name, output_shape, is_anonymous, op_type)
        self.residing_module = residing_module

    def is_grid_preserving_op(self) -> bool:
        """Whether it only moves values, so that what was on a grid stays on it."""
        module = self.get_module()
        if module is None:
            return self.type == CG_SPLIT or _core.function_moves_data(self.type)
        cls = type(module)
        if isinstance(module, BaseQuantizationMixin):
            cls = module.qcls_to_cls[cls]  # type: ignore[index]
        return _core.module_preserves_grid(class_key(cls))
