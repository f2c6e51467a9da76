"""What the golden file of ONNX exports keeps of a file: used by the recording script and by the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

#: Models of ``tests/data/quantsim/models.py``.
NAMES = ("conv_bn_relu", "mlp", "unet", "transformer", "preact")

ARGUMENTS = {"input_names": ["input"], "output_names": ["output"]}


def entries(path: Path) -> dict[str, Any]:
    """The encodings of a file, by section and tensor."""
    document = json.loads(path.read_text())
    sections: dict[str, Any] = {}
    for section in ("activation_encodings", "param_encodings", "encodings"):
        found = document.get(section)
        if isinstance(found, list):
            found = {entry["name"]: entry for entry in found}
        if found is not None:
            sections[section] = found
    return sections


def operators(model: onnx.ModelProto) -> dict[str, Any]:
    """Operators with their inputs and outputs, and constants with types and shapes."""
    nodes = [
        [node.op_type, list(node.input), list(node.output)]
        for node in model.graph.node
        if node.op_type != "Constant"
    ]
    constants = {
        tensor.name: [onnx.TensorProto.DataType.Name(tensor.data_type), list(tensor.dims)]
        for tensor in model.graph.initializer
    }
    return {"nodes": nodes, "constants": constants}
