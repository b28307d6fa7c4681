"""Make a model's configuration and its FFNs agree after their widths changed."""

from numbers import Integral

from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import CustomFunctionError
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.ffn_spec import FFNSpec
from optimum_otprune.models.save_formats import called, saved_widths


def finish_resize(model: PreTrainedModel, blocks: list[FFNBlock], non_uniform_format: str) -> int:
    """Make configuration and FFNs agree so that the model can be saved and loaded.

    Args:
        model: The pruned model.
        blocks: All of its FFN blocks, in order.
        non_uniform_format: The registered name of the save format, which finishes layers of different widths.

    Returns:
        How many parameters are zeros that only fill up.
    """
    spec = blocks[0].spec
    if _add_biases(blocks) and spec.bias_key is not None:
        setattr(spec.fields_of(model.config), spec.bias_key, True)
    groups: dict[tuple[str, str | None], list[FFNBlock]] = {}  # those whose width is in one field
    for block in blocks:
        groups.setdefault((block.spec.config, block.spec.size_key), []).append(block)
    return sum(_finish_group(model, group, non_uniform_format) for group in groups.values())


def _finish_group(model: PreTrainedModel, blocks: list[FFNBlock], non_uniform_format: str) -> int:
    """Write the width of layers that share a field of the configuration; return how many zeros only fill up."""
    widths = [block.intermediate_size // block.times for block in blocks]
    widest = max(saved_widths(non_uniform_format, widths))
    blocks[0].spec.write_width(model.config, widest * blocks[0].times)
    if len(set(widths)) <= 1:
        return 0
    padding = called(non_uniform_format, "finish", model, blocks)
    if not isinstance(padding, Integral):
        raise CustomFunctionError(
            f"The save format {non_uniform_format!r} returned {padding!r:.60} from its `finish`; want the number of "
            "parameters that only fill up. Mend it, or use non_uniform_format='pad'."
        )
    return int(padding)


def switches_biases(model: PreTrainedModel, spec: FFNSpec) -> bool:
    """Return whether a switch in the model's configuration gives its FFNs biases."""
    return spec.bias_key is not None and bool(getattr(spec.fields_of(model.config), spec.bias_key, False))


def _add_biases(blocks: list[FFNBlock]) -> bool:
    """Give zero biases to the FFNs that lack them if any FFN has gained one: a configuration knows all or none.

    Returns:
        Whether the FFNs have biases now.
    """
    has_experts = any(block.expert is not None for block in blocks)  # they gain none
    if has_experts or all(getattr(block.projection("down"), "bias", None) is None for block in blocks):
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
