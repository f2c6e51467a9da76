"""Sequential MSE: ranges of weight quantizers that keep each layer's output closest.

Layer after layer, every encoding of the weight takes that of the candidates ``full range * i / N``
whose output differs least on calibration data, given the layers treated before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rimet import _core
from rimet._graph.streaming import StreamingWalk
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
from rimet.nn import BaseQuantizationMixin, compute_param_encodings, reuse
from rimet.quantization.affine import AffineQuantizerBase, GroupedBlockQuantizeDequantize
from rimet.quantsim import QuantizationSimModel, _files

__all__ = [
    "LayerReport",
    "Report",
    "SeqMseParams",
    "SequentialMse",
    "apply_seq_mse",
    "get_candidates",
    "optimize_module",
]

logger = logging.getLogger(__name__)

SUPPORTED_MODULES = SUPPORTED
"""Kinds of layers whose weight quantizers are treated."""

ForwardFn = Callable[[nn.Module, Any], Any]

_SYMMETRIES = ("symqt", "symfp", "asym")
_LOSSES = ("mse", "l1", "sqnr")


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

    Raises:
        ValueError: another symmetry or loss, or fewer than one candidate.
    """

    num_batches: int | None
    num_candidates: int = 20
    inp_symmetry: str = "symqt"
    loss_fn: str = "mse"
    forward_fn: ForwardFn = default_forward_fn

    def __post_init__(self) -> None:
        if self.inp_symmetry not in _SYMMETRIES:
            raise ValueError(
                f"inp_symmetry: expected one of {', '.join(_SYMMETRIES)}, got {self.inp_symmetry!r}"
            )
        if self.loss_fn not in _LOSSES:
            raise ValueError(f"loss_fn: expected one of {', '.join(_LOSSES)}, got {self.loss_fn!r}")
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


@overload
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
    results_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Report: ...


@overload
def apply_seq_mse(
    model: nn.Module,
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    params: SeqMseParams,
    modules_to_exclude: Sequence[nn.Module] | None = None,
    checkpoints_config: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Report: ...


def apply_seq_mse(*args: Any, **kwargs: Any) -> Report:
    """Sets and fixes the ranges of a simulation's weight quantizers.

    ``apply_seq_mse(sim, data_loader, ...)``, or as AIMET 2.0 had it, with a warning,
    ``apply_seq_mse(model, sim, data_loader, params, ...)``.

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
            ``min`` and ``max`` of finished layers. Those that are there are taken as they are.
        inp_symmetry: see :class:`SeqMseParams`.
        loss_fn: see :class:`SeqMseParams`.
        results_dir: folder for the results of finished layers, with reports; a second run with the
            same data and settings takes them up, one with others is refused.
        memory_budget: bytes of activations in memory at once; None: a quarter of what is free.
        progress: whether to show progress bars.

    Returns:
        What was done, layer by layer. (AIMET returns nothing.)

    Raises:
        ValueError: settings outside their range, results of another run in ``results_dir``, a
            ``checkpoints_config`` that is none.
    """
    first = args[0] if args else kwargs.get("sim")
    if isinstance(first, QuantizationSimModel) and "model" not in kwargs:
        return _apply(*args, **kwargs)
    warnings.warn(
        "apply_seq_mse(model, sim, data_loader, params, ...) is AIMET 2.0's form; use "
        "apply_seq_mse(sim, data_loader, ...)",
        DeprecationWarning,
        stacklevel=2,
    )
    return _apply_with_model(*args, **kwargs)


def _apply_with_model(
    model: nn.Module,
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    params: SeqMseParams,
    modules_to_exclude: Sequence[nn.Module] | None = None,
    checkpoints_config: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Report:
    known = {id(module): path for path, module in model.named_modules()}
    excluded = [
        sim.model.get_submodule(known[id(m)]) if id(m) in known else m
        for m in modules_to_exclude or ()
    ]
    check_checkpoints_config(checkpoints_config)
    return _run(sim, data_loader, params, excluded, cache_dir)


def _apply(
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
    results_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Report:
    check_checkpoints_config(checkpoints_config)
    params = SeqMseParams(None, num_candidates, inp_symmetry, loss_fn, forward_fn)
    excluded = list(modules_to_exclude or ())
    return _run(sim, data_loader, params, excluded, cache_dir, results_dir, memory_budget, progress)


def _run(
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    params: SeqMseParams,
    excluded: Collection[nn.Module],
    cache_dir: str | os.PathLike[str] | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Report:
    began = time.perf_counter()
    paths_of(sim.model, excluded, "modules_to_exclude")
    batches = Batches(data_loader, params.num_batches)
    compute_param_encodings(sim.model)
    layers, skipped = weight_layers(sim, excluded)
    by_path = {layer.path: layer for layer in layers}
    needs_float = params.inp_symmetry != "symqt"
    float_model = QuantizationSimModel.get_original_model(sim.model) if needs_float else None
    fingerprint = {
        "technique": "seq_mse",
        "num_candidates": params.num_candidates,
        "inp_symmetry": params.inp_symmetry,
        "loss_fn": params.loss_fn,
        "layers": layers_digest(layers),
    }
    walk = StreamingWalk(
        float_model,
        sim.model,
        batches,
        None if params.forward_fn is default_forward_fn else params.forward_fn,
        memory_budget,
        progress="Sequential MSE" if progress else None,
    )
    report = Report("Sequential MSE")
    cache = _Cache(cache_dir)
    results: LayerResults | None = None
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(_set_range, layer, *_range_of(layer))
        with only_weights_quantized(sim, layers):
            for visit in walk.visit(by_path):
                if results is None:  # now all batches have gone by
                    fingerprint["data"] = batches.digest()
                    results = LayerResults(results_dir, fingerprint)
                layer = by_path[visit.path]
                finished = cache.load(layer) or results.load(visit.path)
                if finished is None:
                    finished = _optimize_layer(
                        layer, visit.float_inputs, visit.quant_inputs, params, progress
                    )
                    results.store(*finished)
                    cache.store(*finished)
                tensors, layer_report = finished
                _set_range(layer, tensors["min"], tensors["max"])
                report.layers.append(layer_report)
        stack.pop_all()
    for path, reason in walk.report.not_run.items():
        kind = type(by_path[path].module).__name__
        report.layers.append(LayerReport(path, kind, "skipped", reason))
    for layer_report in report.layers:
        if layer_report.status != "skipped":
            _freeze(by_path[layer_report.path].quantizer)
    report.layers += skipped
    report.walk = asdict(walk.report)
    report.seconds = time.perf_counter() - began
    return report


def _range_of(layer: Layer) -> tuple[Tensor, Tensor]:
    return layer.quantizer.min.detach().clone(), layer.quantizer.max.detach().clone()


def _set_range(layer: Layer, low: Tensor, high: Tensor) -> None:
    reuse.forget(layer.module)
    layer.quantizer.set_range(low, high)


def _freeze(quantizer: AffineQuantizerBase) -> None:
    quantizer.allow_overwrite(False)
    quantizer.requires_grad_(False)


def _optimize_layer(
    layer: Layer,
    float_inputs: Sequence[Tensor],
    quant_inputs: Sequence[Tensor],
    params: SeqMseParams,
    progress: bool,
) -> tuple[dict[str, Tensor], LayerReport]:
    began = time.perf_counter()
    quantizer = layer.quantizer
    grouping = None
    if isinstance(quantizer, GroupedBlockQuantizeDequantize):
        levels = 2 ** (quantizer.decompressed_bw - quantizer.bitwidth)
        grouping = (list(quantizer.block_grouping), levels)
    # A spilled tensor is a mapped file: the list holds no memory of its own.
    wanted = {"symqt": (False, True), "symfp": (True, False), "asym": (True, True)}
    use_float, use_quant = wanted[params.inp_symmetry]
    with tqdm(
        total=params.num_candidates, desc=layer.path, leave=False, disable=not progress
    ) as bar:
        result = _core.seq_mse_layer(
            linear_map(layer.module),
            layer.module.weight,
            quantizer.get_min(),
            quantizer.get_max(),
            list(float_inputs) if use_float else [],
            list(quant_inputs) if use_quant else [],
            qmin=quantizer.qmin,
            qmax=quantizer.qmax,
            symmetric=quantizer.symmetric,
            shape=list(quantizer.shape),
            block_size=None if quantizer.block_size is None else list(quantizer.block_size),
            grouping=grouping,
            num_candidates=params.num_candidates,
            inp_symmetry=params.inp_symmetry,
            loss=params.loss_fn,
            progress=lambda done: bar.update(done - bar.n),
        )
    report = LayerReport(
        layer.path,
        type(layer.module).__name__,
        bitwidth=quantizer.bitwidth,
        method=result["method"],
        loss_before=result["loss_before"],
        loss_after=result["loss_after"],
        seconds=time.perf_counter() - began,
    )
    logger.info(
        "%s (%d bits): loss %.4g -> %.4g in %.2f s", layer.path, quantizer.bitwidth,
        report.loss_before, report.loss_after, report.seconds,
    )  # fmt: skip
    return {"min": result["min"], "max": result["max"]}, report


class _Cache:
    """AIMET's folder of optimized ranges."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._names: list[str] = []
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._list.exists():
            self._names = self._list.read_text(encoding="utf-8").split()

    @property
    def _list(self) -> Path:
        assert self._folder is not None
        return self._folder / "running_module_names.txt"

    def load(self, layer: Layer) -> tuple[dict[str, Tensor], LayerReport] | None:
        if self._folder is None or layer.path not in self._names:
            return None
        from safetensors.torch import load_file

        stored = load_file(self._folder / f"{layer.path}.safetensors")
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
        missing = {"min", "max"} - set(tensors)
        if missing:
            raise ValueError(
                f"cache_dir: {layer.path}.safetensors: expected min and max, got {sorted(stored)}"
            )
        kind = type(layer.module).__name__
        return tensors, LayerReport(layer.path, kind, "resumed", "from cache_dir")

    def store(self, tensors: dict[str, Tensor], report: LayerReport) -> None:
        if self._folder is None:
            return
        from safetensors.torch import save_file

        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with _files.atomic_path(self._folder / f"{report.path}.safetensors") as part:
            save_file(ready, part)
        self._names.append(report.path)
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
    ) -> Report:
        """See :func:`apply_seq_mse`."""
        return _apply_with_model(
            model, sim, data_loader, params, modules_to_exclude, checkpoints_config, cache_dir
        )

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
        layer = Layer(type(quant_module).__name__, quant_module, quantizer)
        batches = slice(params.num_batches or None)
        tensors, _ = _optimize_layer(
            layer, list(x)[batches], list(xq)[batches], params, progress=False
        )
        _set_range(layer, tensors["min"], tensors["max"])
        _freeze(quantizer)


get_candidates = SequentialMse.get_candidates
optimize_module = SequentialMse.optimize_module
