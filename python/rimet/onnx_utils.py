"""Settings of the ONNX export, and the names of nodes and tensors in exported graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["OnnxExportApiArgs"]


@dataclass
class OnnxExportApiArgs:
    """Arguments of ``torch.onnx.export``.

    Args:
        opset_version: opset of the standard operators; None: the exporter's default.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
    """

    opset_version: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by their names."""
        return {
            "opset_version": self.opset_version,
            "input_names": self.input_names,
            "output_names": self.output_names,
        }


def _export_kwargs(
    onnx_export_args: OnnxExportApiArgs | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments of an export as a dict of its own.

    Raises:
        RuntimeError: neither :class:`OnnxExportApiArgs` nor a mapping.
    """
    if onnx_export_args is None:
        return {}
    if isinstance(onnx_export_args, OnnxExportApiArgs):
        return onnx_export_args.kwargs
    if isinstance(onnx_export_args, Mapping):
        return dict(onnx_export_args)
    raise RuntimeError(
        "onnx_export_args: expected OnnxExportApiArgs or a dict, got "
        f"{type(onnx_export_args).__name__}"
    )
