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
from itertools import chain
from typing import Any, Generic, TypeVar

import torch

from rimet import _core

__all__ = [
    "EncodingAnalyzer",
    "MinMaxEncodingAnalyzer",
    "MseEncodingAnalyzer",
    "PercentileEncodingAnalyzer",
    "SqnrEncodingAnalyzer",
    "StatisticsNotFoundError",
    "TfEnhancedEncodingAnalyzer",
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
    value = value.to(torch.promote_types(value.dtype, dtype))
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
        if self.block_size is not None and len(self.block_size) > len(self.shape):
            raise ValueError(
                f"block_size: expected at most {len(self.shape)} entries, one per dimension of shape "
                f"{list(self.shape)}, got {list(self.block_size)}"
            )

    def _blocks(self) -> list[int] | None:
        """``block_size`` with an entry for every dimension of ``shape``: leading ones broadcast."""
        if self.block_size is None:
            return None
        leading = self.shape[: len(self.shape) - len(self.block_size)]
        return [*(1 if dim > 1 else -1 for dim in leading), *self.block_size]

    @abstractmethod
    def collect_stats(self, input_tensor: torch.Tensor) -> _Statistics:
        """Statistics of this tensor alone; the running ones are left as they are."""

    def collect_update(self, input_tensor: torch.Tensor) -> _Statistics:
        """Statistics of this tensor alone, as they are to be merged into the running ones."""
        return self.collect_stats(input_tensor)

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

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running statistics as tensors; empty before any data."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the running statistics by what :meth:`state_dict` gave."""


class _MinMaxObserver(_Observer[_MinMaxRange]):
    """Keeps the smallest and the largest value per encoding."""

    def __init__(self, shape: int | Sequence[int], block_size: Sequence[int] | None = None) -> None:
        super().__init__(shape, block_size)
        self.stats = _MinMaxRange()

    @torch.no_grad()
    def collect_stats(self, input_tensor: torch.Tensor) -> _MinMaxRange:
        low, high = torch.ops.rimet.min_max(input_tensor, self.shape, self._blocks())
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        if self.stats.min is None or self.stats.max is None:
            return {}
        return {"min": self.stats.min, "max": self.stats.max}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if not state:
            self.reset_stats()
            return
        for name in ("min", "max"):
            shape = tuple(state[name].shape)
            if shape != self.shape:
                raise ValueError(f"{name}: expected shape {self.shape}, got {shape}")
        self.stats = _MinMaxRange(state["min"].clone(), state["max"].clone())


@dataclass
class _Histogram:
    """One encoding's histogram: counts, edges (one more), smallest and largest finite value."""

    histogram: torch.Tensor
    bin_edges: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor


class _HistogramStats(Sequence[_Histogram]):
    """Histograms of all encodings. Indexing gives a view of one as tensors.

    One batch is counted on ``num_bins`` equal bins over its exact finite range. Histograms of several batches meet on
    bins whose width is a power of two and which are at most as wide as ``num_bins`` equal bins over the joint range
    would be. The merged counts depend neither on the order of the batches nor on the process that saw them.
    """

    def __init__(
        self,
        native: _core.HistogramStatistics,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.native = native
        self.dtype = dtype
        self.device = torch.device("cpu") if device is None else device

    def __len__(self) -> int:
        return len(self.native)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        counts, edges, low, high = self.native.group(range(len(self))[index])
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return _Histogram(
            counts.to(self.device),
            edges.to(self.device),
            torch.tensor(low, **options),
            torch.tensor(high, **options),
        )


class _HistogramObserver(_Observer[_HistogramStats]):
    """Keeps a histogram per encoding, in the engine.

    Tensors on the CPU are counted by the engine, those on other devices there, by torch operations; the counts are
    the same.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        block_size: Sequence[int] | None = None,
        num_bins: int,
        growth_limit: float | None = None,
    ) -> None:
        super().__init__(shape, block_size)
        if num_bins <= 0:
            raise ValueError(f"num_bins: expected a number greater than 0, got {num_bins}")
        if growth_limit is not None and not growth_limit >= 1.0:
            raise RuntimeError(
                f"histogram_growth_limit: expected a number of at least 1.0, got {growth_limit}"
            )
        self.num_bins = num_bins
        self.growth_limit = math.inf if growth_limit is None else growth_limit
        self.stats = self._empty()

    def _empty(self) -> _HistogramStats:
        limit = self.growth_limit if math.isfinite(self.growth_limit) else None
        return _HistogramStats(_core.HistogramStatistics(self.num_bins, limit))

    def collect_stats(self, input_tensor: torch.Tensor) -> _HistogramStats:
        return self._collect(input_tensor, self._empty().native, limited=False)

    def collect_update(self, input_tensor: torch.Tensor) -> _HistogramStats:
        return self._collect(input_tensor, self.stats.native, limited=True)

    @torch.no_grad()
    def _collect(
        self, input_tensor: torch.Tensor, onto: _core.HistogramStatistics, limited: bool
    ) -> _HistogramStats:
        input_tensor = input_tensor.detach()
        blocks = self._blocks()
        if input_tensor.device.type == "cpu":
            native = onto.collect(input_tensor, self.shape, blocks, limited=limited)
        else:
            native = _count_with_torch(onto, _by_encoding(input_tensor, self.shape, blocks))
        return _HistogramStats(native, input_tensor.dtype, input_tensor.device)

    def merge_stats(self, stats: _HistogramStats, input_tensor: torch.Tensor | None = None) -> None:
        """Take statistics into the running ones; ``input_tensor`` is not needed, the counts suffice."""
        self.stats.native.merge(stats.native)
        if len(stats):
            self.stats.dtype, self.stats.device = stats.dtype, stats.device

    def reset_stats(self) -> None:
        self.stats = self._empty()

    def get_stats(self) -> _HistogramStats:
        return self.stats

    def all_reduce(self, group: Any | None = None) -> None:
        import torch.distributed as dist

        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group=group)
        device = self.stats.device
        merged = self._empty()
        for state in states:
            if state:
                part = self._from_state(state)
                merged.native.merge(part.native)
                merged.dtype = part.dtype
        merged.device = device
        self.stats = merged

    def state_dict(self) -> dict[str, torch.Tensor]:
        if not len(self.stats):
            return {}
        names = ("range", "level", "start", "index", "count")
        state = dict(zip(names, self.stats.native.to_parts(), strict=True))
        # An empty tensor carries the dtype of the encodings.
        state["like"] = torch.empty(0, dtype=self.stats.dtype)
        return state

    def _from_state(self, state: dict[str, torch.Tensor]) -> _HistogramStats:
        stats = self._empty()
        expected = math.prod(self.shape)
        got = state["level"].numel()
        if got != expected:
            raise ValueError(f"state: expected histograms of {expected} encodings, got {got}")
        stats.native.set_parts(
            *(state[name].cpu() for name in ("range", "level", "start", "index", "count"))
        )
        stats.dtype = state["like"].dtype
        return stats

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if not state:
            self.reset_stats()
            return
        stats = self._from_state(state)
        stats.device = self.stats.device
        self.stats = stats

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["stats"]
        return {"plain": state, "stats": self.state_dict(), "device": self.stats.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["plain"])
        self.stats = self._empty()
        self.stats.device = state["device"]
        self.load_state_dict(state["stats"])


def _by_encoding(
    x: torch.Tensor, shape: tuple[int, ...], blocks: Sequence[int] | None
) -> torch.Tensor:
    """The elements of each encoding as one row."""
    if len(shape) > x.dim():
        if any(dim != 1 for dim in shape[: len(shape) - x.dim()]):
            raise ValueError(
                f"input: expected a shape that reduces to {shape}, got {tuple(x.shape)}"
            )
        shape = shape[len(shape) - x.dim() :]
    leading = x.dim() - len(shape)
    if blocks is None:
        fits = all(dim in (1, size) for dim, size in zip(shape, x.shape[leading:], strict=True))
    else:
        blocks = blocks[-len(shape) :] if shape else []
        fits = all(
            size % dim == 0 and block in (-1, size // dim)
            for dim, size, block in zip(shape, x.shape[leading:], blocks, strict=True)
        )
    if not fits:
        raise ValueError(
            f"input: expected a shape that reduces to {shape} with block size {blocks}, got {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise ValueError("input: expected at least one element, got an empty tensor")
    split = chain.from_iterable(
        (dim, size // dim) for dim, size in zip(shape, x.shape[leading:], strict=True)
    )
    x = x.reshape(*x.shape[:leading], *split)
    across = range(leading, x.dim(), 2)
    inside = [axis for axis in range(x.dim()) if axis not in across]
    return x.permute(*across, *inside).reshape(math.prod(shape), -1)


# Elements and counters one step of `_count_with_torch` may hold at a time.
_STEP = 1 << 24


def _count_with_torch(
    onto: _core.HistogramStatistics, rows: torch.Tensor
) -> _core.HistogramStatistics:
    """Histograms of the rows, counted by torch operations on their device, in portions.

    The same formula as the engine's, in float32; only ranges that float32 cannot span are counted in float64.
    """
    bins = onto.num_bins
    finite = rows.isfinite()
    low = torch.where(finite, rows, math.inf).amin(1).float()
    high = torch.where(finite, rows, -math.inf).amax(1).float()
    del finite
    first, last = (t.to(rows.device) for t in onto.batch_range(low.cpu(), high.cpu()))
    # Clipped to a single value, or a single value by itself: all that is finite goes to the middle.
    single = (low == high) | ((low >= last) | (high <= first))
    span = last - first
    overflow = not bool((span * bins).isfinite().all())
    counts = torch.empty(rows.shape[0], bins, dtype=torch.int64)
    height = max(1, min(rows.shape[0], _STEP // (bins + 1)))
    for top in range(0, rows.shape[0], height):
        part = slice(top, min(top + height, rows.shape[0]))
        number = part.stop - part.start
        table = torch.zeros(number * (bins + 1), dtype=torch.int64, device=rows.device)
        width = max(1, _STEP // number)
        for left in range(0, rows.shape[1], width):
            x = rows[part, left : left + width].float()
            begin, length = first[part, None], span[part, None]
            if overflow:
                begin = begin.double()
                length = last[part, None].double() - begin
                place = (x.double() - begin) / length * bins
            else:
                place = (x - begin) * bins / length
            middle = torch.where(x.isfinite(), float(bins // 2), x).clamp(0, bins - 1)
            place = torch.where(single[part, None], middle.to(place.dtype), place)
            # NaN passes the clamp, and goes to a counter of its own.
            place = place.clamp(0, bins - 1).nan_to_num(float(bins)).to(torch.int64)
            place += torch.arange(number, device=rows.device)[:, None] * (bins + 1)
            table += torch.bincount(place.flatten(), minlength=table.numel())
        counts[part] = table.view(number, bins + 1)[:, :bins].cpu()
    return onto.from_counts(low.cpu(), high.cpu(), counts)


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
        stats = self.observer.collect_update(input_tensor)
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running statistics as tensors (safetensors can hold them); empty before any data."""
        return self.observer.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the running statistics by what :meth:`state_dict` of an equal analyzer gave.

        :raises ValueError: the tensors cannot be statistics of this analyzer; the running ones stay as they are
        """
        self.observer.load_state_dict(state)


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


class _HistogramEncodingAnalyzer(EncodingAnalyzer[_HistogramStats]):
    """Base of the analyzers that derive the range from histograms."""

    observer: _HistogramObserver

    @torch.no_grad()
    def compute_encodings_from_stats(
        self, stats: _HistogramStats, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Range of the grid, from the given histograms (see :meth:`compute_encodings`)."""
        _check_num_steps(num_steps)
        if not isinstance(stats, _HistogramStats):
            raise TypeError(
                f"stats: expected statistics of this analyzer's observer, got {type(stats).__name__}"
            )
        if not len(stats):
            raise StatisticsNotFoundError("no data was observed: there are no encodings to compute")
        low, high = self._search(stats.native, float(num_steps), bool(is_symmetric))
        return tuple(  # type: ignore[return-value]
            _clamp_to_dtype(end, stats.dtype).view(self.observer.shape).to(stats.device)
            for end in (low, high)
        )

    @abstractmethod
    def _search(
        self, native: _core.HistogramStatistics, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the ranges, float32, one per encoding."""


class PercentileEncodingAnalyzer(_HistogramEncodingAnalyzer):
    """Range that leaves out the ``100 - percentile`` percent of the smallest, and of the largest, values.

    The ends are the left edges of the histogram's bins in which the cumulative count reaches its share, then fitted to
    the grid by :func:`adjust_min_max`. NaN is left out; infinities count as the ends of their batch's range.

    :param shape: encoding shape; ``()`` or ``(1,)`` for a whole tensor
    :param num_bins: bins over the range of a batch
    :param percentile: 50 to 100; 100 takes the whole range
    :param block_size: elements per block and dimension of ``shape``, ``-1``: whatever divides; ``None``: ``shape``
        broadcasts against the data
    :raises ValueError: ``num_bins`` or ``percentile`` is out of range
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        num_bins: int = 2048,
        percentile: float = 100,
        block_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(_HistogramObserver(shape, num_bins=num_bins, block_size=block_size))
        self.set_percentile(percentile)

    def set_percentile(self, percentile: float) -> None:
        """Set the percentile.

        :param percentile: 50 to 100
        :raises ValueError: it is out of range
        """
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile: expected a number within 50..100, got {percentile}")
        self.percentile = percentile

    def _search(
        self, native: _core.HistogramStatistics, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return native.percentile(float(self.percentile), num_steps, is_symmetric)


class SqnrEncodingAnalyzer(_HistogramEncodingAnalyzer):
    """Range with the least expected quantization noise, over a set of candidate scales and offsets.

    A value stands in the middle of its bin; the squared error of a clipped one counts ``gamma`` times.

    :param shape: encoding shape; ``()`` or ``(1,)`` for a whole tensor
    :param num_bins: bins over the range of a batch
    :param asymmetric_delta_candidates: scales tried for an asymmetric grid, at least 2
    :param symmetric_delta_candidates: scales tried for a symmetric grid, at least 2
    :param offset_candidates: offsets tried with each scale of an asymmetric grid, at least 3
    :param max_parallelism: accepted for AIMET's sake; the engine needs no memory per candidate
    :param gamma: weight of clipping noise
    :param histogram_growth_limit: how far later batches may widen the range, in multiples of the first batch's
        (half to each side), at least 1; what lies beyond is counted at the limit. ``None``: any
    :param block_size: elements per block and dimension of ``shape``, ``-1``: whatever divides; ``None``: ``shape``
        broadcasts against the data
    :raises ValueError: a number is out of range
    :raises RuntimeError: ``histogram_growth_limit`` is below 1
    """

    # The exponent of the error norm.
    p = 2.0

    def __init__(
        self,
        shape: int | Sequence[int],
        num_bins: int = 2048,
        *,
        asymmetric_delta_candidates: int = 17,
        symmetric_delta_candidates: int = 101,
        offset_candidates: int = 21,
        max_parallelism: int = 64,
        gamma: float = 3.0,
        histogram_growth_limit: float | None = None,
        block_size: Sequence[int] | None = None,
    ) -> None:
        for name, least, value in (
            ("asymmetric_delta_candidates", 2, asymmetric_delta_candidates),
            ("symmetric_delta_candidates", 2, symmetric_delta_candidates),
            ("offset_candidates", 3, offset_candidates),
            ("max_parallelism", 1, max_parallelism),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma: expected a finite number of at least 0, got {gamma}")
        super().__init__(
            _HistogramObserver(
                shape,
                num_bins=num_bins,
                growth_limit=histogram_growth_limit,
                block_size=block_size,
            )
        )
        self.asym_delta_candidates = asymmetric_delta_candidates
        self.sym_delta_candidates = symmetric_delta_candidates
        self.num_offset_candidates = offset_candidates
        self.max_parallelism = max_parallelism
        self.gamma = gamma

    def _search(
        self, native: _core.HistogramStatistics, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return native.sqnr(
            num_steps,
            is_symmetric,
            asymmetric_delta_candidates=self.asym_delta_candidates,
            symmetric_delta_candidates=self.sym_delta_candidates,
            offset_candidates=self.num_offset_candidates,
            gamma=float(self.gamma),
        )


class TfEnhancedEncodingAnalyzer(SqnrEncodingAnalyzer):
    """The ``tf_enhanced`` preset: SQNR with 512 bins, whose range may grow to four times the first batch's.

    :param shape: encoding shape
    :param block_size: as for :class:`SqnrEncodingAnalyzer`
    """

    _growth_limit = 3.0

    def __init__(self, shape: int | Sequence[int], block_size: Sequence[int] | None = None) -> None:
        super().__init__(
            shape, 512, histogram_growth_limit=self._growth_limit, block_size=block_size
        )

    @classmethod
    def set_growth_limit(cls, growth_limit: float) -> None:
        """Set the growth limit of the analyzers made from now on.

        :param growth_limit: at least 1
        :raises RuntimeError: it is below 1
        """
        if not growth_limit >= 1.0:
            raise RuntimeError(
                f"growth_limit: expected a number of at least 1.0, got {growth_limit}"
            )
        cls._growth_limit = growth_limit


class MseEncodingAnalyzer(_HistogramEncodingAnalyzer):
    """Range with the least mean squared error.

    The candidates of :class:`SqnrEncodingAnalyzer` without extra weight on clipping, then ever closer ones around the
    best. Never worse, on the histogram, than ``SqnrEncodingAnalyzer(gamma=1)``.

    :param shape: encoding shape; ``()`` or ``(1,)`` for a whole tensor
    :param num_bins: bins over the range of a batch
    :param refinement_rounds: how often the distance between the scales tried is made four times smaller, 0 to 8
    :param block_size: as for :class:`SqnrEncodingAnalyzer`
    :raises ValueError: a number is out of range
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        num_bins: int = 2048,
        *,
        refinement_rounds: int = 3,
        block_size: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= refinement_rounds <= 8:
            raise ValueError(f"refinement_rounds: expected 0 to 8, got {refinement_rounds}")
        super().__init__(_HistogramObserver(shape, num_bins=num_bins, block_size=block_size))
        self.refinement_rounds = refinement_rounds

    def _search(
        self, native: _core.HistogramStatistics, num_steps: float, is_symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return native.mse(num_steps, is_symmetric, refinement_rounds=self.refinement_rounds)
