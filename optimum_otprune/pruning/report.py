"""The report of pruning, layer by layer: the source of every number in a log line, summary or model card."""

import dataclasses
import functools
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_otprune.errors import ReportError
from optimum_otprune.functional.ratios import (
    GOOD,
    LIMITED,
    RescueEnergies,
    diluted_share,
    dilution_ratio,
    dilution_verdict,
    outliers,
    pooled,
    rescue_ratio,
    rescue_verdict,
    rescued_share,
)
from optimum_otprune.models.tasks import CAUSAL
from optimum_otprune.pruning.comparison import Comparison, check_evaluation, check_numbers, compared
from optimum_otprune.pruning.layer_report import (
    REPORT_FILE,
    LayerReport,
    check_entry,
    check_follows,
    known_entries,
    named_layers,
    removed_heads,
    statistics_lines,
    warn_of_unknown,
    width_range,
)
from optimum_otprune.pruning.quantization_report import QuantizationReport
from optimum_otprune.pruning.recovery_report import RecoveryReport
from optimum_otprune.pruning.serving import not_read_everywhere
from optimum_otprune.pruning.task_results import TaskResult
from optimum_otprune.storage.files import replace_file
from optimum_otprune.storage.untrusted import read_json

_WIDTH = 60
_MOST_LAYERS = 100_000
_LITTLE, _MUCH = 1.5, 2.0  # factors of the perplexity
_FEW = 0.1  # share of a layer's output energy
_DERIVED = frozenset(
    {"pruning_ratio", "rescue_ratio", "dilution_ratio", "median_rescue_ratio", "median_dilution_ratio"}
)
_REQUIRED = frozenset({"config", "layers", "parameters_before", "parameters_after", "calibration"})
_CALIBRATION: Mapping[str, type] = {"data": str, "num_samples": int, "seqlen": int, "num_tokens": int}


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """The result of pruning a model, in numbers.

    Attributes:
        config: The configuration as a dictionary.
        layers: One report per layer, in order.
        parameters_before: Parameters of the whole model before pruning.
        parameters_after: Parameters of the whole model after pruning, zeros that only fill up layers not counted.
        calibration: Description of the calibration data: `data`, `num_samples`, `seqlen`, `num_tokens` of
            what was given, and `written_samples` where the dense model wrote samples of that length itself.
        base_model: Hub id of the model that was pruned, or None.
        evaluations: Results of `evaluate`, oldest first, each with its protocol.
        custom_functions: Functions given in place of registered names, by field.
        versions: Versions of this package and its libraries.
        padding_parameters: Zeros saved with the model that fill up layers to a common width.
        size_before: Bytes of the dense model's weights, shared ones once; None where it was not recorded.
        size_after: Bytes of the pruned model's weights; None where it was not recorded.
        model_type: The architecture, as transformers names it, or None.
        token_weighting: How tokens count in the energies of layers: `residual` as in the option of that name, or
            `uniform`, as in reports that do not say.
        base_card: License and language of the base model, as its card states them; see `base_card.read_base_card`.
        added_biases: Whether the FFNs had no biases before and have some now.
        options: Names of the fewest options that make the configuration; None in reports that do not say.
        references: Publications, or addresses of them, that registered functions were registered with, by field;
            None in reports that do not say.
        recoveries: Reports of `recover`, oldest first.
        tasks: Results on tasks that were added to the saved model, in the order in which they came.
        auto_class: The auto class of transformers that loads the model.
        attention: One report per block whose attention lost heads; channels are columns of its output projection.
        quantization: The report of quantization, or None for plain weights.
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
    added_biases: bool = False
    token_weighting: str = "uniform"
    options: Sequence[str] | None = None
    references: Mapping[str, Mapping[str, str]] | None = None
    recoveries: tuple[RecoveryReport, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    auto_class: str = CAUSAL
    attention: tuple[LayerReport, ...] = ()
    quantization: QuantizationReport | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer after."""
        return tuple(layer.intermediate_size_after for layer in self.layers)

    @functools.cached_property
    def energies(self) -> RescueEnergies:
        """The energies of all layers, added up."""
        return pooled(layer.energies for layer in self.layers)

    @property
    def pruning_ratio(self) -> float:
        """Share of the channels of all layers that were removed."""
        before = sum(layer.intermediate_size_before for layer in self.layers)
        return sum(layer.pruned_channels for layer in self.layers) / before if before else 0.0

    @property
    def rescue_ratio(self) -> float:
        """The rescue ratio of the whole model, pooled by energy."""
        return rescue_ratio(self.energies)

    @property
    def dilution_ratio(self) -> float:
        """The dilution ratio of the whole model, pooled by energy."""
        return dilution_ratio(self.energies)

    @property
    def comparisons(self) -> list[Comparison]:
        """The latest evaluations by data and protocol, those of both models first."""
        return compared(self.evaluations)

    @property
    def touched_layers(self) -> tuple[LayerReport, ...]:
        """Layers that lost channels; all, where none did."""
        return tuple(layer for layer in self.layers if layer.pruned_channels) or self.layers

    @property
    def median_rescue_ratio(self) -> float:
        """Over the layers that lost channels; 1 for a model without layers."""
        return statistics.median([layer.rescue_ratio for layer in self.touched_layers] or [1.0])

    @property
    def median_dilution_ratio(self) -> float:
        """Over the layers that lost channels; 0 for a model without layers."""
        return statistics.median([layer.dilution_ratio for layer in self.touched_layers] or [0.0])

    @property
    def contradiction(self) -> str | None:
        """The reason why rescue ratio and measured perplexity disagree; None where they agree."""
        factor = next((pair.factor for pair in self.comparisons), None)
        if factor is None or not self.energies.pruned:
            return None
        if self.rescue_ratio > GOOD and factor >= _MUCH:
            return (
                f"Perplexity is ×{factor:.2f} all the same: the ratio looks at the output of each layer alone, and "
                "errors of layers add up. Go by the perplexity."
            )
        if self.rescue_ratio > LIMITED or factor >= _LITTLE:
            return None
        share = self.energies.pruned / self.energies.output if self.energies.output else 0.0
        if self.median_rescue_ratio > LIMITED:
            heaviest = [max(self.touched_layers, key=lambda layer: layer.energies.pruned)]
            why = f"few layers decide the pooled ratio ({named_layers(self.outliers or heaviest)}), while half of the "
            why += f"layers reach {self.median_rescue_ratio:.3f} or more"
        elif share < _FEW:
            why = f"the pruned channels made up only {share:.1%} of the layers' output, so there was little to lose"
        else:
            why = "the ratio looks at the output of each layer alone, and later layers even out part of the errors"
        return f"Perplexity is only ×{factor:.2f} all the same: {why}. Go by the perplexity."

    @property
    def outliers(self) -> tuple[LayerReport, ...]:
        """Layers whose rescue ratio is far from the others'; see `optimum_otprune.functional.ratios.outliers`."""
        touched = self.touched_layers
        return tuple(touched[index] for index in outliers([layer.rescue_ratio for layer in touched]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dictionaries; infinity as `"inf"`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["layers"] = [layer.to_dict() for layer in self.layers]
        values["evaluations"] = [dict(evaluation) for evaluation in self.evaluations]
        del values["tasks"]
        if self.auto_class == CAUSAL:  # as in reports that do not say
            del values["auto_class"]
        del values["attention"], values["quantization"]
        values |= {} if self.quantization is None else {"quantization": self.quantization.to_dict()}
        values |= {"attention": [block.to_dict() for block in self.attention]} if self.attention else {}
        values |= {"tasks": [task.to_dict() for task in self.tasks]} if self.tasks else {}
        values["recoveries"] = [recovery.to_dict() for recovery in self.recoveries]
        values |= {name: getattr(self, name) for name in _DERIVED}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "PruningReport":
        """Make a report from the result of `to_dict`; entries that are unknown here are left out with a warning.

        Raises:
            ReportError: If an entry is missing, of another kind, or contradicts another one; names it.
        """
        if not isinstance(values, Mapping) or not _REQUIRED & set(values):
            raise ReportError(
                f"This is no pruning report. One is the file `{REPORT_FILE}` that `OTPruner.save_pretrained` writes."
            )
        names = [field.name for field in dataclasses.fields(cls) if field.name in values or field.name in _REQUIRED]
        unknown: list[str] = []
        found = known_entries(values, (*names, *(_DERIVED & set(values))), "report", unknown)
        check_entry("layers", found["layers"], (list, tuple))
        if len(found["layers"]) > _MOST_LAYERS:
            raise ReportError(
                f"The report is of {len(found['layers']):,} layers; want at most {_MOST_LAYERS:,}. Get the folder "
                "again from somebody you trust."
            )
        layers = [LayerReport.read(layer, f"layers[{i}]", unknown) for i, layer in enumerate(found["layers"])]
        attention = found.get("attention", ())
        check_entry("attention", attention, (list, tuple))
        found["attention"] = tuple(
            LayerReport.read(block, f"attention[{i}]", unknown) for i, block in enumerate(attention[:_MOST_LAYERS])
        )
        evaluations = found.get("evaluations", ())
        check_entry("evaluations", evaluations, (list, tuple))
        tasks, recoveries = found.get("tasks", ()), found.get("recoveries", ())
        check_entry("tasks", tasks, (list, tuple))
        check_entry("recoveries", recoveries, (list, tuple))
        found["tasks"] = tuple(TaskResult.read(task, f"tasks[{i}]", unknown) for i, task in enumerate(tasks))
        found["recoveries"] = tuple(
            RecoveryReport.read(entry, f"recoveries[{i}]", unknown) for i, entry in enumerate(recoveries)
        )
        found |= {"layers": tuple(layers), "evaluations": tuple(evaluations)}
        if found.get("quantization") is not None:
            found["quantization"] = QuantizationReport.read(found["quantization"], "quantization", unknown)
        if isinstance(found.get("options"), list):
            found["options"] = tuple(found["options"])
        report = cls(**{name: found[name] for name in {*names, "evaluations", "tasks", "recoveries", "attention"}})
        report.check()
        for name in sorted(_DERIVED):
            derived = getattr(report, name)
            check_follows(name, values.get(name, derived), derived)
        warn_of_unknown(unknown)
        return report

    def check(self, is_finite: bool = True) -> None:
        """Raise an error if an entry, which may come from a file, has the wrong type, or counts do not add up.

        Args:
            is_finite: Whether to refuse NaN, infinity and contradictions between entries, as in files.

        Raises:
            ReportError: If there is one; the message names the first such entry.
        """
        for name in ("layers", "attention"):
            parts: tuple[LayerReport, ...] = getattr(self, name)
            for index, layer in enumerate(parts):
                layer.check(f"{name}[{index}]", is_finite)
            if any(later.layer <= former.layer for former, later in itertools.pairwise(parts)):
                raise ReportError(f"`{name}` of the report are not in order, each once. Get the folder again.")
        for name in ("config", "calibration", "custom_functions", "versions", "base_card"):
            check_entry(name, getattr(self, name), Mapping)
        if self.options is not None:
            check_entry("options", self.options, (list, tuple))
            for name in self.options:
                check_entry("options", name, str)
        for name in ("custom_functions", "versions"):
            for value in getattr(self, name).values():
                check_entry(name, value, str)
        if self.references is not None:
            check_entry("references", self.references, Mapping)
            for reference in self.references.values():
                check_entry("references", reference, Mapping)
                for value in reference.values():
                    check_entry("references", value, str)
        check_entry("token_weighting", self.token_weighting, str)
        check_entry("added_biases", self.added_biases, bool)
        check_entry("auto_class", self.auto_class, str)
        for name in ("parameters_before", "parameters_after", "padding_parameters"):
            check_entry(name, getattr(self, name), int, 0)
        optional: dict[str, type] = {"size_before": int, "size_after": int, "base_model": str, "model_type": str}
        for name, kind in optional.items():
            if getattr(self, name) is not None:
                check_entry(name, getattr(self, name), kind, 0 if kind is int else None)
        check_numbers("calibration", self.calibration, _CALIBRATION, is_finite)
        check_entry("calibration.written_samples", self.calibration.get("written_samples", 0), int, 0)
        tokens, samples = self.calibration["num_tokens"], self.calibration["num_samples"]
        if tokens != samples * self.calibration["seqlen"]:
            raise ReportError(
                f"`calibration` of the report has {tokens} tokens, which are not {samples} samples of "
                f"{self.calibration['seqlen']}. Get the folder again."
            )
        if is_finite:
            _check_parameters(self)
        for index, evaluation in enumerate(self.evaluations):
            check_evaluation(f"evaluations[{index}]", evaluation, is_finite)
        for index, task in enumerate(self.tasks):
            task.check(f"tasks[{index}]")
        for index, recovery in enumerate(self.recoveries):
            recovery.check(f"recoveries[{index}]", is_finite)
        if self.quantization is not None:
            self.quantization.check("quantization", is_finite)

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON."""
        replace_file(Path(os.path.expanduser(path)), self.to_json_string().encode())

    def to_json_string(self) -> str:
        """Return the report as the text of its file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningReport":
        """Read a report that `save` wrote.

        Raises:
            ReportError: If the file is no report.
        """
        try:
            values = read_json(Path(os.path.expanduser(path)))
        except ValueError as error:
            raise ReportError(f"{Path(path).name!r} is damaged: {error}. Get the folder again.") from error
        if not isinstance(values, dict):
            raise ReportError(f"{Path(path).name!r} holds a {type(values).__name__} where a report is an object.")
        return cls.from_dict(values)

    def __str__(self) -> str:
        return _summary(self)


def _check_parameters(report: PruningReport) -> None:
    """Raise an error if biases added more parameters, or zeros filled up more, than is possible."""
    before, after, padding = report.parameters_before, report.parameters_after, report.padding_parameters
    has_biases = report.added_biases or any(layer.intercept for layer in report.layers)
    if after > before * (2 if has_biases else 1):
        raise ReportError(f"The report has {after:,} parameters after and {before:,} before. Get the folder again.")
    widths = report.widths
    pruned = sum(layer.pruned_channels for layer in report.layers)
    missing = pruned if len(set(widths)) > 1 else 0  # no save format makes layers wider than they were
    if padding * sum(widths) > after * missing:
        raise ReportError(
            f"`padding_parameters` of the report is {padding:,}, more than fill up its layers. Get the folder again."
        )


def _parameters(report: PruningReport) -> str:
    before, after = report.parameters_before, report.parameters_after
    share = f" ({after / before:.1%})" if before else ""
    padding = f" (+ {report.padding_parameters:,} zeros that fill up)" if report.padding_parameters else ""
    return f"{before:,} -> {after:,}{share}{padding}"


def _summary(report: PruningReport) -> str:
    rule, rescue, dilution = "=" * _WIDTH, report.rescue_ratio, report.dilution_ratio
    pruned = sum(layer.pruned_channels for layer in report.layers)
    kept = sum(layer.intermediate_size_after for layer in report.layers)
    lines = [
        rule,
        "RESCUE EFFECT SUMMARY REPORT".center(_WIDTH).rstrip(),
        rule,
        "Model Overview",
        f"  Layers analyzed: {len(report.layers)}",
        f"  Pruned channels: {pruned:,} ({report.pruning_ratio:.1%})",
        f"  Kept channels: {kept:,}" + width_range(report.widths),
        f"  Parameters: {_parameters(report)}",
        *(f"  {told}" for told in not_read_everywhere(report.added_biases, report.widths, report.config)),
        "Global Rescue Effect",
        f"  Rescued {rescue:.3f} ({rescued_share(rescue)}) of the pruned channels' output energy",
        f"  Median over layers {report.median_rescue_ratio:.3f} ({rescued_share(report.median_rescue_ratio)})",
        *([f"  Far from the others: {named_layers(report.outliers)}"] if report.outliers else []),
        "Global Dilution Effect",
        f"  Diluted {dilution:.3f} ({diluted_share(dilution)}) of the kept channels' own contribution",
        f"  Median over layers {report.median_dilution_ratio:.3f} ({diluted_share(report.median_dilution_ratio)})",
    ]
    lines += [f"Attention: {removed_heads(report.attention)}"] if report.attention else []
    if report.touched_layers:
        rescued = [layer.rescue_ratio for layer in report.touched_layers]
        diluted = [layer.dilution_ratio for layer in report.touched_layers]
        lines += ["Per-Layer Statistics"]
        lines += ["  " + line for line in statistics_lines("Rescue ratio", rescued)]
        lines += ["  " + line for line in statistics_lines("Dilution ratio", diluted)]
    contradiction = report.contradiction
    lines += [
        "Interpretation",
        f"  Rescue: {rescue_verdict(rescue)}" + ("" if report.energies.pruned else "; nothing was pruned"),
        f"  Dilution: {dilution_verdict(dilution)}",
        *([] if contradiction is None else [f"  {contradiction}"]),
        rule,
    ]
    return "\n".join(lines)
