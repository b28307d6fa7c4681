"""Input from strangers: JSON read strictly and within limits, and text shown without what would steer a terminal."""

import json
import math
import os
from pathlib import Path
from typing import Any

_LARGEST = 1 << 27  # bytes: a report of 126 layers that keep 53,248 channels each has 100 MB
_MOST_CONTAINERS = 100_000  # objects and lists, each of which takes far more memory than the two bytes of its brackets
_DEEPEST = 32  # levels of nesting; files of ours have fewer than ten


def read_json(file: Path, largest: int = _LARGEST) -> Any:
    """Return what a JSON file holds.

    Args:
        file: A plain file.
        largest: The most bytes that it may have.

    Raises:
        ValueError: If the file is larger, cannot be read, or is not what `parse_json` takes. The message does not name
            the file, and is written to follow a colon.
    """
    return parse_json(read_bytes(file, largest))


def read_bytes(file: Path, largest: int = _LARGEST) -> bytes:
    """Return the content of a file that may be too large to be read.

    Args:
        file: A plain file.
        largest: The most bytes that it may have.

    Raises:
        ValueError: If it is larger, or cannot be read; the text, without the file's name, can follow a colon.
    """
    try:
        with file.open("rb") as stream:
            blob = stream.read(largest + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    if len(blob) > largest:
        raise ValueError(f"it is larger than {largest / 1e6:,.1f} MB")
    return blob


def parse_json(blob: bytes) -> Any:
    """Parse JSON that means the same to every reader: no NaN or infinity, no name twice in an object.

    Args:
        blob: Text in UTF-8.

    Raises:
        ValueError: If it is no such JSON, is nested more than 32 levels deep, or holds over 100,000 objects and lists.
    """
    if blob.count(b"{") + blob.count(b"[") > _MOST_CONTAINERS:  # before anything is made of them
        raise ValueError(f"it holds more than {_MOST_CONTAINERS:,} objects and lists")
    try:
        value = json.loads(
            blob.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    level, depth = _inner([value]), 0
    while level := [inner for outer in level for inner in _inner(outer)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
    return value


def visible(text: str, max_length: int = 200) -> str:
    r"""Return a text as one line in which characters that cannot be seen, such as control characters, are escaped.

    Args:
        text: Text of any origin, which is made one line.
        max_length: The most characters of the text before escaping; what is longer ends with "…".

    Example:
        >>> print(visible("a\x1b[31m\u202eb"))
        a\x1b[31m\u202eb
    """
    short = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def why_no_name(text: str) -> str | None:
    r"""Say why no file or folder can have this name, or None where one could.

    Args:
        text: A name or path, with `~` expanded.

    Example:
        >>> why_no_name("models/new"), why_no_name(" "), why_no_name("a\0b")
        (None, 'it is empty', 'it holds characters that are no text')
    """
    if not text.strip():
        return "it is empty"
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        return error.strerror
    except ValueError:
        return "it holds characters that are no text"
    return None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a name twice")
    return values


def _inner(value: dict | list) -> list[dict | list]:
    values = value.values() if isinstance(value, dict) else value
    return [inner for inner in values if isinstance(inner, (dict, list))]
