"""Records ``golden.json``: placement and encodings of AIMET on the models of ``models.py``.

Run with the Python of an environment that holds aimet-torch 2.42.0: ``python
tests/data/quantsim/record_golden.py``.
"""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from aimet_torch.common.quantsim_config import utils
from aimet_torch.model_preparer import prepare_model
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.nn.modules import custom
from aimet_torch.quantsim import QuantizationSimModel
from models import MODELS, PREPARED, build, describe

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

CONFIGS = {
    "default": (None, 8, 8),
    "per_tensor_w4a16": (utils.get_path_for_per_tensor_config(), 16, 4),
    "htp_v73_w8a16": ("htp_v73", 16, 8),
    "htp_v69_w8a8": ("htp_v69", 8, 8),
    "enpu_v7_w4a8": ("enpu_v7", 8, 4),
}


def main() -> None:
    golden: dict[str, object] = {
        "recorded_with": {"aimet-torch": version("aimet-torch"), "torch": torch.__version__},
        "models": {},
        "prepared": {},
    }
    for name in MODELS:
        for config, (path, output_bw, param_bw) in CONFIGS.items():
            model, inputs = build(name, custom)
            dummy = inputs if len(inputs) > 1 else inputs[0]
            try:
                sim = QuantizationSimModel(
                    model,
                    dummy,
                    config_file=path,
                    default_output_bw=output_bw,
                    default_param_bw=param_bw,
                )
            except Exception as error:  # what AIMET cannot do is recorded, too
                print(name, config, "AIMET fails:", type(error).__name__, str(error)[:100])
                continue
            sim.compute_encodings(lambda m, inputs=inputs: m(*inputs))
            entry = describe(sim.model, lambda m: isinstance(m, BaseQuantizationMixin))
            golden["models"].setdefault(name, {})[config] = entry
    for name in PREPARED:
        model, inputs = build(name, custom)
        try:
            prepared = prepare_model(model)
            dummy = inputs if len(inputs) > 1 else inputs[0]
            sim = QuantizationSimModel(prepared, dummy)
        except Exception as error:  # what AIMET cannot do is recorded, too
            print(name, "prepared: AIMET fails:", type(error).__name__, str(error)[:100])
            continue
        sim.compute_encodings(lambda m, inputs=inputs: m(*inputs))
        entry = describe(sim.model, lambda m: isinstance(m, BaseQuantizationMixin))
        golden["prepared"][name] = entry
    target = Path(__file__).with_name("golden.json")
    target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
