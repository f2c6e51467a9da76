"""Logging, deprecation and other small tools."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from rimet.common.defs import CallbackFunc

__all__ = [
    "AimetLogger",
    "CallbackFunc",
    "Handle",
    "compute_psnr",
    "convert_configs_values_to_bool",
    "deprecated",
    "docstring",
    "kill_process_with_name_and_port_number",
    "log_package_info",
    "log_with_error_and_assert_if_false",
    "profile",
    "round_down_to_multiplicity",
    "round_up_to_multiplicity",
    "save_json_yaml",
    "start_bokeh_server_session",
]

_F = TypeVar("_F", bound=Callable[..., Any])


class AimetLogger(logging.Logger):
    """Loggers by area of work: Python's own, below the logger ``rimet``.

    Handlers are the program's affair.
    """

    class LogAreas(Enum):
        """Areas that have a logger of their own."""

        Quant = "Quant"
        Svd = "Svd"
        Test = "Test"
        Utils = "Utils"
        CompRatioSelect = "CompRatioSelect"
        ChannelPruning = "ChannelPruning"
        Winnow = "Winnow"
        ConnectedGraph = "ConnectedGraph"
        CrosslayerEqualization = "CrossLayerEqualization"
        MixedPrecision = "MixedPrecision"
        BatchNormFolding = "BatchNormFolding"
        ModelPreparer = "ModelPreparer"
        LayerOutputs = "LayerOutputs"
        QuantAnalyzer = "QuantAnalyzer"
        SeqMse = "SeqMse"
        AdaScale = "AdaScale"
        FPTQuant = "FPTQuant"
        SpinQuant = "SpinQuant"
        LlmTopology = "LlmTopology"

    @staticmethod
    def get_area_logger(area: LogAreas) -> logging.Logger:
        """The logger of an area.

        :raises TypeError: not an area
        """
        if not isinstance(area, AimetLogger.LogAreas):
            raise TypeError(f"area: expected a member of LogAreas, got {area!r}")
        return logging.getLogger(f"rimet.{area.value}")

    @staticmethod
    def set_area_logger_level(area: LogAreas, level: int) -> None:
        """Set the level of one area's logger."""
        AimetLogger.get_area_logger(area).setLevel(level)

    @staticmethod
    def set_level_for_all_areas(level: int) -> None:
        """Set the level of all areas' loggers."""
        for area in AimetLogger.LogAreas:
            AimetLogger.get_area_logger(area).setLevel(level)


class Handle:
    """Something to be undone, by :meth:`remove` or at the end of a ``with`` block; once."""

    def __init__(self, cleanup_fn: Callable[[], Any]) -> None:
        self._cleanup_fn: Callable[[], Any] | None = cleanup_fn

    def remove(self) -> None:
        """Undo it, if that has not happened yet."""
        cleanup_fn, self._cleanup_fn = self._cleanup_fn, None
        if cleanup_fn is not None:
            cleanup_fn()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def deprecated(msg: str = "", deletion_planned: str = "") -> Callable[[_F], _F]:
    """Decorator: calling the function (or making the class) warns.

    :param msg: what to do instead
    :param deletion_planned: version that will be without it
    """

    def decorator(target: _F) -> _F:
        text = f"{target.__qualname__} is deprecated"
        if deletion_planned:
            text += f" and will be deleted in {deletion_planned}"
        if msg:
            text += f". {msg}"

        if isinstance(target, type):
            original = target.__init__  # type: ignore[misc]

            @functools.wraps(original)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                original(self, *args, **kwargs)

            target.__init__ = init  # type: ignore[misc]
            return target

        @functools.wraps(target)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return target(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorator


def docstring(doc: str) -> Callable[[_F], _F]:
    """Decorator that sets the documentation of a function or class."""

    def decorator(target: _F) -> _F:
        target.__doc__ = doc
        return target

    return decorator


def log_with_error_and_assert_if_false(
    condition: bool, logger: logging.Logger, error_msg: str
) -> None:
    """Unless ``condition`` holds, log the message and raise.

    :raises AssertionError: the condition does not hold
    """
    if not condition:
        logger.error(error_msg)
        raise AssertionError(error_msg)


def log_package_info() -> None:
    """Log the versions of rimet and torch."""
    import torch

    import rimet

    AimetLogger.get_area_logger(AimetLogger.LogAreas.Utils).info(
        "rimet %s, torch %s", getattr(rimet, "__version__", "unknown"), torch.__version__
    )


@contextmanager
def profile(
    label: str,
    file: str | os.PathLike[str] | None = None,
    new_file: bool = False,
    logger: logging.Logger | None = None,
    cleanup: Callable[[], Any] | None = None,
) -> Iterator[None]:
    """Measure the time of a ``with`` block.

    :param label: name in the message
    :param file: append the message to this file
    :param new_file: begin the file anew
    :param logger: where to log the message; printed otherwise
    :param cleanup: called before the clock is read at either end (such as
        ``torch.cuda.synchronize``)
    """
    if cleanup is not None:
        cleanup()
    start = time.perf_counter()
    try:
        yield
    finally:
        if cleanup is not None:
            cleanup()
        message = f"{label}: {time.perf_counter() - start:.2f}s"
        if logger is not None:
            logger.info(message)
        else:
            print(message)
        if file is not None:
            with open(file, "w" if new_file else "a", encoding="utf-8") as out:
                out.write(message + "\n")


def round_up_to_multiplicity(multiplicity: int, num: int, max_allowable_num: int) -> int:
    """Smallest multiple of ``multiplicity`` from ``num`` on, at most ``max_allowable_num``."""
    return min(-(-num // multiplicity) * multiplicity, max_allowable_num)


def round_down_to_multiplicity(multiplicity: int, num: int) -> int:
    """Largest multiple of ``multiplicity`` up to ``num``; a ``num`` below it stays as it is."""
    if num <= multiplicity:
        return num
    return num // multiplicity * multiplicity


def convert_configs_values_to_bool(dictionary: Any) -> None:
    """Replace the strings "True" and "False" by booleans, in place, in nested dicts and lists."""
    if isinstance(dictionary, dict):
        for key, value in dictionary.items():
            if value in ("True", "False"):
                dictionary[key] = value == "True"
            else:
                convert_configs_values_to_bool(value)
    elif isinstance(dictionary, list):
        for item in dictionary:
            convert_configs_values_to_bool(item)


@deprecated("Write the file with json.dump")
def save_json_yaml(file_path: str | os.PathLike[str], dict_to_save: dict[str, Any]) -> None:
    """Write a dict to a JSON file."""
    with open(file_path, "w", encoding="utf-8") as out:
        json.dump(dict_to_save, out, indent=4)


def compute_psnr(expected: np.ndarray, actual: np.ndarray, max_psnr: float = 100.0) -> float:
    r"""Peak signal-to-noise ratio in decibels, at most ``max_psnr``.

    .. math:: 10 \log_{10} \frac{\max |expected|^2}{mean (expected - actual)^2}

    :param expected, actual: arrays of one shape
    :raises ValueError: their shapes differ
    """
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.shape != actual.shape:
        raise ValueError(f"actual: expected shape {expected.shape}, got {actual.shape}")
    noise = float(np.mean((expected - actual) ** 2))
    peak = float(np.max(np.abs(expected))) ** 2
    if noise == 0:
        return max_psnr
    if peak == 0:
        return 0.0
    return min(10 * float(np.log10(peak / noise)), max_psnr)


def start_bokeh_server_session(port: int | None = None) -> tuple[str, Any]:
    """Start a bokeh server in a process of its own.

    :param port: its port; a free one by default
    :return: ``(url, process)``
    :raises ImportError: bokeh is not installed (``pip install rimet[viz]``)
    :raises RuntimeError: the server does not answer
    """
    import importlib.util
    import socket
    import subprocess
    import sys

    if importlib.util.find_spec("bokeh") is None:
        raise ImportError("plots need bokeh: pip install 'rimet[viz]'")
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bokeh",
            "serve",
            "--port",
            str(port),
            f"--allow-websocket-origin=localhost:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://localhost:{port}/", process
        time.sleep(0.1)
    process.terminate()
    raise RuntimeError(f"port: the bokeh server did not answer on port {port}")


def kill_process_with_name_and_port_number(name: str, port_number: int) -> None:
    """End this user's processes of that name whose command line has ``--port <port_number>``.

    Reads ``/proc``; does nothing on systems without it.
    """
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as source:
                words = source.read().decode(errors="replace").split("\0")
            mine = os.stat(f"/proc/{entry}").st_uid == os.getuid()
        except OSError:
            continue
        named = any(name in os.path.basename(word) for word in words[:3])
        at_port = any(
            a == "--port" and b == str(port_number) for a, b in zip(words, words[1:], strict=False)
        )
        if mine and (named or name in words) and (at_port or f"--port={port_number}" in words):
            os.kill(int(entry), signal.SIGTERM)
