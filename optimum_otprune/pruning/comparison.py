"""Evaluations in a report: their check, and the perplexities of the dense and the pruned model side by side."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.layer_report import check_entry

_EVALUATION: Mapping[str, type] = {
    **{"data": str, "seqlen": int, "num_tokens": int, "num_windows": int, "perplexity": float},
    **{"stage": str, "dtype": str, "protocol": str},
}
_PROTOCOL = ("data", "seqlen", "num_tokens", "num_windows", "dtype", "protocol", "max_windows")


class Comparison(NamedTuple):
    """Perplexity of the dense and of the pruned model by one protocol; either may be None.

    Attributes:
        data: Name of the source.
        dense: The evaluation before pruning.
        pruned: The evaluation after it.
    """

    data: str
    dense: Mapping[str, Any] | None
    pruned: Mapping[str, Any] | None

    @property
    def one(self) -> Mapping[str, Any]:
        """Either of the two evaluations, for entries that both have in common."""
        found = self.pruned or self.dense
        assert found is not None
        return found

    @property
    def factor(self) -> float | None:
        """Pruned perplexity over dense perplexity, where both were measured and are finite."""
        if self.dense is None or self.pruned is None:
            return None
        factor = self.pruned["perplexity"] / self.dense["perplexity"] if self.dense["perplexity"] else math.inf
        return factor if math.isfinite(factor) else None


def compared(evaluations: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """Return the latest evaluations by data and protocol, those of both models first."""
    found: dict[tuple, dict[str, Mapping[str, object]]] = {}
    for evaluation in evaluations:
        key = tuple(evaluation[name] for name in ("data", "seqlen", "num_tokens", "dtype", "protocol"))
        found.setdefault(key, {})[evaluation["stage"]] = evaluation
    pairs = [Comparison(key[0], _dense(stages), stages.get("pruned")) for key, stages in found.items()]
    return sorted(pairs, key=lambda pair: pair.dense is None or pair.pruned is None)


def _dense(stages: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the evaluation of the dense model, which that of the pruned one against it holds, too."""
    pruned = stages.get("pruned", {})
    if "dense" in stages or "dense_perplexity" not in pruned:
        return stages.get("dense")
    protocol = {name: value for name, value in pruned.items() if name in _PROTOCOL}
    return {**protocol, "stage": "dense", "perplexity": pruned["dense_perplexity"]}


def check_numbers(where: str, values: Mapping[str, object], kinds: Mapping[str, type], is_finite: bool) -> None:
    """Raise `ReportError` where a value is no string, or a number that is negative."""
    for name, kind in kinds.items():
        check_entry(f"{where}.{name}", values.get(name), kind, None if kind is str else 0, is_finite)


def check_evaluation(where: str, evaluation: object, is_finite: bool) -> None:
    """Raise `ReportError` where an evaluation of a report is not one, or its counts do not add up."""
    check_entry(where, evaluation, Mapping)
    assert isinstance(evaluation, Mapping)
    check_numbers(where, evaluation, _EVALUATION, is_finite)
    for name in ("seen_windows", "max_windows"):
        check_entry(f"{where}.{name}", evaluation.get(name, 0), int, 0)
    for name in ("dense_perplexity", "kl", "agreement"):
        check_entry(f"{where}.{name}", evaluation.get(name, 0.0), float, 0, is_finite)
    if evaluation["stage"] not in ("dense", "pruned"):
        raise ReportError(
            f"`{where}.stage` of the report is {evaluation['stage']!r:.60}; want 'dense' or 'pruned'. Get the folder "
            "again."
        )
    if evaluation.get("agreement", 0.0) > 1:
        raise ReportError(
            f"`{where}.agreement` of the report is {evaluation['agreement']}; it is a share, at most 1. Get the "
            "folder again."
        )
    if not is_finite:
        return
    check_entry(f"{where}.num_windows", evaluation["num_windows"], int, 1)
    check_entry(f"{where}.perplexity", evaluation["perplexity"], float, 1)
    windows, seen = evaluation["num_windows"], evaluation.get("seen_windows", 0)
    if seen > windows or windows > evaluation.get("max_windows", windows):
        raise ReportError(
            f"`{where}` of the report has {windows} windows, fewer than it has seen or more than it was to have. Get "
            "the folder again."
        )
    if evaluation["num_tokens"] != windows * (evaluation["seqlen"] - 1):
        raise ReportError(
            f"`{where}` of the report has {evaluation['num_tokens']} tokens, which are not those of {windows} windows "
            f"of {evaluation['seqlen']}, each without its first. Get the folder again."
        )
