"""The file of a quality curve, which keeps each point as soon as it is known and is read as strictly as any input."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from optimum_otprune.config.quantities import real_number, whole_number
from optimum_otprune.errors import OutputError, StudyError
from optimum_otprune.models.defaults import SWEEP_FILE
from optimum_otprune.pruning.fingerprint import describe_difference
from optimum_otprune.pruning.tuning.sweep_results import SweepPoint, SweepResult
from optimum_otprune.storage.files import replace_file, why_not_written
from optimum_otprune.storage.untrusted import read_json

_FORMAT = 1
_LARGEST = 1 << 26  # bytes


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
