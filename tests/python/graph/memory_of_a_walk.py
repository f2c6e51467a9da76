"""Run by test_streaming.py in a process of its own: walks over a data set four times the budget.

Prints the peak of anonymous resident memory above the model's own. With a second argument it
stops at the second layer, says so, and waits to be killed or interrupted.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from rimet._graph.streaming import StreamingWalk
from torch import nn

MB = 1 << 20
BUDGET = 16 * MB
BATCHES = 32
ROWS, WIDTH = 2048, 256  # 2 MB in float32


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) * 1024


def main(scratch: str, stop: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, quant = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))) for _ in range(2))
    with torch.no_grad():
        quant(model(torch.randn(ROWS, WIDTH)))
    # What torch imports when a dispatch mode is first used is no activation.
    list(StreamingWalk(nn.Linear(2, 2), None, [torch.randn(2, 2)]).visit([""]))
    own = anonymous_bytes()
    peak = own
    running = True

    def sample() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    data = (torch.randn(ROWS, WIDTH) for _ in range(BATCHES))
    walk = StreamingWalk(model, quant, data, memory_budget=BUDGET, scratch_dir=scratch)
    for number, visit in enumerate(walk.visit([str(i) for i in range(5)])):
        for i in range(BATCHES):
            visit.float_outputs[i].sum() + visit.quant_inputs[i].sum()
        if stop and number == 1:
            print("waiting", flush=True)
            time.sleep(60)
    running = False
    sampler.join()
    report = walk.report
    print(
        json.dumps(
            {
                "above": peak - own,
                "budget": BUDGET,
                "batch": ROWS * WIDTH * 4,
                "data": BATCHES * ROWS * WIDTH * 4,
                "streamed": report.streamed,
                "working_set": report.working_set_bytes,
                "peak_resident": report.peak_resident_bytes,
                "spilled": report.spilled_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
