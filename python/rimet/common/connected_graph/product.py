"""What flows between operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rimet.common.connected_graph.operation import Op

__all__ = ["Product"]


class Product:
    """A tensor: made by one operation, or given (model input, parameter, constant), and used by
    others.

    Args:
        name: name, unique in its graph.
        shape: shape in the recorded run, or None.
    """

    def __init__(self, name: str, shape: Sequence[int] | None) -> None:
        self.name = name
        self.shape = shape
        self.producer: Op | None = None
        self.is_model_input = False
        self.is_parm = False
        self.is_const = False
        self.parm_name: str | None = None
        self.impacts_groups = False
        self.impacts_in_channels = False
        self.impacts_out_channels = False
        self._consumers: list[Op] = []

    def __repr__(self) -> str:
        return self.name

    @property
    def consumers(self) -> list[Op]:
        """The operations that use it."""
        return self._consumers

    @property
    def numel(self) -> int | None:
        """Number of elements, if the shape is known."""
        if self.shape is None:
            return None
        count = 1
        for size in self.shape:
            count *= size
        return count

    def add_consumer(self, op: Op) -> None:
        """Adds an operation that uses it."""
        self._consumers.append(op)

    def set_consumers_to_null(self) -> None:
        """Forgets who uses it."""
        self._consumers = []

    def is_inter_module(self) -> bool:
        """Whether it stands between two operations."""
        return self.producer is not None and bool(self._consumers)
