"""A graph of operations and products."""

from __future__ import annotations

from collections.abc import Iterable

from rimet.common.connected_graph.operation import Op
from rimet.common.connected_graph.product import Product

__all__ = ["ConnectedGraph", "get_ordered_ops"]


class ConnectedGraph:
    """Operations and products by name."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}
        self._products: dict[str, Product] = {}

    def get_all_ops(self) -> dict[str, Op]:
        """All operations by name, in the order in which they ran."""
        return self._ops

    def get_all_products(self) -> dict[str, Product]:
        """All products by name."""
        return self._products

    def get_op_from_module_name(self, name: str) -> Op | None:
        """The operation of a module."""
        return next((op for op in self._ops.values() if op.dotted_name == name), None)

    def get_product(self, name: str) -> Product | None:
        """A product by its name, or None."""
        return self._products.get(name)


def get_ordered_ops(
    list_of_starting_ops: Iterable[Op], restrict_to: Iterable[Op] | None = None
) -> list[Op]:
    """The operations that are reached from some, each after all of its reached producers.

    Args:
        list_of_starting_ops: where to start.
        restrict_to: if given, only these are visited.
    """
    allowed = None if restrict_to is None else set(restrict_to)
    finished: dict[Op, None] = {}
    opened: set[Op] = set()
    # Depth first; an operation is finished when all that follow it are, so the reversed order is a
    # valid one.
    stack: list[tuple[Op, bool]] = [(op, False) for op in list_of_starting_ops]
    while stack:
        op, leaving = stack.pop()
        if leaving:
            finished[op] = None
        elif op not in opened and (allowed is None or op in allowed):
            opened.add(op)
            stack.append((op, True))
            stack.extend(
                (following, False) for following in op.output_ops if following not in opened
            )
    return list(reversed(finished))
