"""`otprune sweep`: what it prints and writes, and how it goes on."""

import json

import pytest
import torch
from safetensors.torch import save_file

from optimum_otprune.checkpoints.card.plots import can_plot
from optimum_otprune.commands import sweep as module
from optimum_otprune.commands.sweep import named_data
from tests.conftest import VOCAB_SIZE
from tests.conftest import run_command as run

OPTIONS = ("--multiple-of", "1", "--quality", "fast", "--quiet")


@pytest.fixture
def data(tmp_path):
    """The options that name a file of calibration samples and two of windows, with 3 of the samples in one of them."""
    generator = torch.Generator().manual_seed(4)
    samples = torch.randint(VOCAB_SIZE, (6, 40), generator=generator)
    others = torch.randint(VOCAB_SIZE, (4, 40), generator=generator)
    for name, ids in (("seen", samples), ("unseen", others), ("half", torch.cat([samples[:3], others]))):
        save_file({"input_ids": ids}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("seen", "unseen", "half")]
    return "--calibration-data", files[0], "--data", *files[1:]


def test_the_curve_is_printed_written_and_gone_on_with(llama_folder, data, tmp_path, capsys):
    arguments = ["sweep", llama_folder, "-o", tmp_path / "curve", *data, *OPTIONS]
    assert run(*arguments, "--ratios", "0.5") == 0
    first = capsys.readouterr().out
    assert run(*arguments, "--ratios", "0.5", "0.25") == 0
    lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Ratio 0.5: perplexity ")
    assert lines[0] == "Already there: 1 of the ratios."
    assert lines[1].startswith("Ratio 0.25: perplexity ")
    table = [line.split() for line in lines[3:8]]
    assert table[0] == ["unseen.safetensors", "half.safetensors"]
    assert [row[0] for row in table[2:]] == ["dense", "0.25", "0.5"]
    assert "3 of the 7 windows hold text that was calibrated on; expect a higher perplexity on other text." in lines
    values = json.loads((tmp_path / "curve" / "sweep.json").read_text())
    assert [point["pruning_ratio"] for point in values["points"]] == [0.25, 0.5]
    assert str(tmp_path) not in (tmp_path / "curve" / "sweep.json").read_text()
    written = ["sweep.json", "sweep.png"] if can_plot() else ["sweep.json"]
    assert sorted(path.name for path in (tmp_path / "curve").iterdir()) == written
    assert run(*arguments, "--method", "flap") == 1
    assert "was begun with another `method` of the configuration" in capsys.readouterr().err


def test_without_a_folder_nothing_is_written(llama_folder, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("sweep", llama_folder, *data, *OPTIONS, "--ratios", "0.5") == 0
    assert "  0.5" in capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())


def test_without_matplotlib_one_sentence_says_so(llama_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "can_plot", lambda: False)
    assert run("sweep", llama_folder, "-o", tmp_path / "curve", *data, *OPTIONS, "--ratios", "0.5") == 0
    assert "A plot needs matplotlib: pip install 'optimum_otprune[plots]'." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "curve").iterdir()] == ["sweep.json"]


def test_a_folder_in_the_model_is_refused_before_it_is_loaded(llama_folder, data, capsys):
    assert run("sweep", llama_folder, "-o", llama_folder / "curve", *data, *OPTIONS) == 1
    assert "lies inside the source model" in capsys.readouterr().err
    assert not (llama_folder / "curve").exists()


def test_data_are_named_without_their_folders(tmp_path):
    (tmp_path / "some").mkdir()
    named = named_data(["user/text", f"{tmp_path}/some", f"{tmp_path}/other/some"])
    assert list(named) == ["user/text", "some", "some (2)"]
