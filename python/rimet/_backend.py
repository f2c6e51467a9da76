"""What code runs where, and the ops library for processes without the Python package."""

from __future__ import annotations

from typing import Any

import torch

from rimet import _core


def backend_info() -> dict[str, Any]:
    """Say which implementation serves each device, and why.

    Returns:
        ``cpu_isa`` (instruction set of the CPU kernels in use), ``cpu_isa_detected`` (the widest
        this processor has), ``threads`` (torch's intra-op threads, which the kernels use),
        ``cuda_kernels`` (whether kernels compute the tensors of the current CUDA device; plain tensor
        operations give the same results otherwise), ``cuda`` (with what, or why not),
        ``version`` of the ops in use, ``torch``.
    """
    cuda_kernels, cuda = False, "no CUDA device"
    if torch.cuda.is_available():
        cuda_kernels, cuda = _core.cuda_status(torch.cuda.current_device())
    isa, detected = _core.cpu_isa()
    return {
        "version": _core.registered_version(),
        "torch": torch.__version__,
        "cpu_isa": isa,
        "cpu_isa_detected": detected,
        "threads": torch.get_num_threads(),
        "cuda_kernels": cuda_kernels,
        "cuda": cuda,
    }


def ops_library_path() -> str:
    """Path of a shared library for ``torch.ops.load_library``: the ops alone, without ``import rimet``.

    A process that only runs a TorchScript file needs torch and this library. It is the extension
    module itself, so the process must be a Python of the same version; programs in C++ or Rust load
    ``librimet.so`` (``cargo build --release``) instead.
    """
    return str(_core.__file__)
