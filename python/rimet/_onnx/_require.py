"""The packages that ONNX export needs, and nothing else of rimet does."""

from __future__ import annotations

import importlib.util

__all__ = ["require_onnx"]

_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "ml_dtypes")


def require_onnx() -> None:
    """Say what to install if the packages of the extra ``rimet[onnx]`` are not there.

    :raises ImportError: one of them is missing
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: install rimet with its extra, "
            "pip install 'rimet[onnx]'"
        )
