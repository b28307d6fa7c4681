"""A pruned folder is written anew with quantized weights, or not at all. torchao itself is run by the slow test."""

import json
import shutil

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig, PruningReport, quantize_model
from optimum_otprune.checkpoints import quantize
from optimum_otprune.errors import (
    ConfigurationError,
    IntegrityError,
    MissingExtraError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
)
from optimum_otprune.models import quantizers
from optimum_otprune.storage.manifest import verify_folder
from tests.conftest import run_command


@pytest.fixture
def pruned_folder(llama_folder, tokens, tmp_path):
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, method="magnitude", seqlen=20)
    pruner = OTPruner.from_pretrained(llama_folder, config)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "half")


class Library:
    """Stands for one that quantizes: weights are rounded, or what a test wants is done to them."""

    def __init__(self, monkeypatch, tmp_path):
        self.load, self.tmp_path, self.calls = quantize.load_checkpoint, tmp_path, []
        self.change = self.change_again = lambda weight: weight
        monkeypatch.setattr(quantize, "load_checkpoint", self.load_checkpoint)
        monkeypatch.setattr(quantize, "library_version", lambda scheme: "1.0")
        monkeypatch.setattr(quantize, "quantization_config", lambda scheme, dtype: {"quant_method": scheme.library})

    def load_checkpoint(self, name, options, may_be_quantized=False, quantization=None):
        if may_be_quantized:
            plain = self.tmp_path / "plain"
            shutil.copytree(name, plain)
            config = json.loads((plain / "config.json").read_text())
            assert config.pop("quantization_config") == {"quant_method": "torchao"}
            (plain / "config.json").write_text(json.dumps(config))
            name = plain
        found = self.load(str(name), options)
        if quantization is not None:
            found.model.config.quantization_config = quantization
            found.model.register_forward_hook(lambda *_: self.calls.append("run"))
            save = found.model.save_pretrained
            found.model.save_pretrained = lambda *args, **kwargs: (self.calls.append("saved"), save(*args, **kwargs))
        self._apply(found.model, (lambda w: (w * 64).round() / 64) if quantization else lambda w: w)
        self._apply(
            found.model, self.change if quantization else self.change_again if may_be_quantized else lambda w: w
        )
        self.calls.append("quantized" if quantization else "again" if may_be_quantized else "plain")
        return found

    @staticmethod
    def _apply(model, change):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp" in name or "lm_head" in name:
                    parameter.copy_(change(parameter))


@pytest.fixture
def library(monkeypatch, tmp_path):
    return Library(monkeypatch, tmp_path)


def test_the_new_folder_has_report_card_tokenizer_and_a_manifest_of_its_own(library, pruned_folder, tmp_path, capsys):
    before = verify_folder(pruned_folder)
    assert run_command("quantize", pruned_folder, "-o", tmp_path / "int8", "--quiet") == 0
    printed = capsys.readouterr().out
    # Saved before it runs: what bitsandbytes saves of a model that has run on a CPU is not what it quantized.
    assert list(dict.fromkeys(library.calls)) == ["plain", "quantized", "saved", "run", "again"]
    assert verify_folder(pruned_folder) == before
    files = verify_folder(tmp_path / "int8")
    assert set(files) == set(before)
    assert files["tokenizer.json"] == before["tokenizer.json"]
    report = PruningReport.load(tmp_path / "int8" / "otprune_report.json")
    found = report.quantization
    assert (found.scheme, found.library, found.dtype) == ("int8", "torchao 1.0", "float32")
    assert found.quantized_parameters == 3 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 24)
    assert found.size_before == before["model.safetensors"].size
    assert 0 < found.kl < 1
    assert found.perplexity_after != found.perplexity_before
    assert PruningReport.load(pruned_folder / "otprune_report.json").layers == report.layers
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "quantized to int8" in card
    assert "where `torchao` is installed" in card
    assert "\n- torchao\n" in card
    assert f"{found.quantized_parameters:,} weights" in printed
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "torchao"}
    assert config == json.loads((pruned_folder / "config.json").read_text())
    assert run_command("report", tmp_path / "int8") == 0
    assert "Quantization: int8 by torchao 1.0" in capsys.readouterr().out


def test_a_library_that_does_not_load_what_it_saved_leaves_nothing(library, pruned_folder, tmp_path):
    library.change_again = lambda weight: weight.roll(1, 0)
    with pytest.raises(IntegrityError, match="torchao does not load what it saved.*Nothing was kept"):
        quantize_model(pruned_folder, tmp_path / "int8")
    assert not [path.name for path in tmp_path.iterdir() if "int8" in path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda weight: weight * 60, "lost its predictions"), (lambda weight: weight * torch.nan, "NaN or infinite")],
)
def test_a_model_that_is_ruined_is_not_saved(change, message, library, pruned_folder, tmp_path, monkeypatch):
    library.change = change
    monkeypatch.setattr(quantize, "_check_same", lambda *_: None)
    with pytest.raises(NumericalError, match=message):
        quantize_model(pruned_folder, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(library, pruned_folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match="down_proj has 24 inputs.*--multiple-of 32"):
        quantize_model(pruned_folder, tmp_path / "out", "int4")
    with pytest.raises(ConfigurationError, match="Unknown `scheme`"):
        quantize_model(pruned_folder, tmp_path / "out", "int3")
    with pytest.raises(ConfigurationError, match="`load_in_8bit` would be ignored"):
        quantize_model(pruned_folder, tmp_path / "out", load_in_8bit=True)
    with pytest.raises(OutputError, match="not empty|contains|inside|is the"):
        quantize_model(pruned_folder, pruned_folder, overwrite=True)
    assert library.calls == []


def test_a_folder_that_is_dense_quantized_already_or_damaged_is_refused(
    library, llama_folder, pruned_folder, tmp_path
):
    with pytest.raises(UnsupportedModelError, match="'dense' is no folder of a pruned model.*transformers alone"):
        quantize_model(llama_folder, tmp_path / "out")
    quantize_model(pruned_folder, tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match=r"'int8' is quantized already \(int8\)"):
        quantize_model(tmp_path / "int8", tmp_path / "out")
    (pruned_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed: 'tokenizer.json'"):
        quantize_model(pruned_folder, tmp_path / "out")


def test_without_the_library_nothing_is_loaded_or_written(pruned_folder, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(quantizers, "import_module", missing)
    monkeypatch.setattr(quantize, "load_checkpoint", None)
    with pytest.raises(MissingExtraError, match="quantize"):
        quantize_model(pruned_folder, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
