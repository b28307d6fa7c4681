"""A comparison as one page of HTML, which asks for nothing from elsewhere; a pure function of what was measured."""

import math
from typing import Any

from optimum_otprune.checkpoints.card.figures import FIGURES
from optimum_otprune.checkpoints.card.templates import html_template
from optimum_otprune.pruning.model_comparison import DataComparison, ModelComparison, PromptComparison
from optimum_otprune.storage.untrusted import visible

_LONGEST = 20_000  # characters of a text on the page
_FEW_TOKENS = 20_000  # up to which chance moves a perplexity by some percent


def comparison_page(comparison: ModelComparison) -> str:
    """Render a comparison as HTML; strings of models, data and prompts are escaped and visible.

    Args:
        comparison: What was measured.
    """
    template = html_template(
        "optimum_otprune.checkpoints.comparison", "page.html", {**FIGURES, "times": times, "speed": _speed}
    )
    data = [_row(entry) for entry in comparison.data]
    return template.render(
        dense=comparison.dense._replace(name=_shown(comparison.dense.name)),
        pruned=comparison.pruned._replace(name=_shown(comparison.pruned.name)),
        dense_widths=_widths(comparison.dense.ffn_widths),
        pruned_widths=_widths(comparison.pruned.ffn_widths),
        size_ratio=comparison.size_ratio,
        worst=max(data, key=lambda row: row["ratio"], default=None),
        least=min(data, key=lambda row: row["agreement"], default=None),
        data=data,
        prompts=[_prompt(entry) for entry in comparison.prompts],
        new_tokens=comparison.settings["new_tokens"],
        is_chat=comparison.settings["chat"],
        protocol=_shown(comparison.settings["protocol"]),
        speed=comparison.speed,
        device=_shown(str(comparison.settings.get("device", ""))),
        versions=", ".join(f"{name} {_shown(value)}" for name, value in sorted(comparison.versions.items())),
    )


def times(value: float | None) -> str:
    """Return a factor with two decimals."""
    if value is None:
        return "–"
    return f"×{value:.2f}" if math.isfinite(value) else "not finite"


def _speed(tokens_per_second: float | None) -> str:
    return "–" if tokens_per_second is None else f"{tokens_per_second:,.1f}"


def _row(entry: DataComparison) -> dict[str, Any]:
    return {
        **entry._asdict(),
        "name": _shown(entry.name),
        "ratio": math.inf if math.isnan(entry.ratio) else entry.ratio,  # both perplexities are infinite
        "rough": entry.num_tokens < _FEW_TOKENS,
    }


def _prompt(entry: PromptComparison) -> dict[str, object]:
    """Return a prompt with both continuations, each cut where they part; the blank before the first word goes."""
    same = len(entry.same_text)
    texts = {"same": entry.same_text, "dense": entry.dense[same:], "pruned": entry.pruned[same:]}
    if same:
        texts["same"] = texts["same"].removeprefix(" ")
    else:
        texts |= {name: texts[name].removeprefix(" ") for name in ("dense", "pruned")}
    if entry.dense == entry.pruned:
        note = ", the same"
    elif entry.same_tokens:
        note = f", the same for {entry.same_tokens} token{'s' if entry.same_tokens > 1 else ''}"
    else:
        note = ", different from the first token on"
    return {
        "prompt": _shown(entry.prompt.rstrip()),
        "note": note,
        **{name: _shown(text) for name, text in texts.items()},
    }


def _widths(widths: tuple[int, ...]) -> str:
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _shown(text: str) -> str:
    """Return a text with escapes in place of what cannot be seen; line breaks stay."""
    return "\n".join(visible(line.expandtabs(4), _LONGEST) for line in text[:_LONGEST].split("\n"))
