"""The main job on real data: train, quantize, calibrate, fine-tune, export, run without Python.

    python examples/quickstart.py            # about a minute; writes to examples/out
    python examples/quickstart.py --smoke    # seconds, for tests: little training, fewer images

Every number printed is measured in this run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import rimet
import torch
from digits import Split, accuracy, load_digits, train, train_float_model
from rimet.adaround import Adaround, AdaroundParameters
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.bias_correction import correct_bias
from rimet.common.defs import QuantScheme
from rimet.common.quantsim_config.utils import (
    get_path_for_per_channel_config,
    get_path_for_per_tensor_config,
)
from rimet.cross_layer_equalization import equalize_model
from rimet.quantsim import QuantParams
from rimet.quantsim.config_utils import set_grouped_blockwise_quantization_for_weights
from rimet.seq_mse import apply_seq_mse
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from unbalanced import INPUT_SHAPE, unbalance, with_relu

HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    """One line of the table."""

    name: str
    accuracy: float  # percent of the test images
    size_kib: float  # parameters and their scales
    calibration_ms: float | None
    forward_ratio: float  # time of a forward pass, FP32 = 1


def quantize(
    model: nn.Module, data: Split, *, weights: int, activations: int, per_channel: bool = True
) -> tuple[rimet.QuantizationSimModel, float]:
    """A calibrated quantization simulation of `model`, and the milliseconds calibration took."""
    config = get_path_for_per_channel_config() if per_channel else get_path_for_per_tensor_config()
    sim = rimet.QuantizationSimModel(
        model,
        dummy_input=data.images[:1],
        quant_scheme=QuantScheme.min_max,
        default_param_bw=weights,
        default_output_bw=activations,
        config_file=config,
    )
    start = time.perf_counter()
    sim.compute_encodings(lambda quantized: quantized(data.images))
    return sim, 1e3 * (time.perf_counter() - start)


def size_kib(model: nn.Module) -> float:
    """Storage of the parameters: each at its quantizer's bit-width, plus a float32 per scale.

    A parameter without a quantizer counts as float32. The quantizers' own min and max are not part
    of the deployed model.
    """
    bits = 0
    for module in model.modules():
        quantizers = getattr(module, "param_quantizers", {})
        for name, parameter in module.named_parameters(recurse=False):
            quantizer = quantizers[name] if name in quantizers else None
            if quantizer is not None:
                bits += parameter.numel() * quantizer.bitwidth + 32 * quantizer.get_scale().numel()
            elif not hasattr(module, "get_encodings"):  # not a quantizer's min or max
                bits += parameter.numel() * 32
    return bits / 8 / 1024


@torch.no_grad()
def forward_ratio(model: nn.Module, reference: nn.Module, images: Tensor, repeats: int) -> float:
    """Median time of `model`'s forward over that of `reference`, measured by turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for module, collected in zip((model, reference), times, strict=True):
            start = time.perf_counter()
            module(images)
            if turn > 0:  # the first turn warms up
                collected.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def recover(
    trained: nn.Module, calibration: Split, test: Split, repeats: int
) -> tuple[list[Row], float]:
    """A model with unbalanced channels at W8A8 with one scale per tensor: as it is, and with
    cross-layer equalization, high-bias absorption and bias correction.

    Returns the table and the milliseconds that these took.
    """
    model = with_relu(trained)
    unbalance(model)
    plain = copy.deepcopy(model)
    fold_all_batch_norms(plain, INPUT_SHAPE)
    rows = [Row("FP32, unbalanced", accuracy(plain, test), size_kib(plain), None, 1.0)]

    start = time.perf_counter()
    equalize_model(model, INPUT_SHAPE)
    params = QuantParams(8, 8, "nearest", QuantScheme.min_max, get_path_for_per_tensor_config())
    correct_bias(model, params, len(calibration), [calibration.images], len(calibration))
    spent = 1e3 * (time.perf_counter() - start)

    for name, float_model in (("W8A8 per-tensor", plain), ("  equalized, corrected", model)):
        sim, milliseconds = quantize(
            float_model, calibration, weights=8, activations=8, per_channel=False
        )
        ratio = forward_ratio(sim.model, float_model, test.images, repeats)
        result = accuracy(sim.model, test)
        rows.append(Row(name, result, size_kib(sim.model), milliseconds, ratio))
    return rows, spent


def treat_weights(
    model: nn.Module,
    trained: nn.Module,
    calibration: Split,
    test: Split,
    repeats: int,
    iterations: int,
) -> list[Row]:
    """W4A8 with one weight scale per tensor: rounding to nearest, and what the techniques that choose
    ranges and rounding from data make of it. Last, blocks with integer scales (LPBQ).

    The time in the table is that of the technique and of calibration.
    """
    rows = [Row("FP32", accuracy(model, test), size_kib(model), None, 1.0)]
    batches = list(calibration.images.split(32))
    config = get_path_for_per_tensor_config()

    def simulation(float_model: nn.Module, config_file: str = config) -> rimet.QuantizationSimModel:
        return rimet.QuantizationSimModel(
            float_model,
            dummy_input=calibration.images[:1],
            quant_scheme=QuantScheme.min_max,
            default_param_bw=4,
            default_output_bw=8,
            config_file=config_file,
        )

    def nearest() -> rimet.QuantizationSimModel:
        return simulation(model)

    def sequential_mse() -> rimet.QuantizationSimModel:
        sim = simulation(model)
        apply_seq_mse(sim, batches)
        return sim

    def adaround(float_model: nn.Module) -> rimet.QuantizationSimModel:
        params = AdaroundParameters(batches, len(batches), default_num_iterations=iterations)
        with tempfile.TemporaryDirectory() as folder:
            rounded = Adaround.apply_adaround(
                float_model,
                calibration.images[:1],
                params,
                folder,
                "adaround",
                default_param_bw=4,
                default_quant_scheme=QuantScheme.min_max,
                default_config_file=config,
            )
            sim = simulation(rounded)
            sim.set_and_freeze_param_encodings(f"{folder}/adaround.encodings")
        return sim

    def equalized_adaround() -> rimet.QuantizationSimModel:
        equalized = copy.deepcopy(trained)
        equalize_model(equalized, INPUT_SHAPE)
        return adaround(equalized)

    def blocks() -> rimet.QuantizationSimModel:
        sim = simulation(model, get_path_for_per_channel_config())
        set_grouped_blockwise_quantization_for_weights(
            sim,
            lambda module: (
                isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] % 8 == 0
            ),
            bitwidth=4,
            symmetric=True,
            decompressed_bw=8,
            block_size=8,
        )
        return sim

    treatments = [
        ("W4A8 per-tensor", nearest),
        ("  Sequential MSE", sequential_mse),
        ("  AdaRound", lambda: adaround(model)),
        ("  CLE, AdaRound", equalized_adaround),
        ("W4A8 LPBQ, blocks of 8", blocks),
    ]
    for name, treat in treatments:
        start = time.perf_counter()
        sim = treat()
        sim.compute_encodings(lambda quantized: quantized(calibration.images))
        spent = 1e3 * (time.perf_counter() - start)
        ratio = forward_ratio(sim.model, model, test.images, repeats)
        rows.append(Row(name, accuracy(sim.model, test), size_kib(sim.model), spent, ratio))
    return rows


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':24}{'accuracy':>10}{'vs FP32':>10}{'size':>11}{'calibration':>13}{'forward':>10}")
    for row in rows:
        change = "" if row is rows[0] else f"{row.accuracy - rows[0].accuracy:+.2f}"
        calibration = "" if row.calibration_ms is None else f"{row.calibration_ms:.0f} ms"
        print(
            f"{row.name:24}{row.accuracy:8.2f} %{change:>10}{row.size_kib:7.1f} KiB"
            f"{calibration:>13}{row.forward_ratio:8.2f} x"
        )


def run_elsewhere(script: Path, tensors: Path, *, rust: bool) -> dict[str, bool]:
    """Run the exported file in a fresh Python process and a Rust program: same logits?"""
    # The thread count of this process: another one may split sums differently.
    environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    environment.pop("PYTHONPATH", None)
    agreed = {}

    command = [sys.executable, str(HERE / "run_torchscript.py"), str(script), str(tensors)]
    command.append(rimet.ops_library_path())
    print("\nA fresh Python process with torch and the ops library only:", flush=True)
    agreed["python"] = subprocess.run(command, env=environment).returncode == 0

    manifest = HERE.parent / "Cargo.toml"
    if not rust:
        print("Rust program: not run (--no-rust).")
    elif shutil.which("cargo") is None or not manifest.exists():
        print("Rust program: not run, since there is no cargo here (or no source tree of rimet).")
    else:
        # torch-sys finds libtorch by asking the `python3` that comes first in PATH.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        libraries = str(Path(torch.__file__).parent / "lib")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [libraries, environment.get("LD_LIBRARY_PATH")])
        )
        print("A Rust program (the first build takes minutes):", flush=True)
        command = ["cargo", "run", "--release", "--locked", "--example", "load_torchscript"]
        command += ["--manifest-path", str(manifest), "--", str(script), str(tensors)]
        agreed["rust"] = subprocess.run(command, env=environment).returncode == 0
    return agreed


def run_in_onnxruntime(
    sim: rimet.QuantizationSimModel, data: Split, path: Path
) -> dict[str, float]:
    """Write the simulation as ONNX with quantize and dequantize operators, and run it in onnxruntime.

    Returns its accuracy, and the share of images that it sorts as the simulation does, in percent.
    """
    missing = [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        print(f"\nONNX: not written, since {' and '.join(missing)} is not installed (rimet[onnx]).")
        return {}
    import onnxruntime
    import rimet.onnx

    with warnings.catch_warnings():
        # torch's older exporter is deprecated; it takes a tenth of the time of the newer one.
        warnings.simplefilter("ignore", DeprecationWarning)
        rimet.onnx.export(
            sim,
            data.images[:1],
            path,
            dynamo=False,
            opset_version=21,  # 4-bit integers
            export_int32_bias=False,  # the simulation has its biases in floating point
            prequantize_constants=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}},
        )
    options = onnxruntime.SessionOptions()
    # One of its fusions stops at 4-bit activations; the others do not matter here.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": data.images.numpy()})
    with torch.no_grad():
        simulated = sim.model(data.images).argmax(1)
    classes = torch.from_numpy(logits).argmax(1)
    return {
        "accuracy": 100 * (classes == data.labels).float().mean().item(),
        "same_class": 100 * (classes == simulated).float().mean().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes: for tests"
    )
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for the files")
    parser.add_argument("--no-rust", action="store_true", help="leave out the Rust program")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    epochs, qat_epochs, repeats, iterations = (
        (6, 1, 2, 20) if arguments.smoke else (24, 10, 20, 500)
    )

    # The model is so small that one thread is as fast as many, and the sums come out the same on
    # machines with different numbers of cores.
    torch.set_num_threads(1)
    began = time.perf_counter()
    training, test = load_digits()
    calibration = training.first(256)
    print(f"Handwritten digits: {len(training)} images to train on, {len(test)} to test on.")

    start = time.perf_counter()
    model = train_float_model(training, epochs=epochs)
    trained = copy.deepcopy(model)
    fold_all_batch_norms(model, INPUT_SHAPE)
    print(f"Trained a float model in {time.perf_counter() - start:.1f} s; batch norms folded.")
    rows = [Row("FP32", accuracy(model, test), size_kib(model), None, 1.0)]

    def measure(name: str, sim: rimet.QuantizationSimModel, milliseconds: float) -> None:
        ratio = forward_ratio(sim.model, model, test.images, repeats)
        rows.append(Row(name, accuracy(sim.model, test), size_kib(sim.model), milliseconds, ratio))

    settings = [
        ("W8A8", dict(weights=8, activations=8)),
        ("W4A8 per-tensor", dict(weights=4, activations=8, per_channel=False)),
        ("W4A8 per-channel", dict(weights=4, activations=8)),
        ("W4A4", dict(weights=4, activations=4)),
    ]
    for name, setting in tqdm(settings, desc="quantizing", unit="setting", leave=False):
        sim, milliseconds = quantize(model, calibration, **setting)
        measure(name, sim, milliseconds)

    # Quantization-aware training of the last one, W4A4: the ordinary loop, on sim.model.
    start = time.perf_counter()
    optimizer = torch.optim.Adam(sim.model.parameters(), lr=0.002)
    train(sim.model, training, optimizer, epochs=qat_epochs, description="training W4A4")
    print(f"Fine-tuned W4A4 for {qat_epochs} epochs in {time.perf_counter() - start:.1f} s.")
    measure(f"W4A4, QAT {qat_epochs} epochs", sim, milliseconds)
    print_table(rows)

    treated = treat_weights(model, trained, calibration, test, repeats, iterations)
    print_table(treated)

    unbalanced, spent = recover(trained, calibration, test, repeats)
    print_table(unbalanced)
    print(f"Equalization and bias correction took {spent:.0f} ms.")

    sim.export(str(out), "digits_w4a4", test.images[:1], export_to_torchscript=True)
    with torch.no_grad():
        logits = sim.model(test.images)
    save_file(
        {"input": test.images.contiguous(), "logits": logits.contiguous()},
        out / "digits_io.safetensors",
    )
    onnx = run_in_onnxruntime(sim, test, out / "digits_w4a4.onnx")
    print(f"\nExported TorchScript, ONNX, encodings and test data to {out}:")
    for path in sorted(out.glob("digits_*")):
        print(f"  {path.name:32}{path.stat().st_size / 1024:8.1f} KiB")

    if onnx:
        print(
            f"\nonnxruntime, from the ONNX file: {onnx['accuracy']:.2f} % accuracy, the simulation's "
            f"class for {onnx['same_class']:.2f} % of the images."
        )

    agreed = run_elsewhere(
        out / "digits_w4a4.torchscript.pth",
        out / "digits_io.safetensors",
        rust=not arguments.no_rust,
    )
    seconds = time.perf_counter() - began
    report = {
        "rows": [asdict(row) for row in rows],
        "treated": [asdict(row) for row in treated],
        "unbalanced": [asdict(row) for row in unbalanced],
        "onnxruntime": onnx,
        "logits_agree": agreed,
        "seconds": seconds,
        "smoke": arguments.smoke,
        "rimet": rimet.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    (out / "quickstart.json").write_text(json.dumps(report, indent=2) + "\n")

    failed = [name for name, same in agreed.items() if not same]
    if failed:
        print(f"\nLogits DIFFER in: {', '.join(failed)}.")
        return 1
    others = " and ".join({"python": "a fresh Python process", "rust": "Rust"}[n] for n in agreed)
    print(f"\nLogits agree bit for bit between this process, {others}. {seconds:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
