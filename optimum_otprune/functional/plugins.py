"""Functions of other packages: found by an entry point, loaded once, when a name is asked for that is not known."""

import threading
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from optimum_otprune.errors import RegistryError

GROUP = "optimum_otprune.plugins"

_lock = threading.RLock()  # a second thread waits until all names are known; a plugin itself may ask for names
_loaded: dict[EntryPoint, RegistryError | None] = {}  # with the error of one that failed


def load_plugins() -> None:
    """Import what packages name in the entry point group `optimum_otprune.plugins`, each once in a process.

    An entry point names a module that registers functions when it is imported, or a function that registers them when
    it is called without arguments.

    Raises:
        RegistryError: If one cannot be imported, raises an error, or names something else. It is not tried again,
            for part of it may be registered: the same error is raised the next time.
    """
    with _lock:
        for point in entry_points(group=GROUP):
            failure = _loaded.get(point)
            if failure is not None:
                raise failure.with_traceback(None)
            if point in _loaded:
                continue
            _loaded[point] = None  # before it asks for names itself
            try:
                _load(point)
            except (Exception, SystemExit) as error:
                package = f" of the package {point.dist.name!r}" if point.dist is not None else ""
                _loaded[point] = failure = RegistryError(
                    f"The plugin {point.name!r}{package} could not be loaded: {type(error).__name__}: "
                    f"{str(error)[:200].rstrip('.')}. Mend it, or uninstall that package."
                )
                raise failure from error


def _load(point: EntryPoint) -> None:
    found = point.load()
    if isinstance(found, ModuleType):
        return
    if not callable(found):
        raise TypeError(f"{point.value!r} is a {type(found).__name__}; want a module, or a function without arguments")
    found()
