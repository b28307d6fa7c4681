"""From documents to samples of token ids `(num_samples, seqlen)`, seeded; no more text is tokenized than needed."""

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import WRITTEN
from optimum_otprune.errors import CalibrationDataError
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.pruning.calibration.documents import Documents, TokenSource, documents
from optimum_otprune.pruning.calibration.overlap import passage_sketch
from optimum_otprune.pruning.calibration.token_ids import given_ids
from optimum_otprune.pruning.calibration.tokenization import CHARACTERS, first_tokens, no_text, pieces

DEFAULT_SEQLEN = 2048
_NO_TOKENIZER = (
    "This model has no tokenizer, so text cannot be used. Give token ids of shape (num_samples, seqlen), or a "
    "tokenizer."
)
_SPARE = 2  # pieces for each sample: some hold no whole window
_STREAMED = 16  # pieces that are read of a data set without an end, for each sample
_BATCH = 16  # pieces that are tokenized at once
_SPARSEST = 64  # characters of a piece for each token of a window, where a data set without an end is given up
_T = TypeVar("_T")


class TokenData(NamedTuple):
    """Token ids and where they came from.

    Attributes:
        tokens: Token ids, LongTensor `(num_samples, seqlen)`.
        source: For reports: a Hub id, or what kind of data it was; never a local path.
    """

    tokens: Tensor
    source: str

    def describe(self) -> dict[str, object]:
        """Return the entries for a report."""
        num_samples, seqlen = self.tokens.shape
        entries = {"data": self.source, "num_samples": num_samples, "seqlen": seqlen}
        sketch = passage_sketch(self.tokens)
        return {**entries, "num_tokens": self.tokens.numel(), **({"passages": sketch} if sketch else {})}


class ExpectedSamples(NamedTuple):
    """The expected number of calibration tokens.

    Attributes:
        num_samples: The number of samples; of text, the largest possible number.
        seqlen: The number of tokens of each sample.
        source: The origin of the data, as in `TokenData`.
        is_exact: Whether the numbers were read, rather than concluded from the configuration.
    """

    num_samples: int
    seqlen: int
    source: str
    is_exact: bool


class ModelLimits(NamedTuple):
    """The token ids and sequence lengths that a model accepts.

    Attributes:
        vocab_size: Ids are below this.
        max_positions: Longest sequence, or None.
    """

    vocab_size: int
    max_positions: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelLimits":
        """Return the limits of a model, read from its embeddings and configuration."""
        return cls(vocabulary_size(model), getattr(model.config.get_text_config(), "max_position_embeddings", None))

    def seqlen(self, config: OTPruningConfig) -> int:
        """Return the tokens per window: as configured, or at most 2 048 and the model's positions."""
        if config.seqlen is not None:
            return config.seqlen
        return DEFAULT_SEQLEN if self.max_positions is None else min(DEFAULT_SEQLEN, self.max_positions)


def calibration_tokens(
    data: TokenSource | None,
    config: OTPruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: ModelLimits,
) -> TokenData:
    """Return the calibration samples: all rows of a token matrix, else `num_samples` windows without replacement.

    Windows of a long text are drawn from pieces all over it, and only these are tokenized; no window is repeated. The
    same text gives the same samples, whatever kind of data it is in. A streamed data set may have no end, so only 16
    pieces for each sample are read, and samples come from its beginning alone.

    Args:
        data: None for the configuration's dataset, `"self"` for nothing but what the model writes itself (no samples
            are given then), a Hub dataset name, a file (text, JSON, JSON lines, CSV, Parquet,
            compressed or not, or token ids as .npy, .safetensors or .pt) or a folder of such or of a dataset, a list
            of strings, a dataset of `datasets`, or token ids `(num_samples, seqlen)` or as one stream. In place of
            strings, rows may be conversations, which the tokenizer's chat template renders, or lists of token ids.
        config: The configuration, which names the dataset, the number and length of samples, and the seed.
        tokenizer: The tokenizer; only text needs one.
        limits: The vocabulary size and the longest sequence of the model.

    Raises:
        CalibrationDataError: If the data cannot be found or used; the message says why.
    """
    seqlen = limits.seqlen(config)
    if is_written(data):
        return _nothing_given(seqlen, limits)
    ids = given_ids(data)
    if ids is not None:
        return TokenData(
            _checked(ids if ids.ndim == 2 else _drawn(_windows(ids, seqlen), config), limits), "token ids"
        )
    found = documents(data, config, config.calibration_split, tokenizer, shuffle=True)
    if found.hold_ids():
        limit = _STREAMED * config.num_samples if found.is_streamed else None
        windows = islice(_id_windows(found.ids(), seqlen), limit)
        kept = [window for _, window in _reservoir(windows, config.num_samples, config.seed)[0]]
        return TokenData(_checked(np.stack(kept), limits), "token ids")
    samples = _text_samples(found, config, _needed(tokenizer), seqlen)
    return TokenData(_checked(samples, limits), found.source)


def expected_samples(
    data: TokenSource | None, config: OTPruningConfig, limits: ModelLimits, has_tokenizer: bool | None
) -> ExpectedSamples:
    """Return the number of samples that `calibration_tokens` would give; only token ids are read for it.

    Args:
        data: The calibration data, as in `calibration_tokens`.
        config: The configuration, which names the dataset and the number and length of samples.
        limits: The vocabulary size and the longest sequence of the model.
        has_tokenizer: Whether there is a tokenizer; None if that is not known.

    Raises:
        CalibrationDataError: If the data are known to be of no use: not there, of the wrong kind, or too long.
    """
    if is_written(data):
        written = _nothing_given(limits.seqlen(config), limits)
        return ExpectedSamples(0, written.tokens.shape[1], written.source, is_exact=True)
    if given_ids(data) is not None:
        read = calibration_tokens(data, config, None, limits)
        num_samples, seqlen = read.tokens.shape
        return ExpectedSamples(num_samples, seqlen, read.source, is_exact=True)
    found = documents(data, config, config.calibration_split, None)
    is_text = not (found.is_local and found.hold_ids())
    if is_text and has_tokenizer is False:
        raise CalibrationDataError(_NO_TOKENIZER)
    seqlen = limits.seqlen(config)
    _check_seqlen(seqlen, limits)
    return ExpectedSamples(config.num_samples, seqlen, found.source if is_text else "token ids", is_exact=False)


def evaluation_tokens(
    data: TokenSource | None,
    config: OTPruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: ModelLimits,
    max_windows: int | None = None,
) -> TokenData:
    """Return consecutive windows without overlap, the tail dropped; rows of a token matrix are windows as they are.

    Documents are joined to one text with a blank line between them, and the tokens are those of one call for all of
    it; a long text is tokenized in pieces, so that memory grows by its token ids alone. If `max_windows` is given,
    only the beginning of a text is read, up to where later text cannot change the tokens of the windows. A data set
    without an end needs `max_windows`.

    Args:
        data: The evaluation data, as in `calibration_tokens`.
        config: The configuration, which names the dataset and the window length.
        tokenizer: The tokenizer; only text needs one.
        limits: The vocabulary size and the longest sequence of the model.
        max_windows: How many windows to return at most, from the beginning; None for all of them.

    Raises:
        CalibrationDataError: If the data cannot be found or used.
    """
    if is_written(data):
        raise CalibrationDataError(
            f"{WRITTEN!r} stands for samples that the dense model writes to calibrate on. Give text to evaluate on (a "
            f"folder of that name as './{WRITTEN}')."
        )
    ids = given_ids(data)
    seqlen = limits.seqlen(config)
    if ids is not None:
        return TokenData(
            _checked((ids if ids.ndim == 2 else _windows(ids, seqlen))[:max_windows], limits), "token ids"
        )
    found = documents(data, config, config.evaluation_split, tokenizer)
    if found.hold_ids():
        windows = list(islice(_id_windows(found.ids(), seqlen), max_windows))
        return TokenData(_checked(np.stack(windows), limits), "token ids")
    num_tokens = None if max_windows is None else max_windows * seqlen
    tokens = first_tokens(found.text(), _needed(tokenizer), num_tokens, found.is_streamed)
    return TokenData(_checked(_windows(tokens, seqlen)[:max_windows], limits), found.source)


def is_written(data: TokenSource | None) -> bool:
    """Return whether data stands for what the model writes all by itself, with nothing given."""
    return isinstance(data, str) and data == WRITTEN


def _nothing_given(seqlen: int, limits: ModelLimits) -> TokenData:
    _check_seqlen(seqlen, limits)
    return TokenData(torch.empty(0, seqlen, dtype=torch.long), WRITTEN)


def _text_samples(
    found: Documents, config: OTPruningConfig, tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> np.ndarray:
    """Return windows drawn from all over a text; from a short text, all its windows are candidates.

    Pieces are drawn in one pass, by reservoir sampling. They are cut longer where they hold too few windows, so that
    in the end there is nothing left out of which a window could be made.
    """
    count = config.num_samples
    size = CHARACTERS * seqlen
    while True:
        limit = _STREAMED * count if found.is_streamed else None
        kept, total = _reservoir(islice(pieces(found.text(), size), limit), _SPARE * count, config.seed)
        if total == len(kept):
            stream = _all_tokens([piece for _, piece in kept], tokenizer)
            return _drawn(_windows(stream, seqlen), config)
        if found.is_streamed and not any(piece.strip() for _, piece in kept):
            raise no_text()
        windows = _piece_windows(kept, tokenizer, config, seqlen)
        if len(windows) == count:
            return np.stack(windows)
        if found.is_streamed and size >= _SPARSEST * seqlen:
            raise CalibrationDataError(
                f"Some {total * size} characters of the stream hold too few tokens for {count} windows of {seqlen}. "
                "Give a data set that holds text, or one with an end."
            )
        size *= 2


def _piece_windows(
    pieces: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase, config: OTPruningConfig, seqlen: int
) -> list[np.ndarray]:
    """Return at most `num_samples` windows in text order: the first of each piece, then the second, ..."""
    random.Random(config.seed).shuffle(pieces)
    found: list[tuple[int, int, np.ndarray]] = []
    whole = 0
    for start in range(0, len(pieces), _BATCH):
        batch = pieces[start : start + _BATCH]
        rows = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (number, _), row in zip(batch, rows):
            windows = np.asarray(row[: len(row) // seqlen * seqlen], dtype=np.int64).reshape(-1, seqlen)
            found += [(rank, number, window) for rank, window in enumerate(windows)]
            whole += len(windows) > 0
        if whole >= config.num_samples:
            break
    by_rank = sorted(found, key=lambda entry: entry[0])[: config.num_samples]
    return [window for _, _, window in sorted(by_rank, key=lambda entry: (entry[1], entry[0]))]


def _all_tokens(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids of a text, a long one piece by piece: one call needs much time and memory."""
    if len(pieces) <= _BATCH or not any(map(str.strip, pieces)):
        return first_tokens(pieces, tokenizer)
    stream = []
    for start in range(0, len(pieces), _BATCH):
        batch = pieces[start : start + _BATCH]
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [np.asarray(row, dtype=np.int64) for row in rows]
    return np.concatenate(stream)


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise CalibrationDataError(_NO_TOKENIZER)
    return tokenizer


def _reservoir(items: Iterable[_T], size: int, seed: int) -> tuple[list[tuple[int, _T]], int]:
    """Draw so many items without replacement in one pass: with their numbers, in order; and how many there are."""
    generator = random.Random(seed)
    kept: list[tuple[int, _T]] = []
    total = 0
    for number, item in enumerate(items):
        total += 1
        if number < size:
            kept.append((number, item))
        elif (place := generator.randrange(total)) < size:
            kept[place] = (number, item)
    return sorted(kept, key=lambda entry: entry[0]), total


def _drawn(windows: np.ndarray, config: OTPruningConfig) -> np.ndarray:
    generator = torch.Generator().manual_seed(config.seed)
    return windows[torch.randperm(len(windows), generator=generator)[: config.num_samples].sort().values.numpy()]


def _id_windows(rows: Iterable[np.ndarray], seqlen: int) -> Iterator[np.ndarray]:
    """Return windows of the rows one after another, the tail dropped."""
    rest = np.zeros(0, dtype=np.int64)
    count = 0
    for row in rows:
        rest = np.concatenate([rest, row])
        whole = len(rest) // seqlen
        yield from rest[: whole * seqlen].reshape(whole, seqlen)
        count += whole
        rest = rest[whole * seqlen :]
    if not count:
        raise _too_short(len(rest), seqlen)


def _windows(stream: np.ndarray, seqlen: int) -> np.ndarray:
    count = len(stream) // seqlen
    if count == 0:
        raise _too_short(len(stream), seqlen)
    return stream[: count * seqlen].reshape(count, seqlen)


def _too_short(num_tokens: int, seqlen: int) -> CalibrationDataError:
    return CalibrationDataError(
        f"The data hold {num_tokens} tokens, fewer than one window of {seqlen}. Give more text, or set a smaller "
        "`seqlen`."
    )


def _checked(ids: np.ndarray, limits: ModelLimits) -> Tensor:
    """Return samples as a new LongTensor; unsigned ids are compared before they could wrap."""
    if ids.shape[1] < 2:
        raise CalibrationDataError("Samples of one token predict nothing: give sequences of at least 2 tokens.")
    _check_seqlen(ids.shape[1], limits)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limits.vocab_size:
        raise CalibrationDataError(
            f"Token ids go from {low} to {high}, but the model's vocabulary has {limits.vocab_size} (ids 0 to "
            f"{limits.vocab_size - 1}). They were made with another tokenizer."
        )
    return torch.from_numpy(np.array(ids, dtype=np.int64, order="C"))


def _check_seqlen(seqlen: int, limits: ModelLimits) -> None:
    if limits.max_positions is not None and seqlen > limits.max_positions:
        raise CalibrationDataError(
            f"Sequences have {seqlen} tokens, but the model has only {limits.max_positions} positions. Cut them, or "
            f"set `seqlen` to at most {limits.max_positions}."
        )
