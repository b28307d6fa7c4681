"""The dense model writes calibration samples of its own: as many as asked for, from its own distribution."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.pruning import preparation, prune_layer
from optimum_otprune.pruning.calibration.self_calibration import self_calibration_tokens
from tests.conftest import VOCAB_SIZE, make_llama
from tests.passes import quiet


def write(model, tokens, times=2, batch_size=5, seed=0):
    return self_calibration_tokens(model, tokens, times, quiet(batch_size), seed)


def test_samples_have_full_length_and_begin_with_a_piece_of_a_given_one(llama, tokens):
    written = write(llama, tokens)
    assert written.shape == (24, 20)
    assert written.dtype == torch.int64
    pieces = {tuple(sample[start : start + 5].tolist()) for sample in tokens for start in range(16)}
    assert all(tuple(sample[:5].tolist()) in pieces for sample in written)


def test_the_end_of_a_text_does_not_end_a_sample(tokens):
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():  # says nothing but the end of the text
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    assert write(model, tokens).shape == (24, 20)


def test_continuations_are_sampled_from_the_models_distribution():
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are zero: every token is as likely
    written = write(model, torch.zeros(64, 40, dtype=torch.long), times=4, batch_size=64)[:, 16:]
    counts = torch.bincount(written.flatten(), minlength=VOCAB_SIZE).double()
    expected = written.numel() / VOCAB_SIZE
    assert float((counts - expected).abs().max()) < 6 * expected**0.5


def test_the_same_seed_writes_the_same_and_the_process_draws_on_as_before(llama, tokens):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = write(llama, tokens)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(write(llama, tokens), first)
    assert not torch.equal(write(llama, tokens, seed=1), first)


def test_the_models_own_generation_settings_are_back_afterwards(llama, tokens):
    own = llama.generation_config
    write(llama, tokens)
    assert llama.generation_config is own


def test_a_model_that_cannot_generate_is_told_what_to_do(tokens):
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(
        ConfigurationError, match=r"`self_calibration=2` lets the model write text.*self_calibration=0"
    ):
        write(BertLMHeadModel(config).eval().bert, tokens)


def test_what_the_model_wrote_is_fitted_but_never_judges(llama, tokens, monkeypatch):
    masks = []

    def note(block, dense, passed, is_heldout, config, correction=0.0):
        masks.append(is_heldout)
        return original(block, dense, passed, is_heldout, config, correction)

    original = prune_layer.LayerData.of
    monkeypatch.setattr(prune_layer.LayerData, "of", note)
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", self_calibration=2)
    report = OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
    assert len(masks[0]) == 3 * tokens.numel()
    assert not masks[0][tokens.numel() :].any()
    assert report.calibration["num_samples"] == len(tokens)


def test_what_is_written_does_not_depend_on_the_batch_size_of_a_run(tokens):
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", self_calibration=2)
    reports = []
    for batch_size in (8, 5):
        pruner = OTPruner.from_pretrained(make_llama(), config)
        reports.append(pruner.prune(tokens, batch_size=batch_size, progress=False))
    assert reports[0].rescue_ratio == pytest.approx(reports[1].rescue_ratio, rel=1e-3)
    assert [layer.kept_channels for layer in reports[0].layers] == [layer.kept_channels for layer in reports[1].layers]


def test_a_model_that_cannot_write_is_refused_before_any_pass(llama, tokens, monkeypatch):
    monkeypatch.setattr(type(llama), "can_generate", lambda self: False)
    monkeypatch.setattr(preparation, "layer_gradients", None)  # a call would fail
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, self_calibration=1, selection="top", importance="snip")
    with pytest.raises(ConfigurationError, match="lets the model write text"):
        OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
