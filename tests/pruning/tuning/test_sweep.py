"""The quality curve of one model: what its points are, how it goes on, and what it refuses."""

import copy
import json

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import CalibrationDataError, ConfigurationError, NumericalError, OutputError, StudyError
from optimum_otprune.models.defaults import SWEEP_FILE, SWEEP_PLOT
from optimum_otprune.pruning import pipeline, preparation
from optimum_otprune.pruning.tuning import sweep as module
from tests.conftest import VOCAB_SIZE, make_llama

RATIOS = (0.25, 0.5)


@pytest.fixture
def windows():
    return torch.randint(VOCAB_SIZE, (5, 12), generator=torch.Generator().manual_seed(3))


def make_pruner(model=None, **options) -> OTPruner:
    return OTPruner(model or make_llama(), OTPruningConfig(**{"multiple_of": 1, "quality": "fast", **options}))


def sweep(pruner, tokens, windows, ratios=RATIOS, **options):
    return pruner.sweep(ratios, tokens, windows, **{"progress": False, **options})


def without_seconds(result) -> dict:
    values = result.to_dict()
    for point in (values["dense"], *values["points"]):
        del point["seconds"]
    return values


@pytest.fixture
def prunings(monkeypatch):
    """The ratios that were pruned to."""
    made = []
    prune_model = module.prune_model

    def counted(prunable, recipe, *others):
        made.append(recipe.config.pruning_ratio)
        return prune_model(prunable, recipe, *others)

    monkeypatch.setattr(module, "prune_model", counted)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "fo_snip"},
        {"quality": "best", "reconstruction_steps": 2},
        {"allocation": "adaptive", "self_calibration": 0},
        {"layer_ratios": {1: 0.125}},
    ],
)
def test_each_point_is_that_of_a_dense_model_pruned_by_itself(options, tokens, windows):
    result = sweep(make_pruner(**options), tokens, windows)
    for point in result.points:
        alone = make_pruner(pruning_ratio=point.pruning_ratio, **options)
        report = alone.prune(tokens, progress=False)
        assert point.widths == report.widths
        assert point.parameters == report.parameters_after
        assert point.perplexities["token ids"] == alone.evaluate(windows, progress=False)["perplexity"]
    dense = make_pruner().evaluate(windows, progress=False)
    assert result.dense.perplexities == {"token ids": dense["perplexity"]}
    assert [point.pruning_ratio for point in result.points] == list(RATIOS)


def test_the_model_and_the_pruner_are_the_same_afterwards_bit_for_bit(tokens, windows):
    pruner = make_pruner(make_llama().train())
    before, config = copy.deepcopy(pruner.model.state_dict()), pruner.model.config.to_dict()
    own = pruner.config
    sweep(pruner, tokens, windows)
    assert all(torch.equal(before[name], value) for name, value in pruner.model.state_dict().items())
    assert pruner.model.config.to_dict() == config
    assert pruner.model.training
    assert pruner.config == own
    assert pruner.report is None


def test_what_the_dense_model_is_asked_for_is_asked_once(monkeypatch, tokens, windows):
    prepared = []
    prepare = pipeline.prepare
    monkeypatch.setattr(pipeline, "prepare", lambda *given: prepared.append(given) or prepare(*given))
    sweep(make_pruner(quality="best", reconstruction_steps=0), tokens, windows)
    assert len(prepared) == 1


@pytest.mark.parametrize("options", [{}, {"allocation": "adaptive", "non_uniform_format": "per_layer_config"}])
def test_the_dense_model_writes_once_for_all_ratios(monkeypatch, tokens, windows, options):
    written, write = [], preparation.written_samples
    monkeypatch.setattr(preparation, "written_samples", lambda *given: written.append(given) or write(*given))
    sweep(make_pruner(self_calibration=0.5, **options), tokens, windows)
    assert len(written) == 1


def test_an_interrupted_curve_goes_on_with_what_is_there(tmp_path, tokens, windows, prunings):
    folder = tmp_path / "new" / "curve"

    def interrupt(result):
        if result.points:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(make_pruner(), tokens, windows, folder=folder, on_point=interrupt)
    assert [point["pruning_ratio"] for point in json.loads((folder / SWEEP_FILE).read_text())["points"]] == [0.25]
    result = sweep(make_pruner(), tokens, windows, ratios=(0.5, 0.25, 0.1), folder=folder)
    assert prunings == [0.25, 0.1, 0.5]
    assert without_seconds(result) == without_seconds(sweep(make_pruner(), tokens, windows, (0.1, 0.25, 0.5)))
    assert [file.name for file in folder.iterdir()] == [SWEEP_FILE]


@pytest.mark.parametrize(
    ("options", "changes", "what"),
    [
        ({"method": "flap"}, {}, "`method` of the configuration \\('otprune', now 'flap'\\)"),
        ({}, {"model": {"num_hidden_layers": 2}}, "another model"),
        ({}, {"tokens": 1}, "another calibration samples"),
        ({}, {"windows": 1}, "another evaluation data"),
    ],
)
def test_another_model_data_or_configuration_is_refused_and_the_file_stays(
    tmp_path, tokens, windows, options, changes, what, prunings
):
    sweep(make_pruner(), tokens, windows, (0.5,), folder=tmp_path)
    before = (tmp_path / SWEEP_FILE).read_bytes()
    other = make_pruner(make_llama(**changes.get("model", {})), **options)
    tokens, windows = tokens[changes.get("tokens", 0) :], windows[changes.get("windows", 0) :]
    with pytest.raises(StudyError, match=what):
        sweep(other, tokens, windows, folder=tmp_path)
    assert (tmp_path / SWEEP_FILE).read_bytes() == before
    assert prunings == [0.5]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda values: [], "it is no object of format 1"),
        (lambda values: {**values, "format": 2}, "it is no object of format 1"),
        (lambda values: {**values, "data": {}}, "`data` is missing"),
        (lambda values: {**values, "points": None}, "`points` or `fingerprint` is missing"),
        (lambda values: {**values, "points": [3]}, "a point is no object"),
        (lambda values: {**values, "dense": {**values["dense"], "widths": [0]}}, "has one that cannot be"),
        (lambda values: {**values, "dense": {**values["dense"], "perplexities": {}}}, "has one that cannot be"),
        (lambda values: {**values, "dense": {**values["dense"], "parameters": 0}}, "has one that cannot be"),
        (lambda values: {**values, "dense": {**values["dense"], "error": "x"}}, "dense model has no perplexity"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_and_stays(tmp_path, tokens, windows, damage, reason):
    sweep(make_pruner(), tokens, windows, (0.5,), folder=tmp_path)
    text = json.dumps(damage(json.loads((tmp_path / SWEEP_FILE).read_text())))
    (tmp_path / SWEEP_FILE).write_text(text)
    with pytest.raises(StudyError, match=f"is no quality curve .*{reason}"):
        sweep(make_pruner(), tokens, windows, folder=tmp_path)
    assert (tmp_path / SWEEP_FILE).read_text() == text


def test_a_ratio_that_fails_ends_itself_only_and_is_tried_again(tmp_path, monkeypatch, tokens, windows):
    prune_model = module.prune_model

    def failing(prunable, recipe, *others):
        if recipe.config.pruning_ratio == 0.5:
            raise NumericalError("No.")
        return prune_model(prunable, recipe, *others)

    monkeypatch.setattr(module, "prune_model", failing)
    result = sweep(make_pruner(), tokens, windows, (0.25, 0.5, 0.75), folder=tmp_path)
    assert [point.error for point in result.points] == [None, "No.", None]
    assert "  failed: No." in result.table()
    with pytest.raises(NumericalError, match="No."):  # nothing has succeeded yet, so all may fail
        sweep(make_pruner(), tokens, windows, (0.5,))
    monkeypatch.undo()
    result = sweep(make_pruner(), tokens, windows, (0.5,), folder=tmp_path)
    assert [point.error for point in result.points] == [None, None, None]


def test_several_data_sets_have_a_column_each(tokens, windows):
    result = sweep(make_pruner(), tokens, {"one": windows, "two": tokens[:3]})
    lines = result.table().splitlines()
    assert lines[0].split() == ["one", "two"]
    assert lines[1].split() == ["ratio", "channels", "parameters", "of", "dense", *["perplexity", "increase"] * 2]
    assert lines[2].split()[:4] == ["dense", "48", f"{result.dense.parameters:,}", "100.0%"]
    point, cells = result.points[1], lines[4].split()
    assert cells[:2] == ["0.5", "24"]
    assert cells[-2:] == [f"{point.perplexities['two']:,.2f}", f"{result.increase(point, 'two'):+.1%}"]
    assert result.data["two"]["seen_windows"] == 3


@pytest.mark.parametrize(
    ("ratios", "options", "error", "message"),
    [
        ((), {}, ConfigurationError, "`the number of ratios` is 0"),
        ((0.5, 1.0), {}, ConfigurationError, "`pruning_ratio` is 1.0"),
        ((0.5,), {"target_parameters": "70%"}, ConfigurationError, "so do the ratios. Leave it out"),
    ],
)
def test_ratios_that_cannot_be_are_refused_before_any_work(ratios, options, error, message, tokens, windows, prunings):
    with pytest.raises(error, match=message):
        sweep(make_pruner(**options), tokens, windows, ratios)
    assert not prunings


def test_options_that_cannot_be_are_refused(tokens, windows):
    with pytest.raises(ConfigurationError, match="Did you mean 'max_windows'"):
        sweep(make_pruner(), tokens, windows, max_window=3)
    with pytest.raises(ConfigurationError, match="`batch_size` is 0"):
        sweep(make_pruner(), tokens, windows, batch_size=0)
    with pytest.raises(CalibrationDataError, match="nothing to measure the perplexity on"):
        sweep(make_pruner(), tokens, {})


def test_a_picture_of_somebody_elses_is_not_replaced(tmp_path, tokens, windows):
    (tmp_path / SWEEP_PLOT).write_bytes(b"mine")
    with pytest.raises(OutputError, match=f"holds '{SWEEP_PLOT}', which no earlier run"):
        sweep(make_pruner(), tokens, windows, folder=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="'file' is a file"):
        sweep(make_pruner(), tokens, windows, folder=tmp_path / "file")
