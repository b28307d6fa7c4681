"""Is the value of one option of the right type and in range?"""

import math
from collections.abc import Mapping
from typing import Any

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.options import Option
from optimum_otprune.quantities import parse_quantity
from optimum_otprune.registry import unknown_name

_DIGITS = 9  # of a layer's index


def check_option(option: Option, value: Any) -> Any:
    """Return the value in the option's type, or raise with the option's name, what was got and what would be right."""
    if value is None:
        if option.optional:
            return None
        raise ConfigurationError(f"`{option.name}` is None; want {_wanted(option)}.")
    problem = ConfigurationError(f"`{option.name}` is {value!r}; want {_wanted(option)}.")
    if option.kind is tuple:
        return _checked_layers(value, problem) if option.choices is None else _checked_names(option, value, problem)
    if option.kind is dict:
        return _checked_by_layer(option, value, problem)
    if option.units is not None and isinstance(value, str):
        return _checked_quantity(option, value, problem)
    if isinstance(value, bool) or not isinstance(value, (int, float) if option.kind is float else option.kind):
        raise problem
    if option.kind is float:
        value = float(value)  # type: ignore[arg-type]
    if option.kind is not str and not _in_range(option, value):
        raise problem
    if option.choices is not None and value not in option.choices:
        raise ConfigurationError(unknown_name(f"`{option.name}`", value, option.choices))
    return value


def _checked_quantity(option: Option, value: str, problem: ConfigurationError) -> str:
    """The string as it was given, once it is known to be a quantity in range."""
    assert option.units is not None
    try:
        quantity = parse_quantity(value, option.units)
    except ValueError as error:
        raise problem from error
    if not _in_range(option, quantity):
        raise problem
    return value


def _checked_names(option: Option, value: Any, problem: ConfigurationError) -> tuple[str, ...]:
    assert option.choices is not None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise problem
    for name in value:
        if name not in option.choices:
            raise ConfigurationError(unknown_name(f"entry of `{option.name}`", name, option.choices))
    return tuple(name for name in option.choices if name in value)


def _checked_layers(value: Any, problem: ConfigurationError) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise problem
    if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in value):
        raise problem
    return tuple(sorted(set(value)))


def _checked_by_layer(option: Option, value: Any, problem: ConfigurationError) -> dict[int, float]:
    """Numbers by layer; files have the layers as strings."""
    if not isinstance(value, Mapping):
        raise problem
    checked = {}
    for layer, number in value.items():
        is_number = isinstance(layer, str) and layer.isascii() and layer.isdigit() and len(layer) <= _DIGITS
        index = int(layer) if is_number else layer
        if isinstance(index, bool) or not isinstance(index, int) or index < 0 or index in checked:
            raise problem
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not _in_range(option, number):
            raise problem
        checked[index] = float(number)
    return dict(sorted(checked.items()))


def _in_range(option: Option, value: float) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))  # an integer may be too large for a float
        and (option.minimum is None or value >= option.minimum)
        and (option.maximum is None or value <= option.maximum)
        and (option.below is None or value < option.below)
        and (option.above is None or value > option.above)
    )


def _wanted(option: Option) -> str:
    kind = {
        float: "a number",
        int: "an integer",
        str: "a string",
        tuple: "a list" if option.choices else "a list of integers",
        dict: "a dictionary of numbers by layer (an integer >= 0), each",
    }[option.kind]
    if option.units is not None:
        kind += f" or a string with a unit ({', '.join(filter(None, option.units))})"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (
            (">=", option.minimum),
            (">", option.above),
            ("<=", option.maximum),
            ("<", option.below),
        )
        if bound is not None
    ]
    of = f" of {', '.join(option.choices)}" if option.choices else ""
    return kind + of + (" " + " and ".join(bounds) if bounds else "")
