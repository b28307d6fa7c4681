"""The mean singular value and its gradient are those of the decomposition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.functional.linalg import singular_values
from optimum_otprune.functional.linalg.singular_values import mean_singular_value
from tests.functional.helpers import law, normal, seeds


def by_decomposition(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = matrix.double().requires_grad_()
    value = torch.linalg.svdvals(leaf).mean()
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def ours(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = matrix.clone().requires_grad_()
    value = mean_singular_value(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@law
@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_value_and_gradient_are_those_of_the_decomposition(seed, rows, columns, scale):
    matrix = scale * normal(seed, rows, columns).float()
    for found, expected in zip(ours(matrix), by_decomposition(matrix)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_well_conditioned_matrix_is_exact_to_float32_in_parts(monkeypatch):
    monkeypatch.setattr(singular_values, "_COLUMNS", 7)
    matrix = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    (value, gradient), (expected, slope) = ours(matrix), by_decomposition(matrix)
    assert float(abs(value - expected) / expected) <= 1e-6
    assert float((gradient - slope).norm() / slope.norm()) <= 1e-6


def test_rows_that_repeat_have_a_finite_gradient_that_treats_them_alike():
    row = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    value, gradient = ours(row.repeat(4, 1))
    torch.testing.assert_close(value, 2 * row.norm() / 4)
    torch.testing.assert_close(gradient, (row / row.norm() / 8).repeat(4, 1))
    value, gradient = ours(torch.zeros(3, 5))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan(bad):
    matrix = torch.ones(2, 3)
    matrix[1, 1] = bad
    assert torch.isnan(mean_singular_value(matrix))
