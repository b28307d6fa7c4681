"""Find the FFNs of a model, and refuse models whose FFNs cannot be pruned."""

from torch import nn
from transformers import PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.architectures import ffns_of, find_blocks, find_spec, submodule
from optimum_otprune.models.ffn_block import FFNBlock, by_block
from optimum_otprune.models.ffn_spec import FFNSpec
from optimum_otprune.models.wrappers import check_plain

# Grouped products of matrices, by which transformers runs experts, want rows of whole multiples of 16 bytes; a model
# may be loaded in 16 bits.
_EXPERT_MULTIPLE = 8


def known_blocks(model: PreTrainedModel, spec: FFNSpec) -> list[FFNBlock]:
    """Return the FFN blocks of a model of a known architecture, in the order of its forward pass.

    Args:
        model: The model.
        spec: The architecture that fits it.
    """
    places = [(module, one) for one in spec.lists for module in find_blocks(model, one)]
    of_experts = {(kind.config, kind.size_key) for one in spec.lists for kind in one.kinds if kind.is_stacked}
    found: list[FFNBlock] = []
    for index, (module, one) in enumerate(places):
        for kind in ffns_of(module, one):
            times = kind.times(model.config)
            multiple = _EXPERT_MULTIPLE if (kind.config, kind.size_key) in of_experts else 1
            found += [
                FFNBlock(module, kind, len(found) + i, block=index, expert=e, times=times, least_multiple=multiple)
                for i, e in enumerate(range(_num_experts(module, kind)) if kind.is_stacked else (None,))
            ]
    return found


def _num_experts(block: nn.Module, spec: FFNSpec) -> int:
    slot = spec.slots["up"]
    holder = submodule(block, slot.path)
    assert holder is not None
    return len(holder.get_parameter(slot.parameter))


def ffn_blocks(model: PreTrainedModel) -> list[FFNBlock]:
    """Return the FFN blocks of a model, in the order of its forward pass.

    Raises:
        UnsupportedModelError: If the model has no known FFN, takes something else than token ids, is quantized or
            adapted, or its layers share a module.
    """
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "This model is quantized already; its packed weights cannot be pruned. Prune the original model first, "
            "save it, and quantize the pruned one."
        )
    check_plain(model)
    _check_inputs(model)
    blocks = known_blocks(model, find_spec(model)[1])
    if len({block.module for block in blocks}) < len(by_block(blocks)):
        raise UnsupportedModelError(
            "Layers of this model share one module, so that none can be pruned for itself. Prune a model whose layers "
            "have weights of their own."
        )
    for block in blocks:
        if not block.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"The FFN weights of layer {block.layer} are {block.dtype}. Prune the model before it is quantized."
            )
    for group in by_block(blocks):
        _check_alone(group)
    return blocks


def _check_inputs(model: PreTrainedModel) -> None:
    """Raise if a model does not make its hidden states of one sequence of token ids."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # more than one, as of a text and a picture model side by side
        embeddings = None
    if model.main_input_name != "input_ids" or not isinstance(getattr(embeddings, "num_embeddings", None), int):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes pictures, sound or the like (`{model.main_input_name}`) beside or in place "
            "of token ids, which calibration data consist of. Prune a model of text."
        )


def dense_width(blocks: list[FFNBlock]) -> int:
    """Return the width that all FFNs have now.

    Raises:
        UnsupportedModelError: If the FFNs differ in width.
    """
    check_dense(blocks)
    widths = sorted({block.intermediate_size for block in blocks})
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"The FFNs of this model have different widths ({widths}), as those of an encoder and its decoder, or "
            "experts and what stands beside them, and what was asked for needs one width. Give a `pruning_ratio`, or "
            "choose a model of one width."
        )
    return widths[0]


def check_dense(blocks: list[FFNBlock]) -> None:
    """Raise if FFNs of one list of layers differ in width, as those of a pruned model do.

    Raises:
        UnsupportedModelError: If they do.
    """
    widths: dict[tuple[str, str, str | None], set[int]] = {}
    for block in blocks:
        spec = block.spec
        widths.setdefault((spec.layers, spec.kind, spec.size_key), set()).add(block.intermediate_size)
    for found in widths.values():
        if len(found) > 1:
            raise UnsupportedModelError(
                f"The layers of this model have different FFN widths ({min(found)} to {max(found)}): it was pruned "
                "already. Prune the dense model instead."
            )


def _check_alone(group: list[FFNBlock]) -> None:
    """Raise if a block has experts, or other FFNs, beside the known ones, since only those would be pruned.

    Experts are stacked in one tensor of three dimensions, or are a list of modules with FFN-like weights each.
    """
    block, known = group[0], {module for one in group for module in one.modules}
    hidden_size = block.hidden_size
    for name, module in block.module.named_modules():
        if module in known:
            continue
        is_convolution = isinstance(module, nn.modules.conv._ConvNd)
        parts = [part for part in module._parameters.values() if part is not None and part.ndim == 3]
        matching = any(min(part.shape) > 1 and hidden_size in part.shape[1:] for part in parts)
        stacked = matching and not is_convolution
        listed = isinstance(module, nn.ModuleList) and sum(_is_ffn(part, hidden_size) for part in module) > 1
        if stacked or listed:
            raise UnsupportedModelError(
                f"Block {block.block} has experts, or other FFNs, beside those that are known (at {name!r}), which "
                "alone would be pruned. Prune a model of another architecture."
            )


def _is_ffn(module: nn.Module, hidden_size: int) -> bool:
    """Return whether a module has matrices from the hidden size to another size, and back."""
    shapes = [part.shape for part in module.parameters() if part.ndim == 2 and part.shape[0] != part.shape[1]]
    return any(shape[1] == hidden_size for shape in shapes) and any(shape[0] == hidden_size for shape in shapes)
