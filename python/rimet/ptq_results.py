"""Results of layer-wise techniques: kept layer by layer, so that a run can be resumed, and reported.

A folder of results holds ``manifest.json`` (format version, technique, fingerprint of the run) and one
safetensors file per layer, with the layer's part of the report in its metadata. Files are whole or not
there, so that a run may be stopped at any time, by Ctrl-C or harder; the next run with the same folder
takes over what is there. A folder that belongs to another model, configuration, seed or data set is
refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch
from torch import nn

from rimet import __version__
from rimet._graph.structure import flatten
from rimet.quantsim._files import atomic_path, remove_unfinished, write_text

logger = logging.getLogger(__name__)

__all__ = [
    "FingerprintMismatchError",
    "LayerEntry",
    "LayerReport",
    "LayerwiseReport",
    "LayerwiseRun",
    "check_fingerprint",
    "data_hash",
    "fingerprint",
    "layer_seed",
]

FORMAT = "rimet-layer-results"
VERSION = 1


class FingerprintMismatchError(ValueError):
    """A folder holds the results of another run.

    Args:
        folder: the folder.
        differing: what is different: names of entries of the fingerprint.
        where: at which layer it was found; empty if before any.

    Attributes:
        differing: as given.
    """

    def __init__(self, folder: Path, differing: list[str], where: str = "") -> None:
        super().__init__(
            f"{folder}: expected results of this run, got those of a run with another "
            f"{', another '.join(differing)}{where}; give another folder, or remove this one"
        )
        self.differing = differing


# Fingerprints


def data_hash(batches: Iterable[Any]) -> str:
    """SHA-256 of the tensors of all batches, with their shapes and dtypes, and of how they are
    nested.
    """
    digest = hashlib.sha256()
    for batch in batches:
        tensors, structure = flatten(batch)
        digest.update(structure.describe().encode())
        for tensor in tensors:
            _update(digest, tensor)
    return digest.hexdigest()


def fingerprint(
    model: nn.Module, config: Mapping[str, Any], seed: int, data: str
) -> dict[str, str]:
    """What the results of a run depend on.

    Args:
        model: its parameters and buffers are hashed, names included.
        config: settings of the technique; values that JSON can hold.
        seed: of the run.
        data: hash of the calibration data, see :func:`data_hash`.

    Returns:
        One entry for each, each setting by its name, and for the versions of rimet and torch.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            _update(digest, tensor)
    return {
        **{name: json.dumps(value, sort_keys=True) for name, value in config.items()},
        "weights": digest.hexdigest(),
        "seed": str(seed),
        "data": data,
        "rimet version": __version__,
        "torch version": torch.__version__,
    }


def check_fingerprint(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares the fingerprint of this run with that of the one whose results are in a folder.

    Raises:
        FingerprintMismatchError: they differ.
    """
    keys = [*expected, *(key for key in found if key not in expected)]
    differing = [key for key in keys if expected.get(key) != found.get(key)]
    if differing:
        raise FingerprintMismatchError(folder, differing)


def _update(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.numel():
        digest.update(plain.flatten().view(torch.uint8).numpy())


def layer_seed(seed: int, path: str) -> int:
    """Seed of one layer's random numbers, 63 bits: the same whichever layers ran before it."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# Reports


@dataclass
class LayerReport:
    """What was done to one layer.

    Attributes:
        path: of the module.
        kind: class of the module.
        status: ``treated``, ``resumed`` (treated by an earlier run, and taken over) or ``skipped``
            (left as it was).
        reason: why it was skipped.
        note: what is to be known about its treatment.
        loss_before: the technique's loss before, and
        loss_after: after; None where there is none.
        seconds: it took, in the run that did it.
        details: what else the technique says.
    """

    path: str
    kind: str
    status: Literal["treated", "resumed", "skipped"]
    reason: str | None = None
    note: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def losses(self) -> str:
        """The losses before and after as a few words."""
        if self.loss_before is None or self.loss_after is None:
            return f"{self.path}: {self.note or self.status}"
        return f"{self.path}: loss {self.loss_before:.4g} -> {self.loss_after:.4g}"


@dataclass
class LayerwiseReport:
    """What a technique did, layer by layer in the order of treatment; skipped ones last.

    Attributes:
        technique: its name.
        layers: the layers.
        walk: how the layers were reached: fields of :class:`rimet._graph.streaming.WalkReport`.
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

    @property
    def treated(self) -> list[LayerReport]:
        """The layers that were treated, in this run or an earlier one."""
        return [layer for layer in self.layers if layer.status != "skipped"]

    @property
    def skipped(self) -> dict[str, str]:
        """Path and reason of the layers that were not."""
        return {x.path: x.reason or "" for x in self.layers if x.status == "skipped"}

    def to_json(self) -> str:
        """The report as JSON, with the format's version; a loss that is not finite, which JSON cannot
        say, is null.
        """
        document = {"format": "rimet-layer-report", "version": VERSION, **dataclasses.asdict(self)}
        for layer in document["layers"]:
            for name in ("loss_before", "loss_after"):
                if layer[name] is not None and not math.isfinite(layer[name]):
                    layer[name] = None
        return json.dumps(document, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON to a file, whole or not at all."""
        write_text(path, self.to_json() + "\n")


# Runs


class LayerEntry:
    """One layer in a run; ends with exactly one of :attr:`stored` being there, :meth:`done` and
    :meth:`skip`.

    Attributes:
        path: of the module.
        kind: class of the module.
        stored: the tensors that an earlier run kept for the layer, or None.
        tensors: these, or those of :meth:`done`.
    """

    def __init__(self, path: str, kind: str, stored: dict[str, torch.Tensor] | None) -> None:
        self.path = path
        self.kind = kind
        self.stored = stored
        self.tensors = stored or {}
        self._result: LayerReport | None = None

    def done(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        loss_before: float | None = None,
        loss_after: float | None = None,
        note: str | None = None,
        resumed: bool = False,
        **details: Any,
    ) -> None:
        """The layer was treated.

        Args:
            tensors: what a later run needs to do the same to the layer at once.
            loss_before: the technique's loss before.
            loss_after: and after.
            note: what is to be known about the treatment.
            resumed: an earlier run did it, whose result was found elsewhere than in this folder.
            details: for the report; values that JSON can hold.
        """
        self._result = LayerReport(
            self.path,
            self.kind,
            "resumed" if resumed else "treated",
            note=note,
            loss_before=loss_before,
            loss_after=loss_after,
            details=details,
        )
        self.tensors = dict(tensors)

    def skip(self, reason: str) -> None:
        """The layer is left as it is."""
        self._result = LayerReport(self.path, self.kind, "skipped", reason)


class LayerwiseRun:
    """A run of a technique over the layers of a model, resumable if it has a folder.

    Usage::

        run = LayerwiseRun("AdaRound", folder, fingerprint(model, config, seed, walk.data_hash()))
        for visit in walk.visit(paths):
            with run.layer(visit.path, type(visit.quant_module).__name__) as layer:
                if layer.stored is None:
                    rounding, before, after = optimize(visit)
                    layer.done({"rounding": rounding}, loss_before=before, loss_after=after)
            apply(visit.quant_module, layer.tensors["rounding"])
        run.report.save("report.json")

    Args:
        technique: its name.
        folder: where results are kept as they come; made if it does not exist. None: nowhere.
        fingerprint: what the results depend on, see :func:`fingerprint`.

    Attributes:
        report: so far.

    Raises:
        FingerprintMismatchError: the folder holds the results of another run.
        ValueError: the folder's manifest is of an unknown format or version.
    """

    def __init__(
        self,
        technique: str,
        folder: str | os.PathLike[str] | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        self.report = LayerwiseReport(technique)
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._open(self._folder, {"technique": technique, **(fingerprint or {})})

    @contextlib.contextmanager
    def layer(self, path: str, kind: str) -> Iterator[LayerEntry]:
        """One layer's turn. What is done to it is kept, and reported, when the context ends
        without an exception.

        Args:
            path: of the module.
            kind: class of the module.

        Raises:
            RuntimeError: the context ended with nothing done and nothing skipped.
        """
        start = time.perf_counter()
        stored, result = self._read(path)
        entry = LayerEntry(path, kind, stored)
        yield entry
        if entry._result is not None:
            result = entry._result
            result.seconds = time.perf_counter() - start
            if result.status != "skipped":
                self._write(result, entry.tensors)
        if result is None:
            raise RuntimeError(f"{path}: neither done nor skipped")
        self.report.layers.append(result)
        if result.status == "skipped":
            logger.info("%s skips %s: %s", self.report.technique, path, result.reason)
        else:
            losses = result.losses()
            logger.info("%s, %s in %.2f s", self.report.technique, losses, result.seconds)

    def skip(self, path: str, kind: str, reason: str) -> None:
        """Reports a layer that never had a turn."""
        with self.layer(path, kind) as entry:
            entry.skip(reason)

    def _open(self, folder: Path, expected: dict[str, str]) -> None:
        remove_unfinished(folder)
        manifest = folder / "manifest.json"
        if not manifest.exists():
            document = {"format": FORMAT, "version": VERSION, "fingerprint": expected}
            write_text(manifest, json.dumps(document, indent=1) + "\n")
            return
        try:
            document = json.loads(manifest.read_text(encoding="utf-8"))
            kind = document["format"], document["version"]
            found = dict(document["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{manifest}: expected the manifest of layer results: {error}"
            ) from None
        if kind != (FORMAT, VERSION):
            raise ValueError(f"{manifest}: expected {FORMAT} version {VERSION}, got {kind}")
        check_fingerprint(folder, expected, found)

    def _file(self, path: str) -> Path:
        assert self._folder is not None
        name = quote(path, safe="") or "%"
        if len(name) > 200:  # file systems take 255
            name = f"{name[:150]}%{hashlib.sha256(path.encode()).hexdigest()[:32]}"
        return self._folder / f"{name}.safetensors"

    def _read(self, path: str) -> tuple[dict[str, torch.Tensor] | None, LayerReport | None]:
        if self._folder is None or not self._file(path).exists():
            return None, None
        with safetensors.safe_open(self._file(path), "pt") as file:
            result = LayerReport(**json.loads(file.metadata()["layer"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        result.status = "resumed"
        return tensors, result

    def _write(self, result: LayerReport, tensors: dict[str, torch.Tensor]) -> None:
        if self._folder is None:
            return
        metadata = {"format": "pt", "layer": json.dumps(dataclasses.asdict(result))}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self._file(result.path)) as part:
            safetensors.torch.save_file(plain, part, metadata)
