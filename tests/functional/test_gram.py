"""Second moments, and the Cholesky factorization of matrices that are nearly singular."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.gram import GramAccumulator, GramStatistics, gram_statistics
from optimum_otprune.functional.linalg import symmetric
from optimum_otprune.functional.linalg.damped import damped_cholesky
from tests.functional.helpers import law, normal, permutation, seeds, untouched


def assert_equal_statistics(first: GramStatistics, second: GramStatistics, tolerance: float = 1e-9):
    assert first.num_tokens == second.num_tokens
    for one, other in zip(first[:-1], second[:-1]):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def data(seed, tokens=20, n=7, d=4):
    return normal(seed, tokens, n) + 0.3, normal(seed + 1, tokens, d) - 0.2


def test_sums_over_two_tokens_by_hand():
    statistics = gram_statistics(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [-2.0]]))
    assert torch.equal(statistics.gram, torch.tensor([[10.0, 2.0], [2.0, 4.0]]))
    assert torch.equal(statistics.cross, torch.tensor([[-5.0, 2.0]]))
    assert torch.equal(statistics.hidden_sum, torch.tensor([4.0, 2.0]))
    assert torch.equal(statistics.target_sum, torch.tensor([-1.0]))
    assert statistics.target_energy == 5.0
    assert statistics.num_tokens == 2


def test_sums_agree_with_a_loop_over_tokens():
    hidden, targets = data(0)
    with untouched(hidden, targets):
        statistics = gram_statistics(hidden, targets)
    gram, cross = np.zeros((7, 7)), np.zeros((4, 7))
    for h, y in zip(hidden.numpy(), targets.numpy()):
        gram += np.outer(h, h)
        cross += np.outer(y, h)
    np.testing.assert_allclose(statistics.gram, gram, atol=1e-10)
    np.testing.assert_allclose(statistics.cross, cross, atol=1e-10)


@law
@given(seed=seeds, first=st.integers(1, 19))
def test_adding_is_the_statistics_of_all_tokens_together(seed, first):
    hidden, targets = data(seed)
    parts = [gram_statistics(hidden[part], targets[part]) for part in (slice(0, first), slice(first, None))]
    with untouched(*parts[0][:-1], *parts[1][:-1]):
        added = parts[0] + parts[1]
    assert_equal_statistics(added, gram_statistics(hidden, targets))


@law
@given(seed=seeds, rows=st.sampled_from([1, 3, 4, 7, 20]), first=st.integers(0, 20), weighted=st.booleans())
def test_accumulating_batches_in_blocks_is_the_statistics_of_all_tokens_together(seed, rows, first, weighted):
    hidden, targets = data(seed)
    weights = normal(seed + 6, 20).abs() if weighted else None
    root = torch.ones(20, 1, dtype=torch.float64) if weights is None else weights[:, None].sqrt()
    with pytest.MonkeyPatch.context() as patch, untouched(hidden, targets, weights):
        patch.setattr(symmetric, "_LEAST_ROWS", rows)
        sums = GramAccumulator(7, 4, torch.float64)
        for part in (slice(0, first), slice(first, 20)):
            sums.add(hidden[part], targets[part], None if weights is None else weights[part])
            found = sums.statistics()
    assert torch.equal(found.gram, found.gram.T)
    torch.testing.assert_close(found.gram, (hidden * root).T @ (hidden * root), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cross, (targets * root).T @ (hidden * root), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.hidden_sum, (hidden * root.square()).sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.target_sum, (targets * root.square()).sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.target_energy, (targets * root).square().sum(), rtol=1e-12, atol=1e-12)
    assert found.num_tokens == sums.num_tokens == 20


def test_scaling_is_the_statistics_of_scaled_token_weights():
    hidden, targets = data(2)
    statistics, weights = gram_statistics(hidden, targets), torch.full((20,), 2.5, dtype=torch.float64)
    with untouched(*statistics[:-1]):
        scaled = statistics.scaled(2.5)
    assert_equal_statistics(scaled, gram_statistics(hidden, targets, weights))


@law
@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 100.0]))
def test_shifting_is_the_statistics_of_shifted_data(seed, scale):
    hidden, targets = data(seed)
    h, y = scale * normal(seed + 2, 7), scale * normal(seed + 3, 4)
    statistics = gram_statistics(hidden, targets)
    with untouched(*statistics[:-1], h, y):
        shifted = statistics.shifted(h, y)
    assert_equal_statistics(shifted, gram_statistics(hidden - h, targets - y), 1e-9 * max(1.0, scale**2))


def test_shifting_by_the_means_leaves_no_sums_and_the_covariance():
    hidden, targets = data(3)
    statistics = gram_statistics(hidden, targets).shifted(hidden.mean(dim=0), targets.mean(dim=0))
    torch.testing.assert_close(statistics.hidden_sum, torch.zeros(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(statistics.target_sum, torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(statistics.gram / 19, torch.cov(hidden.T), rtol=1e-10, atol=1e-10)


@law
@given(seed=seeds)
def test_selecting_channels_is_the_statistics_of_these_channels(seed):
    hidden, targets = data(seed)
    channels = permutation(seed, 7)[:3]
    statistics = gram_statistics(hidden, targets)
    with untouched(*statistics[:-1]):
        selected = statistics.select(channels)
    assert_equal_statistics(selected, gram_statistics(hidden[:, channels], targets))


@law
@given(seed=seeds)
def test_the_error_is_the_squared_residual_summed_over_tokens(seed):
    hidden, targets = data(seed)
    down = normal(seed + 5, 4, 7)
    error = gram_statistics(hidden, targets).error(down)
    torch.testing.assert_close(error, (targets - hidden @ down.T).square().sum(), rtol=1e-10, atol=1e-10)


def test_the_slope_of_the_error_agrees_with_finite_differences():
    hidden, targets = data(1)
    statistics = gram_statistics(hidden, targets)
    down, direction = normal(8, 4, 7), normal(9, 4, 7)
    slope = 2 * ((down @ statistics.gram - statistics.cross) * direction).sum()
    step = 1e-3
    difference = (statistics.error(down + step * direction) - statistics.error(down - step * direction)) / (2 * step)
    torch.testing.assert_close(difference, slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_have_the_dtype_of_the_activations_and_double_makes_them_float64(dtype):
    hidden, targets = (part.to(dtype) for part in data(0))
    statistics = gram_statistics(hidden, targets)
    assert {part.dtype for part in statistics[:-1]} == {dtype}
    doubled = statistics.double()
    assert {part.dtype for part in doubled[:-1]} == {torch.float64}
    assert doubled.num_tokens == 20
    assert torch.equal(doubled.gram, statistics.gram.double())


def test_a_positive_definite_matrix_is_factored_as_it_is():
    matrix = torch.tensor([[4.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[2.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    with untouched(matrix):
        factor = damped_cholesky(matrix, 0.0)
    torch.testing.assert_close(factor, expected, rtol=0, atol=1e-15)


def test_the_first_damping_is_in_units_of_the_mean_diagonal():
    matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    factor = damped_cholesky(matrix, 0.5)
    torch.testing.assert_close(factor @ factor.T, matrix + torch.eye(2).double(), rtol=0, atol=1e-14)


@law
@given(seed=seeds, scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_a_matrix_of_low_rank_is_factored_with_hardly_any_damping(seed, scale):
    hidden = normal(seed, 3, 8) * scale**0.5
    gram = hidden.T @ hidden
    factor = damped_cholesky(gram, 0.0)
    assert torch.equal(factor, factor.tril())
    assert (factor @ factor.T - gram).norm() <= 1e-8 * gram.norm()


def test_a_matrix_of_zeros_is_factored():
    assert torch.isfinite(damped_cholesky(torch.zeros(3, 3).double(), 1e-3)).all()


def test_damping_grows_until_a_slightly_indefinite_matrix_is_factored():
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    factor = damped_cholesky(matrix, 0.0)
    damping = (factor @ factor.T - matrix).diagonal()
    torch.testing.assert_close(damping, damping[:1].expand(3))
    assert 1e-5 < damping[0] < 1e-3


def test_a_matrix_that_is_far_from_semidefinite_is_refused_by_name():
    matrix = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))
    with pytest.raises(NumericalError, match="the Gram matrix of layer 7 is not positive semidefinite.*0.01 of"):
        damped_cholesky(matrix, 0.0, "the Gram matrix of layer 7")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused_by_name(value):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 2] = value
    with pytest.raises(NumericalError, match="that matrix is NaN or infinite.*Load the model in float32"):
        damped_cholesky(matrix, 0.0, "that matrix")
