"""Refit of the down projection after channels were removed: ridge towards a prior, λ on held-out tokens, intercept.

`W' = (C_K + P Λ)(G_KK + Λ)⁻¹` with `C = Σ y hᵀ`, `G = Σ h hᵀ`, prior P and `Λ = λ · diag(G_KK)`: λ = 0 is the linear
conditional expectation of the targets given the kept channels, λ → ∞ is the prior.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import ShapeError
from optimum_otprune.functional.gram import GramStatistics
from optimum_otprune.functional.ridge_search import RidgeChoice, RidgeSearch, channel_scale, ridge_factor, times

_INTERCEPT_GAIN = 0.02  # share of the held-out error that an intercept must save; `refit_down` says why
_DECOMPOSED = 1024  # kept channels up to which an eigendecomposition for the whole grid is cheaper than a search
# From next to nothing to 100, where hardly anything but the prior is left, in steps of √10; and the prior itself.
RIDGE_GRID = (*(10.0**exponent for exponent in [x / 2 for x in range(-14, 5)]), math.inf)


class Refit(NamedTuple):
    """A refitted down projection and how it was chosen.

    Attributes:
        down: The refitted down projection, `(hidden_size, kept_size)`.
        bias: A vector `(hidden_size,)` to add to the layer's output, or None.
        ridge: The λ chosen on held-out tokens; infinity means that the prior was best.
        heldout_error: Σ ‖y − ŷ‖² on the held-out tokens of the fit to the others.
    """

    down: Tensor
    bias: Tensor | None
    ridge: float
    heldout_error: float


def ridge_refit(statistics: GramStatistics, prior: Tensor, ridge: float) -> Tensor:
    """Fit the targets by the channels, shrinking towards a prior; the fit's own error is never above the prior's.

    Args:
        statistics: Second moments of the kept channels only.
        prior: The down projection to shrink towards, `(hidden_size, kept_size)`.
        ridge: The weight λ ≥ 0 of the prior; infinity returns the prior.

    Returns:
        The fitted down projection, `(hidden_size, kept_size)` float64.

    Raises:
        ShapeError: If `prior` does not fit the statistics.
        NumericalError: If the Gram matrix cannot be factored.
    """
    if prior.shape != statistics.cross.shape:
        raise ShapeError(
            f"The prior has shape {tuple(prior.shape)}, the statistics want {tuple(statistics.cross.shape)}. "
            "Select the kept channels in both."
        )
    prior = prior.double()
    if math.isinf(ridge):
        return prior
    scale = channel_scale(statistics.gram)
    factor = ridge_factor(statistics.gram, scale, ridge)
    residual = (statistics.cross - times(prior, statistics.gram)) / scale  # (hidden_size, kept_size)
    return prior + torch.cholesky_solve(residual.T, factor).T / scale


def choose_ridge(
    fit: GramStatistics, heldout: GramStatistics, prior: Tensor, grid: tuple[float, ...] = RIDGE_GRID
) -> tuple[float, float]:
    """Return the λ of the grid with the least held-out error, and that error.

    Up to 1 024 kept channels one eigendecomposition serves the whole grid. Wider layers are searched (`RidgeSearch`):
    the result is the same where the error falls and then rises along the grid; where it does not, which is rare, the
    error of what is found is within 0.2 % of the least.

    Args:
        fit: Statistics of the tokens that are fitted, kept channels only.
        heldout: Statistics of the other tokens, kept channels only.
        prior: The down projection to shrink towards, `(hidden_size, kept_size)`.
        grid: The values of λ to try.

    Raises:
        NumericalError: If a Gram matrix cannot be factored.
    """
    return _choose(fit, heldout, prior, grid)[:2]


def _choose(
    fit: GramStatistics, heldout: GramStatistics, prior: Tensor, grid: tuple[float, ...] = RIDGE_GRID
) -> RidgeChoice:
    if prior.shape[1] > _DECOMPOSED:
        return RidgeSearch(fit, heldout, prior).best(grid)
    return _decompose(fit, heldout, prior, grid)


def _decompose(fit: GramStatistics, heldout: GramStatistics, prior: Tensor, grid: tuple[float, ...]) -> RidgeChoice:
    fit, heldout, prior = fit.double(), heldout.double(), prior.double()
    scale = channel_scale(fit.gram)
    values, vectors = torch.linalg.eigh(fit.gram / torch.outer(scale, scale))
    values = values.clamp_min(0)
    basis = vectors / scale[:, None]  # (kept_size, kept_size), whitens the channels
    step = (fit.cross - prior @ fit.gram) @ basis  # (hidden_size, kept_size)
    slope = (heldout.cross - prior @ heldout.gram) @ basis
    linear = (step * slope).sum(dim=0)  # (kept_size,)
    quadratic = (step.T @ step) * (basis.T @ heldout.gram @ basis)  # (kept_size, kept_size)
    base = heldout.error(prior)
    floor = torch.finfo(torch.float64).eps * values.max().clamp_min(1.0) * len(values)
    best = RidgeChoice(math.nan, math.inf)
    for ridge in grid:
        # λ = ∞ takes no step at all; directions that no token excites take none either.
        shrink = torch.where(values + ridge > floor, 1 / (values + ridge).clamp_min(floor), 0.0)
        error = float(base - 2 * shrink @ linear + shrink @ quadratic @ shrink)
        if error < best.heldout_error:
            best = RidgeChoice(ridge, error)
    return best


def refit_down(
    fit: GramStatistics, heldout: GramStatistics, prior: Tensor, intercept: str = "never"
) -> tuple[Refit, Refit]:
    """Choose λ, and whether an intercept pays, on held-out tokens; refit to all tokens, and without the held-out ones.

    Args:
        fit: Statistics of the tokens that λ is not judged on, kept channels only.
        heldout: Statistics of the held-out tokens, kept channels only.
        prior: The down projection to shrink towards, `(hidden_size, kept_size)`.
        intercept: `"never"`, `"always"`, or `"auto"`, which adds one where it lowers the held-out error by at least
            2 %. A smaller gain is not worth a bias in every layer, and did not lower the perplexity of the models
            that it was tried on.

    Returns:
        The refit to all tokens, and the refit without the held-out ones, which can be judged on them; both float64.
    """
    choices: dict[bool, RidgeChoice] = {}
    if intercept != "always":
        choices[False] = _choose(fit, heldout, prior)
    if intercept != "never":
        means = _means(fit)
        choices[True] = _choose(fit.shifted(*means), heldout.shifted(*means), prior)
    pays = intercept == "auto" and choices[True].heldout_error < (1 - _INTERCEPT_GAIN) * choices[False].heldout_error
    centred = intercept == "always" or pays
    choice = choices[centred]
    return _refit(fit + heldout, prior, choice._replace(down=None), centred), _refit(fit, prior, choice, centred)


def _means(statistics: GramStatistics) -> tuple[Tensor, Tensor]:
    count = statistics.num_tokens
    return statistics.hidden_sum.double() / count, statistics.target_sum.double() / count


def _refit(statistics: GramStatistics, prior: Tensor, choice: RidgeChoice, centred: bool) -> Refit:
    down, (ridge, error) = choice.down, choice[:2]
    if not centred:
        return Refit(ridge_refit(statistics, prior, ridge) if down is None else down, None, ridge, error)
    hidden_mean, target_mean = _means(statistics)
    if down is None:
        down = ridge_refit(statistics.shifted(hidden_mean, target_mean), prior, ridge)
    return Refit(down, target_mean - down @ hidden_mean, ridge, error)


def constant_bias(statistics: GramStatistics, down: Tensor) -> Tensor:
    """Return the mean output that a down projection misses, `(hidden_size,)`: FLAP's bias compensation.

    Args:
        statistics: Second moments of the kept channels, with the dense layer's outputs as targets.
        down: The compressed layer's down projection, `(hidden_size, kept_size)`.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, section 3.
    """
    return (
        statistics.target_sum - down.to(statistics.hidden_sum.dtype) @ statistics.hidden_sum
    ) / statistics.num_tokens
