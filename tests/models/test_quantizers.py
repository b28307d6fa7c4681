"""Which layers a scheme quantizes, and which widths it takes."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_otprune.errors import ConfigurationError, MissingExtraError, UnsupportedModelError
from optimum_otprune.models import quantizers
from optimum_otprune.models.quantizers import check_fits, library_version, quantized_layers, scheme_named
from tests.conftest import make_llama


def test_a_scheme_that_does_not_exist_is_named_with_the_nearest():
    with pytest.raises(ConfigurationError, match="Unknown `scheme` 'int5'. Did you mean 'int8'.*int8, int4, nf4"):
        scheme_named("int5")
    with pytest.raises(ConfigurationError, match="Unknown `scheme` 4"):
        scheme_named(4)


@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_named_with_the_extra_that_has_it(name, library, monkeypatch):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(quantizers, "import_module", missing)
    with pytest.raises(
        MissingExtraError, match=rf"`{name}` needs {library}.*pip install 'optimum_otprune\[quantize\]'"
    ):
        library_version(scheme_named(name))


def test_embeddings_and_head_stay_as_they_are_and_every_other_linear_layer_is_quantized():
    layers = quantized_layers(make_llama(), scheme_named("int8"))
    assert len(layers) == 3 * 7
    assert not [layer.name for layer in layers if "lm_head" in layer.name or "embed" in layer.name]
    down = next(layer for layer in layers if layer.name == "model.layers.0.mlp.down_proj")
    assert (down.inputs, down.outputs) == (48, 32)


def test_a_layer_of_gpt2_keeps_its_inputs_and_outputs_apart_and_is_none_that_torchao_knows():
    config = GPT2Config(n_embd=64, n_inner=128, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = GPT2LMHeadModel(config)
    layers = {layer.name: layer for layer in quantized_layers(model, scheme_named("nf4"))}
    assert layers["transformer.h.0.mlp.c_proj"][1:] == (128, 64)
    assert check_fits(model, scheme_named("nf4"), {128})
    with pytest.raises(
        UnsupportedModelError, match="torchao finds nothing to quantize in this GPT2LMHeadModel.*Linear"
    ):
        check_fits(model, scheme_named("int8"), {128})


def test_a_width_that_pruning_left_is_refused_with_what_to_prune_with():
    model = make_llama(hidden_size=64, intermediate_size=100)
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers.0.mlp.down_proj has 100 inputs, and torchao takes multiples of 32. Prune again with "
        r"`--multiple-of 32`",
    ):
        check_fits(model, scheme_named("int4"), {100})
    with pytest.raises(
        UnsupportedModelError, match=r"mlp.gate_proj has 100 outputs.*multiples of 32.*--multiple-of 64"
    ):
        check_fits(model, scheme_named("nf4"), {100})
    assert check_fits(model, scheme_named("int8"), {100})


def test_a_width_that_pruning_cannot_change_leads_to_another_scheme():
    model = make_llama(hidden_size=48, intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match="q_proj has 48 inputs.*multiples of 32. Take `int8`"):
        check_fits(model, scheme_named("int4"), {64})
