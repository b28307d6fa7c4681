"""The registered architectures, and which of them a model is of."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_otprune.errors import RegistryError, UnsupportedModelError
from optimum_otprune.models.ffn_spec import FFNSpec, Function, Method, Slot
from optimum_otprune.models.layouts import LAYOUTS

ARCHITECTURES: dict[str, FFNSpec] = {}
_TEXT_CONFIG = "text_config"  # transformers' name of the part of a configuration that is the text model's


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


for _name, _spec in LAYOUTS.items():
    register_architecture(_name, _spec)
BUILT_IN = tuple(ARCHITECTURES)


def find_spec(model: PreTrainedModel) -> tuple[str, FFNSpec]:
    """Return the name and the spec of the architecture that fits a model, or the text model inside it.

    For a text model inside a larger one, the paths of the spec are those from the larger one.

    Raises:
        UnsupportedModelError: If none fits every block, or no configuration can hold another width.
    """
    for name, spec in _candidates(model):
        if not _fits(model, spec):
            continue
        spec = _resolved(model, spec)
        if spec.size_key is None:
            raise UnsupportedModelError(
                f"The width of the FFNs of {type(model).__name__} follows from the hidden size in its code: no "
                "configuration can hold another, so that a pruned model could not be loaded. Choose a model whose "
                "configuration has a field for that width."
            )
        return name, spec
    raise UnsupportedModelError(
        f"No known FFN was found in {type(model).__name__} (model type {model.config.model_type!r}): none of the "
        f"{len(ARCHITECTURES)} known layouts fits every block. `register_architecture(name, FFNSpec(...))` says where "
        "the FFN of another one is."
    )


def find_blocks(model: PreTrainedModel, spec: FFNSpec) -> list[nn.Module]:
    """Return the blocks of a model's first list, or of its only one, in order."""
    layers = submodule(model.base_model, spec.layers)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def ffns_of(block: nn.Module, spec: FFNSpec) -> list[FFNSpec]:
    """Return the kinds of FFNs that a block has, of those that a spec says.

    Args:
        block: A block of a list that the spec fits.
        spec: The spec that fits the model, from `find_spec`.
    """
    return [spec] if not spec.beside else [one for one in spec.kinds if _has_ffn(block, one)]


def is_built_in(spec: FFNSpec) -> bool:
    """Return whether an architecture is one of this package, be it that of a text model inside a larger one."""
    known = [ARCHITECTURES[name] for name in BUILT_IN]
    inside = [one.inside(spec.layers.removesuffix(f".{one.layers}"), _TEXT_CONFIG) for one in known]
    return spec in known or spec in inside


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module or function that a dotted path leads to, or None if there is none."""
    current: nn.Module | None = module
    for part in path.split("."):
        current = getattr(current, part, None)
    return current


def _candidates(model: PreTrainedModel) -> Iterator[tuple[str, FFNSpec]]:
    """Yield every architecture, the last one first: as it is, then as that of a text model inside a larger model."""
    yield from reversed(ARCHITECTURES.items())
    for path, part in _text_models(model):
        for name, spec in reversed(ARCHITECTURES.items()):
            yield name, spec.inside(path, part)


def _text_models(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield the path, from `model.base_model`, of a text model inside a larger one, and its part of the configuration.

    Beside it stands what makes hidden states of pictures or sound, which is left as it is.
    """
    text = getattr(model.config, _TEXT_CONFIG, None)
    for name, inner in model.base_model.named_children():
        if isinstance(inner, PreTrainedModel) and type(inner.config) is type(text):
            yield name if inner.base_model is inner else f"{name}.{inner.base_model_prefix}", _TEXT_CONFIG


def _has_size(config: PreTrainedConfig, key: str) -> bool:
    """Return whether a configuration holds a width, for all layers or one by one (then reading it raises)."""
    return key in (getattr(config, "per_layer_attributes", None) or ()) or hasattr(config, key)


def _fits(model: PreTrainedModel, spec: FFNSpec) -> bool:
    """Return whether every block has its FFN where a spec says, and an encoder with a decoder two lists of them."""
    has_both = bool(model.config.is_encoder_decoder)
    return has_both == (spec.then is not None) and all(_fits_list(model, one) for one in spec.lists)


def _fits_list(model: PreTrainedModel, spec: FFNSpec) -> bool:
    layers = submodule(model.base_model, spec.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    if spec.config and not isinstance(getattr(model.config, spec.config, None), PreTrainedConfig):
        return False
    if spec.size_key is not None and not _has_size(spec.fields_of(model.config), spec.size_key):
        return False
    if not spec.beside:
        return all(_has_ffn(block, spec) for block in layers)
    kinds = [one for one in spec.kinds if any(_says_width(model, block, one) for block in layers)]
    return spec in kinds and all(any(_has_ffn(block, one) for one in kinds) for block in layers)


def _resolved(model: PreTrainedModel, spec: FFNSpec) -> FFNSpec:
    """Return a spec that fits with those of the other FFNs alone that are there, one for each place."""
    layers = submodule(model.base_model, spec.layers)
    assert isinstance(layers, nn.ModuleList)
    there: dict[str, FFNSpec] = {}
    for one in spec.beside:
        if any(_says_width(model, block, one) for block in layers):
            there.setdefault(one.slots["up"].path, one)
    return replace(spec, beside=tuple(there.values()))


def _says_width(model: PreTrainedModel, block: nn.Module, spec: FFNSpec) -> bool:
    """Return whether a block has an FFN, and the configuration says its width where the spec looks for that."""
    if not _has_ffn(block, spec):
        return False
    slot = spec.slots["up"]
    module = submodule(block, slot.path)
    assert module is not None
    width = module.get_parameter(slot.parameter).shape[-1 if spec.transposed else -2] // slot.parts
    return spec.width_in(model.config) == width


def _has_ffn(block: nn.Module, spec: FFNSpec) -> bool:
    if any(submodule(block, path) is None for path in spec.requires):
        return False
    if not all(_is_projection(submodule(block, slot.path), slot, spec) for slot in spec.slots.values()):
        return False
    if spec.gate_factor is not None and not isinstance(submodule(block, spec.gate_factor), (int, float)):
        return False
    if isinstance(spec.activation, Function):
        return True
    path = spec.activation.path if isinstance(spec.activation, Method) else spec.activation
    return callable(submodule(block, path))


def _is_projection(module: object, slot: Slot, spec: FFNSpec) -> bool:
    weight = getattr(module, slot.parameter, None)
    if not isinstance(weight, nn.Parameter):
        return False
    if spec.is_stacked:  # marks that transformers gives its modules of experts
        marks = (not slot.is_interleaved, False, spec.transposed)
        names = ("is_concatenated", "has_post_expert_norm", "is_transposed")
        return weight.ndim == 3 and tuple(getattr(module, name, None) for name in names) == marks
    return weight.ndim == 2 and spec.transposed == hasattr(module, "nf")  # as Conv1D has, and no linear module
