"""The quality curve of one model: its points and their table; torch is not imported, so that cards are fast."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_LONGEST_LABEL = 24  # characters of a data set's name above a column


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """The model at one ratio.

    Attributes:
        pruning_ratio: The ratio that was asked for; 0 for the dense model.
        widths: Channels of each layer, as they are then.
        parameters: Parameters of the whole model, zeros that only fill up layers not counted.
        perplexities: The perplexity on each data set, by its name; empty where the ratio failed.
        error: The reason why the ratio failed, or None.
        seconds: The seconds that it took, evaluation included.
    """

    pruning_ratio: float
    widths: tuple[int, ...]
    parameters: int
    perplexities: Mapping[str, float]
    error: str | None
    seconds: float

    @property
    def channels(self) -> str:
        """Channels of a layer, or the fewest and the most."""
        low, high = min(self.widths), max(self.widths)
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The quality curve of a model so far.

    Attributes:
        dense: The dense model, as the point of ratio 0.
        points: The ratios that were tried, in ascending order.
        data: How the perplexity on each data set was measured, by its name: `num_tokens`, `num_windows`, `seqlen`,
            `dtype`, `protocol`, and `seen_windows`, the windows that share a passage with the calibration samples.
    """

    dense: SweepPoint
    points: tuple[SweepPoint, ...]
    data: Mapping[str, Mapping[str, Any]]

    def with_point(self, point: SweepPoint) -> "SweepResult":
        """Return the same curve with one more point, which takes the place of one of the same ratio."""
        others = [other for other in self.points if other.pruning_ratio != point.pruning_ratio]
        points = sorted([*others, point], key=lambda one: one.pruning_ratio)
        return dataclasses.replace(self, points=tuple(points))

    def point(self, pruning_ratio: float) -> SweepPoint | None:
        """Return the point of a ratio that did not fail, or None."""
        return next((p for p in self.points if p.pruning_ratio == pruning_ratio and p.error is None), None)

    def share(self, point: SweepPoint) -> float:
        """Return a point's parameters as a share of the dense model's."""
        return point.parameters / self.dense.parameters

    def increase(self, point: SweepPoint, name: str) -> float:
        """Return by what share of the dense model's perplexity on a data set that of a point is higher."""
        return point.perplexities[name] / self.dense.perplexities[name] - 1

    def table(self) -> str:
        """Return the curve as text in columns."""
        titles = [("", "ratio"), ("", "channels"), ("", "parameters"), ("", "of dense")]
        for name in self.data:
            label = name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
            titles += [(label, "perplexity"), ("", "increase")]
        rows = [self._row(point) for point in (self.dense, *self.points)]
        heads = [[title[line] for title in titles] for line in range(2)]
        widths = [max(map(len, column)) for column in zip(*heads, *(row[: len(titles)] for row in rows))]
        return "\n".join(
            "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), *row[len(widths) :]]).rstrip()
            for row in [*heads, *rows]
        )

    def _row(self, point: SweepPoint) -> list[str]:
        """Return the cells of a line; those of a ratio that failed end with the reason, after all columns."""
        if point.error is not None:
            empty = ["–"] * (3 + 2 * len(self.data))
            return [f"{point.pruning_ratio:.4g}", *empty, f"failed: {point.error}"]
        is_dense = point is self.dense
        ratio = "dense" if is_dense else f"{point.pruning_ratio:.4g}"
        cells = [ratio, point.channels, f"{point.parameters:,}", f"{self.share(point):.1%}"]
        for name in self.data:
            cells += [f"{point.perplexities[name]:,.2f}", "" if is_dense else f"{self.increase(point, name):+.1%}"]
        return cells

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain values, with the shares and increases that follow from the points."""
        return {
            "data": {name: dict(measured) for name, measured in self.data.items()},
            "dense": self._entry(self.dense),
            "points": [self._entry(point) for point in self.points],
        }

    def _entry(self, point: SweepPoint) -> dict[str, Any]:
        entry = {**dataclasses.asdict(point), "widths": list(point.widths)}
        if point.error is None:
            increases = {name: self.increase(point, name) for name in point.perplexities}
            entry |= {"share_of_dense_parameters": self.share(point), "increases": increases}
        return entry
