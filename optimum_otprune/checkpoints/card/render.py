"""The model card, from configuration and report alone."""

from functools import cache, partial

from optimum_otprune.checkpoints.card.citations import Citation, bibliography, citations
from optimum_otprune.checkpoints.card.figures import FIGURES
from optimum_otprune.checkpoints.card.markdown import escape, fenced, link, plain_text
from optimum_otprune.checkpoints.card.metadata import card_metadata, copied_metadata
from optimum_otprune.checkpoints.card.plots import PLOT_FILE
from optimum_otprune.checkpoints.card.quantization import quantization_facts
from optimum_otprune.checkpoints.card.recovery import recovery_citations, recovery_facts
from optimum_otprune.checkpoints.card.reproduction import Rerun, command, literal, make_whole, python_lines
from optimum_otprune.checkpoints.card.results import (
    HUB,
    PASSAGE,
    data_in_words,
    evaluated_on_calibration_data,
    hub_name,
    limitations,
    partly_calibrated_on,
)
from optimum_otprune.checkpoints.card.templates import Template, markdown_template
from optimum_otprune.config.options import OPTIONS_BY_NAME, WRITTEN, PruningOptions
from optimum_otprune.functional.ratios import pooled, rescue_ratio
from optimum_otprune.models.compatibility import tested_versions
from optimum_otprune.models.save_formats import SaveFormat, save_format, save_formats, saved_widths
from optimum_otprune.models.tasks import CAUSAL, TASKS
from optimum_otprune.pruning.comparison import Comparison
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.task_results import TaskComparison, TaskResult, compared_tasks

_MANY_LAYERS = 16  # more layers than this are listed in a part of the card that is folded
_BASE_PLACEHOLDER = "BASE_MODEL"
_CALIBRATION_PLACEHOLDER = "CALIBRATION_DATA"
_EVALUATION_PLACEHOLDER = "EVALUATION_DATA"


def model_card(
    config: PruningOptions,
    report: PruningReport | None,
    name: str,
    has_tokenizer: bool = True,
    has_plot: bool = False,
    older_names: bool = True,
) -> str:
    """Render the README.md of a pruned model.

    Args:
        config: The options that the model was pruned with.
        report: The report of the run; None for a model that was not pruned yet.
        name: The name of the folder or repository.
        has_tokenizer: Whether a tokenizer is saved beside the model.
        has_plot: Whether `rescue.png` is saved beside the model.
        older_names: Whether config.json has the names that older versions of transformers read.

    Returns:
        The card in Markdown, with YAML front matter of plain values. Strings from outside are escaped.

    Raises:
        ReportError: If the report lacks a number that the card shows, as one from an edited file may.
    """
    values = {} if report is None else _facts(config, report, name, older_names)
    return _template().render(
        metadata=card_metadata(config, report, name).to_yaml().strip(),
        title=escape(name.rsplit("/", 1)[-1], max_length=96) or "Pruned model",
        loading=_loading(config, report, name, has_tokenizer),
        remote_code=needs_remote_code(config, report),
        unknown_format=_unknown_format(config, report),
        config_block=fenced(config.to_json_string(), "json"),
        report=report,
        has_tokenizer=has_tokenizer,
        plot=PLOT_FILE if has_plot else None,
        quantization=None if report is None else quantization_facts(report.quantization),
        **values,
    )


def needs_remote_code(config: PruningOptions, report: PruningReport | None) -> bool:
    """Whether plain transformers cannot load the model without code from its repository."""
    uneven = None if report is None else uneven_format(config, report)
    return uneven is not None and uneven.needs_remote_code


def _unknown_format(config: PruningOptions, report: PruningReport | None) -> str | None:
    """The name of the format of such a model where it is not registered here."""
    uneven = None if report is None else uneven_format(config, report)
    return escape(config.non_uniform_format) if isinstance(uneven, _Unregistered) else None


def uneven_format(config: PruningOptions, report: PruningReport) -> SaveFormat | None:
    """The save format of a model that was saved with layers of different widths; None for any other."""
    name = config.non_uniform_format
    if name not in save_formats:
        return _Unregistered() if len(set(report.widths)) > 1 else None
    return save_format(name) if len(set(saved_widths(name, report.widths))) > 1 else None


class _Unregistered(SaveFormat):
    """A format of a package that is not installed here; nobody knows what the folder needs."""


@cache
def _template() -> Template:
    return markdown_template("optimum_otprune.checkpoints.card", "model_card.md", FIGURES)


def _facts(config: PruningOptions, report: PruningReport, name: str, older_names: bool) -> dict[str, object]:
    """Return everything that the template shows of a pruned model, with strings escaped."""
    report.check(is_finite=False)
    pairs = report.comparisons
    cited = citations(config, report.references or {}, report.custom_functions) + recovery_citations(report)
    base, uneven = hub_name(report.base_model), uneven_format(config, report)
    before = [layer.intermediate_size_before for layer in report.layers]
    after = [layer.intermediate_size_after for layer in report.layers]
    return {
        "base": _nameless(report) if base is None else link(base, f"{HUB}/{base}"),
        "method": config.method,
        "widths_before": _range(before),
        "widths_after": _range(after),
        "headline": pairs[0] if pairs and pairs[0].factor is not None else None,
        "headline_data": data_in_words(config, pairs[0].data, config.evaluation_split) if pairs else "",
        "evaluations": [_evaluation(config, report, pair) for pair in pairs],
        "has_agreement": any(pair.pruned is not None and "kl" in pair.pruned for pair in pairs),
        "tasks": [_task(pair) for pair in compared_tasks(report.tasks)],
        "task_programs": ", ".join(dict.fromkeys(_measured_by(task) for task in report.tasks)),
        "calibration_data": data_in_words(config, report.calibration["data"], config.calibration_split),
        "written_samples": report.calibration.get("written_samples", 0),
        "limitations": limitations(report),
        "recoveries": recovery_facts(
            report,
            hub_name(report.base_model) or _BASE_PLACEHOLDER,
            plain_text(name.rsplit("/", 1)[-1]) or "pruned",
            partial(data_in_words, config, split=""),
        ),
        "versions_that_load": tested_versions(
            report.model_type,
            None if uneven is None else uneven.needs_transformers,
            escape(report.versions.get("transformers", "")),
            older_names,
        ),
        "weighed": ", each weighed by 1 / the squared norm of the hidden state behind the layer, as in the fit"
        if report.token_weighting == "residual"
        else "",
        "attention": _attention(report),
        "many_layers": len(report.layers) > _MANY_LAYERS,
        "functions": {escape(key): escape(value) for key, value in report.custom_functions.items()},
        "versions": ", ".join(f"{escape(key)} {escape(value)}" for key, value in sorted(report.versions.items())),
        "license": {
            key: link(value, value) if key == "license_link" else escape(value)
            for key, value in copied_metadata(report).items()
            if key.startswith("license")
        },
        "citations": [_citation(citation) for citation in cited],
        "bibliography_block": fenced(bibliography(cited), "bibtex"),
        **_reproduction(config, report, name),
    }


def _attention(report: PruningReport) -> dict[str, float] | None:
    """Return what the card says of heads that were removed; None where none were."""
    if not report.attention:
        return None
    before = sum(block.intermediate_size_before for block in report.attention)
    after = sum(block.intermediate_size_after for block in report.attention)
    ratio = rescue_ratio(pooled(block.energies for block in report.attention))
    return {"before": before, "after": after, "share": 1 - after / before if before else 0.0, "rescue": ratio}


def _citation(citation: Citation) -> dict[str, str]:
    reference = citation.reference
    source = citation.url if reference is None else reference.short
    return {
        "step": citation.step,
        "used": escape(citation.used),
        "source": link(source, citation.url) if citation.url else escape(source),
        "title": "" if reference is None else escape(reference.title),
    }


def _nameless(report: PruningReport) -> str:
    return f"A local model of type {escape(report.model_type)}" if report.model_type else "A local model"


def _reproduction(config: PruningOptions, report: PruningReport, name: str) -> dict[str, object]:
    stages = {evaluation["stage"] for evaluation in report.evaluations}
    run = Rerun(
        model=hub_name(report.base_model) or _BASE_PLACEHOLDER,
        output=plain_text(name.rsplit("/", 1)[-1]) or "pruned",
        calibration_data=_argument(config, report.calibration["data"], _CALIBRATION_PLACEHOLDER),
        evaluated=stages >= {"dense", "pruned"},
        evaluation_data=_argument(config, report.comparisons[0].data, _EVALUATION_PLACEHOLDER) if stages else None,
        max_windows=report.comparisons[0].one.get("max_windows") if stages else None,
    )
    shown = (run.model, run.calibration_data, run.evaluation_data if run.evaluated else None)
    words = {
        _BASE_PLACEHOLDER: "the folder of the dense model",
        _CALIBRATION_PLACEHOLDER: f"the calibration data ({data_in_words(config, report.calibration['data'], '')})",
        _EVALUATION_PLACEHOLDER: "the evaluation data",
    }
    options = _options(config, report)
    return {
        "command_block": fenced(command(options, run), "bash"),
        "python_block": fenced(python_lines(options, run), "python"),
        "placeholders": [
            f"`{placeholder}` stands for {words[placeholder]}" for placeholder in shown if placeholder in words
        ],
    }


def _options(config: PruningOptions, report: PruningReport) -> dict[str, object] | None:
    """Return the fewest options that make the configuration; None if the report lacks one, or is of another one."""
    if report.options is None or not set(report.options) <= set(OPTIONS_BY_NAME):
        return None
    unknown_then = {  # options that came later than the report
        name: value
        for name, value in config.to_dict().items()
        if name not in report.config and getattr(config, name) == OPTIONS_BY_NAME[name].default
    }
    if {**unknown_then, **report.config} != config.to_dict():
        return None
    if not make_whole(config, report.options):
        return None
    return {name: getattr(config, name) for name in report.options}


def _argument(config: PruningOptions, data: str, placeholder: str) -> str | None:
    """Return the data's name on the command line, or a placeholder; None for the configuration's own data."""
    if data == WRITTEN:
        return WRITTEN
    return None if data == config.dataset else hub_name(data) or placeholder


def _loading(config: PruningOptions, report: PruningReport | None, name: str, has_tokenizer: bool) -> str:
    shown = literal(plain_text(name) or "pruned")
    trust = ", trust_remote_code=True" if needs_remote_code(config, report) else ""
    auto = CAUSAL if report is None or report.auto_class not in TASKS else report.auto_class
    lines = [f"from transformers import {auto}{', AutoTokenizer' if has_tokenizer else ''}", ""]
    lines += [f"model = {auto}.from_pretrained({shown}{trust})"]
    if has_tokenizer and auto != CAUSAL:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({shown})")
    elif has_tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({shown})",
            "",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))",
        ]
    return fenced("\n".join(lines), "python")


def _evaluation(config: PruningOptions, report: PruningReport, pair: Comparison) -> dict[str, object]:
    one = pair.one
    return {
        "data": data_in_words(config, pair.data, config.evaluation_split),
        "dense": None if pair.dense is None else pair.dense["perplexity"],
        "pruned": None if pair.pruned is None else pair.pruned["perplexity"],
        "factor": pair.factor,
        **{name: (pair.pruned or {}).get(name) for name in ("kl", "agreement")},
        "num_tokens": one["num_tokens"],
        "num_windows": one["num_windows"],
        "seqlen": one["seqlen"],
        "dtype": escape(one["dtype"]),
        "protocol": escape(one["protocol"]),
        "seen_windows": one.get("seen_windows"),
        "seen": evaluated_on_calibration_data(report, pair),
        "part": partly_calibrated_on(report, pair),
        "passage": min(PASSAGE, one["seqlen"], report.calibration["seqlen"]),
    }


def _task(pair: TaskComparison) -> dict[str, str]:
    one = pair.one
    arrow = {True: " ↑", False: " ↓", None: ""}[one.higher_is_better]
    shots = "–" if one.num_fewshot is None else f"{one.num_fewshot:,}"
    items = "–" if one.num_items is None else f"{one.num_items:,}"
    return {
        "task": escape(one.task) + ("" if one.dataset is None else f" ({link(one.dataset, _dataset_url(one))})"),
        "metric": escape(one.label) + arrow,
        "shots": f"{shots}, chat template" if one.chat_template else shots,
        "dense": _measurement(pair.dense),
        "pruned": _measurement(pair.pruned),
        "asked": items if one.is_whole else f"{items}, not all",
    }


def _dataset_url(task: TaskResult) -> str:
    return f"{HUB}/datasets/{task.dataset}"


def _measurement(task: TaskResult | None) -> str:
    if task is None:
        return "–"
    return f"{task.value:.4g}" + ("" if task.stderr is None else f" ± {task.stderr:.2g}")


def _measured_by(task: TaskResult) -> str:
    details = [part for part in (task.dtype, task.date) if part is not None]
    return escape(task.program) + (f" ({escape(', '.join(details))})" if details else "")


def _range(widths: list[int]) -> str:
    if not widths:
        return "0"
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
