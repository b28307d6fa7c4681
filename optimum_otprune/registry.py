"""Registries of plain functions: the extension points of the package.

A registry maps a name, which a configuration file can hold, to a function. Wherever a registered name is accepted, a
plain callable of the same signature is accepted too.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from optimum_otprune.errors import RegistryError

F = TypeVar("F", bound=Callable)

ACTIVATIONS = "activations"
GRADIENTS = "gradients"


class Entry(NamedTuple):
    """One registered function: what a model card says of it, what it must be given, and which options it reads.

    `reads` is None where that is not known.
    """

    name: str
    function: Callable
    reference: str | None
    requires: frozenset[str]
    reads: frozenset[str] | None = None


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
        reference: str | None = None,
        requires: Iterable[str] = (),
        reads: Iterable[str] | None = None,
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function under `name`.

        Args:
            name: Lower-case words joined by underscores.
            reference: Where the method comes from; the model card cites it.
            requires: Statistics that the function reads and that are only collected on demand: `"gradients"` (a
                backward pass over the calibration data) or `"activations"`.
            reads: Options of `SolverSettings` that a solver reads; setting another one is an error. Without it, it may
                read any.

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
            self._entries[name] = Entry(
                name, function, reference, frozenset(requires), None if reads is None else frozenset(reads)
            )
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

    def entry(self, name_or_function: str | F) -> Entry:
        """Look up a name, or wrap a plain callable.

        A callable says what it needs in an attribute `requires`; without one it is given everything.

        Raises:
            RegistryError: If the name is unknown; the message has the nearest name and the whole list.
        """
        if callable(name_or_function):
            requires = getattr(name_or_function, "requires", (ACTIVATIONS, GRADIENTS))
            name = getattr(name_or_function, "__name__", type(name_or_function).__name__)
            return Entry(name, name_or_function, None, frozenset(requires))
        if name_or_function not in self._entries:
            raise RegistryError(unknown_name(self.kind, name_or_function, self._entries))
        return self._entries[name_or_function]

    def __getitem__(self, name_or_function: str | F) -> F:
        return self.entry(name_or_function).function  # type: ignore[return-value]


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not in a list, with the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{suggestion} Known: {', '.join(known)}."
