"""How far models get: ``python -m benchmarks.reach``.

Models of torchvision and Hugging Face transformers, built with random weights (the latter from
small configurations), pass through folding, equalization, simulation, calibration, a quantized
forward, ``deepcopy``, TorchScript (trace, save, load) and ``torch.export``, each with default
arguments. A step counts against what the unmodified float model passes. The result is a table:
``docs/reach.md``.

    python -m benchmarks.reach                      # all models, writes docs/reach.md
    python -m benchmarks.reach --only resnet bert   # those whose names hold one of these
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rimet._graph import bind_inputs, tensors_in
from rimet.batch_norm_fold import fold_all_batch_norms
from rimet.cross_layer_equalization import equalize_model
from rimet.quantsim import QuantizationSimModel
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
BITS = ((16, 16), (8, 8), (4, 4))
STEPS = (
    "fold",
    "equalize",
    "simulate",
    "calibrate",
    "forward",
    "deepcopy",
    "torchscript",
    "export",
)

#: A model and its example input, as QuantizationSimModel takes it.
Sample = tuple[nn.Module, Any]


# -- models ----------------------------------------------------------------------------------------


def _image(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def _torchvision() -> Iterator[tuple[str, Callable[[], Sample]]]:
    from torchvision import models as tv

    def classifier(name: str, size: int = 64, **options: Any) -> Callable[[], Sample]:
        return lambda: (getattr(tv, name)(weights=None, **options), _image(size))

    for name in (
        "alexnet",
        "vgg11_bn",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "squeezenet1_1",
        "densenet121",
        "shufflenet_v2_x0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "mnasnet0_5",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "regnet_y_400mf",
        "convnext_tiny",
        "swin_t",
        "swin_v2_t",
    ):
        yield name, classifier(name)
    yield "googlenet", classifier("googlenet", init_weights=False)
    yield "inception_v3", classifier("inception_v3", 96, init_weights=False)
    yield "vit_b_16", classifier("vit_b_16", 32, image_size=32)
    yield "maxvit_t", classifier("maxvit_t", 224)

    def segmentation(name: str) -> Callable[[], Sample]:
        make = getattr(tv.segmentation, name)
        return lambda: (make(weights=None, weights_backbone=None), _image())

    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        yield name, segmentation(name)

    def detection(name: str) -> Callable[[], Sample]:
        make = getattr(tv.detection, name)
        images = [torch.rand(3, 96, 128), torch.rand(3, 96, 96)]
        return lambda: (make(weights=None, weights_backbone=None), (images,))

    for name in (
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ):
        yield name, detection(name)

    def video(name: str, size: int, frames: int) -> Callable[[], Sample]:
        make = getattr(tv.video, name)
        return lambda: (make(weights=None), torch.randn(1, 3, frames, size, size))

    for name, size, frames in (
        ("r3d_18", 56, 8),
        ("mc3_18", 56, 8),
        ("r2plus1d_18", 56, 8),
        ("s3d", 64, 16),
        ("mvit_v1_b", 224, 16),
        ("swin3d_t", 64, 8),
    ):
        yield name, video(name, size, frames)
    yield (
        "raft_small",
        lambda: (tv.optical_flow.raft_small(weights=None), (_image(128, 1), _image(128, 1))),
    )


_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def _tokens(length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(3, 99, (2, length)), "attention_mask": mask}


def _transformers() -> Iterator[tuple[str, Callable[[], Sample]]]:
    import transformers as hf

    def make(family: str, config: dict[str, Any], inputs: Callable[[], Any]) -> Sample:
        cls = getattr(hf, family)
        return cls(cls.config_class(**config)), inputs()

    def text(family: str, **options: Any) -> tuple[str, Callable[[], Sample]]:
        return family, lambda: make(family, {**_SMALL, **options}, _tokens)

    for family in ("BertModel", "RobertaModel", "ElectraModel", "MPNetModel", "DebertaV2Model"):
        yield text(family)
    yield text("AlbertModel", embedding_size=16)
    yield text("DistilBertModel", dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    yield text("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    yield text("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32)
    yield text("BloomForCausalLM", n_layer=2, n_head=4)
    for family in (
        "GPTNeoXForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "GemmaForCausalLM",
        "PhiForCausalLM",
    ):
        yield text(family, num_key_value_heads=4, head_dim=8, pad_token_id=0)

    def pair(family: str, **options: Any) -> tuple[str, Callable[[], Sample]]:
        def inputs() -> dict[str, torch.Tensor]:
            return {**_tokens(), "decoder_input_ids": torch.randint(3, 99, (2, 6))}

        return family, lambda: make(family, {"vocab_size": 99, **options}, inputs)

    half = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
    half |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    half |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    yield pair("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    yield pair("BartModel", **half)
    yield pair("MarianModel", **half, pad_token_id=1, decoder_start_token_id=1)
    yield pair("PegasusModel", **half)

    def vision(family: str, **options: Any) -> tuple[str, Callable[[], Sample]]:
        config = {"image_size": 32, "patch_size": 4, **options}
        return family, lambda: make(family, config, lambda: {"pixel_values": _image(32)})

    for family in ("ViTModel", "DeiTModel", "BeitModel", "Dinov2Model"):
        yield vision(family, **_SMALL)
    yield vision("ConvNextModel", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    yield vision(
        "SwinModel", embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, patch_size=4
    )
    yield (
        "Wav2Vec2Model",
        lambda: make(
            "Wav2Vec2Model",
            {**_SMALL, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
            | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
            | {"num_conv_pos_embedding_groups": 4},
            lambda: {"input_values": torch.randn(2, 800)},
        ),
    )


def samples() -> Iterator[tuple[str, Callable[[], Sample]]]:
    """Name and maker of every model."""
    yield from _torchvision()
    yield from _transformers()


#: What CI runs: one model of each kind that the others resemble.
SUBSET = ("shufflenet_v2_x0_5", "mobilenet_v3_small", "BertModel", "GPT2LMHeadModel", "BartModel")


# -- steps -----------------------------------------------------------------------------------------


def _call(model: nn.Module, sample: Any) -> Any:
    args, kwargs = bind_inputs(model, sample)
    return model(*args, **kwargs)


def _torchscript(model: nn.Module, sample: Any) -> None:
    args, kwargs = bind_inputs(model, sample)
    options: dict[str, Any] = {"check_trace": False, "strict": False}
    options |= {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, **options), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    loaded(*args, **kwargs)


def _export(model: nn.Module, sample: Any) -> None:
    args, kwargs = bind_inputs(model, sample)
    torch.export.export(model, args, kwargs)


def _settle(model: nn.Module, sample: Any) -> None:
    """Gives batch norms a variance at which the signal neither dies out nor explodes.

    The mean stays zero: with the means of the sample, too, a deep random network was measured to
    amplify noise on its input by tens of dB.
    """

    def scale(norm: Any, args: tuple[torch.Tensor]) -> None:
        norm.running_var.fill_(args[0].square().mean())

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(scale) for norm in norms]
    _call(model, sample)
    for handle in handles:
        handle.remove()


def _sqnr(expected: Any, got: Any) -> float | None:
    """Ratio of signal to quantization noise over all floating-point results, in dB; None if their
    shapes depend on the values.
    """
    signal, noise = 0.0, 0.0
    for a, b in zip(tensors_in(expected), tensors_in(got), strict=False):
        if a.shape != b.shape:
            return None
        if a.is_floating_point():
            a, b = a.double(), b.double()
            finite = a.isfinite()
            signal += a[finite].square().sum().item()
            noise += (a - b)[finite].square().sum().item()
    if not signal:
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def judge(make: Callable[[], Sample]) -> dict[str, Any]:
    """Takes one model through all steps.

    Returns:
        For each step ``[float model passes, rimet passes]``, the errors, the number of quantizers,
        what is left in floating point, and the SQNR by bit-widths.
    """
    torch.manual_seed(0)
    model, sample = make()
    model.eval()
    result: dict[str, Any] = {"steps": {}, "errors": {}, "sqnr": {}}

    def step(name: str, run: Callable[[], Any], plain: Callable[[], Any] | None = None) -> Any:
        passed = True
        if plain is not None:
            try:
                plain()
            except Exception:
                passed = False
        value, ours = None, True
        try:
            value = run()
        except Exception as error:
            ours = False
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
            result["errors"][name] = text
        result["steps"][name] = [passed, ours]
        return value

    with torch.no_grad():
        _settle(model, sample)
        expected = _call(model, sample)
        folded = copy.deepcopy(model)
        step("fold", lambda: fold_all_batch_norms(folded, None, sample))
        step("equalize", lambda: equalize_model(copy.deepcopy(model), None, sample))
        if "fold" in result["errors"]:
            folded = copy.deepcopy(model)
        for bits in BITS:
            output_bw, param_bw = bits
            options = {"default_output_bw": output_bw, "default_param_bw": param_bw}
            torch.manual_seed(0)
            first = bits == BITS[0]

            def simulate(options: Any = options) -> QuantizationSimModel:
                return QuantizationSimModel(folded, sample, **options)

            sim = step("simulate", simulate) if first else simulate()
            if sim is None:
                return result
            calibrate = lambda sim=sim: sim.compute_encodings(lambda m: _call(m, sample))  # noqa: E731
            if first:
                step("calibrate", calibrate)
            else:
                calibrate()
            forward = lambda sim=sim: _call(sim.model, sample)  # noqa: E731
            got = step("forward", forward) if first else forward()
            if got is None:
                return result
            result["sqnr"][f"W{param_bw}A{output_bw}"] = _sqnr(expected, got)
            if first:
                kept = sim
        report = kept.report
        result["quantizers"] = sum(report.num_quantizers.values())
        result["functional"] = len(report.functional_ops)
        reasons: dict[str, int] = {}
        for path, reason in report.unquantized:
            what = path.rpartition(": ")[2].partition(" (call")[0] if "(call" in path else "module"
            reasons[f"{what}: {reason}"] = reasons.get(f"{what}: {reason}", 0) + 1
        result["left"] = reasons
        simulated = kept.model
        step(
            "deepcopy",
            lambda: _call(copy.deepcopy(simulated), sample),
            lambda: copy.deepcopy(model),
        )
        step(
            "torchscript",
            lambda: _torchscript(simulated, sample),
            lambda: _torchscript(model, sample),
        )
        step("export", lambda: _export(simulated, sample), lambda: _export(model, sample))
    return result


# -- table -----------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""

    def mark(pair: list[bool] | None) -> str:
        if pair is None:
            return "-"
        return f"{'yes' if pair[0] else 'no'} / {'yes' if pair[1] else 'no'}"

    def decibel(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        "| model | " + " | ".join(STEPS) + " | quantizers | of functions | "
        "W16A16 | W8A8 | W4A4 | left in floating point |",
        "|---|" + "---|" * (len(STEPS) + 6),
    ]
    for name, result in results.items():
        cells = [mark(result["steps"].get(step)) for step in STEPS]
        cells += [str(result.get("quantizers", "-")), str(result.get("functional", "-"))]
        cells += [decibel(result["sqnr"].get(f"W{bits}A{bits}")) for bits in (16, 8, 4)]
        left = [f"{count} x {what}" for what, count in result.get("left", {}).items()]
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(left)} |")
    return "\n".join(lines)


HEADER = """# Reach

Made by `python -m benchmarks.reach` with torch {torch}, torchvision {torchvision} and transformers {transformers}. Models have
random weights and their default arguments; those of transformers are built from small configurations. Each step's cell says
whether the unmodified float model passes it, and whether rimet does. SQNR of the output is in dB ("-": the shapes of the
results depend on their values, as behind non-maximum suppression). What is left in floating point, and why, is
`sim.report`.

How far to trust the SQNR columns: batch norms are given the second moment of a sample as variance and a mean of zero. With
the batch's own mean and variance ResNet-50 has 36 dB at W16A16 instead of 81, while 16-bit noise on its input alone already gives 41:
a random network with those statistics amplifies noise by itself. Trained weights have not been tried. The rows come from several runs.

"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the number of models that rimet fails on where the float model passes."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.reach")
    parser.add_argument("--only", nargs="*", help="parts of the names of models")
    parser.add_argument("--smoke", action="store_true", help="the few models that CI runs")
    parser.add_argument("--json", type=Path, help="where results are kept; those in it are reused")
    parser.add_argument("--write", action="store_true", help="write docs/reach.md")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    results: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    for name, make in samples():
        chosen = name in SUBSET if options.smoke else True
        if options.only:
            chosen = any(part.lower() in name.lower() for part in options.only)
        if not chosen or name in results:
            continue
        try:
            results[name] = judge(make)
        except Exception as error:  # the model itself, or a later bit-width
            results[name] = {"steps": {}, "errors": {"model": repr(error)[:300]}, "sqnr": {}}
        result = results[name]
        print(name, result["sqnr"], flush=True)
        for step, error in result["errors"].items():
            passes = result["steps"].get(step, [True])[0]
            print(
                f"  {step}{'' if passes else ' (the float model fails, too)'}: {error}", flush=True
            )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    if options.write:
        import torchvision
        import transformers

        header = HEADER.format(
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            transformers=transformers.__version__,
        )
        (ROOT / "docs" / "reach.md").write_text(header + table(results) + "\n")
    failed = [
        name
        for name, result in results.items()
        if any(passes and not ours for passes, ours in result["steps"].values())
        or "model" in result["errors"]
    ]
    print(f"{len(results)} models, {len(results) - len(failed)} pass all that the float model does")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
