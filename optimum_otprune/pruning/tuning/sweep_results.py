"""The quality curve of one model: its points, their table, and the file that keeps each one."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from optimum_otprune.config.quantities import real_number, whole_number
from optimum_otprune.errors import OutputError, StudyError
from optimum_otprune.models.defaults import SWEEP_FILE
from optimum_otprune.pruning.fingerprint import describe_difference
from optimum_otprune.storage.files import replace_file, why_not_written
from optimum_otprune.storage.untrusted import read_json

_FORMAT = 1
_LARGEST = 1 << 26  # bytes
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


class SweepFile:
    """The file that keeps a quality curve, so that an interrupted run goes on.

    Args:
        folder: The folder of the file, which is made when it is written; None keeps nothing.
        fingerprint: Everything that a point depends on, but its ratio; JSON-ready.
    """

    def __init__(self, folder: Path | None, fingerprint: Mapping[str, object]):
        self._folder = folder
        self._fingerprint = fingerprint

    def read(self) -> SweepResult | None:
        """Return the curve of an earlier run, or None where there is none.

        Raises:
            StudyError: If the file is damaged, something else, or of another model, data or configuration.
        """
        if self._folder is None or not (self._folder / SWEEP_FILE).exists():
            return None
        try:
            values = read_json(self._folder / SWEEP_FILE, _LARGEST)
            result, known = _result(values), values["fingerprint"]
        except ValueError as error:
            raise StudyError(
                f"The file {SWEEP_FILE!r} in {self._folder.name!r} is no quality curve ({error}). Choose another "
                "folder, or move the file elsewhere."
            ) from error
        difference = describe_difference(known, self._fingerprint, ["model", "calibration samples", "evaluation data"])
        if difference is not None:
            raise StudyError(
                f"The quality curve in {self._folder.name!r} was begun with another {difference}. Go on with what it "
                "was begun with, or choose another folder."
            )
        return result

    def write(self, result: SweepResult) -> None:
        """Replace the file by the curve so far, in one step.

        Raises:
            OutputError: If it cannot be written.
        """
        if self._folder is None:
            return
        values = {
            "format": _FORMAT,
            "optimum_otprune_version": version("optimum_otprune"),
            **result.to_dict(),
            "fingerprint": self._fingerprint,
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(values, indent=2, allow_nan=False)
            replace_file(self._folder / SWEEP_FILE, (text + "\n").encode())
        except OSError as error:
            raise OutputError(
                f"The file {SWEEP_FILE!r} in {self._folder.name!r} could not be written: {why_not_written(error)}. "
                "Make room, or choose another folder."
            ) from error


def _result(values: object) -> SweepResult:
    """Return the curve that a file holds.

    Raises:
        ValueError: If it holds none; the text can follow a colon.
    """
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"it is no object of format {_FORMAT}")
    data, points = values.get("data"), values.get("points")
    if not isinstance(data, dict) or not data or not all(isinstance(measured, dict) for measured in data.values()):
        raise ValueError("`data` is missing")
    if not isinstance(points, list) or not isinstance(values.get("fingerprint"), dict):
        raise ValueError("`points` or `fingerprint` is missing")
    dense = _point(values.get("dense"), list(data))
    if dense.error is not None:
        raise ValueError("the dense model has no perplexity")
    return SweepResult(dense, tuple(_point(entry, list(data)) for entry in points), data)


def _point(entry: object, names: Sequence[str]) -> SweepPoint:
    if not isinstance(entry, dict):
        raise ValueError("a point is no object")
    values: dict[str, Any] = entry
    ratio, seconds, parameters = (values.get(name) for name in ("pruning_ratio", "seconds", "parameters"))
    widths, found, error = (values.get(name) for name in ("widths", "perplexities", "error"))
    is_failed = isinstance(error, str)
    if (
        _is_number(ratio, 0)
        and ratio < 1
        and _is_number(seconds, 0)
        and _is_count(parameters, 0 if is_failed else 1)
        and isinstance(widths, list)
        and all(_is_count(width, 1) for width in widths)
        and isinstance(found, dict)
        and all(_is_number(value, 1) for value in found.values())
        and (is_failed or error is None and bool(widths) and sorted(found) == sorted(names))
    ):
        return SweepPoint(ratio, tuple(widths), parameters, found, error, seconds)
    raise ValueError("a point lacks a number, or has one that cannot be")


def _is_number(value: object, least: float) -> TypeGuard[float]:
    number = real_number(value)
    return number is not None and number >= least


def _is_count(value: object, least: int) -> TypeGuard[int]:
    number = whole_number(value)
    return number is not None and number >= least
