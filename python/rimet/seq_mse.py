"""Sequential MSE: ranges of weight quantizers that keep each layer's output closest.

Layer after layer, every encoding of the weight takes that of the candidates ``full range * i / N``
whose output differs least on calibration data, given the layers treated before.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rimet import _core
from rimet._graph.inputs import ForwardFn
from rimet._graph.streaming import Visit
from rimet._weight_layers import (
    NOT_FINITE,
    SUPPORTED,
    TRANSPOSED,
    Layer,
    WeightTechnique,
    changed,
    check_checkpoints_config,
    first_batches,
    linear_map,
    treat_weights,
)
from rimet.nn import BaseQuantizationMixin
from rimet.ptq_results import LayerEntry, LayerwiseReport, LayerwiseRun, check_fingerprint
from rimet.quantization._ops import range_to_scale_offset
from rimet.quantization.affine import AffineQuantizerBase, GroupedBlockQuantizeDequantize
from rimet.quantsim import QuantizationSimModel, _files

logger = logging.getLogger(__name__)

__all__ = [
    "SeqMseParams",
    "SequentialMse",
    "apply_seq_mse",
    "get_candidates",
    "optimize_module",
]

SUPPORTED_MODULES = SUPPORTED
"""Kinds of layers whose weight quantizers are treated."""

_SYMMETRIES = ("symqt", "symfp", "asym")
_LOSSES = ("mse", "l1", "sqnr")
_SHARED_RANGES = ("widest", "sum")


def default_forward_fn(model: nn.Module, inputs: Any) -> Any:
    """Runs a model on a batch: a tensor, positional arguments, or a dict of keyword arguments,
    moved to the model's device.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, dict):
        return model(**{name: moved(value) for name, value in inputs.items()})
    if isinstance(inputs, list | tuple):
        return model(*map(moved, inputs))
    return model(moved(inputs))


@dataclass
class SeqMseParams:
    """Settings of Sequential MSE.

    Attributes:
        num_batches: how many batches of the loader to use; None: all.
        num_candidates: ranges tried per encoding.
        inp_symmetry: whose inputs the compared outputs ``W x`` and ``W' x'`` come from:
            ``symqt`` both of the quantized model, ``symfp`` both of the floating-point model,
            ``asym`` each of its own.
        loss_fn: ``mse``, ``l1`` or ``sqnr`` of the outputs.
        forward_fn: called with a model and a batch, runs the model on it.
        shared_range: what output channels that share a range (per-tensor grids) get: ``widest`` of
            the ranges that each would choose for itself, as in AIMET, or that of the least ``sum`` of
            their losses.

    Raises:
        ValueError: another symmetry, loss or shared range, or fewer than one candidate.
    """

    num_batches: int | None
    num_candidates: int = 20
    inp_symmetry: str = "symqt"
    loss_fn: str = "mse"
    forward_fn: ForwardFn = default_forward_fn
    shared_range: str = "widest"

    def __post_init__(self) -> None:
        if self.inp_symmetry not in _SYMMETRIES:
            raise ValueError(
                f"inp_symmetry: expected one of {', '.join(_SYMMETRIES)}, got {self.inp_symmetry!r}"
            )
        if self.loss_fn not in _LOSSES:
            raise ValueError(f"loss_fn: expected one of {', '.join(_LOSSES)}, got {self.loss_fn!r}")
        if self.shared_range not in _SHARED_RANGES:
            raise ValueError(
                f"shared_range: expected one of {', '.join(_SHARED_RANGES)}, got "
                f"{self.shared_range!r}"
            )
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates: expected 1 or more, got {self.num_candidates}")

    def get_loss_fn(self) -> Callable[..., Tensor]:
        """The loss as a function of two tensors, the last dimension counting channels, and
        ``reduction`` (``"none"``, ``"sum"`` or ``"mean"``).
        """
        losses: dict[str, Callable[..., Tensor]] = {
            "mse": nn.functional.mse_loss,
            "l1": nn.functional.l1_loss,
            "sqnr": _negative_sqnr,
        }
        return losses[self.loss_fn]


def _negative_sqnr(pred: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """Noise over signal in decibels, for each channel (last dimension)."""
    dims = tuple(range(target.dim() - 1))
    noise = (pred - target).square().sum(dims).clamp_min(1e-30)
    signal = target.square().sum(dims).clamp_min(1e-30)
    decibels = 10 * torch.log10(noise / signal)
    if reduction == "none":
        return decibels
    return decibels.sum() if reduction == "sum" else decibels.mean()


_Apply = TypeVar("_Apply", bound=Callable[..., LayerwiseReport])


def _also_as_in_2_0(function: _Apply) -> _Apply:
    """Lets a call with a model come first through, as AIMET 2.0 had it."""

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> LayerwiseReport:
        if "model" not in kwargs and not (args and isinstance(args[0], nn.Module)):
            return function(*args, **kwargs)
        warnings.warn(
            "apply_seq_mse(model, sim, data_loader, params, ...) is AIMET 2.0's form; use "
            "apply_seq_mse(sim, data_loader, ...)",
            DeprecationWarning,
            stacklevel=2,
        )
        return SequentialMse.apply_seq_mse(*args, **kwargs)

    return cast(_Apply, either)


@_also_as_in_2_0
def apply_seq_mse(
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    num_candidates: int = 20,
    forward_fn: ForwardFn = default_forward_fn,
    modules_to_exclude: Sequence[nn.Module] | None = None,
    checkpoints_config: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    inp_symmetry: str = "symqt",
    loss_fn: str = "mse",
    shared_range: str = "widest",
    results_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> LayerwiseReport:
    """Sets and fixes the ranges of a simulation's weight quantizers.

    AIMET 2.0's form, ``apply_seq_mse(model, sim, data_loader, params, ...)``, is
    :meth:`SequentialMse.apply_seq_mse`; this function still takes it, with a warning.

    Candidates are parts of the calibrated range, so weight quantizers without a range are
    calibrated first. Treated are Linear, Conv and ConvTranspose layers of any weight bit-width,
    with per-tensor, per-channel, blockwise and grouped-block grids; a block of input channels
    counts with its own part of the output. Call it before ``compute_encodings``, since activations
    change.

    Args:
        sim: the simulation; on an error it stays as it was.
        data_loader: yields calibration batches.
        num_candidates: ranges tried per encoding.
        forward_fn: called with a model and a batch, runs the model on it.
        modules_to_exclude: modules of ``sim.model`` (2.0 form: or of ``model``) that keep the range
            of their own calibration.
        checkpoints_config: JSON file that tells AIMET where to cache; read and checked, but not
            needed here, since activations are carried from layer to layer.
        cache_dir: folder as AIMET's: ``running_module_names.txt`` and ``{module}.safetensors`` with
            ``min`` and ``max`` of finished layers, and in the metadata what they were made from.
            Those that are there are taken over; those of another run are refused. Those that AIMET
            wrote do not say what they were made from, and are taken with a warning.
        inp_symmetry: see :class:`SeqMseParams`.
        loss_fn: see :class:`SeqMseParams`.
        shared_range: see :class:`SeqMseParams`.
        results_dir: folder for the results of finished layers, with reports; a second run with the
            same data and settings takes them up, one with others is refused.
        memory_budget: bytes of activations in memory at once; None: a quarter of what is free.
        progress: whether to show progress bars.

    Returns:
        What was done, layer by layer. (AIMET returns nothing.)

    Raises:
        ValueError: settings outside their range, modules that are not in the model, a
            ``checkpoints_config`` that is none.
        FingerprintMismatchError: ``results_dir`` or ``cache_dir`` holds the results of another run.
    """
    check_checkpoints_config(checkpoints_config)
    params = SeqMseParams(None, num_candidates, inp_symmetry, loss_fn, forward_fn, shared_range)
    excluded = list(modules_to_exclude or ())
    return _run(sim, data_loader, params, excluded, cache_dir, results_dir, memory_budget, progress)


def _run(
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    params: SeqMseParams,
    excluded: Collection[nn.Module],
    cache_dir: str | os.PathLike[str] | None,
    results_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> LayerwiseReport:
    batches = first_batches(data_loader, params.num_batches)
    return treat_weights(
        _SequentialMse(params, _Cache(cache_dir), progress),
        sim,
        batches,
        needs_float_model=params.inp_symmetry != "symqt",
        excluded=excluded,
        forward_fn=None if params.forward_fn is default_forward_fn else params.forward_fn,
        memory_budget=memory_budget,
        results_dir=results_dir,
        recalibrate=True,
    )


class _SequentialMse(WeightTechnique):
    """Chooses the ranges of weights."""

    name = "Sequential MSE"

    def __init__(self, params: SeqMseParams, cache: _Cache, progress: bool) -> None:
        self.settings = {
            "num_candidates": params.num_candidates,
            "inp_symmetry": params.inp_symmetry,
            "loss_fn": params.loss_fn,
            "shared_range": params.shared_range,
        }
        self.progress = progress
        self.folder = cache.folder
        self._cache = cache

    def treat(self, layer: Layer, visit: Visit, entry: LayerEntry) -> None:
        cached = self._cache.load(layer, self.made_from)
        if cached is not None:
            entry.done(cached, note="its range is that of cache_dir", resumed=True)
            return
        self.optimize(layer, visit.float_inputs, visit.quant_inputs, entry, own_scales=True)

    def keep(self, layer: Layer, tensors: dict[str, Tensor]) -> None:
        self._cache.store(layer.path, tensors, self.made_from)

    def optimize(
        self,
        layer: Layer,
        float_inputs: Sequence[Tensor],
        quant_inputs: Sequence[Tensor],
        entry: LayerEntry,
        own_scales: bool = False,
    ) -> None:
        """Chooses a layer's range, given its inputs by batch.

        ``own_scales``: blocks that share two-level scales (LPBQ) choose as if each had its own, and
        the losses are those of the own scales. The choices of a group's blocks differ, so that the
        scales they end with are none of those that a search with two-level scales compares.
        """
        quantizer = layer.quantizer
        # A spilled tensor is a mapped file: the list holds no memory of its own.
        wanted = {"symqt": (False, True), "symfp": (True, False), "asym": (True, True)}
        use_float, use_quant = wanted[self.settings["inp_symmetry"]]
        inputs = list(float_inputs) if use_float else [], list(quant_inputs) if use_quant else []
        is_grouped = isinstance(quantizer, GroupedBlockQuantizeDequantize)
        low, high = quantizer.get_min(), quantizer.get_max()
        if is_grouped and own_scales:
            scale, offset = range_to_scale_offset(
                quantizer.min.detach(),
                quantizer.max.detach(),
                quantizer.qmin,
                quantizer.qmax,
                quantizer.symmetric,
            )
            low, high = (quantizer.qmin + offset) * scale, (quantizer.qmax + offset) * scale
        assert low is not None and high is not None
        shape, blocks, axis = list(quantizer.shape), layer.block_size, None
        dims = layer.module.weight.dim()
        output_axis = 1 if isinstance(layer.module, TRANSPOSED) else 0
        channels = layer.module.weight.shape[output_axis]
        whole = [1] * (dims - len(shape)) + shape
        is_shared = whole[output_axis] == 1 < channels and not is_grouped
        if is_shared and self.settings["shared_range"] == "widest":
            # Each output channel chooses for itself, and the widest choice serves all.
            axis = output_axis
            shape = [channels if i == axis else n for i, n in enumerate(whole)]
            if blocks is not None:
                blocks = [1] * (dims - len(blocks)) + blocks
                blocks[axis] = 1
            low, high = low.expand(shape), high.expand(shape)
        grouping = None
        if isinstance(quantizer, GroupedBlockQuantizeDequantize) and not own_scales:
            levels = 2 ** (quantizer.decompressed_bw - quantizer.bitwidth)
            grouping = (list(quantizer.block_grouping), levels)
        candidates = self.settings["num_candidates"]
        with (
            self.steps(layer, candidates) as progress,
            # The model may have run under autocast; the engine says itself what it computes in what type.
            torch.autocast(layer.module.weight.device.type, enabled=False),
        ):
            result: dict[str, Any] = _core.seq_mse_layer(
                linear_map(layer.module),
                layer.module.weight,
                low,
                high,
                *inputs,
                qmin=quantizer.qmin,
                qmax=quantizer.qmax,
                symmetric=quantizer.symmetric,
                shape=shape,
                block_size=blocks,
                grouping=grouping,
                num_candidates=candidates,
                inp_symmetry=self.settings["inp_symmetry"],
                loss=self.settings["loss_fn"],
                shared_axis=axis,
                memory=self.memory,
                progress=progress,
            )
        details = {"bitwidth": quantizer.bitwidth, "method": result["method"]}
        if not math.isfinite(result["loss_after"]):
            # No candidate is better than another.
            kept = {"min": quantizer.min.detach().clone(), "max": quantizer.max.detach().clone()}
            note = f"its range stays that of its calibration: {NOT_FINITE}"
            logger.warning("%s: %s", layer.path, note)
            entry.done(kept, note=note, **details)
            return
        low, high = result["min"], result["max"]
        if axis is not None:
            low = low.select(axis, 0).reshape(quantizer.shape)
            high = high.select(axis, 0).reshape(quantizer.shape)
        entry.done(
            {"min": low, "max": high},
            loss_before=result["loss_before"],
            loss_after=result["loss_after"],
            **details,
        )

    def apply(self, layer: Layer, tensors: dict[str, Tensor]) -> None:
        with changed(layer):
            layer.quantizer.set_range(tensors["min"], tensors["max"])


class _Cache:
    """AIMET's folder of optimized ranges.

    Attributes:
        folder: None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._names: list[str] = []
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _files.remove_unfinished(self.folder)
        if self._list.exists():
            self._names = self._list.read_text(encoding="utf-8").split()

    @property
    def _list(self) -> Path:
        assert self.folder is not None
        return self.folder / "running_module_names.txt"

    def load(self, layer: Layer, made_from: Mapping[str, str]) -> dict[str, Tensor] | None:
        """A layer's range, and what :meth:`store` was given with it; None if it is not there."""
        if self.folder is None or layer.path not in self._names:
            return None
        name = f"{layer.path}.safetensors"
        with safe_open(self.folder / name, "pt") as file:
            tensors = {key.rpartition(".")[2]: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        missing = {"min", "max"} - set(tensors)
        if missing:
            raise ValueError(f"cache_dir: {name}: expected min and max, got {sorted(tensors)}")
        shape = tuple(layer.quantizer.shape)
        for key in ("min", "max"):
            if tuple(tensors[key].shape) != shape:
                raise ValueError(
                    f"cache_dir: {name}: {key}: expected the shape {shape} of the grid, got "
                    f"{tuple(tensors[key].shape)}"
                )
        if "made_from" in metadata:
            check_fingerprint(self.folder, made_from, json.loads(metadata["made_from"]))
            tensors["inputs"] = torch.tensor(json.loads(metadata["inputs"]), dtype=torch.float64)
        else:
            logger.warning(
                "cache_dir: %s does not say what it was made from; its range is taken as it is",
                name,
            )
        return tensors

    def store(self, path: str, tensors: dict[str, Tensor], made_from: Mapping[str, str]) -> None:
        """Keeps a layer's range, unless it is there.

        Args:
            path: of the layer.
            tensors: ``min``, ``max``, and ``inputs``, which goes into the metadata: AIMET loads all
                tensors into the quantizer.
            made_from: what the range depends on.
        """
        if self.folder is None or path in self._names:
            return
        ready = {name: tensors[name].detach().cpu().contiguous() for name in ("min", "max")}
        metadata = {
            "made_from": json.dumps(dict(made_from)),
            "inputs": json.dumps(tensors["inputs"].tolist()),
        }
        with _files.atomic_path(self.folder / f"{path}.safetensors") as part:
            save_file(ready, part, metadata)
        self._names.append(path)
        _files.write_text(self._list, "\n".join(self._names) + "\n")


class SequentialMse:
    """The technique's parts, for single modules and for looking into."""

    @classmethod
    def apply_seq_mse(
        cls,
        model: nn.Module,
        sim: QuantizationSimModel,
        data_loader: Iterable[Any],
        params: SeqMseParams,
        modules_to_exclude: Sequence[nn.Module] | None = None,
        checkpoints_config: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> LayerwiseReport:
        """AIMET 2.0's form of :func:`apply_seq_mse`.

        Args:
            model: the floating-point model; modules to exclude may be its own.
            sim: its simulation.
            data_loader: yields calibration batches.
            params: settings.
            modules_to_exclude: modules of ``model`` or of ``sim.model``.
            checkpoints_config: see :func:`apply_seq_mse`.
            cache_dir: see :func:`apply_seq_mse`.
        """
        known = {id(module): path for path, module in model.named_modules()}
        excluded = [
            sim.model.get_submodule(known[id(m)]) if id(m) in known else m
            for m in modules_to_exclude or ()
        ]
        check_checkpoints_config(checkpoints_config)
        return _run(sim, data_loader, params, excluded, cache_dir)

    @staticmethod
    def get_candidates(
        num_candidates: int, per_channel_max: Tensor, per_channel_min: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """``(max, min)`` of each candidate: the ends times ``i / num_candidates``."""
        return [
            (per_channel_max / num_candidates * i, per_channel_min / num_candidates * i)
            for i in range(1, num_candidates + 1)
        ]

    @staticmethod
    def compute_recon_loss(xqwq: Tensor, xw: Tensor, params: SeqMseParams) -> Tensor:
        """Loss of each output channel (last dimension)."""
        loss = params.get_loss_fn()(xqwq, xw, reduction="none")
        return loss.sum(tuple(range(loss.dim() - 1))) if params.loss_fn != "sqnr" else loss

    @classmethod
    def optimize_module(
        cls,
        quant_module: BaseQuantizationMixin,
        x: Sequence[Tensor] | Tensor,
        xq: Sequence[Tensor] | Tensor,
        params: SeqMseParams,
    ) -> None:
        """Sets and fixes the range of one module's weight quantizer.

        Args:
            quant_module: quantized Linear, Conv or ConvTranspose; its weight quantizer is
                calibrated.
            x: its inputs in the floating-point model, one tensor per batch (or stacked).
            xq: its inputs in the quantized model.
            params: settings; at most ``num_batches`` batches are used.

        Raises:
            TypeError: another kind of module.
            ValueError: a weight quantizer without an integer grid or without a range.
        """
        quantizer: Any = quant_module.param_quantizers["weight"]
        if not isinstance(quantizer, AffineQuantizerBase) or not quantizer.is_initialized():
            raise ValueError(
                "quant_module: expected a calibrated affine quantizer of its weight, got "
                f"{quantizer!r}"
            )
        name = type(quant_module).__name__
        layer = Layer(name, quant_module, quantizer)
        technique = _SequentialMse(params, _Cache(None), progress=False)
        batches = slice(params.num_batches or None)
        with LayerwiseRun(technique.name).layer(name, name) as entry:
            technique.optimize(layer, list(x)[batches], list(xq)[batches], entry)
        technique.apply(layer, entry.tensors)
        quantizer.allow_overwrite(False)
        quantizer.requires_grad_(False)


get_candidates = SequentialMse.get_candidates
optimize_module = SequentialMse.optimize_module
