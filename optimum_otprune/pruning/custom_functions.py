"""Functions of users and plugins: they get copies of tensors, and their errors name them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimum_otprune.errors import CustomFunctionError, raised
from optimum_otprune.functional.registry import Entry

_PACKAGE = __name__.partition(".")[0]


def guarded(field: str, entry: Entry) -> Entry:
    """Return an entry whose function can harm nothing but its own result; one of this package is returned as it is.

    The function gets clones of every tensor, so that its writes to them have no effect. Its errors are raised as
    `CustomFunctionError` with the original as cause, except for errors of memory, which it may not have caused.

    Args:
        field: Name of the configuration's field, for messages.
        entry: The registered or given function.
    """
    function = entry.function.func if isinstance(entry.function, functools.partial) else entry.function
    # Where it was defined: `__module__` is what `functools.wraps` copies from another function.
    defined_in = getattr(function, "__globals__", {}).get("__name__", "")
    if str(defined_in).partition(".")[0] == _PACKAGE:
        return entry
    return entry._replace(function=_guarded(field, entry.name, entry.function))


def _guarded(field: str, name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*inputs: object) -> object:
        copies = [_copied(part) for part in inputs]
        try:
            return function(*copies)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            settable = ":" in name and isinstance(error, ValueError)
            advice = "Give another value, or mend it" if settable else "Mend it, or use a registered name in its place"
            raise CustomFunctionError(f"The function {name!r} for `{field}` {raised(error)}. {advice}.") from error

    call.__name__ = name
    return call


def _copied(value: object) -> Any:
    """Return a value with every tensor cloned, in named tuples and mappings too."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return type(value)(*map(_copied, value))
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return value
