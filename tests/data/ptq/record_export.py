"""Records the encodings that AIMET exports for blockwise and LPBQ weights: run with the interpreter of
the peers' environment.

    .venv-peers/bin/python tests/data/ptq/record_export.py

Writes ``blockwise_export.json``: for each version of the format, the entries of the weights.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from aimet_torch import QuantizationSimModel
from aimet_torch.common import quantsim
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from blockwise_model import BLOCK_SIZE, make_model

HERE = Path(__file__).parent


def main() -> None:
    recorded = {"versions": {name: version(name) for name in ("aimet-torch", "torch")}}
    for number in ("0.6.1", "1.0.0", "2.0.0", "2.1.0"):
        quantsim.encoding_version = number
        model, x = make_model()
        sim = QuantizationSimModel(model, x)
        set_grouped_blockwise_quantization_for_weights(
            sim, [sim.model[0], sim.model[4]], 4, True, 8, BLOCK_SIZE
        )
        set_blockwise_quantization_for_weights(sim, [sim.model[5]], 4, True, BLOCK_SIZE)
        sim.compute_encodings(lambda quantized, x=x: quantized(x))
        with tempfile.TemporaryDirectory() as folder:
            if number == "0.6.1":  # of the files by module names, whatever the version
                sim.save_encodings_to_json(folder, "model")
                document = json.loads(Path(folder, "model.json").read_text())
                recorded[number] = document["param_encodings"]
                continue
            sim.onnx.export(x, f"{folder}/model.onnx", dynamo=False)
            document = json.loads(Path(folder, "model.encodings").read_text())
        entries = document.get("param_encodings") or document["encodings"]
        recorded[number] = {e["name"]: e for e in entries if e["name"].endswith(".weight")}
    text = json.dumps(recorded, indent=1) + "\n"
    (HERE / "blockwise_export.json").write_text(text)


if __name__ == "__main__":
    main()
