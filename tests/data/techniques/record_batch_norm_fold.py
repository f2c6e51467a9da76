"""Records ``batch_norm_fold.json``: the pairs that AIMET folds in models of torchvision.

Run with the Python of an environment that holds aimet-torch 2.42.0 and torchvision: ``python
tests/data/techniques/record_batch_norm_fold.py``.
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from aimet_torch.batch_norm_fold import fold_all_batch_norms

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

MODELS = [
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "resnet18",
    "shufflenet_v2_x0_5",
]


def main() -> None:
    versions = {name: version(name) for name in ("aimet-torch", "torch", "torchvision")}
    golden: dict[str, list[list[str]]] = {}
    for name in MODELS:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        paths = {id(module): path for path, module in model.named_modules()}
        pairs = fold_all_batch_norms(model, (1, 3, 64, 64))
        golden[name] = [[paths[id(layer)], paths[id(norm)]] for layer, norm in pairs]
    target = Path(__file__).with_name("batch_norm_fold.json")
    record = {"recorded_with": versions, "models": golden}
    target.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
