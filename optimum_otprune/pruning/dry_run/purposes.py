"""Which purposes the widths of a plan serve, and what the nearest widths that do would cost."""

from collections.abc import Sequence

from optimum_otprune.config.quantities import MULTIPLES

_BLOCK = 32  # weights of the plain 4- and 8-bit types of GGUF


def purpose_text(widths: Sequence[int], per_channel: float, parameters: int) -> str:
    """Return for each purpose whether widths are multiples of what it needs, and else the nearest that are.

    Args:
        widths: The widths of the FFNs that are pruned, each once.
        per_channel: Parameters of the model that a channel of every FFN takes; 0 where that is not known.
        parameters: Parameters of the pruned model.

    Example:
        >>> purpose_text([1088], 1000.0, 2_000_000)
        'tensor-cores yes; int4 no (1,024: -3.2%, 1,152: +3.2%); gguf no (1,024: -3.2%, 1,280: +9.6%)'
    """
    found = []
    for name, multiple in sorted(MULTIPLES.items(), key=lambda item: item[1]):
        wrong = next((width for width in widths if width % multiple), None)
        if wrong is None:
            found.append(f"{name} yes")
            continue
        below = wrong // multiple * multiple
        near = [_near(width, wrong, per_channel / parameters) for width in (below, below + multiple) if width]
        in_16_bits = "ffn_down stays in 16 bits; " if name == "gguf" and wrong % _BLOCK else ""
        found.append(f"{name} no ({in_16_bits}{', '.join(near)})")
    return "; ".join(found)


def _near(width: int, now: int, share: float) -> str:
    return f"{width:,}" if share == 0 else f"{width:,}: {(width - now) * share:+.1%}"
