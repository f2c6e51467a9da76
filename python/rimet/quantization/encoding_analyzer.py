"""Encoding analyzers: from observed data to the range of a quantization grid.

An analyzer owns an observer, which keeps running statistics of everything it was shown, and a rule that turns those
statistics into the ``(min, max)`` of a grid with ``num_steps`` steps. Statistics are kept per *group*: the elements
that share one encoding (all of a tensor, a channel, a block). They merge, and can be all-reduced over the ranks of a
``torch.distributed`` group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

__all__ = [
    "EncodingAnalyzer",
    "MinMaxEncodingAnalyzer",
    "StatisticsNotFoundError",
    "adjust_min_max",
]

_FLOAT32_EPS = 2.0**-23
_SMALLEST_RANGE = 0.01


class StatisticsNotFoundError(RuntimeError):
    """Raised when encodings are asked for before any data was observed."""


def _minimum_scale(num_steps: float) -> float:
    """Smallest scale an observed range may lead to: ``min(2**-23, 0.01 / num_steps)``.

    The second term keeps the range of a grid with very many steps (32 bits) from becoming wider than +-0.005.
    """
    return min(_FLOAT32_EPS, _SMALLEST_RANGE / num_steps)


def _check_num_steps(num_steps: float) -> None:
    if not num_steps > 0:
        raise ValueError(f"num_steps: expected a number greater than 0, got {num_steps}")


def _normalize_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (shape,) if isinstance(shape, int) else tuple(int(dim) for dim in shape)
    if any(dim < 1 for dim in shape):
        raise ValueError(f"shape: expected positive dimensions, got {list(shape)}")
    return shape


def _fit_range(
    low: torch.Tensor,
    high: torch.Tensor,
    num_steps: float,
    is_symmetric: bool,
    extra_positive_steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of the grid that holds zero, ``low`` and ``high`` (computed in float32 or better, not cast back).

    Zero is taken into the range. A range narrower than the minimum scale times ``num_steps`` is widened by that much:
    upwards if asymmetric, to both sides if symmetric. A symmetric grid has ``floor(num_steps / 2)`` steps above zero
    and ``ceil(num_steps / 2)`` below, all of the size the side in greater need asks for. ``extra_positive_steps`` is
    added to the steps above zero when that need is weighed.
    """
    dtype = torch.promote_types(low.dtype, torch.float32)
    low = low.to(dtype).clamp(max=0)
    high = high.to(dtype).clamp(min=0)

    smallest = _minimum_scale(num_steps)
    widening = smallest * ((high - low) / num_steps < smallest)
    if not is_symmetric:
        return low, high + num_steps * widening

    positive_steps = math.floor(num_steps / 2)
    negative_steps = math.ceil(num_steps / 2)
    high = high + positive_steps * widening
    low = low - negative_steps * widening
    # A symmetric grid of one step has none above zero; weighing it as one keeps its scale positive.
    weighed_steps = max(positive_steps + extra_positive_steps, 1)
    delta = torch.maximum(high / weighed_steps, -low / negative_steps)
    return -negative_steps * delta, positive_steps * delta


def _clamp_to_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return value.clamp(min=-limit, max=limit).to(dtype)


def adjust_min_max(
    curr_min: torch.Tensor, curr_max: torch.Tensor, num_steps: float, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit an observed range to a grid of ``num_steps`` steps.

    The range is made finite, is extended to hold zero, is widened where it is narrower than the smallest allowed
    scale, and is made symmetric (``floor(num_steps / 2)`` steps above zero, ``ceil(num_steps / 2)`` below) if asked.

    :param curr_min: lower ends, any shape, floating point
    :param curr_max: upper ends, shape of ``curr_min``
    :param num_steps: number of steps of the grid (``2**bitwidth - 1``), greater than 0
    :param is_symmetric: whether the grid is symmetric
    :return: new ``(min, max)`` in the dtype of the arguments
    :raises ValueError: ``num_steps`` is not positive
    """
    _check_num_steps(num_steps)
    dtype = curr_min.dtype
    limit = torch.finfo(dtype).max
    low, high = _fit_range(
        curr_min.clamp(min=-limit), curr_max.clamp(max=limit), num_steps, is_symmetric, 0
    )
    return low.to(dtype), high.to(dtype)


@dataclass
class _MinMaxRange:
    """Smallest and largest value seen, in the encoding shape; ``None`` before any data."""

    min: torch.Tensor | None = None
    max: torch.Tensor | None = None


_Statistics = TypeVar("_Statistics")


class _Observer(ABC, Generic[_Statistics]):
    """Collects statistics of tensors, one entry per encoding."""

    def __init__(self, shape: int | Sequence[int], block_size: Sequence[int] | None = None) -> None:
        self.shape = _normalize_shape(shape)
        self.block_size = None if block_size is None else tuple(int(b) for b in block_size)

    @abstractmethod
    def collect_stats(self, input_tensor: torch.Tensor) -> _Statistics:
        """Statistics of this tensor alone; the running ones are left as they are."""

    @abstractmethod
    def merge_stats(self, stats: _Statistics) -> None:
        """Take statistics into the running ones."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Forget everything."""

    @abstractmethod
    def get_stats(self) -> _Statistics:
        """The running statistics."""

    @abstractmethod
    def all_reduce(self, group: Any | None = None) -> None:
        """Replace the running statistics by the merged ones of all ranks."""


class _MinMaxObserver(_Observer[_MinMaxRange]):
    """Keeps the smallest and the largest value per encoding."""

    def __init__(self, shape: int | Sequence[int], block_size: Sequence[int] | None = None) -> None:
        super().__init__(shape, block_size)
        self.stats = _MinMaxRange()

    @torch.no_grad()
    def collect_stats(self, input_tensor: torch.Tensor) -> _MinMaxRange:
        low, high = torch.ops.rimet.min_max(input_tensor, self.shape, self.block_size)
        return _MinMaxRange(low, high)

    @torch.no_grad()
    def merge_stats(self, stats: _MinMaxRange) -> None:
        if stats.min is None or stats.max is None:
            return
        if self.stats.min is None or self.stats.max is None:
            self.stats = _MinMaxRange(stats.min.clone(), stats.max.clone())
        else:
            self.stats = _MinMaxRange(
                torch.minimum(self.stats.min, stats.min.to(self.stats.min.device)),
                torch.maximum(self.stats.max, stats.max.to(self.stats.max.device)),
            )

    def reset_stats(self) -> None:
        self.stats = _MinMaxRange()

    def get_stats(self) -> _MinMaxRange:
        return self.stats

    @torch.no_grad()
    def all_reduce(self, group: Any | None = None) -> None:
        import torch.distributed as dist

        ranges: list[Any] = [None] * dist.get_world_size(group)
        low, high = self.stats.min, self.stats.max
        packed = None if low is None or high is None else (low.cpu(), high.cpu())
        dist.all_gather_object(ranges, packed, group=group)
        device = None if low is None else low.device
        self.reset_stats()
        for entry in ranges:
            if entry is not None:
                self.merge_stats(_MinMaxRange(entry[0].to(device), entry[1].to(device)))


class EncodingAnalyzer(ABC, Generic[_Statistics]):
    """Base of all analyzers: an observer, and the rule from its statistics to a grid's range.

    :param observer: what collects and merges the statistics
    """

    def __init__(self, observer: _Observer[_Statistics]) -> None:
        self.observer = observer

    def update_stats(self, input_tensor: torch.Tensor) -> _Statistics:
        """Take a tensor into the running statistics.

        :param input_tensor: floating-point tensor that reduces to the encoding shape (see ``block_size``)
        :return: the statistics of this tensor alone
        :raises RuntimeError: its shape does not reduce to the encoding shape
        """
        stats = self.observer.collect_stats(input_tensor)
        self.observer.merge_stats(stats)
        return stats

    def reset_stats(self) -> None:
        """Forget all data seen so far."""
        self.observer.reset_stats()

    def compute_encodings(
        self, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Range of the grid, from the running statistics.

        :param num_steps: number of steps of the grid (``2**bitwidth - 1``), greater than 0
        :param is_symmetric: whether the grid is symmetric
        :return: ``(min, max)`` in the encoding shape, dtype of the data
        :raises StatisticsNotFoundError: no data was seen
        :raises ValueError: ``num_steps`` is not positive
        """
        return self.compute_encodings_from_stats(self.observer.get_stats(), num_steps, is_symmetric)

    def compute_dynamic_encodings(
        self, input_tensor: torch.Tensor, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Range of the grid for this tensor alone; the running statistics are neither used nor changed.

        :param input_tensor: floating-point tensor that reduces to the encoding shape
        :param num_steps: number of steps of the grid, greater than 0
        :param is_symmetric: whether the grid is symmetric
        :return: ``(min, max)`` in the encoding shape, dtype of the data
        """
        return self.compute_encodings_from_stats(
            self.observer.collect_stats(input_tensor), num_steps, is_symmetric
        )

    @abstractmethod
    def compute_encodings_from_stats(
        self, stats: _Statistics, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Range of the grid, from the given statistics (see :meth:`compute_encodings`)."""

    def merge(self, other: EncodingAnalyzer[_Statistics]) -> None:
        """Take all that another analyzer of the same kind and shape has seen into the running statistics.

        :raises TypeError: the other analyzer keeps other statistics
        :raises ValueError: it has another encoding shape or block size
        """
        mine, theirs = self.observer, other.observer
        if type(mine) is not type(theirs):
            raise TypeError(
                f"merge: expected an analyzer with a {type(mine).__name__}, got a {type(theirs).__name__}"
            )
        if (mine.shape, mine.block_size) != (theirs.shape, theirs.block_size):
            raise ValueError(
                f"merge: expected shape {mine.shape} and block size {mine.block_size}, "
                f"got {theirs.shape} and {theirs.block_size}"
            )
        mine.merge_stats(theirs.get_stats())

    def all_reduce(self, group: Any | None = None) -> None:
        """Merge the statistics of all ranks, so that each ends with the same ones (a collective call).

        A rank that has seen no data takes part with nothing.

        :param group: process group; the default group if ``None``
        """
        self.observer.all_reduce(group)


class MinMaxEncodingAnalyzer(EncodingAnalyzer[_MinMaxRange]):
    """Range from the smallest to the largest value seen.

    :param shape: encoding shape; ``()`` or ``(1,)`` for a whole tensor
    :param block_size: elements per block and dimension of ``shape``, ``-1``: whatever divides; ``None``: ``shape``
        broadcasts against the data
    """

    def __init__(self, shape: int | Sequence[int], block_size: Sequence[int] | None = None) -> None:
        super().__init__(_MinMaxObserver(shape, block_size))

    @torch.no_grad()
    def compute_encodings_from_stats(
        self, stats: _MinMaxRange, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the observed range to a grid.

        Zero is taken into the range and a range below the minimum scale is widened. An infinite end becomes the
        largest finite value of the dtype. With three steps (2 bits) a symmetric grid is allowed to clip the positive
        side by half, so that no step of the negative side is wasted on symmetric data.

        :param stats: smallest and largest values
        :param num_steps: number of steps of the grid, greater than 0
        :param is_symmetric: whether the grid is symmetric
        :return: ``(min, max)`` in the encoding shape, dtype of the data
        :raises StatisticsNotFoundError: ``stats`` is empty
        :raises ValueError: ``num_steps`` is not positive
        """
        _check_num_steps(num_steps)
        if stats.min is None or stats.max is None:
            raise StatisticsNotFoundError("no data was observed: there are no encodings to compute")
        dtype = stats.min.dtype
        extra_positive_steps = 1 if is_symmetric and num_steps == 3 else 0
        low, high = _fit_range(stats.min, stats.max, num_steps, is_symmetric, extra_positive_steps)
        return _clamp_to_dtype(low, dtype), _clamp_to_dtype(high, dtype)
