"""Configurations of targets by their aliases."""

from __future__ import annotations

from rimet.common.quantsim_config.utils import get_path_for_target_config

__all__ = ["get_path_for_target_config"]
