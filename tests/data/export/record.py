"""Records what AIMET's ONNX exports of small models hold: run with the interpreter of the peers'
environment.

    .venv-peers/bin/python tests/data/export/record.py

Writes ``onnx.json``: for each model of MODELS, the encodings by tensor names that ``sim.export`` and
``sim.onnx.export`` write, and operators and constants of the QDQ model of ``onnx.export``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aimet_torch
import onnx
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.common import quantsim
from aimet_torch.nn.modules import custom

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "quantsim")]
from contents import ARGUMENTS, NAMES, entries, operators  # noqa: E402
from models import build  # noqa: E402


def main() -> None:
    packages = ("aimet-torch", "torch", "onnx", "onnxscript")
    recorded: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    for name in NAMES:
        model, inputs = build(name, custom)
        sim = QuantizationSimModel(model, inputs)
        with torch.no_grad():
            sim.compute_encodings(lambda quantized, inputs=inputs: quantized(*inputs))
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for number in ("0.6.1", "1.0.0"):
                quantsim.encoding_version = number
                sim.export(folder, "model", inputs, onnx_export_args=dict(ARGUMENTS))
                found[f"export {number}"] = entries(Path(folder, "model.encodings"))
            graph = onnx.load(Path(folder, "model.onnx"))
            found["nodes"] = [node.name for node in graph.graph.node if node.op_type != "Constant"]
            path = Path(folder, "tensors.onnx")
            for number in ("1.0.0", "2.0.0", "2.1.0"):
                sim.onnx.export(
                    inputs, str(path), encoding_version=number, dynamo=False, **ARGUMENTS
                )
                found[f"onnx.export {number}"] = entries(path.with_suffix(".encodings"))
            for exporter in ("torchscript", "dynamo"):
                aimet_torch.onnx.export(
                    sim, inputs, str(path), dynamo=exporter == "dynamo", **ARGUMENTS
                )
                found[f"qdq {exporter}"] = operators(onnx.load(path))
        recorded[name] = found
    (HERE / "onnx.json").write_text(json.dumps(recorded, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
