"""rimet with AIMET's defaults: for programs whose quantizers must stand where AIMET puts them.

Names are those of :mod:`rimet`. In simulations made here functional operations have no quantizers,
and a module class without a quantized twin raises ``UnknownModuleError``; either can be had by
argument. Everything else is :mod:`rimet` itself.
"""

from __future__ import annotations

from rimet import (
    __version__,
    backend_info,
    nn,
    onnx,
    onnx_utils,
    ops_library_path,
    quantization,
    reuse_quantized_params,
)
from rimet.compat import quantsim
from rimet.compat.quantsim import QuantizationSimModel

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
