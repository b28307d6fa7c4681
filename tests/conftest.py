"""Fixtures: tiny models in which every size differs, so that a transposed axis cannot hide."""

import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_otprune.commands.main import main

VOCAB_SIZE = 64
WORDS = [f"w{index}" for index in range(VOCAB_SIZE - 1)]


def run_command(*arguments) -> int:
    """The exit code of a command line, run in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def record_figure(record_property):
    """Count a published figure: `record_figure("R3", tried=100, ok=100)`; without numbers, this test's outcome counts.

    The totals are printed at the end of a run, whichever processes the tests ran in.
    """

    def record(name: str, tried: int = 1, ok: int | None = None) -> None:
        record_property("figure", [name, tried, ok])

    return record


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Tests marked with a figure count as one try of it; examples of the laws of the mathematics count for R7."""
    outcome = yield
    report = outcome.get_result()
    if call.when != "call":
        return
    for marker in item.iter_markers("figure"):
        report.user_properties.append(("figure", [marker.args[0], 1, None]))
    counts = re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))
    if "functional" in item.path.parts and counts:
        report.user_properties.append(("figure", ["R7", sum(map(int, counts)), None]))


def pytest_terminal_summary(terminalreporter):
    totals: dict[str, list[int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in report.user_properties:
                if key == "figure" and report.when == "call":
                    name, tried, ok = value
                    total = totals.setdefault(name, [0, 0])
                    total[0] += tried
                    total[1] += ok if ok is not None else tried * report.passed
    for name, (tried, ok) in sorted(totals.items()):
        terminalreporter.write_line(f"{name}: {tried} tried, {ok} ok")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_llama(**changes) -> LlamaForCausalLM:
    """A random Llama with 3 layers, hidden 32, intermediate 48, vocabulary 64, 40 positions."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Calibration samples (12, 20)."""
    return torch.randint(VOCAB_SIZE, (12, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer without padding, beginning or end."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture
def llama_folder(llama, tokenizer, tmp_path):
    """A saved dense model with its tokenizer."""
    folder = tmp_path / "dense"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
