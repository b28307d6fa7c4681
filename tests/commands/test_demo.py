"""The demo and the model that the package carries."""

import warnings
from importlib.resources import files

import pytest

from optimum_otprune.commands import demo

LIMIT = 3 * 2**20


def test_the_embedded_model_is_at_most_3_mb():
    sizes = [file.stat().st_size for file in (files("optimum_otprune.commands") / "demo_model").iterdir()]
    assert sum(sizes) <= LIMIT


@pytest.mark.filterwarnings("ignore:Token indices sequence length")
def test_the_demo_rescues_saves_and_reloads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_NUM_SAMPLES", 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = demo.run_demo(0.5, tmp_path / "out")
    by_name = {result.name: result for result in results}
    dense, default, dropped, reference = results
    assert dense.perplexity < default.perplexity < dropped.perplexity < reference.perplexity
    assert dense.perplexity < 60  # a trigram model has 70.8 on the same text
    assert default.parameters < 0.7 * dense.parameters
    assert by_name["otprune"].rescue_ratio > 0.2
    captured = capsys.readouterr()
    printed = captured.out
    for stage in (
        "Pruning by otprune ...",
        "Pruning by wanda_sp ...",
        "Evaluating dense ...",
        "Measuring speed ...",
    ):
        assert stage in captured.err
    before, after = (printed.split(f"It writes, {when}: ")[1].splitlines()[0] for when in ("before", "after"))
    assert before.startswith("Return a new")
    assert after.startswith("Return a new")
    assert len(before) > 30
    assert before != after
    assert "the table in docs/results.md is of 128" in printed
    assert "largest difference of logits 0." in printed
    assert "RESCUE EFFECT SUMMARY REPORT" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert reference.rescue_ratio < -1
    assert next(line for line in printed.splitlines() if line.startswith(reference.name)).endswith("harmful")
