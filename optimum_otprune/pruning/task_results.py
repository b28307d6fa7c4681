"""Results on tasks that another program measured, as entries of a report that are checked when they are read."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.layer_report import check_entry, known_entries

_LONGEST = 100  # characters of a name
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_STAGES = ("dense", "pruned")


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One metric on one task.

    Attributes:
        stage: Which model it is of: `dense` or `pruned`.
        task: The name of the task, or of a group of tasks.
        metric: The name of the metric, such as `acc`.
        filter: What picked the answers, as lm-eval calls it; `none` for nothing.
        value: The metric.
        stderr: Its standard error, or None where it is not known.
        higher_is_better: Whether larger values are better; None where that is not known.
        num_fewshot: Number of examples in each prompt; None where that is not known.
        num_items: Number of items that were asked; None where that is not known.
        is_whole: Whether all items of the task were asked.
        dataset: Hub id of the data, or None.
        version: Version of the task, or None.
        program: The program that measured it, with its version.
        dtype: Data type of the weights, or None where it is not known.
        chat_template: Whether prompts were rendered by a chat template.
        date: The day of the measurement, as in `2026-11-30`; None where it is not known.
    """

    stage: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    num_items: int | None
    is_whole: bool
    dataset: str | None
    version: str | None
    program: str
    dtype: str | None
    chat_template: bool
    date: str | None

    @classmethod
    def read(cls, values: object, where: str, unknown: list[str]) -> "TaskResult":
        """Make a result from an entry of a report.

        Args:
            values: The entry, which may be anything.
            where: What the entry is called in messages.
            unknown: A list that the names of entries that this version does not know are added to.

        Raises:
            ReportError: If an entry is missing or wrong.
        """
        found = cls(**known_entries(values, [field.name for field in dataclasses.fields(cls)], where, unknown))
        found.check(where)
        return found

    def check(self, where: str) -> None:
        """Raise an error if an entry, which may come from a file, has the wrong type, or is too long.

        Args:
            where: What the result is called in messages.

        Raises:
            ReportError: If there is one; the message names the first such entry.
        """
        kinds: dict[str, type] = {
            **dict.fromkeys(("stage", "task", "metric", "filter", "program"), str),
            **dict.fromkeys(("dataset", "version", "dtype", "date"), str),
            **dict.fromkeys(("higher_is_better", "is_whole", "chat_template"), bool),
            **{"value": float, "stderr": float, "num_fewshot": int, "num_items": int},
        }
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            if value is None and "None" in str(field.type):
                continue
            check_entry(f"{where}.{field.name}", value, kind, 0 if kind is int or field.name == "stderr" else None)
            if kind is str and not 0 < len(value) <= _LONGEST:
                raise ReportError(f"`{where}.{field.name}` of the report is {value!r:.60}; want up to 100 characters.")
        if self.stage not in _STAGES or self.date is not None and _DATE.fullmatch(self.date) is None:
            raise ReportError(
                f"`{where}` of the report has the stage {self.stage!r:.20} and the date {self.date!r:.20}; want "
                "'dense' or 'pruned', and a day such as 2026-11-30."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready."""
        return dataclasses.asdict(self)

    def of(self, stage: str) -> "TaskResult":
        """Return the same result, of the `dense` or of the `pruned` model."""
        return dataclasses.replace(self, stage=stage)

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        part = "" if self.is_whole else ", on a part of the task"
        return f"{self.task} of the {self.stage} model: {self.label} {self.value:.4f}{error} ({self.program}{part})"

    @property
    def label(self) -> str:
        """The metric, with the filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    @property
    def key(self) -> tuple[object, ...]:
        """What tells results apart that cannot both be shown."""
        return self.task, self.metric, self.filter, self.num_fewshot, self.chat_template


class TaskComparison(NamedTuple):
    """A metric on a task of the dense and of the pruned model; either may be None.

    Attributes:
        dense: The result of the dense model.
        pruned: The result of the pruned model.
    """

    dense: TaskResult | None
    pruned: TaskResult | None

    @property
    def one(self) -> TaskResult:
        """Either of the two, for entries that both have in common."""
        found = self.pruned or self.dense
        assert found is not None
        return found


def merged(former: Iterable[TaskResult], latter: Iterable[TaskResult]) -> tuple[TaskResult, ...]:
    """Return all results in order; one of the same task, metric, prompt and model takes the place of a former one."""
    found = {(result.stage, *result.key): result for result in (*former, *latter)}
    return tuple(found.values())


def compared_tasks(results: Iterable[TaskResult]) -> list[TaskComparison]:
    """Return the dense and the pruned model's results side by side, in the order of the first of each."""
    found: dict[tuple[object, ...], dict[str, TaskResult]] = {}
    for result in results:
        found.setdefault(result.key, {})[result.stage] = result
    return [TaskComparison(pair.get("dense"), pair.get("pruned")) for pair in found.values()]
