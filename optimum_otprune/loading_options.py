"""What `OTPruner.from_pretrained` is asked for besides a model."""

import os
from collections.abc import Mapping
from typing import Any

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.registry import unknown_name

LOADING_DEFAULTS: Mapping[str, Any] = {
    "dtype": "auto",
    "device_map": None,
    "max_memory": None,
    "offload_folder": None,
    "revision": None,
    "token": None,
    "cache_dir": None,
    "local_files_only": False,
    "trust_remote_code": False,
    "verify": False,
}


def check_loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of loading, those that were not given with their defaults.

    Raises:
        ConfigurationError: If there is no such option.
    """
    for name in given:
        if name not in LOADING_DEFAULTS:
            raise ConfigurationError(unknown_name("option", name, LOADING_DEFAULTS))
    return {**LOADING_DEFAULTS, **given}


def as_config(config: Any, options: Mapping[str, Any]) -> OTPruningConfig:
    """Return a configuration from whatever stands for one.

    Args:
        config: A configuration, a dictionary, or where one is saved.
        options: Of loading.

    Raises:
        ConfigurationError: If it is none of these, or not valid.
    """
    if isinstance(config, OTPruningConfig):
        return config
    if isinstance(config, Mapping):
        return OTPruningConfig.from_dict(config)
    if isinstance(config, (str, os.PathLike)):
        where = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only")}
        return OTPruningConfig.from_pretrained(str(config), **where)
    raise ConfigurationError(
        f"`config` is a {type(config).__name__}; want an OTPruningConfig, a dictionary, or where one is saved."
    )


def refuse_loading_options(options: Mapping[str, Any]) -> None:
    """Raise where a model in memory comes with options of loading.

    Raises:
        ConfigurationError: Names them.
    """
    given = [name for name, value in options.items() if value != LOADING_DEFAULTS[name]]
    if given:
        names = ", ".join(f"`{name}`" for name in given)
        raise ConfigurationError(
            f"A model in memory was given, so there is nothing to load with {names}. "
            "Leave them out, or give a name or folder."
        )
