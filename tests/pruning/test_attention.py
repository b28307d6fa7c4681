"""Heads of attention are removed in groups that share keys and values, and the output projection makes up for them."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    GPTNeoXConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen3Config,
)

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError, ReportError, UnsupportedModelError
from optimum_otprune.models.attention_heads import attention_heads
from optimum_otprune.models.head_checks import check_removal
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.layer_store import FolderStore
from optimum_otprune.pruning.report import PruningReport
from tests.conftest import make_llama
from tests.pruning.test_experts import logits, make_qwen

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
GEMMA = {**HEADS, "global_head_dim": 16, "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32}
GEMMA |= {"intermediate_size": 48, "num_hidden_layers": 2, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}


def pruner_of(model: PreTrainedModel, attention: float = 0.5, **options) -> OTPruner:
    defaults = {"pruning_ratio": 0.25, "multiple_of": 1, "quality": "fast", "self_calibration": 0}
    return OTPruner.from_pretrained(
        model, OTPruningConfig(**{**defaults, "kind_ratios": {"attention": attention}, **options})
    )


def attention_of(model: PreTrainedModel) -> list[torch.Size]:
    return [[getattr(block.self_attn, f"{name}_proj").weight.shape for name in "qkvo"] for block in model.model.layers]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": "balanced"},
        {"pruning_ratio": 0.0},
        {"method": "flap", "quality": None, "self_calibration": None},
        {"method": "wanda_sp", "quality": None, "self_calibration": None},
    ],
)
def test_half_of_the_groups_are_removed_and_the_result_loads_plainly(options, tokens, tmp_path):
    model = make_llama(**HEADS)
    pruner = pruner_of(model, **options)
    report = pruner.prune(tokens, progress=False)
    assert attention_of(model) == [[(32, 32), (16, 32), (16, 32), (32, 32)]] * 3
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 8)
    assert [block.name for block in report.attention] == [f"attention of block {i}" for i in range(3)]
    assert PruningReport.from_dict(report.to_dict()) == report
    assert report.parameters_after == model.num_parameters()
    pruner.save_pretrained(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval(), tokens), logits(model, tokens), rtol=0, atol=0)
    written = [each.generate(tokens[:2], max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*written)


def test_heads_that_others_can_stand_in_for_are_removed_and_nothing_is_lost(tokens):
    model = make_llama(**HEADS)
    for block in model.model.layers:
        for name, size in (("q", 16), ("k", 8), ("v", 8)):
            weight = getattr(block.self_attn, f"{name}_proj").weight.data
            weight[: 2 * size] = weight[2 * size :].roll(size, 0)  # groups 0 and 1 do what 3 and 2 do
    before = logits(model, tokens)
    report = pruner_of(model, pruning_ratio=0.0).prune(tokens, progress=False)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)
    assert all(block.rescue_ratio > 0.999 for block in report.attention)


def test_the_layers_behind_see_what_the_pruned_attention_puts_out(tokens):
    whole, both = make_llama(**HEADS), make_llama(**HEADS)
    pruner_of(whole, attention=0.0).prune(tokens, progress=False)
    pruner_of(both).prune(tokens, progress=False)
    first = [model.model.layers[0].mlp.down_proj.weight for model in (whole, both)]
    assert first[0].shape == first[1].shape
    assert not torch.equal(*first)


def test_experts_and_heads_are_pruned_in_one_run(tokens, tmp_path):
    model = make_qwen()
    pruner = pruner_of(model, kind_ratios={"attention": 0.5, "experts": 0.5})
    report = pruner.prune(tokens, progress=False)
    assert (len(report.layers), len(report.attention)) == (6, 2)
    pruner.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| expert 3 of block 1 | 32 → 16 |" in card
    assert "| Width of all heads, in 2 blocks | 64 | 32 | −50.0 % |" in card
    assert 'kind_ratios={"experts": 0.5, "attention": 0.5}' in card
    plan = str(OTPruner.plan(make_qwen(), pruner.config, calibration_data=tokens))
    assert "48 -> 36 in 1 dense FFNs; 32 -> 16 in 4 experts; 40 -> 30 in 1 shared experts" in plan
    assert "2 -> 1 groups of heads a block" in plan
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=0)


def test_a_report_names_what_there_is_and_nothing_else(tokens):
    values = pruner_of(make_llama(**HEADS)).prune(tokens, progress=False).to_dict()
    values["attention"][0]["unit"] = "[here](https://example.org)"
    with pytest.raises(ReportError, match=r"`attention\[0\].unit` of the report is .* names nothing"):
        PruningReport.from_dict(values)


def test_an_interrupted_run_ends_in_the_same_heads(tokens, tmp_path, monkeypatch):
    straight, model = make_llama(**HEADS), make_llama(**HEADS)
    pruner_of(straight).prune(tokens, progress=False)
    keep = FolderStore.save

    def interrupted(self, finished):
        keep(self, finished)
        if finished.report.layer == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(model).prune(tokens, progress=False, resume_from=tmp_path / "state")
    torch.testing.assert_close(logits(model, tokens), logits(make_llama(**HEADS), tokens), rtol=0, atol=0)
    assert attention_of(model)[0][0] == (64, 32)
    monkeypatch.setattr(FolderStore, "save", keep)
    pruner_of(model).prune(tokens, progress=False, resume_from=tmp_path / "state")
    for name, part in model.state_dict().items():
        assert torch.equal(part, straight.state_dict()[name]), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make_llama(num_key_value_heads=1), "all query heads share one head of keys and values"),
        (
            lambda: AutoModelForCausalLM.from_config(
                GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)
            ),
            "no `num_key_value_heads`",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                Olmo2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)
            ),
            "`self_attn.q_norm.weight` of block 0 belongs to all heads together",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(Gemma4TextConfig(**GEMMA)),
            "its configuration has `head_dim` of each layer for itself",
        ),
    ],
)
def test_attention_that_no_configuration_can_hold_is_refused_and_the_model_stays(model, message, tokens):
    dense = model().eval()
    before = logits(dense, tokens)
    with pytest.raises(UnsupportedModelError, match=message):
        pruner_of(dense).prune(tokens, progress=False)
    torch.testing.assert_close(logits(dense, tokens), before, rtol=0, atol=0)


def test_heads_that_depend_on_each_other_are_refused(tokens):
    model = make_llama(**HEADS)
    output = model.model.layers[1].self_attn.o_proj
    output.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(dim=-1, keepdim=True),))
    with pytest.raises(UnsupportedModelError, match="Block 1 puts out something else .* heads depend on each other"):
        check_removal(PrunableModel.of(model), attention_heads(model), tokens)


def test_heads_are_not_chosen_by_gradients(tokens):
    with pytest.raises(ConfigurationError, match="Heads are not chosen by gradients"):
        pruner_of(make_llama(**HEADS), method="fo_snip", quality=None).prune(tokens, progress=False)


def test_norms_of_single_heads_stay(tokens):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **HEADS)).eval()
    pruner_of(model).prune(tokens, progress=False)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (8,)
    assert torch.isfinite(logits(model, tokens)).all()


def test_the_plan_and_a_target_count_heads(tokens):
    model = make_llama(**HEADS)
    config = OTPruningConfig(
        target_parameters=0.6, multiple_of=1, quality="fast", self_calibration=0, kind_ratios={"attention": 0.5}
    )
    dense = model.num_parameters()
    plan = OTPruner.plan(model, config, calibration_data=tokens)
    report = OTPruner.from_pretrained(model, config).prune(tokens, progress=False)
    assert plan.heads == (4, 2)
    assert plan.parameters_after == report.parameters_after == model.num_parameters() <= 0.6 * dense
    assert report.parameters_after > 0.59 * dense


def test_a_target_is_met_by_experts_and_what_is_beside_them_together(tokens):
    model = make_qwen()
    dense = model.num_parameters()
    pruner = pruner_of(model, pruning_ratio=None, target_parameters=0.7, kind_ratios={"attention": 0.5})
    report = pruner.prune(tokens, progress=False)
    assert 0.6 * dense < report.parameters_after == model.num_parameters() <= 0.7 * dense


def test_a_ratio_that_removes_no_group_is_told(tokens):
    with pytest.warns(UserWarning, match="No heads are removed: 0.1 of 4 groups .* 0.25 is one group"):
        report = pruner_of(make_llama(**HEADS), attention=0.1).prune(tokens, progress=False)
    assert report.attention == ()


def test_trials_leave_the_heads_of_a_model_on_disk(tokens, tmp_path):
    make_llama(**HEADS).save_pretrained(tmp_path / "dense")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "off"
    )
    before = logits(model, tokens)
    result = pruner_of(model).sweep([0.5], tokens, {"text": tokens}, progress=False)
    assert result.points[-1].widths == (24, 24, 24)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)
