"""Zero-shot accuracy of saved folders through lm-eval (extra `eval`), by the docs' command, run from anywhere."""

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.demo_texts import documentation_texts

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "lm_eval" / "python_documentation.jsonl"
COMMAND = (
    "lm_eval --model hf --model_args pretrained=OUT,dtype=float32 --tasks python_documentation "
    "--include_path examples/lm_eval --device cpu"
)
DEMO = ROOT / "optimum_otprune" / "commands" / "demo_model"
CHANCE = 0.25


def scores(folder: Path, output: Path, more: str = "") -> dict:
    """What the docs' command says of a folder, run where nothing else is."""
    command = COMMAND.replace("examples/lm_eval", str(TASK.parent)).replace("float32", f"float32{more}")
    arguments = command.replace("OUT", str(folder)).split()[1:]
    output.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--output_path", str(output)],
        capture_output=True,
        text=True,
        cwd=output,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = output.rglob("results_*.json")
    return json.loads(written.read_text())["results"]["python_documentation"]


def test_the_docs_have_the_command_that_is_tested():
    page = (ROOT / "docs" / "how-to" / "measure.md").read_text(encoding="utf-8")
    assert COMMAND in page.replace("llama-half,", "OUT,")


def test_every_item_of_the_task_has_one_right_ending_of_four():
    items = [json.loads(line) for line in TASK.read_text(encoding="utf-8").splitlines()]
    right = [item["endings"][item["answer"]] for item in items]
    assert len(items) == len(set(right)) == 64
    for item in items:
        assert len(set(item["endings"])) == 4
        assert set(item["endings"]) <= set(right)  # a wrong one is right elsewhere: no style gives it away
    answers = [item["answer"] for item in items]
    assert all(answers.count(position) == 16 for position in range(4))


def test_the_items_are_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = runpy.run_path(str(TASK.with_suffix(".py")))["load"](version=1.0)
    assert loaded["test"].to_list() == [json.loads(line) for line in TASK.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval (extra `eval`) is missing")
def test_the_demo_model_is_above_chance_and_a_pruned_folder_is_evaluated_too(tmp_path):
    dense = scores(DEMO, tmp_path / "dense-scores")
    # Above chance by more than two standard errors of guessing, (0.25 · 0.75 / 64)^½ = 0.054; by length-normalized
    # likelihood by more than four.
    assert dense["acc,none"] > CHANCE + 2 * 0.054
    assert dense["acc_norm,none"] > CHANCE + 4 * 0.054
    config = OTPruningConfig(
        pruning_ratio=0.2,
        layer_ratios={0: 0.1},
        multiple_of=1,
        seqlen=256,
        num_samples=32,
        quality="fast",
        non_uniform_format="per_layer_config",
    )
    pruner = OTPruner.from_pretrained(str(DEMO), config, dtype="float32")
    pruner.prune(documentation_texts("train"), progress=False)
    pruner.save_pretrained(tmp_path / "pruned")
    pruned = scores(tmp_path / "pruned", tmp_path / "pruned-scores", ",trust_remote_code=True")
    assert pruned["acc_norm,none"] > CHANCE + 2 * 0.054
