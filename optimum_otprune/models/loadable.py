"""Whether a model that is saved can be loaded: its class is built from its configuration, and compared."""

import copy
import inspect

import torch
from transformers import PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError, raised
from optimum_otprune.models.architectures import find_spec
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.find_ffns import known_blocks


def check_loadable(model: PreTrainedModel) -> None:
    """Raise if a saved model could not be loaded, because its class does not build the weights that it holds.

    A model is built from a copy of the configuration on the meta device, and its weights are compared. A class whose
    constructor wants more than a configuration is not checked: transformers could not load it either.

    Raises:
        UnsupportedModelError: If a weight is missing, unknown or of another shape; the message names the first one.
    """
    if not _is_built_from_its_configuration(model):
        return
    config, uneven = copy.deepcopy(model.config), set()
    is_uneven = any(getattr(part, "is_heterogeneous", False) for part in (config, config.get_text_config()))
    if is_uneven and type(model).__module__.startswith("transformers.models."):
        _, spec = find_spec(model)
        fields = spec.fields_of(config)
        # Only the modeling file that is saved with such a model builds its widths.
        if spec.size_key in (fields.per_layer_attributes or ()):
            fields.per_layer_config = spec.others_per_layer(config) or None
            uneven = {module for block in known_blocks(model, spec) for module in block.modules}
    with torch.device("meta"):
        built = _shapes(type(model)(config))
    held = _shapes(model)
    ignored = {
        f"{path}.{name}" for path, part in model.named_modules() if part in uneven for name in ("weight", "bias")
    }
    for name in (*held, *built):
        is_there = name in held and name in built
        if is_there and (held[name] == built[name] or name in ignored):
            continue
        found = f"of shape {held[name]}" if name in held else "not there"
        wanted = f"of shape {built[name]}" if name in built else "not known"
        raise UnsupportedModelError(
            f"The weight {name!r} is {found} in the model, but {wanted} to {type(model).__name__} with the model's "
            "configuration, so that what is saved could not be loaded. Put back the module that stood there: merge "
            "adapters, remove parametrizations, masks of `torch.nn.utils.prune` and wrappers."
        )


def check_resizable(model: PreTrainedModel, blocks: list[FFNBlock]) -> None:
    """Raise if the width of a model's FFNs does not follow from the configuration as its architecture says.

    A model is built from a copy of the configuration with half the width, on the meta device, and asked for its width.

    Args:
        model: The model.
        blocks: All of its FFN blocks, in order.

    Raises:
        UnsupportedModelError: If the FFNs of that model have another width, or it cannot be built.
    """
    if not _is_built_from_its_configuration(model):
        return
    _, spec = find_spec(model)
    wanted = [block.times * max(1, block.intermediate_size // block.times // 2) for block in blocks]
    config = copy.deepcopy(model.config)
    for block, width in zip(blocks, wanted):
        block.spec.write_width(config, width)
    try:
        with torch.device("meta"):
            built = known_blocks(type(model)(config), spec)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} {raised(error)} when it is built with FFNs of {wanted[0]} channels, so no "
            "pruned model could be loaded. Such models cannot be pruned."
        ) from error
    found = [block.intermediate_size for block in built]
    if found != wanted:
        first = next((i for i, (one, other) in enumerate(zip(wanted, found)) if one != other), 0)
        raise UnsupportedModelError(
            f"The field `{blocks[first].spec.size_key}` of the configuration does not decide the width of the FFNs of "
            f"{type(model).__name__}: built with {wanted[first]} channels, {blocks[first].name} has "
            f"{found[first] if found else 'none'}. What is saved could not be loaded. Give the right field as "
            "`size_key` to `register_architecture`, or choose another model."
        )


def _is_built_from_its_configuration(model: PreTrainedModel) -> bool:
    """Return whether a model's class wants nothing but a configuration; transformers could load no other."""
    try:
        inspect.signature(type(model)).bind(model.config)
    except TypeError:
        return False
    return True


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
