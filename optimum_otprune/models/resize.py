"""What a model's configuration must say, and its FFNs must hold, after their widths changed."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.models.architectures import FFNSpec
from optimum_otprune.models.ffn_block import FFNBlock


def finish_resize(model: PreTrainedModel, blocks: list[FFNBlock], non_uniform_format: str) -> int:
    """Make configuration and FFNs agree so that the model can be saved and loaded.

    Widths that differ are filled up with channels of zeros to the widest, which changes no output (`"pad"`), or
    written into the configuration layer by layer (`"per_layer_config"`).

    Args:
        model: The model.
        blocks: All its FFN blocks, in order.
        non_uniform_format: `"pad"` or `"per_layer_config"`.

    Returns:
        How many parameters are zeros that only fill up.
    """
    spec = blocks[0].spec
    if _add_biases(blocks) and spec.bias_key is not None:
        setattr(model.config, spec.bias_key, True)
    widths = [block.intermediate_size for block in blocks]
    setattr(model.config, spec.size_key, max(widths))
    if len(set(widths)) == 1:
        return 0
    if non_uniform_format == "per_layer_config":
        model.config.per_layer_config = {layer: {spec.size_key: width} for layer, width in enumerate(widths)}
        return 0
    before = model.num_parameters()
    for block in blocks:
        if block.intermediate_size < max(widths):
            block.install(padded(block.read(), max(widths)))
    return model.num_parameters() - before


def switches_biases(model: PreTrainedModel, spec: FFNSpec) -> bool:
    """Whether a switch in the model's configuration gives its FFNs biases."""
    return spec.bias_key is not None and bool(getattr(model.config, spec.bias_key, False))


def padded(weights: FFNWeights, width: int) -> FFNWeights:
    """Return the same FFN with channels of zeros added to a width; its outputs stay as they are.

    Args:
        weights: Of at most that width.
        width: Channels of the result.

    Example:
        >>> padded(FFNWeights(up=torch.ones(2, 3), down=torch.ones(3, 2)), 4).down[0]
        tensor([1., 1., 0., 0.])
    """
    missing = width - weights.intermediate_size

    def rows(part: Tensor | None) -> Tensor | None:
        return None if part is None else torch.cat([part, part.new_zeros(missing, *part.shape[1:])])

    down = torch.cat([weights.down, weights.down.new_zeros(weights.hidden_size, missing)], dim=1)
    return FFNWeights(
        rows(weights.up),  # type: ignore[arg-type]
        down,
        rows(weights.gate),
        rows(weights.up_bias),
        rows(weights.gate_bias),
        weights.down_bias,
    )


def _add_biases(blocks: list[FFNBlock]) -> bool:
    """Give zero biases to the FFNs that lack them if any FFN has gained one: a configuration knows all or none.

    Returns:
        Whether the FFNs have biases now.
    """
    if all(getattr(block.projection("down"), "bias", None) is None for block in blocks):
        return False
    for block in blocks:
        weight = block.read()  # one layer at a time: others may be on disk
        gate_bias = None if weight.gate is None else _bias_or_zeros(weight.gate_bias, weight.gate)
        block.install(
            weight._replace(
                up_bias=_bias_or_zeros(weight.up_bias, weight.up),
                gate_bias=gate_bias,
                down_bias=_bias_or_zeros(weight.down_bias, weight.down),
            )
        )
    return True


def _bias_or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
