"""The printed command and lines make the configuration again."""

import shlex
import warnings
from argparse import ArgumentParser

import pytest

from optimum_otprune.checkpoints.card.reproduction import Rerun, command, literal, make_whole, python_lines
from optimum_otprune.commands.arguments import config_options
from optimum_otprune.commands.parser import PruneCommand
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.presets import METHODS
from tests.hostile import HOSTILE

RUN = Rerun("meta-llama/Llama-3.2-1B", "llama-half", None, True, None)
OTHERS = [
    {"pruning_ratio": 0.0, "seed": 7},
    {"target_parameters": "900M"},
    {"target_size": 2_000_000_000},
    {"fuse": (), "ridge_prior": "identity"},
    {"fuse": ("up", "down"), "normalization": "corrected", "solver": "emd"},
    {"quality": "best"},
    {"allocation": "adaptive", "non_uniform_format": "per_layer_config"},
    {"skip_layers": (0, 3), "layer_ratios": {1: 0.25, 12: 0.5}},
    {"quality": "fast", "reconstruction_steps": 5},
    {"selection": "top", "importance": "wanda"},
    {"method": "structured_afr_with_intrafusion", "strategy": "aggressive"},
    {"method": "structured_afr_with_intrafusion", "source_distribution": "robust"},
    {"method": "fo_snip", "aggregation": "signed", "score_batch_size": 2},
    {"epsilon": 1e-07, "solver": "sinkhorn"},
    {"dataset": "it's; a $(name)", "dataset_config": "-x", "text_column": "--seed"},
]


def parsed(line: str) -> OTPruningConfig:
    """The configuration that `otprune prune` makes of a command line."""
    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    words = shlex.split(line.replace("\\\n", ""))
    assert words[:2] == ["otprune", "prune"]
    return OTPruningConfig(**config_options(parser.parse_args(words[2:])))


@pytest.mark.parametrize(
    "options", [*({"method": method, "pruning_ratio": 0.3} for method in METHODS), *OTHERS], ids=str
)
def test_the_printed_command_and_lines_make_an_equal_configuration(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = OTPruningConfig(**options)
        assert parsed(command(config.fewest_options(), RUN)) == config
        namespace: dict = {}
        exec(python_lines(config.fewest_options(), RUN).split("pruner = ")[0], namespace)
        assert namespace["config"] == config


@pytest.mark.parametrize(
    "options", [*({"method": method, "pruning_ratio": 0.3} for method in METHODS), *OTHERS], ids=str
)
def test_a_list_that_lacks_an_option_makes_another_configuration_and_is_known_to(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = OTPruningConfig(**options)
    fewest = config.fewest_options()
    assert make_whole(config, fewest)
    for name in set(fewest) - {"pruning_ratio"}:
        assert not make_whole(config, set(fewest) - {name}), name
    assert make_whole(config, set(fewest) - {"pruning_ratio"}) == (config.pruning_ratio in (0.2, None))


def test_long_lines_of_python_and_of_the_command_are_wrapped():
    config = OTPruningConfig(
        method="structured_afr_with_intrafusion", multiple_of=32, num_samples=64, seqlen=256, seed=1
    )
    for text in (python_lines(config.fewest_options(), RUN), command(config.fewest_options(), RUN)):
        assert max(map(len, text.splitlines())) <= 110


def test_only_what_differs_from_the_method_is_printed():
    assert OTPruningConfig(pruning_ratio=0.5, num_samples=64).fewest_options() == {
        "pruning_ratio": 0.5,
        "method": "otprune",
        "num_samples": 64,
    }
    line = command(OTPruningConfig(pruning_ratio=0.5).fewest_options(), RUN)
    assert line == ("otprune prune meta-llama/Llama-3.2-1B -o llama-half --pruning-ratio 0.5 --method otprune --eval")


def test_data_are_named_and_quoted():
    run = Rerun("BASE", "a b", "local data.txt", True, "user/data")
    words = shlex.split(command(OTPruningConfig().fewest_options(), run).replace("\\\n", ""))
    assert words[:5] == ["otprune", "prune", "BASE", "-o", "a b"]
    assert words[-5:] == ["--calibration-data", "local data.txt", "--eval", "--eval-data", "user/data"]
    assert 'pruner.prune("local data.txt")' in python_lines(OTPruningConfig().fewest_options(), run)


@pytest.mark.parametrize("options", [{"dataset_config": None}, {"dataset": "a\nb"}, {"dataset": "\u202ex"}], ids=str)
def test_what_a_command_line_cannot_hold_comes_from_the_file(options):
    assert "--config otprune_config.json" in command(OTPruningConfig(**options).fewest_options(), RUN)
    if "dataset" in options:
        assert 'OTPruningConfig.from_pretrained("otprune_config.json")' in python_lines(
            OTPruningConfig(**options).fewest_options(), RUN
        )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_literal_is_visible_ascii_that_reads_as_the_value(text):
    assert eval(literal(text)) == text
    assert literal(text).isascii()
    assert literal(text).isprintable()


def test_a_configuration_of_an_older_version_is_compared_by_its_options():
    old = OTPruningConfig.from_dict({"pruning_ratio": 0.5, "optimum_otprune_version": "0.0.1"})
    assert old.fewest_options() == {"pruning_ratio": 0.5, "method": "otprune"}
