"""A report in the words of a model card: where data come from, and limitations of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_otprune.checkpoints.card.markdown import escape, link
from optimum_otprune.config.options import WRITTEN, PruningOptions
from optimum_otprune.pruning.comparison import Comparison
from optimum_otprune.pruning.layer_report import LayerReport, named_layers
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.serving import not_read_everywhere
from optimum_otprune.storage.hub.client import is_hub_id

HUB = "https://huggingface.co"
# What data without a public name are called in a report's `calibration`, and in the card.
UNNAMED_DATA: Mapping[str, str] = {
    "token ids": "token ids that were passed in",
    "texts": "a list of texts that was passed in",
    "local file": "a local file",
    "local folder": "a local folder",
    "a datasets.Dataset": "a data set in memory",
    WRITTEN: "text that the dense model wrote itself",
}
PASSAGE = 32  # tokens in a row by which two texts are told to have a passage in common
_FEW_EVALUATED = 20_000  # tokens up to which chance moves a perplexity by some percent
_HIGH_RATIO = 0.5  # pruning ratio from which the card advises to fine-tune
_WELL_CALIBRATED = 2  # calibration tokens per channel that a fit of the layers takes at least


def hub_name(name: object) -> str | None:
    """Return a name if it could be one of the Hub's; None also for what data without a name are called."""
    return name if isinstance(name, str) and name not in UNNAMED_DATA and is_hub_id(name) else None


def data_in_words(config: PruningOptions, data: str, split: str) -> str:
    """Return a data set in the words of a card, in Markdown, with a link if it is one of the Hub's.

    Args:
        config: The options that the model was pruned with.
        data: The data's name in a report.
        split: The part of the data set that was used, or an empty string.
    """
    dataset = hub_name(data)
    if dataset is None:
        return UNNAMED_DATA.get(data) or f"data named “{escape(data)}”"
    details = [config.dataset_config] if dataset == config.dataset and config.dataset_config else []
    details += [f"split {split}"] if split else []
    suffix = f" ({escape(', '.join(details))})" if details else ""
    return link(dataset, f"{HUB}/datasets/{dataset}") + suffix


def evaluated_on_calibration_data(report: PruningReport, pair: Comparison) -> bool | None:
    """Return whether a model was evaluated on its calibration data; None if the report cannot tell.

    It was if data and split are the same, or if most evaluated windows share a passage with the calibration text. A
    smaller part of the windows is what `partly_calibrated_on` tells.
    """
    seen = (pair.pruned or {}).get("seen_windows")
    if pair.pruned is not None and seen and 2 * seen > pair.pruned["num_windows"]:
        return True
    if hub_name(pair.data) is not None:
        is_same_split = report.config.get("calibration_split") == report.config.get("evaluation_split")
        return pair.data == report.calibration["data"] and is_same_split
    if hub_name(report.calibration["data"]) is not None:
        return False
    return None if seen is None else False


def partly_calibrated_on(report: PruningReport, pair: Comparison) -> str | None:
    """Return how much of the evaluated text was calibrated on, as `2 of 85 windows`; None if nothing or most of it."""
    seen = (pair.pruned or {}).get("seen_windows")
    if pair.pruned is None or not seen or evaluated_on_calibration_data(report, pair):
        return None
    return f"{seen:,} of {pair.pruned['num_windows']:,} windows"


def seen_before(report: PruningReport, evaluation: Mapping[str, Any]) -> str | None:
    """Return a sentence if the pruned model was evaluated on text that it was calibrated on, else None."""
    seen = evaluation.get("seen_windows")
    if not seen and not evaluated_on_calibration_data(report, Comparison(evaluation["data"], None, evaluation)):
        return None
    windows = f"{seen:,} of the {evaluation['num_windows']:,} windows hold" if seen else "The windows are of"
    return f"{windows} text that the model was calibrated on; expect a higher perplexity on other text."


def calibration_samples(report: PruningReport) -> int:
    """Return how many samples a model was calibrated on, given and written ones."""
    return int(report.calibration["num_samples"] + report.calibration.get("written_samples", 0))


def _names(layers: Sequence[LayerReport]) -> str:
    """Return the names of layers, such as "layers 1, 2 and 5", or of the first ten experts and their number."""
    if any(layer.unit for layer in layers):
        named = [layer.name for layer in layers[:10]]
        return ", ".join(named) + (f" and {len(layers) - 10} others" if len(layers) > 10 else "")
    numbers = [str(layer.layer) for layer in layers]
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {', '.join(numbers[:-1])} and {numbers[-1]}"


def limitations(report: PruningReport) -> list[str]:
    """Return sentences in plain text on what not to trust the model with, the gravest first."""
    found = []
    pairs = report.comparisons
    if report.rescue_ratio < 0:
        found.append(
            "The rescue ratio is negative: by their outputs, the compressed layers are further from the dense ones "
            "than plain dropping of the same channels would leave them."
        )
    if report.contradiction is not None:
        found.append(report.contradiction)
    harmed = [layer for layer in report.layers if layer.rescue_ratio < 0]
    if harmed and (report.rescue_ratio >= 0 or len(harmed) < len(report.layers)):
        layers = _names(harmed)
        found.append(f"The rescue ratio of {layers} is negative: plain dropping would have been better there.")
    found += not_read_everywhere(report.added_biases, report.widths, report.config)
    others = [layer for layer in report.outliers if layer.rescue_ratio >= 0]
    if others:
        found.append(
            f"The rescue ratio of {named_layers(others)} is far from that of the other layers; the median is "
            f"{report.median_rescue_ratio:.3f}."
        )
    if any(evaluated_on_calibration_data(report, pair) for pair in pairs):
        found.append("It was evaluated on data that it was calibrated on; expect a higher perplexity on other text.")
    elif parts := [part for pair in pairs if (part := partly_calibrated_on(report, pair))]:
        found.append(
            f"Part of the evaluation text ({parts[0]}) was calibrated on; expect a higher perplexity on other text."
        )
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
    num_tokens = calibration_samples(report) * report.calibration["seqlen"]
    if num_tokens < _WELL_CALIBRATED * width:
        found.append(
            f"It was calibrated on {num_tokens:,} tokens, fewer than twice the FFN width of "
            f"{width:,}: too few to fit the layers well."
        )
    if report.calibration.get("written_samples") == 0:  # earlier reports do not say
        found.append("It was calibrated on the given text alone; expect it to have lost more on other kinds of text.")
    return [
        *found,
        "It was trained towards the dense model's predictions after pruning, not fine-tuned on a task."
        if report.recoveries
        else "It was not fine-tuned after pruning.",
        f"Perplexity is not everything: accuracy on {'other ' if report.tasks else ''}tasks, instruction following, "
        "other languages, bias and safety were not measured. What pruning does to them may be out of proportion to "
        "perplexity.",
        "Limitations and biases of the base model remain.",
    ]
