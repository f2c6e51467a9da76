"""Products of a torch model's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rimet.common.connected_graph.product import Product as _Product
from rimet.nn import BaseQuantizationMixin

if TYPE_CHECKING:
    from rimet.meta.operation import Op

__all__ = ["Product"]


class Product(_Product):
    """A tensor of a torch model's graph; ``constant_value`` is the number it stands for, if it is
    one.
    """

    def __init__(self, name: str, shape: Sequence[int] | None) -> None:
        super().__init__(name, shape)
        self.constant_value: Any = None

    def is_quantized(self) -> bool:
        """Whether a quantizer has seen it, so that its consumer needs none of its own.

        Parameters have their own quantizers. Model inputs and constants have not been quantized;
        what only moved them has not either. Everything that a quantized module or a computing
        function made has been.
        """
        if self.is_parm:
            return True
        producer: Op | None = self.producer  # type: ignore[assignment]
        if self.is_model_input or self.is_const or producer is None:
            return False
        if isinstance(producer.get_module(), BaseQuantizationMixin):
            return True
        if not producer.is_grid_preserving_op():
            return producer.get_module() is None
        source: Any = producer.inputs[0] if producer.inputs else None
        if source is None:
            return False
        if producer.get_module() is not None and (source.is_model_input or source.is_const):
            return True
        return bool(source.is_quantized())
