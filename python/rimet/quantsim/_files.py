"""Files that are whole or not there, and the encodings of a model as the engine writes them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rimet import _core
from rimet.nn import BaseQuantizationMixin
from rimet.quantization.affine import AffineEncoding, AffineQuantizerBase
from rimet.quantization.base import EncodingBase, QuantizerBase


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; on success it becomes ``path``, on failure it
    goes away.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for the owner only; the result gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process was writing by :func:`atomic_path` into a folder."""
    for part in folder.glob(".*.part"):
        part.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def read_encodings(
    source: Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[list[str], list[tuple[str, bool, int, Any]], list[tuple[str, Any]]]:
    """Reads encodings by module names from a file, or from its content as a dict.

    Returns:
        The modules that ``activation_encodings`` names, ``[(module, is_input, index, channels)]``
        and ``[(parameter, channels)]``.

    Raises:
        ValueError: not an encodings file; the message names the file and the place in it.
    """
    if isinstance(source, Mapping):
        return _core.read_encodings(json.dumps(source))  # type: ignore[no-any-return]
    try:
        return _core.read_encodings(Path(source).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except ValueError as error:  # text that is not UTF-8 included
        raise ValueError(f"{os.fspath(source)}: {error}") from error


def encoding_dict(encoding: EncodingBase) -> dict[str, Any]:
    """An encoding in the plain form that the engine's writers take."""
    if isinstance(encoding, AffineEncoding):
        plain: dict[str, Any] = {
            "qmin": int(encoding.qmin),
            "qmax": int(encoding.qmax),
            "symmetric": bool(encoding.symmetry),
            "zero_point_shift": float(getattr(encoding, "zero_point_shift", None) or 0.0),
            "shape": list(encoding.scale.shape),
            "scale": encoding.scale.detach().flatten().double().tolist(),
            "offset": encoding.offset.detach().flatten().double().tolist(),
            "block_size": None if encoding.block_size is None else list(encoding.block_size),
        }
        grouping = getattr(encoding, "block_grouping", None)
        if grouping is not None and any(size != 1 for size in grouping):
            grouped: Any = encoding
            plain["grouped"] = (
                int(grouped.bitwidth),
                grouped.per_block_int_scale.flatten().long().tolist(),
                grouped.per_channel_scale.detach().flatten().double().tolist(),
                list(grouped.per_channel_scale.shape),
            )
            width = int(grouped.decompressed_bw)
            plain["qmin"], plain["qmax"] = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        return plain
    floating: Any = encoding
    scale = getattr(floating, "scale", None)
    return {
        "float_format": (
            int(floating.exponent_bits),
            int(floating.mantissa_bits),
            bool(getattr(floating, "finite", False)),
            bool(getattr(floating, "unsigned_zero", False)),
        ),
        "shape": [] if scale is None else list(scale.shape),
        "scale": [1.0] if scale is None else scale.detach().flatten().double().tolist(),
        "offset": [0.0],
        "block_size": None,
    }


def _encoding_of(quantizer: QuantizerBase | None) -> dict[str, Any] | None:
    if quantizer is None or not quantizer.is_initialized():
        return None
    encodings = quantizer.get_encodings()
    return None if encodings is None else encoding_dict(encodings)


def collect(
    model: nn.Module,
) -> tuple[list[tuple[str, bool, int, dict[str, Any]]], list[tuple[str, dict[str, Any]]]]:
    """Encodings of all calibrated quantizers of a model: ``[(module, is_input, index, encoding)]``
    and ``[(parameter, encoding)]``. Folded parameters carry theirs with them."""
    activations: list[tuple[str, bool, int, dict[str, Any]]] = []
    params: list[tuple[str, dict[str, Any]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseQuantizationMixin):
            continue
        for is_input, quantizers in (
            (True, module.input_quantizers),
            (False, module.output_quantizers),
        ):
            for index, quantizer in enumerate(quantizers):
                encoding = _encoding_of(quantizer)  # type: ignore[arg-type]
                if encoding is not None:
                    activations.append((path, is_input, index, encoding))
        for name, quantizer in module.param_quantizers.items():
            encoding = _encoding_of(quantizer)  # type: ignore[arg-type]
            if encoding is None and quantizer is None:
                carried = getattr(getattr(module, name, None), "encoding", None)
                encoding = None if carried is None else encoding_dict(carried)
            if encoding is not None:
                params.append((f"{path}.{name}" if path else name, encoding))
    return activations, params


def uncalibrated(model: nn.Module) -> list[str]:
    """Paths of the quantizers of a model that would raise if they were called.

    Those that calibration found unreached do nothing, and a quantizer of a parameter that the module
    does not have (attention whose projection was taken apart) is never called.
    """
    uncalled = {
        id(quantizer)
        for module in model.modules()
        if isinstance(module, BaseQuantizationMixin)
        for name, quantizer in module.param_quantizers.items()
        if quantizer is not None and getattr(module, name, None) is None
    }
    return [
        path
        for path, quantizer in model.named_modules()
        if isinstance(quantizer, QuantizerBase)
        and not quantizer.is_initialized()
        and not quantizer._is_idle()
        and id(quantizer) not in uncalled
    ]


def is_affine(quantizer: object) -> bool:
    """Whether a quantizer has an integer grid with trainable ranges."""
    return isinstance(quantizer, AffineQuantizerBase)
