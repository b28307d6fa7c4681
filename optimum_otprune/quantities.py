"""Counts and sizes as people write them: `"1.2B"` parameters, `"2GB"`."""

import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType

COUNT_UNITS: Mapping[str, int] = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12})
SIZE_UNITS: Mapping[str, int] = MappingProxyType(
    {
        "": 1,
        "B": 1,
        **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
        **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    }
)


def parse_quantity(value: int | str, units: Mapping[str, int]) -> int:
    """Return the whole number that a string such as `"1.2B"` stands for, fractions cut off.

    Args:
        value: A number with or without a unit, in upper or lower case; an int is returned as it is.
        units: What each unit stands for: `COUNT_UNITS`, or `SIZE_UNITS` (GB is 10⁹ bytes as in
            `max_shard_size` of transformers, GiB is 2³⁰).

    Raises:
        ValueError: If it is no such string; the caller names the option.

    Example:
        >>> parse_quantity("1.2B", COUNT_UNITS), parse_quantity("2GB", SIZE_UNITS), parse_quantity("1kiB", SIZE_UNITS)
        (1200000000, 2000000000, 1024)
    """
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value, flags=re.ASCII)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match[2].lower() not in factors:
        raise ValueError(f"{value!r} is no number with one of the units {', '.join(filter(None, units))}")
    return int(Decimal(match[1]) * factors[match[2].lower()])
