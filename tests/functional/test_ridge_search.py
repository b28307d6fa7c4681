"""The search for the best λ where an eigendecomposition costs too much."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional import compensation, ridge_search
from optimum_otprune.functional.compensation import RIDGE_GRID, choose_ridge, refit_down, ridge_refit
from optimum_otprune.functional.gram import gram_statistics
from optimum_otprune.functional.ridge_search import RidgeSearch, times
from tests.functional.helpers import law, normal, seeds, untouched


def problem(seed, fitted=60, noise=1.0, m=24, d=150, correlation=0.4, distance=0.3):
    """Statistics of fitted and held-out tokens, and a prior at some distance from the truth."""
    hidden = normal(seed, fitted + 30, m) @ (torch.eye(m).double() + correlation * normal(seed + 1, m, m))
    truth = normal(seed + 2, d, m)
    targets = hidden @ truth.T + noise * normal(seed + 3, len(hidden), d)
    parts = (gram_statistics(hidden[part], targets[part]) for part in (slice(fitted), slice(fitted, None)))
    return *parts, truth + distance * normal(seed + 4, d, m)


def brute_force(fit, heldout, prior, grid=RIDGE_GRID):
    return [float(heldout.error(ridge_refit(fit, prior, ridge))) for ridge in grid]


def falls_then_rises(errors):
    steps = [later - earlier for earlier, later in zip(errors, errors[1:])]
    signs = [step > 0 for step in steps if abs(step) > 1e-9 * max(errors)]
    return signs == sorted(signs)


problems = {
    "seed": seeds,
    "fitted": st.sampled_from([5, 20, 60, 200]),
    "noise": st.sampled_from([0.03, 1.0, 10.0]),
    "correlation": st.sampled_from([0.0, 0.4, 3.0]),
    "distance": st.sampled_from([0.0, 0.3, 3.0]),
}


@law
@given(**problems)
def test_the_search_agrees_with_trying_the_whole_grid(seed, fitted, noise, correlation, distance):
    fit, heldout, prior = problem(seed, fitted, noise, correlation=correlation, distance=distance)
    with untouched(*fit[:-1], *heldout[:-1], prior):
        choice = RidgeSearch(fit, heldout, prior).best(RIDGE_GRID)
    errors = brute_force(fit, heldout, prior)
    chosen = errors[RIDGE_GRID.index(choice.ridge)]
    assert chosen <= min(errors) * (1 + (1e-9 if falls_then_rises(errors) else 2e-3))
    assert math.isclose(choice.heldout_error, chosen, rel_tol=1e-6)
    torch.testing.assert_close(choice.down, ridge_refit(fit, prior, choice.ridge), rtol=1e-7, atol=1e-7)


@law
@given(**problems)
def test_combinations_that_mislead_only_cost_time(seed, fitted, noise, correlation, distance):
    fit, heldout, prior = problem(seed, fitted, noise, correlation=correlation, distance=distance)
    errors = brute_force(fit, heldout, prior)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge_search, "_combinations", lambda outputs: normal(seed, 1, outputs).expand(2, -1))
        patch.setattr(ridge_search, "_CERTAIN", math.inf)
        choice = RidgeSearch(fit, heldout, prior).best(RIDGE_GRID)
    if falls_then_rises(errors):
        assert errors[RIDGE_GRID.index(choice.ridge)] <= min(errors) * (1 + 1e-9)


def test_few_values_are_tried_in_full(monkeypatch):
    tried = []
    evaluate = RidgeSearch._evaluate
    monkeypatch.setattr(RidgeSearch, "_evaluate", lambda self, ridge: (tried.append(ridge), evaluate(self, ridge))[1])
    counts = []
    for seed in range(20):
        tried.clear()
        RidgeSearch(*problem(seed)).best(RIDGE_GRID)
        counts.append(len(tried))
    assert sum(counts) / len(counts) <= 3.0


@pytest.mark.parametrize(
    "grid", [(0.0, 0.1, math.inf), (1e-6, 1e-5), (1e-2,), (math.inf,), (math.inf, 1.0, 1e-3, 1.0)]
)
def test_any_grid_can_be_searched(grid):
    fit, heldout, prior = problem(3)
    choice = RidgeSearch(fit, heldout, prior).best(grid)
    errors = brute_force(fit, heldout, prior, grid)
    assert choice.ridge == grid[errors.index(min(errors))]


def test_a_fit_that_float32_cannot_factor_is_factored_in_float64():
    low = normal(7, 300, 3) @ normal(8, 3, 60)
    targets = low @ normal(9, 150, 60).T
    fit, heldout = gram_statistics(low[:200], targets[:200]), gram_statistics(low[200:], targets[200:])
    prior = torch.zeros(150, 60)
    choice = RidgeSearch(fit, heldout, prior).best(RIDGE_GRID)
    assert choice.heldout_error <= 1e-6 * float(heldout.target_energy)


def test_float32_statistics_are_searched_as_the_same_numbers_in_float64():
    *parts, prior = problem(2)
    low = [part._replace(gram=part.gram.float(), cross=part.cross.float()) for part in parts]
    choice, same = (RidgeSearch(*each, prior).best(RIDGE_GRID) for each in (low, [part.double() for part in low]))
    assert choice.ridge == same.ridge
    assert math.isclose(choice.heldout_error, same.heldout_error, rel_tol=1e-9)


@pytest.mark.parametrize("intercept", ["never", "always", "auto"])
def test_wide_layers_are_refitted_as_narrow_ones_are(monkeypatch, intercept):
    fit, heldout, prior = problem(5)
    expected = refit_down(fit, heldout, prior, intercept)
    ridge = choose_ridge(fit, heldout, prior)
    monkeypatch.setattr(compensation, "_DECOMPOSED", 0)
    assert choose_ridge(fit, heldout, prior) == pytest.approx(ridge)
    for mine, theirs in zip(refit_down(fit, heldout, prior, intercept), expected):
        assert mine.ridge == theirs.ridge
        assert mine.heldout_error == pytest.approx(theirs.heldout_error)
        torch.testing.assert_close(mine.down, theirs.down, rtol=1e-7, atol=1e-7)
        assert (mine.bias is None) == (theirs.bias is None)
        if mine.bias is not None:
            torch.testing.assert_close(mine.bias, theirs.bias, rtol=1e-7, atol=1e-7)


def test_activations_that_are_not_finite_are_refused():
    fit, heldout, prior = problem(0)
    fit.gram[3, 4] = fit.gram[4, 3] = math.nan
    with pytest.raises(NumericalError, match="the Gram matrix of the kept channels is NaN or infinite"):
        RidgeSearch(fit, heldout, prior).best(RIDGE_GRID)


@pytest.mark.parametrize("size", [5, 300])
def test_products_are_taken_in_float64_block_by_block(size):
    left, matrix = normal(0, 3, size), normal(1, size, size).float()
    torch.testing.assert_close(times(left, matrix), left @ matrix.double(), rtol=1e-12, atol=1e-12)
