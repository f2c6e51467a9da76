"""Another name of :mod:`rimet.nn.modules.custom`, as in AIMET."""

from __future__ import annotations

from rimet.nn.modules import custom as _custom
from rimet.nn.modules.custom import *  # noqa: F403

__all__ = _custom.__all__
