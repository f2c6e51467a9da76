"""Re-estimation of batch-norm statistics after quantization-aware training.

Fine-tuning weights on a coarse grid makes them oscillate between levels, and the running statistics
of batch normalizations with them; averages over many batches, taken once training is over, repair
that ([nagel2022]).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from rimet._graph import bind_inputs, move_to, without_labels
from rimet._graph.recorder import evaluating
from rimet.common.utils import Handle

__all__ = ["DEFAULT_NUM_BATCHES", "reestimate_bn_stats"]

DEFAULT_NUM_BATCHES = 100

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _run(model: nn.Module, batch: Any) -> None:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    batch = without_labels(model, batch)
    args, kwargs = bind_inputs(model, batch if device is None else move_to(batch, device))
    model(*args, **kwargs)


def reestimate_bn_stats(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = DEFAULT_NUM_BATCHES,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> Handle:
    """Replaces running means and variances by the averages over batches, in place.

    Normalizations work with the statistics of the batch meanwhile; everything else is in evaluation
    mode (dropout is off). Each batch counts the same, and each call of a normalization that runs
    more than once in a forward pass.

    Args:
        model: a model, or the model of a simulation.
        dataloader: batches; the first ``num_batches`` are used.
        num_batches: how many; fewer if there are fewer.
        forward_fn: called as ``forward_fn(model, batch)``. By default a batch is moved to the
            model's device and is its input: a tensor, a tuple or list of positional arguments
            (labels behind them are left out), or a dict of keyword arguments.

    Returns:
        A handle that restores the old statistics by ``remove()``, or at the end of a ``with`` block
        (where it is held).

    Raises:
        ValueError: no batch. The statistics are those from before after any error.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    old = [[getattr(norm, name).clone() for name in _STATISTICS] for norm in norms]
    sums: dict[nn.Module, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def restore() -> None:
        with torch.no_grad():
            for norm, values in zip(norms, old, strict=True):
                for name, value in zip(_STATISTICS, values, strict=True):
                    getattr(norm, name).copy_(value)

    def add(norm: Any, _: Any, __: Any) -> None:
        # With momentum 1 these are the statistics of the call just made.
        mean, var = norm.running_mean.double(), norm.running_var.double()
        so_far = sums.get(norm)
        if so_far is None:
            sums[norm] = (mean, var, 1)
        else:
            sums[norm] = (so_far[0] + mean, so_far[1] + var, so_far[2] + 1)

    forward_fn = forward_fn or _run
    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_hook(add) for norm in norms]
    seen = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.training, norm.momentum = True, 1.0
            batches = itertools.islice(dataloader, num_batches)
            for batch in tqdm(batches, total=num_batches, desc="batch-norm statistics"):
                forward_fn(model, batch)
                seen += 1
        if seen == 0:
            raise ValueError("dataloader, num_batches: expected at least one batch, got none")
    except BaseException:
        restore()
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    with torch.no_grad():
        for norm, values in zip(norms, old, strict=True):
            norm.num_batches_tracked.copy_(values[2])  # type: ignore[union-attr]
            if norm in sums:
                mean, var, count = sums[norm]
                norm.running_mean.copy_(mean / count)  # type: ignore[union-attr]
                norm.running_var.copy_(var / count)  # type: ignore[union-attr]
    return Handle(restore)
