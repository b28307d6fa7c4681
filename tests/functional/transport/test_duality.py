"""Potentials: reduced costs in blocks, and bounds that no plan can undercut."""

import math

import pytest
import torch
from hypothesis import given

from optimum_otprune.functional.solvers import solve_transport
from optimum_otprune.functional.transport import duality
from optimum_otprune.functional.transport.duality import c_transform, lower_bound, reduced_costs
from tests.functional.helpers import law, normal, probabilities, seeds


def test_a_c_transform_by_hand():
    cost = torch.tensor([[1.0, 5.0], [3.0, 3.0]], dtype=torch.float64)
    assert c_transform(cost, torch.tensor([0.0, 3.0], dtype=torch.float64)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_blocks_cover_all_rows_in_order(monkeypatch, block):
    monkeypatch.setattr(duality, "BLOCK", block)
    cost, potential = normal(0, 10, 3), normal(1, 3)
    rows = [(list(range(10))[part], values.clone()) for part, values in reduced_costs(cost, potential)]
    assert [row for numbers, _ in rows for row in numbers] == list(range(10))
    assert torch.equal(torch.cat([values for _, values in rows]), cost - potential)


@law
@given(seed=seeds)
def test_no_plan_costs_less_than_the_bound_of_any_potential(seed):
    cost, source, target = normal(seed, 9, 4).exp(), probabilities(seed + 1, 9), probabilities(seed + 2, 4)
    bound = lower_bound(cost, source, target, normal(seed + 3, 4))
    assert bound <= solve_transport("emd", cost, source, target).cost + 1e-12


def test_the_bound_of_float32_costs_is_computed_in_the_precision_of_the_potential():
    cost, source, target = normal(0, 9, 4).exp(), probabilities(1, 9), probabilities(2, 4)
    low = cost.float()
    potential = normal(3, 4)
    assert lower_bound(low, source, target, potential) == lower_bound(low.double(), source, target, potential)
    assert not math.isclose(
        lower_bound(low, source, target, potential), lower_bound(cost, source, target, potential), rel_tol=1e-12
    )
