"""Operations of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rimet.common.connected_graph.product import Product

__all__ = [
    "Op",
    "OpInformation",
    "determine_preceding_op_input_product_index_in_multi_input_op",
    "determine_succeeding_op_output_product_index_in_multi_output_op",
]


class OpInformation:
    """What is known of an operation from its module."""

    def __init__(self) -> None:
        self.model_module: Any = None
        self.groups: int | None = None
        self.num_in_channels: int | None = None
        self.num_out_channels: int | None = None


class Op(OpInformation):
    """One operation.

    Args:
        name: name, unique in its graph: the type and a number.
        dotted_name: path of the module, with the model's class name in front; the name for a
            function.
        output_shape: shape of the (first) output in the recorded run.
        is_anonymous: whether it has no name of its own.
        op_type: ONNX-style type, or the name of the function.
    """

    def __init__(
        self,
        name: str,
        dotted_name: str,
        output_shape: Sequence[int] | None,
        is_anonymous: bool,
        op_type: str,
    ) -> None:
        super().__init__()
        self.name = self.name_op = name
        self.dotted_name = self.dotted_name_op = dotted_name
        self.output_shape = output_shape
        self.is_anonymous = is_anonymous
        self.type = op_type
        self.inputs: list[Product] = []
        self.outputs: list[Product] = []

    def __repr__(self) -> str:
        return self.name

    @property
    def output(self) -> Product | None:
        """The first output."""
        return self.outputs[0] if self.outputs else None

    @output.setter
    def output(self, product: Product) -> None:
        self.outputs[:1] = [product]

    @property
    def input_ops(self) -> list[Op]:
        """The operations that make its inputs."""
        return [product.producer for product in self.inputs if product.producer is not None]

    @property
    def output_ops(self) -> list[Op]:
        """The operations that use its outputs."""
        return [consumer for product in self.outputs for consumer in product.consumers]

    def add_input(self, product: Product) -> None:
        """Adds an input."""
        self.inputs.append(product)

    def get_input_products(self) -> list[Product]:
        """Inputs that another operation makes."""
        return [product for product in self.inputs if product.is_inter_module()]

    def get_module(self) -> Any:
        """Its module, or None for a function."""
        return self.model_module


def determine_preceding_op_input_product_index_in_multi_input_op(
    preceding_op: Op, multi_input_op: Op
) -> int | None:
    """At which input of ``multi_input_op`` the output of ``preceding_op`` arrives, or None."""
    for index, product in enumerate(multi_input_op.inputs):
        if product.producer is preceding_op:
            return index
    return None


def determine_succeeding_op_output_product_index_in_multi_output_op(
    succeeding_op: Op, multi_output_op: Op
) -> int | None:
    """Which output of ``multi_output_op`` goes to ``succeeding_op``, or None."""
    for index, product in enumerate(multi_output_op.outputs):
        if succeeding_op in product.consumers:
            return index
    return None
