"""The benchmark of experts in small: REAP's score and cut, and channels beside whole experts on one page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _reap
import experts


def make_moe(**changes) -> Qwen2MoeForCausalLM:
    """A random Qwen2-MoE: 2 layers, 4 experts of 48 channels, 2 of them for a token, and a shared one of 40."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    routing = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "initializer_range": 0.2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **heads, **routing, **changes})).eval()


@pytest.fixture
def moe_folder(tokenizer, tmp_path) -> str:
    folder = tmp_path / "tiny-mixture"
    make_moe().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def routed_by_hand(model, samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Totals and counts of the first layer's experts, token by token from the weights alone."""
    block, caught = model.model.layers[0].mlp, []
    hook = block.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].flatten(0, 1)))
    model(input_ids=samples)
    hook.remove()
    total, count = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for token in torch.cat(caught):
        probabilities = torch.softmax(block.gate.weight @ token, dim=0)
        chosen = probabilities.argsort(descending=True)[:2]
        for expert in chosen:
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            total[expert] += (probabilities[expert] / probabilities[chosen].sum() * output.norm()).item()
            count[expert] += 1
    return total, count


def test_an_experts_score_is_the_mean_over_its_tokens_of_the_weight_times_the_norm(tokens):
    model = make_moe()
    with torch.no_grad():
        total, count = routed_by_hand(model, tokens)
    seen = _reap.routed(model, tokens, batch_size=5)
    assert len(seen) == 2
    assert torch.equal(seen[0].tokens, count)
    assert int(count.sum()) == 2 * tokens.numel()
    torch.testing.assert_close(seen[0].score(by_frequency=False), total / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen[0].score(by_frequency=True), total, rtol=1e-5, atol=0)


def test_an_expert_without_tokens_has_no_score_and_goes_first():
    seen = _reap.Routed(torch.tensor([3.0, 0.0, 1.0]).double(), torch.tensor([6.0, 0.0, 1.0]).double())
    assert seen.score(by_frequency=False).tolist() == [0.5, 0.0, 1.0]
    assert seen.score(by_frequency=True).tolist() == [3.0, 0.0, 1.0]


@pytest.mark.parametrize("by_frequency", [False, True])
def test_without_its_experts_a_model_is_one_whose_router_never_chooses_them(tokens, tmp_path, by_frequency):
    model = make_moe()
    scores = [seen.score(by_frequency) for seen in _reap.routed(model, tokens)]
    masked = make_moe()
    masked.load_state_dict(model.state_dict())
    for layer, score in zip(masked.model.layers, scores):
        gone = score.argsort()[:2]

        def choose(router, inputs, _, gone=gone):
            logits = inputs[0].reshape(-1, 32) @ router.weight.T
            logits[:, gone] = -torch.inf
            weights, chosen = torch.softmax(logits, dim=-1).topk(2)
            return logits, weights / weights.sum(dim=-1, keepdim=True), chosen

        layer.mlp.gate.register_forward_hook(choose)
    kept = _reap.remove_experts(model, tokens, 0.5, by_frequency)
    assert kept == [sorted(score.argsort()[2:].tolist()) for score in scores]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, masked(input_ids=tokens).logits)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.num_experts == 2
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_router_is_left_as_many_experts_as_a_token_goes_to(tokens, llama):
    with pytest.raises(SystemExit, match="1 of 4 experts would stay, but each token goes to 2"):
        _reap.remove_experts(make_moe(), tokens, 0.75)
    with pytest.raises(SystemExit, match="LlamaForCausalLM has no routed experts"):
        _reap.remove_experts(llama, tokens, 0.5)


def test_channels_and_whole_experts_are_on_one_page_with_what_each_removed(moe_folder, tokens, tmp_path):
    torch.save(tokens, tmp_path / "seen.pt")
    torch.save(tokens.flip(0), tmp_path / "unseen.pt")
    data = ["--calibration", str(tmp_path / "seen.pt"), "--evaluation", str(tmp_path / "unseen.pt"), "--seqlen", "20"]
    plan = ["--variants", "drop", "reap", "--ratios", "0.5", "--num-samples", "8"]
    experts.main(["--model", moe_folder, *data, *plan, "--output", str(tmp_path / "experts.json")])
    content = json.loads((tmp_path / "experts.json").read_text())
    assert str(tmp_path) not in json.dumps(content)
    routed, router = 2 * 4 * 3 * 48 * 32, 2 * 4 * 32
    assert content["subject"]["model"]["ffn_parameters"] == routed
    reap, drop = content["results"]["reap"]["0.5"], content["results"]["drop"]["0.5"]
    assert (reap["routed_parameters_removed"], reap["other_parameters_removed"]) == (routed // 2, router // 2)
    assert reap["parameters_removed"] == (routed + router) // 2
    assert [len(kept) for kept in content["measurements"]["reap @ 0.5 # 0"]["kept_experts"]] == [2, 2]
    assert (drop["routed_parameters_removed"], drop["other_parameters_removed"]) == (routed // 2, 0)
    assert drop["share_of_drop_excess"] == 1
    page = (tmp_path / "experts.md").read_text()
    assert "in 2 × 4 routed experts of 48 channels" in page
    assert f"| reap | {routed // 2:,} | {router // 2:,} |" in page
    assert "Not checked: the default or dropping was not measured at 50%." in page


def test_the_defaults_excess_is_judged_by_droppings():
    def found(share, mean):
        return {
            "drop": {"0.5": {"mean": 60.0, "share_of_drop_excess": 1.0}},
            "reap": {"0.5": {"mean": 49.0, "share_of_drop_excess": 0.2}},
            "otprune": {"0.5": {"mean": mean, "share_of_drop_excess": share}},
        }

    assert "at most 0.4 of dropping's: yes (0.30).\n- Default best at every ratio: no: reap at 50% (49.00 " in (
        experts.check_lines(found(0.3, 50.0))
    )
    assert "no (0.41).\n- Default best at every ratio: yes." in experts.check_lines(found(0.41, 48.0))


def test_a_training_that_fails_leaves_no_model_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "_TRAINING", tmp_path / "missing.py")
    with pytest.raises(subprocess.CalledProcessError):
        experts.trained_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "missing.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[2], 'config.json').touch()")
    folder = experts.trained_model(tmp_path / "cache")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    (tmp_path / "missing.py").unlink()
    assert experts.trained_model(tmp_path / "cache") == folder
