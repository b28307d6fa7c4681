"""Every example runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("custom_*.py"))
# All in one process, which imports the package, and reads Python's documentation, once.
RUN_ALL = """
import contextlib, io, json, pathlib, runpy, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
printed = {}
for name in names:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(pathlib.Path(folder) / name), run_name="__main__")
    printed[name] = out.getvalue()
print(json.dumps(printed))
"""


def run(*arguments, cwd) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_is_an_example_for_every_extension_point():
    kinds = ("architecture", "cost", "distribution", "importance", "solver", "strategy")
    assert [f"custom_{kind}.py" for kind in kinds] == SCRIPTS


def test_an_extension_runs_as_a_callable_and_by_name(tmp_path):
    printed = json.loads(run("-c", RUN_ALL, EXAMPLES, *SCRIPTS, cwd=tmp_path))
    assert list(printed) == SCRIPTS
    assert "GPT-J: 48 -> 24" in printed.pop("custom_architecture.py")
    for script, text in printed.items():
        as_callable, by_name = text.splitlines()
        assert "as a callable: perplexity" in as_callable, script
        assert "by name: perplexity" in by_name, script


def test_the_quickstart_saves_a_model(tmp_path):
    assert "256 channels a layer" in run(EXAMPLES / "quickstart.py", "out", cwd=tmp_path)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_model_larger_than_the_memory_given_is_pruned_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import multi_gpu

    multi_gpu.main(["--plan-only", "--max-memory", "0=4MB", "1=4MB", "cpu=1GB"])
    planned = capsys.readouterr().out
    assert "cuda:0: " in planned
    assert "cuda:1: " in planned
    assert list(tmp_path.iterdir()) == []
    multi_gpu.main([])
    assert "disk: " in capsys.readouterr().out
    assert (tmp_path / "pruned" / "model.safetensors").is_file()


def test_the_scripts_for_clusters_name_options_that_exist(tmp_path):
    from argparse import ArgumentParser

    from optimum_otprune.commands.parser import PruneCommand

    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    for script in ("slurm.sh", "slurm_multi_gpu.sh", "start.sh"):
        path = EXAMPLES / script
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        text = path.read_text()
        words = text.replace('"${OPTIONS[@]}"', text.partition("OPTIONS=(")[2].partition(")")[0])
        lines = [line.partition(" prune ")[2] for line in words.splitlines() if " prune " in line and line[0] != "#"]
        assert lines
        for line in lines:
            parser.parse_args(line.replace('"', "").split())
    usage = subprocess.run(["bash", EXAMPLES / "slurm_multi_gpu.sh", "both"], capture_output=True, text=True)
    assert usage.returncode == 2
    assert "usage: sbatch" in usage.stderr


def test_the_references_own_command_line_prunes_and_then_evaluates(llama_folder, tokens, tmp_path):
    torch.save(tokens, tmp_path / "ids.pt")
    data = ["--calibration_data", "ids.pt", "--eval_data", "ids.pt"]
    arguments = ["--prune_method", "structured_afr_with_intrafusion", "--pruning_ratio", "0.5", "--nsamples", "12"]
    arguments += ["--save_model", "out", "--eval", "--strategy_idx", "2", "--cache_dir", "llm_weights", "--seed", "1"]
    printed = run(EXAMPLES / "main.py", "--model", llama_folder, *arguments, *data, cwd=tmp_path)
    assert "RESCUE EFFECT SUMMARY REPORT" in printed
    assert "Perplexity: " in printed
    evaluated = run(
        EXAMPLES / "main.py", "--model", "out", "--prune_method", "done", "--eval_data", "ids.pt", cwd=tmp_path
    )
    assert evaluated.strip() in printed


def test_the_trigram_model_that_the_training_is_compared_with_is_a_distribution():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from _tiny_training import KneserNeyTrigram
    finally:
        sys.path.remove(str(EXAMPLES))
    tokens = [0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 2, 1, 3, 3, 0, 1, 2] * 3
    trigram = KneserNeyTrigram(tokens, vocab_size=5)
    for context in ((0, 1), (1, 2), (4, 4), (4, 0)):
        assert sum(trigram.probability(*context, token) for token in range(5)) == pytest.approx(1.0)
    assert trigram.perplexity(torch.tensor([tokens])) < 3
