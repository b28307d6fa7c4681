"""The pruned model as the dense one's assistant: the same text, fewer calls; what is refused; what is written."""

import json

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.commands.assisted import AssistedSpeed, Writing, measure_assisted
from optimum_otprune.commands.speed import BenchmarkSettings, cut_copy
from optimum_otprune.models.continuations import greedy_continuation
from tests.conftest import make_llama
from tests.conftest import run_command as run

SETTINGS = BenchmarkSettings(new_tokens=12, warm_up=0, repeats=1)
PROMPTS = [torch.tensor([3, 4, 5]), torch.tensor([7, 9])]


@pytest.fixture
def pruned_folder(tokens, tokenizer, tmp_path):
    """Half of the channels, with a tokenizer."""
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, method="magnitude")
    pruner = OTPruner.from_pretrained(make_llama(), config)
    pruner.prune(tokens, progress=False)
    pruner.tokenizer = tokenizer
    return pruner.save_pretrained(tmp_path / "pruned")


def test_numbers_by_hand():
    found = AssistedSpeed(Writing(4.0, 8, ((1, 2, 3, 4), (5, 6, 7, 8))), Writing(1.0, 2, ((1, 2, 3, 4), (5, 6, 7, 9))))
    assert found.identical == 1
    assert found.speedup == pytest.approx(4)
    assert found.share_of_calls_saved == pytest.approx(0.75)
    assert found.to_dict()["assisted"] == {"tokens": 8, "calls": 2, "seconds": 1.0, "tokens_per_second": 8.0}


def test_a_model_that_drafts_for_itself_saves_most_calls_and_writes_the_same(llama):
    found = measure_assisted(llama, llama, PROMPTS, SETTINGS)
    assert found.alone.texts == tuple(tuple(greedy_continuation(llama, prompt, 12).tolist()) for prompt in PROMPTS)
    assert found.identical == 2
    assert found.alone.calls == found.alone.tokens


def test_a_poor_assistant_changes_no_token(llama):
    found = measure_assisted(llama, cut_copy(llama, 1), PROMPTS, SETTINGS)
    assert found.identical == 2
    assert 0 < found.assisted.calls <= found.alone.calls
    assert not llama._forward_pre_hooks


def test_the_command_prints_and_writes_what_the_assistant_saves(llama_folder, pruned_folder, tmp_path, capsys):
    measured = ["--seqlens", 6, "--new-tokens", 8, "--warm-up", 0, "--repeats", 1, "--quiet"]
    arguments = ["benchmark", llama_folder, pruned_folder, *measured, "--json", tmp_path / "speed.json"]
    assert run(*arguments, "--assistant", "w1 w2", "w3") == 0
    assert "the same text after 2 of 2 prompts" in capsys.readouterr().out
    found = json.loads((tmp_path / "speed.json").read_text())["assistant"]
    assert found["prompts"] == found["identical"] == 2
    assert found["alone"]["calls"] == found["alone"]["tokens"] <= 16
    assert 0 < found["assisted"]["calls"] <= found["alone"]["calls"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "0"], "Give `--new-tokens` of at least 1"),
        (["--assistant", "w1", ""], "The prompt '' has no tokens"),
        (["--new-tokens", "39", "--seqlens", "1"], "A prompt of 5 tokens and 39 new ones do not fit"),
    ],
)
def test_what_an_assistant_cannot_be_measured_on_is_told(llama_folder, pruned_folder, capsys, arguments, message):
    given = ["--quiet", "--seqlens", "6", "--new-tokens", "2", "--assistant", "w1 w2 w3 w4 w5", *arguments]
    assert run("benchmark", llama_folder, pruned_folder, *given) == 1 + message.startswith("Give `")
    assert message in capsys.readouterr().err


def test_an_assistant_without_a_tokenizer_is_refused_before_anything_is_measured(llama_folder, pruned_folder, capsys):
    for file in pruned_folder.glob("*token*"):
        file.unlink()
    assert run("benchmark", llama_folder, pruned_folder, "--quiet", "--seqlens", "6", "--assistant") != 0
    printed = capsys.readouterr()
    assert "no text to go on with" in printed.err
    assert printed.out == ""
