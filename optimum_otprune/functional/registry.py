"""Registries of plain functions: the extension points of the package.

A registry maps a name, which a configuration file can hold, to a function. Wherever a registered name is accepted, a
plain callable of the same signature is accepted too.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from optimum_otprune.errors import RegistryError, unknown_name
from optimum_otprune.functional.references import Reference

F = TypeVar("F", bound=Callable)

ACTIVATIONS = "activations"
GRADIENTS = "gradients"

_FACTS = ("meets", "takes_any")  # that a function may carry as attributes


class Entry(NamedTuple):
    """One registered function and the facts that it was registered with.

    Attributes:
        name: What a configuration holds.
        function: What is called.
        reference: The publication that a model card cites, or the address of one.
        requires: Statistics that are only collected on demand.
        reads: Options that it reads; None where that is not known.
        meets: Whether a solver's plan has to meet the source and the target marginal.
        takes_any: Whether a solver takes the cost as it is: float32 or float64, on its device.
    """

    name: str
    function: Callable
    reference: Reference | str | None
    requires: frozenset[str]
    reads: frozenset[str] | None = None
    meets: tuple[bool, bool] = (True, True)
    takes_any: bool = False

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
        requires: Iterable[str] = (),
        reads: Iterable[str] | None = None,
        meets: tuple[bool, bool] | None = None,
        takes_any: bool | None = None,
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function under `name`.

        Args:
            name: Lower-case words joined by underscores.
            reference: Where the method comes from, a publication or an address; the model card cites it.
            requires: Statistics that the function reads and that are only collected on demand: `"gradients"` (a
                backward pass over the calibration data) or `"activations"`.
            reads: Options that the function reads: `"aggregation"` for an importance, those of `SolverSettings` for a
                solver. Setting one that nothing reads is an error. Without it, the function may read any.
            meets: For a solver: whether its plan has to meet the source and the target marginal.
            takes_any: For a solver: whether it takes the cost in float32 or float64, on its device. What is not said
                here may be said by an attribute of the function.

        Raises:
            RegistryError: If the name is taken or malformed.
        """
        if not (name.isidentifier() and name == name.lower()):
            raise RegistryError(f"{name!r} is no {self.kind} name: use lower-case words joined by underscores.")

        def decorator(function: F) -> F:
            if name in self._entries:
                raise RegistryError(
                    f"The {self.kind} {name!r} is registered already, as "
                    f"`{self._entries[name].function.__qualname__}`. Choose another name."
                )
            read = None if reads is None else frozenset(reads)
            given = {"meets": meets, "takes_any": takes_any}
            facts = _facts(function) | {fact: value for fact, value in given.items() if value is not None}
            self._entries[name] = Entry(name, function, reference, frozenset(requires), read, **facts)
            return function

        return decorator

    def unregister(self, name: str) -> None:
        """Forget a function, for tests and notebooks that register the same one twice."""
        self.entry(name)
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Registered names in order of registration."""
        return list(self._entries)

    def entry(self, name_or_function: str | F | Entry) -> Entry:
        """Look up a name, or wrap a plain callable; an entry is returned as it is.

        A callable says what it needs in an attribute `requires`; without one it is given everything. A solver may also
        carry `meets` and `takes_any`; see `register`.

        Raises:
            RegistryError: If the name is unknown; the message has the nearest name and the whole list.
        """
        if isinstance(name_or_function, Entry):
            return name_or_function
        if callable(name_or_function):
            requires = getattr(name_or_function, "requires", (ACTIVATIONS, GRADIENTS))
            name = getattr(name_or_function, "__name__", type(name_or_function).__name__)
            return Entry(name, name_or_function, None, frozenset(requires), **_facts(name_or_function))
        if name_or_function not in self._entries:
            raise RegistryError(unknown_name(self.kind, name_or_function, self._entries))
        return self._entries[name_or_function]

    def __getitem__(self, name_or_function: str | F) -> F:
        return self.entry(name_or_function).function  # type: ignore[return-value]


def _facts(function: Callable) -> dict[str, Any]:
    """What a function says of itself in attributes."""
    return {name: getattr(function, name) for name in _FACTS if hasattr(function, name)}
