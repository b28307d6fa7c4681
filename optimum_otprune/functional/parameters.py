"""Parameters of registered functions: what a signature says of them, and how a configuration writes them.

`"name:parameter=value"`, or a mapping with `"name"` and the parameters. No torch here.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Rational, Real
from typing import Any, NamedTuple, TypeAlias

from optimum_otprune.errors import RegistryError, unknown_name

Value: TypeAlias = bool | int | float | str

_WANTED: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer of at most 63 bits",
    float: "a finite number",
    str: "visible text without commas and without space around it",
}
_LARGEST = 2**63  # integers are smaller
_FORM = "want a name, or 'name:parameter=value' with a comma between several parameters"


class Parameter(NamedTuple):
    """A keyword-only parameter of a registered function.

    Attributes:
        name: The name in the signature.
        kind: The type: `bool`, `int`, `float` or `str`.
        default: The default, a value of that type.
    """

    name: str
    kind: type
    default: Value

    def __str__(self) -> str:
        return f"{self.name}: {self.kind.__name__} = {self.default!r}"

    def parsed(self, text: str) -> Value:
        """Return the value that a text stands for.

        Args:
            text: As a configuration holds it.

        Raises:
            ValueError: If it stands for none of this parameter's type.
        """
        found: Value | None
        if self.kind is bool:
            found = {"true": True, "false": False}.get(text.lower())
        elif self.kind is str:
            found = text if _can_be_written(text) else None
        else:
            number = self.kind(text)
            is_in_range = abs(number) < _LARGEST if self.kind is int else math.isfinite(number)
            found = number if is_in_range else None
        if found is None:
            raise ValueError(text)
        return found


def parameters_of(function: Callable[..., object], what: str) -> dict[str, Parameter]:
    """Return the keyword-only parameters in a function's signature, by name.

    Args:
        function: What is registered.
        what: Kind and name of it, for messages.

    Raises:
        RegistryError: If one has no default or no type that a configuration can hold.
    """
    found: dict[str, Parameter] = {}
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions of C, such as `torch.abs`, tell of no parameters
        return found
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is not inspect.Parameter.empty:
                raise RegistryError(
                    f"The parameter {parameter.name!r} of {what} has a default, but cannot be set by a configuration. "
                    "Put it behind `*`, as in `*, power: float = 0.5`, or leave the default out."
                )
            continue
        kinds: list[type] = [kind for kind in _WANTED if parameter.annotation in (kind, kind.__name__)]
        default: Any = parameter.default
        if kinds == [float] and isinstance(default, Integral) and not isinstance(default, bool):
            default = float(default)
        is_settable = parameter.name != "name" and [type(default)] == kinds
        if not is_settable:
            raise RegistryError(
                f"The parameter {parameter.name!r} of {what} cannot be set by a configuration. Give it another name "
                "than 'name', one of the types bool, int, float and str, and a default of that type, such as "
                "`*, power: float = 0.5`."
            )
        found[parameter.name] = Parameter(parameter.name, kinds[0], default)
        _parsed(found[parameter.name], _text(parameter.name, default, what), what)
    return found


def checked_parameters(parameters: Mapping[str, Parameter], texts: Mapping[str, str], what: str) -> dict[str, Value]:
    """Return a value for every parameter, the default for one that is not given.

    Args:
        parameters: The parameters of the function, by name.
        texts: Values by name, as a configuration holds them.
        what: Kind and name of the function, for messages.

    Raises:
        RegistryError: If a name is unknown or a value has the wrong type.
    """
    for name in texts:
        if not parameters:
            raise RegistryError(f"The parameter {name!r} cannot be set: {what} has none. Give its name alone.")
        if name not in parameters:
            raise RegistryError(unknown_name(f"parameter of {what}:", name, parameters))
    return {
        name: _parsed(parameter, texts[name], what) if name in texts else parameter.default
        for name, parameter in parameters.items()
    }


def written(name: str, values: Mapping[str, object]) -> str:
    """Return a function's name with its parameters as one text, which is what a configuration holds.

    Args:
        name: The name of the function.
        values: Booleans, numbers and texts by parameter.

    Raises:
        RegistryError: If a value is none of these, or a text that cannot be told from what is around it.

    Example:
        >>> written("wanda_power", {"power": 0.7, "center": True})
        'wanda_power:power=0.7,center=true'
    """
    parts = ",".join(f"{key}={_text(key, value, repr(name))}" for key, value in values.items())
    return f"{name}:{parts}" if parts else name


def as_text(given: str | Mapping[str, object]) -> str:
    """Return a function's name, with parameters or without, as one text.

    Args:
        given: Such a text, or a mapping with the function's `"name"` and its parameters.

    Raises:
        RegistryError: If it is neither.
    """
    if isinstance(given, str):
        return given
    name = given.get("name")
    if not isinstance(name, str) or ":" in name or not all(isinstance(key, str) for key in given):
        raise RegistryError(
            f"{dict(given)!r:.200} names no function; want {{'name': 'wanda', …}} with its parameters."
        )
    return written(name, {key: value for key, value in given.items() if key != "name"})


def split_name(text: str) -> tuple[str, dict[str, str]]:
    """Return a function's name and the texts of its parameters by name.

    Args:
        text: As a configuration holds it.

    Raises:
        RegistryError: If it is malformed, or sets a parameter twice.

    Example:
        >>> split_name("wanda_power:power=0.7")
        ('wanda_power', {'power': '0.7'})
    """
    name, colon, rest = text.partition(":")
    texts: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not key or not sign:
            raise RegistryError(f"{text!r:.200} is malformed at {part!r:.60}; {_FORM}.")
        if key in texts:
            raise RegistryError(f"{text!r:.200} sets {key!r} twice. Give one value.")
        texts[key] = value
    return name.strip(), texts


def _parsed(parameter: Parameter, text: str, what: str) -> Value:
    try:
        return parameter.parsed(text)
    except ValueError as error:
        raise RegistryError(
            f"The parameter {parameter.name!r} of {what} is {text!r:.60}; want {_WANTED[parameter.kind]}."
        ) from error


def _text(name: str, value: object, what: str) -> str:
    if isinstance(value, str) and _can_be_written(value):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral) and abs(int(value)) < _LARGEST:
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, Rational):  # no fraction, which may be beyond all floats
        return repr(float(value))
    raise RegistryError(
        f"The parameter {name!r} of {what} is {value!r:.60}; want a number, true or false, or {_WANTED[str]}."
    )


def _can_be_written(text: str) -> bool:
    return text.isprintable() and "," not in text and text == text.strip()
