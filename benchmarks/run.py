"""The one entry point: measure, print a table, write JSON.

python benchmarks/run.py                    everything, a few minutes
python benchmarks/run.py --smoke            every row at toy size, in seconds: does it still run?
python benchmarks/run.py --only kernels --match "per-tensor" --runs 3
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

import rimet  # noqa: E402
import torch  # noqa: E402

from benchmarks.harness import (  # noqa: E402
    Finding,
    Reach,
    Row,
    Size,
    Timing,
    cpu_count,
    cpu_flags,
    cpu_name,
    keep_memory,
    load,
    measure,
)
from benchmarks.peer import AimetPeer, find_python  # noqa: E402

#: Modules of this package with a function ``rows(size)``. Add a file, then its name here.
SECTIONS = ("kernels", "calibration", "capture", "simulation", "ptq")
RESULTS = ROOT / "benchmarks" / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, two turns, no AIMET")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section")
    parser.add_argument("--match", default="", help="only rows whose label contains this text")
    parser.add_argument("--runs", type=int, default=1, help="runs; the best median of each counts")
    parser.add_argument("--turns", type=int, default=15, help="turns in each run")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: as torch decides")
    parser.add_argument("--largest", type=float, default=1e7, help="end of the growth curve")
    parser.add_argument("--no-aimet", action="store_true", help="leave AIMET out")
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="malloc as it comes: large results are paged in anew on each call",
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/...)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if arguments is None and not options.fresh_memory:
        keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = Size(
        toy=options.smoke,
        turns=2 if options.smoke else options.turns,
        runs=1 if options.smoke else options.runs,
        largest=int(options.largest),
    )
    about = describe()
    about_cpus = cpu_count()
    versions = own_versions()
    print(f"{about['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with ExitStack() as stack:
        peer = None
        python = find_python()
        if options.smoke or options.no_aimet:
            print("AIMET: left out, as asked for")
        elif python is None:
            print("AIMET: left out, no environment for it here (`make peers` creates one)")
        else:
            peer = stack.enter_context(AimetPeer(python, torch.get_num_threads()))
            versions |= peer.versions
            print(f"AIMET: {peer.versions['aimet-torch']}, in a process of its own, taking turns")
        busy = load()
        if busy > about_cpus / 2 and not options.smoke:
            print(f"The machine is busy (load {busy:.1f} on {about_cpus} processors): noisy times")
        print(
            f"Medians of {size.turns} turns, best of {size.runs} run(s); in brackets the spread "
            "(quartile to quartile).\nOver unit: rimet's time over that of a clone of the same "
            "tensor, or of what is named. Others: their time, and how many times rimet's.\n"
        )
        results: list[dict[str, object]] = []
        header, goals = "", list[str]()
        for row in select(options.only or SECTIONS, size, options.match):
            timings = measure(row, size, peer)
            if row.section != header:
                header = row.section
                print(table_head(header))
            print(table_line(row, timings), flush=True)
            findings = () if row.findings is None else row.findings()
            for finding in findings:
                print(f"    {finding.label}: {finding.value:.4g}", flush=True)
            goals += goal_lines(row, timings, findings)
            results.append(record(row, timings, findings))
    if not results:
        print(f"no row's label contains {options.match!r}", file=sys.stderr)
        return 2
    path = options.output or RESULTS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = about | {"versions": versions, "size": dataclasses.asdict(size), "rows": results}
    path.write_text(json.dumps(document, indent=1) + "\n")
    if goals and not options.smoke:
        print("\nGoals")
        print("\n".join(goals))
    near = path.is_relative_to(Path.cwd())
    print(f"\nWritten to {path.relative_to(Path.cwd()) if near else path}")
    return 0


def select(sections: Iterable[str], size: Size, text: str) -> Iterator[Row]:
    for name in sections:
        for row in importlib.import_module(f"benchmarks.{name}").rows(size):
            if text.lower() in row.label.lower():
                yield row


def goal_met(goal: Reach, timings: dict[str, Timing]) -> bool | None:
    """Whether a goal is reached; None where one of the two was not measured."""
    if goal.who not in timings or goal.over not in timings:
        return None
    return timings[goal.who].median <= goal.times * timings[goal.over].median


#: Columns after the label: the judged contestant, then these; others join the unit's column.
OTHERS = ("torch", "eager", "AIMET")
LABEL, CELL = 66, 19


def table_head(section: str) -> str:
    cells = ("rimet [spread]", "over unit", *OTHERS)
    return section.ljust(LABEL) + "".join(cell.rjust(CELL) for cell in cells)


def table_line(row: Row, timings: dict[str, Timing]) -> str:
    """One row: own time, its ratio to the unit, and the others with their multiple of it."""
    mine = timings[row.contestants[0].name]
    unit = timings[row.unit]
    cells = [
        f"{duration(mine.median)} [{mine.spread:.0%}]",
        f"{mine.median / unit.median:.2f} {row.unit}",
    ]
    for name in OTHERS:
        timing = timings.get(name)
        if timing is None:
            cells.append("-")
        else:
            ratio = timing.median / mine.median
            cells.append(f"{duration(timing.median)} {ratio:.{0 if ratio >= 10 else 1}f}x")
    return row.label.ljust(LABEL) + "".join(cell.rjust(CELL) for cell in cells)


def goal_lines(row: Row, timings: dict[str, Timing], findings: Sequence[Finding]) -> list[str]:
    lines = []
    for goal in row.reaches:
        met = goal_met(goal, timings)
        if met is None:
            continue
        got = timings[goal.who].median / timings[goal.over].median
        if goal.times >= 1:
            text = f"at most {goal.times:g} {goal.over}: {got:.2f}"
        else:
            text = f"at least {1 / goal.times:.0f}x faster than {goal.over}: {1 / got:.1f}x"
        lines.append(f"{'yes' if met else 'NO ':4}{row.label}: {text}")
    for finding in findings:
        if finding.met is not None:
            reached = "yes" if finding.met else "NO "
            lines.append(f"{reached:4}{row.label}: {finding.label}: {finding.value:.4g}")
    return lines


def record(row: Row, timings: dict[str, Timing], findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "section": row.section,
        "label": row.label,
        "elements": row.elements,
        "unit": row.unit,
        "seconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "reaches": [
            {**dataclasses.asdict(goal), "met": goal_met(goal, timings)} for goal in row.reaches
        ],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def describe() -> dict[str, object]:
    """Machine, versions, commit: what a number means nothing without."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cpus": cpu_count(),
        "load": load(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def own_versions() -> dict[str, str]:
    try:
        own = version("rimet")
    except PackageNotFoundError:  # run from a source tree
        own = str(getattr(rimet, "__version__", "unknown"))
    return {"rimet": own, "torch": torch.__version__, "python": platform.python_version()}


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
