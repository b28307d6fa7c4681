"""A model that is not what pruning takes it for is refused before any work; what its blocks do is measured."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitNetConfig,
    BitNetForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import NumericalError, UnsupportedModelError
from optimum_otprune.models import passes
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.faithfulness import check_parameters, measured_factors
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.tuning import search as tuning
from tests.conftest import make_llama
from tests.models.test_placements import place
from tests.passes import factors_of, moments_of

FAST = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast"}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
ROPE = {**BERT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GEMMA4 = {**ROPE, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 6, "num_kv_shared_layers": 0}
GEMMA4 |= {"vocab_size_per_layer_input": 64, "layer_types": ["sliding_attention", "full_attention"]}


def gemma4(**changes):
    """A tiny Gemma 4 with embeddings for each layer that are large enough to matter."""
    torch.manual_seed(0)
    return Gemma4ForCausalLM(Gemma4TextConfig(**{**GEMMA4, "initializer_range": 0.3, **changes})).eval()


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def inputs_in_whole(model, tokens):
    """Of every FFN in a forward pass of the model, by layer."""
    seen = {}
    handles = [
        block.up.register_forward_pre_hook(lambda module, args, layer=block.layer: seen.update({layer: args[0]}))
        for block in ffn_blocks(model)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return [seen[layer].flatten(end_dim=-2) for layer in sorted(seen)]


@pytest.mark.parametrize("limit", [0, 10**9])
def test_every_batch_has_its_own_embeddings_for_each_layer(limit, tokens, record_figure):
    model = gemma4()
    blocks = ffn_blocks(model)
    stream = CalibrationStream(PrunableModel.of(model), tokens, PassSettings(5, spill=TensorSpill(limit)))
    found = []
    for block in blocks:
        found.append(torch.cat([tap.inputs for tap in stream.taps(block)]))
        stream.advance(block)
    for one, other in zip(found, inputs_in_whole(model, tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    record_figure("R15", tried=6, ok=6)


def test_gradients_are_those_of_a_model_with_embeddings_for_each_layer(tokens):
    model = gemma4()
    outputs = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
        for layer in model.model.layers
    ]
    for batch in tokens.split(6):
        model(input_ids=batch, labels=batch).loss.backward()
    for handle in handles:
        handle.remove()
    moments = moments_of(model, tokens, 6)
    for layer, moment in enumerate(moments):
        rows = torch.cat([output.grad.flatten(end_dim=1) for output in outputs[layer::2]]).double() * 120
        torch.testing.assert_close(moment, rows.T @ rows, rtol=1e-4, atol=1e-7)


def test_what_all_batches_are_given_alike_is_kept_once(tokens):
    model = gemma4()
    spill = TensorSpill(0)
    blocks = ffn_blocks(model)
    runner = BlockRunner(PrunableModel.of(model), tokens.split(4), spill)
    own = 2 * 2 * 4 * 20 * 6  # of two further batches: layers, samples, tokens, size of the embeddings for each layer
    assert spill.spilled_bytes == 4 * (tokens.numel() * 32 + own)
    shared, other = ([id(tensor) for tensor in runner.given(blocks[0], index)] for index in (0, 1))
    assert len(set(shared) & set(other)) == len(shared) - 1


def test_a_model_with_embeddings_for_each_layer_is_pruned_saved_and_loaded(tokens, tmp_path):
    pruner = OTPruner.from_pretrained(gemma4(), OTPruningConfig(**FAST))
    pruner.prune(tokens, batch_size=5, progress=False)
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, pruner.model(tokens).logits, rtol=0, atol=0)


class Scaled(nn.Module):
    """An FFN with something between, around or behind its projections."""

    def __init__(self, mlp, inner=lambda x: x, gate=1.0, outer=lambda y, x: y):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.inner, self.gate, self.outer = inner, gate, outer

    def forward(self, x):
        hidden = self.inner(self.act_fn(self.gate * self.gate_proj(x)) * self.up_proj(x))
        return self.outer(self.down_proj(hidden), x)


def with_ffn(**parts):
    model = make_llama()
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp, **parts)
    return model


def chained(model):
    """A model whose second block sees something of the tokens that is noted too early."""
    inner = model.model.layers[0].forward
    model.model.layers[0].forward = lambda hidden, **kwargs: setattr(model, "_seen", hidden) or inner(hidden, **kwargs)
    second = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, **kwargs: second(hidden + model._seen, **kwargs)
    return model


def repeated(model):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + forward(2 * x)
    return model


def fused(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: (
        (mlp.act_fn(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    )
    return model


def compiled(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_in_place(model):
    model.model.layers[1].mlp.compile(backend="eager")
    return model


def with_compiled_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    return model


class LowRank(nn.Linear):
    """A linear module with the parameters of an adapter of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.lora_A = nn.Parameter(torch.zeros(2, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, 2))


def with_part(path, change):
    """A model with a part replaced by, or changed in place to, something else."""
    model = make_llama()
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, change(model.get_submodule(path)))
    return model


class Adapter(nn.Module):
    """As adapters are injected: at first it changes nothing."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_B = nn.Parameter(torch.zeros(32, 2))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


def adapted(model, part):
    owner = model.get_submodule(part.rpartition(".")[0])
    setattr(owner, part.rpartition(".")[2], Adapter(model.get_submodule(part)))
    return model


def with_experts(model, experts):
    model.model.layers[1].mlp.experts = experts
    return model


Q_PROJ = "model.layers.1.self_attn.q_proj"
STACKED = nn.ParameterList([nn.Parameter(torch.ones(4, 32, 20))])
LISTED = nn.ModuleList(nn.Sequential(nn.Linear(32, 20), nn.Linear(20, 32)) for _ in range(2))

REFUSED = {
    "inner norm": (
        lambda: with_ffn(inner=nn.RMSNorm(48, elementwise_affine=False)),
        "^Layer 1: The down projection puts out something else",
    ),
    "gate multiplier": (lambda: with_ffn(gate=0.7), "^Layer 1: The down projection puts out something else"),
    "scales by channel": (
        lambda: with_ffn(inner=lambda x: x * torch.linspace(0.5, 1.5, 48)),
        "^Layer 1: The down projection puts out something else",
    ),
    "clamp": (
        lambda: with_ffn(inner=lambda x: x.clamp(-100, 100)),
        r"^Layer 1: The down projection .* on inputs 16 times as large as the sample's",
    ),
    "added experts": (
        lambda: with_ffn(outer=lambda y, x: y + x.tanh()),
        "^Layer 1: The module that holds the FFN puts out something else",
    ),
    "bitnet": (
        lambda: BitNetForCausalLM(BitNetConfig(**ROPE)),
        "^The weight 'model.layers.0.mlp.ffn_sub_norm.weight' is no part of a known FFN",
    ),
    "kept from block to block": (lambda: chained(make_llama()), "^Layer 1: Where the model is run block by block"),
    "shared keys and values": (
        lambda: gemma4(num_hidden_layers=3, layer_types=["full_attention"] * 3, num_kv_shared_layers=1),
        r"^Layer \d: The block changes, or needs, what blocks hand on beside the hidden states",
    ),
    "gemma3n": (
        lambda: Gemma3nForCausalLM(
            Gemma3nTextConfig(
                **{**ROPE, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 2},
                layer_types=["full_attention"] * 2,
                activation_sparsity_pattern=None,
                num_kv_shared_layers=0,
                hidden_size_per_layer_input=6,
                vocab_size_per_layer_input=64,
                altup_num_inputs=2,
                laurel_rank=4,
            )
        ),
        r"^Layer 0: Hidden states of shape \(2, 1, 20, 32\) go into the block",
    ),
    "run twice": (lambda: repeated(make_llama()), "^Hooks on layer 1 fire 2 times"),
    "fused code": (lambda: fused(make_llama()), "^Hooks on layer 1 fire 0 times"),
    "compiled block": (lambda: compiled(make_llama()), r"^The module 'model.layers.1' is compiled.*without compiling"),
    "compiled in place": (lambda: compiled_in_place(make_llama()), r"^The module 'model.layers.1.mlp' is compiled"),
    "compiled function": (
        lambda: with_compiled_forward(make_llama()),
        r"^The module 'model.layers.1.mlp' is compiled",
    ),
    "a mask": (
        lambda: with_part(Q_PROJ, lambda part: prune.l1_unstructured(part, "weight", 0.5)),
        f"^The weight '{Q_PROJ}.weight_orig' is of shape .* not known to LlamaForCausalLM.*Put back the module",
    ),
    "a parametrization": (
        lambda: with_part(Q_PROJ, weight_norm),
        f"^The weight '{Q_PROJ}.parametrizations.weight.original0' is of shape .* not known",
    ),
    "a wrapped head": (lambda: with_part("lm_head", nn.Sequential), "^The weight 'lm_head.0.weight' is .* not known"),
    "an adapter's parameters": (
        lambda: with_part(Q_PROJ, LowRank),
        f"^The weight '{Q_PROJ}.lora_A' is of shape .* not known",
    ),
    "another shape": (
        lambda: with_part("lm_head", lambda part: nn.Linear(32, 65, bias=False)),
        r"^The weight 'lm_head.weight' is of shape \(65, 32\) in the model, but of shape \(64, 32\)",
    ),
    "a part that is gone": (
        lambda: with_part("model.norm", lambda part: nn.Identity()),
        "^The weight 'model.norm.weight' is not there in the model",
    ),
    "adapter in an FFN": (
        lambda: adapted(make_llama(), "model.layers.1.mlp.up_proj"),
        r"^The model has an adapter in it.*merge_and_unload\(\)",
    ),
    "adapter beside it": (
        lambda: adapted(make_llama(), "model.layers.1.self_attn.q_proj"),
        "^The model has an adapter in it, first in 'model.layers.1.self_attn.q_proj'",
    ),
    "stacked experts": (lambda: with_experts(make_llama(), STACKED), "^Block 1 has experts, or other FFNs, beside"),
    "listed experts": (lambda: with_experts(make_llama(), LISTED), r"^Block 1 has experts.*\(at 'mlp.experts'\)"),
    "gemma4 experts": (
        lambda: gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=20),
        r"^Block 0 has experts.*\(at 'experts'\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_otherwise_is_refused_and_untouched(kind, tokens, record_figure):
    make, message = REFUSED[kind]
    model = make()
    before = weights_of(model)
    with pytest.raises(UnsupportedModelError, match=message):
        OTPruner.from_pretrained(model, OTPruningConfig(**FAST)).prune(tokens, progress=False)
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    record_figure("R15", tried=1, ok=1)


def adds_only(layer, ffn):
    """A block that adds a multiple of its FFN's output."""
    layer.mlp.register_forward_hook(lambda module, args, output: ffn * output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_block_adds_of_its_ffn_is_measured(dtype, tokens):
    model = make_llama().to(dtype)
    layers = model.model.layers
    adds_only(layers[0], 0.22)
    layers[2].mlp = Scaled(make_llama().to(dtype).model.layers[2].mlp, outer=lambda y, x: -2.0 * y)
    first, second, third = factors_of(model, tokens)
    assert second == 1.0
    assert first == pytest.approx(0.22, rel={torch.float32: 1e-5}.get(dtype, 1e-3))
    assert third == pytest.approx(-2.0, rel={torch.float32: 1e-5}.get(dtype, 1e-3))


def test_a_scale_by_channel_behind_the_ffn_is_no_multiple(tokens):
    model = make_llama()
    scales = torch.linspace(0.5, 1.5, 32)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * scales)
    assert factors_of(model, tokens) == [1.0, None, 1.0]


def test_a_norm_behind_the_ffn_is_no_multiple_in_half_precision_either(tokens):
    wide = Gemma2Config(**{**ROPE, "hidden_size": 512}, head_dim=8)
    model = Gemma2ForCausalLM(wide).eval().bfloat16()
    assert factors_of(model, tokens) == [None, None]


def test_an_ffn_that_counts_a_fifth_is_pruned_as_one_whose_weights_are_a_fifth(tokens):
    """With the correction of earlier layers' errors, which is in the units of the residual stream."""
    logits = []
    for is_factor in (True, False):
        model = make_llama()
        for layer in model.model.layers:
            if is_factor:
                adds_only(layer, 0.2)
            else:
                with torch.no_grad():
                    layer.mlp.down_proj.weight.mul_(0.2)
        OTPruner.from_pretrained(model, OTPruningConfig(**FAST, target_correction=1.0)).prune(tokens, progress=False)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_ffns_that_are_run_piece_by_piece_are_pruned_as_a_whole(tokens):
    pruned = []
    for size in (0, 4):
        torch.manual_seed(0)
        model = BertLMHeadModel(BertConfig(**BERT, is_decoder=True, chunk_size_feed_forward=size)).eval()
        pruner = OTPruner.from_pretrained(model, OTPruningConfig(**FAST, method="fo_snip"))
        report = pruner.prune(tokens, progress=False)
        assert [layer.chunk_size_feed_forward for layer in model.bert.encoder.layer] == [size] * 2
        assert model.config.chunk_size_feed_forward == size
        pruned.append((weights_of(model), [layer.rescue_ratio for layer in report.layers]))
    (plain, ratios), (chunked, others) = pruned
    assert ratios == others
    assert all(torch.equal(value, chunked[name]) for name, value in plain.items())


def in_place(layer, is_differentiable):
    """The same block, which adds to what its FFN put out, and to what it was given, in place."""

    def forward(hidden_states, **kwargs):
        attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention if is_differentiable else hidden_states.add_(attention)
        return layer.mlp(layer.post_attention_layernorm(hidden_states)).add_(hidden_states)

    layer.forward = forward


@pytest.mark.parametrize("by_gradients", [False, True])
def test_what_is_noted_is_not_changed_by_a_block_that_adds_in_place(by_gradients, tokens):
    options = {**FAST, "method": "fo_snip", "compensation": "ridge"} if by_gradients else FAST
    pruned = []
    for layers in ((), (0, 1, 2)):
        model = make_llama()
        for layer in layers:
            in_place(model.model.layers[layer], by_gradients)
        config = OTPruningConfig(**options, target_correction=1.0)
        OTPruner.from_pretrained(model, config).prune(tokens, batch_size=5, progress=False)
        pruned.append(weights_of(model))
    assert all(torch.equal(value, pruned[1][name]) for name, value in pruned[0].items())


DAMAGED = {
    "lm_head.weight": float("nan"),
    "model.embed_tokens.weight": float("inf"),
    "model.norm.weight": float("-inf"),
    "model.layers.1.self_attn.q_proj.weight": float("nan"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_tensor_that_is_not_finite_is_named_before_pruning_and_before_saving(name, llama, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**FAST))
    with torch.no_grad():
        llama.get_parameter(name)[3] = DAMAGED[name]
    for work in (lambda: pruner.prune(tokens, progress=False), lambda: pruner.save_pretrained(tmp_path / "out")):
        with pytest.raises(NumericalError, match=f"^The parameter '{name}' holds NaN or infinity"):
            work()
    assert not (tmp_path / "out").exists()
    assert llama.model.layers[0].mlp.up_proj.out_features == 48


def test_a_tensor_on_disk_that_is_not_finite_is_named(llama, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(NumericalError, match="'model.layers.1.self_attn.o_proj.weight' holds NaN"):
        check_parameters(place("disk", tmp_path / "dense", tmp_path / "offload"))


def test_every_ffn_is_read_once_before_the_work(llama, tokens, monkeypatch):
    read, plain = [], FFNBlock.read
    monkeypatch.setattr(FFNBlock, "read", lambda block: read.append(block.layer) or plain(block))
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(llama.model.layers[1].mlp, name).weight[:5] = 0.0
        llama.model.layers[1].mlp.down_proj.weight[:, :5] = 0.0
    assert check_parameters(llama, ffn_blocks(llama)) == 5
    read.clear()
    OTPruner.from_pretrained(llama, OTPruningConfig(**{**FAST, "pruning_ratio": 0.0})).prune(tokens, progress=False)
    assert read == [0, 1, 2]


def test_minus_infinity_in_a_buffer_or_in_a_logit_is_no_damage(llama, tokens):
    llama.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    check_parameters(llama)
    del llama.mask
    llama.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([63]), float("-inf"))
    )
    OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).prune(tokens, progress=False)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_logits_that_overflow_are_told_before_pruning_and_before_saving(ratio, llama, tokens, tmp_path):
    with torch.no_grad():
        llama.lm_head.weight.fill_(3e38)
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(**{**FAST, "pruning_ratio": ratio}))
    for work in (lambda: pruner.prune(tokens, progress=False), lambda: pruner.save_pretrained(tmp_path / "out")):
        with pytest.raises(NumericalError, match="^the model's logits are NaN or infinite"):
            work()
    assert llama.model.layers[0].mlp.up_proj.out_features == 48
    assert not (tmp_path / "out").exists()


def test_a_saved_buffer_that_is_nan_is_named(llama):
    llama.register_buffer("scales", torch.tensor([1.0, float("nan")]))
    with pytest.raises(NumericalError, match="The buffer 'scales' holds NaN"):
        check_parameters(llama)


def test_an_ffn_that_overflows_is_named_before_pruning(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NumericalError, match="^Layer 1: the outputs of the FFN are NaN or infinite"):
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).prune(tokens, progress=False)


def test_logits_that_are_not_finite_after_pruning_are_told(llama, tokens):
    narrow = llama.model.layers[2].mlp
    llama.lm_head.register_forward_hook(
        lambda module, args, output: output if narrow.up_proj.out_features == 48 else output / 0
    )
    with pytest.raises(NumericalError, match="^the model's logits are NaN or infinite"):
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).prune(tokens, progress=False)


def test_tuning_checks_the_model_once(llama, tokens, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return measured_factors(*args)

    monkeypatch.setattr(tuning, "measured_factors", counted)
    monkeypatch.setattr(passes, "measured_factors", None)
    OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).tune(tokens, num_trials=2, progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 40)])
def test_samples_of_any_size_are_enough_for_the_check(shape, llama):
    assert factors_of(llama, torch.arange(shape[0] * shape[1]).view(shape) % 64) == [1.0] * 3
