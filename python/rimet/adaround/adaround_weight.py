"""AdaRound of a whole model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rimet import _core
from rimet._graph.streaming import Activation, StreamingWalk
from rimet._layerwise import (
    SUPPORTED,
    Batches,
    Layer,
    LayerReport,
    LayerResults,
    Report,
    check_checkpoints_config,
    layers_digest,
    linear_map,
    only_weights_quantized,
    paths_of,
    weight_layers,
)
from rimet.common.defs import QuantScheme
from rimet.nn import compute_param_encodings, reuse
from rimet.quantsim import QuantizationSimModel, _files

__all__ = ["Adaround", "AdaroundParameters", "AdaroundSupportedModules"]

logger = logging.getLogger(__name__)

AdaroundSupportedModules = SUPPORTED
"""Kinds of layers whose weights AdaRound rounds."""

ForwardFn = Callable[[nn.Module, Any], Any]


class AdaroundParameters:
    """Data and settings of AdaRound.

    Args:
        data_loader: yields calibration batches. Without ``forward_fn`` a batch is a tensor, a tuple
            or list of positional arguments (labels beyond them are left out), or a dict of keyword
            arguments.
        num_batches: how many of its batches to use.
        default_num_iterations: steps per layer; None: 10,000, or 15,000 if a weight has fewer than
            8 bits.
        default_reg_param: weight of the rounding regularizer.
        default_beta_range: first and last exponent of the regularizer.
        default_warm_start: share of the steps without regularizer.
        forward_fn: called with a model and a batch, runs the model on it.
        learning_rate: of Adam; None: 1e-3 from 10,000 steps on, more for fewer (at most 1e-2).
        early_stop: end a layer's optimization once ``mean(1 - |2 h - 1|^2)`` is below this, that
            is, once nearly all roundings are decided; None: never.
        seed: of the samples drawn. The same seed gives the same bits.
        results_dir: folder for the results of finished layers; a second run with the same data and
            settings takes them up. None: none are kept.
        memory_budget: bytes of activations in memory at once; None: a quarter of what is free.
        progress: whether to show progress bars.

    Raises:
        ValueError: more batches than the loader has, or settings outside their range.
    """

    def __init__(
        self,
        data_loader: Iterable[Any],
        num_batches: int,
        default_num_iterations: int | None = None,
        default_reg_param: float = 0.01,
        default_beta_range: tuple[float, float] = (20, 2),
        default_warm_start: float = 0.2,
        forward_fn: ForwardFn | None = None,
        *,
        learning_rate: float | None = None,
        early_stop: float | None = None,
        seed: int = 0,
        results_dir: str | os.PathLike[str] | None = None,
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        Batches(data_loader, num_batches)  # checks the number
        if num_batches < 1:
            raise ValueError(f"num_batches: expected 1 or more, got {num_batches}")
        self.data_loader = data_loader
        self.num_batches = num_batches
        self.num_iterations = default_num_iterations
        self.reg_param = default_reg_param
        self.beta_range = default_beta_range
        self.warm_start = default_warm_start
        self.forward_fn = forward_fn
        self.learning_rate = learning_rate
        self.early_stop = early_stop
        self.seed = seed
        self.results_dir = results_dir
        self.memory_budget = memory_budget
        self.progress = progress

    def _settings(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """What the engine takes, with the defaults filled in."""
        iterations = self.num_iterations
        if iterations is None:
            narrow = any(layer.quantizer.bitwidth < 8 for layer in layers)
            iterations = 15_000 if narrow else 10_000
        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = _core.adaround_learning_rate(iterations)
        return {
            "num_iterations": iterations,
            "reg_param": float(self.reg_param),
            "beta_range": (float(self.beta_range[0]), float(self.beta_range[1])),
            "warm_start": float(self.warm_start),
            "learning_rate": float(learning_rate),
            "early_stop": self.early_stop,
            "seed": self.seed,
        }


class Adaround:
    """Chooses for every weight whether it is rounded up or down.

    Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for
    Post-Training Quantization", 2020, arXiv 2004.10568.
    """

    @classmethod
    def apply_adaround(
        cls,
        model: nn.Module,
        dummy_input: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        param_bw_override_list: Sequence[tuple[nn.Module, int]] | None = None,
        ignore_quant_ops_list: Collection[nn.Module] | None = None,
        default_quant_scheme: QuantScheme = QuantScheme.post_training_tf_enhanced,
        default_config_file: str | None = None,
    ) -> nn.Module:
        """A copy of a model whose weights are rounded; writes the encodings of the weights.

        Build a simulation of the result, and call its ``set_and_freeze_param_encodings`` with the
        file, before its ``compute_encodings``.

        Writes ``{path}/{filename_prefix}.encodings`` and the report,
        ``{path}/{filename_prefix}_report.json``: for each layer whether it was treated, or why not,
        its loss before and after, and the time.

        Args:
            model: a floating-point model; left as it is.
            dummy_input: example input, as for :class:`QuantizationSimModel`.
            params: data and settings.
            path: folder of the files; made if it is not there.
            filename_prefix: first part of their names.
            default_param_bw: bits of a weight.
            param_bw_override_list: modules with another number of bits.
            ignore_quant_ops_list: modules that stay in floating point, with all inside them.
            default_quant_scheme: how the ranges of the weights are found.
            default_config_file: quantsim configuration: per-tensor or per-channel, symmetry.

        Returns:
            The copy.

        Raises:
            ValueError: settings outside their range, modules that are not in the model, results
                of another run in ``params.results_dir``.
        """
        overrides = list(param_bw_override_list or ())
        override_paths = paths_of(model, (m for m, _ in overrides), "param_bw_override_list")
        ignored = paths_of(model, ignore_quant_ops_list or (), "ignore_quant_ops_list")
        sim = QuantizationSimModel(
            model,
            dummy_input=dummy_input,
            quant_scheme=default_quant_scheme,
            default_param_bw=default_param_bw,
            config_file=default_config_file,
        )
        for place, (_, bitwidth) in zip(override_paths, overrides, strict=True):
            quantizers: Any = getattr(sim.model.get_submodule(place), "param_quantizers", {})
            for quantizer in quantizers.values():
                if quantizer is not None:
                    quantizer.bitwidth = bitwidth
        sim.exclude_layers_from_quantization([sim.model.get_submodule(p) for p in ignored])
        report = cls.round_simulation(sim, params)
        treated = {f"{layer.path}.weight" for layer in report.layers if layer.status != "skipped"}
        _, encodings = _files.collect(sim.model)
        sections = _core.encodings_sections([], [e for e in encodings if e[0] in treated])
        folder = Path(path)
        text = (
            json.dumps({"param_encodings": json.loads(sections)["param_encodings"]}, indent=1)
            + "\n"
        )
        _files.write_text(folder / f"{filename_prefix}.encodings", text)
        _files.write_text(folder / f"{filename_prefix}_report.json", report.to_json())
        return QuantizationSimModel.get_original_model(sim.model)

    @classmethod
    def apply_adaround_with_cache(
        cls,
        model: nn.Module,
        dummy_input: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        param_bw_override_list: Sequence[tuple[nn.Module, int]] | None = None,
        ignore_quant_ops_list: Collection[nn.Module] | None = None,
        default_quant_scheme: QuantScheme = QuantScheme.post_training_tf_enhanced,
        default_config_file: str | None = None,
        checkpoints_config: str | None = None,
    ) -> nn.Module:
        """The same as :meth:`apply_adaround`, which carries activations forward by itself.

        Args:
            checkpoints_config: JSON file that tells AIMET where to cache; read and checked, but
                not needed here.

        Raises:
            ValueError: see :meth:`apply_adaround`; a file that is no such configuration.
        """
        check_checkpoints_config(checkpoints_config)
        return cls.apply_adaround(
            model,
            dummy_input,
            params,
            path,
            filename_prefix,
            default_param_bw,
            param_bw_override_list,
            ignore_quant_ops_list,
            default_quant_scheme,
            default_config_file,
        )

    @classmethod
    def round_simulation(
        cls,
        sim: QuantizationSimModel,
        params: AdaroundParameters,
        modules_to_exclude: Collection[nn.Module] = (),
    ) -> Report:
        """Rounds the weights of a simulation, on whatever grids their quantizers have: per-tensor,
        per-channel, blockwise, grouped blocks.

        Weight quantizers without a range are calibrated first; their ranges are then fixed. Call it
        before ``compute_encodings``, since activations change.

        Args:
            sim: the simulation; on an error it stays as it was.
            params: data and settings.
            modules_to_exclude: modules of ``sim.model`` whose weights are left as they are.

        Returns:
            What was done, layer by layer.

        Raises:
            ValueError: settings outside their range, results of another run in
                ``params.results_dir``.
        """
        began = time.perf_counter()
        paths_of(sim.model, modules_to_exclude, "modules_to_exclude")
        layers, skipped = weight_layers(sim, modules_to_exclude)
        for layer in layers:
            if not layer.quantizer.is_initialized():
                compute_param_encodings(layer.module)
        settings = params._settings(layers)
        float_model = QuantizationSimModel.get_original_model(sim.model)
        fingerprint = {"technique": "adaround", **settings, "layers": layers_digest(layers)}
        batches = Batches(params.data_loader, params.num_batches)
        walk = StreamingWalk(
            float_model,
            sim.model,
            batches,
            params.forward_fn,
            params.memory_budget,
            seed=params.seed,
            progress="AdaRound" if params.progress else None,
        )
        report = Report("AdaRound")
        by_path = {layer.path: layer for layer in layers}
        results: LayerResults | None = None
        with contextlib.ExitStack() as stack:
            for layer in layers:
                weight = layer.module.weight
                stack.callback(_restore, layer, weight, weight.detach().clone())
            with only_weights_quantized(sim, layers):
                for visit in walk.visit(by_path):
                    if results is None:  # now all batches have gone by
                        fingerprint["data"] = batches.digest()
                        results = LayerResults(params.results_dir, fingerprint)
                    layer = by_path[visit.path]
                    finished = results.load(visit.path)
                    if finished is None:
                        finished = _round_layer(layer, visit, settings, params.progress)
                        results.store(*finished)
                    tensors, layer_report = finished
                    _set_weight(layer, tensors["weight"])
                    report.layers.append(layer_report)
            stack.pop_all()
        for layer in layers:
            layer.quantizer.allow_overwrite(False)
            layer.quantizer.requires_grad_(False)
        for path, reason in walk.report.not_run.items():
            kind = type(by_path[path].module).__name__
            report.layers.append(LayerReport(path, kind, "skipped", reason))
        report.layers += skipped
        report.walk = asdict(walk.report)
        report.seconds = time.perf_counter() - began
        return report


def _set_weight(layer: Layer, weight: Tensor) -> None:
    with torch.no_grad():
        reuse.forget(layer.module)
        layer.module.weight.copy_(weight)


def _restore(layer: Layer, parameter: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        reuse.forget(layer.module)
        parameter.copy_(weight)


def _round_layer(
    layer: Layer, visit: Any, settings: dict[str, Any], progress: bool
) -> tuple[dict[str, Tensor], LayerReport]:
    began = time.perf_counter()
    quantizer = layer.quantizer
    following = visit.following_activation
    activation = None if following is None else activation_of(following)
    reason = None
    if following is not None and activation is None:
        reason = f"the activation function behind it, {following.name}, is not part of its loss"
    # A spilled tensor is a mapped file: the list holds no memory of its own.
    targets = list(visit.float_outputs)
    inputs = list(visit.quant_inputs)
    with tqdm(
        total=settings["num_iterations"], desc=layer.path, leave=False, disable=not progress
    ) as bar:
        result = _core.adaround_layer(
            linear_map(layer.module),
            layer.module.weight,
            layer.module.bias,
            inputs,
            targets,
            quantizer.get_scale(),
            quantizer.get_offset(),
            qmin=quantizer.qmin,
            qmax=quantizer.qmax,
            block_size=None if quantizer.block_size is None else list(quantizer.block_size),
            activation=activation,
            progress=lambda steps: bar.update(steps - bar.n),
            **settings,
        )
    if result["kept_nearest"]:
        reason = "nearest rounding was kept: the one found was no better"
    report = LayerReport(
        layer.path,
        type(layer.module).__name__,
        reason=reason,
        bitwidth=quantizer.bitwidth,
        method=result["method"],
        loss_before=result["loss_before"],
        loss_after=result["loss_after"],
        iterations=result["iterations"],
        seconds=time.perf_counter() - began,
    )
    logger.info(
        "%s: loss %.4g -> %.4g in %.1f s", layer.path, report.loss_before, report.loss_after,
        report.seconds,
    )  # fmt: skip
    return {"weight": result["weight"]}, report


# Activation functions

EngineActivation = tuple[str, list[float], Tensor | None]

_WITHOUT_ARGUMENTS: dict[str, EngineActivation] = {
    "relu6": ("hardtanh", [0.0, 6.0], None),
    **{
        name: (name, [], None)
        for name in ("relu", "sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid")
    },
}


def activation_of(activation: Activation) -> EngineActivation | None:
    """Name, numbers and weights of an activation function as the engine takes them, or None for one
    that it does not know.
    """
    name, module = activation.name, activation.module
    if name in _WITHOUT_ARGUMENTS:
        return _WITHOUT_ARGUMENTS[name]
    if module is None:
        return _probed(activation)
    if isinstance(module, nn.Hardtanh):
        return ("hardtanh", [float(module.min_val), float(module.max_val)], None)
    if isinstance(module, nn.LeakyReLU):
        return ("leaky_relu", [float(module.negative_slope)], None)
    if isinstance(module, nn.PReLU):
        return ("prelu", [], module.weight)
    if isinstance(module, nn.ELU):
        return ("elu", [float(module.alpha)], None)
    if isinstance(module, nn.GELU):
        return ("gelu_tanh" if module.approximate == "tanh" else "gelu", [], None)
    if isinstance(module, nn.Softplus):
        return ("softplus", [float(module.beta), float(module.threshold)], None)
    return None


def _probed(activation: Activation) -> EngineActivation | None:
    """A function whose arguments are not known: it is one of the usual ones if it gives their
    values.
    """
    usual: dict[str, list[tuple[EngineActivation, Callable[[Tensor], Tensor]]]] = {
        "hardtanh": [(("hardtanh", [-1.0, 1.0], None), functional.hardtanh)],
        "leaky_relu": [(("leaky_relu", [0.01], None), functional.leaky_relu)],
        "elu": [(("elu", [1.0], None), functional.elu)],
        "softplus": [(("softplus", [1.0, 20.0], None), functional.softplus)],
        "gelu": [
            (("gelu", [], None), functional.gelu),
            (("gelu_tanh", [], None), lambda x: functional.gelu(x, approximate="tanh")),
        ],
    }
    probe = torch.linspace(-30, 30, 601)
    for engine, function in usual.get(activation.name, []):
        if torch.equal(activation(probe), function(probe)):
            return engine
    return None
