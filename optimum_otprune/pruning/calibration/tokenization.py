"""Text of any length as one stream of token ids: cut into pieces, tokenized piece by piece."""

from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from optimum_otprune.errors import CalibrationDataError

CHARACTERS = 8  # of text for each token that is wanted; texts have 1 to 6 a token
_MARGIN = 256  # tokens before a cut in a text that may depend on what was cut off
_READ = 1 << 14  # characters that are read at a time
_CHUNK = 1 << 18  # characters that are tokenized in one call, which takes some 150 bytes for each
_OVERLAPS = 32  # a chunk repeats so small a part of the one before
_GIVEN_UP = 1 << 22  # characters of a text without an end that may go by with hardly a token in them


def first_tokens(
    parts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None = None,
    has_no_end: bool = False,
) -> np.ndarray:
    """Return the first so many token ids of a text, and some more; all of them for None.

    The ids are those of one call for the whole text, but a long text is tokenized in chunks, so that memory grows by
    its ids alone. Chunks overlap. The tokens of the overlap by itself end like those of the chunk before it, and begin
    like those of the chunk after it: counted from there, the two are joined within tokens that the cuts on both sides
    did not change. If there is no such run of tokens, the chunk grows until there is.

    Args:
        parts: The text in parts, read no further than needed.
        tokenizer: The tokenizer; its special tokens are put at the beginning and at the end of the whole text.
        num_tokens: Number of tokens that are wanted; None for all.
        has_no_end: Whether the text may go on for ever, so that one without tokens is given up.

    Raises:
        CalibrationDataError: If there is no text, or none for long in one without an end.
    """
    wanted = None if num_tokens is None else num_tokens + _MARGIN
    size = _CHUNK if wanted is None else min(_CHUNK, CHARACTERS * wanted)
    read = pieces(parts, min(size, _READ))
    settled: list[np.ndarray] = []
    num_settled, skipped, text = 0, 0, ""
    while True:
        text, is_all = _longer(text, read, size)
        if (is_all or has_no_end) and not settled and not text.strip():
            raise no_text()
        ids = _ids(text, tokenizer)[skipped:]
        is_enough = wanted is not None and num_settled + len(ids) >= wanted
        if is_all or is_enough:
            return np.concatenate([*settled, ids if is_all else ids[:-_MARGIN]])
        overlap = text[-(size // _OVERLAPS) :]
        repeated = _ids(overlap, tokenizer) if size >= _CHUNK else ids[:0]
        if _common_end(ids, repeated) >= 2 * _MARGIN:
            settled.append(ids[:-_MARGIN])
            num_settled += len(settled[-1])
            text, skipped, size = overlap, len(repeated) - _MARGIN, _CHUNK
            continue
        if has_no_end and size >= _GIVEN_UP:
            raise CalibrationDataError(
                f"{len(text)} characters of the stream hold only {len(ids)} tokens, so that it may never fill a "
                "window. Give a data set that holds text, or one with an end."
            )
        size *= 2


def pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text into pieces of at most so many characters, however it is split into parts: at the end of a paragraph.

    Else at the end of a line, else of a word; never before the middle of a piece.
    """
    waiting: list[str] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if length <= size:
            continue
        text, start = "".join(waiting), 0
        while len(text) - start > size:
            end = _end(text, start, size)
            yield text[start:end]
            start = end
        waiting, length = [text[start:]], len(text) - start
    if length:
        yield "".join(waiting)


def no_text() -> CalibrationDataError:
    """Return the error for data in which there is nothing to tokenize."""
    return CalibrationDataError("The data hold no text: every document is empty. Give at least one window of text.")


def _end(text: str, start: int, size: int) -> int:
    for separator in ("\n\n", "\n", " "):
        at = text.rfind(separator, start + size // 2, start + size)
        if at >= 0:
            return at + len(separator)
    return start + size


def _longer(text: str, read: Iterator[str], size: int) -> tuple[str, bool]:
    """Return a text with at least `size` characters, reading on if needed, and whether nothing follows it."""
    joined, length = [text], len(text)
    while length < size:
        piece = next(read, None)
        if piece is None:
            return "".join(joined), True
        joined.append(piece)
        length += len(piece)
    return "".join(joined), False


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def _common_end(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many ids two rows have in common at their ends."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[len(first) - length :] != second[len(second) - length :])
    return length - 1 - int(differing[-1]) if len(differing) else length
