"""The report of one layer: a line of the log, and an entry of a report that is checked when it is read."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optimum_otprune.errors import ReportError, warn_user
from optimum_otprune.functional.ratios import (
    RescueEnergies,
    diluted_share,
    dilution_ratio,
    pooled,
    relative_error,
    rescue_ratio,
    rescued_share,
)
from optimum_otprune.storage.untrusted import visible

REPORT_FILE = "otprune_report.json"
_LARGEST_COUNT = 1 << 62
_LARGEST_NUMBER = 1e150  # the squares of so many layers' numbers still have a finite sum
_TOLERANCE = 1e-6
_ROUNDED_TO_ZERO = 1e-5  # the largest relative difference that rounding explains
_UNIT = re.compile(r"(expert \d{1,9}|shared expert|FFN|attention) of block \d{1,9}|layer \d{1,9}", re.ASCII)
_SIGNED = frozenset({"rescue_ratio", "transported_mass", "self_share"})


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The result of pruning one layer, in numbers.

    Errors and energies are sums over held-out tokens, each weighed as where the layer was fitted; see
    `optimum_otprune.functional.ratios.RescueEnergies`.

    Attributes:
        layer: The layer's index, from 0.
        intermediate_size_before: Number of channels before pruning.
        intermediate_size_after: Number of channels after pruning.
        kept_channels: Sorted indices of the kept channels; with centroids, of the channels nearest to them.
        rescue_ratio: Share of the pruned channels' output energy that is still delivered, on held-out tokens.
        dilution_ratio: Share of the kept channels' own contribution given up, on held-out tokens.
        transported_mass: Share of the pruned channels' mass that the plan moved; 0 without transport.
        self_share: Mean share of a kept channel's gate and up weights that comes from itself.
        relative_error_before_refit: `Σ ‖y − ŷ‖² / Σ ‖y‖²` after fusion alone, on held-out tokens.
        relative_error_after_refit: The same after the refit, fitted without the held-out tokens.
        relative_error_after_reconstruction: The same after reconstruction; without one, as before it.
        ridge_lambda: λ of the refit, None without one; infinity where the prior was best.
        intercept: Whether an output bias was added.
        energies: The energies that the two ratios are computed from.
        unit: What of its block it is, such as `"expert 7 of block 3"`; empty where each block has one.
    """

    layer: int
    intermediate_size_before: int
    intermediate_size_after: int
    kept_channels: tuple[int, ...]
    rescue_ratio: float
    dilution_ratio: float
    transported_mass: float
    self_share: float
    relative_error_before_refit: float
    relative_error_after_refit: float
    relative_error_after_reconstruction: float
    ridge_lambda: float | None
    intercept: bool
    energies: RescueEnergies
    unit: str = ""

    @property
    def name(self) -> str:
        """What the layer is called, such as "layer 3"."""
        return self.unit or f"layer {self.layer}"

    @property
    def pruned_channels(self) -> int:
        """How many channels went."""
        return self.intermediate_size_before - self.intermediate_size_after

    def to_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready, infinity as `"inf"`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["kept_channels"] = list(self.kept_channels)
        values["energies"] = self.energies._asdict()
        if self.ridge_lambda is not None and math.isinf(self.ridge_lambda):
            values["ridge_lambda"] = "inf"
        if not self.unit:  # as in reports that do not say
            del values["unit"]
        return values

    @classmethod
    def from_dict(cls, values: object) -> "LayerReport":
        """Make a report from the result of `to_dict`; entries that are unknown here are left out with a warning.

        Raises:
            ReportError: If an entry is missing, of another kind, or contradicts another one; names it.
        """
        unknown: list[str] = []
        layer = cls.read(values, "layer", unknown)
        warn_of_unknown(unknown)
        return layer

    @classmethod
    def read(cls, values: Any, where: str, unknown: list[str]) -> "LayerReport":
        """Make a report from an entry of a larger one.

        Args:
            values: The entry, which may be anything.
            where: What the layer is called in messages.
            unknown: A list that the names of entries that this version does not know are added to.

        Raises:
            ReportError: If an entry is wrong; see `PruningReport.from_dict`.
        """
        check_entry(where, values, Mapping)
        names = [field.name for field in dataclasses.fields(cls) if field.name != "unit" or "unit" in values]
        found = known_entries(values, names, where, unknown)
        energies = known_entries(found["energies"], RescueEnergies._fields, f"{where}.energies", unknown)
        found["energies"] = RescueEnergies(**energies)
        found["ridge_lambda"] = math.inf if found["ridge_lambda"] == "inf" else found["ridge_lambda"]
        check_entry(f"{where}.kept_channels", found["kept_channels"], (list, tuple))
        layer = cls(**{**found, "kept_channels": tuple(found["kept_channels"])})
        layer.check(where)
        return layer

    def check(self, where: str, is_finite: bool = True) -> None:
        """Raise an error if an entry, which may come from a file, has the wrong type, or counts do not add up.

        Args:
            where: What the layer is called in messages.
            is_finite: Whether to refuse NaN, infinity and contradictions between entries, as in files.

        Raises:
            ReportError: If there is one; the message names the first such entry.
        """
        for field in dataclasses.fields(self):
            if field.type in (int, float, bool):
                least = None if field.name in _SIGNED else 0
                check_entry(f"{where}.{field.name}", getattr(self, field.name), field.type, least, is_finite)
        for name, value in self.energies._asdict().items():
            check_entry(f"{where}.energies.{name}", value, float, 0, is_finite)
        if self.ridge_lambda not in (None, math.inf):
            check_entry(f"{where}.ridge_lambda", self.ridge_lambda, float, 0)
        check_entry(f"{where}.unit", self.unit, str)
        if self.unit and not _UNIT.fullmatch(self.unit):
            raise ReportError(f"`{where}.unit` of the report is {self.unit!r:.60}, which names nothing. {_restore()}")
        _check_channels(self, where)
        if is_finite:
            check_follows(f"{where}.rescue_ratio", self.rescue_ratio, rescue_ratio(self.energies))
            check_follows(f"{where}.dilution_ratio", self.dilution_ratio, dilution_ratio(self.energies))
            error, name = self.relative_error_after_reconstruction, "relative_error_after_reconstruction"
            check_follows(f"{where}.{name}", error, relative_error(self.energies))

    def __str__(self) -> str:
        name = self.unit.capitalize() or f"Layer {self.layer:02d}"
        return (
            f"{name}: Rescued {self.rescue_ratio:.3f} ({rescued_share(self.rescue_ratio)}) of pruned "
            f"channels, Diluted {self.dilution_ratio:.3f} ({diluted_share(self.dilution_ratio)}) of kept channels"
        )


def named_layers(layers: Sequence[LayerReport]) -> str:
    """Return a phrase such as "layer 1 (-80.2) and layer 5 (-0.1)", the first ten of them."""
    named = [f"{layer.name} ({layer.rescue_ratio:.3g})" for layer in layers[:10]]
    if len(layers) > len(named):
        return f"{', '.join(named)} and {len(layers) - len(named)} others"
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def removed_heads(attention: Sequence[LayerReport]) -> str:
    """Return in words how many heads of attention are gone, and how much of what they did is still there."""
    columns = sum(block.intermediate_size_before for block in attention)
    gone = sum(block.pruned_channels for block in attention)
    ratio = rescue_ratio(pooled(block.energies for block in attention))
    return (
        f"{gone / columns:.1%} of the heads are gone, in {len(attention)} blocks; rescued {ratio:.3f} "
        f"({rescued_share(ratio)}) of their output energy"
    )


def statistics_lines(name: str, values: list[float]) -> list[str]:
    """Return a line with mean, standard deviation and range of a number over layers."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [f"{name}: mean {mean:.3f}, std {std:.3f}, range {min(values):.3f} to {max(values):.3f}"]


def width_range(widths: tuple[int, ...]) -> str:
    """Return the smallest and the largest width in words; nothing where they are the same."""
    return f" ({min(widths):,} to {max(widths):,} a layer)" if len(set(widths)) > 1 else ""


def known_entries(values: Any, names: Collection[str], where: str, unknown: list[str]) -> dict[str, Any]:
    """Return the entries that an object of a report must have.

    Args:
        values: The object, which may be anything.
        names: The names of the entries.
        where: What the object is called in messages.
        unknown: A list that the names of all other entries are added to.

    Raises:
        ReportError: If it is not a JSON object, or an entry is missing.
    """
    check_entry(where, values, Mapping)
    missing = [name for name in names if name not in values]
    if missing:
        raise ReportError(f"`{where}` of the report has no entry `{missing[0]}`. {_restore()}")
    unknown += [f"{where}.{name}" for name in values if name not in names]
    return {name: values[name] for name in names}


def warn_of_unknown(unknown: Sequence[str]) -> None:
    """Warn that entries of a report, written by a later version, are left out."""
    if unknown:
        warn_user(
            f"The report has entries that this version of optimum_otprune does not know, {len(unknown)} in all, such "
            f"as `{visible(unknown[0], 80)}`. They are left out; upgrade to read them."
        )


def check_entry(
    name: str, value: object, kind: type | tuple[type, ...], least: float | None = None, is_finite: bool = True
) -> None:
    """Raise an error if an entry of a report has the wrong type or is out of range.

    Args:
        name: What the entry is called in messages.
        value: The value, which may be anything.
        kind: `float` takes integers, too; `int` and `float` do not take `bool`.
        least: The smallest number allowed; None for no limit.
        is_finite: Whether NaN, infinity and numbers whose sums may be infinite are refused.

    Raises:
        ReportError: If the value is wrong; the message names the entry.
    """
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if fits and isinstance(value, float) and not abs(value) <= _LARGEST_NUMBER:
        fits = not is_finite
    elif fits and isinstance(value, (int, float)):
        is_small = isinstance(value, float) or abs(value) <= _LARGEST_COUNT
        fits = is_small and (least is None or value >= least)
    if not fits:
        bound = "" if least is None else f" >= {least}"
        wanted = kind[0].__name__ if isinstance(kind, tuple) else kind.__name__
        raise ReportError(f"`{name}` of the report is {value!r:.60}; want {wanted}{bound}. {_restore()}")


def check_follows(name: str, value: object, derived: float) -> None:
    """Raise an error if an entry of a report does not follow from the others.

    Args:
        name: What the entry is called in messages.
        value: The value, which may be anything.
        derived: The value that follows from the other entries.

    Raises:
        ReportError: If the two differ; the message names the entry.
    """
    check_entry(name, value, float)
    assert isinstance(value, (int, float))
    if not (
        abs(derived) <= _LARGEST_NUMBER and math.isclose(value, derived, rel_tol=_TOLERANCE, abs_tol=_ROUNDED_TO_ZERO)
    ):
        raise ReportError(
            f"`{name}` of the report is {value!r:.60}, but its other numbers give {derived!r}. {_restore()}"
        )


def _restore() -> str:
    return f"Restore `{REPORT_FILE}` as `OTPruner.save_pretrained` wrote it."


def _check_channels(layer: LayerReport, where: str) -> None:
    before, after, kept = layer.intermediate_size_before, layer.intermediate_size_after, layer.kept_channels
    if after > before or len(kept) != after:
        raise ReportError(
            f"`{where}` of the report kept {len(kept)} channels, where {after} of {before} are said to be kept. "
            f"{_restore()}"
        )
    wrong = [channel for channel in kept if type(channel) is not int or not 0 <= channel < before]
    if wrong or len(set(kept)) != after:
        what = f"{wrong[0]!r:.60}, which is none" if wrong else "one twice"
        raise ReportError(f"`{where}.kept_channels` of the report holds {what} of {before} channels. {_restore()}")
