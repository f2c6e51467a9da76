"""Quantization-aware training, with checkpoints: W4A4 weights and activations on the digits.

    python examples/qat.py             # a minute
    python examples/qat.py --smoke     # seconds, for tests

The simulated model is an ordinary module: any optimizer trains it, its weights and the ranges of
its quantizers alike, and its state dict holds both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import rimet
import torch
from digits import DigitsNet, accuracy, load_digits, train, train_float_model
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.common.defs import QuantScheme

HERE = Path(__file__).resolve().parent


def simulate(model: torch.nn.Module, dummy_input: torch.Tensor) -> rimet.QuantizationSimModel:
    return rimet.QuantizationSimModel(
        model,
        dummy_input=dummy_input,
        quant_scheme=QuantScheme.min_max,
        default_param_bw=4,
        default_output_bw=4,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds: for tests")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for the checkpoint")
    arguments = parser.parse_args()
    epochs, qat_epochs = (6, 1) if arguments.smoke else (24, 10)

    torch.set_num_threads(1)
    training, test = load_digits()
    model = train_float_model(training, epochs=epochs)
    fold_all_batch_norms(model, (1, 1, 8, 8))
    print(f"FP32                          {accuracy(model, test):6.2f} %")

    # Ranges start from data; training then moves them.
    sim = simulate(model, test.images[:1])
    sim.compute_encodings(lambda quantized: quantized(training.first(256).images))
    print(f"W4A4, calibrated              {accuracy(sim.model, test):6.2f} %")

    ranges = {name: p.detach().clone() for name, p in sim.named_quantizer_parameters()}
    optimizer = torch.optim.Adam(sim.model.parameters(), lr=0.002)
    train(sim.model, training, optimizer, epochs=qat_epochs, description="training W4A4")
    after = accuracy(sim.model, test)
    moved = sum(not torch.equal(p, ranges[name]) for name, p in sim.named_quantizer_parameters())
    print(f"W4A4, after {qat_epochs:2d} epochs of QAT {after:6.2f} %")
    print(f"{moved} of {len(ranges)} range parameters moved.")

    # A checkpoint is the state dict. It goes into a simulation built the same way, which needs no
    # calibration of its own.
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "qat_w4a4.pt"
    torch.save(sim.model.state_dict(), path)
    empty = DigitsNet().eval()
    fold_all_batch_norms(empty, (1, 1, 8, 8))
    restored = simulate(empty, test.images[:1])
    restored.model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        same = torch.equal(restored.model(test.images), sim.model(test.images))
    print(f"Restored from {path.name}: {'the same logits' if same else 'DIFFERENT logits'}.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
