"""Records ``cross_layer_equalization.json``: what AIMET makes of the chains of ``chains.py`` and of
models of torchvision.

Run with the Python of an environment that holds aimet-torch 2.42.0 and torchvision: ``python
tests/data/techniques/record_cross_layer_equalization.py``.
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.cross_layer_equalization import CrossLayerScaling, equalize_model
from chains import CHAINS, make_chain

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)


def describe(model: torch.nn.Module, infos: list[Any], places: int | None) -> list[Any]:
    """Per set and pair: both paths, the first factors, whether an activation stands between."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [
        [
            [
                paths[id(pair.layer1)],
                paths[id(pair.layer2)],
                pair.scale_factor[:places].tolist(),
                bool(pair.relu_activation_between_layers),
            ]
            for pair in info.cls_pair_info_list
        ]
        for info in infos
    ]


def main() -> None:
    chains: dict[str, Any] = {}
    for name in CHAINS:
        model, x = make_chain(name)
        sets = describe(model, CrossLayerScaling.scale_model(model, dummy_input=x), None)
        model, x = make_chain(name)
        equalize_model(model, dummy_input=x)
        biases = {
            path: parameter.tolist()
            for path, parameter in model.named_parameters()
            if path.endswith("bias")
        }
        chains[name] = {"sets": sets, "biases": biases}
    models = {}
    for name in ("mnasnet0_5", "resnet18"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.rand(1, 3, 64, 64)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.uniform_(-1, 1)
        fold_all_batch_norms(model, None, x)
        models[name] = describe(model, CrossLayerScaling.scale_model(model, dummy_input=x), 3)
    versions = {name: version(name) for name in ("aimet-torch", "torch", "torchvision")}
    record = {"recorded_with": versions, "chains": chains, "models": models}
    target = Path(__file__).with_name("cross_layer_equalization.json")
    target.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
