"""Names of AIMET's first generation: ``FakeQuantizedX`` is :class:`rimet.nn.QuantizedX`."""

from __future__ import annotations

from typing import Any

import rimet.nn as _nn
from rimet.nn.modules import custom as _custom

FakeQuantizationMixin = _nn.QuantizationMixin

__all__ = ["FakeQuantizationMixin"]
for _module in (_custom, _nn):  # the modules of torch.nn win where names meet
    for _name in _module.__all__:
        if _name.startswith("Quantized"):
            globals()[f"Fake{_name}"] = getattr(_module, _name)
            if f"Fake{_name}" not in __all__:
                __all__.append(f"Fake{_name}")


def __getattr__(name: str) -> Any:  # for type checkers: the names are made above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
