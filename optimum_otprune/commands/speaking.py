"""How commands speak: what they print may come from a stranger's file, and steers no terminal."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from optimum_otprune.untrusted import visible

_LONGEST = 2000  # characters of a line about a failure
_COLOR = re.compile(r"\x1b\[[0-9;]*m")  # libraries color their own messages


class VisibleStream(io.TextIOBase):
    """A stream whose characters can all be seen; line breaks and tabulators stay.

    Args:
        stream: That is written to.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it with escapes in place of what cannot be seen."""
        parts = text.split("\n")
        self._stream.write("\n".join(visible(part.expandtabs(), len(text) + 8 * text.count("\t")) for part in parts))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()


class VisibleRecord(logging.LogRecord):
    """A message to any logger, of any library, without colors and with characters that can all be seen, in lines."""

    def getMessage(self) -> str:  # noqa: N802
        """The message."""
        message = _COLOR.sub("", super().getMessage())
        return "\n".join(visible(line.expandtabs(), 8 * len(line) + 8) for line in message.splitlines())


class VisibleFormatter(logging.Formatter):
    """Log lines whose characters can all be seen."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return one_line(super().format(record))


@contextmanager
def speaking() -> Iterator[None]:
    """Print and log what can be seen, and each warning as one line on standard error, while a command runs."""
    factory = logging.getLogRecordFactory()
    with warnings.catch_warnings(), redirect_stdout(VisibleStream(sys.stdout)):
        warnings.showwarning = _show_warning
        logging.setLogRecordFactory(VisibleRecord)
        try:
            yield
        finally:
            logging.setLogRecordFactory(factory)


def one_line(message: object) -> str:
    """A message of any origin as one line of characters that can be seen."""
    return visible(" ".join(str(message).split()), _LONGEST)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)
