"""What pruning did, layer by layer: the source of every number in a log line, summary or model card."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from optimum_otprune.errors import ReportError
from optimum_otprune.functional.rescue import RescueEnergies, dilution_ratio, pooled, rescue_ratio
from optimum_otprune.version import __version__

REPORT_FILE = "otprune_report.json"

_WIDTH = 60


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        layer: Index.
        intermediate_size_before: Channels before.
        intermediate_size_after: Channels after.
        kept_channels: Indices of the kept channels, sorted; for centroids, of the channels nearest to them.
        rescue_ratio: Share of the pruned channels' output energy that is still delivered, on held-out tokens.
        dilution_ratio: Share of the kept channels' own contribution given up, on held-out tokens.
        transported_mass: Share of the pruned channels' mass that the plan moved; 0 without transport.
        self_share: Mean share of a kept channel's gate and up weights that comes from itself.
        relative_error_before_refit: `Σ ‖y − ŷ‖² / Σ ‖y‖²` after fusion alone, on held-out tokens.
        relative_error_after_refit: The same after the refit, fitted without the held-out tokens.
        relative_error_after_reconstruction: The same after reconstruction; without one, as before it.
        ridge_lambda: λ of the refit, None without one; infinity where the prior was best.
        intercept: Whether an output bias was added.
        energies: What the two ratios are made of.
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

    @property
    def pruned_channels(self) -> int:
        """How many channels went."""
        return self.intermediate_size_before - self.intermediate_size_after

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, infinity as `"inf"`."""
        return _layer_to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerReport":
        """Make a report of what `to_dict` gave; a part that is missing or of another kind is some builtin error."""
        return _layer_from_dict(values)

    def __str__(self) -> str:
        return (
            f"Layer {self.layer:02d}: Rescued {self.rescue_ratio:.3f} ({self.rescue_ratio:.1%}) of pruned channels, "
            f"Diluted {self.dilution_ratio:.3f} ({self.dilution_ratio:.1%}) of kept channels"
        )


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What pruning did to a model.

    Attributes:
        config: The configuration as a dictionary.
        layers: One report per layer, in order.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model, zeros that only fill up layers not counted.
        calibration: What it was calibrated on: `data`, `num_samples`, `seqlen`, `num_tokens`.
        base_model: Hub id of the model that was pruned, or None.
        evaluations: Results of `evaluate`, oldest first, each with its protocol.
        custom_functions: Functions given in place of registered names, by field.
        versions: Of this package and its libraries.
        padding_parameters: Zeros saved with the model that fill up layers to a common width.
        size_before: Bytes of the dense model's weights, shared ones once; None where it was not recorded.
        size_after: Bytes of the pruned model's.
        model_type: Of the architecture, as transformers names it, or None.
        base_card: License and language of the base model, as its card states them; see `base_card.read_base_card`.
    """

    config: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    calibration: Mapping[str, Any]
    base_model: str | None = None
    evaluations: tuple[Mapping[str, Any], ...] = ()
    custom_functions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    size_before: int | None = None
    size_after: int | None = None
    model_type: str | None = None
    base_card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    padding_parameters: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer after."""
        return tuple(layer.intermediate_size_after for layer in self.layers)

    @property
    def energies(self) -> RescueEnergies:
        """Of all layers together."""
        return pooled(layer.energies for layer in self.layers)

    @property
    def pruning_ratio(self) -> float:
        """Share of the channels of all layers that were removed."""
        before = sum(layer.intermediate_size_before for layer in self.layers)
        return sum(layer.pruned_channels for layer in self.layers) / before if before else 0.0

    @property
    def rescue_ratio(self) -> float:
        """Of the whole model, pooled by energy."""
        return rescue_ratio(self.energies)

    @property
    def dilution_ratio(self) -> float:
        """Of the whole model, pooled by energy."""
        return dilution_ratio(self.energies)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries; infinity as `"inf"`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["layers"] = [_layer_to_dict(layer) for layer in self.layers]
        values["evaluations"] = [dict(evaluation) for evaluation in self.evaluations]
        values |= {"pruning_ratio": self.pruning_ratio}
        values |= {"rescue_ratio": self.rescue_ratio, "dilution_ratio": self.dilution_ratio}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """Make a report of what `to_dict` gave.

        Raises:
            ReportError: If a part is missing or of another kind.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            arguments = {name: value for name, value in values.items() if name in known}
            arguments["layers"] = tuple(_layer_from_dict(layer) for layer in values["layers"])
            arguments["evaluations"] = tuple(values.get("evaluations", ()))
            return cls(**arguments)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(
                f"This is no pruning report: {type(error).__name__}: {error}. It is the file `{REPORT_FILE}` that "
                "`OTPruner.save_pretrained` writes."
            ) from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningReport":
        """Read a report that `save` wrote.

        Raises:
            ReportError: If the file is no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReportError(f"{Path(path).name} is not valid JSON ({error}). Make the report again.") from error
        if not isinstance(values, dict):
            raise ReportError(f"{Path(path).name} holds a {type(values).__name__} where a report is an object.")
        return cls.from_dict(values)

    def __str__(self) -> str:
        return _summary(self)


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that a result depends on."""
    names = ("torch", "transformers", "POT", "datasets")
    return {"optimum_otprune": __version__, **{name: metadata.version(name) for name in names}}


def _layer_to_dict(layer: LayerReport) -> dict[str, Any]:
    values = dataclasses.asdict(layer)
    values["kept_channels"] = list(layer.kept_channels)
    values["energies"] = layer.energies._asdict()
    if layer.ridge_lambda is not None and math.isinf(layer.ridge_lambda):
        values["ridge_lambda"] = "inf"
    return values


def _layer_from_dict(values: Mapping[str, Any]) -> LayerReport:
    ridge = values["ridge_lambda"]
    return LayerReport(
        **{
            **values,
            "kept_channels": tuple(values["kept_channels"]),
            "energies": RescueEnergies(**values["energies"]),
            "ridge_lambda": None if ridge is None else float(ridge),
        }
    )


def _statistics_lines(name: str, values: list[float]) -> list[str]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [f"{name}: mean {mean:.3f}, std {std:.3f}, range {min(values):.3f} to {max(values):.3f}"]


def _rescue_words(ratio: float) -> str:
    if ratio < 0:
        return "harmful (< 0 %): the compressed layers are further from the dense ones than plain dropping"
    return "good (> 50 %)" if ratio > 0.5 else "moderate (> 20 %)" if ratio > 0.2 else "limited (<= 20 %)"


def _dilution_words(ratio: float) -> str:
    return "low (< 20 %)" if ratio < 0.2 else "moderate (< 50 %)" if ratio < 0.5 else "high (>= 50 %)"


def _width_range(widths: tuple[int, ...]) -> str:
    return f" ({min(widths):,} to {max(widths):,} a layer)" if len(set(widths)) > 1 else ""


def _parameters(report: PruningReport) -> str:
    before, after = report.parameters_before, report.parameters_after
    share = f" ({after / before:.1%})" if before else ""
    padding = f" (+ {report.padding_parameters:,} zeros that fill up)" if report.padding_parameters else ""
    return f"{before:,} -> {after:,}{share}{padding}"


def _summary(report: PruningReport) -> str:
    rule = "=" * _WIDTH
    pruned = sum(layer.pruned_channels for layer in report.layers)
    kept = sum(layer.intermediate_size_after for layer in report.layers)
    energies = report.energies
    lines = [
        rule,
        "RESCUE EFFECT SUMMARY REPORT".center(_WIDTH).rstrip(),
        rule,
        "Model Overview",
        f"  Layers analyzed: {len(report.layers)}",
        f"  Pruned channels: {pruned:,} ({report.pruning_ratio:.1%})",
        f"  Kept channels: {kept:,}" + _width_range(report.widths),
        f"  Parameters: {_parameters(report)}",
        "Global Rescue Effect",
        f"  Rescued {report.rescue_ratio:.3f} ({report.rescue_ratio:.1%}) of the pruned channels' output energy",
        "Global Dilution Effect",
        f"  Diluted {report.dilution_ratio:.3f} ({report.dilution_ratio:.1%}) of the kept channels' own contribution",
    ]
    touched = [layer for layer in report.layers if layer.pruned_channels] or report.layers
    if touched:
        rescued = [layer.rescue_ratio for layer in touched]
        diluted = [layer.dilution_ratio for layer in touched]
        lines += ["Per-Layer Statistics"]
        lines += ["  " + line for line in _statistics_lines("Rescue ratio", rescued)]
        lines += ["  " + line for line in _statistics_lines("Dilution ratio", diluted)]
    lines += [
        "Interpretation",
        f"  Rescue: {_rescue_words(report.rescue_ratio)}" + ("" if energies.pruned else "; nothing was pruned"),
        f"  Dilution: {_dilution_words(report.dilution_ratio)}",
        rule,
    ]
    return "\n".join(lines)
