"""The checks of :class:`rimet.model_validator.model_validator.ModelValidator`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from rimet.meta.connectedgraph import ConnectedGraph
from rimet.meta.connectedgraph_utils import get_ops_with_missing_modules

__all__ = ["validate_for_missing_modules", "validate_for_reused_modules"]

logger = logging.getLogger(__name__)


def validate_for_reused_modules(
    model: nn.Module,
    model_input: Any,
    layers_to_exclude: Sequence[nn.Module] | None = None,
    **kwargs: Any,
) -> bool:
    """Whether no module runs more than once; those that do are logged.

    One range serves all calls of a reused module, and techniques leave its parameters alone.

    Args:
        model: any module.
        model_input: example input, as for :class:`rimet.QuantizationSimModel`.
        layers_to_exclude: modules not to complain about.
    """
    graph = ConnectedGraph(model, model_input)
    excluded = set(layers_to_exclude or ())
    calls: dict[nn.Module, int] = {}
    for op in graph.ordered_ops:
        module = op.get_module()
        if module is not None and module not in excluded:
            calls[module] = calls.get(module, 0) + 1
    paths = {module: path for path, module in model.named_modules()}
    reused = [f"{paths[module]} ({count} times)" for module, count in calls.items() if count > 1]
    if reused:
        logger.error(
            "These modules run more than once; give each place a module of its own, or use "
            "rimet.model_preparer.prepare_model: %s",
            ", ".join(reused),
        )
    return not reused


def validate_for_missing_modules(
    model: nn.Module,
    model_input: Any,
    layers_to_exclude: Sequence[nn.Module] | None = None,
    **kwargs: Any,
) -> bool:
    """Whether every operation that computes is a module; those that are functions are logged.

    Functions are quantized, too, unless ``quantize_functional_ops`` is off; but their quantizers
    belong to no module that a technique or an encodings file of AIMET's could name.

    Args:
        model: any module.
        model_input: example input, as for :class:`rimet.QuantizationSimModel`.
        layers_to_exclude: modules whose functions are not to be complained about.
    """
    excluded = {part for layer in layers_to_exclude or () for part in layer.modules()}
    paths = {module: path for path, module in model.named_modules()}
    missing = [
        f"{op.type} in {paths.get(op.residing_module) or 'the model itself'}"
        for op in get_ops_with_missing_modules(model, model_input)
        if op.residing_module not in excluded
    ]
    if missing:
        logger.error(
            "These operations are functions; write them as modules (rimet.nn.modules.custom), or "
            "use rimet.model_preparer.prepare_model: %s",
            ", ".join(missing),
        )
    return not missing
