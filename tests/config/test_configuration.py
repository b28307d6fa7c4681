"""The configuration: presets, checks, files."""

import copy
import inspect
import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import OPTIONS, OPTIONS_BY_NAME
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.config.presets import METHOD_FIELDS, METHODS
from optimum_otprune.config.resolve import FUNCTION_FIELDS, REGISTRIES
from optimum_otprune.errors import ConfigurationError, OTPruneError, OutputError
from optimum_otprune.functional.costs import costs
from optimum_otprune.functional.importance import importances
from optimum_otprune.functional.marginals import distributions, strategies
from optimum_otprune.functional.solvers import solve_transport, solvers
from optimum_otprune.functional.transport.plans import SolverSettings

REFERENCE = "structured_afr_with_intrafusion"


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_survives_dictionary_file_pickle_and_copy(method, tmp_path):
    config = OTPruningConfig(method=method, pruning_ratio=0.3)
    config.save_pretrained(tmp_path)
    copies = (
        OTPruningConfig.from_dict(config.to_dict()),
        OTPruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        OTPruningConfig.from_pretrained(tmp_path),
        OTPruningConfig.from_pretrained(tmp_path / CONFIG_FILE),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        config.replace(),
    )
    assert all(other == config for other in copies)
    assert config != config.replace(pruning_ratio=0.4)
    assert set(json.loads((tmp_path / CONFIG_FILE).read_text())) == {*OPTIONS_BY_NAME, "optimum_otprune_version"}


BAD_RATIOS = (-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "half", "0.5", True, None, [0.5], 1 + 0j)


@pytest.mark.figure("R6")
@pytest.mark.parametrize("ratio", BAD_RATIOS)
def test_a_ratio_outside_its_range_is_an_error_that_names_it(ratio):
    with pytest.raises(ConfigurationError, match="`pruning_ratio` is .*; want a number >= 0 and < 1"):
        OTPruningConfig(pruning_ratio=ratio)


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "otprun"),
        ("method", 3),
        ("multiple_of", 0),
        ("multiple_of", 2.0),
        ("multiple_of", True),
        ("multiple_of", None),
        ("importance", "wnda"),
        ("importance", 1),
        ("aggregation", "abs"),
        ("selection", "best"),
        ("cost", "weights"),
        ("source_distribution", "unifrom"),
        ("target_distribution", "unifrom"),
        ("strategy", "bold"),
        ("statistics", "max"),
        ("target", "centroid"),
        ("solver", "sinkhon"),
        ("normalization", "rows"),
        ("fuse", "down"),
        ("fuse", ["down", "output"]),
        ("fuse", 1),
        ("compensation", "lasso"),
        ("ridge_prior", "one"),
        ("target_correction", 1.1),
        ("target_correction", -0.1),
        ("target_correction", "half"),
        ("intercept", True),
        ("epsilon", 0.0),
        ("epsilon", float("nan")),
        ("mass_share", 0.0),
        ("mass_share", 1.01),
        ("marginal_penalty", -1),
        ("holdout_share", 0.0),
        ("holdout_share", 0.6),
        ("allocation", "greedy"),
        ("non_uniform_format", "zip"),
        ("reconstruction_batch_tokens", 0),
        ("score_batch_size", 0),
        ("dataset", 1),
        ("dataset", None),
        ("num_samples", 0),
        ("num_samples", "128"),
        ("seqlen", 1),
        ("seqlen", 2048.0),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_field(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}`") as caught:
        OTPruningConfig(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OTPruneError)


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("name", "suggestion"), [("solvr", "solver"), ("prunning_ratio", "pruning_ratio"), ("temperature", None)]
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(name, suggestion):
    message = f"Unknown option '{name}'." + (f" Did you mean '{suggestion}'" if suggestion else " Known: ")
    with pytest.raises(ConfigurationError, match=message):
        OTPruningConfig(**{name: 1})


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random", "importance": "wanda"}, "contradicts `method='random'`"),
        ({"method": "flap", "compensation": "none"}, "contradicts `method='flap'`"),
        ({"method": "wanda_sp", "solver": "emd"}, "would be ignored: nothing is transported"),
        ({"method": "wanda_sp", "aggregation": "signed"}, "no weight scores to aggregate"),
        ({"method": "magnitude", "ridge_prior": "zero"}, "only compensation='ridge'"),
        ({"method": "magnitude", "intercept": "always"}, "without compensation"),
        ({"target_distribution": "robust"}, "knows no capacities"),
        ({"method": REFERENCE, "strategy": "balanced", "source_distribution": "uniform"}, "contradicts `strategy="),
        ({"fuse": []}, "`fuse` must hold 'down'"),
        ({"target": "cluster_centroid"}, "contradicts `normalization='identity'`"),
        ({"target": "cluster_centroid", "normalization": "corrected"}, "contradicts `cost='activation'`"),
        ({"compensation": "bias", "intercept": "never"}, "is an intercept"),
    ],
)
def test_an_override_that_contradicts_or_would_be_ignored_is_an_error(options, message):
    with pytest.raises(ConfigurationError, match=message):
        OTPruningConfig(**options)


def test_an_importance_that_only_breaks_ties_is_said_to():
    with pytest.warns(UserWarning, match="only breaks ties; set selection='top'"):
        OTPruningConfig(importance="wanda")


def test_every_registered_name_can_be_chosen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in importances.names():
            assert OTPruningConfig(importance=name, selection="top").importance == importances.entry(name).name
        for name in distributions.names():
            for method in ("otprune", REFERENCE):
                config = OTPruningConfig(
                    method=method, solver="emd", source_distribution=name, target_distribution=name
                )
                assert (config.source_distribution, config.target_distribution) == (name, name)
                assert OTPruningConfig.from_dict(config.to_dict()) == config
        for name in solvers.names():
            assert OTPruningConfig(method=REFERENCE, solver=name).solver == name
        for name in costs.names():
            assert OTPruningConfig(cost=name).cost == name


@pytest.mark.parametrize("name", strategies)
def test_a_strategy_sets_statistics_and_both_distributions(name):
    config = OTPruningConfig(method=REFERENCE, strategy=name)
    strategy = strategies[name]
    assert (config.statistics, config.source_distribution, config.target_distribution) == tuple(strategy)


def test_a_distribution_of_ones_own_takes_the_strategys_place():
    config = OTPruningConfig(method=REFERENCE, source_distribution="uniform")
    assert (config.strategy, config.source_distribution, config.target_distribution) == (None, "uniform", "adaptive")


def test_a_field_that_the_method_has_no_use_for_is_none():
    config = OTPruningConfig(method="wanda_sp")
    unused = {name for name in METHOD_FIELDS if getattr(config, name) is None}
    assert {"solver", "cost", "ridge_prior", "aggregation", "strategy"} <= unused
    assert config.replace(method="otprune") == OTPruningConfig()


def test_a_file_of_a_newer_version_loads_with_a_warning(tmp_path):
    values = {**OTPruningConfig(seed=3).to_dict(), "optimum_otprune_version": "99.0", "telepathy": "on"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"written by optimum_otprune 99.0.*left out: telepathy"):
        assert OTPruningConfig.from_pretrained(tmp_path).seed == 3


def test_an_unknown_key_in_a_file_of_this_version_is_an_error(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**OTPruningConfig().to_dict(), "telepathy": "on"}))
    with pytest.raises(ConfigurationError, match="Unknown option 'telepathy'"):
        OTPruningConfig.from_pretrained(tmp_path)


def test_an_override_while_loading_decides_as_replace_does(tmp_path):
    OTPruningConfig().save_pretrained(tmp_path)
    for changes in ({"quality": "best"}, {"method": "flap"}, {"target_parameters": 1000}):
        assert OTPruningConfig.from_pretrained(tmp_path, **changes) == OTPruningConfig().replace(**changes)


def test_overrides_while_loading_are_checked(tmp_path):
    OTPruningConfig().save_pretrained(tmp_path)
    assert OTPruningConfig.from_pretrained(tmp_path, pruning_ratio=0.5).pruning_ratio == 0.5
    with pytest.raises(ConfigurationError, match="`pruning_ratio` is 5"):
        OTPruningConfig.from_pretrained(tmp_path, pruning_ratio=5)


@pytest.mark.figure("R6")
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "not json"])
def test_a_damaged_file_is_one_error(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ConfigurationError):
        OTPruningConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_configuration_is_one_error(tmp_path):
    with pytest.raises(ConfigurationError, match=f"want a file '{CONFIG_FILE}' there"):
        OTPruningConfig.from_pretrained(tmp_path)


def test_the_signature_lists_every_option():
    assert list(inspect.signature(OTPruningConfig.__init__).parameters)[1:] == [option.name for option in OPTIONS]


def test_a_type_checker_finds_a_wrong_type_a_wrong_choice_and_a_wrong_name(tmp_path):
    script = tmp_path / "script.py"
    wrong = (
        'OTPruningConfig(pruning_ratio="half")',
        'OTPruningConfig(selection="best")',
        "OTPruningConfig(prunning_ratio=0.5)",
        'OTPruner.from_pretrained("x", verify="yes")',
        'OTPruner.plan("x", devicemap="cpu")',
        'OTPruner.from_pretrained("x").push_to_hub("me/x", deadline="soon")',
        'OTPruner.from_pretrained("x").save_pretrained("x", create_pr=1)',
    )
    right = (
        'OTPruningConfig(pruning_ratio=0.5, quality="fast")',
        'OTPruner.from_pretrained("x", dtype="bfloat16", device_map={"": 0}).push_to_hub("me/x", private=True)',
    )
    script.write_text("\n".join(("from optimum_otprune import OTPruner, OTPruningConfig", *wrong, *right)))
    arguments = [str(script), "--ignore-missing-imports", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    mypy = pytest.importorskip("mypy.api", reason="of the extra `quality`")
    found = [line for line in mypy.run(arguments)[0].splitlines() if "error" in line]
    assert [line.split(":")[1] for line in found[:-1]] == ["2", "3", "4", "5", "6", "7", "8"], found


@pytest.mark.parametrize("option", FUNCTION_FIELDS)
def test_help_texts_name_only_what_is_registered_and_where_to_see_it_all(option):
    text, _, command = OPTIONS_BY_NAME[option].help.partition("; `otprune list ")
    assert REGISTRIES[command.partition("`")[0]] is FUNCTION_FIELDS[option]
    named = re.sub(r" \([^)]*\)|, …", "", text.partition(": ")[2]).split(", ")
    assert set(named) <= set(FUNCTION_FIELDS[option].names())


def test_the_help_text_of_the_strategy_names_them_all():
    assert all(name in OPTIONS_BY_NAME["strategy"].help for name in strategies)


UNREAD = [
    ({"epsilon": 0.1}, "the solver 'nearest' does not read it"),
    ({"solver": "emd", "mass_share": 0.5}, "the solver 'emd' does not read it"),
    ({"solver": "sinkhorn", "marginal_penalty": 2.0}, "the solver 'sinkhorn' does not read it"),
    ({"solver": "unbalanced", "epsilon": 0.1}, "the solver 'unbalanced' does not read it"),
    ({"method": "wanda_sp", "epsilon": 0.1}, "nothing is transported"),
    ({"method": "random", "holdout_share": 0.5}, "nothing is chosen on held-out tokens"),
    ({"method": "flap", "holdout_share": 0.5}, "nothing is chosen on held-out tokens"),
    ({"score_batch_size": 2}, "there is no backward pass"),
    ({"quality": "fast", "reconstruction_batch_tokens": 64}, "only reconstruction reads it"),
    ({"quality": "fast", "error_weighting": "gradient"}, "only reconstruction reads it"),
]
READ = [
    {"solver": "sinkhorn", "epsilon": 0.1},
    {"solver": "partial", "mass_share": 0.5},
    {"solver": "unbalanced", "marginal_penalty": 2.0},
    {"method": "wanda_sp", "fuse": ("down",), "solver": "sinkhorn", "epsilon": 0.1},
    {"quality": "fast", "holdout_share": 0.5},
    {"method": "random", "reconstruction_steps": 1, "holdout_share": 0.5, "reconstruction_batch_tokens": 64},
    {"method": "fo_snip", "score_batch_size": 2},
    {"source_distribution": "weight_aware", "score_batch_size": 2},
    {"error_weighting": "gradient", "score_batch_size": 2},
    {"allocation": "adaptive", "score_batch_size": 2},
]


@pytest.mark.figure("R6")
@pytest.mark.parametrize(("options", "reason"), UNREAD)
def test_a_number_that_nothing_reads_is_an_error_with_the_reason(options, reason):
    *_, name = options
    with pytest.raises(ConfigurationError, match=f"`{name}={options[name]!r}` would be ignored: .*{reason}"):
        OTPruningConfig(**options)


@pytest.mark.parametrize("options", READ, ids=str)
def test_a_number_that_something_reads_survives_the_file(options):
    config = OTPruningConfig(**options)
    assert OTPruningConfig.from_dict(json.loads(config.to_json_string())) == config == config.replace()


@pytest.mark.parametrize("name", solvers.names())
def test_a_solver_reads_the_numbers_that_its_registration_names(name):
    class Watched(SolverSettings):
        def __getattribute__(self, attribute):
            if attribute in SolverSettings._fields:
                read.add(attribute)
            return super().__getattribute__(attribute)

    read: set[str] = set()
    mass = torch.full((3,), 1 / 3, dtype=torch.float64)
    cost = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    plan = solve_transport(name, cost, mass, mass, Watched())
    other = solve_transport(name, cost, mass, torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64))
    if not torch.equal(plan.matrix, other.matrix):
        read.add("target_distribution")
    assert read == solvers.entry(name).reads


def test_a_solver_of_ones_own_may_read_every_number():
    solvers.register("of_ones_own")(solvers["nearest"])
    try:
        assert OTPruningConfig(solver="of_ones_own", epsilon=0.1, mass_share=0.5).mass_share == 0.5
    finally:
        solvers.unregister("of_ones_own")


def test_what_a_change_leaves_without_a_use_goes_back_to_its_default():
    config = OTPruningConfig(solver="sinkhorn", epsilon=0.1, holdout_share=0.5, target_distribution="robust")
    assert config.replace(solver="nearest") == OTPruningConfig(holdout_share=0.5)
    assert config.replace(method="wanda_sp") == OTPruningConfig(method="wanda_sp")
    with pytest.raises(ConfigurationError, match="`epsilon=0.2` would be ignored"):
        config.replace(solver="nearest", epsilon=0.2)


def test_a_file_that_was_written_with_numbers_that_nothing_reads_loads_with_a_warning(tmp_path):
    values = {**OTPruningConfig().to_dict(), "epsilon": 0.1, "score_batch_size": 2}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"sets `epsilon=0.1`, `score_batch_size=2`, which nothing reads"):
        assert OTPruningConfig.from_pretrained(tmp_path) == OTPruningConfig()
    del values["optimum_otprune_version"]  # written by hand
    with pytest.raises(ConfigurationError, match="`epsilon=0.1` would be ignored"):
        OTPruningConfig.from_dict(values)


def test_numbers_of_numpy_are_numbers():
    config = OTPruningConfig(
        pruning_ratio=np.float32(0.5),
        multiple_of=np.int64(16),
        holdout_share=np.float16(0.25),
        num_samples=np.uint8(4),
        seed=np.uint64(2**63 - 1),
        target_correction=np.int32(1),
        skip_layers=[np.int64(2)],
        layer_ratios={np.int16(1): np.float64(0.25)},
    )
    plain = OTPruningConfig(
        pruning_ratio=0.5,
        multiple_of=16,
        holdout_share=0.25,
        num_samples=4,
        seed=2**63 - 1,
        target_correction=1.0,
        skip_layers=[2],
        layer_ratios={1: 0.25},
    )
    assert config.to_json_string() == plain.to_json_string()
    assert OTPruningConfig(target_parameters=np.int64(1000)).to_json_string()


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63),
        ("seed", 2**64),
        ("seed", np.uint64(2**64 - 1)),
        ("seed", np.bool_(True)),
        ("num_samples", 2**31),
        ("num_samples", np.float32(4)),
        ("seqlen", 10**400),
        ("score_batch_size", 10**30),
        ("reconstruction_steps", 2**31),
        ("self_calibration", 10**400),
        ("multiple_of", np.int64(-1)),
        ("epsilon", 10**400),
        ("epsilon", np.float32("inf")),
        ("holdout_share", np.float64("nan")),
        ("pruning_ratio", np.float32(1)),
        ("skip_layers", [np.bool_(True)]),
        ("layer_ratios", {0: 10**400}),
        ("layer_ratios", {np.float64(1): 0.5}),
    ],
)
def test_a_number_out_of_range_is_an_error_that_names_the_field(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}` is .*; want "):
        OTPruningConfig(**{name: value})


def test_a_configuration_is_saved_in_a_home_folder_and_never_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("dear")
    (tmp_path / "cfg").mkdir()
    (tmp_path / "cfg" / CONFIG_FILE).symlink_to(tmp_path / "thesis.txt")
    OTPruningConfig(seed=3).save_pretrained("~/cfg")
    assert OTPruningConfig.from_pretrained("~/cfg").seed == 3
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg", "thesis.txt"]
    assert [path.name for path in (tmp_path / "cfg").iterdir()] == [CONFIG_FILE]
    with pytest.raises(OutputError, match=r"could not be written into 'thesis.txt': File exists\. Give a folder"):
        OTPruningConfig().save_pretrained("thesis.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 10**400}, "`seed` is 10*…; want an integer"),
        ({"seed": 10**5000}, "`seed` is a very large int; want an integer"),
        ({"pruning_ratio": 10**400}, "`pruning_ratio` is 10*…; want a number"),
        ({"skip_layers": [10**50]}, r"`skip_layers` is \[10*\]; want a list of integers >= 0 and <= 2147483647"),
        ({"layer_ratios": {10**50: 0.5}}, "`layer_ratios` is"),
        ({"kind_ratios": {"experts": 1.0}}, "`kind_ratios` is .* want a dictionary of numbers by name"),
        ({"kind_ratios": {"expert": 0.5}}, "Unknown entry of `kind_ratios` 'expert'.* Did you mean 'experts'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_values_without_bounds_are_refused_in_a_message_that_has_some(options, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        OTPruningConfig(**options)
    assert len(str(caught.value)) < 400


def test_a_multiple_may_be_named_by_a_purpose_and_a_file_keeps_the_name(tmp_path):
    config = OTPruningConfig(multiple_of="gguf")
    assert config.multiple == 256
    assert [OTPruningConfig(multiple_of=name).multiple for name in ("int4", "tensor-cores", 96)] == [128, 64, 96]
    config.save_pretrained(tmp_path)
    assert '"multiple_of": "gguf"' in (tmp_path / "otprune_config.json").read_text()
    assert OTPruningConfig.from_pretrained(tmp_path) == config
    assert config.fewest_options()["multiple_of"] == "gguf"
    with pytest.raises(
        ConfigurationError, match="Unknown `multiple_of` 'ggufs'. Did you mean 'gguf'.*Or give a number"
    ):
        OTPruningConfig(multiple_of="ggufs")
    with pytest.raises(
        ConfigurationError, match="`multiple_of` is 0; want an integer >= 1.*or one of gguf, int4, tensor"
    ):
        OTPruningConfig(multiple_of=0)
