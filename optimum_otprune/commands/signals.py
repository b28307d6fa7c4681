"""SIGTERM, as batch systems send, ends a command as Ctrl-C does: what is half-written goes, and one line is said."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def imports_interrupted() -> Iterator[None]:
    """Let an interruption end imports as such, whatever error a half-imported library makes of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[KeyboardInterrupt] = []

    def stop(number: int, frame: object) -> None:
        seen.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise seen[-1]

    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, stop) for number in signals}  # an ignored signal stays ignored
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if seen:
            raise seen[0] from None


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated` where the process would just end; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*arguments: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
