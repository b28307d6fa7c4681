"""`.eval_results/lm_eval.yaml`: results on benchmarks that the Hub knows, which it shows beside the model's card.

The format is that of https://huggingface.co/docs/hub/eval-results. A data set counts as a benchmark only if the Hub
has it on its list, and its leaderboard compares numbers in one unit; both are known of the ones here.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from optimum_otprune.pruning.task_results import TaskResult

EVAL_RESULTS_FILE = ".eval_results/lm_eval.yaml"

_DECIMALS = 2  # of per cent


class _Benchmark(NamedTuple):
    """A task of lm-eval that is a benchmark of the Hub, whose leaderboard is in per cent.

    Attributes:
        dataset: The data set that the leaderboard belongs to.
        task_id: The name of the task there.
        metric: The metric of lm-eval that counts.
        filter: What picks the answers.
    """

    dataset: str
    task_id: str
    metric: str
    filter: str


_BENCHMARKS: Mapping[str, _Benchmark] = MappingProxyType(
    {
        "gsm8k": _Benchmark("openai/gsm8k", "gsm8k", "exact_match", "strict-match"),
        "mmlu_pro": _Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match", "custom-extract"),
    }
)


def eval_results(results: Iterable[TaskResult]) -> str | None:
    """Return the text of the file, or None if no result is one on a benchmark of the Hub.

    Results of the dense model, and of a part of a benchmark's items, do not count.

    Args:
        results: The results of a report.
    """
    entries = [
        EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id=benchmark.task_id,
            value=round(100 * result.value, _DECIMALS),
            date=result.date,
            notes=_notes(result),
        )
        for result in results
        if (benchmark := _BENCHMARKS.get(result.task)) is not None and _counts(result, benchmark)
    ]
    if not entries:
        return None
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _counts(result: TaskResult, benchmark: _Benchmark) -> bool:
    same = (result.dataset, result.metric, result.filter) == (benchmark.dataset, benchmark.metric, benchmark.filter)
    return same and result.stage == "pruned" and result.is_whole


def _notes(result: TaskResult) -> str:
    shots = "" if result.num_fewshot is None else f", {result.num_fewshot}-shot"
    template = ", chat template" if result.chat_template else ""
    return f"{result.program}{shots}, {result.metric} ({result.filter}){template}"
