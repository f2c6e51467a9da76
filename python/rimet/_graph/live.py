"""Tensors that live from one layer to the next, under a memory budget.

The engine's ``ActivationStore`` counts them and writes what is over the budget to mapped files; here
are the containers that hold them.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rimet import _core
from rimet._graph.structure import Structure, flatten

__all__ = [
    "DEFAULT_MEMORY_SHARE",
    "LiveBatches",
    "LiveTensors",
    "MeasuredTensors",
    "bytes_of",
    "free_memory",
    "large_blocks_apart",
]

#: The default budget is this share of the memory that is free when the walk begins.
DEFAULT_MEMORY_SHARE = 0.25


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still get: of the device, or of the machine and the control group
    the process is in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(free, 0)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class MeasuredTensors(MutableMapping[int, torch.Tensor]):
    """Tensors by number, in memory, and what they came to.

    Args:
        outside: numbers of tensors that are not counted: somebody else owns their memory.

    Attributes:
        peak: the most bytes of storages held at once.
    """

    def __init__(self, outside: frozenset[int]) -> None:
        self.peak = 0
        self._outside = outside
        self._tensors: dict[int, torch.Tensor] = {}
        self._holders: Counter[int] = Counter()
        self._bytes = 0

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._tensors[number]

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        self.pop(number, None)
        self._tensors[number] = tensor
        if number not in self._outside:
            storage = tensor.untyped_storage()
            self._holders[storage._cdata] += 1
            if self._holders[storage._cdata] == 1:
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)

    def __delitem__(self, number: int) -> None:
        tensor = self._tensors.pop(number)
        if number not in self._outside:
            storage = tensor.untyped_storage()
            self._holders[storage._cdata] -= 1
            if self._holders[storage._cdata] == 0:
                self._bytes -= storage.nbytes()

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Within this context a large tensor's memory goes back to the system when it is freed, in all
    threads: a run of a model leaves no holes in the heap that count against a budget.
    """
    _core.keep_large_blocks_apart(True)
    try:
        yield
    finally:
        _core.keep_large_blocks_apart(False)


# Live tensors


@dataclass
class _Parked:
    """A tensor of another device, in a mapped file meanwhile."""

    mapped: torch.Tensor
    device: torch.device


class LiveTensors(MutableMapping[int, torch.Tensor]):
    """Tensors by number, under the budget of a store from one :meth:`settle` to the next.

    Args:
        store: counts them, and moves them to mapped files.
        outside: numbers of tensors that are not counted: somebody else owns their memory.
        mutable: numbers of tensors whose memory may be written to.
    """

    def __init__(
        self,
        store: _core.ActivationStore,
        outside: frozenset[int] = frozenset(),
        mutable: frozenset[int] = frozenset(),
    ) -> None:
        self._store = store
        self._outside = outside
        self._mutable = mutable
        self._tensors: dict[int, torch.Tensor | _Parked] = {}
        self._keys: dict[int, int] = {}
        self._unsettled: set[int] = set()
        self._loaded: dict[int, _Parked] = {}

    def __getitem__(self, number: int) -> torch.Tensor:
        tensor = self._tensors[number]
        if isinstance(tensor, _Parked):
            self._load(tensor)
            tensor = self._tensors[number]
            assert isinstance(tensor, torch.Tensor)
        return tensor

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        if self._tensors.get(number) is not tensor:
            self._let_go(number)
            self._tensors[number] = tensor
            if number not in self._outside:
                self._unsettled.add(number)

    def __delitem__(self, number: int) -> None:
        del self._tensors[number]
        self._let_go(number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def settle(self) -> None:
        """Counts what is new, and moves what is over the budget to mapped files."""
        self._tensors.update(self._loaded)
        self._loaded.clear()
        moved: dict[int, torch.Tensor] = {}
        for number in sorted(self._unsettled):
            tensor = self._tensors[number]
            assert isinstance(tensor, torch.Tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in moved and self._store.hold(storage._cdata, storage.nbytes()):
                self._keys[number] = storage._cdata
            else:
                self._move(number, tensor, moved)
        self._unsettled.clear()

    def evict(self) -> None:
        """Moves all to mapped files."""
        self.settle()
        moved: dict[int, torch.Tensor] = {}
        for number, tensor in self._tensors.items():
            if number in self._keys and isinstance(tensor, torch.Tensor):
                self._store.release(self._keys[number])
                self._move(number, tensor, moved)

    def share(self, number: int, other: LiveTensors, other_number: int) -> None:
        """Takes over a settled tensor of another mapping, without a copy."""
        self._let_go(number)
        self._tensors[number] = other._tensors[other_number]
        key = other._keys.get(other_number)
        if key is not None:
            self._store.hold(key, 0)
            self._keys[number] = key

    def _move(self, number: int, tensor: torch.Tensor, moved: dict[int, torch.Tensor]) -> None:
        storage = tensor.untyped_storage()
        mapped = moved.get(storage._cdata)
        if mapped is None:
            mapped = self._store.spill(_bytes_of(storage, tensor.device))
            moved[storage._cdata] = mapped
            self._store.hold_mapped(mapped.untyped_storage()._cdata, storage.nbytes())
        else:
            self._store.hold(mapped.untyped_storage()._cdata, storage.nbytes())
        self._keys[number] = mapped.untyped_storage()._cdata
        same = _like(tensor, mapped.untyped_storage(), torch.device("cpu"))
        on_cpu = tensor.device.type == "cpu"
        self._tensors[number] = same if on_cpu else _Parked(same, tensor.device)

    def _load(self, wanted: _Parked) -> None:
        """Brings a storage, with all tensors on it, back to its device."""
        source = wanted.mapped.untyped_storage()
        loaded = _bytes_of(source, torch.device("cpu")).to(wanted.device).untyped_storage()
        for number, tensor in list(self._tensors.items()):
            if not isinstance(tensor, _Parked):
                continue
            if tensor.mapped.untyped_storage()._cdata == source._cdata:
                same = _like(tensor.mapped, loaded, wanted.device)
                if number in self._mutable:
                    self[number] = same
                else:
                    self._tensors[number] = same
                    self._loaded[number] = tensor

    def _let_go(self, number: int) -> None:
        self._unsettled.discard(number)
        self._loaded.pop(number, None)
        key = self._keys.pop(number, None)
        if key is not None:
            self._store.release(key)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _like(
    tensor: torch.Tensor, storage: torch.UntypedStorage, device: torch.device
) -> torch.Tensor:
    """The same look at another storage."""
    made = torch.empty(0, dtype=tensor.dtype, device=device)
    with torch.no_grad():
        made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return made


class LiveBatches(Sequence[Any]):
    """Nested values, one for each batch, their tensors under the budget of a store."""

    def __init__(self, store: _core.ActivationStore) -> None:
        self._store = store
        self._batches: list[tuple[Structure, LiveTensors]] = []

    def append(self, value: Any) -> None:
        """Takes a value in."""
        tensors, structure = flatten(value)
        live = LiveTensors(self._store)
        live.update(enumerate(tensors))
        self.append_live(structure, live)

    def append_live(self, structure: Structure, live: LiveTensors) -> None:
        """Takes a value in whose tensors, numbered in order, are live already."""
        live.settle()
        self._batches.append((structure, live))

    def evict(self) -> None:
        """Moves all to mapped files."""
        for _, live in self._batches:
            live.evict()

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        structure, live = self._batches[index]
        value = structure.build([live[i] for i in range(len(live))])
        live.settle()
        return value

    def clear(self) -> None:
        """Lets all go."""
        for _, live in self._batches:
            live.clear()
        self._batches.clear()
