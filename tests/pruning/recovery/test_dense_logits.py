"""The dense model's largest logits in files take the place of the dense model."""

import shutil
import weakref

import pytest
import torch

from optimum_otprune import OTPruner
from optimum_otprune.errors import NumericalError, StateError
from optimum_otprune.pruning.recovery import dense_logits
from tests.conftest import VOCAB_SIZE, make_llama
from tests.pruning.recovery.test_recovery import CONFIG, FAST, changed, weights

OTHER = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(dense_logits, "_FILE_BYTES", 30_000)  # a few samples each


@pytest.fixture
def pruned_folder(llama, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama, CONFIG)
    pruner.prune(tokens, progress=False)
    return pruner.save_pretrained(tmp_path / "pruned")


def recover(folder, tokens, base, **options):
    pruner = OTPruner.from_pretrained(folder)
    report = pruner.recover(tokens, base_model=base, heldout_data=OTHER, **{**FAST, **options})
    return pruner.model, report


def test_nearly_all_logits_in_files_do_what_the_dense_model_does(pruned_folder, tokens, tmp_path):
    model, report = recover(pruned_folder, tokens, make_llama())
    kept, told = recover(
        pruned_folder, tokens, make_llama(), cache_logits=tmp_path / "logits", logits_per_token=VOCAB_SIZE
    )
    assert len(list((tmp_path / "logits").glob("logits-*"))) > 3
    assert (report.logits_per_token, told.logits_per_token) == (None, VOCAB_SIZE - 1)
    assert told.kept_step == report.kept_step > 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    for one, other in zip(report.heldout, told.heldout):
        assert one.part == other.part
        assert other.kl_before == pytest.approx(one.kl_before, rel=1e-4)
        assert other.agreement_before == one.agreement_before
        assert other.perplexity_dense == pytest.approx(one.perplexity_dense, rel=1e-5)


def test_a_few_logits_of_each_token_bring_the_model_nearer_to_the_dense_one(pruned_folder, tokens, tmp_path):
    _, report = recover(pruned_folder, tokens, make_llama(), cache_logits=tmp_path / "logits", logits_per_token=8)
    assert report.kept_step > 0
    assert sum(part.kl_after for part in report.heldout) < sum(part.kl_before for part in report.heldout)


def test_the_dense_model_is_gone_before_training_begins(pruned_folder, tokens, llama_folder, tmp_path, monkeypatch):
    make_llama().save_pretrained(llama_folder)
    found, training = [], dense_logits._KeptTeacher.says
    pruner = OTPruner.from_pretrained(pruned_folder)
    load = type(pruner)._base

    def loading(*args):
        model = load(*args)
        found.append(weakref.ref(model))
        return model

    def says(*args):
        assert [reference() for reference in found] == [None]
        return training(*args)

    monkeypatch.setattr(type(pruner), "_base", loading)
    monkeypatch.setattr(dense_logits._KeptTeacher, "says", says)
    pruner.recover(tokens, base_model=llama_folder, cache_logits=tmp_path / "logits", **FAST)


def test_what_was_written_is_not_written_again_and_a_damaged_file_is(pruned_folder, tokens, tmp_path, monkeypatch):
    folder, write, calls = tmp_path / "logits", dense_logits._top_logits, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(dense_logits, "_top_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(pruned_folder, tokens, make_llama(), cache_logits=folder)
    first, _ = recover(pruned_folder, tokens, make_llama(), cache_logits=folder)
    number = len(list(folder.glob("logits-*")))
    assert len(calls) == number + 1
    again, _ = recover(pruned_folder, tokens, make_llama(), cache_logits=folder, learning_rate=2e-3)
    assert len(calls) == number + 1  # another learning rate reads the same files
    assert changed(weights(first), weights(again))
    file = folder / "logits-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="logits is damaged: 'logits-00001.safetensors' has other bytes"):
        second, _ = recover(pruned_folder, tokens, make_llama(), cache_logits=folder)
    assert len(calls) == number + 2
    assert not changed(weights(first), weights(second))


def test_logits_of_another_model_or_text_are_refused(pruned_folder, tokens, tmp_path):
    still = {**FAST, "trained": "ffn"}  # so that the embeddings stay those of the dense model
    pruner = OTPruner.from_pretrained(pruned_folder)
    kept = pruner.keep_logits(tmp_path / "logits", tokens, base_model=make_llama(), **still)
    report = pruner.recover(tokens, base_model=kept, **still)
    assert report.logits_per_token == VOCAB_SIZE - 1
    for data, options, what in [
        (tokens + 1 - tokens.ne(0).long(), {}, "calibration samples"),
        (tokens, {"num_tokens": 1000}, "`num_tokens` of recovery"),
        (tokens, {"seed": 3}, "`seed` of recovery"),
    ]:
        with pytest.raises(StateError, match=f"'logits' was begun with another {what}"):
            pruner.recover(data, base_model=kept, **{**still, **options})
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(StateError, match="'logits' was begun with another dense model"):
        pruner.recover(tokens, base_model=other, cache_logits=tmp_path / "logits", **still)
    with pytest.raises(StateError, match=r"'logits' was begun with another number of logits \(63, now 5\)"):
        pruner.recover(tokens, base_model=make_llama(), cache_logits=tmp_path / "logits", logits_per_token=5, **still)
    (tmp_path / "logits" / "logits-00000.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(StateError, match="'logits' are incomplete or damaged. Write them again"),
    ):
        pruner.recover(tokens, base_model=kept, **still)
    shutil.rmtree(tmp_path / "logits")
    with pytest.raises(StateError, match="'logits' holds no logits of the dense model"):
        pruner.recover(tokens, base_model=kept, **still)
    assert not (tmp_path / "logits").exists()


def test_predictions_that_are_not_numbers_are_not_kept(pruned_folder, tokens, tmp_path):
    dense = make_llama()
    with torch.no_grad():
        dense.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="Predictions of the dense model are NaN"):
        recover(pruned_folder, tokens, dense, cache_logits=tmp_path / "logits", written_per_sample=0)


def test_an_interrupted_training_on_logits_in_files_goes_on_to_the_same_bits(pruned_folder, tokens, tmp_path, steps):
    options = {"cache_logits": tmp_path / "logits", "logits_per_token": 8}
    straight, report = recover(pruned_folder, tokens, make_llama(), **options)
    steps.update(taken=0, stop=15)
    with pytest.raises(KeyboardInterrupt):
        recover(pruned_folder, tokens, make_llama(), **options, resume_from=tmp_path / "state")
    steps.update(taken=0, stop=None)
    resumed, told = recover(pruned_folder, tokens, make_llama(), **options, resume_from=tmp_path / "state")
    assert steps["taken"] == 25 - 12
    assert not changed(weights(straight), weights(resumed))
    assert told.heldout == report.heldout
