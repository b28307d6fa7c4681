"""Search for the λ of a ridge refit that is best on held-out tokens, in layers too wide for an eigendecomposition.

Every λ costs a Cholesky factorization, and most of the work is solving for all outputs and judging the solution. So a
few random combinations of the outputs stand for all of them while the grid is searched; the λ that they find is then
tried in full, and so is every neighbor that they do not rule out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.gram import GramStatistics
from optimum_otprune.functional.linalg.damped import damped_cholesky
from optimum_otprune.functional.linalg.symmetric import block_rows, lower_factor

_COMBINATIONS = 128  # of outputs: their energies have a standard error of at most √(2 / 128) = 12 %
_COARSE = 4  # every fourth value of the grid, a factor of 100 in λ, is looked at first
_SINGLE_PRECISION = 1e-4  # λ that bounds the condition well within the 7 digits of float32, which is twice as fast
_CLOSE = 1e-3  # share of the error; surroundings of values that are worse by no more are looked at, too
# A neighbor is not tried if it is worse by this many standard errors: twice what would do for a normal distribution,
# because a trial too many costs a little time, and one too few a worse fit. Of the 20 values of the grid, 2.3 are
# tried in full on average over twelve random refits, and 1.5 with 3 standard errors; both find the best.
_CERTAIN = 6.0
_NOTABLE = 1e-4  # share of the error by which it must be worse as well: single precision sees no less
_SINGULAR = 1e-12  # damping where λ = 0, in units of the mean diagonal; above the rounding of float64
_NAME = "the Gram matrix of the kept channels"


class RidgeChoice(NamedTuple):
    """The λ that was best on held-out tokens.

    Attributes:
        ridge: The weight λ of the prior.
        heldout_error: The squared error Σ ‖y − ŷ‖² on the held-out tokens.
        down: The fit with λ to the other tokens, float64 `(hidden_size, kept_size)`; None where it was not made.
    """

    ridge: float
    heldout_error: float
    down: Tensor | None = None


def channel_scale(gram: Tensor) -> Tensor:
    """Return the root of the diagonal, float64 `(kept_size,)`; 1 for channels that are never active."""
    scale = gram.diagonal().double().clamp_min(0).sqrt()
    return torch.where(scale > 0, scale, 1.0)


def times(left: Tensor, matrix: Tensor) -> Tensor:
    """Return `left @ matrix` in float64, without a float64 copy of the matrix.

    Args:
        left: The left factor, `(rows, size)` float64.
        matrix: The right factor, `(size, size)` of any dtype.
    """
    if matrix.dtype == left.dtype:
        return left @ matrix
    product = torch.empty_like(left)
    for start, end in block_rows(len(matrix)):
        product[:, start:end] = left @ matrix[:, start:end].to(left.dtype)
    return product


def ridge_factor(gram: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """Return the lower Cholesky factor, float64, of the channels' correlations with λ added to the diagonal.

    Raises:
        NumericalError: If the Gram matrix is not finite, or not positive semidefinite.
    """
    correlation = (gram / scale[:, None]).div_(scale)
    correlation.diagonal().add_(ridge)
    return damped_cholesky(correlation, _SINGULAR if ridge == 0 else 0.0, _NAME)


def _combinations(outputs: int) -> Tensor:
    """Return random combinations of outputs, `(combinations, outputs)`, that have the outputs' energy in expectation.

    Where there are no more outputs than combinations, they are the outputs themselves.
    """
    if outputs <= _COMBINATIONS:
        return torch.eye(outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_COMBINATIONS, outputs, generator=generator, dtype=torch.float64) / math.sqrt(_COMBINATIONS)


class RidgeSearch:
    """The held-out errors of one refit for different λ, computed as they are asked for."""

    def __init__(self, fit: GramStatistics, heldout: GramStatistics, prior: Tensor) -> None:
        """Compute what all λ share.

        Args:
            fit: Statistics of the tokens that are fitted, kept channels only.
            heldout: Statistics of the other tokens, kept channels only.
            prior: The down projection to shrink towards, `(hidden_size, kept_size)`.
        """
        self._fit, self._heldout, self._prior = fit.gram, heldout.gram, prior.double()
        self._scale = channel_scale(fit.gram)
        self._residual = (fit.cross - times(self._prior, fit.gram)) / self._scale  # (hidden_size, kept_size)
        missing = heldout.cross - times(self._prior, heldout.gram)
        self._slope = missing / self._scale
        self._base = float(heldout.target_energy - (self._prior * (heldout.cross + missing)).sum())
        mix = _combinations(len(self._prior)).to(self._prior.device)
        self._mixed_residual, self._mixed_slope = (mix @ part for part in (self._residual, self._slope))
        self._ratings: dict[float, Tensor] = {math.inf: self._prior.new_zeros(len(mix))}

    def best(self, grid: tuple[float, ...]) -> RidgeChoice:
        """Return the best λ of a grid: certainly so where the error falls and then rises along the grid.

        Args:
            grid: The values of λ to try.
        """
        ridges = sorted(set(grid))
        last = len(ridges) - 1
        found: dict[int, float] = {}
        fits: dict[int, Tensor] = {}
        tried = self._guesses(ridges)
        while tried:
            for position in tried:
                found[position], fits[position] = self._evaluate(ridges[position])
            best = min(found, key=lambda position: (found[position], position))
            fits = {best: fits[best]}  # one is enough to keep
            beside = [position for position in (best - 1, best + 1) if 0 <= position <= last]
            tried = [p for p in beside if p not in found and not self._rules_out(ridges[p], ridges[best], found[best])]
        return RidgeChoice(ridges[best], found[best], fits[best])

    def _guesses(self, ridges: list[float]) -> list[int]:
        """Return the positions of the best λ for the combinations, and of other valleys that they do not rule out."""
        last = len(ridges) - 1
        positions = {last, *range(min(_COARSE // 2, last), last, _COARSE)}
        step = _COARSE
        while step > 1:
            step //= 2
            totals = {position: self._total(ridges[position]) for position in positions}
            level = min(totals.values())
            level += _CLOSE * max(0.0, self._base + level)
            for near in [p for p, total in totals.items() if total <= level]:
                positions |= {max(0, near - step), min(last, near + step)}
        order = sorted(positions)
        sums = [math.inf, *(self._total(ridges[position]) for position in order), math.inf]
        lowest = order[sums.index(min(sums)) - 1]
        valleys = [p for p, left, here, right in zip(order, sums, sums[1:], sums[2:]) if left > here <= right]
        return [p for p in valleys if p == lowest or not self._rules_out(ridges[p], ridges[lowest], 0.0)]

    def _total(self, ridge: float) -> float:
        return float(self._rate(ridge).sum())

    def _rules_out(self, ridge: float, best: float, error: float) -> bool:
        """Return whether the combinations together leave no doubt that a λ is worse than the best so far."""
        worse = self._rate(ridge) - self._rate(best)
        total, deviation = float(worse.sum()), float(worse.std()) * math.sqrt(len(worse))
        return total > _CERTAIN * deviation and total > _NOTABLE * error

    def _rate(self, ridge: float) -> Tensor:
        """Return what a step with λ adds to the held-out error of each combination of outputs, `(combinations,)`."""
        if ridge not in self._ratings:
            dtype = torch.float32 if ridge >= _SINGLE_PRECISION else torch.float64
            factor = self._factor(ridge, dtype)
            step = torch.cholesky_solve(self._mixed_residual.T.to(factor.dtype), factor).T
            self._ratings[ridge] = self._change(step, self._mixed_slope)
        return self._ratings[ridge]

    def _factor(self, ridge: float, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32:
            scale = self._scale.to(dtype)
            correlation = (self._fit.to(dtype) / scale[:, None]).div_(scale)
            correlation.diagonal().add_(ridge)
            factor = lower_factor(correlation)
            if factor is not None:
                return factor
        return ridge_factor(self._fit, self._scale, ridge)

    def _change(self, step: Tensor, slope: Tensor) -> Tensor:
        """Return the change of each output's held-out error that a step from the prior makes, float64 `(rows,)`."""
        scaled = step / self._scale.to(step.dtype)
        return ((times(scaled, self._heldout) * scaled).double() - 2 * step.double() * slope).sum(dim=1)

    def _evaluate(self, ridge: float) -> tuple[float, Tensor]:
        """Return the held-out error of the fit with λ, and the fit."""
        if math.isinf(ridge):
            return self._base, self._prior
        step = torch.cholesky_solve(self._residual.T, ridge_factor(self._fit, self._scale, ridge)).T
        error = self._base + float(self._change(step, self._slope).sum())
        return error, self._prior + step / self._scale
