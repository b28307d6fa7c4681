"""Plans: sparse and dense ones are checked alike, rounding meets marginals, medians."""

import pytest
import torch

from optimum_otprune.errors import TransportError
from optimum_otprune.functional.transport import plans
from optimum_otprune.functional.transport.plans import Solved, checked_plan, median_cost, plan_cost, round_to_marginals
from tests.functional.helpers import normal, probabilities

SOURCE, TARGET = probabilities(1, 6), probabilities(2, 3)
COST = normal(0, 6, 3).abs()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_plan_is_checked_alike_dense_and_sparse(sparse):
    plan = torch.outer(SOURCE, TARGET)
    given = plan.to_sparse() if sparse else plan
    checked = checked_plan(Solved(given, True), COST, (SOURCE, TARGET), "own", (True, True))
    torch.testing.assert_close(checked.matrix, plan)
    assert not checked.matrix.is_sparse
    assert checked.cost == pytest.approx(float((plan * COST).sum()))
    assert checked.marginal_error < 1e-15


@pytest.mark.parametrize("entry", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_unusable_plan_is_refused_dense_and_sparse(sparse, entry):
    plan = torch.outer(SOURCE, TARGET)
    plan[2, 1] = entry
    given = plan.to_sparse() if sparse else plan
    with pytest.raises(TransportError, match=r"'own' returned no usable plan \(wrong shape, NaN or negative mass\)"):
        checked_plan(Solved(given, True), COST, (SOURCE, TARGET), "own", (True, True))


def test_a_sparse_plan_of_nothing_is_refused():
    nothing = torch.zeros(6, 3, dtype=torch.float64).to_sparse()
    with pytest.raises(TransportError, match="'own' moved no mass at all"):
        checked_plan(Solved(nothing, True), COST, (SOURCE, TARGET), "own", (False, False))


def test_the_cost_of_a_plan_is_summed_in_float64(monkeypatch):
    monkeypatch.setattr("optimum_otprune.functional.transport.duality.BLOCK", 4)
    plan = torch.outer(SOURCE, TARGET)
    assert plan_cost(plan, COST.float()) == pytest.approx(float((plan * COST.float().double()).sum()), rel=1e-14)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_rounding_meets_both_marginals_and_leaves_a_plan_that_met_them(factor):
    plan = torch.outer(SOURCE, TARGET) * factor * (0.5 + torch.rand(6, 3).double() if factor != 1 else 1)
    before = plan.clone()
    rounded = round_to_marginals(plan, SOURCE, TARGET)
    torch.testing.assert_close(rounded.sum(dim=1), SOURCE, rtol=0, atol=1e-15)
    torch.testing.assert_close(rounded.sum(dim=0), TARGET, rtol=0, atol=1e-15)
    if factor == 1:
        torch.testing.assert_close(rounded, before, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("small", [0, 10**6])
def test_the_median_is_that_of_the_positive_costs(monkeypatch, small):
    monkeypatch.setattr(plans, "_SMALL", small)
    assert median_cost(torch.tensor([[0.0, 4.0, 1.0], [3.0, 0.0, 2.0]])) == 2.0
    assert median_cost(torch.zeros(2, 2)) == 1.0
