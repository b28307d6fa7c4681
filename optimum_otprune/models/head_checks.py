"""Check, on a short sample, that removing heads from a model does nothing but silence them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.attention_heads import AttentionHeads
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import onloaded
from optimum_otprune.models.faithfulness import short_sample
from optimum_otprune.models.ffn_checks import difference_of, rounding_of
from optimum_otprune.models.ffn_hooks import hooked
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import TensorSpill


@torch.no_grad()
def check_removal(prunable: PrunableModel, heads: list[AttentionHeads], tokens: Tensor) -> None:
    """Run each block without its first group of heads, and with that group's outputs set to zero: both must agree.

    Args:
        prunable: The dense model; it stays as it is.
        heads: The attention of its blocks.
        tokens: Calibration samples, LongTensor `(num_samples, seqlen)`.

    Raises:
        UnsupportedModelError: If they differ; the message names the first block.
    """
    runner, own = BlockRunner(prunable, [short_sample(tokens)], TensorSpill()), {one.block: one for one in heads}
    hidden = runner.take_first_hidden()[0].load()
    for block, _ in prunable.stack:
        with onloaded(block.module):
            if block.block in own:
                _check_block(own[block.block], partial(runner.run, block, hidden, 0))
            hidden = runner.run(block, hidden, 0)


def _check_block(heads: AttentionHeads, run: Callable[[], Tensor]) -> None:
    def silence(module: nn.Module, args: tuple) -> tuple:
        inputs = args[0].clone()
        inputs[..., : heads.group_size] = 0
        return (inputs, *args[1:])

    with hooked([heads.output.register_forward_pre_hook(silence)]):
        silent = run()
    weight, _ = heads.read_output()
    kept = torch.arange(1, heads.num_groups, device=weight.device)
    with heads.changed():
        heads.install(kept, weight[:, heads.columns(kept)])
        removed = run()
    difference = difference_of(removed, silent)
    if difference > rounding_of(silent):
        raise UnsupportedModelError(
            f"Block {heads.block} puts out something else without a group of heads than with what that group puts out "
            f"set to zero (relative difference {difference:.2g}): its heads depend on each other. Leave `attention` "
            "out of `kind_ratios`."
        )
