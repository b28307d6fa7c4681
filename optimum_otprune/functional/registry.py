"""Registries of plain functions: the extension points of the package.

A registry maps a name, which a configuration file can hold, to a function. Wherever a registered name is accepted, a
plain callable of the same signature is accepted too. Keyword-only parameters of a function are set where it is named:
`"name:parameter=value"`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from optimum_otprune.errors import RegistryError, unknown_name, unregistered_name
from optimum_otprune.functional.parameters import (
    Parameter,
    as_text,
    checked_parameters,
    parameters_of,
    split_name,
    written,
)
from optimum_otprune.functional.plugins import load_plugins
from optimum_otprune.functional.references import Reference

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

ACTIVATIONS = "activations"
GRADIENTS = "gradients"

_FACTS = ("requires", "meets", "takes_any")  # that a function may carry as attributes


class Entry(NamedTuple):
    """One registered function and the facts that it was registered with.

    Attributes:
        name: What a configuration holds, with a value for every parameter.
        function: What is called; its parameters are set.
        reference: The publication that a model card cites, or the address of one.
        requires: Statistics that are only collected on demand.
        reads: Options that it reads; None where that is not known.
        meets: Whether a solver's plan has to meet the source and the target marginal.
        takes_any: Whether a solver takes the cost as it is: float32 or float64, on its device.
        parameters: Those that are its own, with their defaults, by name.
    """

    name: str
    function: Callable[..., Any]
    reference: Reference | str | None
    requires: frozenset[str]
    reads: frozenset[str] | None = None
    meets: tuple[bool, bool] = (True, True)
    takes_any: bool = False
    parameters: Mapping[str, Parameter] = {}

    def may_read(self, option: str) -> bool:
        """Whether the function reads an option, as far as is known."""
        return self.reads is None or option in self.reads

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring; empty without one."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        paragraph = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]

    @property
    def citation(self) -> dict[str, str]:
        """The reference as plain strings: all fields of a publication, an address alone, or nothing."""
        if isinstance(self.reference, Reference):
            return self.reference._asdict()
        return {} if self.reference is None else {"url": self.reference}


class Registry(Generic[F]):
    """Functions of one kind by name.

    Args:
        kind: What one function is, for messages: `"importance"`, `"solver"`, …
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        *,
        reference: Reference | str | None = None,
        requires: Iterable[str] | None = None,
        reads: Iterable[str] | None = None,
        meets: tuple[bool, bool] | None = None,
        takes_any: bool | None = None,
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function under `name`.

        Keyword-only parameters of the function, each with a default and one of the types bool, int, float and str, are
        part of what a configuration can set.

        Args:
            name: Lower-case words joined by underscores.
            reference: Where the method comes from, a publication or an address; the model card cites it.
            requires: Statistics that the function reads and that are only collected on demand: `"gradients"` (a
                backward pass over the calibration data) or `"activations"`. None without it.
            reads: Options that the function reads: `"aggregation"` for an importance; for a solver,
                `"target_distribution"` and those of `SolverSettings`. Setting one that nothing reads is an error.
                Without it, the function may read any.
            meets: For a solver: whether its plan has to meet the source and the target marginal.
            takes_any: For a solver: whether it takes the cost in float32 or float64, on its device. This, `meets` and
                `requires` may be said by an attribute of the function instead.

        Raises:
            RegistryError: If the name is taken or malformed, or a parameter cannot be set by a configuration.
        """
        if not can_be_registered(name):
            raise RegistryError(f"{name!r} is no {self.kind} name: use lower-case words joined by underscores.")

        def decorator(function: F) -> F:
            if name in self._entries:
                raise RegistryError(
                    f"The {self.kind} {name!r} is registered already, as "
                    f"`{self._entries[name].function.__qualname__}`. Choose another name."
                )
            read = None if reads is None else frozenset(reads)
            given = {"requires": requires, "meets": meets, "takes_any": takes_any}
            facts = _facts(function, ()) | {fact: value for fact, value in given.items() if value is not None}
            facts["requires"] = frozenset(facts["requires"])
            facts["parameters"] = parameters_of(function, f"the {self.kind} {name!r}")
            self._entries[name] = Entry(name, function, reference, reads=read, **facts)
            return function

        return decorator

    def unregister(self, name: str) -> None:
        """Forget a function, for tests and notebooks that register the same one twice."""
        if name not in self._entries:
            raise RegistryError(unknown_name(self.kind, name, self._entries))
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether a name is registered, here or by a plugin."""
        if name not in self._entries:
            load_plugins()
        return name in self._entries

    def names(self) -> list[str]:
        """Registered names in order of registration."""
        return list(self._entries)

    def entry(self, given: str | Mapping[str, object] | F | Entry) -> Entry:
        """Look up a name, or wrap a plain callable; an entry is returned as it is.

        A callable says what it needs in an attribute `requires`; without one it is given everything. A solver may also
        carry `meets` and `takes_any`; see `register`.

        Args:
            given: A name, `"name:parameter=value"`, a mapping `{"name": …, "parameter": …}`, or a function.

        Raises:
            RegistryError: If the name or a parameter is unknown (the message has the nearest one and the whole list),
                a value has the wrong type, or a plugin cannot be loaded.
        """
        if isinstance(given, Entry):
            return given
        if isinstance(given, str | Mapping):
            return self._named(as_text(given))
        if not callable(given):
            raise RegistryError(f"{given!r:.60} is no {self.kind}; want a registered name, or a function.")
        name = getattr(given, "__name__", type(given).__name__)
        return Entry(name, given, None, **_facts(given, (ACTIVATIONS, GRADIENTS)))

    def _named(self, text: str) -> Entry:
        name, texts = split_name(text)
        if name not in self:
            raise RegistryError(unregistered_name(self.kind, name, self._entries))
        entry = self._entries[name]
        values = checked_parameters(entry.parameters, texts, f"the {self.kind} {name!r}")
        if not values:
            return entry
        return entry._replace(name=written(name, values), function=functools.partial(entry.function, **values))

    def __getitem__(self, given: str | Mapping[str, object] | F) -> F:
        return self.entry(given).function  # type: ignore[return-value]


class Presets(dict[str, T]):
    """Values by name that plugins may add to: asking whether a name is in it loads them where it is not known."""

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            load_plugins()
        return super().__contains__(name)


def can_be_registered(name: str) -> bool:
    """Return whether a name has the form of a registered one: lower-case words joined by underscores."""
    return name.isidentifier() and name == name.lower()


def _facts(function: Callable[..., Any], requires: Iterable[str]) -> dict[str, Any]:
    """Return what a function says of itself in attributes; what it requires has a default."""
    said = {name: getattr(function, name) for name in _FACTS if hasattr(function, name)}
    return {**said, "requires": frozenset(said.get("requires", requires))}
