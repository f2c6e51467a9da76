""":mod:`rimet.quantsim` with AIMET's defaults; see :mod:`rimet.compat`."""

from __future__ import annotations

from typing import Any

from torch import nn

from rimet import quantsim as _quantsim
from rimet.common.defs import QuantizationDataType, QuantScheme
from rimet.quantsim import (
    QuantizationSimModelOnnxExporter,
    QuantParams,
    check_accumulator_overflow,
    compute_encodings_for_sims,
    load_checkpoint,
    load_encodings_to_sim,
    save_checkpoint,
)

__all__ = [
    "QuantParams",
    "QuantizationSimModel",
    "QuantizationSimModelOnnxExporter",
    "check_accumulator_overflow",
    "compute_encodings_for_sims",
    "load_checkpoint",
    "load_encodings_to_sim",
    "save_checkpoint",
]


class QuantizationSimModel(_quantsim.QuantizationSimModel):
    """:class:`rimet.QuantizationSimModel` with AIMET's defaults.

    Takes the same arguments; ``quantize_functional_ops`` and ``quantize_unknown_modules`` are off
    unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        quant_scheme: str | QuantScheme | None = None,
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: str | None = None,
        default_data_type: QuantizationDataType = QuantizationDataType.int,
        *,
        quantize_functional_ops: bool = False,
        quantize_unknown_modules: bool = False,
    ) -> None:
        super().__init__(
            model,
            dummy_input,
            quant_scheme,
            default_output_bw,
            default_param_bw,
            in_place,
            config_file,
            default_data_type,
            quantize_functional_ops=quantize_functional_ops,
            quantize_unknown_modules=quantize_unknown_modules,
        )
