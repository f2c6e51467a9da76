"""Neural-network quantization and compression for PyTorch, with AIMET's API and a native engine."""

from __future__ import annotations

import torch as _torch

from rimet._versions import check_torch as _check_torch

_check_torch(_torch.__version__)

from rimet import (  # noqa: E402
    _core,
    nn,
    onnx,
    onnx_utils,
    quantization,
    quantsim,
)
from rimet._backend import backend_info, ops_library_path  # noqa: E402
from rimet.nn.reuse import reuse_quantized_params  # noqa: E402
from rimet.quantsim import QuantizationSimModel  # noqa: E402

__version__: str = _core.__version__

__all__ = [
    "QuantizationSimModel",
    "__version__",
    "backend_info",
    "nn",
    "onnx",
    "onnx_utils",
    "ops_library_path",
    "quantization",
    "quantsim",
    "reuse_quantized_params",
]
