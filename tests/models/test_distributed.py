"""Several processes give what one gives; what cannot be split is refused in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import CalibrationDataError, ConfigurationError, ProcessError
from optimum_otprune.models import distributed as processes
from optimum_otprune.pruning.report import REPORT_FILE, PruningReport
from tests.models import distributed_worker
from tests.pruning.test_experts import make_qwen

FAST = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast"}
SCORED = {**FAST, "score_batch_size": 2}
RECIPES = {
    "closed_form": FAST,
    "gradients": {**SCORED, "method": "fo_snip", "compensation": "ridge"},
    "adaptive": {**SCORED, "allocation": "adaptive"},
    "fused": {**FAST, "fuse": ("gate", "up", "down")},
    "trained": {**SCORED, "reconstruction_steps": 30, "error_weighting": "gradient"},
    "experts": {**FAST, "model": "mixture", "kind_ratios": {"attention": 0.5}},
}


def run_two(script: str, *arguments: Path | str) -> None:
    """Run a script in two processes on this machine."""
    # `accelerate launch --cpu` starts one process unless MPI is there; what it starts on GPUs is this.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def runs(llama, tokens, tmp_path):
    """Reports and weights of one process and of two, by recipe."""
    llama.save_pretrained(tmp_path / "dense")
    make_qwen().save_pretrained(tmp_path / "mixture")
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "recipes.json").write_text(json.dumps(RECIPES))
    distributed_worker.main(tmp_path, tmp_path / "one", 1)
    run_two(distributed_worker.__file__, tmp_path, tmp_path / "two", "2")
    return {name: [tmp_path / count / name for count in ("one", "two")] for name in RECIPES}


def test_two_processes_equal_one_within_1e5(runs):
    for name, (one, two) in runs.items():
        reports = [PruningReport.load(folder / REPORT_FILE) for folder in (one, two)]
        kept = [[part.kept_channels for part in (*report.layers, *report.attention)] for report in reports]
        assert kept[0] == kept[1], name
        weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
        tolerance = 1e-5 if name != "trained" else 1e-4  # 30 steps of Adam amplify rounding
        for key, tensor in weights[0].items():
            assert float((tensor - weights[1][key]).abs().max()) <= tolerance * float(tensor.abs().max()), (name, key)
        for first, second in zip(*(report.evaluations for report in reports), strict=True):
            assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-5)
            assert first["num_tokens"] == second["num_tokens"]
            assert ("kl" in first) == (first["stage"] == "pruned")
            for figure in {"kl", "agreement", "dense_perplexity"} & first.keys():
                assert first[figure] == pytest.approx(second[figure], rel=1e-3), (name, figure)
        assert reports[0].rescue_ratio == pytest.approx(reports[1].rescue_ratio, abs=1e-4)
        assert reports[0].calibration == reports[1].calibration


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_engines_that_cut_weights_into_pieces_are_refused_before_loading(variable, engine, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigurationError, match=f"{engine} cuts every weight matrix"):
        OTPruner.from_pretrained("no/such-model")


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "process_index", lambda: 1)


def test_a_process_that_lost_the_others_says_so(two, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Connection closed by peer\nstack")

    monkeypatch.setattr(processes.distributed, "all_gather_object", fail)
    monkeypatch.setattr(processes, "_state", lambda: None)
    with pytest.raises(ProcessError, match=r"Another process of this run stopped \(Connection closed by peer\)"):
        processes.gathered(1)


def test_samples_are_split_in_whole_batches(two):
    assert processes.own_samples(10, 4) == slice(4, 10)
    assert processes.own_samples(2, 1) == slice(1, 2)
    with pytest.raises(CalibrationDataError, match="8 samples in batches of 8 cannot be split between 2 processes"):
        processes.own_samples(8, 8)


def test_what_one_process_does_alone_is_refused_in_two(two, llama, tokens):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**FAST))
    with pytest.raises(ConfigurationError, match="`tune` works in one process"):
        pruner.tune(tokens)
    with pytest.raises(ConfigurationError, match="`push_to_hub` works in one process"):
        pruner.push_to_hub("user/model")


def test_a_spread_model_is_refused_in_two(two, llama, tokens):
    llama.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ConfigurationError, match="spread over devices or offloaded, but 2 processes"):
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).prune(tokens)


def test_a_run_of_one_process_is_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # without a rank: a batch system's, not ours
    monkeypatch.delenv("RANK", raising=False)
    assert processes.num_processes() == 1
    assert processes.own_device() is None
    assert processes.gathered("x") == ["x"]
    value = torch.ones(2)
    assert processes.summed(value) is value
    assert processes.from_main(value) is value
