"""`otprune_config.json`: read without torch, so that a card is rendered fast."""

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from optimum_otprune.config.checks import check_option
from optimum_otprune.config.options import OPTIONS, OPTIONS_BY_NAME, VERSION_KEY, PruningOptions
from optimum_otprune.errors import ConfigurationError, unknown_name, warn_user
from optimum_otprune.storage.untrusted import read_json, visible

CONFIG_FILE = "otprune_config.json"

_LARGEST = 1 << 18  # the largest file in bytes
# Keys that transformers and optimum write into, or pass to, any configuration.
FOREIGN_KEYS = frozenset({"model_type", "transformers_version", "optimum_version", "name_or_path", "_commit_hash"})


def read_options(file: Path) -> PruningOptions:
    """Read a configuration as it was saved: every value is of the right kind, no default of the method is added.

    Args:
        file: The path of `otprune_config.json`.

    Raises:
        ConfigurationError: If the file is damaged, or a name or value is wrong.
    """
    values = read_options_file(file)
    known = known_options(values)
    is_saved = VERSION_KEY in values
    checked = {
        option.name: check_option(option, known[option.name], is_saved) for option in OPTIONS if option.name in known
    }
    if "pruning_ratio" not in known:
        checked["pruning_ratio"] = None
    options = PruningOptions(**checked)
    options.optimum_otprune_version = str(values.get(VERSION_KEY, _version()))
    return options


def read_options_file(file: Path) -> dict[str, Any]:
    """Read a file as a dictionary, without checking its names and values.

    Raises:
        ConfigurationError: If it is no JSON object, or very large.
    """
    try:
        values = read_json(file, _LARGEST)
    except ValueError as error:
        raise ConfigurationError(
            f"{file.name!r} is no pruning configuration: {error}. Want a file like {CONFIG_FILE!r}, as "
            "`OTPruner.save_pretrained` writes it."
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{file.name!r} holds a {type(values).__name__}, where a configuration is an object of options by name."
        )
    return values


def known_options(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the values that are options; those that a newer version added are left out with a warning.

    Args:
        values: Values by name, as a file holds them.

    Raises:
        ConfigurationError: If an unknown name was written by this version, an older one, or by hand.
    """
    known = {name: value for name, value in values.items() if name in OPTIONS_BY_NAME}
    unknown = sorted(set(values) - set(known) - FOREIGN_KEYS - {VERSION_KEY})
    written_by = str(values.get(VERSION_KEY, _version()))
    if unknown and not _is_newer(written_by):
        raise ConfigurationError(unknown_name("option", unknown[0], OPTIONS_BY_NAME))
    if unknown:
        warn_user(
            f"This configuration was written by optimum_otprune {visible(written_by, 40)}, this is {_version()}. "
            f"Unknown options are left out: {visible(', '.join(unknown))}. Upgrade optimum_otprune to use them."
        )
    return known


def _version() -> str:
    return metadata.version("optimum_otprune")


def _is_newer(version: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part) for part in text.split(".") if re.fullmatch("[0-9]{1,9}", part)]

    return parts(version) > parts(_version())
