"""Seeds of a run's parts, so that no part depends on what another drew."""

_STRIDE = 100_003  # a prime: seeds of neighboring runs do not meet


def seed_of(seed: int, part: int) -> int:
    """Return the seed of one layer, or one trial, of a run.

    Args:
        seed: The seed of the run.
        part: Number of the part, from 0.

    Example:
        >>> seed_of(7, 0), seed_of(7, 2)
        (7, 200013)
    """
    return seed + _STRIDE * part
