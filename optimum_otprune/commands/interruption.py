"""SIGTERM, as batch systems send, ends a command as Ctrl-C does: what is half-written goes, and one line is said."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated` where the process would just end; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*arguments: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
