"""What loading and pushing may be told, written once: signatures, checks, command line and documentation come from it.

Options are the keys of a `TypedDict`, for these type the `**options` of a function: an editor completes them and a
type checker finds a wrong one. No torch here, so that `otprune --help` is fast.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, NamedTuple, TypedDict, TypeVar, Union, get_args, get_origin

from optimum_otprune.errors import ConfigurationError, unknown_name
from optimum_otprune.storage.untrusted import visible

PUSH_OPTION = "push option"  # the word for an option in messages
_IN_WORDS = {
    str: "a string",
    bool: "True or False",
    int: "an integer",
    float: "a number",
    dict: "a dictionary",
    os.PathLike: "a path",
    NoneType: "None",
}

T = TypeVar("T")


class About(NamedTuple):
    """The help text and default of an option, written beside its type.

    Attributes:
        default: The value of an option that is not given.
        help: The meaning of the option, for the command line and the documentation.
        metavar: The word for its value on the command line; None is the option's name.
        is_flag: Whether commands have the option.
    """

    default: Any
    help: str
    metavar: str | None = None
    is_flag: bool = True


class HubOptions(TypedDict, total=False):
    """The options of reading a repository of the Hub."""

    revision: Annotated[str | None, About(None, "branch, tag or commit of the repository")]
    token: Annotated[str | bool | None, About(None, "Hub token (default: the one that `hf auth login` saved)")]
    cache_dir: Annotated[str | os.PathLike | None, About(None, "folder for downloads", "DIR")]
    local_files_only: Annotated[bool, About(False, "never ask the Hub")]


class PushOptions(TypedDict, total=False):
    """The options of writing a repository of the Hub."""

    private: Annotated[bool | None, About(None, "make the repository private if it is new")]
    revision: Annotated[str | None, About(None, "branch; made if it does not exist (default: the main one)")]
    create_pr: Annotated[bool, About(False, "open a pull request instead")]
    commit_message: Annotated[str | None, About(None, "first line of the commit", "TEXT")]
    token: Annotated[str | bool | None, About(None, "Hub token (default: the one that `hf auth login` saved)")]
    deadline: Annotated[
        float | None,
        About(None, "give up after so many seconds (default: 3600, more for a folder that needs more at 2 MB/s)", "S"),
    ]


class Keyword(NamedTuple):
    """One option, for programs.

    Attributes:
        kind: `bool`, `int` and `float` as the type says, `str` for all that a command line can only give as text.
        about: The help text and default that are written beside its type.
        types: The types that a value may have; empty where torch is needed to know them.
    """

    kind: type
    about: About
    types: tuple[type, ...]


@cache
def keywords(options: Callable[..., object]) -> Mapping[str, Keyword]:
    """Return the options of a `TypedDict` by name, in the order in which they are written."""
    return {name: _keyword(*get_args(annotation)) for name, annotation in options.__annotations__.items()}


def _keyword(annotation: object, about: About) -> Keyword:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = () if isinstance(annotation, ForwardRef) else tuple(get_origin(member) or member for member in members)
    return Keyword(members[0] if members[0] in (bool, int, float) else str, about, types)


def _check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    """Raise an error if a value has another type than is written; a wrong token is not shown."""
    wider = tuple({int: Integral, float: Real, dict: Mapping}.get(kind, kind) for kind in types)
    if not types or (isinstance(value, wider) if not isinstance(value, bool) else bool in types):
        return
    shown = f"of type {type(value).__name__}" if name == "token" else visible(repr(value), 60)
    raise ConfigurationError(f"`{name}` is {shown}; want {' or '.join(_IN_WORDS[kind] for kind in types)}.")


def filled(options: Callable[..., T], given: Mapping[str, object], what: str = "option") -> T:
    """Return all options of a `TypedDict`, those that were not given, or given as None, with their defaults.

    Args:
        options: The `TypedDict` that declares the options.
        given: Values by name.
        what: The word for an option in messages.

    Raises:
        ConfigurationError: If there is no option of a given name, or a value has another type than is written.
    """
    known = keywords(options)
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(unknown_name(what, name, known))
        if value is not None:
            _check_type(name, value, known[name].types)
    values = {name: value for name, value in given.items() if value is not None}
    return options(**{name: values.get(name, keyword.about.default) for name, keyword in known.items()})


def part(options: Callable[..., T], values: Mapping[str, object]) -> T:
    """Return those values that are options of a `TypedDict` and not None."""
    return options(**{name: values[name] for name in keywords(options) if values.get(name) is not None})
