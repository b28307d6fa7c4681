"""Messages of commands: they may quote a stranger's file, so control characters are made visible."""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from optimum_otprune.errors import OutputError
from optimum_otprune.storage.untrusted import visible

_LONGEST = 2000  # characters of a line about a failure
_COLOR = re.compile(r"\x1b\[[0-9;]*m")  # libraries color their own messages


class VisibleStream(io.TextIOBase):
    """A stream whose characters can all be seen; line breaks and tabulators stay.

    An error of writing ends no work: the first one is kept, and later output is dropped.

    Args:
        stream: The stream that is written to.

    Attributes:
        failure: Why the stream could not be written, or None.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text with escapes in place of invisible characters."""
        parts = text.split("\n")
        shown = "\n".join(visible(part.expandtabs(), len(text) + 8 * text.count("\t")) for part in parts)
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            act()
        except OSError as error:
            self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # otherwise flushing the buffer fails again at exit
            os.close(nowhere)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


class VisibleRecord(logging.LogRecord):
    """A message to any logger, of any library, without colors and with characters that can all be seen, in lines."""

    def getMessage(self) -> str:  # noqa: N802
        """Return the message."""
        message = _COLOR.sub("", super().getMessage())
        return "\n".join(visible(line.expandtabs(), 8 * len(line) + 8) for line in message.splitlines())


class VisibleFormatter(logging.Formatter):
    """Log lines whose characters can all be seen."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return one_line(super().format(record))


@contextmanager
def speaking() -> Iterator[None]:
    """Make all output visible characters, and each warning one line on standard error, while a command runs.

    Raises:
        OutputError: At the end, if not all could be printed.
        SystemExit: At the end, if nobody reads what is printed.
    """
    factory = logging.getLogRecordFactory()
    stream = VisibleStream(sys.stdout or io.StringIO())  # the process has no standard output
    with warnings.catch_warnings(), redirect_stdout(stream):
        warnings.showwarning = _show_warning
        logging.setLogRecordFactory(VisibleRecord)
        try:
            yield
        finally:
            logging.setLogRecordFactory(factory)
            stream.flush()
    if isinstance(stream.failure, BrokenPipeError):
        raise SystemExit(1)
    if stream.failure is not None:
        raise OutputError(
            f"The command is done, but what it prints could not be written ({stream.failure.strerror}). Make room, or "
            "print it elsewhere."
        ) from stream.failure


def one_line(message: object) -> str:
    """Return a message of any origin as one line of visible characters."""
    return visible(" ".join(str(message).split()), _LONGEST)


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **kwargs: object) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)
