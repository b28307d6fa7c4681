"""The model card, from configuration and report alone."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.options import BUDGET_FIELDS
from optimum_otprune.report import PruningReport


def model_card(config: OTPruningConfig, report: PruningReport | None, name: str, has_tokenizer: bool = True) -> str:
    """Render the README.md of a pruned model.

    Args:
        config: What was done.
        report: What came of it; None for a model that was not pruned yet.
        name: Of the folder or repository.
        has_tokenizer: Whether a tokenizer is saved beside the model.

    Returns:
        Markdown with YAML front matter of plain values.
    """
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).from_string(files("optimum_otprune").joinpath("templates", "model_card.md").read_text(encoding="utf-8"))
    return template.render(
        metadata=_metadata(config, report).to_yaml().strip(),
        name=_one_line(name),
        config=config.to_json_string().strip(),
        method=config.method,
        report=report,
        base_model=None if report is None or report.base_model is None else _one_line(report.base_model),
        data=None if report is None else _one_line(str(report.calibration["data"])),
        evaluations=[] if report is None else report.evaluations,
        summary="" if report is None else str(report),
        has_tokenizer=has_tokenizer,
    )


def _metadata(config: OTPruningConfig, report: PruningReport | None) -> ModelCardData:
    extra: dict[str, Any] = {"method": config.method}
    extra |= {name: value for name in BUDGET_FIELDS if (value := getattr(config, name)) is not None}
    if report is not None:
        extra.setdefault("pruning_ratio", round(report.pruning_ratio, 6))
        extra |= {
            "intermediate_size": report.layers[0].intermediate_size_after,
            "rescue_ratio": round(float(report.rescue_ratio), 6),
            "dilution_ratio": round(float(report.dilution_ratio), 6),
        }
    dataset = None if report is None else _dataset(report.calibration, config)
    return ModelCardData(
        base_model=None if report is None else report.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=None if dataset is None else [dataset],
        tags=["optimum-otprune", "pruning", "structured-pruning", "optimal-transport", "compression"],
        otprune=extra,
    )


def _dataset(calibration: Mapping[str, Any], config: OTPruningConfig) -> str | None:
    """The calibration set if it is one of the Hub."""
    return calibration["data"] if calibration["data"] == config.dataset else None


def _one_line(text: str) -> str:
    """Text from outside without what Markdown or HTML would act on."""
    return "".join(character for character in text if character.isalnum() or character in " ._-/").strip()
