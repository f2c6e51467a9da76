"""Quantizes trained models with every setting and measures their accuracy: the part of
``benchmarks.accuracy`` that rimet and AIMET share. The same calls, with the package's name in front.

    python benchmarks/accuracy_worker.py rimet FOLDER
    .venv-peers/bin/python benchmarks/accuracy_worker.py aimet_torch FOLDER

Reads what ``benchmarks.accuracy`` wrote into the folder; prints one line of JSON a result.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LPBQ_BLOCK = 8


class Transformer(nn.Module):
    """A pre-norm encoder over the 16 patches of 2x2 pixels of images ``[n, 1, 8, 8]``."""

    def __init__(self, custom: Any, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.add = custom.Add()
        self.blocks = nn.Sequential(*(Block(custom, width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.patches(x).flatten(2).transpose(1, 2), self.position)
        return self.classifier(self.norm(self.blocks(x)).mean(1))


class Block(nn.Module):
    """Self-attention and two Linears, each around a residual connection."""

    def __init__(self, custom: Any, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.scores, self.mix = custom.MatMul(), custom.MatMul()
        self.softmax = nn.Softmax(-1)
        self.output = nn.Linear(width, width)
        self.up, self.gelu, self.down = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.add1, self.add2 = custom.Add(), custom.Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)

        def split(z: Tensor) -> Tensor:
            return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.query(y)), split(self.key(y)), split(self.value(y))
        weights = self.softmax(self.scores(query, key.transpose(2, 3)) * key.shape[-1] ** -0.5)
        x = self.add1(x, self.output(self.mix(weights, value).transpose(1, 2).flatten(2)))
        return self.add2(x, self.down(self.gelu(self.up(self.norm2(x)))))


def make_model(name: str, package: str) -> nn.Module:
    """An untrained model of the benchmark, its elementwise modules those of the package."""
    modules = importlib.import_module(f"{package}.nn.modules")
    custom = importlib.import_module(f"{package}.nn.modules.custom")
    if name == "transformer":
        return Transformer(custom)
    if package != "rimet":  # what examples/digits.py imports
        for part in ("rimet", "rimet.nn"):
            sys.modules.setdefault(part, types.ModuleType(part))
        sys.modules["rimet.nn.modules"] = modules
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("digits").DigitsNet()


class Settings:
    """Each method takes a trained model and returns a simulation, before calibration."""

    def __init__(self, package: str, work: dict[str, Any], seed: int, iterations: int) -> None:
        self.package = package
        self.bits: int = work["bits"]
        self.images: Tensor = work["calibration"]
        self.batches = list(self.images.split(32))
        self.seed = seed
        self.iterations = iterations

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def config(self, kind: str) -> str:
        utils = self.module("common.quantsim_config.utils")
        path: str = getattr(utils, f"get_path_for_{kind}_config")()
        return path

    def simulation(self, model: nn.Module, config: str = "per_tensor") -> Any:
        # AIMET gives operations that are no modules no quantizers.
        options = {"quantize_functional_ops": False} if self.package == "rimet" else {}
        return self.module("quantsim").QuantizationSimModel(
            model,
            dummy_input=self.images[:1],
            quant_scheme=self.module("common.defs").QuantScheme.min_max,
            default_param_bw=self.bits,
            default_output_bw=8,
            config_file=self.config(config),
            **options,
        )

    def folded(self, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            self.module("batch_norm_fold").fold_all_batch_norms(model, tuple(self.images[:1].shape))
        return model

    def nearest(self, model: nn.Module) -> Any:
        return self.simulation(self.folded(model))

    def sequential_mse(self, model: nn.Module) -> Any:
        sim = self.simulation(self.folded(model))
        self.module("seq_mse").apply_seq_mse(sim, self.batches)
        return sim

    def adaround(self, model: nn.Module) -> Any:
        return self._rounded(self.folded(model))

    def cle_adaround(self, model: nn.Module) -> Any:
        model = copy.deepcopy(model)
        shape = tuple(self.images[:1].shape)
        self.module("cross_layer_equalization").equalize_model(model, shape)
        return self._rounded(model)

    def lpbq(self, model: nn.Module) -> Any:
        sim = self.simulation(self.folded(model), "per_channel")
        utils = self.module("quantsim.config_utils")
        utils.set_grouped_blockwise_quantization_for_weights(
            sim,
            lambda module: (
                isinstance(module, nn.Conv2d | nn.Linear)
                and module.weight.shape[1] % LPBQ_BLOCK == 0
            ),
            self.bits,
            True,
            2 * self.bits,
            LPBQ_BLOCK,
        )
        return sim

    def _rounded(self, model: nn.Module) -> Any:
        adaround = self.module("adaround.adaround_weight")
        torch.manual_seed(self.seed)
        options = {"seed": self.seed} if self.package == "rimet" else {}
        params = adaround.AdaroundParameters(
            self.batches, len(self.batches), default_num_iterations=self.iterations, **options
        )
        folder, prefix = os.getcwd(), f"{self.package}-{os.getpid()}"
        rounded = adaround.Adaround.apply_adaround(
            model,
            self.images[:1],
            params,
            folder,
            prefix,
            default_param_bw=self.bits,
            default_quant_scheme=self.module("common.defs").QuantScheme.min_max,
            default_config_file=self.config("per_tensor"),
        )
        sim = self.simulation(rounded)
        sim.set_and_freeze_param_encodings(os.path.join(folder, f"{prefix}.encodings"))
        return sim


#: In the order of the table. What does not apply to a model stands beside it.
SETTINGS: dict[str, tuple[Callable[[Settings, nn.Module], Any], set[str]]] = {
    "nearest": (Settings.nearest, set()),
    "Sequential MSE": (Settings.sequential_mse, set()),
    "AdaRound": (Settings.adaround, set()),
    "CLE, AdaRound": (Settings.cle_adaround, {"transformer"}),
    "LPBQ": (Settings.lpbq, set()),
}


@torch.no_grad()
def accuracy(model: nn.Module, work: dict[str, Any]) -> float:
    """Share of the test images classified correctly, in percent."""
    guesses = torch.cat([model(images).argmax(1) for images in work["test"].split(200)])
    return 100 * float((guesses == work["labels"]).float().mean())


def results(
    package: str, folder: Path, iterations: int, only: list[str]
) -> Iterator[dict[str, Any]]:
    """One for each model, seed and setting."""
    for file in sorted(folder.glob("*.pt")):
        name, _, seed = file.stem.rpartition("-")
        work = torch.load(file)
        model = make_model(name, package)
        model.load_state_dict(work["state"])
        model.eval()
        settings = Settings(package, work, int(seed), iterations)
        for setting, (make, leaves_out) in SETTINGS.items():
            if name in leaves_out or setting not in only:
                continue
            start = time.perf_counter()
            sim = make(settings, model)
            sim.compute_encodings(lambda quantized, work=work: quantized(work["calibration"]))
            yield {
                "model": name,
                "seed": int(seed),
                "setting": setting,
                "accuracy": accuracy(sim.model, work),
                "seconds": time.perf_counter() - start,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("package", choices=("rimet", "aimet_torch"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(options.folder)
    answers = sys.stdout
    # Libraries print their progress; only results go to where they are read.
    with contextlib.redirect_stdout(sys.stderr):
        for result in results(options.package, options.folder, options.iterations, options.only):
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
