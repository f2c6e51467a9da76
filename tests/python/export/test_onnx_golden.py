"""ONNX exports beside AIMET's: the same tensors with the same encodings, and the same operators.

``tests/data/export/record.py`` recorded the files. What differs is listed below, with the reason; docs/differences.md
says the same in words.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import rimet.onnx
import torch
from rimet.common import quantsim
from rimet.nn.modules import custom
from rimet.quantsim import QuantizationSimModel

DATA = Path(__file__).parents[2] / "data"
sys.path += [str(DATA / "export"), str(DATA / "quantsim")]
from contents import ARGUMENTS, NAMES, entries, operators  # noqa: E402
from models import build  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

GOLDEN = json.loads((DATA / "export" / "onnx.json").read_text())

#: Tensors of AIMET alone. A constant divisor and the quotient: a multiple of a grid is one up to rounding only. The bias
#: of a GroupNorm, whose operators are several.
ONLY_AIMET = {
    "transformer": {"/scale/Constant_output_0", "/scale/Div_output_0", "val_26", "div"},
    "preact": {"gn.bias", "/gn/Unsqueeze_1_output_0"},
}
#: Other names: AIMET copies a tensor that is quantized for some of its uses only.
RENAMED = {
    "mlp": {"prelu.weight_dup_0": "prelu.weight"},
    "transformer": {"/Add_output_0_dup_0": "/Add_output_0", "add_dup_0": "add"},
}
#: Biases to which AIMET gives a grid over their own range, for want of their input's scale.
OTHER_BIAS = {
    "conv_bn_relu": {"fc.bias"},
    "transformer": {"norm1.bias", "norm2.bias", "norm3.bias"},
    "preact": {"bn1.bias"},
}


@pytest.fixture(scope="module", params=NAMES)
def simulated(request: pytest.FixtureRequest) -> tuple[str, QuantizationSimModel, Any]:
    name: str = request.param
    model, inputs = build(name, custom)
    sim = QuantizationSimModel(model, inputs, quantize_functional_ops=False)
    with torch.no_grad():
        sim.compute_encodings(lambda quantized: quantized(*inputs))
    return name, sim, inputs


def close(got: Any, want: Any) -> bool:
    """Equal, and numbers equal up to the order in which activations were added up."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(close(got[key], want[key]) for key in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(map(close, got, want))
    if isinstance(want, float):
        return math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-9)
    return bool(got == want)


def check(name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for section, expected in want.items():
        expected = {RENAMED.get(name, {}).get(key, key): e for key, e in expected.items()}
        for key in ONLY_AIMET.get(name, set()):
            expected.pop(key, None)
        assert got[section].keys() == expected.keys(), section
        for key, entry in expected.items():
            mine = (
                {**got[section][key]} if isinstance(got[section][key], dict) else got[section][key]
            )
            if isinstance(entry, dict):
                entry = {**entry, "name": key}
                if key in OTHER_BIAS.get(name, set()):
                    del entry["y_scale"], mine["y_scale"]
                # AIMET calls an asymmetric grid symmetric if its zero point is in the middle by chance.
                if key == "norm2.weight" and "is_sym" in entry:
                    del entry["is_sym"], mine["is_sym"]
            assert close(mine, entry), (section, key, mine, entry)


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_export(
    simulated: Any, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sim, inputs = simulated
    monkeypatch.setattr(quantsim, "encoding_version", version)
    sim.export(str(tmp_path), "model", inputs, onnx_export_args=ARGUMENTS)
    check(name, entries(tmp_path / "model.encodings"), GOLDEN[name][f"export {version}"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    names = [node.name for node in graph.node if node.op_type != "Constant"]
    # Nodes that AIMET's exporter has folded, and a shape that it counts as a branch of the module.
    ours = [n for n in names if n not in ("/gn/Unsqueeze", "/gn/Shape")]
    assert ours == [n for n in GOLDEN[name]["nodes"] if n != "gn#0-1"]


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_sim_onnx_export(simulated: Any, version: str, tmp_path: Path) -> None:
    name, sim, inputs = simulated
    path = tmp_path / "model.onnx"
    sim.onnx.export(inputs, path, encoding_version=version, dynamo=False, **ARGUMENTS)
    got = entries(path.with_suffix(".encodings"))
    want = GOLDEN[name][f"onnx.export {version}"]
    renamed = RENAMED.get(name, {})
    # Copies that both make.
    got = {
        s: {renamed.get(k, k): {**e, "name": renamed.get(k, k)} for k, e in v.items()}
        for s, v in got.items()
    }
    check(name, got, want)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_qdq(simulated: Any, exporter: str, tmp_path: Path) -> None:
    name, sim, inputs = simulated
    if exporter == "dynamo" and name not in ("conv_bn_relu", "transformer"):
        return  # two of them say it all, at two seconds each
    path = tmp_path / "model.onnx"
    is_dynamo = exporter == "dynamo"
    options: dict[str, Any] = {"verbose": False} if is_dynamo else {}
    rimet.onnx.export(sim, inputs, path, dynamo=is_dynamo, **ARGUMENTS, **options)
    got, want = operators(onnx.load(path)), GOLDEN[name][f"qdq {exporter}"]
    assert of_both(name, got) == of_both(name, want)


def of_both(name: str, content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Constants and operators under the names that both have, without what AIMET has alone."""
    text = json.dumps(content)
    for theirs, ours in RENAMED.get(name, {}).items():
        text = text.replace(theirs, ours)
    for only in ONLY_AIMET.get(name, set()):
        text = text.replace(f"{only}_qdq", only)
    content = json.loads(text)
    alone = {
        f"{tensor}{suffix}"
        for tensor in ONLY_AIMET.get(name, set())
        for suffix in ("_q", "_scale", "_zero_point")
    }
    # What the exporter folds if the bias is a constant.
    if name == "preact":
        alone |= {"onnx::Add_81"}
    constants = [
        json.dumps([key, value]) for key, value in content["constants"].items() if key not in alone
    ]
    nodes = []
    for op_type, inputs, outputs in content["nodes"]:
        if op_type == "Identity" and inputs == outputs:
            continue  # the copy
        if (
            alone & {*inputs, *outputs}
            or name == "preact"
            and "/gn/Unsqueeze_1_output_0" in [*inputs, *outputs]
        ):
            continue
        nodes.append(json.dumps([op_type, inputs, outputs]))
    return sorted(constants), sorted(nodes)
