"""The front matter of a model card: what the Hub reads, as plain numbers and strings."""

import math
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from optimum_otprune.checkpoints.card.base_card import checked_base_card
from optimum_otprune.checkpoints.card.markdown import plain_text
from optimum_otprune.checkpoints.card.quantization import quantization_tag
from optimum_otprune.checkpoints.card.results import (
    HUB,
    UNNAMED_DATA,
    evaluated_on_calibration_data,
    hub_name,
    partly_calibrated_on,
)
from optimum_otprune.config.options import BUDGET_FIELDS, PruningOptions
from optimum_otprune.models.tasks import CAUSAL, TASKS
from optimum_otprune.pruning.comparison import Comparison
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.task_results import TaskResult

_TAGS = ("optimum-otprune", "pruning", "structured-pruning", "optimal-transport", "compression")
# `base_model_relation` stays unset: none of its values (adapter, finetune, merge, quantized) is true; a tag says it.
# https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
_PRUNED = "pruned"
_UNNAMED_TYPE = "custom"


def card_metadata(config: PruningOptions, report: PruningReport | None, name: str) -> ModelCardData:
    """Return the metadata of a pruned model's card.

    Names that cannot be the Hub's are left out, and so are numbers that are not finite; the license is that of the
    base model, or none.

    Args:
        config: The options that the model was pruned with.
        report: The report of the run; None for a model that was not pruned yet.
        name: The name of the model.
    """
    task = TASKS.get(CAUSAL if report is None else report.auto_class)
    common: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    extra: dict[str, Any] = {"method": config.method}
    extra |= {field: value for field in BUDGET_FIELDS if (value := getattr(config, field)) is not None}
    if report is None:
        return ModelCardData(**common, tags=list(_TAGS), otprune=extra)
    extra.setdefault("pruning_ratio", _rounded(report.pruning_ratio))
    widths = [layer.intermediate_size_after for layer in report.layers]
    extra["intermediate_size"] = widths if len(set(widths)) > 1 else next(iter(widths), None)
    extra |= {"rescue_ratio": _rounded(report.rescue_ratio), "dilution_ratio": _rounded(report.dilution_ratio)}
    results = [result for pair in report.comparisons for result in _results(config, report, pair)]
    metrics = ["perplexity"] if results else []
    results += [_task_result(task) for task in report.tasks]
    metrics += sorted({plain_text(task.metric) for task in report.tasks} - set(metrics))
    dataset = hub_name(report.calibration["data"])
    return ModelCardData(
        base_model=hub_name(report.base_model),
        **copied_metadata(report),
        **common,
        datasets=None if dataset is None else [dataset],
        metrics=metrics or None,
        tags=[_PRUNED, *_TAGS, *_architecture(report), *_quantization(report)],
        model_name=plain_text(name.rsplit("/", 1)[-1], max_length=96) or "model",
        eval_results=results or None,
        otprune={key: value for key, value in extra.items() if value is not None},
    )


def copied_metadata(report: PruningReport) -> dict[str, Any]:
    """Return license and language of the base model's card; a link into its repository becomes an absolute one."""
    copied = checked_base_card(report.base_card)
    address = copied.pop("license_link", None)
    base = hub_name(report.base_model)
    if isinstance(address, str) and address.startswith("https://"):
        copied["license_link"] = address
    elif isinstance(address, str) and base is not None:
        copied["license_link"] = f"{HUB}/{base}/blob/main/{address}"
    return copied


def _architecture(report: PruningReport) -> list[str]:
    known = report.model_type
    return [known] if known is not None and re.fullmatch(r"[a-z0-9_-]{1,50}", known) else []


def _quantization(report: PruningReport) -> list[str]:
    return [] if report.quantization is None else [quantization_tag(report.quantization)]


def _results(config: PruningOptions, report: PruningReport, pair: Comparison) -> list[EvalResult]:
    dataset = hub_name(pair.data)
    known = dataset is not None and dataset == config.dataset
    caution = ", text partly calibrated on" if partly_calibrated_on(report, pair) else ""
    if evaluated_on_calibration_data(report, pair):
        caution = ", on calibration data"
    results = []
    for evaluation, what in ((pair.pruned, "pruned"), (pair.dense, "base model")):
        value = None if evaluation is None else _rounded(evaluation["perplexity"])
        if evaluation is not None and value is not None:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=dataset or _UNNAMED_TYPE,
                    dataset_name=dataset
                    or (f"Custom data ({pair.data})" if pair.data in UNNAMED_DATA else "Custom data"),
                    dataset_config=plain_text(config.dataset_config) if known and config.dataset_config else None,
                    dataset_split=plain_text(config.evaluation_split) if dataset is not None else None,
                    metric_type="perplexity",
                    metric_name=f"Perplexity ({what}{caution})",
                    metric_value=value,
                    metric_args={name: int(evaluation[name]) for name in ("seqlen", "num_tokens")},
                )
            )
    return results


def _task_result(task: TaskResult) -> EvalResult:
    dataset = hub_name(task.dataset)
    what = "pruned" if task.stage == "pruned" else "base model"
    part = "" if task.is_whole else ", part of the items"
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset or _UNNAMED_TYPE,
        dataset_name=plain_text(task.task),
        dataset_config=plain_text(task.task),  # results of one data set are told apart by it
        metric_type=plain_text(task.metric),
        metric_name=plain_text(f"{task.label} ({what}, {task.program}{part})"),
        metric_value=_rounded(task.value),
        metric_args=None if task.num_fewshot is None else {"num_fewshot": task.num_fewshot},
    )


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
