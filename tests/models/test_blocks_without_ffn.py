"""Blocks that have no FFN, between others that have one, and what may stand in their place."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.modeling_code import needed_modeling_code
from optimum_otprune.models.prunable_model import PrunableModel
from tests.models.test_contract import SIZES, build, configured, outputs
from tests.passes import stream_of


class OwnFFN(nn.Module):
    """An FFN under names that no layout knows."""

    def __init__(self, hidden_size: int = 32, width: int = 40):
        super().__init__()
        self.inward, self.function, self.outward = (
            nn.Linear(hidden_size, width),
            nn.ReLU(),
            nn.Linear(width, hidden_size),
        )


def build_of(model_type: str, **changes) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(configured(model_type, SIZES, changes)).eval()


def pruner_of(model: PreTrainedModel, **options) -> OTPruner:
    defaults = {"pruning_ratio": 0.5, "multiple_of": 1, "self_calibration": 0}
    return OTPruner.from_pretrained(model, OTPruningConfig(**{**defaults, **options}))


def test_the_stack_has_every_block_and_the_list_of_ffns_those_alone_that_are_there():
    prunable = PrunableModel.of(build("nemotron_h"))
    assert [len(ffns) for _, ffns in prunable.stack] == [0, 1, 0, 1, 0]
    assert [block.name for block, _ in prunable.stack] == [f"block {index}" for index in range(5)]
    assert [(ffn.layer, ffn.block) for ffn in prunable.blocks] == [(0, 1), (1, 3)]


def test_a_stream_runs_blocks_without_an_ffn_too(tokens):
    model = build("nemotron_h")
    stream, stack = stream_of(model, tokens), PrunableModel.of(model).stack
    for block, _ in stack:
        stream.skip(block)
    seen = []
    model.model.norm_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model, tokens)
    behind = torch.cat([states.load() for states in stream._hidden])
    torch.testing.assert_close(behind, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"method": "fo_snip"}, {"quality": "best"}])
def test_gradients_flow_through_blocks_without_an_ffn(options, tokens, tmp_path):
    model = build("nemotron_h")
    pruner = pruner_of(model, **options)
    report = pruner.prune(tokens, progress=False)
    assert [(line.intermediate_size_before, line.name) for line in report.layers] == [
        (48, "FFN of block 1"),
        (48, "FFN of block 3"),
    ]
    pruner.save_pretrained(tmp_path / "out")


def test_an_unknown_ffn_in_place_of_a_known_one_is_refused():
    model = build("nemotron_h")
    model.model.layers[2].other = OwnFFN()
    with pytest.raises(UnsupportedModelError, match=r"Block 2 has experts, or other FFNs, .* \(at 'other'\)"):
        ffn_blocks(model)
    model.model.layers[2].mixer = OwnFFN()
    with pytest.raises(UnsupportedModelError, match="none of the .* known layouts fits every block"):
        ffn_blocks(model)


def test_an_unknown_ffn_beside_experts_is_refused():
    model = build("mixtral")
    model.model.layers[1].mlp.other = OwnFFN()
    with pytest.raises(UnsupportedModelError, match=r"Block 1 has experts, or other FFNs, .* \(at 'mlp.other'\)"):
        ffn_blocks(model)


def test_a_weight_that_follows_the_width_beside_the_ffn_is_refused_before_any_work():
    model = build_of("bitnet")
    with pytest.raises(
        UnsupportedModelError, match=r"'model.layers.0.mlp.ffn_sub_norm.weight' is no part of a known FFN"
    ):
        PrunableModel.loadable(model)


def test_a_model_that_fills_up_its_tokens_is_refused(tokens):
    model = AutoModelForSeq2SeqLM.from_config(
        configured("led", SIZES, {"attention_window": 8, "pad_token_id": 2, "max_encoder_position_embeddings": 40})
    )
    with pytest.raises(UnsupportedModelError, match="it fills them up, or adds tokens of its own"):
        pruner_of(model.eval(), quality="fast").prune(tokens[:, :11], progress=False)


def test_no_modeling_file_is_written_for_what_a_family_itself_holds_layer_by_layer(tokens):
    model = build_of("gemma4_text", layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0)
    assert model.config.is_heterogeneous
    assert needed_modeling_code(model) is None
