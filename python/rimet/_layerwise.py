"""What the techniques that treat one layer after the other share: which layers, how a layer maps its
weights to outputs, results that a later run takes up, and the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rimet import _core
from rimet.quantization.affine import AffineQuantizerBase
from rimet.quantsim import QuantizationSimModel, _files

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Layers whose output is linear in their weight."""


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


# Report


@dataclass
class LayerReport:
    """What was done to a layer.

    Attributes:
        path: of the module.
        kind: class of the module.
        status: ``treated``, ``resumed`` (from the results of an earlier run) or ``skipped``.
        reason: why it was skipped, or what is to be known about its treatment.
        bitwidth: of the weight's quantizer.
        method: how the engine computed, ``gram``, ``rows`` or ``minibatch``.
        loss_before: reconstruction loss ahead of the treatment.
        loss_after: the same after it.
        iterations: steps taken (AdaRound).
        seconds: time the engine took.
    """

    path: str
    kind: str
    status: str = "treated"
    reason: str | None = None
    bitwidth: int | None = None
    method: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    iterations: int | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """What a technique did, layer by layer.

    Attributes:
        technique: its name.
        layers: in the order in which they run; skipped ones last.
        walk: what the executor did: whether it streamed, and its memory (see
            :class:`rimet._graph.streaming.WalkReport`).
        seconds: time in all.
    """

    technique: str
    layers: list[LayerReport] = field(default_factory=list)
    walk: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __getitem__(self, path: str) -> LayerReport:
        """The report of a layer.

        Raises:
            KeyError: there is no such layer.
        """
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def to_json(self) -> str:
        """As a JSON document."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


# Layers


@dataclass
class Layer:
    """A layer of a simulation whose weight has an integer grid."""

    path: str
    module: Any
    quantizer: AffineQuantizerBase


def weight_layers(
    sim: QuantizationSimModel, excluded: Iterable[nn.Module] = ()
) -> tuple[list[Layer], list[LayerReport]]:
    """The layers of a simulation that can be treated, and why others with a weight cannot."""
    chosen = {id(module) for outer in excluded for module in outer.modules()}
    layers: list[Layer] = []
    skipped: list[LayerReport] = []
    owners: dict[int, str] = {}
    for path, module in sim.named_qmodules():
        quantizers: Any = module.param_quantizers
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        quantizer = quantizers["weight"] if "weight" in quantizers else None
        reason = None
        if id(module) in chosen:
            reason = "excluded by the caller"
        elif not isinstance(module, SUPPORTED):
            reason = f"a {type(module).__name__} is not linear in its weight"
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
            skipped.append(LayerReport(path, type(module).__name__, "skipped", reason))
            logger.info("%s is skipped: %s", path, reason)
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


# Data


class Batches:
    """The first batches of a loader, once; keeps a digest of what went by.

    Args:
        loader: an iterable.
        num_batches: how many; None: all.

    Raises:
        ValueError: the loader has fewer.
    """

    def __init__(self, loader: Iterable[Any], num_batches: int | None) -> None:
        self._loader = loader
        self._count = num_batches
        self._digest = hashlib.blake2b(digest_size=16)
        length = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
        if length is not None and num_batches is not None and num_batches > length:
            raise ValueError(
                f"num_batches: expected at most the {length} batches of the loader, got "
                f"{num_batches}"
            )

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in itertools.islice(self._loader, self._count):
            for tensor in _tensors(batch):
                digest_tensor(self._digest, tensor)
            count += 1
            yield batch
        if self._count is not None and count < self._count:
            raise ValueError(
                f"num_batches: expected at most the {count} batches of the loader, got "
                f"{self._count}"
            )

    def digest(self) -> str:
        """Of all tensors so far."""
        return self._digest.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def digest_tensor(digest: Any, tensor: Tensor) -> None:
    """Adds a tensor's shape, dtype and bytes to a hashlib digest."""
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


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


# Results that a later run takes up


class LayerResults:
    """A folder with one safetensors file per finished layer, and ``run.json`` that says of which run.

    Args:
        folder: made if it is not there; None keeps nothing.
        fingerprint: settings and digests that another run must share to take the results up.

    Raises:
        ValueError: the folder holds results of another run.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: dict[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        marker = self._folder / "run.json"
        # Through JSON and back, so that tuples and lists do not differ.
        fingerprint = json.loads(json.dumps(fingerprint))
        if marker.exists():
            found = json.loads(marker.read_text(encoding="utf-8"))
            keys = {**fingerprint, **found}
            differ = sorted(k for k in keys if found.get(k) != fingerprint.get(k))
            if differ:
                raise ValueError(
                    f"{self._folder}: expected results of this run, but its {', '.join(differ)} "
                    "differ; choose another folder, or delete this one"
                )
            # What a killed process was writing.
            for part in self._folder.glob(".*.part"):
                part.unlink()
        else:
            _files.write_text(marker, json.dumps(fingerprint, indent=1) + "\n")

    def load(self, path: str) -> tuple[dict[str, Tensor], LayerReport] | None:
        """Tensors and report of a layer, if it was finished."""
        if self._folder is None:
            return None
        file = self._folder / f"{path}.safetensors"
        if not file.exists():
            return None
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            report = LayerReport(**json.loads((stored.metadata() or {})["report"]))
        report.status = "resumed"
        return tensors, report

    def store(self, tensors: dict[str, Tensor], report: LayerReport) -> None:
        """Keeps a finished layer, whole or not at all."""
        if self._folder is None:
            return
        metadata = {"report": json.dumps(dataclasses.asdict(report))}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with _files.atomic_path(self._folder / f"{report.path}.safetensors") as part:
            save_file(tensors, part, metadata)


def layers_digest(layers: Sequence[Layer]) -> str:
    """Of weights, biases and grids of the layers."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in layers:
        quantizer = layer.quantizer
        grid = (quantizer.qmin, quantizer.qmax, quantizer.symmetric, quantizer.block_size)
        digest.update(f"{layer.path}{grid}{getattr(quantizer, 'block_grouping', None)}".encode())
        bias = getattr(layer.module, "bias", None)
        for tensor in (layer.module.weight, bias, quantizer.min, quantizer.max):
            if tensor is not None:
                digest_tensor(digest, tensor)
    return digest.hexdigest()
