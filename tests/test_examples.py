"""Every example runs."""

import json
import os
import subprocess
import sys
import time
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


# Programs of a cluster: `otprune` notes its arguments (RUNS=yes: and runs until it is told to end).
STAND_INS = {
    "otprune": """
printf '%s\\n' "$*" >> otprune.log
if [[ "${RUNS:-}" == yes ]]; then
  trap 'exit 143' TERM; echo $$ > pid; touch started
  while true; do sleep 0.1; done
fi
exit "${FAILS:-0}"
""",
    "srun": """
while [[ "$1" != bash ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
""",
    "scancel": """
[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(cat pid)"
""",
    "scontrol": """
if [[ "$1" == show ]]; then echo localhost; else printf '%s\\n' "$*" >> scontrol.log; fi
""",
}
OF_SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"},
    **{"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_ON_NODE": "8"},
}
WAYS = (["start.sh"], ["slurm.sh"], ["slurm_multi_gpu.sh", "split"], ["slurm_multi_gpu.sh", "copies"])


@pytest.fixture
def start(tmp_path):
    """Start a script for a cluster among stand-ins, in an empty folder."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PATH": path, **OF_SLURM, **variables}
        with (tmp_path / "errors").open("w") as errors:
            return subprocess.Popen(
                ["bash", EXAMPLES / script, *arguments], cwd=tmp_path, env=environment, stderr=errors
            )

    return start


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_the_scripts_for_clusters_give_options_that_exist_and_can_go_on(start, tmp_path, way):
    from argparse import ArgumentParser

    from optimum_otprune.commands.parser import PruneCommand

    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    for arguments in ([], ["model", "out", "--quality", "fast"]):
        assert start(*way, *arguments).wait(timeout=30) == 0
        *planned, line = (tmp_path / "otprune.log").read_text().splitlines()
        (tmp_path / "otprune.log").unlink()
        assert all(words.endswith("--dry-run") for words in planned)
        assert line.startswith("prune ")
        parsed = parser.parse_args(line.split()[1:])
        assert parsed.resume is not None
        assert parsed.pruning_ratio == 0.5
        if arguments:
            assert (parsed.model, parsed.output, parsed.quality) == ("model", "out", "fast")
        else:
            assert parsed.model.startswith("meta-llama/")
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("way", WAYS[1:], ids=" ".join)
def test_a_job_that_is_told_to_end_is_queued_again_and_one_that_fails_is_not(start, tmp_path, way):
    assert start(*way, "model", "out", FAILS="1").wait(timeout=30) == 1
    assert not (tmp_path / "scontrol.log").exists()
    if way[-1] == "split":
        return  # its dry run comes first, which the stand-in would not end
    job = start(*way, "model", "out", RUNS="yes")
    end = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=30) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"


def test_a_way_that_there_is_not_is_told(start, tmp_path):
    assert start("slurm_multi_gpu.sh", "both").wait(timeout=30) == 2
    assert "usage: sbatch" in (tmp_path / "errors").read_text()


@pytest.mark.parametrize("recipe", ["otprune.def", "Dockerfile"])
def test_containers_are_made_of_the_wheel_and_the_constraints_alone(recipe):
    text = (EXAMPLES / recipe).read_text()
    lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    copied = [line for line in lines if "/opt/otprune" in line and "pip" not in line]
    assert {word for line in copied for word in line.split()} <= {
        *("COPY", "dist/*.whl", "constraints.txt", "/opt/otprune/", "/opt/otprune/constraints.txt")
    }
    (installed,) = (line for line in lines if "pip install" in line)
    assert installed.endswith(
        "pip install --no-cache-dir --constraint /opt/otprune/constraints.txt /opt/otprune/*.whl"
    )
    assert (EXAMPLES.parent / "constraints.txt").is_file()


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
