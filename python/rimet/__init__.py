"""Neural-network quantization and compression for PyTorch, with AIMET's API and a native engine."""

from __future__ import annotations

import torch as _torch

from rimet._versions import check_torch as _check_torch

_check_torch(_torch.__version__)

from rimet import _core  # noqa: E402  (registers torch.ops.rimet; needs torch's libraries loaded)
from rimet._backend import backend_info, ops_library_path  # noqa: E402

__version__: str = _core.__version__

__all__ = ["__version__", "backend_info", "ops_library_path"]
