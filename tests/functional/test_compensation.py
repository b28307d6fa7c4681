"""Ridge refit, the choice of λ on held-out tokens, and intercepts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import NumericalError, ShapeError
from optimum_otprune.functional.compensation import (
    RIDGE_GRID,
    choose_ridge,
    constant_bias,
    refit_down,
    ridge_refit,
)
from optimum_otprune.functional.gram import GramStatistics, gram_statistics
from tests.functional.helpers import law, normal, permutation, seeds, untouched

ridges = st.sampled_from(RIDGE_GRID)


def data(seed, tokens=40, m=6, d=4, noise=0.3, offset=0.0):
    """Activations and targets that they explain but for noise."""
    hidden = normal(seed, tokens, m) @ (torch.eye(m).double() + 0.4 * normal(seed + 1, m, m)) + offset
    truth = normal(seed + 2, d, m)
    return hidden, hidden @ truth.T + noise * normal(seed + 3, tokens, d) + offset, truth


def split(hidden, targets, fitted):
    return gram_statistics(hidden[:fitted], targets[:fitted]), gram_statistics(hidden[fitted:], targets[fitted:])


def tensors(statistics: GramStatistics):
    return statistics[:-1]


# Ridge refit


def test_one_channel_by_hand():
    # G = 4, C = 6, prior 1: λ = 0 gives 6 / 4; λ = 1 with Λ = 4 gives (6 + 4) / (4 + 4)
    statistics = gram_statistics(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    prior = torch.ones(1, 1)
    assert math.isclose(ridge_refit(statistics, prior, 0.0), 1.5, rel_tol=1e-9)
    assert math.isclose(ridge_refit(statistics, prior, 1.0), 1.25, rel_tol=1e-12)
    assert float(ridge_refit(statistics, prior, math.inf)) == 1.0


@law
@given(seed=seeds)
def test_without_shrinking_the_refit_is_least_squares_whatever_the_prior(seed):
    hidden, targets, _ = data(seed)
    statistics = gram_statistics(hidden, targets)
    expected = torch.linalg.lstsq(hidden, targets).solution.T
    for prior in (torch.zeros(4, 6), normal(seed + 4, 4, 6)):
        torch.testing.assert_close(ridge_refit(statistics, prior, 0.0), expected, rtol=1e-6, atol=1e-6)


@law
@given(seed=seeds)
def test_infinite_shrinking_is_the_prior_and_large_shrinking_nearly(seed):
    hidden, targets, _ = data(seed)
    statistics, prior = gram_statistics(hidden, targets), normal(seed + 4, 4, 6)
    assert torch.equal(ridge_refit(statistics, prior, math.inf), prior)
    torch.testing.assert_close(ridge_refit(statistics, prior, 1e9), prior, rtol=1e-6, atol=1e-6)


@law
@given(seed=seeds, ridge=st.floats(1e-6, 1e3), tokens=st.sampled_from([3, 40]))
def test_the_refit_agrees_with_least_squares_on_data_with_rows_for_the_prior(seed, ridge, tokens):
    hidden, targets, _ = data(seed, tokens)
    prior = normal(seed + 4, 4, 6)
    weight = torch.diag((ridge * hidden.square().sum(dim=0)).sqrt())
    expected = torch.linalg.lstsq(torch.cat([hidden, weight]), torch.cat([targets, weight @ prior.T])).solution.T
    got = ridge_refit(gram_statistics(hidden, targets), prior, ridge)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@law
@given(seed=seeds, ridge=st.sampled_from([1e-3, 0.1, 10.0]))
def test_finite_differences_find_no_slope_at_the_refit(seed, ridge):
    hidden, targets, _ = data(seed)
    statistics, prior = gram_statistics(hidden, targets), normal(seed + 4, 4, 6)
    down, direction = ridge_refit(statistics, prior, ridge), normal(seed + 5, 4, 6)

    def objective(candidate):
        penalty = ridge * ((candidate - prior).square() * statistics.gram.diagonal()).sum()
        return float(statistics.error(candidate) + penalty)

    step = 1e-3
    slope = (objective(down + step * direction) - objective(down - step * direction)) / (2 * step)
    assert abs(slope) < 1e-6 * objective(prior)
    assert objective(down) <= min(objective(down + step * direction), objective(down - step * direction))


@law
@given(seed=seeds, ridge=ridges, tokens=st.integers(1, 40))
def test_the_fit_error_is_never_above_the_priors(seed, ridge, tokens):
    hidden, targets, _ = data(seed, tokens)
    statistics = gram_statistics(hidden, targets)
    for prior in (torch.zeros(4, 6).double(), normal(seed + 4, 4, 6), 100 * normal(seed + 5, 4, 6)):
        error = float(statistics.error(ridge_refit(statistics, prior, ridge)))
        assert error <= float(statistics.error(prior)) * (1 + 1e-9) + 1e-9


@law
@given(seed=seeds)
def test_the_fit_error_grows_with_shrinking(seed):
    hidden, targets, _ = data(seed)
    statistics, prior = gram_statistics(hidden, targets), normal(seed + 4, 4, 6)
    errors = torch.stack([statistics.error(ridge_refit(statistics, prior, ridge)) for ridge in RIDGE_GRID])
    assert (errors.diff() >= -1e-8 * errors[-1]).all()


@law
@given(seed=seeds, ridge=ridges)
def test_permuting_channels_permutes_the_refit(seed, ridge):
    hidden, targets, _ = data(seed)
    statistics, prior, order = gram_statistics(hidden, targets), normal(seed + 4, 4, 6), permutation(seed, 6)
    permuted = ridge_refit(statistics.select(order), prior[:, order], ridge)
    torch.testing.assert_close(permuted, ridge_refit(statistics, prior, ridge)[:, order], rtol=1e-7, atol=1e-7)


@law
@given(seed=seeds, ridge=ridges, exponents=st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_scaling_a_channel_and_inversely_its_prior_scales_the_refit_inversely(seed, ridge, exponents):
    hidden, targets, _ = data(seed)
    scale = torch.tensor([10.0**exponent for exponent in exponents], dtype=torch.float64)
    prior = normal(seed + 4, 4, 6)
    plain = ridge_refit(gram_statistics(hidden, targets), prior, ridge)
    scaled = ridge_refit(gram_statistics(hidden * scale, targets), prior / scale, ridge)
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-7, 1e-2])
def test_duplicated_channels_and_few_tokens_are_fitted_all_the_same(ridge):
    hidden, targets, _ = data(0, noise=0.0)
    twice = torch.cat([hidden, hidden], dim=1)  # 12 channels of rank 6
    for channels in (twice, twice[:5]):
        statistics = gram_statistics(channels, targets[: len(channels)])
        down = ridge_refit(statistics, torch.zeros(4, 12), ridge)
        assert torch.isfinite(down).all()
        assert float(statistics.error(down)) <= (1e-6 + ridge) * float(statistics.target_energy)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, math.inf])
def test_a_channel_that_is_never_active_keeps_its_prior(ridge):
    hidden, targets, _ = data(0)
    hidden[:, 2] = 0
    prior = normal(4, 4, 6)
    down = ridge_refit(gram_statistics(hidden, targets), prior, ridge)
    torch.testing.assert_close(down[:, 2], prior[:, 2])
    assert torch.isfinite(down).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-3, math.inf])
def test_a_layer_that_is_never_active_keeps_its_prior(ridge):
    statistics, prior = gram_statistics(torch.zeros(5, 6), torch.zeros(5, 4)), normal(4, 4, 6)
    torch.testing.assert_close(ridge_refit(statistics, prior, ridge), prior)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, math.inf])
def test_low_precision_statistics_are_solved_in_float64_and_nothing_is_changed(dtype, ridge):
    hidden, targets, _ = data(0)
    statistics, prior = gram_statistics(hidden.float(), targets.float()), normal(4, 4, 6, dtype=dtype)
    with untouched(*tensors(statistics), prior):
        down = ridge_refit(statistics, prior, ridge)
    assert down.dtype == torch.float64
    assert down.device == prior.device
    torch.testing.assert_close(down, ridge_refit(statistics.double(), prior.double(), ridge), rtol=0, atol=0)


def test_a_prior_of_another_shape_is_refused():
    hidden, targets, _ = data(0)
    with pytest.raises(ShapeError, match=r"prior has shape \(4, 5\), the statistics want \(4, 6\). Select the kept"):
        ridge_refit(gram_statistics(hidden, targets), torch.zeros(4, 5), 1.0)


def test_statistics_that_are_not_finite_are_refused():
    hidden, targets, _ = data(0)
    hidden[3, 2] = float("nan")
    with pytest.raises(NumericalError, match="the Gram matrix of the kept channels is NaN or infinite"):
        ridge_refit(gram_statistics(hidden, targets), torch.zeros(4, 6), 1.0)


def test_a_matrix_that_is_no_gram_matrix_is_refused():
    hidden, targets, _ = data(0)
    statistics = gram_statistics(hidden, targets)
    wrong = statistics._replace(gram=10 * statistics.gram - 9 * torch.diag(statistics.gram.diagonal()))
    with pytest.raises(NumericalError, match="the Gram matrix of the kept channels is not positive semidefinite"):
        ridge_refit(wrong, torch.zeros(4, 6), 0.0)


# Choice of λ


@law
@given(seed=seeds, fitted=st.sampled_from([4, 8, 30]), noise=st.sampled_from([0.1, 3.0]))
def test_the_choice_agrees_with_trying_the_whole_grid(seed, fitted, noise):
    hidden, targets, _ = data(seed, noise=noise)
    fit, heldout = split(hidden, targets, fitted)
    prior = normal(seed + 4, 4, 6)
    with untouched(*tensors(fit), *tensors(heldout), prior):
        ridge, error = choose_ridge(fit, heldout, prior)
    errors = [float(heldout.error(ridge_refit(fit, prior, candidate))) for candidate in RIDGE_GRID]
    assert math.isclose(error, min(errors), rel_tol=1e-5)
    assert math.isclose(errors[RIDGE_GRID.index(ridge)], min(errors), rel_tol=1e-5)


@law
@given(seed=seeds)
def test_no_shrinking_at_all_may_be_in_the_grid(seed):
    hidden, targets, truth = data(seed, noise=0.0)
    fit, heldout = split(hidden, targets, 30)
    ridge, error = choose_ridge(fit, heldout, truth + normal(seed + 4, 4, 6), grid=(0.0, 1e-1, math.inf))
    assert ridge == 0.0
    assert abs(error) <= 1e-8 * float(heldout.target_energy)


def test_a_prior_that_is_right_is_kept_and_a_wrong_one_is_left():
    hidden, targets, truth = data(0, tokens=400, noise=1.0)
    fit, heldout = split(hidden, targets, 20)
    assert choose_ridge(fit, heldout, truth)[0] >= 1.0
    assert choose_ridge(fit, heldout, truth + 10 * normal(4, 4, 6))[0] < 1.0


def test_the_held_out_error_is_never_above_the_priors():
    for seed in range(10):
        hidden, targets, _ = data(seed, noise=5.0)
        fit, heldout = split(hidden, targets, 6)
        prior = normal(seed, 4, 6)
        assert choose_ridge(fit, heldout, prior)[1] <= float(heldout.error(prior)) * (1 + 1e-12)


def test_the_choice_is_from_the_grid():
    hidden, targets, truth = data(0, noise=1.0)
    fit, heldout = split(hidden, targets, 6)
    assert choose_ridge(fit, heldout, truth, grid=(1e-6, 1e-5))[0] in (1e-6, 1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-7, 1e-1])
def test_the_error_of_a_singular_fit_is_what_refitting_gives(ridge):
    hidden, targets, _ = data(0)
    hidden[:, 4] = hidden[:, 1]
    hidden[:, 5] = 0
    fit, heldout = split(hidden, targets, 30)
    expected = heldout.error(ridge_refit(fit, torch.zeros(4, 6), ridge))
    chosen, error = choose_ridge(fit, heldout, torch.zeros(4, 6), grid=(ridge,))
    assert chosen == ridge
    assert math.isclose(error, expected, rel_tol=1e-5)


def test_float32_statistics_are_judged_in_float64():
    hidden, targets, _ = data(0)
    fit, heldout = split(hidden.float(), targets.float(), 30)
    prior = normal(4, 4, 6, dtype=torch.bfloat16)
    assert choose_ridge(fit, heldout, prior) == choose_ridge(fit.double(), heldout.double(), prior.double())


# Refit and intercept


@pytest.mark.parametrize("intercept", ["never", "always", "auto"])
@law
@given(seed=seeds, offset=st.sampled_from([0.0, 2.0]))
def test_the_held_out_error_is_that_of_the_refit_to_the_other_tokens(intercept, seed, offset):
    hidden, targets, _ = data(seed, offset=offset)
    fit, heldout = split(hidden, targets, 28)
    prior = normal(seed + 4, 4, 6)
    with untouched(*tensors(fit), *tensors(heldout), prior):
        total, alone = refit_down(fit, heldout, prior, intercept)
    bias = 0.0 if alone.bias is None else alone.bias
    residual = (targets[28:] - hidden[28:] @ alone.down.T - bias).square().sum()
    assert math.isclose(alone.heldout_error, residual, rel_tol=1e-5)
    assert (total.ridge, total.heldout_error) == (alone.ridge, alone.heldout_error)
    assert (total.bias is None) == (alone.bias is None)
    assert total.down.dtype == alone.down.dtype == torch.float64


@law
@given(seed=seeds)
def test_without_an_intercept_the_refits_are_plain_ridge_refits(seed):
    hidden, targets, _ = data(seed)
    fit, heldout = split(hidden, targets, 28)
    prior = normal(seed + 4, 4, 6)
    total, alone = refit_down(fit, heldout, prior)
    assert total.bias is alone.bias is None
    torch.testing.assert_close(total.down, ridge_refit(gram_statistics(hidden, targets), prior, total.ridge))
    torch.testing.assert_close(alone.down, ridge_refit(fit, prior, total.ridge))


@law
@given(seed=seeds)
def test_with_an_intercept_the_mean_output_is_met_and_the_rest_is_a_refit_of_centred_data(seed):
    hidden, targets, _ = data(seed, offset=2.0)
    fit, heldout = split(hidden, targets, 28)
    prior = normal(seed + 4, 4, 6)
    total, _ = refit_down(fit, heldout, prior, "always")
    residual = targets - hidden @ total.down.T - total.bias
    torch.testing.assert_close(residual.mean(dim=0), torch.zeros(4).double(), rtol=0, atol=1e-9)
    centred = gram_statistics(hidden - hidden.mean(dim=0), targets - targets.mean(dim=0))
    torch.testing.assert_close(total.down, ridge_refit(centred, prior, total.ridge), rtol=1e-6, atol=1e-6)


@law
@given(seed=seeds, offset=st.sampled_from([0.0, 0.3, 3.0]))
def test_an_intercept_is_added_exactly_where_it_lowers_the_held_out_error_by_two_percent(seed, offset):
    hidden, targets, _ = data(seed)
    targets = targets + offset
    fit, heldout = split(hidden, targets, 28)
    prior = normal(seed + 4, 4, 6)
    never, always, auto = (refit_down(fit, heldout, prior, intercept)[0] for intercept in ("never", "always", "auto"))
    assert always.bias is not None
    better = always if always.heldout_error < 0.98 * never.heldout_error else never
    assert auto.heldout_error == better.heldout_error
    assert (auto.bias is None) == (better.bias is None)
    assert torch.equal(auto.down, better.down)
    if offset == 3.0:
        assert auto.bias is not None


@law
@given(seed=seeds)
def test_a_constant_bias_is_the_mean_output_that_is_missing(seed):
    hidden, targets, _ = data(seed, offset=1.0)
    statistics, down = gram_statistics(hidden, targets), normal(seed + 4, 4, 6)
    with untouched(*tensors(statistics), down):
        bias = constant_bias(statistics, down)
    torch.testing.assert_close(bias, (targets - hidden @ down.T).mean(dim=0), rtol=1e-10, atol=1e-10)


def test_a_constant_bias_makes_up_for_a_dropped_channel_that_is_constant():
    hidden, down = normal(0, 30, 6), normal(1, 4, 6)
    hidden[:, 5] = 0.7
    kept = torch.arange(5)
    statistics = gram_statistics(hidden, hidden @ down.T).select(kept)
    torch.testing.assert_close(constant_bias(statistics, down[:, kept]), 0.7 * down[:, 5], rtol=1e-10, atol=1e-10)


def test_a_constant_bias_has_the_dtype_of_the_statistics():
    hidden, targets, _ = data(0)
    statistics = gram_statistics(hidden.float(), targets.float())
    bias = constant_bias(statistics, normal(1, 4, 6, dtype=torch.bfloat16))
    assert bias.dtype == torch.float32
    assert bias.shape == (4,)
