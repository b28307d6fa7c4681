"""What a report means for somebody who wants to use the model: results side by side, data in words, limitations."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import ReportError
from optimum_otprune.report import ADDED_BIASES, REPORT_FILE, PruningReport

# How `calibration` names data that have no public name.
UNNAMED_DATA: Mapping[str, str] = {
    "token ids": "token ids that were passed in",
    "texts": "a list of texts that was passed in",
    "local file": "a local file",
    "local folder": "a local folder",
    "a datasets.Dataset": "a data set in memory",
}
_FEW_EVALUATED = 20_000
_HIGH_RATIO = 0.5


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


def comparisons(report: PruningReport) -> list[Comparison]:
    """Return the latest evaluations by data and protocol, those of both models first."""
    found: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for evaluation in report.evaluations:
        key = tuple(evaluation[name] for name in ("data", "seqlen", "num_tokens", "dtype", "protocol"))
        found.setdefault(key, {})[evaluation["stage"]] = evaluation
    pairs = [Comparison(key[0], stages.get("dense"), stages.get("pruned")) for key, stages in found.items()]
    return sorted(pairs, key=lambda pair: pair.dense is None or pair.pruned is None)


def hub_name(name: object) -> str | None:
    """Return a name if it could be one of the Hub's, `user/name` or a canonical `name`."""
    if not isinstance(name, str) or name in UNNAMED_DATA:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name.isascii() and not name.startswith(".") else None


def evaluated_on_calibration_data(config: OTPruningConfig, report: PruningReport, pair: Comparison) -> bool | None:
    """Return whether a model was evaluated on what it was calibrated on; None where the report cannot tell."""
    seen = (pair.pruned or {}).get("seen_windows")
    if seen:
        return True
    if hub_name(pair.data) is not None:
        return pair.data == report.calibration["data"] and config.calibration_split == config.evaluation_split
    if hub_name(report.calibration["data"]) is not None:
        return False
    return None if seen is None else False


def seen_before(config: OTPruningConfig, report: PruningReport, evaluation: Mapping[str, Any]) -> str | None:
    """Return a sentence where an evaluation of the pruned model is on text that the model was calibrated on."""
    if not evaluated_on_calibration_data(config, report, Comparison(evaluation["data"], None, evaluation)):
        return None
    seen = evaluation.get("seen_windows")
    windows = f"{seen:,} of the {evaluation['num_windows']:,} windows hold" if seen else "The windows are of"
    return f"{windows} text that the model was calibrated on; expect a higher perplexity on other text."


def limitations(config: OTPruningConfig, report: PruningReport) -> list[str]:
    """Return sentences in plain text on what the model should not be trusted with, the gravest first."""
    found = []
    pairs = comparisons(report)
    if report.rescue_ratio < 0:
        found.append(
            "The rescue ratio is negative: by their outputs, the compressed layers are further from the dense ones "
            "than plain dropping of the same channels would leave them."
        )
    harmed = [str(layer.layer) for layer in report.layers if layer.rescue_ratio < 0]
    if harmed and (report.rescue_ratio >= 0 or len(harmed) < len(report.layers)):
        layers = f"layer {harmed[0]}" if len(harmed) == 1 else f"layers {', '.join(harmed[:-1])} and {harmed[-1]}"
        found.append(f"The rescue ratio of {layers} is negative: plain dropping would have been better there.")
    if report.added_biases:
        found.append(ADDED_BIASES)
    if any(evaluated_on_calibration_data(config, report, pair) for pair in pairs):
        found.append("It was evaluated on data that it was calibrated on; expect a higher perplexity on other text.")
    if report.pruning_ratio >= _HIGH_RATIO:
        found.append(
            f"{report.pruning_ratio:.0%} of the FFN channels are gone. At half or more, quality often suffers by "
            "more than perplexity shows; fine-tune the model before use."
        )
    if all(pair.pruned is None for pair in pairs):
        found.append("The pruned model was not evaluated: of its quality, only the ratios of its layers are known.")
    elif all(pair.dense is None for pair in pairs):
        found.append("The dense model was not evaluated, so how much quality was lost is not known.")
    if pairs and pairs[0].one["num_tokens"] < _FEW_EVALUATED:
        found.append(f"It was evaluated on only {pairs[0].one['num_tokens']:,} tokens, so its perplexity is rough.")
    width = max((layer.intermediate_size_before for layer in report.layers), default=0)
    if report.calibration["num_tokens"] < 2 * width:
        found.append(
            f"It was calibrated on {report.calibration['num_tokens']:,} tokens, fewer than twice the FFN width of "
            f"{width:,}: too few to fit the layers well."
        )
    return [
        *found,
        "It was not fine-tuned after pruning.",
        "Perplexity is not everything: accuracy on tasks, instruction following, other languages, bias and safety "
        "were not measured. What pruning does to them may be out of proportion to perplexity.",
        "Limitations and biases of the base model remain.",
    ]


def check_readable(report: PruningReport) -> None:
    """Raise where a report, which may come from a file, lacks what a card says or holds something else there.

    Raises:
        ReportError: Names the first such entry.
    """
    for index, layer in enumerate(report.layers):
        _check(f"layers[{index}].layer", layer.layer, int)
        for name in ("intermediate_size_before", "intermediate_size_after"):
            _check(f"layers[{index}].{name}", getattr(layer, name), int)
        for name in ("rescue_ratio", "dilution_ratio", "relative_error_after_reconstruction"):
            _check(f"layers[{index}].{name}", getattr(layer, name), float)
        for name, value in layer.energies._asdict().items():
            _check(f"layers[{index}].energies.{name}", value, float)
    for name in ("parameters_before", "parameters_after", "padding_parameters"):
        _check(name, getattr(report, name), int)
    if not isinstance(report.added_biases, bool):
        raise ReportError(f"`added_biases` of the report is {report.added_biases!r:.60}; want true or false.")
    optional: dict[str, type] = {"size_before": int, "size_after": int, "base_model": str, "model_type": str}
    for name, kind in optional.items():
        if getattr(report, name) is not None:
            _check(name, getattr(report, name), kind)
    for name in ("calibration", "custom_functions", "versions", "base_card"):
        _check(name, getattr(report, name), Mapping)
    for name in ("custom_functions", "versions"):
        for value in getattr(report, name).values():
            _check(name, value, str)
    kinds: dict[str, type] = {"data": str, "num_samples": int, "seqlen": int, "num_tokens": int}
    for name, kind in kinds.items():
        _check(f"calibration.{name}", report.calibration.get(name), kind)
    kinds = {"data": str, "seqlen": int, "num_tokens": int, "num_windows": int, "perplexity": float}
    kinds |= {"stage": str, "dtype": str, "protocol": str}
    for index, evaluation in enumerate(report.evaluations):
        _check(f"evaluations[{index}]", evaluation, Mapping)
        for name, kind in kinds.items():
            _check(f"evaluations[{index}].{name}", evaluation.get(name), kind)
        if "seen_windows" in evaluation:
            _check(f"evaluations[{index}].seen_windows", evaluation["seen_windows"], int)


def _check(name: str, value: object, kind: type) -> None:
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits:
        raise ReportError(
            f"`{name}` of the report is {value!r:.60}; want {kind.__name__}. Restore `{REPORT_FILE}` as "
            "`OTPruner.save_pretrained` wrote it."
        )
