"""The results file of lm-eval, read as a stranger's; what is kept of it has no paths, prompts or arguments.

The format is that of `EvalResults` in
https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/result_schema.py.
"""

import datetime
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from optimum_otprune.checkpoints.card.results import hub_name
from optimum_otprune.config.quantities import real_number, whole_number
from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.task_results import TaskResult
from optimum_otprune.storage.untrusted import read_json, visible

_LARGEST = 1 << 26  # bytes; a file has some kilobytes for each task
_LATEST = 253_402_300_799  # seconds: the end of the year 9999


class LmEvalRun(NamedTuple):
    """One results file of lm-eval.

    Attributes:
        file: The name of the file, without its folder.
        num_parameters: Parameters of the model that was evaluated; None where the file does not say.
        model: The last part of the model's path or Hub id; empty where the file does not say.
        results: What it says of tasks that are not part of a group with results of its own, as of the pruned model.
    """

    file: str
    num_parameters: int | None
    model: str
    results: tuple[TaskResult, ...]

    def of_stage(self, report: PruningReport, name: str) -> tuple[TaskResult, ...]:
        """Return the results as those of the dense or of the pruned model of a report, whichever has this size.

        Args:
            report: The report of the pruned model.
            name: The name of the pruned model's folder, which tells where the file does not state a size.

        Raises:
            ReportError: If they are of another model.
        """
        pruned = report.parameters_after + report.padding_parameters
        if self.num_parameters is None:
            if self.model == name.rsplit("/", 1)[-1]:
                return self.results
            raise ReportError(
                f"{self.file!r} does not say how large its model is, and calls it {visible(self.model, 60)!r}, not "
                f"{visible(name, 60)!r}. Give results of this folder: lm_eval --model hf --model_args "
                "pretrained=FOLDER --output_path RESULTS."
            )
        stages = {report.parameters_before: "dense", pruned: "pruned"}
        if self.num_parameters not in stages:
            raise ReportError(
                f"{self.file!r} is of a model of {self.num_parameters:,} parameters; this one has {pruned:,}, and the "
                f"dense one {report.parameters_before:,}. Give results of this folder."
            )
        return tuple(result.of(stages[self.num_parameters]) for result in self.results)


def read_lm_eval(file: Path) -> LmEvalRun:
    """Read a results file that lm-eval wrote (`--output_path`).

    Args:
        file: The file.

    Raises:
        ReportError: If it cannot be read, is none, or holds no result.
    """
    try:
        return _Reader(file.name, read_json(file, _LARGEST)).run()
    except (ValueError, ReportError) as error:
        raise ReportError(
            f"{visible(file.name, 60)!r} is no results file of lm-eval that can be used: {error} Give the file "
            "`results_….json` that `lm_eval --output_path` wrote."
        ) from error


class _Reader:
    """Takes a results file apart.

    Args:
        file: The name of the file.
        content: What it holds, which may be anything.
    """

    def __init__(self, file: str, content: object):
        self._file = file
        self._content: dict[str, Any] = content if isinstance(content, dict) else {}

    def run(self) -> LmEvalRun:
        """Return what is kept of the file."""
        metrics = self._part("results")
        config, model = self._part("config"), self._content.get("model_name")
        number = whole_number(config.get("model_num_parameters"))
        inner = {task for group in metrics if self._has_own(group) for task in self._parts(group)}
        results = tuple(
            result for task in metrics if task not in inner for result in self._results(task, metrics[task])
        )
        if not results:
            raise ReportError("It holds no result.")
        for result in results:
            try:
                result.check("result")
            except ReportError as error:
                raise ReportError(f"A name or number of {visible(result.task, 60)!r} is too long.") from error
        parameters = None if number is None or number <= 0 else number
        return LmEvalRun(self._file, parameters, PurePath(model).name if isinstance(model, str) else "", results)

    def _part(self, name: str) -> dict[str, Any]:
        part = self._content.get(name, {} if name not in ("results", "config") else None)
        if not isinstance(part, dict):
            raise ReportError(f"`{name}` is missing, or is no object.")
        return part

    def _of(self, name: str, task: str) -> object:
        return self._part(name).get(task)

    def _has_own(self, group: str) -> bool:
        """Return whether a group has results of its own, which stand for those of its parts."""
        metrics = self._part("results").get(group)
        return bool(self._children(group)) and isinstance(metrics, dict) and any("," in key for key in metrics)

    def _children(self, group: str) -> list[str]:
        children = self._of("group_subtasks", group)
        return [child for child in children if isinstance(child, str)] if isinstance(children, list) else []

    def _parts(self, group: str) -> list[str]:
        """Return all tasks and groups in a group, each once."""
        found: dict[str, None] = {}
        left = self._children(group)
        while left:
            part = left.pop()
            if part not in found:
                found[part] = None
                left += self._children(part)
        return list(found)

    def _results(self, task: str, metrics: object) -> Iterator[TaskResult]:
        if not isinstance(metrics, dict):
            raise ReportError(f"`results` of {visible(task, 60)!r} is no object.")
        parts = [task, *self._parts(task)]
        counts = [count for part in parts if isinstance(count := self._of("n-samples", part), Mapping)]
        asked, original = (self._sum(counts, name) for name in ("effective", "original"))
        config, seconds = self._part("config"), real_number(self._content.get("date"))
        for key, value in metrics.items():
            metric, comma, picked = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue  # names, counts, standard errors, and what could not be computed ("N/A")
            number, stderr = real_number(value), real_number(metrics.get(f"{metric}_stderr,{picked}"))
            if number is None:
                raise ReportError(f"`{visible(key, 60)}` of {visible(task, 60)!r} is no number.")
            better = self._of("higher_is_better", task)
            direction = better.get(metric) if isinstance(better, dict) else None
            version = self._of("versions", task)
            yield TaskResult(
                stage="pruned",
                task=task,
                metric=metric,
                filter=picked or "none",
                value=number,
                stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
                higher_is_better=direction if isinstance(direction, bool) else None,
                num_fewshot=whole_number(self._of("n-shot", task)),
                num_items=asked,
                is_whole=asked is not None and asked == original and config.get("limit") is None,
                dataset=self._dataset(parts),
                version=None if version is None else str(version),
                program=f"lm-eval {self._content.get('lm_eval_version') or 'of unknown version'}",
                dtype=_text(config.get("model_dtype")),
                chat_template=bool(self._content.get("chat_template")),
                date=None if seconds is None or not 0 <= seconds <= _LATEST else _day(seconds),
            )

    @staticmethod
    def _sum(counts: list[Mapping[str, Any]], name: str) -> int | None:
        numbers = [whole_number(count.get(name)) for count in counts]
        return sum(number or 0 for number in numbers) if numbers and None not in numbers else None

    def _dataset(self, parts: list[str]) -> str | None:
        """Return the data set of the Hub that all of some tasks are made of, or None."""
        configs = [config for part in parts if isinstance(config := self._of("configs", part), dict)]
        names = {config.get("dataset_path") for config in configs if isinstance(config.get("dataset_path"), str)}
        name = hub_name(next(iter(names))) if len(names) == 1 else None
        return name if name is not None and "/" in name else None  # others are formats of files, such as json


def _text(value: object) -> str | None:
    return value.removeprefix("torch.") or None if isinstance(value, str) else None


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
