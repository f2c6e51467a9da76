"""AdaRound of a whole model."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rimet import _core
from rimet._graph.inputs import ForwardFn
from rimet._graph.streaming import Activation, Visit
from rimet._weight_layers import (
    NOT_FINITE,
    SUPPORTED,
    Layer,
    WeightTechnique,
    check_checkpoints_config,
    first_batches,
    linear_map,
    paths_of,
    set_weight,
    treat_weights,
    weight_layers,
)
from rimet.common.defs import QuantScheme
from rimet.ptq_results import LayerEntry, LayerwiseReport, layer_seed
from rimet.quantsim import QuantizationSimModel, _files

logger = logging.getLogger(__name__)

__all__ = ["Adaround", "AdaroundParameters", "AdaroundSupportedModules"]

AdaroundSupportedModules = SUPPORTED
"""Kinds of layers whose weights AdaRound rounds."""


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
        first_batches(data_loader, num_batches)  # checks the number
        if num_batches < 1:
            raise ValueError(f"num_batches: expected 1 or more, got {num_batches}")
        if default_num_iterations is not None and default_num_iterations < 1:
            raise ValueError(
                f"default_num_iterations: expected 1 or more, got {default_num_iterations}"
            )
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
        self._settings(())

    def _settings(self, bitwidths: Iterable[int]) -> dict[str, Any]:
        """What the engine takes, with the defaults filled in; checked."""
        iterations = self.num_iterations
        if iterations is None:
            narrow = any(bitwidth < 8 for bitwidth in bitwidths)
            iterations = 15_000 if narrow else 10_000
        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = _core.adaround_learning_rate(iterations)
        start, end = self.beta_range
        settings: dict[str, Any] = {
            "num_iterations": iterations,
            "reg_param": float(self.reg_param),
            "beta_range": (float(start), float(end)),
            "warm_start": float(self.warm_start),
            "learning_rate": float(learning_rate),
            "early_stop": self.early_stop,
        }
        _core.check_adaround_settings(**settings)
        return settings


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
            ValueError: settings outside their range, modules that are not in the model.
            FingerprintMismatchError: ``params.results_dir`` holds the results of another run.
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
            # Of multi-head attention, the projections have them.
            for module in sim.model.get_submodule(place).modules():
                quantizers: Any = getattr(module, "param_quantizers", {})
                for quantizer in quantizers.values():
                    if quantizer is not None:
                        quantizer.bitwidth = bitwidth
        left_out = [sim.model.get_submodule(path) for path in ignored]
        report = cls.round_simulation(sim, params, left_out)
        treated = {f"{layer.path}.weight" for layer in report.treated}
        _, encodings = _files.collect(sim.model)
        sections = _core.encodings_sections([], [e for e in encodings if e[0] in treated])
        document = {"param_encodings": json.loads(sections)["param_encodings"]}
        folder = Path(path)
        text = json.dumps(document, indent=1) + "\n"
        _files.write_text(folder / f"{filename_prefix}.encodings", text)
        report.save(folder / f"{filename_prefix}_report.json")
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
    ) -> LayerwiseReport:
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
            ValueError: settings outside their range, modules that are not in the model.
            FingerprintMismatchError: ``params.results_dir`` holds the results of another run.
        """
        layers, _ = weight_layers(sim, modules_to_exclude)
        settings = params._settings(layer.quantizer.bitwidth for layer in layers)
        return treat_weights(
            _AdaRound(settings, params.seed, params.progress),
            sim,
            first_batches(params.data_loader, params.num_batches),
            needs_float_model=True,
            excluded=modules_to_exclude,
            forward_fn=params.forward_fn,
            seed=params.seed,
            memory_budget=params.memory_budget,
            results_dir=params.results_dir,
        )


class _AdaRound(WeightTechnique):
    """Rounds weights."""

    name = "AdaRound"
    changes_weights = True

    def __init__(self, settings: dict[str, Any], seed: int, progress: bool) -> None:
        self.settings = settings
        self.progress = progress
        self._seed = seed

    def treat(self, layer: Layer, visit: Visit, entry: LayerEntry) -> None:
        quantizer = layer.quantizer
        following = visit.following_activation
        activation = None if following is None else activation_of(following)
        note = None
        if following is not None and activation is None:
            note = f"the activation function behind it, {following.name}, is not part of its loss"
        # A spilled tensor is a mapped file: the list holds no memory of its own.
        targets = list(visit.float_outputs)
        inputs = list(visit.quant_inputs)
        with (
            self.steps(layer, self.settings["num_iterations"]) as progress,
            # The model may have run under autocast; the engine says itself what it computes in what type.
            torch.autocast(layer.module.weight.device.type, enabled=False),
        ):
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
                block_size=layer.block_size,
                activation=activation,
                seed=layer_seed(self._seed, layer.path),
                memory=self.memory,
                progress=progress,
                **self.settings,
            )
        losses = {"loss_before": result["loss_before"], "loss_after": result["loss_after"]}
        is_finite = all(map(math.isfinite, losses.values()))
        if result["kept_nearest"]:
            why = "the one found was no better" if is_finite else NOT_FINITE
            kept = f"nearest rounding was kept: {why}"
            note = kept if note is None else f"{kept}; {note}"
        if not is_finite:
            logger.warning("%s: %s", layer.path, note)
        entry.done(
            {"weight": result["weight"]},
            **(losses if is_finite else {}),
            note=note,
            bitwidth=quantizer.bitwidth,
            method=result["method"],
            iterations=result["iterations"],
        )

    def apply(self, layer: Layer, tensors: dict[str, Tensor]) -> None:
        set_weight(layer, tensors["weight"])


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
