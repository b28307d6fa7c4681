"""One file of any kind as rows: text, JSON, JSON lines, CSV, Parquet or Arrow, compressed or not, by its content.

Files are read in pieces, and nothing is written, not even to a cache. The one exception is a JSON array, or an
object around one: a single value, which the parser of JSON can only read whole. JSON lines and Parquet hold the same
without that. Text is never taken for something else: to the
readers of CSV and JSON that guess types, the text `NA` is nothing, `12` a number and `2020-01-01` a date.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.pruning.calibration.token_ids import is_id_row

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
_CSV_SUFFIXES = (".csv", ".tsv")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_TEXT_SUFFIXES = ("", ".txt", ".text", ".md", ".raw", ".tokens")
DATA_SUFFIXES = (*_TEXT_SUFFIXES, *JSON_SUFFIXES, *_CSV_SUFFIXES, *_TABLE_SUFFIXES)

_ENCODINGS = (  # those of 32 bits first: their marks begin like those of 16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[Path, str], Any]], ...] = (
    (b"\x1f\x8b\x08", gzip.open),
    *((b"BZh%d1AY&SY" % level, bz2.open) for level in range(1, 10)),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"\x28\xb5\x2f\xfd", _open_zst),
)
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException, pd.errors.ParserError)
_PART = 1 << 20  # characters that are read at a time
_HEAD = 1 << 16
_ESCAPE = 12  # characters of two escapes in JSON, the longest that a cut leaves unfinished
_ROWS = 256  # rows of a table that are read at a time


class TextParts(NamedTuple):
    """One long text that is read in parts."""

    parts: Iterator[str]


class Row(NamedTuple):
    """One document as it was found.

    Attributes:
        value: The document, a value of any type.
        where: Where it was found, for messages, such as `"Line 3 of data.jsonl"`.
    """

    value: Any
    where: str


def data_suffix(path: Path) -> str:
    """Return the suffix that names a file's format, in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def file_rows(path: Path, text_column: str) -> Iterator[Row]:
    """Yield the documents of a file: its whole text, or the entries of one column.

    Raises:
        CalibrationDataError: If the file is damaged, is no text, or has no such column.
    """
    with _reading_errors_raised(path):
        yield from _rows(path, text_column)


@contextmanager
def _reading_errors_raised(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into one of ours, also where it is found after the beginning."""
    try:
        yield
    except UnicodeError as error:
        raise _no_text(path, f"it is not {getattr(error, 'encoding', 'UTF-8').upper()} ({_reason(error)})") from error
    except CalibrationDataError:
        raise
    except _DAMAGED as error:
        raise CalibrationDataError(
            f"{path.name} cannot be read ({type(error).__name__}: {_reason(error)}). Check that the file is whole."
        ) from error


def _rows(path: Path, text_column: str) -> Iterator[Row]:
    with _opened(path) as file:
        head = file.read(_HEAD)
    is_parquet = head.startswith(b"PAR1")
    is_arrow = head.startswith((b"ARROW1", b"\xff\xff\xff\xff"))
    if (is_parquet or is_arrow) and _opener(path) is not Path.open:
        raise CalibrationDataError(
            f"{path.name} is a compressed {'Parquet' if is_parquet else 'Arrow'} file, which can be read in parts "
            "only uncompressed. Decompress it."
        )
    if is_parquet:
        yield from _parquet_rows(path, text_column)
    elif is_arrow:
        yield from _arrow_rows(path, text_column)
    else:
        encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), "utf-8-sig")
        first = _first_lines(path, head, encoding)
        if _is_json(path, first, is_cut=len(head) == _HEAD):
            yield from _json_rows(path, encoding, text_column)
        elif (delimiter := _delimiter(path, first, text_column)) is not None:
            yield from _csv_rows(path, encoding, text_column, delimiter)
        else:
            yield Row(TextParts(_text_parts(path, encoding)), path.name)


def _opener(path: Path) -> Callable[[Path, str], Any]:
    """Return the function that opens a file decompressed: `Path.open` if it is not compressed."""
    with path.open("rb") as file:
        head = file.read(10)
    return next((opener for mark, opener in _DECOMPRESSORS if head.startswith(mark)), Path.open)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if it is compressed, whatever its name says."""
    with _opener(path)(path, "rb") as opened:
        yield opened


@contextmanager
def _opened_text(path: Path, encoding: str, newline: str | None) -> Iterator[IO[str]]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding, newline=newline) as text:
        yield text


def _no_text(path: Path, why: str) -> CalibrationDataError:
    return CalibrationDataError(
        f"{path.name} is no text: {why}. Give UTF-8 text, JSON, CSV, Parquet, or token ids as `np.save` writes them."
    )


def _reason(error: BaseException) -> str:
    return getattr(error, "reason", None) or next(iter(str(error).splitlines()), "no reason given")


def _first_lines(path: Path, head: bytes, encoding: str) -> str:
    """Return the beginning of the file as text; the last line may be cut."""
    text = head.decode(encoding, errors="ignore" if len(head) == _HEAD else "strict")
    if "\x00" in text or text.startswith("%PDF-"):
        raise _no_text(path, "it holds binary data")
    return text.lstrip()


def _text_parts(path: Path, encoding: str) -> Iterator[str]:
    with _reading_errors_raised(path), _opened_text(path, encoding, newline=None) as text:
        while part := text.read(_PART):
            if "\x00" in part:
                raise _no_text(path, "it holds binary data")
            yield part


def _is_json(path: Path, first: str, is_cut: bool) -> bool:
    """Return whether a file is named as JSON or begins with JSON documents: one per line, or one value.

    An object in the first line is enough; strings and ids are JSON if every line is, since a text may begin so, too.
    """
    if data_suffix(path) in JSON_SUFFIXES:
        return True
    if not first.startswith(("{", "[", '"', "null")):
        return False
    lines = first.split("\n")
    if is_cut:
        lines.pop()
    is_table = data_suffix(path) in _CSV_SUFFIXES
    try:
        values = [json.loads(line) for line in lines[:1]]
        if not any(_holds_objects(value) for value in values):
            values += [json.loads(line) for line in lines[1:] if line.strip()]
        if values:
            return any(map(_holds_objects, values)) or (not is_table and all(map(_is_document, values)))
    except (ValueError, RecursionError):
        pass  # it may be one JSON value in several lines, or text
    try:
        value = json.loads(first)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        is_whole_until_cut = error.msg.startswith("Unterminated") or error.pos >= len(first.rstrip()) - _ESCAPE
        return is_cut and not is_table and is_whole_until_cut
    except ValueError:
        return False
    return _holds_objects(value) or (not is_table and _is_document(value))


def _holds_objects(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(_first(value), dict))


def _is_document(value: object) -> bool:
    """Return whether a JSON value is a text, a row of ids, a null, or an array of such."""
    entries = value if isinstance(value, list) and not is_id_row(value) else [value]
    return all(entry is None or isinstance(entry, str) or is_id_row(entry) for entry in entries) and bool(entries)


def _first(values: Iterable[object]) -> object:
    """Return the first value that is not null, or None."""
    return next((value for value in values if value is not None), None)


def _json_rows(path: Path, encoding: str, text_column: str) -> Iterator[Row]:
    """Read one JSON value from each line, or one from the whole file if the first line is not valid JSON."""
    with _opened_text(path, encoding, newline="\n") as text:
        is_first = True
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if is_first:
                    break
                raise _not_json(f"Line {number} of {path.name}", error) from error
            is_first = False
            yield from _entries(value, f"Line {number} of {path.name}", text_column)
        else:
            return
    with _opened_text(path, encoding, newline="") as text:
        try:
            value = json.load(text)
        except (ValueError, RecursionError) as error:
            raise _not_json(f"Line {getattr(error, 'lineno', 1)} of {path.name}", error) from error
    yield from _entries(value, path.name, text_column)


def _not_json(where: str, error: BaseException) -> CalibrationDataError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return CalibrationDataError(f"{where} is not JSON ({reason}). Want one object a line, or one array.")


def _entries(value: object, where: str, text_column: str) -> Iterator[Row]:
    """Return the rows in a JSON value: those of an array, of `{"data": […]}`, or the value itself."""
    if isinstance(value, dict) and text_column not in value:
        inner = value.get("data", next(iter(value.values())) if len(value) == 1 else None)
        first = _first(inner) if isinstance(inner, list) else None
        if isinstance(first, (dict, str)) or is_id_row(first) or is_conversation(first):
            value = inner
    if not isinstance(value, list) or is_id_row(value) or is_conversation(value):
        yield Row(picked(value, where, text_column), where)
        return
    for number, entry in enumerate(value, start=1):
        place = f"Entry {number} of {where[0].lower() if where.startswith('Line') else where[0]}{where[1:]}"
        yield Row(picked(entry, place, text_column), place)


def picked(value: object, where: str, text_column: str) -> Any:
    """Return the entry of a column where a row has columns, else the row.

    Raises:
        CalibrationDataError: If it has no such column.
    """
    if not isinstance(value, Mapping):
        return value
    if text_column not in value:
        raise CalibrationDataError(
            f"{where} has no text under {text_column!r}; it has {listed(value)}. Set `text_column` to the right key."
        )
    return value[text_column]


def listed(names: Iterable[object]) -> str:
    """Return names for a message, as many as fit."""
    text = ", ".join(str(name) for name in names)
    if not text:
        return "none"
    return text if len(text) <= 100 else text[:99] + "…"


def is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages, each with `role` and `content`.

    Example:
        >>> is_conversation([{"role": "user", "content": "Hello"}]), is_conversation(["Hello"])
        (True, False)
    """
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(entry, Mapping) and {"role", "content"} <= entry.keys() for entry in value)
    )


def is_null(value: object) -> bool:
    """Return whether a value is null: None, NaN, a null of pandas, or an empty list.

    Example:
        >>> is_null(None), is_null([]), is_null(""), is_null(0)
        (True, True, False, False)
    """
    if isinstance(value, (list, tuple)):
        return not value
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))  # type: ignore[call-overload]


def _delimiter(path: Path, first: str, text_column: str) -> str | None:
    """Return the delimiter of a table, if the file is named as one or its first line names the text's column."""
    line = next(iter(first.splitlines()), "")
    headers = {mark: next(csv.reader([line], delimiter=mark), []) for mark in (",", "\t", ";", "|")}
    fitting = [mark for mark, names in headers.items() if text_column in names and len(names) > 1]
    is_named = data_suffix(path) in _CSV_SUFFIXES
    if fitting and (is_named or all(len(name.split()) == 1 for name in headers[fitting[0]])):
        return fitting[0]
    return max(headers, key=lambda mark: len(headers[mark])) if is_named else None


def _csv_rows(path: Path, encoding: str, text_column: str, delimiter: str) -> Iterator[Row]:
    with _opened_text(path, encoding, newline="") as text:
        reader = pd.read_csv(
            text, sep=delimiter, dtype=str, keep_default_na=False, na_values=[""], chunksize=_ROWS, index_col=False
        )
        with reader:
            number = 0
            while (chunk := _next_chunk(path, reader, number)) is not None:
                _check_column(path, list(chunk.columns), text_column)
                for value in chunk[text_column].tolist():
                    number += 1
                    yield Row(value, f"Row {number} of {path.name}")


def _next_chunk(path: Path, reader: Iterator[pd.DataFrame], read: int) -> pd.DataFrame | None:
    """Return the next rows of a table, or None; pandas warns of fields beyond the columns and drops them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return next(reader, None)
        except pd.errors.ParserWarning as warning:
            raise CalibrationDataError(
                f"{path.name} has, among its rows {read + 1} to {read + _ROWS}, one of more fields than the first "
                "line names columns, so that text would be lost. Put texts that hold the separator in quotes."
            ) from warning


def _check_column(path: Path, names: list[str], text_column: str) -> None:
    if text_column not in names:
        raise CalibrationDataError(
            f"{path.name} has no column {text_column!r}; it has {listed(names)}. Set `text_column`."
        )


def _parquet_rows(path: Path, text_column: str) -> Iterator[Row]:
    with pa.parquet.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow.names, text_column)
        yield from _batch_rows(path, file.iter_batches(_ROWS, columns=[text_column]), text_column)


def _arrow_rows(path: Path, text_column: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, either Feather or the plain stream that `datasets` writes."""
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            _check_column(path, file.schema.names, text_column)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
            _check_column(path, batches.schema.names, text_column)
        yield from _batch_rows(path, batches, text_column)


def _batch_rows(path: Path, batches: Any, text_column: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.column(text_column).to_pylist():
            number += 1
            yield Row(value, f"Row {number} of {path.name}")
