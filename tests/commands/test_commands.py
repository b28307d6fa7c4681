"""The command line: options, exit codes, and one line per failure."""

import argparse
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands import actions
from optimum_otprune.commands.arguments import LISTED, chosen, config_options
from optimum_otprune.commands.main import main
from optimum_otprune.commands.parser import EvaluateCommand, OTPruneCommand, PruneCommand, PushCommand, TuneCommand
from optimum_otprune.commands.signals import imports_interrupted
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.options import OPTIONS
from optimum_otprune.config.presets import METHODS
from optimum_otprune.config.resolve import REGISTRIES
from optimum_otprune.errors import OTPruneError
from optimum_otprune.functional.marginals import strategies
from optimum_otprune.models.defaults import TRIALS, VALIDATION_SHARE
from optimum_otprune.storage.hub.options import PushOptions, keywords
from optimum_otprune.storage.manifest import write_manifest
from tests.conftest import run_command as run
from tests.reports import make_report


@pytest.fixture
def token_file(tokens, tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": tokens}, path)
    return str(path)


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory):
    """A folder that can be read and verified, though its weights are none."""
    folder = tmp_path_factory.mktemp("saved")
    make_report().save(folder / "otprune_report.json")
    OTPruningConfig().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder)
    return folder


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("4 GB wanted"), "memory ran out (4 GB wanted). Close other programs, or use less."),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "the memory of the device ran out. Use smaller batches or samples, or a device with more memory.",
        ),
    ],
)
def test_memory_that_runs_out_is_one_line(error, message, monkeypatch, tmp_path, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(actions, "evaluate", fail)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"otprune evaluate: error: {message}\n"


def test_an_error_of_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(actions, "evaluate", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["evaluate", str(tmp_path)])


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(OSError, match="is neither a folder nor a valid Hub id"):
        main(["prune", str(tmp_path / "absent"), "-o", str(tmp_path / "out"), "--debug"])


def test_an_output_folder_that_is_not_empty_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    assert run("prune", "nobody/nothing", "-o", tmp_path / "out") == 1
    assert "'out' is not empty. Choose another, or set `overwrite` (`--overwrite`)" in capsys.readouterr().err


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
    ("options", "code", "message"),
    [
        (("--spill-folder", "nowhere"), 1, "`spill_folder` 'nowhere' is no folder"),
        (("--max-hidden-memory", "4XB"), 2, "`max_hidden_memory`"),
    ],
)
def test_memory_options_that_cannot_be_used_are_told_before_a_model_is_loaded(
    options, code, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run("prune", tmp_path / "absent", "-o", tmp_path / "out", *HALF, *options) == code
    assert message in capsys.readouterr().err


PRUNE, TUNE, EVALUATE = (
    ("prune", "nobody/nothing", "-o", "out"),
    ("tune", "nobody/nothing", "-o", "b"),
    ("evaluate", "x/y"),
)
BENCHMARK = ("benchmark", "nobody/nothing", "nobody/nothing")
SWEEP = ("sweep", "nobody/nothing", "-o", "out")
OUT_OF_RANGE = [
    (PRUNE, ("--batch-size", "0"), "`batch_size` is 0; want an integer >= 1"),
    (PRUNE, ("--batch-size", "99999999999"), "`batch_size` is 99999999999"),
    (PRUNE, ("--eval", "--max-windows", "0"), "`max_windows` is 0; want an integer >= 1"),
    (EVALUATE, ("--batch-size", "-1"), "`batch_size` is -1"),
    (EVALUATE, ("--max-windows", "0"), "`max_windows` is 0"),
    (EVALUATE, ("--seqlen", "0"), "`seqlen` is 0"),
    (TUNE, ("--batch-size", "0"), "`batch_size` is 0"),
    (SWEEP, ("--batch-size", "0"), "`batch_size` is 0"),
    (SWEEP, ("--max-windows", "0"), "`max_windows` is 0"),
    (SWEEP, ("--ratios", "0.5", "1.5"), "`pruning_ratio` is 1.5"),
    (SWEEP, ("--pruning-ratio", "0.5"), "`--pruning-ratio` would be ignored: `--ratios` says how much to prune"),
    (SWEEP, ("--target-size", "70%"), "`--target-size` would be ignored"),
    (SWEEP, ("--max-hidden-memory", "4XB"), "`max_hidden_memory`"),
    (TUNE, ("--trials", "0"), "`num_trials` is 0"),
    (TUNE, ("--timeout", "-1"), "`timeout` is -1.0; want a number > 0"),
    (TUNE, ("--timeout", "nan"), "`timeout` is nan"),
    (TUNE, ("--target-latency", "0"), "`target_latency` is 0.0"),
    (TUNE, ("--target-latency", "1", "--latency-shape", "1", "0"), "`latency_shape[1]` is 0"),
    (BENCHMARK, ("--repeats", "0"), "`repeats` is 0; want integers of at least 1"),
    (BENCHMARK, ("--multiple-of", "0"), "`multiple_of` is 0; want integers of at least 1"),
    (("push", "folder", "me/x"), ("--deadline", "-1"), "`deadline` is -1.0; want a number of seconds"),
    (("demo",), ("--pruning-ratio", "1"), "`pruning_ratio` is 1.0"),
]


@pytest.mark.parametrize(("command", "options", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range_are_wrong_usage_and_told_before_a_model_is_loaded(
    command, options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(*command, *options) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_what_is_wrong_with_an_output_or_an_option_is_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "model").mkdir()
    wrong = [
        (["prune", "model", "-o", ""], 2),
        (["prune", "model", "-o", "model"], 1),
        (["prune", "model", "-o", "o" * 300, "--resume"], 1),
        (["prune", "model", "-o", "out", "--pruning-ratio", "2"], 2),
        (["prune", "model", "-o", "out", "--batch-size", "0"], 2),
        (["tune", "model", "-o", "model"], 1),
        (["demo", "-o", "."], 1),
        (["benchmark", "model", "model", "--json", "model/speed.json"], 1),
    ]
    code = (
        f"import sys\nfrom optimum_otprune.commands.main import main\nfor argv, code in {wrong!r}:\n"
        "    try:\n        main(argv)\n    except SystemExit as stop:\n        assert stop.code == code, argv\n"
        "    else:\n        raise AssertionError(argv)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == done.stderr.count("error: ") == len(wrong)


@pytest.mark.parametrize("ends", ["RuntimeError", "nothing", "KeyboardInterrupt"])
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_while_libraries_are_imported_is_one_line(
    ends, number, code, word, monkeypatch, capsys, tmp_path
):
    """Whatever the half-imported library makes of it, and without importing anything again."""

    def half_imported(module):
        assert not interrupted, "what was interrupted is not imported again"
        if module != PruneCommand.actions:
            return importlib.import_module(module)
        interrupted.append(module)
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            if ends == "KeyboardInterrupt":
                raise
        if ends == "RuntimeError":
            raise RuntimeError("function '_has_torch_function' already has a docstring")
        return importlib.import_module(module)

    interrupted = []
    monkeypatch.delitem(sys.modules, PruneCommand.actions, raising=False)
    monkeypatch.setattr("optimum_otprune.commands.command.import_module", half_imported)
    before = signal.getsignal(signal.SIGINT)
    assert run("prune", "nobody/nothing", "-o", tmp_path / "out") == code
    assert capsys.readouterr().err.startswith(f"otprune prune: error: {word}.")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_interruption_stays_ignored_while_libraries_are_imported():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with imports_interrupted():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["", "a\0b"])
@pytest.mark.parametrize(
    "words", [("prune", "me/x", "-o"), ("demo", "-o"), ("report",), ("card",), ("verify",)], ids=lambda words: words[0]
)
def test_what_can_name_no_folder_is_wrong_usage_of_every_command(words, name, capsys):
    assert run(*words, name) == 2
    assert "\\\\x00" not in capsys.readouterr().err


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


def parsed(command, *arguments):
    parser = argparse.ArgumentParser()
    command.parse_args(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "options"),
    [
        (PruneCommand, ("MODEL", "-o", "OUT"), LoadingOptions),
        (TuneCommand, ("MODEL", "-o", "FILE"), LoadingOptions),
        (EvaluateCommand, ("MODEL",), LoadingOptions),
        (PushCommand, ("OUT", "me/x"), PushOptions),
    ],
)
def test_every_option_of_loading_and_of_pushing_that_is_a_flag_is_one_with_its_default(command, arguments, options):
    flags = {name: keyword.about.default for name, keyword in keywords(options).items() if keyword.about.is_flag}
    assert chosen(parsed(command, *arguments), options) == flags


def test_flags_become_options_of_the_right_type():
    arguments = ("--private", "--create-pr", "--deadline", "5", "--commit-message", "one", "--revision", "next")
    options = chosen(parsed(PushCommand, "OUT", "me/x", *arguments), PushOptions)
    expected = {"private": True, "create_pr": True, "deadline": 5.0, "commit_message": "one", "revision": "next"}
    assert options == {**expected, "token": None}


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


def test_the_defaults_of_a_search_are_those_of_the_python_call():
    parser = argparse.ArgumentParser()
    TuneCommand.parse_args(parser)
    parameters = inspect.signature(OTPruner.tune).parameters
    assert parser.get_default("trials") == parameters["num_trials"].default == TRIALS
    assert parameters["validation_share"].default == VALIDATION_SHARE


def test_every_kind_of_name_is_listed_alone_and_together(capsys):
    names = {kind: registry.names() for kind, registry in REGISTRIES.items()}
    parts = []
    known_by_kind = {**names, "strategies": strategies, "methods": METHODS}
    assert set(LISTED) == set(known_by_kind)
    for kind in LISTED:
        known = known_by_kind[kind]
        assert run("list", kind) == 0
        parts.append(capsys.readouterr().out)
        assert all(f"\n  {name}\n" in parts[-1] for name in known)
    assert run("list") == 0
    assert capsys.readouterr().out == "\n".join(parts)
    assert parts[0].startswith("importances (--importance)\n  random\n      Uniform random numbers: the baseline")
    assert "  wanda\n" in parts[0]
    assert "      Reference: Sun et al., 2024, https://arxiv.org/abs/2306.11695\n" in parts[0]
    assert "distributions (--source-distribution, --target-distribution)\n" in parts[LISTED.index("distributions")]
    assert "  flap\n      The channels that fluctuate least are removed" in parts[-1]
    assert run("list", "importance") == 2
    assert "invalid choice: 'importance' (choose from" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", [("report",), ("report", "--json"), ("card",), ("verify",)])
def test_a_full_disk_under_the_standard_output_is_one_line(command, pruned_folder, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(*command, pruned_folder) == 1
    told = capsys.readouterr().err
    assert "what it prints could not be written (No space left on device). Make room" in told
    assert told.count("\n") == 1


def test_a_closed_pipe_under_the_standard_output_is_quiet(pruned_folder, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run("report", pruned_folder) == 1
    assert capsys.readouterr().err == ""


def test_work_goes_on_where_what_is_printed_cannot_be_written(llama_folder, token_file, tmp_path, monkeypatch, capsys):
    with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run("prune", llama_folder, "-o", tmp_path / "out", *HALF, "--calibration-data", token_file) == 1
    assert "The command is done, but what it prints could not be written" in capsys.readouterr().err
    assert run("verify", tmp_path / "out") == 0


def test_a_process_without_standard_output_reads_all_the_same(pruned_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("report", pruned_folder) == 0
    assert capsys.readouterr().err == ""


NAMES = {"none": "", "blank": "  ", "long": "x" * 300, "very long": "x" * 5000, "no text": "a\0b"}
DOORS = (
    ("prune", "{}", "-o", "out"),
    ("prune", "{}", "-o", "out", "--dry-run", *HALF),
    ("evaluate", "{}"),
    ("benchmark", "{}", "{}"),
    ("tune", "{}", "-o", "best.json"),
    ("sweep", "{}"),
    ("sweep", "nobody/nothing", "-o={}"),
    ("report", "{}"),
    ("card", "{}"),
    ("verify", "{}"),
    ("push", "{}", "me/x"),
    ("prune", "dense", "-o", "out", "--config={}"),
    ("prune", "dense", "-o", "out", "--offload-folder={}"),
    ("prune", "dense", "-o", "out", "--spill-folder={}"),
    ("prune", "dense", "-o", "out", "--dry-run", *HALF, "--calibration-data={}"),
)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_that_no_file_can_have_are_one_line_at_every_door(name, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for door in (
        *DOORS,
        *((("prune", "dense", "-o", "out", "--resume={}"),) if name else ()),
    ):  # without one: beside OUT
        assert run(*(part.format(name) for part in door)) in (1, 2), door
        told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(told) == 1, door
        assert f"otprune {door[0]}: error: " in told[0], door
        assert len(told[0]) < 400, door
    for call in (
        lambda: OTPruner.from_pretrained(name),
        lambda: OTPruner.plan(name),
        lambda: OTPruningConfig.from_pretrained(name),
        lambda: OTPruner.from_pretrained("dense").prune("dense", resume_from=name),
        lambda: OTPruner.from_pretrained("dense").tune(torch.zeros(8, 40, dtype=torch.long), study=name),
    ):
        with pytest.raises(OTPruneError, match=r"is empty|too long|no text|names no folder|file '' cannot be read"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("name", ["a..b", "-a", "me/a.git", "a/b/c", "näme", "out"])
def test_verify_asks_the_hub_for_no_name_that_it_cannot_have(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("verify", "--", name) == 1
    assert "is neither a folder nor a valid Hub id" in capsys.readouterr().err


def test_verify_says_first_that_there_is_no_such_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("verify", "no/such") == 1
    assert (
        "error: There is no folder 'no/such' here. The Hub was not asked: offline mode is on."
        in capsys.readouterr().err
    )


def test_a_model_writes_calibration_samples_into_a_file_that_prune_reads(llama_folder, tmp_path, capsys):
    file = tmp_path / "written.safetensors"
    assert run("write-calibration", llama_folder, "-o", file, "--num-samples", "6", "--seqlen", "20", "--quiet") == 0
    assert "6 samples of 20 tokens" in capsys.readouterr().out
    assert load_file(file)["input_ids"].shape == (6, 20)
    again = ("prune", llama_folder, "-o", tmp_path / "out", *HALF, "--quality", "fast", "--calibration-data", file)
    assert run(*again) == 0
    assert "6 samples" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-o", "there.safetensors"), 1, "exists. Choose another name"),
        (("-o", "written.txt"), 2, "ends in .safetensors"),
        (("-o", "new.safetensors", "--seqlen", "1"), 2, "`seqlen` is 1; want an integer >= 2"),
        (("-o", "new.safetensors", "--seqlen", "41"), 1, "has only 40 positions"),
    ],
)
def test_what_cannot_be_written_is_refused(llama_folder, tmp_path, capsys, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_bytes(b"something")
    assert run("write-calibration", llama_folder, *options, "--quiet") == code
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_bytes() == b"something"
