"""How much of a text was seen before: passages of tokens in common, whatever the windows' lengths.

A passage is 32 tokens in a row, which two texts do not share by chance; one token again and again is none.
"""

import re
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from optimum_otprune.errors import ReportError

_LENGTH = 32
_SKETCH = 256  # hashes; of the text of 128 samples of 2,048 tokens, each window of that length holds 2
_HASH = re.compile("[0-9a-f]{16}")
_ROWS = 64  # windows that are hashed at a time


def seen_windows(tokens: Tensor, calibrated_on: Tensor | None, sketch: object) -> dict[str, int]:
    """Return `seen_windows`, how many of the windows of an evaluation hold a passage of the calibration samples.

    Args:
        tokens: The windows of the evaluation, `(num_windows, seqlen)`.
        calibrated_on: The calibration samples, or None if they are not available.
        sketch: The samples' sketch, read in their place, or None; then the number is a lower bound, and left out if it
            is 0.

    Raises:
        ReportError: If the sketch, which may come from a file, is not valid.
    """
    if calibrated_on is not None:
        return {"seen_windows": count_shared(tokens, calibrated_on)}
    seen = count_sketched(tokens, sketch)
    return {"seen_windows": seen} if seen else {}


def count_shared(tokens: Tensor, others: Tensor) -> int:
    """Return how many windows share a passage with other windows.

    Args:
        tokens: The windows to count, `(num_windows, seqlen)`.
        others: The windows to compare with, `(num_others, other_seqlen)`; where either is shorter than a passage,
            passages are that short.

    Example:
        >>> import torch
        >>> count_shared(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2, 3], [7, 8]]))
        1
    """
    length = min(_LENGTH, tokens.shape[1], others.shape[1])
    return _count(tokens, np.unique(np.concatenate(list(_passages(others, length)), axis=None)), length)


def passage_sketch(tokens: Tensor) -> list[str]:
    """Return a sample of the windows' passages, by their smallest hashes, for a report; none of very short windows."""
    if tokens.shape[1] < _LENGTH:
        return []
    smallest = np.zeros(0, dtype=np.uint64)
    for hashes in _passages(tokens, _LENGTH):
        smallest = np.unique(np.concatenate([smallest, hashes], axis=None))
        smallest = smallest[smallest > 0][:_SKETCH]
    return [f"{value:016x}" for value in smallest.tolist()]


def count_sketched(tokens: Tensor, sketch: object) -> int:
    """Return how many windows hold a passage of a sketch: a lower bound of those that share any passage.

    Raises:
        ReportError: If it is no sketch.
    """
    if sketch is None or tokens.shape[1] < _LENGTH:
        return 0
    if not isinstance(sketch, list) or not all(isinstance(entry, str) and _HASH.fullmatch(entry) for entry in sketch):
        raise ReportError(
            "`calibration.passages` of the report are no list of hashes of 16 digits. Restore the report as "
            "`OTPruner.save_pretrained` wrote it."
        )
    return _count(tokens, np.array([int(entry, 16) for entry in sketch], dtype=np.uint64), _LENGTH)


def _count(tokens: Tensor, known: np.ndarray, length: int) -> int:
    known = known[known > 0]
    return sum(int(np.isin(hashes, known).any(axis=1).sum()) for hashes in _passages(tokens, length))


def _passages(tokens: Tensor, length: int) -> Iterator[np.ndarray]:
    """Return hashes of all passages, `(num_windows, num_passages)`; 0 for one token repeated."""
    for part in tokens.split(_ROWS):
        ids = part.cpu().numpy().astype(np.uint64)
        count = ids.shape[1] - length + 1
        hashes = np.zeros((len(ids), count), dtype=np.uint64)
        is_text = np.full(hashes.shape, length == 1)
        for offset in range(length):
            column = ids[:, offset : offset + count]
            hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
            hashes ^= hashes >> np.uint64(29)
            is_text |= column != ids[:, :count]
        yield hashes * is_text
