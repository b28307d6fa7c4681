"""Prune the attention of one block: groups of heads are removed whole, and its output projection is refitted.

The columns of the output projection that read one head of keys and values, through all query heads that share it, are
one group. Selection and refit are those of FFNs, with groups in place of channels; nothing is transported, fused or
reconstructed.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError, warn_user
from optimum_otprune.functional.compensation import constant_bias, refit_down
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.gram import GramAccumulator, GramStatistics
from optimum_otprune.functional.importance import ChannelStatistics, channel_importance
from optimum_otprune.functional.ratios import RescueEnergies, relative_error, rescue_ratio
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.functional.selection import obs_groups, top_channels
from optimum_otprune.models.attention_heads import (
    AttentionHeads,
    attention_heads,
    check_heads,
    kept_groups,
    removed_weights,
)
from optimum_otprune.models.block import Block
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.layer_statistics import (
    LayerStatistics,
    add_tokens,
    all_statistics,
    weights_among_all,
)
from optimum_otprune.pruning.prune_layer import Run
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import LayerReport

ATTENTION: Literal["attention"] = "attention"  # its name in `kind_ratios`


class PrunedHeads(NamedTuple):
    """The result of pruning the attention of one block.

    Attributes:
        groups: The groups of heads that stay, LongTensor, sorted.
        weight: The weight of the output projection, `(hidden_size, kept_columns)`.
        bias: The bias of the output projection where it is a new one, or None.
        report: The report.
    """

    groups: Tensor
    weight: Tensor
    bias: Tensor | None
    report: LayerReport


def planned_heads(prunable: PrunableModel, config: OTPruningConfig) -> list[AttentionHeads]:
    """Return the attention that loses heads, by block; none where `kind_ratios` does not name it, or nothing goes.

    Raises:
        ConfigurationError: If the options cannot be had for attention.
        UnsupportedModelError: If the model's attention cannot be pruned.
    """
    ratio = config.kind_ratios.get(ATTENTION, 0.0)
    if not ratio:
        return []
    heads = attention_heads(prunable.model)
    kept = kept_groups(heads[0], ratio)
    if kept == heads[0].num_groups:
        warn_user(
            f"No heads are removed: {ratio} of {kept} groups of heads is less than half of one. Give `kind_ratios` a "
            f"larger ratio for attention: {1 / kept:.3g} is one group."
        )
        return []
    needs_biases = config.compensation == "bias"
    check_heads(prunable.model, heads, kept, needs_biases)
    return heads


def cost_of_heads(heads: list[AttentionHeads], config: OTPruningConfig, unit: str) -> int:
    """Return how many parameters, or bytes, a model loses with heads of its attention; biases may be added.

    Args:
        heads: The attention that loses heads, from `planned_heads`; weights are not read.
        config: The configuration to prune by.
        unit: Either `"parameters"` or `"bytes"`.
    """
    if not heads:
        return 0
    removed = removed_weights(heads, kept_groups(heads[0], config.kind_ratios[ATTENTION]))
    return sum(count * (part.element_size() if unit == "bytes" else 1) for part, count in removed)


def check_recipe(recipe: Recipe) -> None:
    """Raise an error if a recipe needs what is not had of attention.

    Raises:
        ConfigurationError: If heads were to be chosen by gradients.
    """
    if recipe.config.kind_ratios.get(ATTENTION) and recipe.needs_gradients:
        raise ConfigurationError(
            "Heads are not chosen by gradients, which the importance or a distribution of this configuration reads. "
            "Leave `attention` out of `kind_ratios`, or use another importance."
        )


def prune_heads(heads: AttentionHeads, block: Block, run: Run) -> PrunedHeads:
    """Prune the attention of one block, on what the pruned blocks below it put out; the model stays as it is.

    Args:
        heads: The attention.
        block: Its block.
        run: What all layers of the run share.
    """
    config = run.recipe.config
    weight, bias = heads.read_output()
    exact = weight.float()
    statistics, unit = _statistics(heads, block, run, exact)
    kept = kept_groups(heads, config.kind_ratios[ATTENTION])
    groups = _chosen(statistics.total, exact, kept, heads.num_groups, run, block)
    columns = heads.columns(groups)
    fit, heldout = statistics.fit.select(columns), statistics.heldout.select(columns)
    fused, new_bias, ridge = exact[:, columns], None, None
    final = judged = fused
    missed = torch.zeros_like(fused[:, 0])  # by the judged projection, which a bias puts out
    if config.compensation == "ridge":
        refit, judged_refit = refit_down(fit, heldout, fused)
        final, judged, ridge = refit.down.float(), judged_refit.down.float(), refit.ridge
    elif config.compensation == "bias":
        new_bias = constant_bias(fit + heldout, fused) + (0 if bias is None else bias.float())
        missed = constant_bias(fit, fused)
    energies = _energies(statistics.heldout, exact, columns, (judged, missed)).scaled(unit)
    before = _energies(statistics.heldout, exact, columns, (fused, torch.zeros_like(missed)))
    report = LayerReport(
        layer=heads.block,
        intermediate_size_before=exact.shape[1],
        intermediate_size_after=len(columns),
        kept_channels=tuple(columns.tolist()),
        rescue_ratio=rescue_ratio(energies),
        dilution_ratio=0.0,
        transported_mass=0.0,
        self_share=1.0,
        relative_error_before_refit=relative_error(before),
        relative_error_after_refit=relative_error(energies),
        relative_error_after_reconstruction=relative_error(energies),
        ridge_lambda=ridge,
        intercept=new_bias is not None,
        energies=energies,
        unit=heads.name,
    )
    return from_main(PrunedHeads(groups, final.to(weight.dtype), new_bias, report))


def _statistics(heads: AttentionHeads, block: Block, run: Run, weight: Tensor) -> tuple[LayerStatistics, float]:
    """Return second moments of the output projection's inputs, and of its outputs without the bias.

    With them comes what a held-out token's weight of 1 stands for, as in `LayerData`.
    """
    energies = run.stream.attention_energies(block)
    counts, unit = torch.ones(len(run.is_heldout)), 1.0
    if run.recipe.config.token_weighting == "residual":
        counts, unit = weights_among_all(energies, run.is_heldout)
    (d, n), start = weight.shape, 0
    sums = {heldout: GramAccumulator(n, d, torch.float32, weight.device) for heldout in (False, True)}
    for inputs in run.stream.head_taps(block, heads.output):
        hidden = inputs.float()
        targets = hidden @ weight.T
        part = slice(start, start + len(hidden))
        add_tokens(sums, hidden, targets, run.is_heldout[part], counts[part])
        start += len(hidden)
    return all_statistics(sums), unit


def _chosen(total: GramStatistics, weight: Tensor, kept: int, num_groups: int, run: Run, block: Block) -> Tensor:
    """Return the groups that stay: by the cost of removing them, or by the importance of their columns together."""
    config = run.recipe.config
    if config.selection == "obs":
        return obs_groups(total.gram, weight, num_groups, kept)
    n = weight.shape[1]
    statistics = ChannelStatistics(
        weights=FFNWeights(up=weight.new_zeros(n, 1), down=weight),  # what reads them is the output projection
        hidden_mean=total.hidden_sum / total.num_tokens,
        hidden_second_moment=total.gram.diagonal() / total.num_tokens,
        num_tokens=total.num_tokens,
        aggregation=config.aggregation or "absolute",
        generator=torch.Generator().manual_seed(seed_of(run.recipe.config.seed, block.block)),
    )
    scores = channel_importance(run.recipe.functions["importance"], statistics)
    return top_channels(scores.view(num_groups, -1).sum(dim=1), kept).to(weight.device)


def _energies(
    heldout: GramStatistics, weight: Tensor, columns: Tensor, compressed: tuple[Tensor, Tensor]
) -> RescueEnergies:
    """Return the energies of the held-out tokens, from their second moments alone.

    Args:
        heldout: The second moments.
        weight: The dense output projection.
        columns: Those of its columns that stay.
        compressed: The compressed projection, and what is added to its outputs.
    """
    sums = heldout.double()
    dense, is_pruned = weight.double(), torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_pruned[columns] = False
    pruned = is_pruned.nonzero().flatten()
    gone = dense[:, pruned]
    own, (projection, added) = sums.select(columns), compressed
    shifted = own.shifted(torch.zeros_like(own.hidden_sum), added.double())
    return RescueEnergies(
        output=float(sums.target_energy.clamp_min(0)),
        pruned=float(((gone @ sums.select(pruned).gram) * gone).sum().clamp_min(0)),
        error=float(shifted.error(projection.double()).clamp_min(0)),
        kept=float((dense[:, columns].square().sum(dim=0) * own.gram.diagonal()).sum()),
        shift=0.0,
    )
