"""One contract over every known architecture: find, read, compute, shrink, save, load."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import RegistryError, UnsupportedModelError
from optimum_otprune.functional.ffn import check_weights, ffn_forward
from optimum_otprune.models.architectures import ARCHITECTURES, FFNSpec, find_spec, register_architecture
from optimum_otprune.models.ffn_block import by_block, install_all
from optimum_otprune.models.ffn_hooks import watched
from optimum_otprune.models.find_ffns import dense_width, ffn_blocks
from optimum_otprune.models.inputs import model_inputs
from optimum_otprune.models.loadable import check_resizable
from optimum_otprune.models.modeling_code import check_can_save
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.resize import finish_resize
from tests.conftest import make_llama
from tests.passes import factors_of, stream_of

# Of these, a configuration gets the fields that it has.
SIZES = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"), 32)
    | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "dff", "d_ff"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4)
    | dict.fromkeys(("max_position_embeddings", "n_positions"), 40)
    | {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_key_value_heads": 2, "head_dim": 8, "num_kv_heads": 2}
    | dict.fromkeys(("encoder_layers", "num_decoder_layers"), 2)
    | {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_kv": 8, "decoder_start_token_id": 0}
    | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "rotary_dim": 4}
    | dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 48)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
)
START = {"pad_token_id": 0, "decoder_start_token_id": 0}  # what an encoder with a decoder writes from
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


class Case(NamedTuple):
    """A small model of a family, and what is to be found of it.

    Attributes:
        architecture: The architecture that must be recognized.
        model_type: The family, as transformers calls it.
        intercept: Whether its configuration can hold an intercept.
        adds: The multiple of its FFN's output that each block with one FFN adds, or None for none.
        auto: The class that loads it.
        changes: Fields of the configuration beside `SIZES`.
    """

    architecture: str
    model_type: str
    intercept: bool = False
    adds: float | None = 1.0
    auto: Any = AutoModelForCausalLM
    changes: Mapping[str, Any] = {}


# One line a layout, and more for families that differ in what is around it.
MODELS = {
    "llama": Case("llama", "llama", intercept=True),
    "mistral": Case("llama", "mistral"),
    "qwen2": Case("llama", "qwen2"),
    "qwen3": Case("llama", "qwen3"),
    "gemma": Case("llama", "gemma"),
    "gemma2": Case("llama_post_norm", "gemma2", adds=None, changes={"sliding_window": 6}),
    "nemotron": Case("nemotron", "nemotron", intercept=True),
    "bamba": Case("bamba", "bamba", intercept=True, changes={"attn_layer_indices": [1]}),
    "falcon_h1": Case(
        "falcon_h1", "falcon_h1", intercept=True, adds=0.5, changes={"mamba_d_ssm": 64, "mlp_multipliers": [0.7, 0.5]}
    ),
    "recurrent_gemma": Case(
        "recurrent_gemma", "recurrent_gemma", intercept=True, changes={"intermediate_size": 96, "num_hidden_layers": 3}
    ),
    "lfm2": Case(
        "lfm2",
        "lfm2",
        changes={"layer_types": ["conv", "full_attention"], "intermediate_size": 72, "block_multiple_of": 8},
    ),
    "phi3": Case("phi3", "phi3", changes={"pad_token_id": 0}),
    "glm": Case("phi3", "glm"),
    "glm4": Case("glm4", "glm4", adds=None),
    "modernbert": Case(
        "modernbert", "modernbert", intercept=True, auto=AutoModelForMaskedLM, changes={"pad_token_id": 0}
    ),
    "gpt2": Case("gpt2", "gpt2", intercept=True),
    "gpt_bigcode": Case("gpt_bigcode", "gpt_bigcode", intercept=True),
    "gpt_neo": Case("gpt_neo", "gpt_neo", intercept=True, changes={"attention_types": [[["global", "local"], 1]]}),
    "gptj": Case("gptj", "gptj", intercept=True),
    "falcon": Case("falcon", "falcon"),
    "ctrl": Case("ctrl", "ctrl", intercept=True),
    "starcoder2": Case("starcoder2", "starcoder2", intercept=True),
    "phi": Case("phi", "phi", intercept=True),
    "gpt_neox": Case("gpt_neox", "gpt_neox", intercept=True),
    "biogpt": Case("biogpt", "biogpt", intercept=True),
    "xglm": Case("xglm", "xglm", intercept=True),
    "opt": Case("opt", "opt", intercept=True),
    "trocr": Case("trocr", "trocr", intercept=True, adds=None),
    "bert": Case("bert", "bert", intercept=True, adds=None, changes={"is_decoder": True}),
    "esm": Case(
        "esm", "esm", intercept=True, auto=AutoModelForMaskedLM, changes={"pad_token_id": 2, "mask_token_id": 3}
    ),
    "distilbert": Case("distilbert", "distilbert", intercept=True, adds=None, auto=AutoModelForMaskedLM),
    "clip_text": Case("clip_text", "clip_text_model", intercept=True, auto=AutoModel),
    "bart": Case("bart", "bart", intercept=True, adds=None, auto=AutoModelForSeq2SeqLM, changes={"pad_token_id": 2}),
    "t5": Case("t5", "t5", auto=AutoModelForSeq2SeqLM, changes=START),
    "mt5": Case("t5_gated", "mt5", auto=AutoModelForSeq2SeqLM, changes=START),
    "t5gemma": Case("t5gemma", "t5gemma", adds=None, auto=AutoModelForSeq2SeqLM, changes=START),
    "gemma3": Case("llama_post_norm", "gemma3", adds=None, auto=AutoModelForImageTextToText),
    "mistral3": Case("llama", "mistral3", auto=AutoModelForImageTextToText),
    "mixtral": Case("mixtral", "mixtral"),
    "qwen2_moe": Case("qwen2_moe", "qwen2_moe"),
    "deepseek_v3": Case(
        "qwen2_moe",
        "deepseek_v3",
        changes={"n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 8}
        | {"head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
    "granitemoeshared": Case("granitemoe", "granitemoeshared"),
    "jamba": Case(
        "jamba",
        "jamba",
        changes={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"use_mamba_kernels": False, "mamba_dt_rank": 4},
    ),
    "lfm2_moe": Case(
        "lfm2_moe", "lfm2_moe", changes={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "gpt_oss": Case("gpt_oss", "gpt_oss"),
    "aria_text": Case("aria_text", "aria_text", changes={"moe_num_experts": 4, "moe_num_shared_experts": 2}),
}
WITH_EXPERTS = ("mixtral", "qwen2_moe", "deepseek_v3", "granitemoeshared", "jamba", "lfm2_moe", "gpt_oss", "aria_text")
ONE_A_BLOCK = tuple(name for name in MODELS if name not in WITH_EXPERTS)
SOME = (
    "llama",
    "gemma2",
    "gpt2",
    "opt",
    "bert",
    "phi3",
    "gemma3",
)  # all ways in which layouts differ, for other tests
REFUSED = {name: name for name in ("bloom", "gpt_neox_japanese", "mpt", "openai-gpt", "xlm")}


def configured(model_type: str, sizes: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    parts = {
        name: configured(
            getattr(default, name).model_type, VISION if name == "vision_config" else SIZES | START, {}
        ).to_dict()
        for name in kind.sub_configs.keys() & {"text_config", "vision_config", "encoder", "decoder"}
    }
    return kind(**{name: size for name, size in sizes.items() if name in default.to_dict()} | parts | dict(changes))


def build(name: str) -> PreTrainedModel:
    case = MODELS[name]
    torch.manual_seed(0)
    if name == "llama":
        return make_llama()
    return case.auto.from_config(configured(case.model_type, SIZES, case.changes)).eval()


def outputs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        return model(**model_inputs(model, tokens))[0]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_every_registered_architecture_has_a_model_here():
    assert {case.architecture for case in MODELS.values()} | set(REFUSED) == set(ARCHITECTURES)


@pytest.mark.parametrize(("architecture", "model_type"), REFUSED.items())
def test_a_width_that_no_configuration_can_hold_is_refused(architecture, model_type):
    model = AutoModelForCausalLM.from_config(configured(model_type, SIZES, {}))
    with pytest.raises(
        UnsupportedModelError, match="follows from the hidden size in its code: no configuration can hold"
    ):
        ffn_blocks(model)


def test_the_architecture_is_recognized_by_its_modules(name):
    model = build(name)
    assert find_spec(model)[0] == MODELS[name].architecture
    assert PrunableModel.of(model).can_hold_intercept == MODELS[name].intercept


@pytest.mark.parametrize("name", ONE_A_BLOCK)
def test_weights_are_read_channel_first_and_compute_what_the_module_computes(name, tokens):
    model = build(name)
    block = ffn_blocks(model)[1]
    weights = block.read()
    check_weights(weights)
    assert (weights.intermediate_size, weights.hidden_size) == (48, 32)
    seen = {}
    block.up.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0]))
    block.projection("down").register_forward_hook(lambda module, args, output: seen.update(outputs=output.clone()))
    with torch.no_grad():
        model(**model_inputs(model, tokens))
    computed = ffn_forward(weights, seen["inputs"].reshape(-1, 32), block.activation)
    torch.testing.assert_close(computed, seen["outputs"].reshape(-1, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_known_architecture_is_block_by_block_what_it_is_as_a_whole(name, dtype, tokens, record_figure):
    model = build(name).to(dtype)
    model.train()
    blocks = ffn_blocks(model)
    factors = factors_of(model, tokens)
    alone = MODELS[name].adds and pytest.approx(MODELS[name].adds, rel=1e-2)
    assert factors == [alone if len(group) == 1 else None for group in by_block(blocks) for _ in group]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    record_figure("R15", tried=2 * len(blocks), ok=2 * len(blocks))


def test_a_shrunk_model_runs_and_loads_plainly_with_equal_logits(name, tokens, tmp_path):
    model = build(name)
    blocks = ffn_blocks(model)
    for group in by_block(blocks):
        install_all(group, [block.read().select(torch.arange(1, block.intermediate_size, 3)) for block in group])
    assert finish_resize(model, blocks, "pad") == 0
    assert all(block.intermediate_size == 16 * block.times for block in ffn_blocks(model))
    before = outputs(model, tokens)
    model.save_pretrained(tmp_path)
    loaded, info = MODELS[name].auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(outputs(loaded.eval(), tokens), before, rtol=0, atol=0)
    if loaded.can_generate():
        written = [each.generate(input_ids=tokens[:2], max_new_tokens=4, do_sample=False) for each in (model, loaded)]
        assert torch.equal(*written)


@pytest.mark.parametrize("name", ONE_A_BLOCK)
@pytest.mark.parametrize("non_uniform_format", ["pad", "per_layer_config"])
def test_layers_of_different_widths_load_with_equal_logits(name, non_uniform_format, tokens, tmp_path):
    model = build(name)
    blocks = ffn_blocks(model)
    if blocks[0].spec.then is not None and non_uniform_format == "per_layer_config":
        with pytest.raises(UnsupportedModelError, match="of one list of layers"):
            check_can_save(model, blocks[0].spec, non_uniform_format)
        return
    for block, kept_size in zip(blocks, cycle((16, 31))):
        block.install(block.read().select(torch.arange(kept_size)))
    narrow = outputs(model, tokens)
    padding = finish_resize(model, blocks, non_uniform_format)
    assert (padding > 0) == (non_uniform_format == "pad")
    before = outputs(model, tokens)
    torch.testing.assert_close(before, narrow)
    OTPruner.from_pretrained(model).save_pretrained(tmp_path / "out")
    loaded, info = MODELS[name].auto.from_pretrained(
        tmp_path / "out", output_loading_info=True, trust_remote_code=non_uniform_format == "per_layer_config"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(outputs(loaded.eval(), tokens), before, rtol=0, atol=0)


def test_a_ratio_of_zero_changes_nothing(name, tokens):
    model = build(name)
    before, keys = outputs(model, tokens), {key: value.shape for key, value in model.state_dict().items()}
    OTPruner.from_pretrained(model, OTPruningConfig(pruning_ratio=0.0)).prune(tokens, progress=False)
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    torch.testing.assert_close(outputs(model, tokens), before, rtol=0, atol=0)


def test_half_of_the_channels_are_pruned_and_load_plainly(name, tokens, tmp_path):
    model = build(name)
    pruner = OTPruner.from_pretrained(
        model, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="balanced", self_calibration=0)
    )
    report = pruner.prune(tokens, progress=False)
    widths = {(line.intermediate_size_before, line.intermediate_size_after) for line in report.layers}
    assert {(48, 24)} <= widths <= {(48, 24), (96, 48)}
    pruner.save_pretrained(tmp_path / "out")
    loaded, info = MODELS[name].auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(outputs(loaded.eval(), tokens), outputs(model, tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_sees_what_the_pruned_encoder_puts_out(name, tokens):
    model = build(name)
    blocks, stream = ffn_blocks(model), stream_of(model, tokens, track_dense=True)
    for block in blocks[:2]:
        assert len(stream.energies(block)) == tokens.numel()
        list(stream.taps(block))
        block.install(block.read().select(torch.arange(0, 48, 5)))
        stream.advance(block)
    seen = torch.cat([tap.inputs for tap in stream.taps(blocks[2])])
    wanted = []
    with watched((blocks[2], lambda name, inputs, output: wanted.append(inputs) if name == "up" else None)):
        outputs(model, tokens)
    torch.testing.assert_close(seen, wanted[0].flatten(end_dim=-2), rtol=1e-4, atol=1e-5)


def test_what_asks_for_gradients_or_the_next_token_is_refused_of_an_encoder_with_a_decoder(tokens):
    pruner = OTPruner.from_pretrained(build("t5"), OTPruningConfig(pruning_ratio=0.5, method="fo_snip", multiple_of=1))
    with pytest.raises(UnsupportedModelError, match="gradients are not led from one to the other"):
        pruner.prune(tokens, progress=False)
    with pytest.raises(UnsupportedModelError, match="does not go on with a text token by token"):
        pruner.evaluate(tokens, progress=False)


def test_an_encoder_and_a_decoder_have_each_a_width_of_its_own(tokens, tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(configured("bart", SIZES, {"decoder_ffn_dim": 40, "pad_token_id": 2}))
    pruner = OTPruner.from_pretrained(
        model.eval(), OTPruningConfig(pruning_ratio=0.5, multiple_of=1, self_calibration=0, layer_ratios={1: 0.25})
    )
    report = pruner.prune(tokens, progress=False)
    assert report.widths == (24, 36, 20, 20)
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (36, 20)
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(loaded, tokens), outputs(model, tokens), rtol=0, atol=0)
    with pytest.raises(UnsupportedModelError, match=r"different widths \(\[20, 36\]\), as those of an encoder"):
        dense_width([block for block in ffn_blocks(loaded) if block.layer != 0])


def test_biases_are_given_to_all_layers_or_none(tokens, tmp_path):
    model = make_llama()
    blocks = ffn_blocks(model)
    finish_resize(model, blocks, "pad")
    assert not model.config.mlp_bias
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    blocks[1].install(blocks[1].read()._replace(down_bias=torch.zeros(32)))
    finish_resize(model, blocks, "pad")
    assert model.config.mlp_bias
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, before)
    model.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_field_that_does_not_decide_the_width_is_refused_before_any_work(llama):
    llama.config.other_size = 48
    ARCHITECTURES["other"] = replace(ARCHITECTURES["llama"], size_key="other_size")
    try:
        with pytest.raises(UnsupportedModelError, match=r"`other_size` .* does not decide .* built with 24 .* has 48"):
            PrunableModel.loadable(llama)
    finally:
        del ARCHITECTURES["other"]


def test_a_model_that_cannot_be_built_with_another_width_is_refused(llama, monkeypatch):
    def build(self, config):
        raise ValueError("48 it must be")

    blocks = ffn_blocks(llama)
    monkeypatch.setattr(type(llama), "__init__", build)
    with pytest.raises(UnsupportedModelError, match="48 it must be when it is built with FFNs of 24 channels"):
        check_resizable(llama, blocks)


def test_a_taken_architecture_name_is_refused():
    with pytest.raises(RegistryError, match="'llama' is registered already"):
        register_architecture("llama", FFNSpec(layers="h", up="a", down="b", activation="c"))


def test_integer_weights_are_refused(llama):
    llama.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"layer 1 are torch.int8"):
        ffn_blocks(llama)
