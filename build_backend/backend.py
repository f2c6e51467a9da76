"""PEP 517 backend: maturin, told which Python's torch to build against.

torch-sys runs ``python3`` from PATH to find torch. Under pip that must be the interpreter pip builds
for, whatever the shell's PATH says.
"""

from __future__ import annotations

import os
import sys

from maturin import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
os.environ.pop("VIRTUAL_ENV", None)  # torch-sys then calls `python3`, which is now sys.executable's
