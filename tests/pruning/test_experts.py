"""Channels inside the experts of a mixture, whichever tokens a router sends to them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, JambaConfig, MixtralConfig, PreTrainedModel, Qwen2MoeConfig

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError
from optimum_otprune.functional.experts import Routing
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.forward_stream import FFNInputs
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.block_tokens import BlockTokens
from optimum_otprune.pruning.calibration.layer_statistics import LayerData
from optimum_otprune.pruning.layer_store import FolderStore
from optimum_otprune.pruning.report import PruningReport
from tests.passes import stream_of

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"max_position_embeddings": 40, "initializer_range": 0.3, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def make_mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=4)).eval()


def make_qwen() -> PreTrainedModel:
    """A dense layer of 48 channels, then one of experts with 32 and a shared one with 40."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40}
    config = Qwen2MoeConfig(**COMMON, **sizes, num_experts=4, mlp_only_layers=[0], decoder_sparse_step=1)
    return AutoModelForCausalLM.from_config(config).eval()


def pruner_of(model: PreTrainedModel, **options) -> OTPruner:
    defaults = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast", "self_calibration": 0}
    return OTPruner.from_pretrained(model, OTPruningConfig(**{**defaults, **options}))


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_every_kind_of_ffn_has_its_own_width_and_name_and_the_result_loads_plainly(tokens, tmp_path):
    model = make_qwen()
    pruner = pruner_of(model)
    report = pruner.prune(tokens, progress=False)
    assert report.widths == (24, 16, 16, 16, 16, 20)
    names = [layer.name for layer in report.layers]
    assert names == ["layer 0", *(f"expert {i} of block 1" for i in range(4)), "shared expert of block 1"]
    config = model.config
    found = (config.intermediate_size, config.moe_intermediate_size, config.shared_expert_intermediate_size)
    assert found == (24, 16, 20)
    assert PruningReport.from_dict(report.to_dict()) == report
    pruner.save_pretrained(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval(), tokens), logits(model, tokens), rtol=0, atol=0)


def test_each_kind_may_have_a_ratio_of_its_own(tokens):
    ratios = {"experts": 0.25, "shared": 0.75}
    report = pruner_of(make_qwen(), pruning_ratio=0.0, kind_ratios=ratios).prune(tokens, progress=False)
    assert report.widths == (48, 24, 24, 24, 24, 10)


def test_experts_keep_a_width_that_grouped_products_of_matrices_can_have_in_16_bits(tokens):
    model = make_qwen()
    report = pruner_of(model, pruning_ratio=0.45).prune(tokens, progress=False)
    assert report.widths == (26, 16, 16, 16, 16, 22)
    assert torch.isfinite(logits(model.bfloat16(), tokens)).all()


def test_experts_whose_channels_come_in_pairs_lose_half_of_them_and_nothing_else(tokens):
    model = make_mixtral()
    for block in model.model.layers:
        stack = block.mlp.experts.gate_up_proj.data.view(4, 2, 32, 32)
        stack[:, :, 16:] = stack[:, :, :16]
    before = logits(model, tokens)
    report = pruner_of(model).prune(tokens, progress=False)
    assert report.widths == (16,) * 8
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)
    assert report.rescue_ratio > 0.999


def test_an_expert_is_fitted_to_the_tokens_that_the_router_sends_to_it_each_by_its_weight(tokens):
    model = make_mixtral()
    router: list[tuple] = []
    model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, output: router.append((args[0], *output))
    )
    group = ffn_blocks(model)[:4]
    found = BlockTokens.of(group, stream_of(model, tokens, batch_size=12))
    inputs, _, weights, chosen = router[-1]
    is_heldout = torch.arange(tokens.numel()) % 4 == 0
    for block in group:
        own = found.own(block, is_heldout)
        is_sent = (chosen == block.expert).any(dim=-1)
        assert own.borrowed == 0
        assert torch.equal(own.chosen, is_sent.nonzero().flatten())
        torch.testing.assert_close(torch.cat([part.load() for part in own.inputs]), inputs[is_sent])
        torch.testing.assert_close(own.weights, weights[chosen == block.expert])


def test_an_expert_that_gets_no_tokens_borrows_some_that_count_little():
    num_tokens = 400
    block = ffn_blocks(make_mixtral())[1]
    routing = Routing(torch.zeros(num_tokens, 1, dtype=torch.long), torch.ones(num_tokens, 1))
    stored = TensorSpill().put(torch.randn(num_tokens, 32))
    tokens = BlockTokens({0: FFNInputs([stored], [torch.arange(num_tokens)], [routing])}, torch.ones(num_tokens))
    is_heldout = torch.arange(num_tokens) % 4 == 0
    own = tokens.own(block, is_heldout)
    assert own.borrowed == len(own.chosen) == 2 * 32 + 16
    assert int(is_heldout[own.chosen].sum()) == 16
    assert tokens.own(ffn_blocks(make_mixtral())[0], is_heldout).borrowed == 0


def test_an_interrupted_run_goes_on_with_the_expert_that_was_next(tokens, tmp_path, monkeypatch):
    straight = make_qwen()
    pruner_of(straight).prune(tokens, progress=False)
    model, keep, kept = make_qwen(), FolderStore.save, []

    def interrupted(self, finished):
        keep(self, finished)
        kept.append(finished.report.name)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(model).prune(tokens, progress=False, resume_from=tmp_path / "state")
    torch.testing.assert_close(logits(model, tokens), logits(make_qwen(), tokens), rtol=0, atol=0)
    pruner_of(model).prune(tokens, progress=False, resume_from=tmp_path / "state")
    assert kept[2:4] == ["expert 1 of block 1", "expert 2 of block 1"]
    for name, part in model.state_dict().items():
        assert torch.equal(part, straight.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_ratios": {0: 0.25}}, ConfigurationError, "holds one width for all experts"),
        ({"allocation": "adaptive"}, ConfigurationError, "holds one width for all experts"),
        (
            {"kind_ratios": {"shared": 0.25}},
            ConfigurationError,
            "'shared', but the model has no such FFNs; it has e",
        ),
        ({"method": "fo_snip", "quality": None}, UnsupportedModelError, "has experts, and gradients are not led"),
    ],
)
def test_what_experts_cannot_have_is_refused(options, error, message, tokens):
    with pytest.raises(error, match=message):
        pruner_of(make_mixtral(), **options).prune(tokens, progress=False)


def test_experts_of_fewer_channels_than_the_least_multiple_are_refused(tokens):
    torch.manual_seed(0)
    config = MixtralConfig(**COMMON, intermediate_size=4, num_local_experts=4)
    with pytest.raises(ConfigurationError, match="multiple of 8 channels, .* but expert 0 of block 0 has only 4"):
        pruner_of(AutoModelForCausalLM.from_config(config).eval()).prune(tokens, progress=False)


def test_a_target_that_ratios_of_all_kinds_would_overrule_is_refused_by_its_name(tokens):
    ratios = {"experts": 0.5, "shared": 0.5, "dense": 0.5}
    with pytest.raises(ConfigurationError, match="`target_parameters=0.7` would be ignored"):
        pruner_of(make_qwen(), pruning_ratio=None, target_parameters=0.7, kind_ratios=ratios).prune(tokens)


def test_recovery_trains_pruned_experts_but_not_by_low_rank_updates(tokens, tmp_path):
    make_mixtral().save_pretrained(tmp_path / "dense")
    pruner = pruner_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval())
    pruner.prune(tokens, progress=False)
    options = {"base_model": tmp_path / "dense", "num_tokens": 8000, "batch_tokens": 80, "progress": False}
    with pytest.raises(UnsupportedModelError, match="Low-rank updates are not made for experts"):
        pruner.recover(tokens, **options, trained="lora")
    report = pruner.recover(tokens, **options, learning_rate=3e-4, trained="ffn")
    assert report.kept_step > 0
    assert sum(part.kl_after for part in report.heldout) < sum(part.kl_before for part in report.heldout)


def test_kinds_that_share_a_field_of_the_configuration_need_one_ratio(tokens):
    sizes = {"intermediate_size": 32, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    sizes |= {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4}
    model = AutoModelForCausalLM.from_config(JambaConfig(**{**COMMON, **sizes})).eval()
    with pytest.raises(ConfigurationError, match="`intermediate_size`, is the width of dense and experts FFNs"):
        pruner_of(model, kind_ratios={"experts": 0.25}).prune(tokens, progress=False)
    assert set(pruner_of(model).prune(tokens, progress=False).widths) == {16}


def test_one_expert_alone_is_fitted_to_its_channels():
    torch.manual_seed(0)
    sizes = {"intermediate_size": 48, "num_local_experts": 1, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**{**COMMON, **sizes})).eval()
    for block in model.model.layers:
        stack = block.mlp.experts.gate_up_proj.data.view(1, 2, 48, 32)
        stack[:, :, 24:] = stack[:, :, :24]
    tokens = torch.randint(0, 64, (12, 20))
    before = logits(model, tokens)
    report = pruner_of(model).prune(tokens, progress=False)
    assert report.widths == (24, 24)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)


def test_without_weights_of_tokens_an_experts_error_counts_by_the_routers_weight_alone(tokens):
    model = make_mixtral()
    block, is_heldout = ffn_blocks(model)[0], torch.arange(tokens.numel()) % 4 == 0
    found = BlockTokens.of(ffn_blocks(model)[:4], stream_of(model, tokens, batch_size=12))
    config = OTPruningConfig(pruning_ratio=0.5, token_weighting="uniform")
    data = LayerData.of_one(block, block.read(), found, is_heldout, config)
    own = found.own(block, is_heldout)
    fitted = ~is_heldout[own.chosen]
    shares = own.weights[fitted].square()
    torch.testing.assert_close(data.token_weights[fitted], shares / shares.mean())
