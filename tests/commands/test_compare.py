"""`otprune compare`, and what evaluating against the dense model prints and writes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands import compare as comparing
from optimum_otprune.commands.speed import BenchmarkSettings
from optimum_otprune.storage.manifest import read_manifest
from tests.conftest import make_llama
from tests.conftest import run_command as run

HALF = ("--pruning-ratio", "0.5", "--multiple-of", "1", "--quality", "fast", "--quiet")


@pytest.fixture
def token_file(tokens, tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": tokens}, path)
    return path


@pytest.fixture
def pruned_folder(llama_folder, tokens, tmp_path):
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", seqlen=20)
    pruner = OTPruner.from_pretrained(llama_folder, config)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "half")


def test_prune_with_eval_measures_agreement_without_the_dense_model_and_report_and_card_say_it(
    llama_folder, token_file, tmp_path, capsys
):
    out = tmp_path / "out"
    data = ("--calibration-data", token_file, "--eval", "--eval-data", token_file)
    assert (
        run("prune", llama_folder, "-o", out, *HALF, *data, "--max-hidden-memory", "0", "--spill-folder", tmp_path)
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Against the dense model"))
    dense, pruned = json.loads((out / "otprune_report.json").read_text())["evaluations"]
    assert "kl" not in dense
    assert f"the same next token for {pruned['agreement']:.1%}, mean KL divergence {pruned['kl']:.4f} nats" in line
    assert pruned["dense_perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert f"{pruned['agreement']:.1%}".replace("%", " %") in (out / "README.md").read_text()
    assert run("report", out) == 0
    assert line in capsys.readouterr().out
    assert run("evaluate", out, "--base", llama_folder, "--data", token_file, "--quiet") == 0
    printed = capsys.readouterr().out
    assert line in printed
    assert f"Perplexity: {dense['perplexity']:.2f} dense -> {pruned['perplexity']:.2f}" in printed
    assert not list(tmp_path.glob("otprune-*"))  # of kept outputs


def test_evaluate_refuses_a_base_that_is_pruned(pruned_folder, token_file, capsys):
    assert run("evaluate", pruned_folder, "--base", pruned_folder, "--data", token_file, "--quiet") == 1
    assert "is pruned itself" in capsys.readouterr().err


def test_compare_prints_and_writes_json_and_a_page(
    llama_folder, pruned_folder, token_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(comparing, "_SPEED", BenchmarkSettings((1,), (6,), new_tokens=3, warm_up=0, repeats=1))
    (tmp_path / "deep").mkdir()
    same_name = tmp_path / "deep" / token_file.name
    save_file({"input_ids": torch.arange(40).reshape(2, 20)}, same_name)
    (tmp_path / "more.txt").write_text("w3 w4\n\nw5\n")
    out = tmp_path / "compared"
    options = ("--prompt", "w1 w2", "--prompts", tmp_path / "more.txt", "--new-tokens", "4", "--speed", "--quiet")
    assert run("compare", llama_folder, pruned_folder, "--data", token_file, same_name, *options, "-o", out) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in found["data"]] == ["ids.safetensors", "ids.safetensors (2)"]
    assert [row["num_windows"] for row in found["data"]] == [12, 2]
    assert [entry["prompt"] for entry in found["prompts"]] == ["w1 w2", "w3 w4", "w5"]
    assert found["speed"][0]["seqlen"] == 6
    for row in found["data"]:
        assert f"{row['perplexity']:.2f}" in printed
        assert f"{row['agreement']:.1%}" in printed
    assert found["prompts"][2]["dense"] in printed
    assert "Speed, 1 × 6 tokens" in printed
    assert str(tmp_path) not in (out / "compare.json").read_text() + (out / "compare.html").read_text()
    assert set(read_manifest(out)) == {"compare.json", "compare.html"}


def test_a_comparison_replaces_a_comparison_and_nothing_else(
    llama_folder, pruned_folder, token_file, tmp_path, capsys
):
    out = tmp_path / "compared"
    given = ("compare", llama_folder, pruned_folder, "--data", token_file, "--no-prompts", "--quiet")
    assert run(*given, "-o", out) == 0
    assert run(*given, "-o", out) == 1
    assert "is not empty" in capsys.readouterr().err
    assert run(*given, "-o", out, "--overwrite") == 0
    another = tmp_path / "another"
    OTPruner(make_llama()).save_pretrained(another)
    before = {path.name: path.read_bytes() for path in another.iterdir()}
    assert run(*given, "-o", another, "--overwrite") == 1
    assert "which is no file of a comparison, so it is not replaced" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in another.iterdir()} == before
    for place in (llama_folder, pruned_folder, pruned_folder / "inside", token_file):
        assert run(*given, "-o", place, "--overwrite") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-prompts", "--chat"], 2, "`--no-prompts` lets the models write nothing"),
        (["--no-prompts", "--prompt", "w1"], 2, "`--no-prompts` lets the models write nothing"),
        (["--new-tokens", "0"], 2, "`new_tokens` is 0"),
        (["--seqlen", "1"], 2, "`seqlen` is 1"),
        (["--max-windows", "0"], 2, "`max_windows` is 0"),
        (["--prompts", "missing.txt"], 2, "The prompts in 'missing.txt' cannot be used: it cannot be read"),
        (["--data", "missing.txt", "--no-prompts"], 1, "'missing.txt' is neither a file nor a folder"),
    ],
)
def test_wrong_use_is_one_line(llama_folder, pruned_folder, capsys, arguments, code, message):
    assert run("compare", llama_folder, pruned_folder, *arguments, "--quiet") == code
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "holds no prompts"), (b"\xff\xfe\x00", "it is no text in UTF-8")]
)
def test_a_file_without_prompts_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "prompts").write_bytes(content)
    assert run("compare", "a/b", "c/d", "--prompts", tmp_path / "prompts") == 2
    assert message in capsys.readouterr().err


def test_models_of_other_depth_have_no_speed_to_compare(llama_folder, token_file, tmp_path, capsys):
    make_llama(num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    given = ("--data", token_file, "--no-prompts", "--quiet")
    assert run("compare", llama_folder, tmp_path / "shallow", *given, "--speed") == 2
    assert "have 3 and 2 layers" in capsys.readouterr().err
    assert run("compare", llama_folder, tmp_path / "shallow", *given) == 0
