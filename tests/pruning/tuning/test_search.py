"""The search over configurations: what it tries, what it keeps, how it goes on, and what it refuses."""

import copy
import json
import logging
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import (
    CalibrationDataError,
    ConfigurationError,
    MissingExtraError,
    NumericalError,
    StudyError,
)
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import forward_seconds
from optimum_otprune.pruning import preparation
from optimum_otprune.pruning.tuning import search as tuning
from optimum_otprune.pruning.tuning.latency import width_for_latency
from optimum_otprune.pruning.tuning.search import split_samples
from optimum_otprune.pruning.tuning.search_space import (
    Choices,
    assemble,
    check_search_space,
    default_search_space,
    sample_config,
    unread_fields,
)
from tests.conftest import VOCAB_SIZE, make_llama
from tests.models.test_contract import build
from tests.models.test_passes import DISK

SPACE = {"target_correction": (0.0, 1.0), "ridge_prior": ["identity", "transport"]}


@pytest.fixture
def samples():
    return torch.randint(VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(2))


def make_pruner(model=None, **options) -> OTPruner:
    model = make_llama(num_hidden_layers=1, intermediate_size=24) if model is None else model
    return OTPruner(model, OTPruningConfig(**{"pruning_ratio": 0.5, "multiple_of": 1, **options}))


def tune(pruner, samples, **arguments):
    return pruner.tune(samples, **{"num_trials": 3, "search_space": SPACE, "progress": False, **arguments})


def tried(pruner):
    return [(trial.config.to_dict(), trial.perplexity, trial.error) for trial in pruner.tuning.trials]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"intercept": "always"}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("llama", {"method": "structured_afr_with_intrafusion"}),
    ],
)
def test_the_model_is_the_same_afterwards_bit_for_bit(name, options, samples):
    model = build(name).train()
    model.base_model.get_input_embeddings().eval()  # modes of single modules too
    before = copy.deepcopy(model.state_dict())
    config, parameters = model.config.to_dict(), dict(model.named_parameters())
    modes = [module.training for module in model.modules()]
    tune(make_pruner(model, **options), samples, num_trials=2, search_space={"selection": ["obs", "top"]})
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert modes == [module.training for module in model.modules()]
    down = ffn_blocks(model)[0].projection("down")
    recorded = [getattr(down, name) for name in ("in_features", "nx") if hasattr(down, name)]
    assert recorded in ([], [48])


def test_a_model_that_is_offloaded_to_disk_is_put_back_too(llama_folder, samples, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, device_map=DISK, offload_folder=tmp_path / "offload")
    before = [block.read() for block in ffn_blocks(model)]
    pruner = make_pruner(model, intercept="always")
    plain = make_pruner(AutoModelForCausalLM.from_pretrained(llama_folder), intercept="always")
    for one in (pruner, plain):
        tune(one, samples, num_trials=2)
    for dense, after in zip(before, (block.read() for block in ffn_blocks(model))):
        assert [part is None for part in dense] == [part is None for part in after]
        assert all(torch.equal(one, other) for one, other in zip(dense, after) if one is not None)
    assert [trial.perplexity for trial in pruner.tuning.trials] == [trial.perplexity for trial in plain.tuning.trials]


def test_the_first_trial_is_the_given_configuration_and_the_best_is_kept(samples):
    pruner = make_pruner()
    given = pruner.config
    best = tune(pruner, samples, num_trials=4)
    result = pruner.tuning
    assert result.trials[0].config == result.base == given
    assert best == pruner.config == result.best.config
    assert result.best_perplexity == min(trial.perplexity for trial in result.trials) <= result.base_perplexity
    assert {trial.config.pruning_ratio for trial in result.trials} == {0.5}
    assert len({trial.config.target_correction for trial in result.trials}) > 1


def test_a_trials_perplexity_is_that_of_pruning_on_one_part_and_measuring_on_the_other(samples):
    pruner = make_pruner()
    tune(pruner, samples, num_trials=1, seed=3)
    fit, heldout = split_samples(samples, 0.25, seed=3)
    again = make_pruner()
    again.prune(fit, progress=False)
    assert again.evaluate(heldout, progress=False)["perplexity"] == pruner.tuning.base_perplexity


def test_the_dense_model_writes_once_for_all_trials(samples, monkeypatch):
    written, write = [], preparation.written_samples
    monkeypatch.setattr(preparation, "written_samples", lambda *given: written.append(given) or write(*given))
    tune(make_pruner(self_calibration=0.5), samples)
    assert len(written) == 1


@pytest.mark.parametrize(("share", "heldout"), [(0.01, 1), (0.25, 2), (0.99, 7)])
def test_samples_are_split_once_by_seed_and_none_is_on_both_sides(samples, share, heldout):
    fit, validation = split_samples(samples, share, seed=0)
    assert (len(fit), len(validation)) == (8 - heldout, heldout)
    rows = [tuple(row.tolist()) for row in torch.cat([fit, validation])]
    assert sorted(rows) == sorted(tuple(row.tolist()) for row in samples)
    assert torch.equal(split_samples(samples, share, seed=0)[0], fit)
    with pytest.raises(CalibrationDataError, match="at least 2 calibration samples"):
        split_samples(samples[:1], share, seed=0)


def test_two_searches_with_one_seed_are_equal_and_another_seed_is_not(samples):
    runs = [make_pruner() for _ in range(3)]
    for run, seed in zip(runs, (0, 0, 1)):
        tune(run, samples, seed=seed)
    assert tried(runs[0]) == tried(runs[1]) != tried(runs[2])


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(samples, tmp_path, monkeypatch):
    whole, first, second = (make_pruner() for _ in range(3))
    tune(whole, samples, num_trials=4)
    measure, calls = tuning.evaluate_perplexity, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(tuning, "evaluate_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(first, samples, num_trials=4, study=tmp_path / "study.log")
    assert tried(first) == tried(whole)[:2]
    assert first.model.config.intermediate_size == 24
    monkeypatch.undo()
    best = tune(second, samples, num_trials=4, study=tmp_path / "study.log")
    assert tried(second) == tried(whole)
    assert best == whole.config


def test_trials_of_earlier_runs_count(samples, tmp_path, monkeypatch):
    first, second = make_pruner(), make_pruner()
    tune(first, samples, study=tmp_path / "study.log")
    monkeypatch.setattr(tuning, "prune_model", None)  # nothing is left to do
    seen = []
    best = tune(second, samples, study=str(tmp_path / "study.log"), on_trial=seen.append)
    assert best == first.config
    assert [len(result.trials) for result in seen] == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "another model"),
        ("samples", "another calibration samples"),
        ("config", r"another `holdout_share` of the configuration \(0.25, now 0.4\)"),
        ("space", "another search space"),
        ("seed", r"another tuning seed \(0, now 5\)"),
        ("share", r"another validation_share \(0.25, now 0.5\)"),
    ],
)
def test_a_study_of_something_else_is_refused_with_the_difference(change, message, samples, tmp_path):
    path = tmp_path / "study.log"
    tune(make_pruner(), samples, num_trials=1, study=path)
    model = make_llama(num_hidden_layers=1, intermediate_size=24)
    if change == "model":
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    options = {"holdout_share": 0.4} if change == "config" else {}
    arguments = {
        "space": {"search_space": {"ridge_prior": ["zero"]}},
        "seed": {"seed": 5},
        "share": {"validation_share": 0.5},
    }.get(change, {})
    data = samples.flip(0) if change == "samples" else samples
    with pytest.raises(StudyError, match=message):
        tune(make_pruner(model, **options), data, study=path, **arguments)


@pytest.mark.parametrize(
    "content", ["not a study\n", "{}\n", "[1]\n", '{"op_code": 0, "study_name": "another"}\n', "\xff"]
)
def test_a_file_that_is_no_study_is_one_clear_error(content, samples, tmp_path):
    (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(StudyError, match="'notes.txt' is no study of `tune`"):
        tune(make_pruner(), samples, study=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == content


def test_a_study_that_is_a_link_is_refused(samples, tmp_path):
    (tmp_path / "study.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StudyError, match=r"'study.log' is no study of `tune` \(it is a link\)"):
        tune(make_pruner(), samples, study=tmp_path / "study.log")
    assert not (tmp_path / "elsewhere").exists()


def test_a_study_in_a_folder_that_does_not_exist_is_one_clear_error(samples, tmp_path):
    with pytest.raises(StudyError, match="'study.log' cannot be read or written"):
        tune(make_pruner(), samples, study=tmp_path / "absent" / "study.log")


def test_a_process_that_was_killed_before_the_first_trial_leaves_a_study_to_begin(samples, tmp_path):
    whole, second = make_pruner(), make_pruner()
    tune(whole, samples, num_trials=1, study=tmp_path / "whole.log")
    lines = (tmp_path / "whole.log").read_text().splitlines(keepends=True)
    for content in ("", lines[0]):
        (tmp_path / "study.log").write_text(content)
        tune(second, samples, num_trials=1, study=tmp_path / "study.log")
        assert tried(second) == tried(whole)
        (tmp_path / "study.log").unlink()


def test_a_trial_that_a_killed_process_was_at_does_not_count(samples, tmp_path):
    whole, second = make_pruner(), make_pruner()
    tune(whole, samples, num_trials=2, study=tmp_path / "whole.log")
    lines = (tmp_path / "whole.log").read_text().splitlines(keepends=True)
    (tmp_path / "study.log").write_text("".join(lines[:-1]))  # the last line tells the result
    tune(second, samples, num_trials=2, study=tmp_path / "study.log")
    assert tried(second) == tried(whole)
    assert [trial.number for trial in second.tuning.trials] == [0, 2]


def test_a_line_that_a_killed_process_left_half_written_is_dropped(samples, tmp_path):
    path = tmp_path / "study.log"
    first, second = make_pruner(), make_pruner()
    tune(first, samples, num_trials=2, study=path)
    with path.open("a") as file:
        file.write('{"op_code":4,"wor')
    tune(second, samples, num_trials=3, study=path)
    assert tried(second)[:2] == tried(first)


def test_a_trial_that_fails_is_logged_and_kept_with_its_message(samples, monkeypatch, caplog):
    measure, calls = tuning.evaluate_perplexity, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise NumericalError("overflow")
        return measure(*arguments, **options) | ({"perplexity": float("inf")} if len(calls) == 3 else {})

    monkeypatch.setattr(tuning, "evaluate_perplexity", failing)
    pruner = make_pruner()
    with caplog.at_level(logging.WARNING, "optimum_otprune.pruning.tuning.search"):
        tune(pruner, samples, num_trials=4)
    assert [trial.error for trial in pruner.tuning.trials][1] == "overflow"
    assert "perplexity on the held-out samples is infinite" in pruner.tuning.trials[2].error
    assert [trial.perplexity is None for trial in pruner.tuning.trials] == [False, True, True, False]
    assert "Trial 1: failed: overflow" in caplog.text


def test_a_failure_of_the_given_configuration_is_raised(samples):
    with pytest.raises(ConfigurationError, match="needs an output bias"):
        tune(make_pruner(build("mistral"), intercept="always"), samples)


def test_any_other_error_is_no_trial_and_leaves_the_model_as_it_was(samples, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("device")

    monkeypatch.setattr(tuning, "evaluate_perplexity", broken)
    pruner = make_pruner()
    with pytest.raises(RuntimeError, match="device"):
        tune(pruner, samples, study=tmp_path / "study.log")
    assert pruner.tuning.trials == ()
    assert pruner.model.config.intermediate_size == 24


def test_no_trial_starts_after_the_timeout_but_the_first(samples):
    pruner = make_pruner()
    tune(pruner, samples, timeout=1e-9)
    assert len(pruner.tuning.trials) == 1


def test_numbers_of_numpy_and_the_largest_seed_search_as_plain_ones_do(samples):
    found = []
    for whole, real in ((int, float), (np.int64, np.float32)):
        pruner = make_pruner()
        numbers = {
            "num_trials": whole(2),
            "batch_size": whole(4),
            "validation_share": real(0.25),
            "timeout": real(1e4),
        }
        tune(pruner, samples, seed=whole(2**63 - 1), **numbers)
        found.append([(trial.config, trial.perplexity) for trial in pruner.tuning.trials])
    assert found[0] == found[1]


@pytest.mark.parametrize("as_share", [False, True])
def test_every_trial_meets_a_target(samples, as_share):
    model = make_llama(num_hidden_layers=1, intermediate_size=24)
    dense = model.num_parameters()
    target = 0.87 if as_share else dense - 12 * 3 * 32
    pruner = OTPruner(model, OTPruningConfig(target_parameters=target, multiple_of=1))
    best = tune(pruner, samples)
    assert (best.pruning_ratio, best.target_parameters) == (None, target)
    pruner.prune(samples, progress=False)
    most = int(0.87 * dense) if as_share else target
    assert most - 4 * 32 < pruner.model.num_parameters() <= most
    with pytest.raises(ConfigurationError, match="cannot be met"):
        tune(OTPruner(make_llama(), OTPruningConfig(target_parameters=10)), samples)


def test_without_optuna_one_error_names_the_extra(samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install optimum_otprune\[tune\]") as caught:
        tune(make_pruner(), samples)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trials": 0}, "`num_trials` is 0; want an integer >= 1"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5"),
        ({"timeout": 0}, "`timeout` is 0; want a number > 0"),
        ({"timeout": float("nan")}, "`timeout` is nan"),
        ({"validation_share": 1}, "`validation_share` is 1; want a number > 0 and < 1"),
        ({"validation_share": None}, "`validation_share` is None; want a number > 0 and < 1"),
        ({"target_latency": -1}, "`target_latency` is -1"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**63}, "`seed` is 9223372036854775808; want an integer >= 0 and <= 9223372036854775807"),
        ({"num_trials": 2**31}, "`num_trials` is 2147483648; want an integer >= 1 and <= 2147483647"),
        ({"timeout": float("inf")}, "`timeout` is inf"),
        ({"target_latency": 10**400}, "`target_latency` is 10"),
        ({"latency_shape": (1, 8)}, "`latency_shape` would be ignored"),
        ({"latency_shape": 8, "target_latency": 1.0}, "want two integers"),
        ({"latency_shape": (0, 8), "target_latency": 1.0}, r"`latency_shape\[0\]` is 0"),
        ({"search_space": {}}, "`search_space` is {}; want a dictionary"),
        ({"search_space": {"ridge_priors": ["zero"]}}, "Did you mean 'ridge_prior'"),
        ({"search_space": {"ridge_prior": ["zeros"]}}, "Did you mean 'zero'"),
        ({"search_space": {"ridge_prior": []}}, "want a list of choices, not empty"),
        ({"search_space": {"ridge_prior": ("zero", "identity")}}, "want a list of choices"),
        ({"search_space": {"ridge_prior": ["zero", "zero"]}}, "names a choice twice"),
        ({"search_space": {"target_correction": (0.0, 2.0)}}, "`target_correction` is 2.0"),
        ({"search_space": {"target_correction": (0.5, 0.5)}}, "low < high"),
        ({"search_space": {"pruning_ratio": (0.1, 0.5)}}, "decides how much is pruned"),
        ({"search_space": {"num_samples": [8, 16]}}, "decides the data"),
        ({"search_space": {"importance": ["wanda"]}}, "with selection='obs' the importance only breaks ties"),
        (
            {"search_space": {"strategy": ["balanced"], "source_distribution": ["uniform"]}},
            "`source_distribution=.* contradicts `strategy|no combination can take: others exclude it",
        ),
        ({"search_space": {"epsilon": (0.1, 1.0)}}, "does not read it"),
        ({"search_space": {"fuse": [["gate"], ["down"]]}}, "holds .'gate',., which no combination can take"),
    ],
)
def test_a_wrong_argument_is_an_error_before_any_work(arguments, message, samples, monkeypatch):
    monkeypatch.setattr(tuning, "prune_model", None)
    with pytest.raises(ConfigurationError, match=message):
        tune(make_pruner(), samples, **arguments)


class _Fixed:
    """Picks given values where they are offered."""

    def __init__(self, **values):
        self.values, self.labels = values, []

    def __call__(self, name, label, domain):
        self.labels.append(label)
        if isinstance(domain, Choices):
            return self.values[name] if self.values[name] in domain.values else domain.values[0]
        return self.values.get(name, domain.low)


def test_fields_that_make_no_difference_are_not_sampled():
    base = OTPruningConfig()
    space = check_search_space({"importance": ["wanda", "magnitude"], "selection": ["obs", "top"], **SPACE}, base)
    obs, top = (_Fixed(selection=name, importance="wanda", ridge_prior="identity") for name in ("obs", "top"))
    assert sample_config(base, space, obs).importance == "fluctuation"
    assert sample_config(base, space, top).importance == "wanda"
    assert set(top.labels) - set(obs.labels) == {"importance"}


def test_choices_that_contradict_those_made_before_are_not_offered():
    base = OTPruningConfig()
    space = check_search_space({"ridge_prior": ["identity", "transport"], "fuse": [[], ["down"]]}, base)
    pick = _Fixed(ridge_prior="transport", fuse=())
    config = sample_config(base, space, pick)
    assert (config.ridge_prior, config.fuse) == ("transport", ("down",))
    assert pick.labels == ["ridge_prior", "fuse of ('down',)"]
    config = sample_config(base, space, _Fixed(ridge_prior="identity", fuse=()))
    assert (config.fuse, config.solver, config.cost) == ((), None, None)


@pytest.mark.parametrize("method", ["otprune", "structured_afr_with_intrafusion", "least_squares", "flap"])
def test_every_combination_of_a_wide_space_is_a_valid_configuration(method):
    base = OTPruningConfig(method=method)
    wide = {
        "selection": ["obs", "top"],
        "ridge_prior": ["zero", "identity", "transport"],
        "compensation": ["none", "bias", "ridge"],
        "intercept": ["never", "auto", "always"],
        "fuse": [[], ["down"], ["gate", "up", "down"]],
        "solver": ["nearest", "emd", "sinkhorn"],
        "normalization": ["identity", "corrected"],
        "target": ["most_important", "cluster_centroid"],
        "cost": ["activation", "weight"],
        "source_distribution": ["uniform", "robust"],
        "epsilon": (0.01, 0.1),
    }
    fixed = {"least_squares": ["compensation"], "flap": ["compensation", "ridge_prior", "intercept"]}.get(method, [])
    space = check_search_space({name: domain for name, domain in wide.items() if name not in fixed}, base)
    generator = torch.Generator().manual_seed(0)

    def pick(name, label, domain):
        values = domain.values if isinstance(domain, Choices) else domain
        return values[int(torch.randint(len(values), (), generator=generator))]

    configs = [sample_config(base, space, pick) for _ in range(40)]
    assert all(config.pruning_ratio == base.pruning_ratio for config in configs)
    assert len({config.to_json_string() for config in configs}) > 10


def test_the_default_space_is_what_the_method_leaves_open():
    ours = default_search_space(OTPruningConfig(quality="fast"), residual=True, can_hold_intercept=True)
    assert {"selection", "importance", "ridge_prior", "target_correction", "intercept", "holdout_share"} == set(ours)
    assert {"target_correction", "intercept"} & set(default_search_space(OTPruningConfig(), False, False)) == set()
    trained = default_search_space(OTPruningConfig(reconstruction_steps=100), True, True)
    assert trained["reconstruction_steps"] == (50, 200)
    with pytest.raises(ConfigurationError, match="'wanda_sp' leaves nothing to search over"):
        default_search_space(OTPruningConfig(method="wanda_sp"), True, True)
    for config in (OTPruningConfig(), OTPruningConfig(method="structured_afr_with_intrafusion")):
        check_search_space(default_search_space(config, True, True), config)


def test_the_default_space_runs(samples):
    pruner = make_pruner(reconstruction_steps=2)
    tune(pruner, samples, search_space=None, num_trials=4)
    assert all(trial.error is None for trial in pruner.tuning.trials)


def test_assembling_drops_what_sampled_fields_leave_without_a_use():
    config = assemble(OTPruningConfig(), {"compensation": "none", "fuse": ()})
    assert (config.solver, config.ridge_prior, config.intercept) == (None, None, None)
    assert "target_correction" in unread_fields(config)
    assert assemble(OTPruningConfig(), {"method": "flap"}) == OTPruningConfig(method="flap")
    assert assemble(OTPruningConfig(), {"quality": "best"}) == OTPruningConfig(quality="best")


def seconds_by_width(model) -> float:
    return 0.5 + ffn_blocks(model)[0].intermediate_size / 100


@pytest.mark.parametrize(
    ("target", "multiple_of", "width"), [(0.9, 1, 40), (0.9, 16, 32), (0.973, 1, 47), (0.52, 2, 2)]
)
def test_bisection_finds_the_largest_width_that_is_fast_enough(llama, target, multiple_of, width):
    before = copy.deepcopy(llama.state_dict())
    assert width_for_latency(PrunableModel.of(llama), target + 1e-9, multiple_of, seconds_by_width) == width
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())


@pytest.mark.parametrize(
    ("target", "message"), [(0.4, "with only 1 of 48 channels .* still takes"), (2.0, "no pruning")]
)
def test_a_latency_that_cannot_be_met_or_is_met_already_is_an_error(llama, target, message):
    with pytest.raises(ConfigurationError, match=message):
        width_for_latency(PrunableModel.of(llama), target, 1, seconds_by_width)


def test_a_forward_pass_takes_time(llama):
    assert 0 < forward_seconds(llama, (2, 8)) < 10


def test_a_target_latency_fixes_the_ratio_once_for_all_runs_of_a_study(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "forward_seconds", lambda model, shape: seconds_by_width(model) * shape[0])
    arguments = {"target_latency": 2.4 + 1e-9, "latency_shape": (4, 8), "study": tmp_path / "study.log"}
    pruner = make_pruner(pruning_ratio=0.2)
    assert tune(pruner, samples, num_trials=2, **arguments).pruning_ratio == pytest.approx(1 - 10 / 24)
    monkeypatch.setattr(tuning, "forward_seconds", None)  # not measured again
    again = make_pruner(pruning_ratio=0.2)
    tune(again, samples, num_trials=3, **arguments)
    assert {trial.config.pruning_ratio for trial in again.tuning.trials} == {pruner.config.pruning_ratio}
    with pytest.raises(
        ConfigurationError, match="`target_latency=.*` and `target_size='1kB'` say in more than one way"
    ):
        tune(OTPruner(make_llama(), OTPruningConfig(target_size="1kB")), samples, target_latency=1.0)


def test_the_best_configuration_is_a_file_that_loads(samples, tmp_path):
    best = tune(make_pruner(), samples)
    (tmp_path / "best.json").write_text(best.to_json_string())
    assert OTPruningConfig.from_pretrained(tmp_path / "best.json") == best
    assert json.loads((tmp_path / "best.json").read_text())["pruning_ratio"] == 0.5
