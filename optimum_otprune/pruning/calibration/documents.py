"""Data of any kind as documents: texts, or rows of token ids, read one after another. The only door to `datasets`."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import WRITTEN
from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.pruning.calibration.text_files import (
    DATA_SUFFIXES,
    Row,
    TextParts,
    data_suffix,
    file_rows,
    is_conversation,
    is_null,
    listed,
    picked,
)
from optimum_otprune.pruning.calibration.token_ids import id_row, is_id_row, local_path
from optimum_otprune.storage.hub.client import is_hub_id, without_secrets_in_warnings
from optimum_otprune.storage.manifest import CARD_FILE

logger = logging.getLogger(__name__)

TokenSource: TypeAlias = (
    str
    | os.PathLike
    | Sequence
    | datasets.Dataset
    | datasets.DatasetDict
    | datasets.IterableDataset
    | datasets.IterableDatasetDict
    | Tensor
    | np.ndarray
)

_SHUFFLED = 1000  # rows of a streamed data set that wait to be shuffled
_ROWS = 256
_EMPTY_ROWS = 100_000  # without text, one after another: no text of anybody has such a gap, and to read on may not end


class Documents(NamedTuple):
    """Documents that can be read as often as needed.

    Attributes:
        source: For reports: a Hub id, or what kind of data it is; never a local path.
        rows: Reads every document as it was found.
        column: Name of the column of texts.
        tokenizer: The tokenizer whose chat template renders conversations.
        is_local: Whether they can be read without asking the Hub.
        is_streamed: Whether they may have no end, so that only some are read.
    """

    source: str
    rows: Callable[[], Iterator[Row]]
    column: str
    tokenizer: PreTrainedTokenizerBase | None
    is_local: bool = True
    is_streamed: bool = False

    def hold_ids(self) -> bool:
        """Return whether the documents are token ids, judged by the first one that is not null."""
        return next((kind for row in self._read() if (kind := _kind(row)) is not None), "text") == "token ids"

    def text(self) -> Iterator[str]:
        """Yield all text in parts, a blank line between documents."""
        separator = ""
        for row in self._without_nulls("text"):
            if separator:
                yield separator
            separator = "\n\n"
            if isinstance(row.value, TextParts):
                yield from row.value.parts
            else:
                yield _valid(self._rendered(row) if is_conversation(row.value) else str(row.value), row.where)

    def ids(self) -> Iterator[np.ndarray]:
        """Yield all token ids, row by row."""
        for row in self._without_nulls("token ids"):
            yield id_row(row.value, row.where)

    def _read(self) -> Iterator[Row]:
        """Yield every row; stop with an error at a stream that holds no text for too long."""
        empty = 0
        for row in self.rows():
            empty = empty + 1 if _is_empty(row.value) else 0
            if self.is_streamed and empty == _EMPTY_ROWS:
                raise CalibrationDataError(
                    f"{row.where} is null or empty, as are the {_EMPTY_ROWS - 1:,} before it: the stream may go on so "
                    f"for ever. Give one with text under {self.column!r}, or set `text_column`."
                )
            yield row

    def _without_nulls(self, wanted: str) -> Iterator[Row]:
        """Yield the rows of one kind; log at the end how many rows were null."""
        rows, nulls = 0, 0
        try:
            for row in self._read():
                rows += 1
                kind = _kind(row)
                if kind is None:
                    nulls += 1
                elif kind == wanted or {kind, wanted} == {"conversation", "text"}:
                    yield row
                else:
                    raise CalibrationDataError(
                        f"{row.where} holds {kind}, those before it {wanted}. Give data of one kind."
                    )
        finally:
            if nulls:
                logger.warning("%d of %d rows are null and were left out.", nulls, rows)

    def _rendered(self, row: Row) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise CalibrationDataError(
                f"{row.where} (column {self.column!r}) holds a conversation, but the tokenizer has no chat template. "
                "Give text, or a tokenizer with one."
            )
        try:
            return str(self.tokenizer.apply_chat_template(list(row.value), tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise CalibrationDataError(
                f"{row.where} (column {self.column!r}) holds a conversation that the tokenizer's chat template "
                f"refuses ({error}). Mend it, leave it out, or give text."
            ) from error


def chat_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a user's turn as the chat template renders it, up to where the model's answer begins.

    Args:
        prompt: What the user says.
        tokenizer: The tokenizer, whose chat template is used.

    Raises:
        CalibrationDataError: If the tokenizer has no chat template, or that refuses the prompt.
    """
    if not tokenizer.chat_template:
        raise CalibrationDataError(
            "The tokenizer has no chat template, so a prompt cannot be a user's turn. Give it as plain text (without "
            "`chat`)."
        )
    turn = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise CalibrationDataError(
            f"The tokenizer's chat template refuses a prompt ({error}). Give it as plain text (without `chat`)."
        ) from error


def _is_empty(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else is_null(value)


def _kind(row: Row) -> str | None:
    """Return the kind of a row, None for a null; all kinds of data are judged here alone."""
    value, where = row
    if isinstance(value, (str, TextParts)):
        return "text"
    if is_null(value):
        return None
    if is_conversation(value):
        return "conversation"
    if is_id_row(value):
        return "token ids"
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        kind += f" of {type(value[0]).__name__}"
    raise CalibrationDataError(
        f"{where} holds a {kind}; want text, a conversation (messages with 'role' and 'content'), or token ids. "
        "Give strings, or set `text_column` to a column of them."
    )


def documents(
    data: TokenSource | None,
    config: OTPruningConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None,
    shuffle: bool = False,
) -> Documents:
    """Return the documents of data that are not token ids as such; nothing is read or downloaded yet.

    Args:
        data: The calibration data, as in `calibration_tokens`.
        config: The configuration, which names the dataset, its text column, and the seed of shuffling.
        split: The split to read where the dataset has several.
        tokenizer: The tokenizer whose chat template renders conversations.
        shuffle: Whether a streamed data set is shuffled, as far as streams can be.

    Raises:
        CalibrationDataError: If the data are not there or of no known kind; reading the documents may raise it, too.
    """
    column = config.text_column
    if data is None or isinstance(data, (str, os.PathLike)):
        return _named(data, config, split, tokenizer)
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset, dict)):
        table = _split(data, split)
        if not isinstance(table, (datasets.Dataset, datasets.IterableDataset)):
            raise CalibrationDataError(
                f"{split!r} holds a {type(table).__name__}; want a datasets.Dataset. Give a list of texts by itself."
            )
        is_streamed = isinstance(table, datasets.IterableDataset)
        if is_streamed and shuffle:
            table = table.shuffle(seed=config.seed, buffer_size=_SHUFFLED)
        return Documents(
            "a datasets.Dataset", partial(_table_rows, table, column), column, tokenizer, is_streamed=is_streamed
        )
    return Documents("texts", partial(_list_rows, _values(data), column), column, tokenizer)


def _valid(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationDataError(
            f"{where} holds half a character (the lone surrogate U+{ord(text[error.start]):04X}). Mend the text, for "
            "example by `text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')`."
        ) from error
    return text


def _values(data: object) -> Sequence[object]:
    """Return the values of a list, or of a data set's column, an array of strings, or a pandas series."""
    kind = type(data).__name__
    if isinstance(data, np.ma.MaskedArray):
        raise CalibrationDataError(f"Data of type {kind} are not understood. Give `data.compressed()` or a list.")
    if not isinstance(data, (list, tuple)) and hasattr(data, "__array__") and not isinstance(data, Tensor):
        data = np.asarray(data).tolist()
    if not isinstance(data, Sequence) or isinstance(data, (str, bytes, bytearray, memoryview)):
        raise CalibrationDataError(
            f"Data of type {kind} are not understood. Give a dataset name, a file, a list of strings, "
            "a datasets.Dataset or a tensor of token ids."
        )
    if not len(data):
        raise CalibrationDataError("The calibration data are an empty list. Give at least one text.")
    return data


def _list_rows(values: Iterable[object], column: str) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        where = f"Entry {number} of the list"
        yield Row(picked(value, where, column), where)


def _named(
    data: str | os.PathLike | None, config: OTPruningConfig, split: str, tokenizer: PreTrainedTokenizerBase | None
) -> Documents:
    """Return the documents of a file, a folder, or a dataset of the Hub."""
    column = config.text_column
    name = config.dataset if data is None else data
    path = local_path(name)
    if data is not None:
        if path.is_dir():
            return Documents("local folder", _folder(path, column, split), column, tokenizer)
        if path.is_file():
            return Documents("local file", partial(file_rows, path, column), column, tokenizer)
        looks_local = path.is_absolute() or str(name).startswith((".", "~")) or data_suffix(path) in DATA_SUFFIXES[1:]
        if looks_local or not isinstance(name, str) or name.count("/") > 1 or path.exists():
            raise CalibrationDataError(f"{path.name!r} is neither a file nor a folder. Check the path of the data.")
    if not is_hub_id(str(name)):
        raise CalibrationDataError(
            f"{str(name)!r:.60} is neither a file nor a folder, and no name of a dataset. Give one of them, or, if it "
            "is text, a list of texts: [text]."
        )
    dataset_config = config.dataset_config if name == config.dataset else None
    table = cache(partial(_hub_table, str(name), dataset_config, split))
    return Documents(str(name), lambda: _table_rows(table(), column), column, tokenizer, is_local=False)


def _folder(path: Path, column: str, split: str) -> Callable[[], Iterator[Row]]:
    """Return a reader of a folder: of a dataset that was saved there, or of its files one after another."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationDataError(
                f"The dataset in the folder {path.name!r} cannot be read ({type(error).__name__}). Save it again."
            ) from error
        return partial(_table_rows, _split(loaded, split), column)
    name = path.absolute().name
    files, others = _folder_files(path)
    if not files:
        raise CalibrationDataError(
            f"The folder {name!r} holds no text files ({', '.join(DATA_SUFFIXES[1:])}) and no saved dataset."
        )
    if others:
        logger.warning("Left out of %r, since their names are not those of text: %s.", name, listed(others))
    return lambda: chain.from_iterable(file_rows(file, column) for file in files)


def _folder_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return files of documents, in order, and names of others; hidden ones and README.md are neither."""
    found, others = [], []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = Path(folder, name)
            if name.startswith(".") or name == CARD_FILE or not file.is_file():
                continue
            if data_suffix(file) in DATA_SUFFIXES:
                found.append(file)
            else:
                others.append(name)
    return sorted(found), sorted(others)


def _hub_table(name: str, dataset_config: str | None, split: str) -> datasets.Dataset:
    """Return a split, downloaded whole to the cache of `datasets` and from there read row by row.

    The split is not streamed: samples are drawn from all of it, but a stream is shuffled within its first rows only,
    so that samples would come from its beginning. The cache is also read without a network, by evaluations before and
    after pruning alike. To use a part of a larger data set, give `datasets.load_dataset(…, streaming=True)` as data.
    """
    try:
        with without_secrets_in_warnings():
            return datasets.load_dataset(name, dataset_config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CalibrationDataError(
            f"The dataset {name!r} (split {split!r}) could not be loaded: it does not exist, or the Hub cannot be "
            f"reached ({type(error).__name__}: {reason}). Offline, give a local text file or token ids as data; to "
            f"calibrate, also {WRITTEN!r}."
        ) from error


def _split(loaded: object, split: str) -> object:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise CalibrationDataError(f"The dataset has no split {split!r}; it has {listed(loaded)}.")
    return loaded[split]


def _table_rows(table: Any, column: str) -> Iterator[Row]:
    """Yield rows as plain Python values, whatever format the user set."""
    names = table.column_names
    if names is not None and column not in names:  # some streams only know their columns from their rows
        raise _no_column(column, names)
    if isinstance(table, datasets.Dataset):
        table = table.with_format(None).select_columns([column])
    number = 0
    for batch in table.iter(_ROWS):
        if column not in batch:
            raise _no_column(column, batch)
        for value in batch[column]:
            number += 1
            yield Row(value, f"Row {number} of the dataset")


def _no_column(column: str, names: Iterable[str]) -> CalibrationDataError:
    return CalibrationDataError(f"The dataset has no column {column!r}; it has {listed(names)}. Set `text_column`.")
