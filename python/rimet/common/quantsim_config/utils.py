"""Where the quantsim configurations are that come with rimet."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

__all__ = [
    "get_path_for_per_channel_config",
    "get_path_for_per_tensor_config",
    "get_path_for_target_config",
    "resolve_config",
]


def get_path_for_per_channel_config() -> str:
    """Path of the default configuration: weights of convolutions and linear layers per channel."""
    return str(_FOLDER / "default_config_per_channel.json")


def get_path_for_per_tensor_config() -> str:
    """Path of the configuration that is the default one but for one range per weight."""
    return str(_FOLDER / "default_config.json")


def _targets() -> dict[str, Path]:
    return {
        "default": _FOLDER / "default_config_per_channel.json",
        **{
            path.stem.replace("_config", ""): path
            for path in sorted(_FOLDER.glob("*_v*_config.json"))
        },
    }


def get_path_for_target_config(target_config: str) -> str:
    """Path of the configuration of a target by its alias, such as ``"default"`` or ``"htp_v73"``.

    Raises:
        ValueError: there is no such target.
    """
    targets = _targets()
    if target_config not in targets:
        raise ValueError(
            f"target_config: expected one of {', '.join(targets)}, got {target_config!r}"
        )
    return str(targets[target_config])


def resolve_config(config_file: str | None) -> str:
    """Path of a configuration given as a path, an alias, or None for the default.

    Raises:
        FileNotFoundError: neither a file nor an alias.
    """
    targets = _targets()
    if config_file is None:
        return str(targets["default"])
    if config_file in targets:
        return str(targets[config_file])
    if Path(config_file).is_file():
        return str(config_file)
    raise FileNotFoundError(
        f"config_file: expected a path or one of the aliases {', '.join(targets)}, got "
        f"{config_file!r}"
    )
