"""Check the options of `OTPruner.from_pretrained`."""

import os
from collections.abc import Mapping

import torch

from optimum_otprune.config.checks import check_size
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.storage.hub.options import HubOptions, filled, keywords, part

_PLACES = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def check_loading_options(given: Mapping[str, object]) -> LoadingOptions:
    """Return all options of loading, those that were not given with their defaults.

    Raises:
        ConfigurationError: If there is no option of a given name, or one has a value that it cannot take.
    """
    options = filled(LoadingOptions, given)
    _check_dtype(options["dtype"])
    places, memory = options["device_map"], options["max_memory"]
    if places is not None:
        for place in places.values() if isinstance(places, Mapping) else (places,):
            _check_place(place, places)
    for device, size in (memory or {}).items():
        check_size(f"max_memory[{device!r}]", size)
    return options


def _check_dtype(dtype: object) -> None:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_known = (
        isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1
    )  # none computes with less
    if dtype not in (None, "auto") and not is_known:
        raise ConfigurationError(
            f"`dtype` is {dtype!r:.60}; want 'auto', or a floating-point data type of torch of 16 bits or more, "
            "such as 'bfloat16'."
        )


def _check_place(place: object, places: object) -> None:
    """Raise an error for a value that is no device; only loading finds out whether the machine has it."""
    is_known = isinstance(place, torch.device) or isinstance(place, int) and not isinstance(place, bool) and place >= 0
    if isinstance(place, str) and not is_known:
        try:
            is_known = place in _PLACES or bool(torch.device(place))
        except RuntimeError:
            is_known = False
    if not is_known:
        raise ConfigurationError(
            f"`device_map={places!r}` cannot be followed: {place!r} is no device. Use 'auto', a device such as "
            "'cuda:0', or a dictionary of them by module."
        )


def as_config(config: object, options: LoadingOptions) -> OTPruningConfig:
    """Return a configuration, made from a dictionary or a saved one if needed.

    Args:
        config: A configuration, a dictionary, or where one is saved.
        options: The options of loading.

    Raises:
        ConfigurationError: If it is none of these, or not valid.
    """
    if isinstance(config, OTPruningConfig):
        return config
    if isinstance(config, Mapping):
        return OTPruningConfig.from_dict(config)
    if isinstance(config, (str, os.PathLike)):
        return OTPruningConfig.from_pretrained(str(config), **part(HubOptions, options))
    raise ConfigurationError(
        f"`config` is a {type(config).__name__}; want an OTPruningConfig, a dictionary, or where one is saved."
    )


def refuse_loading_options(options: LoadingOptions) -> None:
    """Raise an error if a model in memory comes with options of loading.

    Raises:
        ConfigurationError: If one is not its default; the message names all of them.
    """
    defaults = keywords(LoadingOptions)
    given = [name for name, value in options.items() if value != defaults[name].about.default]
    if given:
        names = ", ".join(f"`{name}`" for name in given)
        raise ConfigurationError(
            f"A model in memory was given, so there is nothing to load with {names}. "
            "Leave them out, or give a name or folder."
        )
