"""`notebook.ipynb` of a repository: the Hub opens it in Colab and Kaggle in place of one that it makes itself.

https://huggingface.co/docs/hub/notebooks
"""

import json
import os
import re
from pathlib import Path

from optimum_otprune.checkpoints.card.figures import FIGURES
from optimum_otprune.checkpoints.card.markdown import escape, link
from optimum_otprune.checkpoints.card.render import needs_remote_code, uneven_format
from optimum_otprune.checkpoints.card.reproduction import literal
from optimum_otprune.checkpoints.card.results import HUB, data_in_words, hub_name
from optimum_otprune.checkpoints.card.templates import markdown_template
from optimum_otprune.config.options import PruningOptions
from optimum_otprune.config.options_file import CONFIG_FILE, read_options
from optimum_otprune.models.compatibility import reads_in_older_versions
from optimum_otprune.models.tasks import CAUSAL
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.manifest import TOKENIZER_FILES

NOTEBOOK_FILE = "notebook.ipynb"

_OLDEST, _OLDEST_OF_NEW_NAMES = "4.57", "5.0"  # transformers that a saved folder is tested with
_QUANTIZERS = ("torchao", "bitsandbytes")  # that a notebook may install: a report can be a stranger's
_CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def folder_notebook(folder: Path, name: str) -> str | None:
    """Return the notebook of a saved folder, made from the configuration and report in it.

    Args:
        folder: A folder that `OTPruner.save_pretrained` wrote.
        name: The repository that the notebook loads the model from, as `user/name`.

    Returns:
        The text of the file; None for a model that is not pruned, has no tokenizer, or writes no text.

    Raises:
        ReportError: If the report is damaged.
        ConfigurationError: If the configuration is damaged.
    """
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    if not (os.path.isfile(folder / REPORT_FILE) and has_tokenizer):
        return None
    report = PruningReport.load(folder / REPORT_FILE)
    if report.auto_class != CAUSAL:
        return None
    oldest = _OLDEST if reads_in_older_versions(folder) else _OLDEST_OF_NEW_NAMES
    return notebook(read_options(folder / CONFIG_FILE), report, name, oldest)


def notebook(config: PruningOptions, report: PruningReport, name: str, oldest: str = _OLDEST) -> str:
    """Render the notebook that loads a pruned model, lets it write, and compares it with its base model.

    It needs plain transformers alone, and has one model in memory at a time.

    Args:
        config: The options that the model was pruned with.
        report: The report of the run.
        name: The repository that the model is loaded from, as `user/name`.
        oldest: The oldest version of transformers that loads the model, unless its save format sets one.

    Returns:
        The text of an .ipynb file of format 4.5, without outputs; the same for the same arguments.

    Raises:
        ReportError: If the report lacks a number that the notebook shows.
    """
    report.check(is_finite=False)
    pairs, base, uneven = report.comparisons, hub_name(report.base_model), uneven_format(config, report)
    measured = pairs[0] if pairs and pairs[0].factor is not None else None
    text = markdown_template("optimum_otprune.checkpoints.card", "notebook.md", FIGURES).render(
        title=escape(name.rsplit("/", 1)[-1], max_length=96),
        base="A local model" if base is None else link(base, f"{HUB}/{base}"),
        share=report.pruning_ratio,
        address=f"{HUB}/{name}",
        backends=[] if report.quantization is None else _backends(report.quantization.library),
        transformers=(None if uneven is None else uneven.needs_transformers) or oldest,
        name=literal(name),
        base_name=None if base is None else literal(base),
        trust=", trust_remote_code=True" if needs_remote_code(config, report) else "",
        data="" if measured is None else data_in_words(config, measured.data, config.evaluation_split),
        dense=None if measured is None or measured.dense is None else measured.dense["perplexity"],
        pruned=None if measured is None or measured.pruned is None else measured.pruned["perplexity"],
    )
    # Text and code take turns: what the pattern captures stands at odd places.
    pieces = [(index % 2 == 1, piece.strip()) for index, piece in enumerate(_CODE.split(text))]
    cells = [
        _cell(index, is_code, piece) for index, (is_code, piece) in enumerate(piece for piece in pieces if piece[1])
    ]
    content = {
        "cells": cells,
        "metadata": {
            "accelerator": "GPU",
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _backends(library: str) -> list[str]:
    return [name for name in _QUANTIZERS if library.split()[:1] == [name]]


def _cell(index: int, is_code: bool, text: str) -> dict[str, object]:
    source = text.splitlines(keepends=True)
    run: dict[str, object] = {"execution_count": None, "outputs": []} if is_code else {}
    kind = "code" if is_code else "markdown"
    return {"cell_type": kind, "id": f"cell-{index}", "metadata": {}, **run, "source": source}
