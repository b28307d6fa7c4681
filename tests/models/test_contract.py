"""One contract over every known architecture: find, read, compute, shrink, save, load."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from optimum_otprune import OTPruner
from optimum_otprune.errors import RegistryError, UnsupportedModelError
from optimum_otprune.functional.ffn import check_weights, ffn_forward
from optimum_otprune.models.architectures import ARCHITECTURES, FFNSpec, find_spec, register_architecture
from optimum_otprune.models.ffn_block import ffn_blocks
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.resize import finish_resize
from tests.conftest import make_llama
from tests.passes import factors_of

ROPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 40}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
OPT = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1}
NEOX = {key: value for key, value in ROPE.items() if key != "num_key_value_heads"}

# name: (architecture that must be recognized, model class, configuration, whether it can hold an intercept)
MODELS = {
    "llama": ("llama", None, None, True),
    "mistral": ("llama", MistralForCausalLM, MistralConfig(**ROPE, head_dim=8), False),
    "qwen2": ("llama", Qwen2ForCausalLM, Qwen2Config(**ROPE), False),
    "qwen3": ("llama", Qwen3ForCausalLM, Qwen3Config(**ROPE, head_dim=8), False),
    "gemma": ("llama", GemmaForCausalLM, GemmaConfig(**ROPE, head_dim=8), False),
    "gemma2": ("llama_post_norm", Gemma2ForCausalLM, Gemma2Config(**ROPE, head_dim=8, sliding_window=6), False),
    "gpt2": ("gpt2", GPT2LMHeadModel, GPT2Config(**GPT2), True),
    "opt": ("opt", OPTForCausalLM, OPTConfig(**OPT), True),
    "gpt_neox": ("gpt_neox", GPTNeoXForCausalLM, GPTNeoXConfig(**NEOX), True),
    "bert": ("bert", BertLMHeadModel, BertConfig(**BERT, is_decoder=True), True),
}


def build(name: str):
    _, model_class, config, _ = MODELS[name]
    torch.manual_seed(0)
    return make_llama() if model_class is None else model_class(copy.deepcopy(config)).eval()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_every_registered_architecture_has_a_model_here():
    assert {architecture for architecture, *_ in MODELS.values()} == set(ARCHITECTURES)


def test_the_architecture_is_recognized_by_its_modules(name):
    architecture, *_, intercept = MODELS[name]
    model = build(name)
    found, spec = find_spec(model)
    assert found == architecture
    assert PrunableModel.of(model).can_hold_intercept == intercept


def test_weights_are_read_channel_first_and_compute_what_the_module_computes(name, tokens):
    model = build(name)
    block = ffn_blocks(model)[1]
    weights = block.read()
    check_weights(weights)
    assert (weights.intermediate_size, weights.hidden_size) == (48, 32)
    seen = {}
    block.up.register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0]))
    block.projection("down").register_forward_hook(lambda module, args, output: seen.update(outputs=output))
    with torch.no_grad():
        model(input_ids=tokens)
    computed = ffn_forward(weights, seen["inputs"].reshape(-1, 32), block.activation)
    torch.testing.assert_close(computed, seen["outputs"].reshape(-1, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_known_architecture_is_block_by_block_what_it_is_as_a_whole(name, dtype, tokens, record_figure):
    model = build(name).to(dtype)
    model.train()
    blocks = ffn_blocks(model)
    factors = factors_of(model, tokens)
    assert factors == ([None] * 2 if name in ("gemma2", "bert") else [1.0] * len(blocks))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    record_figure("R15", tried=2 * len(blocks), ok=2 * len(blocks))


def test_a_shrunk_model_runs_and_loads_plainly_with_equal_logits(name, tokens, tmp_path):
    model = build(name)
    blocks = ffn_blocks(model)
    kept = torch.arange(1, 48, 3)
    for block in blocks:
        block.install(block.read().select(kept))
    assert finish_resize(model, blocks, "pad") == 0
    assert all(block.intermediate_size == len(kept) for block in ffn_blocks(model))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("non_uniform_format", ["pad", "per_layer_config"])
def test_layers_of_different_widths_load_with_equal_logits(name, non_uniform_format, tokens, tmp_path):
    model = build(name)
    blocks = ffn_blocks(model)
    for block, kept_size in zip(blocks, (16, 31)):
        block.install(block.read().select(torch.arange(kept_size)))
    with torch.no_grad():
        narrow = model(input_ids=tokens).logits
    padding = finish_resize(model, blocks, non_uniform_format)
    assert (padding > 0) == (non_uniform_format == "pad")
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    torch.testing.assert_close(before, narrow)
    OTPruner.from_pretrained(model).save_pretrained(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, trust_remote_code=non_uniform_format == "per_layer_config"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, before, rtol=0, atol=0)


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


def test_a_taken_architecture_name_is_refused():
    with pytest.raises(RegistryError, match="'llama' is registered already"):
        register_architecture("llama", FFNSpec(layers="h", up="a", down="b", activation="c"))


def test_integer_weights_are_refused(llama):
    llama.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"layer 1 are torch.int8"):
        ffn_blocks(llama)
