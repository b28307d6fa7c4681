"""Numbers as people write them: `"1.2B"` parameters, `"2GB"`, `"70%"`, and those of NumPy."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from types import MappingProxyType

LARGEST_COUNT = 2**31 - 1  # the largest count of samples, tokens or steps
LARGEST_SEED = 2**63 - 1  # a layer's number is added, and torch's generators take seeds below 2⁶⁴

COUNT_UNITS: Mapping[str, int] = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12})
SIZE_UNITS: Mapping[str, int] = MappingProxyType(
    {
        "": 1,
        "B": 1,
        **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
        **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    }
)

# The multiples that a width serves a purpose with. gguf: the k-quants of llama.cpp take 256 weights together (QK_K in
# ggml-common.h); int4: the usual group of GPTQ, AWQ and torchao; tensor-cores: 128 bytes of 16-bit numbers,
# https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html#requirements-tc
MULTIPLES: Mapping[str, int] = MappingProxyType({"gguf": 256, "int4": 128, "tensor-cores": 64})


def parse_quantity(value: float | str, units: Mapping[str, int]) -> int:
    """Return the whole number that a string such as `"1.2B"` stands for, fractions cut off.

    Args:
        value: A number with or without a unit, in upper or lower case; a value that is no string is returned as an
            int.
        units: The value of each unit: `COUNT_UNITS`, or `SIZE_UNITS` (GB is 10⁹ bytes as in `max_shard_size` of
            transformers, GiB is 2³⁰).

    Raises:
        ValueError: If it is no such string; the caller names the option.

    Example:
        >>> parse_quantity("1.2B", COUNT_UNITS), parse_quantity("2GB", SIZE_UNITS), parse_quantity("1kiB", SIZE_UNITS)
        (1200000000, 2000000000, 1024)
    """
    if not isinstance(value, str):
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value, flags=re.ASCII)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match[2].lower() not in factors:
        raise ValueError(f"{value!r} is no number with one of the units {', '.join(filter(None, units))}")
    return int(Decimal(match[1]) * factors[match[2].lower()])


def parse_share(value: object) -> Fraction | None:
    """Return the share of a whole that a target asks for, or None where it is no share but a count or nothing at all.

    Args:
        value: A string of per cent, or a number between 0 and 1, neither included, as a string or not. The integer 1
            and the string `"1"` are counts.

    Example:
        >>> parse_share("70%"), parse_share(0.7), parse_share("0.7"), parse_share("100%"), parse_share("0.7B")
        (Fraction(7, 10), Fraction(7, 10), Fraction(7, 10), None, None)
    """
    number = real_number(value)
    text = value if isinstance(value, str) else ""
    if number is not None:
        text = str(number)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-\d+)?)\s*(%?)\s*", text, flags=re.ASCII)
    if match is None:
        return None
    share = Fraction(match[1]) / (100 if match[2] else 1)
    return share if 0 < share < 1 else None


def whole_number(value: object) -> int | None:
    """Return an integer of Python or NumPy as an int, or None if the value is none; booleans are none.

    Args:
        value: The value, which may be anything.
    """
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def real_number(value: object) -> float | None:
    """Return a number, of NumPy or not, as a float; None if it is none. Truth values are none.

    Args:
        value: Anything; an integer beyond all floats is infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
