"""Where the ops write their results."""

from __future__ import annotations

from pathlib import Path

import pytest
import rimet  # noqa: F401  (registers the ops)
import torch

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
#: glibc maps blocks of this size from the system, whatever was freed before (mallopt(3)).
MAPPED = 32 << 20


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address (proc_pid_smaps(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="a kernel without transparent huge pages")
def test_results_that_malloc_maps_anew_are_in_huge_pages() -> None:
    x = torch.zeros(MAPPED // 4).requires_grad_()
    one, zero = torch.ones(1), torch.zeros(1)
    y = torch.ops.rimet.quantize_dequantize(x, one, zero, 0, 255, 0.0, None)
    (gradient,) = torch.autograd.grad(y, x, torch.zeros_like(x))
    f = torch.ops.rimet.float_quantize_dequantize(x, one, 4, 3, True)
    for result in (y, gradient, f):
        assert "hg" in flags_of(result.data_ptr() + MAPPED // 2)
    # What is not ours is left alone.
    assert "hg" not in flags_of(torch.zeros(MAPPED // 4).data_ptr() + MAPPED // 2)
