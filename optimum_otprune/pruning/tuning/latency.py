"""Find the widest FFNs with which a forward pass takes no longer than asked."""

from collections.abc import Callable

from transformers import PreTrainedModel

from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.changes import unchanged
from optimum_otprune.models.ffn_block import cut_all
from optimum_otprune.models.prunable_model import PrunableModel


def width_for_latency(
    prunable: PrunableModel, target_latency: float, multiple_of: int, measure: Callable[[PreTrainedModel], float]
) -> int:
    """Return the largest multiple of channels with which a forward pass takes at most the target.

    The width is found by bisection over multiples. For speed only the width matters, so channels are just cut off, and
    put back after each measurement. More channels are assumed never to make a model faster.

    Args:
        prunable: The dense model, whose FFNs have one width; it is the same afterwards.
        target_latency: Seconds that a forward pass may take.
        multiple_of: The number that the result is a multiple of.
        measure: A function that returns the seconds that a model takes.

    Raises:
        ConfigurationError: If the dense model is as fast already, or no width is fast enough.
    """
    model, blocks = prunable.model, prunable.blocks
    width = blocks[0].intermediate_size

    def seconds(kept: int) -> float:
        with unchanged(prunable):
            if kept < width:
                cut_all(blocks, kept)
            return measure(model)

    dense = seconds(width)
    if dense <= target_latency:
        raise ConfigurationError(
            f"`target_latency={target_latency!r}` asks for no pruning: the model takes {dense:.4g} s now. Give a "
            "shorter time."
        )
    fastest = seconds(multiple_of)
    if fastest > target_latency:
        raise ConfigurationError(
            f"`target_latency={target_latency!r}` cannot be met: with only {multiple_of} of {width} channels left in "
            f"every FFN a forward pass still takes {fastest:.4g} s. Give a longer time."
        )
    fits, too_slow = 1, -(-width // multiple_of)  # widths in units of `multiple_of`
    while too_slow - fits > 1:
        middle = (fits + too_slow) // 2
        if seconds(middle * multiple_of) <= target_latency:
            fits = middle
        else:
            too_slow = middle
    return fits * multiple_of
