"""The command line: options, exit codes, and one line per failure."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from optimum_otprune import OTPruner
from optimum_otprune.commands.arguments import config_options
from optimum_otprune.commands.main import main
from optimum_otprune.commands.root import OTPruneCommand, PruneCommand
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.manifest import write_manifest
from optimum_otprune.options import OPTIONS
from tests.conftest import run_command as run
from tests.reports import make_report


@pytest.fixture
def token_file(tokens, tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": tokens}, path)
    return str(path)


HALF = ("--pruning-ratio", "0.5", "--multiple-of", "1", "--quiet")


def test_prune_evaluates_saves_and_reports(llama_folder, token_file, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        "prune", llama_folder, "-o", out, *HALF, "--calibration-data", token_file, "--eval", "--eval-data", token_file
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "RESCUE EFFECT SUMMARY REPORT" in printed
    assert "dense ->" in printed
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 24
    assert run("report", out) == 0
    assert "Layer 02: Rescued" in capsys.readouterr().out
    assert run("report", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evaluations"][1]["stage"] == "pruned"
    assert run("evaluate", out, "--data", token_file, "--quiet") == 0
    assert capsys.readouterr().out.startswith("Perplexity: ")


def test_evaluation_on_calibration_text_is_told_and_limited(llama_folder, tmp_path, capsys):
    numbers = torch.randint(60, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(" ".join(f"w{number}" for number in numbers[:2000]))
    other.write_text(" ".join(f"w{number}" for number in numbers[2000:]))
    out, told = tmp_path / "out", "windows hold text that the model was calibrated on"
    data = ["--calibration-data", text, "--eval", "--eval-data", text, "--max-windows", "7"]
    assert run("prune", llama_folder, "-o", out, *HALF, *data) == 0
    assert f"7 of the 7 {told}" in capsys.readouterr().out
    assert run("report", out) == 0
    assert capsys.readouterr().out.count(told) == 1
    for seqlen in ("40", "36"):  # in another process, and of another length
        assert run("evaluate", out, "--data", text, "--seqlen", seqlen, "--quiet") == 0
        assert told in capsys.readouterr().out
    assert run("evaluate", out, "--data", other, "--max-windows", "7", "--quiet") == 0
    printed = capsys.readouterr().out
    assert told not in printed
    assert f"({7 * 39} tokens" in printed


@pytest.mark.parametrize("suffix", ["npy", "pt", "jsonl", "txt"])
def test_calibration_files_of_every_kind_are_read(llama_folder, tokens, tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    text = " ".join(f"w{index % 60}" for index in range(400))
    if suffix == "npy":
        np.save(path, tokens.numpy().astype(np.int32))
    elif suffix == "pt":
        torch.save(tokens.int(), path)
    elif suffix == "jsonl":
        path.write_text(json.dumps({"text": text}) + "\n")
    else:
        path.write_text(text)
    assert run("prune", llama_folder, "-o", tmp_path / "out", *HALF, "--calibration-data", path) == 0


def test_a_saved_configuration_is_the_start_and_options_override_it(llama_folder, token_file, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("prune", llama_folder, "-o", first, *HALF, "--method", "flap", "--calibration-data", token_file) == 0
    arguments = ["--config", first, "--pruning-ratio", "0.25", "--quiet", "--calibration-data", token_file]
    assert run("prune", llama_folder, "-o", second, *arguments) == 0
    config = json.loads((second / "otprune_config.json").read_text())
    assert (config["method"], config["pruning_ratio"], config["multiple_of"]) == ("flap", 0.25, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruning-ratio", "1.5"], "`pruning_ratio` is 1.5"),
        (["--pruning-ratio", "nan"], "`pruning_ratio` is nan"),
        (["--pruning-ratio", "half"], "invalid float value"),
        (["--method", "otprun"], "invalid choice"),
        (["--importance", "wnda"], "Did you mean 'wanda'"),
        (["--solver", "sinkhon"], "Did you mean 'sinkhorn'"),
        (["--method", "flap", "--solver", "emd"], "would be ignored"),
        (["--eval-data", "x.txt"], "without `--eval`"),
        (["--max-windows", "3"], "`--max-windows` would be ignored without `--eval`"),
        (["--private"], "ignored without `--push-to-hub`"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_exits_with_2_before_a_model_is_loaded(arguments, message, tmp_path, capsys):
    assert run("prune", "nobody/nothing", "-o", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_failure_is_one_line_and_exits_with_1(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("prune", empty, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("otprune prune: error: The folder 'empty' is empty, so it holds no model")
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(OSError, match="is neither a folder nor a valid Hub id"):
        main(["prune", str(tmp_path / "absent"), "-o", str(tmp_path / "out"), "--debug"])


def test_an_output_folder_that_is_not_empty_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    assert run("prune", "nobody/nothing", "-o", tmp_path / "out") == 1
    assert "'out' is not empty" in capsys.readouterr().err


def test_a_report_of_a_folder_without_one_says_so(tmp_path, capsys):
    assert run("report", tmp_path) == 1
    assert "has no otprune_report.json" in capsys.readouterr().err


def test_verify_tells_a_changed_file_and_push_a_folder_that_is_none(llama, tmp_path, capsys):
    folder = OTPruner.from_pretrained(llama).save_pretrained(tmp_path / "out")
    assert run("verify", folder) == 0
    assert "All files are as they were saved." in capsys.readouterr().out
    (folder / "config.json").write_text("{}")
    for command in (["verify", folder], ["push", folder, "me/x"]):
        assert run(*command) == 1
        assert "(changed: 'config.json')" in capsys.readouterr().err
    assert run("push", tmp_path / "absent", "me/x") == 2
    assert "'absent' is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--spill-folder", "nowhere"), "`spill_folder` 'nowhere' is no folder"),
        (("--max-hidden-memory", "4XB"), "`max_hidden_memory`"),
    ],
)
def test_memory_options_that_cannot_be_used_are_told_before_a_model_is_loaded(options, message, tmp_path, capsys):
    assert run("prune", tmp_path / "absent", "-o", tmp_path / "out", *HALF, *options) == 1
    assert message in capsys.readouterr().err


def test_no_subcommand_prints_the_help_and_exits_with_2(capsys):
    assert run() == 2
    assert "prune" in capsys.readouterr().err


def test_every_option_of_the_configuration_is_an_option_of_prune_and_unset_by_default():
    from argparse import ArgumentParser

    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    args = parser.parse_args(["model", "-o", "out"])
    assert config_options(args) == {}
    given = parser.parse_args(["model", "-o", "out", "--fuse", "down", "--seed", "3", "--dataset-config", "x"])
    assert config_options(given) == {"fuse": ["down"], "seed": 3, "dataset_config": "x"}
    help_text = parser.format_help()
    assert all(f"--{option.name.replace('_', '-')}" in help_text for option in OPTIONS)


def test_tune_writes_a_configuration_that_prune_takes(llama_folder, token_file, tmp_path, capsys):
    best, data = tmp_path / "best.json", ["--calibration-data", token_file]
    arguments = ["tune", llama_folder, "-o", best, *HALF, *data, "--trials", "2", "--study", tmp_path / "study.log"]
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines[:2]] == ["Trial 0:", "Trial 1:"]
    assert lines[2].startswith("Perplexity on held-out calibration samples: ")
    assert f"--config {best}" in lines[3]
    assert run("prune", llama_folder, "-o", tmp_path / "out", "--config", best, *data, "--quiet") == 0
    assert json.loads((tmp_path / "out" / "otprune_config.json").read_text()) == json.loads(best.read_text())
    assert run(*arguments) == 1
    assert "output file 'best.json' exists" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--trials", "3") == 0
    assert [line[:8] for line in capsys.readouterr().out.splitlines()[:3]] == ["Trial 0:", "Trial 1:", "Trial 2:"]
    assert [path.name for path in tmp_path.glob(".best*")] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "absent/best.json"], 1, "is missing or read-only"),
        (["-o", "."], 1, "is a folder"),
        (["-o", "best.json", "--target-latency", "1", "--pruning-ratio", "0.5"], 2, "more than one way"),
        (["-o", "best.json", "--target-size", "2GB", "--pruning-ratio", "0.5"], 2, "more than one way"),
        (["-o", "best.json", "--target-size", "2 cows"], 2, "`target_size` is '2 cows'"),
        ([], 2, "-o/--output"),
    ],
)
def test_wrong_usage_of_tune_is_told_before_a_model_is_loaded(arguments, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("tune", "nobody/nothing", *arguments) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_prune_to_a_target_replaces_the_ratio_of_a_saved_configuration(llama_folder, token_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pruning_ratio": 0.9, "multiple_of": 1}))
    arguments = ["--config", tmp_path / "config.json", "--target-parameters", "20k", "--quiet"]
    assert run("prune", llama_folder, "-o", tmp_path / "out", *arguments, "--calibration-data", token_file) == 0
    config = json.loads((tmp_path / "out" / "otprune_config.json").read_text())
    assert (config["pruning_ratio"], config["target_parameters"]) == (None, "20k")
    report = json.loads((tmp_path / "out" / "otprune_report.json").read_text())
    channel, biases = 9 * 32, 3 * (32 + 2 * 48)  # those that intercept='auto' may add are kept room for
    assert 20_000 - channel - biases < report["parameters_after"] <= 20_000
    assert 0 < report["pruning_ratio"] < 0.9


@pytest.mark.parametrize("command", [["--help"], ["prune", "--help"], ["tune", "--help"], ["demo", "--help"]])
def test_help_does_not_import_torch(command):
    code = (
        "import sys\nfrom optimum_otprune.commands.main import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_optimum_cli_knows_the_same_commands():
    done = subprocess.run(
        [sys.executable, "-m", "optimum.commands.optimum_cli", "otprune", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(command.name in done.stdout for command in OTPruneCommand.SUBCOMMANDS)


@pytest.mark.parametrize("command", ["report", "verify", "card"])
def test_commands_that_only_read_import_no_torch(command, tmp_path):
    make_report().save(tmp_path / "otprune_report.json")
    OTPruningConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path)
    code = (
        f"import sys\nfrom optimum_otprune.commands.main import main\nmain([{command!r}, {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
