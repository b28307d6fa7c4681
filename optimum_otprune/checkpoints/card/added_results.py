"""Results that another program measured, added to a saved folder: to its report, its card and what the Hub reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from optimum_otprune.checkpoints.card.eval_results import EVAL_RESULTS_FILE, eval_results
from optimum_otprune.checkpoints.card.folder import folder_card, listed_files, replace_files, was_edited
from optimum_otprune.checkpoints.card.lm_eval import LmEvalRun
from optimum_otprune.errors import IntegrityError, OutputError, ReportError
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.pruning.task_results import TaskResult, merged
from optimum_otprune.storage.manifest import CARD_FILE, FileEntry, check_plain, describe_problems, digest
from optimum_otprune.storage.untrusted import visible


class Added(NamedTuple):
    """What was added to a folder.

    Attributes:
        tasks: All results that its report has now.
        files: The names of the files that hold them now.
        doubts: Sentences about what does not look right, though it may be.
    """

    tasks: tuple[TaskResult, ...]
    files: list[str]
    doubts: list[str]


def add_results(folder: Path, runs: Sequence[LmEvalRun], name: str | None, overwrite: bool) -> Added:
    """Add results of lm-eval to a saved folder.

    A result of the same task, metric, prompt and model takes the place of a former one. The manifest is written last:
    if a process is killed before, the same call repairs the folder.

    Args:
        folder: A folder that `OTPruner.save_pretrained` wrote.
        runs: What the results files hold, of the pruned model and, if there are any, of the dense one.
        name: What the card calls the model; default: the folder's name.
        overwrite: Whether a card that was edited by hand is replaced.

    Raises:
        ReportError: If the folder has no report, or the results are of another model, or of the dense one alone.
        IntegrityError: If the report is not as it was saved, or a file is a link.
        OutputError: If the card was edited by hand, a file of the results' name is not ours, or writing fails.
    """
    if not (folder / REPORT_FILE).is_file():
        raise ReportError(f"{folder.name!r} has no {REPORT_FILE}. Results can be added to what `otprune prune` wrote.")
    listed, report, own = listed_files(folder), PruningReport.load(folder / REPORT_FILE), folder.resolve().name
    found = [run.of_stage(report, own) for run in runs]
    tasks = merged(report.tasks, (result for results in found for result in results))
    if all(task.stage == "dense" for task in tasks):
        raise ReportError("The results are of the dense model alone. Give those of the pruned model, too.")
    report = dataclasses.replace(report, tasks=tasks)
    texts = {
        REPORT_FILE: report.to_json_string(),
        EVAL_RESULTS_FILE: eval_results(tasks),
        CARD_FILE: folder_card(folder, name, report=report),
    }
    _check_ours(folder, texts, listed)
    if not overwrite and was_edited(folder, str(texts[CARD_FILE]), listed):
        raise OutputError(
            f"{CARD_FILE} has other text than was saved, perhaps edited by hand. Set `--write` to replace it all the "
            "same; nothing was changed."
        )
    replace_files(folder, texts, listed)
    names = {run.model for run, results in zip(runs, found) if results[0].stage == "pruned"} - {"", own}
    doubts = [f"The results call the model {visible(other, 60)!r}; its size is that of this one." for other in names]
    return Added(tasks, [file for file, text in texts.items() if text is not None], doubts)


def _check_ours(folder: Path, texts: Mapping[str, str | None], listed: Mapping[str, FileEntry] | None) -> None:
    """Raise where a file to replace is a link, or has neither the text that it was saved with nor its new one.

    The card is not compared: whether it may be replaced is for the user to say.
    """
    check_plain(folder, texts)
    changed = [
        file
        for file, text in texts.items()
        if listed is not None
        and file != CARD_FILE
        and (folder / file).is_file()
        and digest(folder / file) != listed.get(file)
        and (text is None or (folder / file).read_bytes() != text.encode())
    ]
    if changed:
        raise IntegrityError(describe_problems({"changed": changed}))
