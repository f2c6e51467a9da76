"""Simulation of quantized models."""

from __future__ import annotations

from rimet.quantsim.quantsim import (
    QuantizationSimModel,
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
