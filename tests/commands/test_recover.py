"""`otprune recover`: what it loads, keeps, plans and refuses."""

import re
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner
from optimum_otprune.checkpoints import load
from optimum_otprune.commands import recover as command
from optimum_otprune.commands.arguments import base_options
from optimum_otprune.models import training
from optimum_otprune.pruning.report import PruningReport
from tests.conftest import run_command
from tests.pruning.recovery.test_recovery import save_pair

OPTIONS = ("--num-tokens", "1k", "--batch-tokens", "80", "--quiet")


@pytest.fixture
def arguments(tokens, tmp_path):
    """A command without an output, on a pruned folder."""
    save_pair(tokens, tmp_path)
    return ["recover", tmp_path / "pruned", "--base", tmp_path / "base", "--data", tmp_path / "tokens.pt", *OPTIONS]


def test_with_logits_in_files_one_model_is_in_memory_at_a_time(arguments, tmp_path, monkeypatch):
    loaded, original = [], load.load_checkpoint

    def loading(name, options):
        loaded.append(name.rpartition("/")[2])
        return original(name, options)

    for module in ("optimum_otprune.pruner", "optimum_otprune.checkpoints.dense"):
        monkeypatch.setattr(f"{module}.load_checkpoint", loading)
    assert run_command(*arguments, "-o", tmp_path / "out", "--cache-logits", "--logits-per-token", "8") == 0
    assert loaded == ["base", "pruned"]
    assert not list(tmp_path.glob(".out*"))
    assert run_command(*arguments, "-o", tmp_path / "again", "--cache-logits", tmp_path / "logits") == 0
    assert list((tmp_path / "logits").glob("logits-*"))
    told = [PruningReport.load(tmp_path / out / "otprune_report.json").recoveries[0] for out in ("out", "again")]
    assert [recovery.logits_per_token for recovery in told] == [8, 63]
    assert run_command("verify", tmp_path / "out") == 0
    assert "--cache-logits --logits-per-token 8" in (tmp_path / "out" / "README.md").read_text().replace("\\\n ", "")
    assert "counts the dense model's 8 likeliest tokens" in (tmp_path / "out" / "README.md").read_text()


def test_logits_of_another_budget_are_refused_before_a_model_is_loaded_again(arguments, tmp_path, capsys):
    options = ["--cache-logits", tmp_path / "logits"]
    assert run_command(*arguments, "-o", tmp_path / "out", *options) == 0
    assert run_command(*arguments, "-o", tmp_path / "two", *options, "--seed", "5") == 1
    assert "'logits' was begun with another `seed` of recovery (0, now 5)" in capsys.readouterr().err
    assert run_command(*arguments, "-o", tmp_path, *options) == 1
    assert "contains, the" in capsys.readouterr().err


def test_a_dry_run_tells_samples_steps_memory_disk_and_time(arguments, tmp_path, capsys):
    assert run_command(*arguments, "-o", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "RECOVERY PLAN (no weights were read" in printed
    assert re.search(r"Trained +all, 20,448 weights", printed)
    assert re.search(r"Samples +10 read from token ids, 40 that the dense model writes, of 20 tokens", printed)
    assert re.search(r"Steps +12 of 80 tokens, 960 in all; learning rate 0.0031", printed)
    assert re.search(r"Memory +main memory: .*the dense model 0.1 MB.*gradients and moments 0.3 MB", printed)
    assert re.search(r"Time +about .* \(writing samples .*training", printed)
    assert "Disk" not in printed
    assert run_command(*arguments, "-o", tmp_path / "out", "--dry-run", "--cache-logits", "--resume") == 0
    printed = capsys.readouterr().out
    assert re.search(r"Memory, writing logits +main memory: .*the dense model", printed)
    assert not re.search(r"Memory, training .*the dense model", printed)
    assert re.search(r"Disk +the dense model's logits 0.6 MB, the state 0.[0-9] MB", printed)
    assert not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out").exists()
    assert run_command(*arguments[:2], "--base", tmp_path / "pruned", *arguments[4:], "-o", "x", "--dry-run") == 1
    assert "pruned itself" in capsys.readouterr().err


def test_the_dense_model_has_loading_options_of_its_own(arguments, tmp_path, monkeypatch):
    seen, original = [], OTPruner.recover

    def recover(self, *args, **options):
        seen.append(options["base_options"])
        return original(self, *args, **options)

    monkeypatch.setattr(command.OTPruner, "recover", recover)
    given = ["--base-dtype", "bfloat16", "--trust-remote-code", "--base-revision", "main"]
    assert run_command(*arguments, "-o", tmp_path / "out", *given) == 0
    assert {name: seen[0][name] for name in ("dtype", "trust_remote_code", "revision", "load_in_8bit")} == {
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "revision": "main",
        "load_in_8bit": None,
    }


def test_without_a_place_of_its_own_the_dense_model_goes_where_the_pruned_one_goes():
    names = ("dtype", "device_map", "revision", "offload_folder", "load_in_8bit")
    shared = {"token": None, "cache_dir": "c", "local_files_only": True, "trust_remote_code": False}
    args = SimpleNamespace(**dict.fromkeys(f"base_{name}" for name in names), **shared, device_map="auto")
    assert base_options(args) == {**dict.fromkeys(names), **shared, "device_map": "auto"}
    args.base_device_map = "cpu"
    assert base_options(args)["device_map"] == "cpu"


def test_weights_in_8_bits_are_asked_of_bitsandbytes(arguments, tmp_path, monkeypatch):
    found, original = [], AutoModelForCausalLM.from_pretrained

    def loading(name, **options):
        found.append(options.pop("quantization_config", None))
        return original(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    assert run_command(*arguments, "-o", tmp_path / "out", "--base-load-in-8bit") == 0
    assert found[0] is None
    assert found[1].load_in_8bit


def test_prune_refuses_to_recover_what_cannot_be_trained_before_it_prunes(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "is_offloaded", lambda model: True)
    monkeypatch.setattr(OTPruner, "prune", None)
    data = ["--calibration-data", tmp_path / "tokens.pt", "--recover", "1k", "--quiet"]
    assert run_command("prune", tmp_path / "base", "-o", tmp_path / "out", *data) == 1
    assert "offloaded, so that they cannot be trained" in capsys.readouterr().err
