"""Validation of a model before quantization."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from rimet.model_validator.validation_checks import (
    validate_for_missing_modules,
    validate_for_reused_modules,
)

__all__ = ["ModelValidator"]

logger = logging.getLogger(__name__)


class ModelValidator:
    """Runs a list of checks on a model.

    A model that does not pass can be simulated all the same; the checks tell where quantization is
    coarser than it could be.
    """

    _validation_checks: ClassVar[list[Callable[..., bool]]] = [
        validate_for_reused_modules,
        validate_for_missing_modules,
    ]

    @staticmethod
    def add_check(validation_check: Callable[..., bool]) -> None:
        """Adds a check, for all validations from now on.

        Args:
            validation_check: called as ``check(model, model_input, **kwargs)``; True means passed.
        """
        ModelValidator._validation_checks.append(validation_check)

    @staticmethod
    def validate_model(model: nn.Module, model_input: Any, **kwargs: Any) -> bool:
        """Runs all checks, whatever they find; what fails is logged as an error.

        Args:
            model: any module; it runs once per check, in evaluation mode.
            model_input: example input, as for :class:`rimet.QuantizationSimModel`.
            kwargs: handed to the checks; ``layers_to_exclude``: modules not to complain about.

        Returns:
            Whether all checks passed.
        """
        failed = [
            check.__name__
            for check in ModelValidator._validation_checks
            if not check(model, model_input, **kwargs)
        ]
        if failed:
            logger.error("validation of %s: %s failed", type(model).__name__, ", ".join(failed))
        else:
            logger.info("validation of %s: all checks passed", type(model).__name__)
        return not failed
