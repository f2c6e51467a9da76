"""The layers of a simulation whose weights AdaRound and Sequential MSE treat, how such a layer maps
its weights to outputs, and the loop over them.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rimet import _core
from rimet._graph.inputs import ForwardFn
from rimet._graph.streaming import StreamingWalk, Visit
from rimet.nn import BaseQuantizationMixin, compute_param_encodings, reuse
from rimet.ptq_results import (
    FingerprintMismatchError,
    LayerEntry,
    LayerReport,
    LayerwiseReport,
    LayerwiseRun,
    data_hash,
    fingerprint,
)
from rimet.quantization.affine import AffineQuantizerBase
from rimet.quantsim import QuantizationSimModel, _placing

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Kinds of layers that are treated: their output is linear in their weight."""

NOT_FINITE = "its inputs or its weight hold infinities, NaN, or numbers near the largest"
"""Why a layer's losses are no numbers."""


def linear_map(module: nn.Module) -> _core.LinearMap:
    """How a layer of a supported kind turns inputs into outputs.

    Raises:
        TypeError: another kind.
    """
    if isinstance(module, nn.Linear):
        return _core.LinearMap.linear()
    if not isinstance(module, CONVOLUTIONS + TRANSPOSED):
        raise TypeError(f"expected Linear, Conv or ConvTranspose, got {type(module).__name__}")
    dims = len(module.kernel_size)
    padding, pad = module.padding, None
    if isinstance(padding, str) or module.padding_mode != "zeros":
        # What the module's forward does ahead of the convolution; left and right may differ.
        pad = list(module._reversed_padding_repeated_twice)
        padding = (0,) * dims
    return _core.LinearMap.convolution(
        stride=list(module.stride),
        padding=list(padding),
        dilation=list(module.dilation),
        output_padding=list(module.output_padding),
        transposed=isinstance(module, TRANSPOSED),
        groups=module.groups,
        pad=pad,
        pad_mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )


# Layers


@dataclass
class Layer:
    """A layer of a simulation whose weight has an integer grid."""

    path: str
    module: Any
    quantizer: AffineQuantizerBase

    @property
    def block_size(self) -> list[int] | None:
        """Of the grid, as the engine takes it."""
        sizes = self.quantizer.block_size
        return None if sizes is None else list(sizes)

    def grid(self) -> dict[str, Any]:
        """What, beside its range, makes the grid; values that JSON can hold."""
        grouping = getattr(self.quantizer, "block_grouping", None)
        return {
            "qmin": self.quantizer.qmin,
            "qmax": self.quantizer.qmax,
            "symmetric": self.quantizer.symmetric,
            "shape": list(self.quantizer.shape),
            "block_size": self.block_size,
            "block_grouping": None if grouping is None else list(grouping),
            "decompressed_bw": getattr(self.quantizer, "decompressed_bw", None),
        }


def weight_layers(
    sim: QuantizationSimModel, excluded: Iterable[nn.Module] = ()
) -> tuple[list[Layer], list[LayerReport]]:
    """The layers of a simulation that can be treated, and why others with parameters that could be
    quantized cannot.
    """
    chosen = {id(module) for outer in excluded for module in outer.modules()}
    layers: list[Layer] = []
    skipped: list[LayerReport] = []
    owners: dict[int, str] = {}

    def skip(path: str, module: object, reason: str | None) -> None:
        skipped.append(LayerReport(path, type(module).__name__, "skipped", reason))
        logger.info("%s is skipped: %s", path, reason)

    for path, module in sim.named_qmodules():
        quantizers: Any = module.param_quantizers
        weight = getattr(module, "weight", None)
        other_kind = f"a {type(module).__name__} is no Linear, Conv or ConvTranspose"
        if not isinstance(weight, Tensor):
            if any(isinstance(getattr(module, name, None), Tensor) for name in quantizers):
                skip(path, module, other_kind)  # a recurrent layer
            continue
        quantizer = quantizers["weight"] if "weight" in quantizers else None
        reason = None
        if id(module) in chosen:
            reason = "excluded by the caller"
        elif not isinstance(module, SUPPORTED):
            reason = other_kind
        elif quantizer is None:
            reason = "its weight is not quantized"
        elif not isinstance(quantizer, AffineQuantizerBase):
            reason = "its weight's quantizer has no integer grid"
        elif quantizer.zero_point_shift:
            reason = "its weight's grid has no zero"
        elif id(weight) in owners:
            reason = f"its weight is that of {owners[id(weight)]}, which is treated"
        if reason is None and isinstance(quantizer, AffineQuantizerBase):
            owners[id(weight)] = path
            layers.append(Layer(path, module, quantizer))
        else:
            skip(path, module, reason)
    for path, module in sim.model.named_modules():
        if isinstance(module, SUPPORTED) and not isinstance(module, BaseQuantizationMixin):
            skip(path, module, "it is not quantized")
    return layers, skipped


@contextlib.contextmanager
def only_weights_quantized(sim: QuantizationSimModel, layers: Sequence[Layer]) -> Iterator[None]:
    """Takes away the quantizers of activations, and of parameters of other modules than the layers,
    until the block ends.
    """
    treated = {id(layer.module) for layer in layers}
    with contextlib.ExitStack() as stack:
        for module in sim.qmodules():
            stack.enter_context(module._remove_activation_quantizers())
            if id(module) not in treated:
                stack.enter_context(module._remove_param_quantizers())
            else:
                others = [name for name in module.param_quantizers if name != "weight"]
                stack.enter_context(module._remove_param_quantizers(others))
        yield


def paths_of(model: nn.Module, modules: Iterable[nn.Module], argument: str) -> list[str]:
    """Paths of modules of a model.

    Raises:
        ValueError: one of them is not in the model.
    """
    known = {id(module): path for path, module in model.named_modules()}
    modules = list(modules)
    missing = [type(module).__name__ for module in modules if id(module) not in known]
    if missing:
        raise ValueError(
            f"{argument}: expected modules of the model, but {len(missing)} of {len(modules)} are "
            f"not: {', '.join(missing[:5])}"
        )
    return [known[id(module)] for module in modules]


# The loop


class WeightTechnique(abc.ABC):
    """What is done to the weight, or to its grid, of one layer after the other.

    Attributes:
        name: of the technique.
        settings: what its results depend on besides model, data and seed; values that JSON can
            hold.
        progress: whether to show progress bars.
        memory: bytes for a layer's inputs, and what is made of them, at a time; None: as the engine
            likes.
        folder: of its own that it keeps results in, besides ``results_dir``; None: there is none.
        changes_weights: whether it changes the weights, and not only their ranges.
        made_from: what the results of this run depend on, see :func:`fingerprint`; empty if none
            are kept.
    """

    name: str
    settings: dict[str, Any]
    progress: bool
    memory: int | None = None
    folder: Path | None = None
    changes_weights: bool = False
    made_from: Mapping[str, str] = MappingProxyType({})

    @abc.abstractmethod
    def treat(self, layer: Layer, visit: Visit, entry: LayerEntry) -> None:
        """Finds the layer's new tensors; ends with ``entry.done``."""

    @abc.abstractmethod
    def apply(self, layer: Layer, tensors: dict[str, Tensor]) -> None:
        """Sets tensors of a layer."""

    def keep(self, layer: Layer, tensors: dict[str, Tensor]) -> None:  # noqa: B027  (optional)
        """Writes a layer's tensors into :attr:`folder`."""

    @contextlib.contextmanager
    def steps(self, layer: Layer, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over the steps of a layer; yields what the number done is told to."""
        with tqdm(total=total, desc=layer.path, leave=False, disable=not self.progress) as bar:
            yield lambda done: bar.update(done - bar.n)


def treat_weights(
    technique: WeightTechnique,
    sim: QuantizationSimModel,
    batches: Iterable[Any],
    *,
    needs_float_model: bool,
    excluded: Collection[nn.Module] = (),
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    recalibrate: bool = False,
) -> LayerwiseReport:
    """Treats the layers of a simulation in the order in which they run, each given those before it.

    Only the weights of the treated layers are quantized meanwhile. Afterwards their ranges are
    fixed: neither calibration nor training moves them.

    Args:
        technique: what is done to each.
        sim: the simulation; its layers' weights are calibrated. On an error, Ctrl-C included, what
            was done to it is taken back, calibration too.
        batches: calibration data, see :class:`StreamingWalk`.
        needs_float_model: whether the technique looks at the floating-point model's activations.
        excluded: modules of ``sim.model`` that are left out, with all inside them.
        forward_fn: see :class:`StreamingWalk`.
        seed: of the run.
        memory_budget: see :class:`StreamingWalk`.
        results_dir: folder that keeps the results of finished layers, see :class:`LayerwiseRun`.
        recalibrate: whether all parameters are calibrated anew, also those with a range.

    Returns:
        What was done to each layer.

    Raises:
        ValueError: ``excluded`` holds modules that are not in ``sim.model``.
        FingerprintMismatchError: ``results_dir``, or the technique's own folder, holds the results
            of another run.
    """
    began = time.perf_counter()
    paths_of(sim.model, excluded, "modules_to_exclude")
    layers, skipped = weight_layers(sim, excluded)
    by_path = {layer.path: layer for layer in layers}
    float_model = None
    if needs_float_model:
        original = QuantizationSimModel.get_original_model(sim.model)
        float_model = _placing.take_apart(original, sim.model)
    walk = StreamingWalk(
        float_model,
        sim.model,
        batches,
        forward_fn,
        memory_budget,
        seed=seed,
        progress=technique.name if technique.progress else None,
    )
    technique.memory = walk.technique_bytes
    with contextlib.ExitStack() as undo:
        undo.callback(_to_restore_ranges(sim))
        if recalibrate:
            compute_param_encodings(sim.model)
        for layer in layers:
            if not layer.quantizer.is_initialized():
                compute_param_encodings(layer.module)
            if technique.changes_weights:
                undo.callback(set_weight, layer, layer.module.weight.detach().clone())
        with only_weights_quantized(sim, layers):
            if results_dir is not None or technique.folder is not None:
                settings = {**technique.settings, "grids": {x.path: x.grid() for x in layers}}
                technique.made_from = fingerprint(
                    sim.model, settings, seed, data_hash(walk.batches)
                )
            run = LayerwiseRun(technique.name, results_dir, technique.made_from)
            for visit in walk.visit(by_path):
                layer = by_path[visit.path]
                kind = type(layer.module).__name__
                with _naming(layer), run.layer(layer.path, kind) as entry:
                    if entry.stored is None:
                        technique.treat(layer, visit, entry)
                    _check_inputs(layer, visit, entry, technique.folder or results_dir)
                    technique.keep(layer, entry.tensors)
                    technique.apply(layer, entry.tensors)
                walk.note(run.report[layer.path].losses())
        undo.pop_all()
    for path in walk.report.visited:
        by_path[path].quantizer.allow_overwrite(False)
        by_path[path].quantizer.requires_grad_(False)
    for path, reason in walk.report.not_run.items():
        run.skip(path, type(by_path[path].module).__name__, reason)
    run.report.layers += skipped
    run.report.walk = asdict(walk.report)
    run.report.seconds = time.perf_counter() - began
    return run.report


def _to_restore_ranges(sim: QuantizationSimModel) -> Callable[[], None]:
    """What gives the parameter quantizers of a simulation the ranges back that they have now."""
    states = [
        (module, copy.deepcopy(module.param_quantizers.state_dict())) for module in sim.qmodules()
    ]

    def restore() -> None:
        for module, state in states:
            reuse.forget(module)
            module.param_quantizers.load_state_dict(state)

    return restore


@contextlib.contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Puts the layer's path before what the engine says of its arguments."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(f"{layer.path} ({type(layer.module).__name__}): {error}") from error


def _check_inputs(
    layer: Layer, visit: Visit, entry: LayerEntry, folder: str | os.PathLike[str] | None
) -> None:
    """Adds mean and root mean square of the layer's first input (the first sample of the first
    batch) to its tensors; if an earlier run kept the layer's tensors, compares these numbers instead.

    They depend on what no fingerprint holds: ``forward_fn``, and the code of the model.

    Raises:
        FingerprintMismatchError: they differ by more than rounding does.
    """
    inputs = visit.quant_inputs[0][:1]
    size = torch.linalg.vector_norm(inputs, dtype=torch.float64) / max(inputs.numel(), 1) ** 0.5
    seen = torch.stack([inputs.mean(dtype=torch.float64), size]).cpu()
    kept = entry.tensors.setdefault("inputs", seen)
    # Another machine or number of threads rounds differently, by far less than this.
    if folder is not None and bool(((kept - seen).abs() > 1e-3 * seen[1]).any()):
        raise FingerprintMismatchError(
            Path(folder), ["forward_fn, or model that has the same weights"], f" at {layer.path}"
        )


@contextlib.contextmanager
def changed(layer: Layer) -> Iterator[None]:
    """For changing a layer's weight or grid: what was computed from them is forgotten."""
    reuse.forget(layer.module)
    with torch.no_grad():
        yield


def set_weight(layer: Layer, weight: Tensor) -> None:
    """Changes a layer's weight, in place."""
    with changed(layer):
        layer.module.weight.copy_(weight)


# Settings

_CHECKPOINT_KEYS = {
    "grouped_modules",
    "include_static_inputs",
    "cache_on_cpu",
    "checkpoint_type",
    "cached_blocks",
}


def check_checkpoints_config(path: str | None) -> None:
    """Checks a file that tells AIMET where to cache activations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no JSON object, or keys that are not AIMET's.
    """
    if path is None:
        return
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoints_config: {path}: {error}") from None
    unknown = set(config) - _CHECKPOINT_KEYS if isinstance(config, dict) else {"no JSON object"}
    if unknown:
        raise ValueError(
            f"checkpoints_config: {path}: expected keys {', '.join(sorted(_CHECKPOINT_KEYS))}, got "
            f"{', '.join(sorted(unknown))}"
        )
    logger.info("checkpoints_config is not needed: activations are carried from layer to layer")


def first_batches(loader: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
    """The first batches of a loader, or all.

    Raises:
        ValueError: the loader has fewer; said at once where it knows its length.
    """
    length = None
    with contextlib.suppress(TypeError):  # a stream's DataLoader has a length that it does not know
        length = len(loader)  # type: ignore[arg-type]

    def problem(found: int) -> ValueError:
        return ValueError(
            f"num_batches: expected at most the {found} batches of the loader, got {num_batches}"
        )

    if length is not None and num_batches is not None and num_batches > length:
        raise problem(length)

    def batches() -> Iterator[Any]:
        count = 0
        for count, batch in enumerate(itertools.islice(loader, num_batches), 1):  # noqa: B007
            yield batch
        if num_batches is not None and count < num_batches:
            raise problem(count)

    return batches()
