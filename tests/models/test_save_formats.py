"""Save formats: what each refuses, does and says, and that adding one takes one file."""

import re
import subprocess
import sys

import pytest
import torch
import transformers

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.config.options import OPTIONS_BY_NAME
from optimum_otprune.errors import ConfigurationError, CustomFunctionError, RegistryError, UnsupportedModelError
from optimum_otprune.models.save_formats import PerLayerConfig, SaveFormat, save_format, save_formats, saved_widths
from tests.conftest import run_command

FAST = {"pruning_ratio": 0.5, "multiple_of": 2, "quality": "fast", "layer_ratios": {0: 0.75}}


@pytest.fixture
def tiled():
    """A third format, as a user registers it: layers of different widths, each a multiple of 16."""

    @save_formats.register("tiled")
    class Tiled(PerLayerConfig):
        def saved_widths(self, widths):
            return [-(-width // 16) * 16 for width in widths]

    yield Tiled
    save_formats.unregister("tiled")


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def test_every_registered_format_keeps_or_adds_channels_and_its_name_is_in_the_help():
    for name in save_formats.names():
        assert all(wide >= width for wide, width in zip(saved_widths(name, [12, 24, 7]), [12, 24, 7]))
        assert saved_widths(name, [24, 24]) == [24, 24]
        assert f"({name}: " in OPTIONS_BY_NAME["non_uniform_format"].help
    assert (save_format("pad").fills_up, save_format("per_layer_config").fills_up) == (True, False)


def test_a_format_of_a_users_own_plans_prunes_saves_and_loads(tiled, llama, tokens, tmp_path):
    config = OTPruningConfig(**FAST, non_uniform_format="tiled")
    assert "filled up" in str(OTPruner.plan(llama, config, tokens))
    pruner = OTPruner.from_pretrained(llama, config)
    report = pruner.prune(tokens, progress=False)
    assert report.widths == (12, 24, 24)
    assert report.padding_parameters == (4 + 8 + 8) * 3 * 32
    pruner.save_pretrained(tmp_path / "out")
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    again = OTPruner.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [layer.mlp.up_proj.out_features for layer in again.model.model.layers] == [16, 32, 32]
    assert again.config == config
    assert again.report == pruner.report
    assert torch.equal(logits(again.model, tokens), logits(pruner.model, tokens))
    assert "needs transformers 5.15 or newer" in model_card(config, report, "x")


def test_a_size_target_refuses_any_format_that_fills_up(tiled, llama, tokens, monkeypatch):
    monkeypatch.setattr(
        tiled, "saved_widths", lambda self, widths: [*widths[:2], *[max(widths[2:])] * len(widths[2:])]
    )
    budget = {"pruning_ratio": None, "target_parameters": 10_000}
    config = OTPruningConfig(**{**FAST, **budget}, non_uniform_format="tiled")
    with pytest.raises(ConfigurationError, match="filled up"):
        OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)


def test_the_command_line_lists_what_is_registered_and_imports_nothing_heavy_for_it(tiled, capsys):
    assert run_command("list", "save_formats") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("save_formats (--non-uniform-format)\n  pad\n")
    assert all(f"\n  {name}\n" in shown for name in ("pad", "per_layer_config", "tiled"))
    assert run_command("prune", "model", "-o", "out", "--non-uniform-format", "tile") == 2
    assert "Unknown `non_uniform_format` 'tile'. Did you mean 'tiled'?" in capsys.readouterr().err
    code = "import sys, optimum_otprune.models.save_formats; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_format_is_refused_with_the_nearest_name(tiled):
    known = "Known: pad, per_layer_config, tiled. Use one of these, or install the package that registers it"
    for name, message in (("tile", "Did you mean 'tiled'"), ("zip", known)):
        with pytest.raises(ConfigurationError, match=f"Unknown `non_uniform_format` '{name}'.*{message}"):
            OTPruningConfig(non_uniform_format=name)
        with pytest.raises(RegistryError, match=message):
            save_format(name)


def test_what_a_format_refuses_is_refused_before_any_work(tiled, llama, tokens, monkeypatch):
    before = {name: value.clone() for name, value in llama.state_dict().items()}

    def prune():
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST, non_uniform_format="tiled")).prune(
            tokens, progress=False
        )

    monkeypatch.setattr(tiled, "needs_transformers", "99.0")
    version = re.escape(transformers.__version__)
    message = f"`non_uniform_format='tiled'` needs transformers 99.0 or newer; this is {version}. Upgrade it, or use"
    with pytest.raises(UnsupportedModelError, match=message):
        prune()
    monkeypatch.setattr(tiled, "needs_transformers", None)

    def refuse(self, model):
        raise UnsupportedModelError(f"{type(model).__name__} has no tiles.")

    monkeypatch.setattr(tiled, "check", refuse)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no tiles"):
        prune()
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("wrong", [[16, 16], [16, 16, 16], None, ["a", "b", "c"], [16.0, 32.0, float("nan")]])
def test_widths_that_cannot_be_are_refused_by_the_formats_name(tiled, wrong, monkeypatch):
    monkeypatch.setattr(tiled, "saved_widths", lambda self, widths: wrong)
    message = r"'tiled' gives the widths .* that keep \[12, 24, 24\] .* one width per layer, none smaller"
    with pytest.raises(CustomFunctionError, match=message):
        saved_widths("tiled", [12, 24, 24])


def test_layers_wider_than_before_are_refused_before_any_work(tiled, llama, tokens, monkeypatch):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    monkeypatch.setattr(tiled, "saved_widths", lambda self, widths: [64] * len(widths))
    with pytest.raises(CustomFunctionError, match=r"'tiled' gives the widths \[64, 64, 64\] .* had \[48, 48, 48\]"):
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST, non_uniform_format="tiled")).prune(tokens)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("method", ["saved_widths", "check", "finish"])
def test_a_method_that_fails_is_one_error_and_the_model_is_as_before(tiled, method, llama, tokens, monkeypatch):
    before = {name: value.clone() for name, value in llama.state_dict().items()}

    def fail(*inputs):
        raise KeyError("lost")

    monkeypatch.setattr(tiled, method, fail)
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**FAST, non_uniform_format="tiled"))
    with pytest.raises(CustomFunctionError, match=f"'tiled' raised KeyError: 'lost' in its `{method}`. Mend it"):
        pruner.prune(tokens, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_finish_must_return_a_number(tiled, llama, tokens, monkeypatch):
    monkeypatch.setattr(tiled, "finish", lambda self, model, blocks: None)
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**FAST, non_uniform_format="tiled"))
    with pytest.raises(CustomFunctionError, match="'tiled' returned None from its `finish`; want the number"):
        pruner.prune(tokens, progress=False)


def test_a_format_that_says_nothing_keeps_widths_and_writes_nothing(llama):
    plain = SaveFormat()
    assert plain.saved_widths([3, 4]) == [3, 4]
    assert plain.modeling_template(llama.config) is None
    assert plain.check(llama) is None
