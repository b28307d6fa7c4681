"""Several processes recover a model as one does, and a run that is killed goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_otprune import OTPruner
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models import distributed as processes
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from optimum_otprune.storage.state_folder import default_state_folder
from tests.conftest import make_llama, run_command
from tests.pruning.recovery import recovery_worker
from tests.pruning.recovery.test_recovery import FAST, save_pair

STEPS = {"num_tokens": 2000, "batch_tokens": 100, "learning_rate": 1e-3}  # 20 of 5 samples, so that shares differ
RUNS = {"ffn": STEPS, "in_parts": {**STEPS, "trained": "all", "batch_size": 1}, "lora": {**STEPS, "trained": "lora"}}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tokens, tmp_path):
    save_pair(tokens, tmp_path)
    return tmp_path


def test_two_processes_equal_one_within_float_tolerance(folder):
    (folder / "options.json").write_text(json.dumps(RUNS))
    recovery_worker.main(folder, folder / "one", 1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, recovery_worker.__file__, str(folder), str(folder / "two"), "2"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in RUNS:
        one, two = (PruningReport.load(folder / count / name / REPORT_FILE).recoveries[0] for count in ("one", "two"))
        assert one.kept_step == two.kept_step > 0
        assert (one.steps, one.num_tokens, one.samples) == (two.steps, two.num_tokens, two.samples)
        for first, second in zip(one.heldout, two.heldout, strict=True):
            assert first.kl_before == pytest.approx(second.kl_before, rel=1e-5)
            assert first.kl_after == pytest.approx(second.kl_after, rel=1e-4)
        weights = [load_file(folder / count / name / "model.safetensors") for count in ("one", "two")]
        for key, tensor in weights[0].items():
            assert float((tensor - weights[1][key]).abs().max()) <= 1e-4 * float(tensor.abs().max()), (name, key)


def test_what_several_processes_cannot_do_is_refused(folder, tokens, monkeypatch, capsys):
    pruner = OTPruner.from_pretrained(folder / "pruned")
    dense = make_llama()
    monkeypatch.setattr(processes, "num_processes", lambda: 8)
    monkeypatch.setattr(processes, "process_index", lambda: 1)
    with pytest.raises(ConfigurationError, match="`resume_from` works in one process, but 8 were started"):
        pruner.recover(tokens, base_model=dense, resume_from=folder / "state", **FAST)
    with pytest.raises(ConfigurationError, match="`cache_logits` works in one process, but 8 were started"):
        pruner.recover(tokens, base_model=dense, cache_logits=folder / "logits", **FAST)
    command = ["recover", folder / "pruned", "--base", folder / "base", "-o", folder / "out"]
    assert run_command(*command, "--cache-logits") == 1
    assert run_command(*command, "--resume") == 1
    told = capsys.readouterr().err
    assert "`--cache-logits` works in one process" in told
    assert "`--resume` works in one process" in told


def test_fewer_samples_of_a_step_than_processes_are_refused(folder, tokens, monkeypatch):
    pruner = OTPruner.from_pretrained(folder / "pruned")
    for module in ("recovery.recover", "recovery.heldout"):
        monkeypatch.setattr(f"optimum_otprune.pruning.{module}.num_processes", lambda: 8)
    with pytest.raises(ConfigurationError, match="A step has 4 samples of 20 tokens, which cannot be shared among 8"):
        pruner.recover(tokens, base_model=make_llama(), **FAST)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(folder):
    command = [sys.executable, "-m", "optimum_otprune", "recover", folder / "pruned", "--base", folder / "base"]
    command += ["--data", folder / "tokens.pt", "--num-tokens", "60k", "--batch-tokens", "80", "--quiet"]
    command += ["--learning-rate", "1e-3", "--cache-logits", "--logits-per-token", "8"]

    def start(output, *options):
        return subprocess.Popen([*map(str, command), "-o", str(output), *options], env=ENVIRONMENT)

    assert start(folder / "straight").wait(300) == 0
    output = folder / "out"
    state = default_state_folder(output)
    for seen in ("*logits/logits-*", "*state/step-*.json"):  # killed while it writes logits, then while it trains
        running = start(output, "--resume")
        deadline = time.monotonic() + 120
        while not list(folder.glob(f".out.otprune-{seen.lstrip('*')}")) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert not output.exists()
    assert list(state.glob("step-*.json"))
    assert start(output, "--resume").wait(300) == 0
    assert not list(folder.glob(".out*"))
    straight, resumed = (load_file(path / "model.safetensors") for path in (folder / "straight", output))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    reports = [PruningReport.load(path / REPORT_FILE).recoveries[0] for path in (folder / "straight", output)]
    assert reports[0].heldout == reports[1].heldout
    assert reports[0].kept_step == reports[1].kept_step > 0
