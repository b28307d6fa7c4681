"""The benchmarks in small: what they write, what they do not measure twice, and what they say of the outcome."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from optimum_otprune import OTPruningConfig
from optimum_otprune.pruning.calibration.data import ModelLimits, calibration_tokens
from tests.conftest import make_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _cells
import elimination
import quality
import short_calibration

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (extra `bench`) is missing")


@pytest.fixture
def data(llama_folder, tokens, tmp_path) -> list[str]:
    """The options that name a tiny random model and its data."""
    torch.save(tokens, tmp_path / "seen.pt")
    torch.save(tokens.flip(0), tmp_path / "unseen.pt")
    given = {"model": llama_folder, "calibration": tmp_path / "seen.pt", "evaluation": tmp_path / "unseen.pt"}
    return [part for name, path in given.items() for part in (f"--{name}", str(path))] + ["--seqlen", "20"]


@pytest.fixture
def small(data, tmp_path) -> list[str]:
    """A run of quality.py: two methods, one ratio, two seeds."""
    plan = ["--variants", "flap", "otprune", "--ratios", "0.5", "--seeds", "0", "1", "--ablation-ratios"]
    return [*data, *plan, "--num-samples", "8", "--max-windows", "4", "--output", str(tmp_path / "out" / "tiny.json")]


@pytest.fixture
def measured(monkeypatch) -> list[dict]:
    """The options of every cell that quality.py measures, in order."""
    cells = []

    def spy(subject, options, samples):
        cells.append(options)
        return _cells.measure(subject, options, samples)

    monkeypatch.setattr(quality, "measure", spy)
    return cells


def test_a_result_names_model_data_versions_and_protocol_but_no_path(small, tmp_path):
    quality.main(small)
    written = (tmp_path / "out" / "tiny.json").read_text()
    assert str(tmp_path) not in written
    content = json.loads(written)
    subject = content["subject"]
    names = [subject[part][key] for part, key in (("model", "name"), ("calibration", "data"), ("evaluation", "data"))]
    assert names == ["dense", "seen.pt", "unseen.pt"]
    assert (subject["calibration"]["windows"], subject["evaluation"]["windows"]) == (12, 4)
    assert {"python", "torch", "transformers", "optimum_otprune"} <= content["environment"]["versions"].keys()
    assert content["environment"]["threads"] == 1
    assert content["settings"]["num_samples"] == 8


def test_the_seeds_of_a_cell_are_summed_up(small, tmp_path):
    quality.main(small)
    content = json.loads((tmp_path / "out" / "tiny.json").read_text())
    cells, summary, subject = content["measurements"], content["results"]["flap"]["0.5"], content["subject"]["model"]
    first, second = (cells[f"flap @ 0.5 # {seed}"] for seed in (0, 1))
    assert first["perplexity"] != second["perplexity"]
    assert summary["mean"] == pytest.approx((first["perplexity"] + second["perplexity"]) / 2)
    assert summary["std"] == pytest.approx(abs(first["perplexity"] - second["perplexity"]) / 2**0.5)
    assert summary["excess"] == pytest.approx((first["nll"] + second["nll"]) / 2 - cells["dense"]["nll"])
    assert summary["share_of_flap_excess"] == 1
    removed = subject["parameters"] - (first["parameters"] + second["parameters"]) / 2
    assert summary["parameters_removed"] == removed
    assert summary["ffn_share_removed"] == removed / (3 * 3 * 48 * 32)


def test_a_finished_run_measures_nothing_again_unless_told_to(small, measured, tmp_path):
    quality.main(small)
    before = (tmp_path / "out" / "tiny.json").read_bytes()
    assert len(measured) == 4
    quality.main(small)
    assert len(measured) == 4
    assert (tmp_path / "out" / "tiny.json").read_bytes() == before
    quality.main([*small, "--fresh"])
    assert len(measured) == 8


def test_an_interrupted_run_goes_on_where_it_stopped(small, measured, monkeypatch, tmp_path):
    def interrupted(subject, options, samples):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(options)
        return _cells.measure(subject, options, samples)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quality.main(small)
    assert len(json.loads((tmp_path / "out" / "tiny.json").read_text())["measurements"]) == 4  # with the dense one
    quality.main(small)
    assert len(measured) == 4


def test_other_data_or_another_setting_are_measured_anew(small, measured, tmp_path, capsys):
    quality.main(small)
    quality.main([*small, "--multiple-of", "2"])
    assert len(measured) == 8
    assert "measured again" not in capsys.readouterr().out  # cells, one by one
    torch.save(torch.randint(64, (12, 20)), tmp_path / "seen.pt")
    quality.main([*small, "--multiple-of", "2"])
    assert len(measured) == 12
    assert "tiny.json: subject changed; everything is measured again" in capsys.readouterr().out


def test_every_seed_draws_what_prune_would_draw_from_text(small, monkeypatch, tokens):
    drawn = {}

    def keep(subject, options, samples):
        drawn[options["seed"]] = samples
        return {"error": "not run"}

    monkeypatch.setattr(quality, "measure", keep)
    quality.main(small)
    for seed in (0, 1):
        config = OTPruningConfig(seed=seed, num_samples=8, seqlen=20)
        wanted = calibration_tokens(tokens.flatten(), config, None, ModelLimits(64, 40)).tokens
        assert torch.equal(drawn[seed], wanted)
    assert not torch.equal(drawn[0], drawn[1])


def test_what_a_model_cannot_do_is_told_in_the_table_and_below_it(data, tokenizer, tmp_path):
    folder = tmp_path / "qwen"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plan = ["--variants", "flap", "magnitude", "--ratios", "0.5", "--seeds", "0", "--ablation-ratios"]
    quality.main([*data, "--model", str(folder), *plan, "--output", str(tmp_path / "qwen.json")])
    page = (tmp_path / "qwen.md").read_text()
    assert "| flap | – |" in page
    assert "- flap: ConfigurationError: `intercept='always'`" in page
    assert "Not checked: the default was not measured" in page


def summaries(**perplexities):
    return {name: {str(ratio): {"mean": mean} for ratio, mean in by.items()} for name, by in perplexities.items()}


def test_the_checks_name_every_violation():
    found = summaries(otprune={0.1: 10.0, 0.2: 9.0, 0.5: 20.0}, flap={0.1: 11.0, 0.2: 9.0}, random={0.5: 19.0})
    assert quality.checks(found) == {
        "falls": ["10% to 20%"],
        "baselines_not_beaten": ["random at 50% (19.00 against 20.00)", "flap at 20% (9.00 against 9.00)"],
        "failed": [],
    }
    good = summaries(otprune={0.1: 10.0, 0.2: 11.0}, flap={0.1: 10.5, 0.2: 12.0})
    assert quality.check_lines(good).count(": yes.") == 2
    good["otprune"]["0.5"] = {"error": "NumericalError"}
    assert quality.check_lines(good).count(": yes (without 50%, where it failed).") == 2


def test_every_variant_is_a_valid_configuration():
    for options in _cells.VARIANTS.values():
        OTPruningConfig(**options)
    assert all(OTPruningConfig(**_cells.ABLATION[name]).selection == "obs" for name in _cells.ABLATION)


def test_short_calibration_measures_each_size_and_says_which_were_too_large(data, tmp_path):
    output = tmp_path / "calibration.json"
    plan = ["--multiples", "0.5", "2", "64", "--seeds", "0", "1", "--max-windows", "2"]
    short_calibration.main([*data, *plan, "--output", str(output)])
    content = json.loads(output.read_text())
    assert [entry["tokens"] for entry in content["results"]["otprune"]] == [24, 96]
    assert content["results"].keys() == {"drop", "refit to zero", "refit to identity", "otprune"}
    assert content["left_out"] == [64 * 48]
    page = output.with_suffix(".md").read_text()
    assert "| 24 (0.5 n) | 8 × 3 |" in page
    assert "fewer tokens: 3,072" in page
    assert "More calibration never hurts the default: " in page


@needs_matplotlib
def test_a_plot_of_one_seed_speaks_of_no_bands():
    from _plots import Line, _note

    one, several = Line("flap", [0.5], [90.0], [0.0]), Line("otprune", [0.5], [70.0], [1.5])
    assert _note([one], 100.0) == ""
    assert _note([one], 80.0) == "the frame ends at 80, outside: flap"
    assert _note([one, several], 80.0) == "bands: standard deviation over seeds; the frame ends at 80, outside: flap"


@needs_matplotlib
def test_both_benchmarks_draw_a_plot_that_their_page_shows(small, data, tmp_path):
    quality.main(small)
    plan = ["--multiples", "1", "2", "--seeds", "0", "--max-windows", "2"]
    short_calibration.main([*data, *plan, "--output", str(tmp_path / "out" / "calibration.json")])
    for name in ("tiny", "calibration"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in (tmp_path / "out" / f"{name}.md").read_text()


def test_a_wider_model_is_another_subject(llama_folder, small, measured):
    quality.main(small)
    make_llama(intermediate_size=56).save_pretrained(llama_folder)
    quality.main(small)
    assert len(measured) == 8


def test_the_cost_of_elimination_is_told_beside_its_targets(tmp_path, capsys):
    elimination.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "out" / "elimination.json")])
    figures = json.loads((tmp_path / "out" / "elimination.json").read_text())["figures"]
    printed = capsys.readouterr().out
    assert all(figure["name"] in printed for figure in figures)
    excesses = [figure for figure in figures if "greedy excess" in figure["name"]]
    assert [(figure["target"], figure["ok"]) for figure in excesses] == [("≤ 1%", True)] * 2
    assert all(abs(figure["value"]) < 1e-3 for figure in excesses)
