"""Check that the value of an option or argument has the right type and is in range."""

import math
from collections.abc import Mapping
from typing import Any

from optimum_otprune.config.options import Option
from optimum_otprune.config.quantities import (
    LARGEST_COUNT,
    SIZE_UNITS,
    parse_quantity,
    parse_share,
    real_number,
    whole_number,
)
from optimum_otprune.errors import ConfigurationError, RegistryError, unknown_name, unregistered_name
from optimum_otprune.functional.parameters import as_text, split_name
from optimum_otprune.functional.registry import Registry, can_be_registered
from optimum_otprune.storage.untrusted import visible

_DIGITS = 9  # the most digits of a layer's index
_LONGEST = 200  # characters of a value in a message


def check_option(option: Option, value: object, is_saved: bool = False) -> Any:
    """Return the value in the option's type, or raise an error with the option, the value and what is right.

    Args:
        option: What the value is for.
        value: As it was given.
        is_saved: Whether the package saved it: then it may be a name that is not registered here.

    Raises:
        ConfigurationError: If the value is of the wrong type, out of range, or an unknown name.
    """
    if value is None:
        if option.optional:
            return None
        raise ConfigurationError(f"`{option.name}` is None; want {_wanted(option)}.")
    problem = ConfigurationError(f"`{option.name}` is {_shown(value)}; want {_wanted(option)}.")
    if option.kind is tuple:
        return (
            _checked_layers(option, value, problem)
            if option.choices is None
            else _checked_names(option, value, problem)
        )
    if option.kind is dict:
        return (
            _checked_by_layer(option, value, problem)
            if option.choices is None
            else _checked_by_name(option, value, problem)
        )
    if option.rules.units is not None and parse_share(value) is not None:
        return value if isinstance(value, str) else real_number(value)
    if option.rules.units is not None and isinstance(value, str):
        return _checked_quantity(option, value, problem)
    if option.rules.registry is not None:
        return _checked_function(option, value, problem)
    if option.rules.words is not None and isinstance(value, str):
        if value not in option.rules.words:
            raise ConfigurationError(
                f"{unknown_name(f'`{option.name}`', value, option.rules.words)} Or give a number."
            )
        return value
    if option.kind is not str:
        number = whole_number(value) if option.kind is int else real_number(value)
        if number is None or not _in_range(option, number):
            raise problem
        return number
    if not isinstance(value, str):
        raise problem
    if option.names is not None and value not in option.names:  # a registry loads plugins before it says no
        is_registry = isinstance(option.names, Registry)
        if is_saved and is_registry and can_be_registered(value):
            return value
        message = unregistered_name if is_registry else unknown_name
        raise ConfigurationError(message(f"`{option.name}`", value, option.choices or ()))
    return value


def _shown(value: object) -> str:
    """Show a value of any size in a message."""
    try:
        return visible(repr(value), _LONGEST)
    except ValueError:  # an integer of more digits than Python writes
        return f"a very large {type(value).__name__}"


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return a count as an int, or raise an error with the argument, the value and what is right.

    Args:
        name: The name of the argument.
        value: An integer of Python or NumPy.
        least: The smallest count that is allowed.

    Raises:
        ConfigurationError: If it is no integer, or out of range.
    """
    number = whole_number(value)
    if number is None or not least <= number <= LARGEST_COUNT:
        raise ConfigurationError(f"`{name}` is {_shown(value)}; want an integer >= {least} and <= {LARGEST_COUNT}.")
    return number


def check_size(name: str, value: Any, least: int = 0) -> int:
    """Return a number of bytes as an int, or raise with the argument's name.

    Args:
        name: The name of the argument.
        value: A whole number of Python or NumPy, or a string such as `"4GB"`.
        least: The smallest size that is allowed, in bytes.

    Raises:
        ConfigurationError: If it is no size, or too small.
    """
    number = real_number(value)
    try:
        if number is None and not isinstance(value, str) or number is not None and not number.is_integer():
            raise ValueError(f"{_shown(value)} is no number of bytes")
        size = parse_quantity(value, SIZE_UNITS) if number is None else int(number)
    except ValueError as error:
        raise ConfigurationError(f"`{name}` {error}. Give bytes, or such as '4GB'.") from error
    if size < least:
        raise ConfigurationError(f"`{name}` is {size}; want {least} or more bytes.")
    return size


def _checked_quantity(option: Option, value: str, problem: ConfigurationError) -> str:
    """Return the string as it was given, after checking that it is a quantity in range."""
    assert option.rules.units is not None
    try:
        quantity = parse_quantity(value, option.rules.units)
    except ValueError as error:
        raise problem from error
    if not _in_range(option, quantity):
        raise problem
    return value


def _checked_function(option: Option, value: object, problem: ConfigurationError) -> str:
    """Return a function's name with its parameters as one text, without checking that they are known."""
    if not isinstance(value, str | Mapping):
        raise problem
    try:
        text = as_text(value)
        split_name(text)
    except RegistryError as error:
        raise ConfigurationError(f"`{option.name}`: {error}") from error
    return text


def _checked_names(option: Option, value: object, problem: ConfigurationError) -> tuple[str, ...]:
    assert option.choices is not None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise problem
    for name in value:
        if name not in option.choices:
            raise ConfigurationError(unknown_name(f"entry of `{option.name}`", name, option.choices))
    return tuple(name for name in option.choices if name in value)


def _checked_layers(option: Option, value: object, problem: ConfigurationError) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise problem
    layers = {whole_number(layer) for layer in value}
    if any(layer is None or not _in_range(option, layer) for layer in layers):
        raise problem
    return tuple(sorted(layer for layer in layers if layer is not None))


def _checked_by_layer(option: Option, value: object, problem: ConfigurationError) -> dict[int, float]:
    """Return numbers by layer; files hold the layers as strings."""
    if not isinstance(value, Mapping):
        raise problem
    checked = {}
    for layer, number in value.items():
        is_number = isinstance(layer, str) and layer.isascii() and layer.isdigit() and len(layer) <= _DIGITS
        index = int(layer) if is_number else whole_number(layer)
        ratio = real_number(number)
        if (
            index is None
            or not 0 <= index <= LARGEST_COUNT
            or index in checked
            or ratio is None
            or not _in_range(option, ratio)
        ):
            raise problem
        checked[index] = ratio
    return dict(sorted(checked.items()))


def _checked_by_name(option: Option, value: object, problem: ConfigurationError) -> dict[str, float]:
    """Return numbers by name, in the order of the names that there are."""
    assert option.choices is not None
    if not isinstance(value, Mapping):
        raise problem
    checked = {}
    for name, given in value.items():
        if name not in option.choices:
            raise ConfigurationError(unknown_name(f"entry of `{option.name}`", name, option.choices))
        ratio = real_number(given)
        if ratio is None or not _in_range(option, ratio):
            raise problem
        checked[name] = ratio
    return {name: checked[name] for name in option.choices if name in checked}


def _in_range(option: Option, value: float) -> bool:
    return (
        abs(value) < math.inf
        and (option.rules.minimum is None or value >= option.rules.minimum)
        and (option.rules.maximum is None or value <= option.rules.maximum)
        and (option.rules.below is None or value < option.rules.below)
        and (option.rules.above is None or value > option.rules.above)
    )


def _wanted(option: Option) -> str:
    kind = {
        float: "a number",
        int: "an integer",
        str: "a string",
        tuple: "a list" if option.choices else "a list of integers",
        dict: "a dictionary of numbers by name, each"
        if option.choices
        else "a dictionary of numbers by layer (an integer >= 0), each",
    }[option.kind]
    if option.rules.units is not None:
        kind += f" or a string with a unit ({', '.join(filter(None, option.rules.units))})"
    bounds = [
        f"{sign} {bound if isinstance(bound, int) else format(bound, 'g')}"
        for sign, bound in (
            (">=", option.rules.minimum),
            (">", option.rules.above),
            ("<=", option.rules.maximum),
            ("<", option.rules.below),
        )
        if bound is not None
    ]
    of = f" of {', '.join(option.choices)}" if option.choices else ""
    words = f", or one of {', '.join(option.rules.words)}" if option.rules.words else ""
    share = ", or a share between 0 and 1 such as '70%' or 0.7" if option.rules.units is not None else ""
    return kind + of + (" " + " and ".join(bounds) if bounds else "") + words + share


def hidden_memory(limit: int | float | str) -> int:
    """Return a limit such as `"4GB"` in bytes.

    Raises:
        ConfigurationError: If it is no size.
    """
    return check_size("max_hidden_memory", limit)
