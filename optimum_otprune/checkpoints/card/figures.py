"""Numbers as people read them, in cards and pages."""

import math
from collections.abc import Callable, Mapping


def ratio(value: float) -> str:
    """Return a ratio with three decimals and a typographic minus sign."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "not finite"


def rescue(value: float) -> str:
    """Return a ratio, with a word if it is so far below zero that the number says little."""
    return f"{ratio(value)} (harmful)" if value < -1 else ratio(value)


def share(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{value:.1%}".replace("%", " %").replace("-", "−")


def change(after: float, before: float) -> str:
    """Return the relative change as a signed percentage."""
    if not before or not math.isfinite(after / before):
        return "–"
    return f"{after / before - 1:+.1%}".replace("%", " %").replace("-", "−")


def perplexity(value: float | None) -> str:
    """Return a perplexity with two decimals."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def kl(value: float | None) -> str:
    """Return a divergence in nats with four decimals."""
    if value is None:
        return "–"
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def size(num_bytes: int) -> str:
    """Return a size in decimal units, as the Hub shows those of files."""
    value, units = float(num_bytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    for larger in units:
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


# By the names that templates have for them.
FIGURES: Mapping[str, Callable[..., str]] = {
    "ratio": ratio,
    "rescue": rescue,
    "share": share,
    "change": change,
    "perplexity": perplexity,
    "kl": kl,
    "size": size,
}
