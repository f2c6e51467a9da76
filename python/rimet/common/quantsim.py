"""Settings and helpers of quantization simulation that do not depend on a model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np

from rimet.common.defs import Int, QuantizationDataType, QuantScheme, qtype

__all__ = [
    "ALLOW_EXPERIMENTAL",
    "VALID_ENCODING_VERSIONS",
    "calculate_delta_offset",
    "compute_min_max_given_delta_offset",
    "create_encoding_from_min_max",
    "create_encoding_from_min_max_for_precision",
    "encoding_version",
    "extract_global_quantizer_args",
    "gate_min_max",
    "is_non_strict_symmetric",
    "recompute_grid_params",
    "validate_quantsim_inputs",
]

VALID_ENCODING_VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
ALLOW_EXPERIMENTAL = False

# Version of the encodings files that are written, unless a call says otherwise.
encoding_version = os.environ.get("AIMET_ENCODING_VERSION", "1.0.0")
if encoding_version not in VALID_ENCODING_VERSIONS:
    raise RuntimeError(
        f"AIMET_ENCODING_VERSION: expected one of {', '.join(VALID_ENCODING_VERSIONS)}, got "
        f"{encoding_version!r}"
    )

_SMALLEST_RANGE = 1e-5


def gate_min_max(min_val: Any, max_val: Any) -> tuple[Any, Any]:
    """A range that holds zero and is at least 1e-5 wide.

    :param min_val, max_val: numbers, or arrays of one shape
    """
    low, high = np.minimum(min_val, 0.0), np.maximum(max_val, 0.0)
    high = np.maximum(high, low + _SMALLEST_RANGE)
    if np.ndim(low) == 0:
        return float(low), float(high)
    return low, high


def is_non_strict_symmetric(
    use_symmetric_encodings: bool, use_strict_symmetric: bool, is_unsigned_symmetric: bool
) -> bool:
    """Whether a grid is signed, symmetric, and has one value more below zero than above."""
    return use_symmetric_encodings and not use_strict_symmetric and not is_unsigned_symmetric


def _num_steps(bitwidth: int, use_symmetric_encodings: bool, use_strict_symmetric: bool) -> int:
    steps = 2**bitwidth - 1
    return steps - 1 if use_symmetric_encodings and use_strict_symmetric else steps


def calculate_delta_offset(
    min_val: Any,
    max_val: Any,
    bitwidth: int,
    use_symmetric_encodings: bool,
    use_strict_symmetric: bool,
) -> tuple[Any, Any]:
    """Scale and offset (on a grid from zero) of a range.

    A symmetric grid with values below zero is scaled by its upper end; one without is used as an
    unsigned one.

    :param min_val, max_val: numbers, or arrays of one shape
    :param bitwidth: bits of the grid
    :param use_symmetric_encodings: whether the grid is symmetric
    :param use_strict_symmetric: whether it has as many values below zero as above
    :return: ``(delta, offset)``; for arrays in float32 and int32
    """
    steps = _num_steps(bitwidth, use_symmetric_encodings, use_strict_symmetric)
    low, high = (np.asarray(end, dtype=np.float64) for end in gate_min_max(min_val, max_val))
    if use_symmetric_encodings and bool(np.any(low < 0)):
        positive_steps = steps // 2
        delta = high / positive_steps
        offset = np.full(delta.shape, -positive_steps - (steps % 2))
    else:
        delta = (high - low) / steps
        offset = np.round(low / delta)
    if delta.ndim == 0:
        return float(delta), int(offset)
    return delta.astype(np.float32), offset.astype(np.int32)


def compute_min_max_given_delta_offset(
    delta: Any,
    offset: Any,
    bitwidth: int,
    use_symmetric_encodings: bool,
    use_strict_symmetric: bool,
) -> tuple[Any, Any]:
    """The range of a grid: ``delta * offset`` and ``delta * (offset + steps)``, in float32.

    :param delta, offset: what :func:`calculate_delta_offset` gives
    """
    steps = _num_steps(bitwidth, use_symmetric_encodings, use_strict_symmetric)
    low = np.asarray(delta * offset, dtype=np.float32)
    high = np.asarray(delta * (offset + steps), dtype=np.float32)
    if low.ndim == 0:
        return float(low), float(high)
    return low, high


def create_encoding_from_min_max(
    min_val: Any,
    max_val: Any,
    bitwidth: int,
    use_symmetric_encodings: bool,
    use_strict_symmetric: bool,
) -> SimpleNamespace:
    """The grid of a range, as an object with ``min``, ``max``, ``delta``, ``offset`` and ``bw``."""
    delta, offset = calculate_delta_offset(
        min_val, max_val, bitwidth, use_symmetric_encodings, use_strict_symmetric
    )
    low, high = compute_min_max_given_delta_offset(
        delta, offset, bitwidth, use_symmetric_encodings, use_strict_symmetric
    )
    return SimpleNamespace(min=low, max=high, delta=delta, offset=offset, bw=bitwidth)


def create_encoding_from_min_max_for_precision(
    min_val: Any,
    max_val: Any,
    precision: qtype,
    use_symmetric_encodings: bool,
    use_strict_symmetric: bool = False,
) -> SimpleNamespace:
    """:func:`create_encoding_from_min_max` for an integer format.

    :raises TypeError: the format is no integer
    """
    if not isinstance(precision, Int):
        raise TypeError(f"precision: expected an integer format, got {precision!r}")
    return create_encoding_from_min_max(
        min_val, max_val, precision.bits, use_symmetric_encodings, use_strict_symmetric
    )


def recompute_grid_params(
    current_encoding: Any,
    bitwidth: int,
    use_symmetric_encoding: bool,
    use_strict_symmetric: bool = False,
) -> SimpleNamespace:
    """The grid of another bit-width or symmetry over the range of ``current_encoding``."""
    low, high = current_encoding.min, current_encoding.max
    if use_symmetric_encoding and np.any(np.asarray(low) < 0):
        # One value more below zero would otherwise widen the range each time.
        high = np.maximum(np.abs(low), np.abs(high)) if np.ndim(low) else max(abs(low), abs(high))
    return create_encoding_from_min_max(
        low, high, bitwidth, use_symmetric_encoding, use_strict_symmetric
    )


def extract_global_quantizer_args(
    quant_scheme: str | QuantScheme, quantsim_configurator: Any
) -> dict[str, Any]:
    """The section ``quantizer_args`` of an encodings file.

    :param quant_scheme: how ranges are found
    :param quantsim_configurator: the configuration that was applied
    """
    scheme = quant_scheme if isinstance(quant_scheme, str) else quant_scheme.name
    return {
        "quant_scheme": scheme,
        **quantsim_configurator.get_global_quantizer_args(),
    }


def validate_quantsim_inputs(
    quant_scheme: str | QuantScheme,
    rounding_mode: str,
    default_output_bw: int,
    default_param_bw: int,
    data_type: QuantizationDataType = QuantizationDataType.int,
) -> None:
    """Check the arguments of a quantization simulation.

    :raises ValueError: unknown scheme or rounding mode; output bits outside 4..32, parameter bits
        outside 2..32; a float of other than 16 or 32 bits
    """
    names = ("tf", "tf_enhanced", "percentile")
    if not isinstance(quant_scheme, QuantScheme) and quant_scheme not in names:
        raise ValueError(
            f"quant_scheme: expected a QuantScheme or one of {', '.join(names)}, got "
            f"{quant_scheme!r}"
        )
    if rounding_mode not in ("nearest", "stochastic"):
        raise ValueError(f"rounding_mode: expected nearest or stochastic, got {rounding_mode!r}")
    for name, bitwidth, lowest in (
        ("default_output_bw", default_output_bw, 4),
        ("default_param_bw", default_param_bw, 2),
    ):
        if not lowest <= bitwidth <= 32:
            raise ValueError(f"{name}: expected {lowest} to 32, got {bitwidth}")
        if data_type is QuantizationDataType.float and bitwidth not in (16, 32):
            raise ValueError(f"{name}: expected 16 or 32 for a float, got {bitwidth}")
