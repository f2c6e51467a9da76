"""CUDA in the tests: the real device where there is one, and kernels on the CPU where there is none."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needless = [item for item in items if item.get_closest_marker("cuda")]
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=needless)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that tensors may be on."""
    return str(request.param)


@pytest.fixture(scope="session")
def host_driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tests/cuda`` and every CUDA kernel, compiled for the CPU: a stand-in for libcuda and NVRTC."""
    from rimet import _core

    folder = tmp_path_factory.mktemp("cuda")
    unit, library = folder / "kernels.cpp", folder / "libcuda_host.so"
    unit.write_text(f'#include "host.h"\n{_core.cuda_kernel_source()}')
    # No contraction to fused multiply-add, as on the GPU; misaligned accesses and indices out of bounds trap.
    options = (
        "-std=c++17 -O1 -shared -fPIC -ffp-contract=off -fno-strict-aliasing -Wall -Werror "
        "-Wno-unknown-pragmas -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error"
    )
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *options.split(),
        *("-I", str(ROOT / "tests" / "cuda"), "-I", str(ROOT / "csrc" / "cuda")),
        *(str(unit), str(ROOT / "tests" / "cuda" / "driver.cpp"), "-o", str(library)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return library
