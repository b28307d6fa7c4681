"""Every layout that this package knows: one entry of data each, grouped by what differs."""

from dataclasses import replace

from optimum_otprune.models.ffn_spec import DENSE, EXPERTS, PROJECTIONS, SHARED, FFNSpec, Function, Method, Slot


def _plain(layers: str, up: str, down: str, activation: str, size_key: str | None = "intermediate_size") -> FFNSpec:
    """Return the layout of an FFN without a gate: two linear modules and a function between them."""
    return FFNSpec(layers=layers, up=up, down=down, activation=activation, size_key=size_key)


def _gated(ffn: str) -> FFNSpec:
    """Return the layout of an FFN whose module has a gate, an up and a down projection, and repeats the width."""
    return FFNSpec(
        layers="layers",
        gate=f"{ffn}.gate_proj",
        up=f"{ffn}.up_proj",
        down=f"{ffn}.down_proj",
        activation=f"{ffn}.act_fn",
        size_attributes=(f"{ffn}.intermediate_size",),
    )


def _t5(layers: str, ffn: str) -> FFNSpec:
    """Return the layout of T5's first version in one of its lists."""
    return _plain(layers, f"{ffn}.wi", f"{ffn}.wo", f"{ffn}.act", "d_ff")


def _t5_gated(layers: str, ffn: str) -> FFNSpec:
    """Return the layout of T5 1.1 and mT5 in one of its lists."""
    return replace(_t5(layers, ffn), gate=f"{ffn}.wi_0", up=f"{ffn}.wi_1")


# Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma, …: gated, with a norm before the FFN only.
_GATED = replace(_gated("mlp"), bias_key="mlp_bias")
# Phi-3, GLM 4: gate and up projection are one matrix.
_FUSED = replace(
    _GATED,
    gate=Slot("mlp.gate_up_proj", 0, 2),
    up=Slot("mlp.gate_up_proj", 1, 2),
    activation="mlp.activation_fn",
    bias_key=None,
)
# Bamba, Falcon H1: the same as Llama's under another name.
_FEED_FORWARD = replace(_gated("feed_forward"), bias_key="mlp_bias")
# LFM 2 and 3: three numbered matrices, and a function that is called by name.
_NUMBERED = FFNSpec(
    layers="layers",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    activation=Function("silu"),
    size_attributes=("feed_forward.intermediate_size",),
    also_set=(("block_auto_adjust_ff_dim", False),),
)
_BERT = FFNSpec(
    layers="encoder.layer",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    residual=False,
)

# Models that have no number of shared experts of their own have one.
_SHARED_KEYS: tuple[tuple[str, str | None], ...] = (
    ("shared_expert_intermediate_size", None),
    ("shared_experts_intermediate_size", None),
    ("moe_shared_expert_intermediate_size", None),
    ("shared_intermediate_size", None),
    ("moe_intermediate_size", "n_shared_experts"),
    ("moe_intermediate_size", "num_shared_experts"),
    ("moe_intermediate_size", "moe_num_shared_experts"),
    ("moe_intermediate_size", None),
    ("intermediate_size", "num_shared_experts"),
    ("intermediate_size", "moe_num_shared_experts"),
    ("intermediate_size", None),
)
_DENSE_KEYS = ("intermediate_size", "dense_intermediate_size", "prefix_dense_intermediate_size", "ffn_hidden_size")
_SHARED_FUSED = FFNSpec(
    layers="layers",
    kind=SHARED,
    gate=Slot("shared_mlp.input_linear", 0, 2),
    up=Slot("shared_mlp.input_linear", 1, 2),
    down="shared_mlp.output_linear",
    activation="shared_mlp.activation",
    size_key="shared_intermediate_size",
    size_attributes=("shared_mlp.hidden_size",),
    residual=False,
)


def _interleaved(spec: FFNSpec) -> FFNSpec:
    """Return the layout of experts whose gate and up projections take turns, as those of GPT-OSS, stored (in, out)."""
    gate, up, down = (spec.slots[name]._replace(is_interleaved=True) for name in PROJECTIONS)
    return replace(spec, gate=gate, up=up, down=down, transposed=True, beside=())


def _stacked(holder: str) -> FFNSpec:
    """Return the layout of experts whose matrices one module stacks, gate and up projection together."""
    return FFNSpec(
        layers="layers",
        kind=EXPERTS,
        gate=Slot(holder, 0, 2, "gate_up_proj"),
        up=Slot(holder, 1, 2, "gate_up_proj"),
        down=Slot(holder, parameter="down_proj"),
        activation=f"{holder}.act_fn",
        residual=False,
    )


def _experts(holder: str, size_key: str, *dense: FFNSpec) -> FFNSpec:
    """Return the layout of experts that a router chooses from, with what may stand beside them.

    Args:
        holder: Path of the module that stacks the experts' matrices, relative to a block.
        size_key: Field of the configuration that holds the width of an expert.
        *dense: The layouts of FFNs that blocks without experts have.
    """
    ffn = holder.rpartition(".")[0]
    shared = [
        replace(_gated(f"{ffn}.{name}"), kind=SHARED, size_key=key, times_key=times, residual=False)
        for name in ("shared_expert", "shared_experts", "shared_mlp")
        for key, times in _SHARED_KEYS
    ]
    return replace(
        _stacked(holder),
        activation=Method(f"{holder}._apply_gate"),
        size_key=size_key,
        size_attributes=(f"{holder}.intermediate_dim", f"{holder}.intermediate_size"),
        beside=(*shared, _SHARED_FUSED, *(replace(one, size_key=key) for one in dense for key in _DENSE_KEYS)),
    )


# Nemotron-H: FFNs without a gate stand between blocks of attention or Mamba alone.
_NEMOTRON_H = replace(
    _plain("layers", "mixer.up_proj", "mixer.down_proj", "mixer.act_fn"),
    bias_key="mlp_bias",
    size_attributes=("mixer.intermediate_size",),
    instead=("mixer.o_proj", "mixer.conv1d"),
)
_NEMOTRON_H_EXPERTS = FFNSpec(
    layers="layers",
    kind=EXPERTS,
    up=Slot("mixer.experts", parameter="up_proj"),
    down=Slot("mixer.experts", parameter="down_proj"),
    activation="mixer.experts.act_fn",
    size_key="moe_intermediate_size",
    size_attributes=("mixer.experts.intermediate_dim",),
    residual=False,
    instead=_NEMOTRON_H.instead,
    beside=(
        replace(
            _plain("layers", *(f"mixer.shared_experts.{name}" for name in ("up_proj", "down_proj", "act_fn"))),
            kind=SHARED,
            size_key="moe_shared_expert_intermediate_size",
            size_attributes=("mixer.shared_experts.intermediate_size",),
            residual=False,
        ),
        replace(_NEMOTRON_H, bias_key=None),
    ),
)


def _llama4(ffn: str, size_key: str, kind: str = DENSE) -> FFNSpec:
    """Return the layout of Llama 4's dense or shared FFNs.

    What holds the blocks has another name than the class of the model says (`base_model_prefix`), so that `base_model`
    is the whole model.
    """
    spec = replace(_gated(ffn), activation=f"{ffn}.activation_fn", size_key=size_key)
    return replace(spec, layers="model.layers", kind=kind, residual=False)


# Llama 4: experts are given their tokens sorted.
_LLAMA4 = replace(
    _stacked("feed_forward.experts"),
    layers="model.layers",
    size_attributes=("feed_forward.experts.intermediate_size", "feed_forward.experts.expert_dim"),
    transposed=True,
    is_sorted=True,
    beside=(
        _llama4("feed_forward.shared_expert", "intermediate_size", SHARED),
        _llama4("feed_forward", "intermediate_size_mlp"),
    ),
)


# Of several that fit, the last one is taken: those that ask for less stand before those that ask for more.
LAYOUTS: dict[str, FFNSpec] = {
    # The width is a whole multiple of the hidden size, mostly written in the code.
    "bloom": _plain("h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.gelu_impl", None),
    "gpt_neox_japanese": _plain("layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act", None),
    "openai-gpt": replace(_plain("h", "mlp.c_fc", "mlp.c_proj", "mlp.act", None), transposed=True),
    "xlm": _plain("ffns", "lin1", "lin2", "act", None),
    "mpt": _plain("blocks", "ffn.up_proj", "ffn.down_proj", "ffn.act", None),
    # Layers share their FFN.
    "albert": replace(
        _plain(
            "encoder.albert_layer_groups",
            "albert_layers.0.ffn",
            "albert_layers.0.ffn_output",
            "albert_layers.0.activation",
        ),
        is_reused=True,
    ),
    "hrm_text": replace(_GATED, layers="H_module.layers", is_reused=True),
    "zamba": replace(_gated("shared_transf.feed_forward"), instead=("mamba",), is_reused=True),
    "zamba2": replace(
        _FUSED,
        gate=Slot("shared_transformer.feed_forward.gate_up_proj", 0, 2),
        up=Slot("shared_transformer.feed_forward.gate_up_proj", 1, 2),
        down="shared_transformer.feed_forward.down_proj",
        activation="shared_transformer.feed_forward.act_fn",
        instead=("mamba",),
        is_reused=True,
    ),
    "nemotron": replace(_plain("layers", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"), bias_key="mlp_bias"),
    "llama": _GATED,
    # Gemma 2 and 3, OLMo 2, …: a norm stands between the FFN and the residual stream.
    "llama_post_norm": replace(_GATED, residual=False, requires=("post_feedforward_layernorm",)),
    "bamba": _FEED_FORWARD,
    "falcon_h1": replace(_FEED_FORWARD, gate_factor="feed_forward.gate_multiplier"),
    "recurrent_gemma": replace(_gated("mlp_block"), size_factor=2),
    "lfm2": _NUMBERED,
    "phi3": _FUSED,
    # Moshi's field holds the width of gate and up projection together.
    "moshi": replace(
        _FUSED,
        gate=Slot("mlp.fc1", 0, 2),
        up=Slot("mlp.fc1", 1, 2),
        down="mlp.fc2",
        size_key="ffn_dim",
        size_factor=2,
        size_attributes=(),
    ),
    "glm4": replace(_FUSED, residual=False, requires=("post_mlp_layernorm",)),
    "modernbert": FFNSpec(
        layers="layers",
        gate=Slot("mlp.Wi", 0, 2),
        up=Slot("mlp.Wi", 1, 2),
        down="mlp.Wo",
        activation="mlp.act",
        bias_key="mlp_bias",
    ),
    "gpt2": replace(_plain("h", "mlp.c_fc", "mlp.c_proj", "mlp.act", "n_inner"), transposed=True),
    "gpt_bigcode": _plain("h", "mlp.c_fc", "mlp.c_proj", "mlp.act", "n_inner"),
    "gpt_neo": _plain("h", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "gptj": _plain("h", "mlp.fc_in", "mlp.fc_out", "mlp.act", "n_inner"),
    "falcon": _plain("h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act", "ffn_hidden_size"),
    "ctrl": _plain("h", "ffn.0", "ffn.2", "ffn.1", "dff"),
    "starcoder2": _plain("layers", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "phi": _plain("layers", "mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
    "gpt_neox": _plain("layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act"),
    "biogpt": _plain("layers", "fc1", "fc2", "activation_fn"),
    "xglm": _plain("layers", "fc1", "fc2", "activation_fn", "ffn_dim"),
    # The 350M model of OPT has its norm behind the FFN.
    "opt": replace(_plain("decoder.layers", "fc1", "fc2", "activation_fn", "ffn_dim"), residual=False),
    "trocr": replace(_plain("decoder.layers", "fc1", "fc2", "activation_fn", "decoder_ffn_dim"), residual=False),
    "esm": replace(_BERT, activation=Function("gelu"), residual=True),
    "bert": _BERT,
    "distilbert": replace(
        _plain("transformer.layer", "ffn.lin1", "ffn.lin2", "ffn.activation", "hidden_dim"), residual=False
    ),
    "bart": replace(
        _plain("encoder.layers", "fc1", "fc2", "activation_fn", "encoder_ffn_dim"),
        residual=False,
        then=replace(_plain("decoder.layers", "fc1", "fc2", "activation_fn", "decoder_ffn_dim"), residual=False),
    ),
    "t5": replace(_t5("encoder.block", "layer.1.DenseReluDense"), then=_t5("decoder.block", "layer.2.DenseReluDense")),
    "t5_gated": replace(
        _t5_gated("encoder.block", "layer.1.DenseReluDense"),
        then=_t5_gated("decoder.block", "layer.2.DenseReluDense"),
    ),
    "t5gemma": replace(
        _GATED,
        layers="encoder.layers",
        config="encoder",
        residual=False,
        bias_key=None,
        then=replace(_GATED, layers="decoder.layers", config="decoder", residual=False, bias_key=None),
    ),
    "clip_text": _plain("encoder.layers", "mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
    "granitemoe": _experts("block_sparse_moe.experts", "intermediate_size"),
    "jamba": _experts("feed_forward.experts", "intermediate_size", _gated("feed_forward")),
    "lfm2_moe": _experts("feed_forward.experts", "moe_intermediate_size", _NUMBERED),
    "aria_text": replace(_experts("mlp.experts", "intermediate_size"), transposed=True),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H_EXPERTS,
    "llama4": _LLAMA4,
    "gpt_oss": _interleaved(_experts("mlp.experts", "intermediate_size")),
    "mixtral": _experts("mlp.experts", "intermediate_size", _gated("mlp")),
    "qwen2_moe": _experts("mlp.experts", "moe_intermediate_size", _gated("mlp")),
}
