"""An architecture is one line of data."""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_otprune.errors import RegistryError, UnsupportedModelError


@dataclass(frozen=True)
class FFNSpec:
    """Where the FFN is in a model; it is recognized by these paths, never by a model's name.

    Attributes:
        layers: Path of the list of blocks, relative to `model.base_model`.
        up: Path of the up projection, relative to a block.
        down: Path of the down projection, relative to a block.
        activation: Path of the activation function, relative to a block.
        gate: Path of the gate projection, or None for an FFN that is not gated.
        size_key: Field of the model's configuration that holds the FFN's width.
        bias_key: Field of the configuration that gives all three projections a bias, or None.
        size_attributes: Attributes of modules, relative to a block, that repeat the width.
        transposed: Whether weights are stored (in, out), as in GPT-2's Conv1D.
        residual: Whether the FFN's output is added to the residual stream as it is, without a norm after it.
        requires: Other paths that must exist in a block, to tell look-alikes apart.
    """

    layers: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    size_key: str = "intermediate_size"
    bias_key: str | None = None
    size_attributes: tuple[str, ...] = ()
    transposed: bool = False
    residual: bool = True
    requires: tuple[str, ...] = ()


ARCHITECTURES: dict[str, FFNSpec] = {}


def register_architecture(name: str, spec: FFNSpec) -> None:
    """Register an architecture; of several that fit a model, the one registered last is taken.

    Args:
        name: The name of the architecture in messages and reports.
        spec: The place of the FFN in a model of this architecture.

    Raises:
        RegistryError: If the name is taken already.
    """
    if name in ARCHITECTURES:
        raise RegistryError(f"The architecture {name!r} is registered already. Choose another name.")
    ARCHITECTURES[name] = spec


def find_spec(model: PreTrainedModel) -> tuple[str, FFNSpec]:
    """Return the name and the spec of the architecture that fits a model.

    Raises:
        UnsupportedModelError: If none fits every block.
    """
    for name, spec in reversed(ARCHITECTURES.items()):
        if _fits(model, spec):
            return name, spec
    raise UnsupportedModelError(
        f"No known FFN was found in {type(model).__name__} (model type {model.config.model_type!r}). Known layouts: "
        f"{', '.join(ARCHITECTURES)}. Mixture-of-experts models are not supported; for another dense one, "
        "`register_architecture(name, FFNSpec(...))` says where its FFN is."
    )


def find_blocks(model: PreTrainedModel, spec: FFNSpec) -> list[nn.Module]:
    """Return the blocks of a model, in order."""
    layers = submodule(model.base_model, spec.layers)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module or function that a dotted path leads to, or None if there is none."""
    current: nn.Module | None = module
    for part in path.split("."):
        current = getattr(current, part, None)
    return current


def _has_size(config: PreTrainedConfig, key: str) -> bool:
    """Return whether a configuration holds a width, for all layers or one by one (then reading it raises)."""
    return key in (getattr(config, "per_layer_attributes", None) or ()) or hasattr(config, key)


def _fits(model: PreTrainedModel, spec: FFNSpec) -> bool:
    layers = submodule(model.base_model, spec.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not _has_size(model.config, spec.size_key):
        return False
    if any(submodule(block, path) is None for block in layers for path in spec.requires):
        return False
    paths = [path for path in (spec.gate, spec.up, spec.down) if path is not None]
    if not all(_is_projection(submodule(block, path), spec) for block in layers for path in paths):
        return False
    return all(callable(submodule(block, spec.activation)) for block in layers)


def _is_projection(module: nn.Module | None, spec: FFNSpec) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return False
    return not spec.transposed or hasattr(module, "nf")  # as Conv1D has, and no linear module


# Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma, …: gated, with a norm before the FFN only.
_GATED = FFNSpec(
    layers="layers",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    bias_key="mlp_bias",
    size_attributes=("mlp.intermediate_size",),
)
register_architecture("llama", _GATED)
# Gemma 2 and 3, OLMo 2, …: a norm stands between the FFN and the residual stream.
register_architecture("llama_post_norm", replace(_GATED, residual=False, requires=("post_feedforward_layernorm",)))
register_architecture(
    "gpt2",
    FFNSpec(
        layers="h",
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="mlp.act",
        size_key="n_inner",
        transposed=True,
    ),
)
register_architecture(
    "opt",
    FFNSpec(
        layers="decoder.layers",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        size_key="ffn_dim",
        residual=False,  # the 350M model has its norm behind the FFN
    ),
)
register_architecture(
    "gpt_neox",
    FFNSpec(layers="layers", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.act"),
)
register_architecture(
    "bert",
    FFNSpec(
        layers="encoder.layer",
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        residual=False,
    ),
)
BUILT_IN = tuple(ARCHITECTURES)
