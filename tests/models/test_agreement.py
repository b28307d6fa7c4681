"""KL divergence and agreement with the dense model, from a second model or from what was kept of the same one."""

import copy
import math

import pytest
import torch

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError, NumericalError, UnsupportedModelError
from optimum_otprune.functional import distillation
from optimum_otprune.models.agreement import DenseOutputs, evaluate_model
from optimum_otprune.models.perplexity import evaluate_perplexity
from tests.conftest import make_llama
from tests.models.test_contract import SOME, build
from tests.models.test_placements import place


def by_definition(dense, model, tokens) -> tuple[float, float]:
    """Mean KL and agreement, token by token in float64."""
    with torch.no_grad():
        ours, theirs = (one(input_ids=tokens).logits[:, :-1].double() for one in (model, dense))
    p, q = theirs.softmax(-1), ours.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    return float(kl.mean()), float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())


def other_llama():
    """A Llama whose weights are a little off."""
    model = make_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("chunk", [None, 3 * 64 * 4])  # three positions at a time
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_kl_and_agreement_are_what_their_definitions_say(llama, tokens, batch_size, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(distillation, "CHUNK_BYTES", chunk)
    model = other_llama()
    metrics = evaluate_model(model, llama, tokens, batch_size, progress=False)
    kl, share = by_definition(llama, model, tokens)
    assert 0.05 < share < 0.95
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["agreement"] == pytest.approx(share, abs=1e-12)
    alone = evaluate_perplexity(model, tokens, progress=False)
    assert metrics["dense_perplexity"] == pytest.approx(
        evaluate_perplexity(llama, tokens, progress=False)["perplexity"], rel=1e-6
    )
    assert metrics["perplexity"] == pytest.approx(alone.pop("perplexity"), rel=1e-6)
    assert metrics["nll"] == pytest.approx(alone.pop("nll"), rel=1e-6)
    assert {name: metrics[name] for name in alone} == alone


def test_a_model_is_itself(llama, tokens):
    metrics = evaluate_model(llama, copy.deepcopy(llama), tokens, 4, progress=False)
    assert (metrics["kl"], metrics["agreement"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", SOME)
def test_what_is_kept_of_the_dense_model_says_what_the_dense_model_says(name, tokens):
    model, kept = build(name), DenseOutputs(max_memory=0)  # all of it in files
    dense, text = copy.deepcopy(model), tokens[:5]
    pruner = OTPruner.from_pretrained(model, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast"))
    before = pruner.evaluate(text, dense=kept, batch_size=2, progress=False)
    assert "kl" not in before
    assert len(kept._hidden) == len(text)
    pruner.prune(tokens, progress=False)
    after = pruner.evaluate(text, dense=kept, batch_size=3, progress=False)
    asked = pruner.evaluate(text, dense=dense, batch_size=2, progress=False)
    assert after["kl"] > 0
    for figure in ("perplexity", "dense_perplexity", "kl", "agreement"):
        assert after[figure] == pytest.approx(asked[figure], rel=1e-5), figure
    assert after["dense_perplexity"] == pytest.approx(before["perplexity"], rel=1e-6)
    assert pruner.report.evaluations[-2] == after


@pytest.mark.parametrize("kind", ["disk", "cpu_offload", "hooks"])
def test_wherever_weights_are_both_ways_give_what_models_in_memory_give(kind, llama, llama_folder, tokens, tmp_path):
    model, kept = place(kind, llama_folder, tmp_path / "offload"), DenseOutputs()
    pruner = OTPruner.from_pretrained(model, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast"))
    pruner.evaluate(tokens, dense=kept, progress=False)
    pruner.prune(tokens, progress=False)
    other = place(kind, llama_folder, tmp_path / "other")
    found = [pruner.evaluate(tokens, dense=dense, progress=False) for dense in (kept, other, llama)]
    for figure in ("perplexity", "dense_perplexity", "kl", "agreement"):
        assert [metrics[figure] for metrics in found] == pytest.approx([found[2][figure]] * 3, rel=1e-5), figure


def test_outputs_that_were_kept_of_other_text_are_refused(llama, tokens):
    kept = DenseOutputs()
    evaluate_model(llama, kept, tokens, 4, progress=False)
    with pytest.raises(ConfigurationError, match="kept for other windows"):
        evaluate_model(llama, kept, tokens[:4], 4, progress=False)


def test_outputs_that_were_kept_of_a_model_with_another_head_are_refused(llama, tokens):
    kept = DenseOutputs()
    evaluate_model(llama, kept, tokens, 4, progress=False)
    with pytest.raises(ConfigurationError, match="a model with another head"):
        evaluate_model(other_llama(), kept, tokens, 4, progress=False)


def test_outputs_of_an_evaluation_that_failed_are_not_kept(llama, tokens):
    kept, weight = DenseOutputs(), llama.lm_head.weight
    with torch.no_grad():
        saved = weight.clone()
        weight[0] = math.nan
        with pytest.raises(NumericalError, match="NaN"):
            evaluate_model(llama, kept, tokens, 4, progress=False)
        weight.copy_(saved)
    assert kept.is_empty
    evaluate_model(llama, kept, tokens, 4, progress=False)
    assert evaluate_model(llama, kept, tokens, 4, progress=False)["kl"] == 0


def test_which_model_is_damaged_is_said(llama, tokens):
    damaged = make_llama()
    with torch.no_grad():
        damaged.lm_head.weight[0] = math.nan
    with pytest.raises(NumericalError, match="The dense model's log-likelihoods are NaN"):
        evaluate_model(llama, damaged, tokens, 4, progress=False)
    with pytest.raises(NumericalError, match="The model's log-likelihoods are NaN"):
        evaluate_model(damaged, llama, tokens, 4, progress=False)


def test_outputs_of_a_pruned_model_are_not_kept_as_the_dense_ones(tokens):
    pruner = OTPruner.from_pretrained(make_llama(), OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast"))
    pruner.prune(tokens, progress=False)
    kept = DenseOutputs()
    with pytest.raises(UnsupportedModelError, match="this model is pruned. Evaluate the dense model with them first"):
        pruner.evaluate(tokens, dense=kept, progress=False)
    assert kept.is_empty
