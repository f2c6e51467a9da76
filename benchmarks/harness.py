"""Measuring contestants by turns, and what a section is made of."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Call = Callable[[], object]

#: Each timed sample lasts at least this long, so that the clock's own cost does not show.
SAMPLE_SECONDS = 2e-3
#: Between turns of two processes.
SETTLE_SECONDS = 20e-3


@dataclass(frozen=True)
class Size:
    """How large the work is, and how often it is measured."""

    toy: bool = False
    #: Turns of each run: every contestant is timed once per turn.
    turns: int = 15
    #: Runs; the best (lowest) median of a contestant counts.
    runs: int = 1
    #: Largest number of elements of the linearity curve.
    largest: int = 10_000_000

    def pick(self, full: int, toy: int) -> int:
        return toy if self.toy else full

    def shape(self, full: Sequence[int], toy: Sequence[int]) -> tuple[int, ...]:
        return tuple(toy if self.toy else full)


@dataclass(frozen=True)
class Timed:
    """The call that is timed. ``before`` runs untimed ahead of every single call."""

    run: Call
    before: Call | None = None

    def sample(self, inner: int) -> float:
        """Seconds of one call; the mean of ``inner`` calls unless there is a ``before``."""
        if self.before is not None:
            self.before()
            inner = 1
        run = self.run
        start = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - start) / inner


class Peer(Protocol):
    """Another process that can be asked to time a piece of work."""

    def build(self, work: str, parameters: dict[str, object]) -> int: ...

    def sample(self, handle: int, inner: int) -> float: ...

    def release(self, handle: int) -> None: ...


@dataclass(frozen=True)
class Contestant:
    """Somebody who does the row's work in this process. ``build`` allocates; it is not timed."""

    name: str
    build: Callable[[], Timed | Call]


@dataclass(frozen=True)
class Remote:
    """Somebody who does it in the peer's process: a name of ``benchmarks.aimet_worker.WORKS``."""

    name: str
    work: str
    parameters: dict[str, object]


@dataclass(frozen=True)
class Reach:
    """A goal: ``who`` takes at most ``times`` of the time of ``over``."""

    who: str
    over: str
    times: float


@dataclass(frozen=True)
class Finding:
    """Something else that was found out of the work that was timed: a quality, a memory."""

    label: str
    value: float
    #: Whether a goal is reached; None: there is none.
    met: bool | None = None


@dataclass(frozen=True)
class Row:
    """One piece of work and everybody who does it. The first contestant is the one being judged."""

    section: str
    label: str
    elements: int
    contestants: Sequence[Contestant | Remote]
    #: Whose time is the unit of the ratio column: what the memory, or the simplest op, allows.
    unit: str = "clone"
    reaches: Sequence[Reach] = ()
    #: Multiplies the number of turns: for rows whose samples are single short calls.
    more_turns: int = 1
    #: Calls take seconds: so many turns at most, without calls to warm up.
    lasting_turns: int | None = None
    #: Asked once all is timed.
    findings: Callable[[], Sequence[Finding]] | None = None


@dataclass
class Timing:
    """What was measured of one contestant, in seconds."""

    median: float
    low: float
    high: float
    #: Fastest single sample: what the machine can do when nobody disturbs it.
    fastest: float
    #: Median of each run.
    runs: list[float] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        return (self.high - self.low) / self.median if self.median else math.nan


def measure(row: Row, size: Size, peer: Peer | None) -> dict[str, Timing]:
    """Time the contestants of a row by turns: A B C A B C, so that noise hits all alike."""
    samplers: list[tuple[str, Callable[[int], float]]] = []
    handles: list[int] = []
    for contestant in row.contestants:
        if isinstance(contestant, Remote):
            if peer is None:
                continue
            handle = peer.build(contestant.work, contestant.parameters)
            handles.append(handle)
            samplers.append((contestant.name, _asking(peer, handle)))
        else:
            built = contestant.build()
            timed = built if isinstance(built, Timed) else Timed(built)
            samplers.append((contestant.name, timed.sample))

    inner = {name: 1 for name, _ in samplers}
    for name, sample in samplers if row.lasting_turns is None else ():
        sample(1)
        once = min(sample(1) for _ in range(1 if size.toy else 3))
        inner[name] = 1 if size.toy else max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))

    turns = size.turns * row.more_turns
    if row.lasting_turns is not None:
        turns = min(size.turns, row.lasting_turns)
    medians: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _ in samplers}
    fastest = {name: math.inf for name, _ in samplers}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(size.runs):
            samples: dict[str, list[float]] = {name: [] for name, _ in samplers}
            for _ in range(size.turns if size.toy else turns):
                for name, sample in samplers:
                    if handles and not size.toy:
                        # Two processes take turns: the one before left its OpenMP threads spinning and
                        # this one's asleep, and the caches full of its own.
                        time.sleep(SETTLE_SECONDS)
                        if row.lasting_turns is None:
                            sample(1)
                    samples[name].append(sample(inner[name]))
            for name, values in samples.items():
                medians[name].append(quartiles(values))
                fastest[name] = min(fastest[name], *values)
    finally:
        if enabled:
            gc.enable()
        if peer is not None:
            for handle in handles:
                peer.release(handle)

    timings = {}
    for name, found in medians.items():
        low, median, high = min(found, key=lambda entry: entry[1])
        runs = [entry[1] for entry in found]
        timings[name] = Timing(median, low, high, fastest[name], runs)
    return timings


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def _asking(peer: Peer, handle: int) -> Callable[[int], float]:
    def sample(inner: int) -> float:
        return peer.sample(handle, inner)

    return sample


def cpu_flags() -> list[str]:
    """The instruction sets that matter to the kernels, as far as the system tells."""
    wanted = ("sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    present = set(line.split())
                    return [flag for flag in wanted if flag in present]
    except OSError:
        pass
    return []


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def load() -> float:
    """Average number of runnable processes over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


#: glibc hands large blocks back to the system when they are freed, so that every result of some
#: 20 MB is paged in anew: thousands of page faults, more than the kernel takes. All contestants
#: reuse their memory here, so that what is compared is kernels; ``--fresh-memory`` leaves malloc as
#: it comes.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def keep_memory() -> None:
    """Start this program again with an allocator that keeps its memory, unless it does already."""
    if any(name not in os.environ for name in KEEP_MEMORY):
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, sys.orig_argv)


def cpu_count() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
