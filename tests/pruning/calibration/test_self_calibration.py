"""The dense model writes calibration samples of its own: as many as asked for, from its own distribution."""

import warnings

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import CalibrationDataError, ConfigurationError, NumericalError
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning import preparation, prune_layer
from optimum_otprune.pruning.calibration import self_calibration
from optimum_otprune.pruning.calibration.self_calibration import check_can_write, written_samples
from tests.conftest import VOCAB_SIZE, make_llama
from tests.passes import quiet

HALF = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast"}


def write(model, num_samples=6, seqlen=20, seed=0):
    nothing = torch.zeros(0, seqlen, dtype=torch.long)
    return written_samples(Passes(PrunableModel.of(model), nothing, quiet(5)), num_samples, seed)


def masks_of(monkeypatch):
    """Note which tokens are held out, layer by layer."""
    masks = []

    def note(block, dense, passed, is_heldout, config, correction=0.0):
        masks.append(is_heldout)
        return original(block, dense, passed, is_heldout, config, correction)

    original = prune_layer.LayerData.of
    monkeypatch.setattr(prune_layer.LayerData, "of", note)
    return masks


def test_samples_have_full_length_and_begin_with_a_random_token(llama):
    written = write(llama, num_samples=300, seqlen=3)
    assert written.shape == (300, 3)
    assert written.dtype == torch.int64
    counts = torch.bincount(written[:, 0], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    assert (counts > 0).sum() > 0.8 * VOCAB_SIZE
    assert counts.max() < 20


def test_the_end_of_a_text_does_not_end_a_sample():
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():  # says nothing but the end of the text
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    assert write(model).shape == (6, 20)


def test_tokens_are_sampled_from_the_models_distribution():
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():  # every hidden state is the same, so that the head alone decides
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        logits = model(torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
    written = write(model, num_samples=120, seqlen=41)[:, 1:]
    counts = torch.bincount(written.flatten(), minlength=VOCAB_SIZE).double()
    expected = written.numel() * logits.double().softmax(dim=0)
    assert expected.max() > 1.05 * expected.min()
    assert float(((counts - expected) / expected.sqrt()).abs().max()) < 5


def test_the_same_seed_writes_the_same_and_the_process_draws_on_as_before(llama):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = write(llama)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(write(llama), first)
    assert not torch.equal(write(llama, seed=1), first)


def test_a_sample_does_not_depend_on_how_many_fit_in_memory(llama, monkeypatch):
    together = write(llama)
    monkeypatch.setattr(self_calibration, "rows_at_once", lambda *_: 2)
    assert torch.equal(write(llama), together)
    assert torch.equal(write(llama, num_samples=3), together[:3])


def test_keys_and_values_of_samples_that_are_written_at_once_fit_in_the_given_memory(llama):
    few = self_calibration.rows_at_once(llama, 100, 10**6)
    row = 100 * 2 * 3 * 2 * 8 * 4  # tokens, keys and values, layers, groups, head size, bytes
    assert 10**6 // row - 5 < few <= 10**6 // row
    assert self_calibration.rows_at_once(llama, 100, 0) == 1


def test_the_models_own_generation_settings_are_back_afterwards(llama):
    own = llama.generation_config
    write(llama)
    assert llama.generation_config is own


def test_written_samples_follow_the_given_ones_by_default_and_some_of_each_are_held_out(llama, tokens, monkeypatch):
    masks = masks_of(monkeypatch)
    report = OTPruner.from_pretrained(llama, OTPruningConfig(**HALF)).prune(tokens, progress=False)
    given, written = masks[0][: tokens.numel()], masks[0][tokens.numel() :]
    assert given.sum() == 3 * tokens.shape[1]  # a quarter of twelve samples
    assert written.sum() == 2 * tokens.shape[1]  # and of seven
    assert (report.calibration["num_samples"], report.calibration["written_samples"]) == (12, 7)


def test_a_model_writes_all_samples_where_none_are_given(llama, monkeypatch):
    masks = masks_of(monkeypatch)
    config = OTPruningConfig(**HALF, num_samples=8, seqlen=16, self_calibration=0.5)
    report = OTPruner.from_pretrained(llama, config).prune("self", progress=False)
    assert len(masks[0]) == 12 * 16
    assert report.calibration["num_samples"] == 0
    assert report.calibration["written_samples"] == 12
    assert report.calibration["data"] == "self"


def test_baselines_are_calibrated_on_what_is_given(llama, tokens):
    config = OTPruningConfig(method="flap", pruning_ratio=0.5, multiple_of=1)
    report = OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
    assert report.calibration["written_samples"] == 0


def test_a_model_that_cannot_write_is_calibrated_on_what_is_given_and_says_so(llama, tokens, monkeypatch):
    monkeypatch.setattr(type(llama), "can_generate", lambda self: False)
    with pytest.warns(UserWarning, match="calibrated on the given samples alone, since a LlamaForCausalLM cannot"):
        report = OTPruner.from_pretrained(llama, OTPruningConfig(**HALF)).prune(tokens, progress=False)
    assert report.calibration["written_samples"] == 0


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"self_calibration": 2}, None, r"`self_calibration=2` lets the model write.*Set self_calibration=0"),
        ({}, "self", r"is to write its calibration samples itself.*Give text or token ids"),
    ],
)
def test_a_model_that_cannot_write_and_must_is_refused_before_any_pass(
    llama, tokens, monkeypatch, options, data, message
):
    monkeypatch.setattr(type(llama), "can_generate", lambda self: False)
    monkeypatch.setattr(preparation, "layer_gradients", None)  # a call would fail
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, selection="top", importance="snip", **options)
    with pytest.raises(ConfigurationError, match=message):
        OTPruner.from_pretrained(llama, config).prune(data or tokens, progress=False)


def test_an_encoder_cannot_write():
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.warns(UserWarning, match="a BertModel cannot write text"):
        assert check_can_write(BertLMHeadModel(config).bert, OTPruningConfig(), (4, 20)) == 0


def test_weights_that_would_be_loaded_for_hours_are_not(llama):
    with pytest.warns(UserWarning, match=r"loaded 4,096 times, in some 5 hours"):
        assert check_can_write(llama, OTPruningConfig(), (256, 2048), 8 * 10**9) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_can_write(llama, OTPruningConfig(), (128, 512), 10**9) == 77


def test_what_is_written_beside_given_samples_repeats_none_of_those_that_the_model_wrote(llama, monkeypatch):
    seen = []
    original = prune_layer.CalibrationStream

    def note(prunable, tokens, *rest, **options):
        seen.append(tokens)
        return original(prunable, tokens, *rest, **options)

    monkeypatch.setattr("optimum_otprune.models.passes.CalibrationStream", note)
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**HALF, num_samples=8, seqlen=16, self_calibration=1))
    pruner.prune(pruner.write_calibration(progress=False), progress=False)
    assert len(seen[-1]) == 16
    assert len(seen[-1].unique(dim=0)) == 16


def test_a_few_given_samples_have_at_least_one_beside_them(llama, tokens):
    config = OTPruningConfig(**HALF, self_calibration=0.01)
    report = OTPruner.from_pretrained(llama, config).prune(tokens, progress=False)
    assert report.calibration["written_samples"] == 1


def test_a_decoder_that_reads_what_follows_cannot_write(tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertLMHeadModel(BertConfig(vocab_size=64, **sizes)).eval()
    with pytest.raises(ConfigurationError, match="reads tokens that are yet to come"):
        OTPruner.from_pretrained(encoder, OTPruningConfig(**HALF, seqlen=16)).prune("self", progress=False)


def test_a_damaged_model_writes_nothing(llama):
    with torch.no_grad():
        llama.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericalError, match=r"model.norm.weight"):
        OTPruner.from_pretrained(llama, OTPruningConfig(num_samples=4, seqlen=16)).write_calibration(progress=False)


def test_searches_write_their_samples_where_none_are_given(llama, tokens):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**HALF, num_samples=8, seqlen=16))
    curve = pruner.sweep([0.5], "self", tokens, progress=False)
    assert curve.points[0].error is None
    pytest.importorskip("optuna")
    pruner.tune("self", num_trials=1, progress=False)
    assert pruner.tuning.best.perplexity > 1


def test_samples_of_the_models_own_are_nothing_to_evaluate_on(llama):
    with pytest.raises(CalibrationDataError, match="stands for samples that the dense model writes"):
        OTPruner.from_pretrained(llama).evaluate("self", progress=False)
