"""Compress one FFN: select, transport, fuse, refit. Tensors and a configuration in, a smaller FFN out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import warn_user
from optimum_otprune.functional.compensation import Refit, constant_bias, refit_down
from optimum_otprune.functional.costs import CostInputs, TransportCost, centroid_cost, transport_cost
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.fusion import FusionMaps, fuse, fusion_maps, selection_map, with_identity
from optimum_otprune.functional.gram import GramStatistics
from optimum_otprune.functional.importance import (
    ChannelStatistics,
    WeightScores,
    channel_importance,
    combined_statistics,
)
from optimum_otprune.functional.marginals import MarginalInputs, marginal
from optimum_otprune.functional.rescue import self_share, transported_mass
from optimum_otprune.functional.returned import check_finite, returned_tensor
from optimum_otprune.functional.selection import obs_channels, top_channels
from optimum_otprune.functional.solvers import SolverSettings, solve_transport
from optimum_otprune.pruning.recipe import Recipe


class LayerInputs(NamedTuple):
    """The data that one layer is compressed from.

    Attributes:
        weights: The weights of the dense FFN.
        fit: Second moments of the calibration tokens that are fitted.
        heldout: Second moments of the calibration tokens that are held out.
        snip: Scores of the weights by SNIP, or None when the recipe needs no gradients.
        fo: Scores of the weights by FO, or None when the recipe does not read them.
        seed: The random seed of this layer.
        can_hold_intercept: Whether the architecture has an output bias; without one, `intercept="auto"` adds none.
        remeasure: A function that returns the second moments, fitted and held-out, of the channels of another FFN with
            the same targets.
    """

    weights: FFNWeights
    fit: GramStatistics
    heldout: GramStatistics
    snip: WeightScores | None
    fo: WeightScores | None
    seed: int
    can_hold_intercept: bool
    remeasure: Callable[[FFNWeights], tuple[GramStatistics, GramStatistics]]

    @property
    def total(self) -> GramStatistics:
        """Second moments of all tokens."""
        return self.fit + self.heldout


class Compression(NamedTuple):
    """A compressed FFN with the numbers of its report.

    Attributes:
        weights: The weights to save, refitted to all calibration tokens.
        judged: The weights to measure on held-out tokens, refitted without these.
        fused: The weights before the refit.
        kept_channels: Sorted indices of the kept channels, LongTensor `(kept_size,)`.
        transported_mass: Share of the pruned channels' mass that the plan moved; 0 without transport.
        self_share: Mean share of a kept channel's gate and up weights that comes from itself.
        ridge: The λ of the refit, or None.
        intercept: Whether an output bias was added.
    """

    weights: FFNWeights
    judged: FFNWeights
    fused: FFNWeights
    kept_channels: Tensor
    transported_mass: float
    self_share: float
    ridge: float | None
    intercept: bool


def compress(inputs: LayerInputs, recipe: Recipe, kept_size: int) -> Compression:
    """Compress one FFN to `kept_size` channels.

    Args:
        inputs: Weights, moments and scores of the layer.
        recipe: The configuration with its functions.
        kept_size: Number of channels to keep, at most as many as there are.

    Returns:
        The compressed FFN in the dtype of `inputs.weights`.
    """
    importance = _importance(inputs, recipe)
    kept = select_channels(inputs, recipe.config, importance, kept_size)
    fused = _fused(inputs, recipe, importance, kept)
    return _compensated(inputs, recipe.config, fused)


class _Sides(NamedTuple):
    """The two sides of a transport problem: the channels that mass leaves and those that it reaches.

    Attributes:
        pruned: Indices of the channels that are removed, LongTensor.
        sources: Indices of the channels that the plan's rows stand for, LongTensor: the removed ones, or all.
        source: The mass of each source, `(len(sources),)`.
        target: The mass of each kept channel, `(kept_size,)`.
    """

    pruned: Tensor
    sources: Tensor
    source: Tensor
    target: Tensor


def _importance(inputs: LayerInputs, recipe: Recipe) -> Tensor | None:
    if "importance" not in recipe.functions:
        return None
    return channel_importance(recipe.functions["importance"], _channel_statistics(inputs, recipe.config))


def _fused(inputs: LayerInputs, recipe: Recipe, importance: Tensor | None, kept: Tensor) -> Compression:
    """Return the FFN before the refit; the maps, as large as the plan, are freed when it returns."""
    maps, moved, kept = _maps(inputs, recipe, importance, kept)
    fused = fuse(inputs.weights, maps, kept, recipe.config.fuse or ())
    share = 1.0 if maps.inward is None else self_share(maps.inward.cpu(), kept.cpu())
    return Compression(fused, fused, fused, kept, moved, share, None, False)


def _channel_statistics(inputs: LayerInputs, config: OTPruningConfig) -> ChannelStatistics:
    total = inputs.total
    return ChannelStatistics(
        weights=inputs.weights,
        hidden_mean=total.hidden_sum / total.num_tokens,
        hidden_second_moment=total.gram.diagonal() / total.num_tokens,
        num_tokens=total.num_tokens,
        snip=inputs.snip,
        fo=inputs.fo,
        aggregation=config.aggregation or "absolute",
        generator=torch.Generator().manual_seed(inputs.seed),
    )


def select_channels(inputs: LayerInputs, config: OTPruningConfig, importance: Tensor | None, kept_size: int) -> Tensor:
    """Return the kept channels, LongTensor `(kept_size,)`, sorted, on the device of the weights."""
    if config.selection == "obs":
        return obs_channels(inputs.total.gram, inputs.weights.down, kept_size, importance)
    assert importance is not None
    return top_channels(importance, kept_size).to(inputs.weights.up.device)


def _maps(
    inputs: LayerInputs, recipe: Recipe, importance: Tensor | None, kept: Tensor
) -> tuple[FusionMaps, float, Tensor]:
    """Return fusion maps, the share of pruned mass that was moved, and the kept channels (centroids are new)."""
    n = inputs.weights.intermediate_size
    if not recipe.transports or len(kept) == n:
        selected = selection_map(kept, n)
        return FusionMaps(selected, selected), 0.0, kept
    cost, kept = _cost(inputs, recipe, kept)
    sides = _sides(inputs, recipe, importance, kept)
    matrix, gain = cost.matrix[sides.sources] if len(sides.sources) < n else cost.matrix, cost.gain
    del cost  # frees the memory of a large matrix
    plan, source = _plan(recipe, matrix, sides), sides.source
    del matrix
    if recipe.config.normalization == "identity":
        plan, source = _among_all(plan, sides, kept)
    moved = transported_mass(plan, source, sides.pruned.cpu())
    gain = None if gain is None else _own_gain_one(gain.cpu(), kept.cpu())
    left = None if recipe.functions["solver"].meets[0] else source
    inward = bool({"gate", "up"} & set(recipe.config.fuse or ()))
    assert recipe.config.normalization is not None
    return fusion_maps(plan, recipe.config.normalization, gain, left, inward), moved, kept


def _cost(inputs: LayerInputs, recipe: Recipe, kept: Tensor) -> tuple[TransportCost, Tensor]:
    """Return the cost of moving each channel to each kept one, and the kept channels, new for centroids."""
    if recipe.config.target == "cluster_centroid":
        return centroid_cost(inputs.weights, len(kept), inputs.seed, recipe.functions["cost"].name)
    total = inputs.total
    cost_inputs = CostInputs(inputs.weights, total.gram, total.num_tokens)
    return transport_cost(recipe.functions["cost"], cost_inputs, kept), kept


def _sides(inputs: LayerInputs, recipe: Recipe, importance: Tensor | None, kept: Tensor) -> _Sides:
    marginal_inputs = _marginal_inputs(inputs, recipe, importance, kept)
    channels = torch.arange(inputs.weights.intermediate_size, device=kept.device)
    pruned = channels[~marginal_inputs.is_kept.to(kept.device)]
    sources = pruned if recipe.config.normalization == "identity" else channels
    source = marginal(recipe.functions["source_distribution"], marginal_inputs.select(sources.cpu()))
    target = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
    if "target_distribution" in recipe.functions:
        target = marginal(recipe.functions["target_distribution"], marginal_inputs.select(kept.cpu()))
    return _Sides(pruned, sources, source, target)


def _plan(recipe: Recipe, matrix: Tensor, sides: _Sides) -> Tensor:
    """Return the transport plan, of the shape of the cost matrix."""
    settings = SolverSettings(recipe.config.epsilon, recipe.config.mass_share, recipe.config.marginal_penalty)
    solved = solve_transport(recipe.functions["solver"], matrix, sides.source, sides.target, settings)
    if not solved.converged:
        warn_user(
            f"The solver {recipe.functions['solver'].name!r} stopped before it converged; its plan is feasible, but "
            "not the best. Raise `epsilon` (sinkhorn), lower `marginal_penalty` (unbalanced), or use solver='emd'."
        )
    return solved.matrix


def _among_all(plan: Tensor, sides: _Sides, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Extend a plan of pruned channels and its source marginal to all channels; the kept ones stay."""
    kept, pruned = kept.cpu(), sides.pruned.cpu()
    n = len(kept) + len(pruned)
    shares = (len(kept) / n, len(pruned) / n)
    full = torch.full((n,), shares[0] / len(kept), dtype=torch.float64)
    full[pruned] = sides.source * shares[1]
    return with_identity(plan, kept, pruned, shares), full


def _own_gain_one(gain: Tensor, kept: Tensor) -> Tensor:
    """Set the gain of each kept channel by itself to 1, also if it was never active or shrunk by chance."""
    gain = gain.clone()
    gain[kept, torch.arange(len(kept))] = 1.0
    return gain


def _marginal_inputs(inputs: LayerInputs, recipe: Recipe, importance: Tensor | None, kept: Tensor) -> MarginalInputs:
    n = inputs.weights.intermediate_size
    is_kept = torch.zeros(n, dtype=torch.bool)
    is_kept[kept.cpu()] = True
    statistics: dict[str, Tensor] = {}
    if inputs.snip is not None and inputs.fo is not None:
        statistics = combined_statistics(inputs.snip, inputs.fo)
    score = torch.zeros(n) if importance is None else importance.cpu()
    if "statistics" in recipe.functions:
        name, function = recipe.functions["statistics"].name, recipe.functions["statistics"].function
        what = f"The mixture {name!r}"
        score = returned_tensor(function(statistics), (n,), what, f"one number per channel, shape {(n,)}").cpu()
        check_finite(score, what, "Check the weights and gradients of this layer, or load the model in float32.")
    return MarginalInputs(score, is_kept, statistics)


def _compensated(inputs: LayerInputs, config: OTPruningConfig, result: Compression) -> Compression:
    kept, fused = result.kept_channels, result.fused
    if config.compensation == "none" or fused.intermediate_size == inputs.weights.intermediate_size:
        return result
    fit, heldout = inputs.fit.select(kept), inputs.heldout.select(kept)
    if {"gate", "up"} & set(config.fuse or ()):
        fit, heldout = inputs.remeasure(fused)  # the kept channels have changed, so moments are measured again
    if config.compensation == "bias":
        weights, judged = (
            _with_bias(fused, fused.down, constant_bias(statistics, fused.down)) for statistics in (fit + heldout, fit)
        )
        return result._replace(weights=weights, judged=judged, intercept=True)
    assert config.ridge_prior is not None
    assert config.intercept is not None
    prior = {
        "zero": torch.zeros_like(fused.down),
        "identity": inputs.weights.down[:, kept],
        "transport": fused.down,
    }[config.ridge_prior]
    intercept = config.intercept if inputs.can_hold_intercept else "never"
    refit, judged_refit = refit_down(fit, heldout, prior, intercept)
    return result._replace(
        weights=_refitted(fused, refit),
        judged=_refitted(fused, judged_refit),
        ridge=refit.ridge,
        intercept=refit.bias is not None,
    )


def _refitted(fused: FFNWeights, refit: Refit) -> FFNWeights:
    return _with_bias(fused, refit.down, refit.bias)


def _with_bias(fused: FFNWeights, down: Tensor, bias: Tensor | None) -> FFNWeights:
    like = fused.down
    if bias is not None and fused.down_bias is not None:
        bias = bias.to(like.device) + fused.down_bias
    elif bias is None:
        bias = fused.down_bias
    return fused._replace(
        down=down.to(like.device, like.dtype), down_bias=None if bias is None else bias.to(like.device, like.dtype)
    )
