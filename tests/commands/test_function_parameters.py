"""A parameter of a registered function, from the command line to the file, the card and the next run."""

import json
import shlex
import warnings
from argparse import ArgumentParser

import pytest
from safetensors.torch import save_file

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints.card.reproduction import Rerun, command, python_lines
from optimum_otprune.commands.arguments import config_options
from optimum_otprune.commands.parser import PruneCommand
from optimum_otprune.config.options_file import CONFIG_FILE, read_options
from optimum_otprune.errors import ConfigurationError, CustomFunctionError, RegistryError, StateError
from optimum_otprune.functional.importance import ChannelStatistics, importances
from optimum_otprune.functional.marginals import Strategy, distributions, register_strategy, strategies
from optimum_otprune.pruning.tuning.search_space import check_search_space, contains
from tests.conftest import run_command

FULL = "wanda_power:power=0.7,center=false"


@pytest.fixture(autouse=True)
def wanda_power():
    @importances.register("wanda_power", reference="https://example.org/paper", requires=("activations",), reads=())
    def function(statistics: ChannelStatistics, *, power: float = 0.5, center: bool = False):
        """Wanda with another power of the second moment."""
        powers.append(power)
        return statistics.weights.down.float().abs().sum(dim=0) * statistics.hidden_second_moment.float() ** power

    powers: list[float] = []
    yield powers
    importances.unregister("wanda_power")


def make(importance, **options) -> OTPruningConfig:
    return OTPruningConfig(importance=importance, selection="top", **options)


@pytest.mark.parametrize(
    "given",
    ["wanda_power:power=0.7", " wanda_power:center=false, power=.7", {"name": "wanda_power", "power": 0.7}, FULL],
)
def test_a_configuration_holds_one_text_and_every_way_to_write_it_is_equal(given, tmp_path):
    config = make(given)
    assert config.importance == FULL
    assert config == make(FULL) == config.replace() == config.replace(importance=given)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["importance"] == FULL
    assert OTPruningConfig.from_pretrained(tmp_path) == config
    assert read_options(tmp_path / CONFIG_FILE).importance == FULL
    assert config.fewest_options()["importance"] == FULL
    assert OTPruningConfig.from_dict({**config.to_dict(), "importance": given}) == config
    assert config != make("wanda_power")


@pytest.mark.parametrize("options", [{"importance": "wanda_power"}, {"importance": FULL, "quality": "best"}])
def test_the_printed_command_and_lines_make_an_equal_configuration(options):
    config = make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer options are tried
        fewest = config.fewest_options()
    line, run = command(fewest, Rerun("user/model", "out")), ArgumentParser()
    PruneCommand.parse_args(run)
    words = shlex.split(line.replace("\\\n", ""))
    assert OTPruningConfig(**config_options(run.parse_args(words[2:]))) == config
    namespace: dict = {}
    exec(python_lines(fewest, Rerun("user/model", "out")).split("pruner = ")[0], namespace)
    assert namespace["config"] == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "wanda_power:pwer=1",
            r"`importance`: Unknown parameter of the importance 'wanda_power': 'pwer'\. Did you mea",
        ),
        ("wanda_power:power=high", "`importance`: The parameter 'power' of .* is 'high'; want a finite number"),
        ({"name": "wanda_power", "center": 1}, "`importance`: .*'center' .* is '1'; want true or false"),
        ("wanda:power=1", "`importance`: The parameter 'power' cannot be set: the importance 'wanda' has none"),
        ("wanda_powr:power=1", "Unknown `importance` 'wanda_powr'. Did you mean 'wanda_power'"),
        ("wanda_power:power", "`importance`: .* is malformed at 'power'"),
        ({"power": 1}, "`importance`: .* names no function"),
        (7, "`importance` is 7; want a string"),
        ("", "Unknown `importance` ''"),
    ],
)
def test_a_parameter_that_cannot_be_set_is_one_error_that_names_the_field(given, message):
    with pytest.raises(ConfigurationError, match=message):
        make(given)


def test_a_strategy_may_set_parameters():
    @distributions.register("flatter")
    def flatter(inputs, *, share: float = 0.5):
        return inputs.importance.double().softmax(dim=0) ** share

    try:
        register_strategy("flat", Strategy("balanced", "flatter", "flatter:share=2"))
        options = {"method": "structured_afr_with_intrafusion", "strategy": "flat"}
        config = OTPruningConfig(**options)
        assert (config.source_distribution, config.target_distribution) == ("flatter:share=0.5", "flatter:share=2.0")
        assert OTPruningConfig(**options, target_distribution={"name": "flatter", "share": 2}) == config
        with pytest.raises(ConfigurationError, match="contradicts `strategy='flat'`, which sets 'flatter:share=2.0'"):
            OTPruningConfig(**options, target_distribution="flatter")
    finally:
        strategies.pop("flat", None)
        distributions.unregister("flatter")


def test_a_search_chooses_among_parameters():
    choices = ["wanda", "wanda_power:power=1", {"name": "wanda_power", "power": 0.7}]
    space = check_search_space({"importance": choices}, make("wanda"))
    assert space["importance"].values == ("wanda", "wanda_power:power=1.0,center=false", FULL)
    assert contains(space, make(FULL))
    assert not contains(space, make("wanda_power"))
    with pytest.raises(ConfigurationError, match="names a choice twice"):
        check_search_space({"importance": ["wanda_power", "wanda_power:power=0.5"]}, make("wanda"))


def test_a_parameter_is_on_the_command_line_in_the_file_in_the_card_and_reaches_the_function(
    llama_folder, tokens, tmp_path, wanda_power, capsys
):
    save_file({"input_ids": tokens}, tmp_path / "ids.safetensors")
    data = ("--calibration-data", tmp_path / "ids.safetensors", "--quiet")
    half = ("--pruning-ratio", "0.5", "--multiple-of", "1", "--selection", "top", "--quality", "fast")
    chosen = ("--importance", "wanda_power:power=0.7")
    assert run_command("prune", llama_folder, "-o", tmp_path / "out", *half, *chosen, *data) == 0
    assert set(wanda_power) == {0.7}
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["importance"] == FULL
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--importance {FULL}" in card
    assert f'importance="{FULL}"' in card
    assert "https://example.org/paper" in card
    capsys.readouterr()
    assert run_command("prune", llama_folder, "-o", tmp_path / "no", "--importance", "wanda_power:power=x", *data) == 2
    assert "want a finite number" in capsys.readouterr().err
    assert run_command("list", "importances") == 0
    assert f"Parameters: power: float = 0.5, center: bool = False; as in {FULL.replace('7', '5')}\n" in (
        capsys.readouterr().out
    )


def test_prune_takes_parameters_and_a_resumed_run_with_others_is_refused(llama_folder, tokens, wanda_power, tmp_path):
    def prune(importance):
        config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, selection="top", quality="fast")
        pruner = OTPruner.from_pretrained(llama_folder, config)
        return pruner.prune(tokens, importance=importance, progress=False, resume_from=tmp_path / "state")

    assert prune({"name": "wanda_power", "power": 0.7}).custom_functions == {"importance": FULL}
    assert set(wanda_power) == {0.7}
    with pytest.raises(StateError, match=r"another function for `importance` \('wanda_power:power=0.7"):
        prune("wanda_power:power=0.8")
    with pytest.raises(RegistryError, match="Unknown parameter of the importance 'wanda_power': 'pwer'"):
        prune("wanda_power:pwer=0.8")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ValueError("bad."), "raised ValueError: bad. Give another value, or mend it."),
    ],
)
def test_what_a_function_raises_for_a_value_is_one_error_with_advice(llama, tokens, error, advice):
    @importances.register("failing", requires=())
    def failing(statistics, *, power: float = 1.0):
        raise error

    try:
        pruner = OTPruner.from_pretrained(llama, make("failing:power=2", pruning_ratio=0.5, multiple_of=1))
        with pytest.raises(CustomFunctionError, match=advice):
            pruner.prune(tokens, progress=False)
    finally:
        importances.unregister("failing")
