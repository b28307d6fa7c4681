"""Perplexity of the dense and of the pruned model side by side."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


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
        """Either evaluation, for what both have in common."""
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
    found: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for evaluation in evaluations:
        key = tuple(evaluation[name] for name in ("data", "seqlen", "num_tokens", "dtype", "protocol"))
        found.setdefault(key, {})[evaluation["stage"]] = evaluation
    pairs = [Comparison(key[0], stages.get("dense"), stages.get("pruned")) for key, stages in found.items()]
    return sorted(pairs, key=lambda pair: pair.dense is None or pair.pruned is None)
