"""A folder whose configuration names what a package registers that is not installed here."""

import copy

import pytest

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.config.options_file import CONFIG_FILE, read_options
from optimum_otprune.errors import ConfigurationError, RegistryError
from optimum_otprune.functional.importance import importances
from optimum_otprune.functional.marginals import Strategy, register_strategy, strategies
from optimum_otprune.models.save_formats import PerLayerConfig, save_formats
from tests.conftest import run_command

OPTIONS = {
    "pruning_ratio": 0.5,
    "multiple_of": 2,
    "quality": "fast",
    "layer_ratios": {0: 0.75},
    "importance": "elsewhere:power=2.0",
    "selection": "top",
    "strategy": "of_elsewhere",
    "ridge_prior": "transport",
    "non_uniform_format": "folded",
}
INSTALL = "Use one of these, or install the package that registers it"


@pytest.fixture
def folder(llama, tokens, tmp_path):
    """A model that was pruned and saved where a package registers an importance, a strategy and a save format."""

    @importances.register("elsewhere", requires=(), reads=())
    def elsewhere(statistics, *, power: float = 1.0):
        return statistics.weights.down.float().norm(dim=0) ** power

    register_strategy("of_elsewhere", Strategy("balanced", "uniform", "uniform"))
    save_formats.register("folded")(type("Folded", (PerLayerConfig,), {}))
    try:
        pruner = OTPruner.from_pretrained(copy.deepcopy(llama), OTPruningConfig(**OPTIONS))
        pruner.prune(tokens, progress=False)
        pruner.save_pretrained(tmp_path / "out")
    finally:
        importances.unregister("elsewhere")
        save_formats.unregister("folded")
        strategies.pop("of_elsewhere")
    return tmp_path / "out"


def test_it_is_loaded_evaluated_and_carded(folder, tokens, capsys):
    text = (folder / CONFIG_FILE).read_text()
    pruner = OTPruner.from_pretrained(folder, trust_remote_code=True)
    assert pruner.evaluate(tokens, progress=False)["stage"] == "pruned"
    config = pruner.config
    assert config.to_json_string() == text == read_options(folder / CONFIG_FILE).to_json_string()
    assert config.replace(seed=3).importance == "elsewhere:power=2.0"
    assert config.fewest_options()["importance"] == "elsewhere:power=2.0"
    assert run_command("card", folder) == 0
    assert "trust_remote_code=True)" in (folder / "README.md").read_text()
    card = capsys.readouterr().out
    assert "saved in the format folded, which is not registered" in card
    assert "trust_remote_code=True)" not in card


def test_whoever_would_use_such_a_name_is_told_to_install_its_package(folder, llama, tokens, tmp_path):
    config = OTPruningConfig.from_pretrained(folder)
    with pytest.raises(RegistryError, match=f"Unknown importance 'elsewhere'.*{INSTALL}"):
        OTPruner.plan(llama, config, tokens)
    with pytest.raises(RegistryError, match=f"Unknown importance 'elsewhere'.*{INSTALL}"):
        OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
    with pytest.raises(RegistryError, match=f"Unknown save format 'folded'.*{INSTALL}"):
        OTPruner.from_pretrained(llama, config.replace(importance="wanda")).prune(tokens, progress=False)
    with pytest.raises(RegistryError, match=f"Unknown save format 'folded'.*{INSTALL}"):
        OTPruner.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("field", ["importance", "strategy", "non_uniform_format"])
def test_such_a_name_is_refused_at_once_where_it_is_given_and_where_it_could_be_none(folder, field):
    refused = pytest.raises(ConfigurationError, match=f"Unknown `{field}` .*{INSTALL}")
    saved = OTPruningConfig.from_pretrained(folder)
    with refused:
        OTPruningConfig(**{field: OPTIONS[field]})
    with refused:
        saved.replace(**{field: OPTIONS[field]})
    with refused:
        OTPruningConfig.from_dict({field: OPTIONS[field]})
    if field == "strategy":  # any text may be one
        return
    with refused:
        OTPruningConfig.from_dict({**saved.to_dict(), field: "Not a name"})
