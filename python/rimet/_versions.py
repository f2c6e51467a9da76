"""Which torch this build of rimet works with. Imports nothing, so that it can say so."""

from __future__ import annotations

# The native engine is compiled against exactly this version of torch's C++ API.
SUPPORTED_TORCH = "2.11.0"


def check_torch(version: str) -> None:
    """Raise ImportError, in one sentence, unless ``version`` is the torch this build fits."""
    if version.split("+")[0] != SUPPORTED_TORCH:
        raise ImportError(
            f"this build of rimet works with torch {SUPPORTED_TORCH} (CPU or CUDA build), but torch "
            f"{version} is installed: run `pip install torch=={SUPPORTED_TORCH}`, or build rimet "
            "against a matching torch."
        )
