"""Results files of lm-eval: what is taken from them, whom they belong to, and what is refused."""

import copy
import json

import pytest

from optimum_otprune.checkpoints.card.lm_eval import read_lm_eval
from optimum_otprune.errors import ReportError
from tests.reports import lm_eval_content, make_report


def read(tmp_path, content):
    (tmp_path / "results_1.json").write_text(json.dumps(content))
    return read_lm_eval(tmp_path / "results_1.json")


def test_metrics_are_taken_with_their_protocol_and_nothing_else(tmp_path):
    run = read(tmp_path, lm_eval_content())
    assert (run.num_parameters, run.model) == (700, "llama-half")
    strict, flexible, easy = run.results
    assert (strict.label, flexible.label, easy.label) == (
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
        "acc",
    )
    assert strict.to_dict() == {
        "stage": "pruned",
        "task": "gsm8k",
        "metric": "exact_match",
        "filter": "strict-match",
        "value": 0.25,
        "stderr": 0.012,
        "higher_is_better": True,
        "num_fewshot": 5,
        "num_items": 1319,
        "is_whole": True,
        "dataset": "openai/gsm8k",
        "version": "3.0",
        "program": "lm-eval 0.4.13",
        "dtype": "float32",
        "chat_template": False,
        "date": "2026-11-30",
    }
    assert (flexible.stderr, easy.dataset, easy.num_fewshot) == (None, None, 0)
    assert not [result for result in run.results if "/home" in json.dumps(result.to_dict())]


def test_a_group_with_results_of_its_own_stands_for_its_parts(tmp_path):
    content = lm_eval_content()
    part = {"exact_match,custom-extract": 0.1, "exact_match_stderr,custom-extract": 0.01}
    content["results"] = {"mmlu_pro": part, "mmlu_pro_law": part, "mmlu_pro_math": part, "other": {"alias": "other"}}
    content["group_subtasks"] = {"mmlu_pro": ["mmlu_pro_law", "mmlu_pro_math"], "mmlu_pro_law": ["mmlu_pro"]}
    content["configs"] = dict.fromkeys(("mmlu_pro_law", "mmlu_pro_math"), {"dataset_path": "TIGER-Lab/MMLU-Pro"})
    content["n-samples"] = dict.fromkeys(("mmlu_pro_law", "mmlu_pro_math"), {"original": 100, "effective": 50})
    del content["group_subtasks"]["mmlu_pro_law"]
    (result,) = read(tmp_path, content).results
    assert (result.task, result.dataset, result.num_items, result.is_whole) == (
        "mmlu_pro",
        "TIGER-Lab/MMLU-Pro",
        100,
        False,
    )
    content["group_subtasks"]["mmlu_pro_law"] = ["mmlu_pro"]  # groups that hold each other end, too
    with pytest.raises(ReportError, match="It holds no result"):
        read(tmp_path, content)


def test_the_size_says_which_model_the_results_are_of(tmp_path):
    report = make_report(parameters_after=690, padding_parameters=10)
    content = lm_eval_content()
    assert {result.stage for result in read(tmp_path, content).of_stage(report, "x")} == {"pruned"}
    content["config"]["model_num_parameters"] = 1000
    assert {result.stage for result in read(tmp_path, content).of_stage(report, "x")} == {"dense"}
    content["config"]["model_num_parameters"] = 999
    message = "'results_1.json' is of a model of 999 parameters; this one has 700, and the dense one 1,000"
    with pytest.raises(ReportError, match=message):
        read(tmp_path, content).of_stage(report, "llama-half")


def test_where_there_is_no_size_the_name_decides(tmp_path):
    content = lm_eval_content()
    del content["config"]["model_num_parameters"]
    run = read(tmp_path, content)
    assert run.of_stage(make_report(), "user/llama-half") == run.results
    with pytest.raises(ReportError, match="does not say how large its model is, and calls it 'llama-half', not 'x'"):
        run.of_stage(make_report(), "x")


def changed(path, value):
    content = copy.deepcopy(lm_eval_content())
    *parents, last = path
    inner = content
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "`results` is missing, or is no object"),
        (changed(["results"], {}), "It holds no result"),
        (changed(["results", "gsm8k"], 3), "`results` of 'gsm8k' is no object"),
        (changed(["results", "gsm8k", "acc,none"], None), "`acc,none` of 'gsm8k' is no number"),
        (changed(["results", "gsm8k", "acc,none"], 1e200), "A name or number of 'gsm8k' is too long"),
        (changed(["results", "x" * 101], {"acc,none": 1.0}), "is too long"),
        (changed(["config"], None), "`config` is missing, or is no object"),
        (changed(["n-shot"], []), "`n-shot` is missing, or is no object"),
        (changed(["lm_eval_version"], "9" * 200), "is too long"),
    ],
)
def test_a_file_that_is_something_else_is_refused_in_one_sentence(content, reason, tmp_path):
    with pytest.raises(
        ReportError, match=f"'results_1.json' is no results file of lm-eval that can be used: .*{reason}"
    ):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ReportError, match="it cannot be read"):
        read_lm_eval(tmp_path / "absent.json")
    (tmp_path / "results.json").write_text('{"results": {"a": {"acc,none": NaN}}}')
    with pytest.raises(ReportError, match="NaN is no number of JSON"):
        read_lm_eval(tmp_path / "results.json")
