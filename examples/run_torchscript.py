"""Run an exported TorchScript file without the model's source and without rimet's Python package.

    python run_torchscript.py MODEL.torchscript.pth IO.safetensors OPS_LIBRARY

Loads the ops library (`rimet.ops_library_path()` names it), runs the model on the tensor `input`
and compares with the tensor `logits`. Exit status 0: they agree bit for bit.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file


def main() -> int:
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    script_path, tensors_path, library_path = sys.argv[1:]
    torch.ops.load_library(library_path)
    tensors = load_file(tensors_path)
    model = torch.jit.load(script_path)
    with torch.no_grad():
        logits = model(tensors["input"])
    if "rimet" in sys.modules:
        print("the Python package was imported; this process should run without it")
        return 1
    expected = tensors["logits"]
    if torch.equal(logits, expected):
        print(f"{len(logits)} x {logits.shape[1]} logits agree bit for bit")
        return 0
    if logits.shape != expected.shape:
        print(f"logits differ: shape {tuple(logits.shape)}, expected {tuple(expected.shape)}")
        return 1
    difference = (logits - expected).abs().max().item()
    count = int((logits != expected).sum())
    print(f"logits differ: {count} of {logits.numel()}, by up to {difference:.3g}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
