"""Exact transport on few arcs costs what the network simplex on all arcs costs, whatever arcs it starts from."""

import math

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_otprune.errors import TransportError
from optimum_otprune.functional.transport import exact as exact_transport
from optimum_otprune.functional.transport.plans import plan_cost
from tests.functional.helpers import law, normal, probabilities, random_numbers, seeds, untouched


@pytest.fixture(autouse=True)
def few_arcs(monkeypatch):
    """Small problems are solved on few arcs, and start with fewer than would do."""
    monkeypatch.setattr(exact_transport, "SPARSE_FROM", 0)
    monkeypatch.setattr(exact_transport, "_FIRST", 1)
    monkeypatch.setattr(exact_transport, "_FIRST_MOST", 3)


def weight_cost(seed, n, m, p=1.0):
    """Distances between unit vectors, some of them twice; the last m channels are kept."""
    vectors = torch.nn.functional.normalize(normal(seed, n, 5), dim=1)
    vectors[: n // 4] = vectors[n - n // 4 :]
    return torch.cdist(vectors, vectors[n - m :], p=p)


def activation_cost(seed, n, m):
    """Energy that a kept channel cannot explain; no distance, and zero for channels that are never active."""
    activations = normal(seed, 7, n)
    activations[:, : n // 5] = 0
    gram = activations.T @ activations
    kept = torch.arange(n - m, n)
    energy = gram.diagonal()
    explained = gram[:, kept] ** 2 / energy[kept].clamp_min(1e-300)
    return normal(seed + 1, n).square()[:, None] * (energy[:, None] - explained).clamp_min(0)


COSTS = {
    "weight": weight_cost,
    "weight_l2": lambda seed, n, m: weight_cost(seed, n, m, 2.0),
    "activation": activation_cost,
    "uniform": lambda seed, n, m: torch.rand(n, m, generator=random_numbers(seed), dtype=torch.float64),
    "ties": lambda seed, n, m: torch.randint(0, 3, (n, m), generator=random_numbers(seed)).double(),
    "zero": lambda seed, n, m: torch.zeros(n, m, dtype=torch.float64),
    "far apart": lambda seed, n, m: (4 * normal(seed, n, m)).exp(),
}


def marginal(kind, seed, size):
    masses = probabilities(seed, size)
    if kind == "uniform":
        masses = torch.ones_like(masses)
    elif kind == "zeros":
        masses[torch.rand(size, generator=random_numbers(seed + 1)) < 0.4] = 0
        masses[seed % size] = 1
    elif kind == "wide":
        masses = (6 * normal(seed, size)).exp()
    return masses / masses.sum()


def rival(cost, source, target):
    return float(ot.emd2(source.numpy(), target.numpy(), cost.numpy(), numItermax=1_000_000))


@pytest.mark.parametrize("masses", ["uniform", "unequal", "zeros", "wide"])
@pytest.mark.parametrize("kind", COSTS)
@law
@given(seed=seeds, n=st.integers(1, 30), share=st.sampled_from([0.25, 0.5, 0.9, 1.0]))
def test_few_arcs_cost_what_all_arcs_cost_and_meet_the_marginals(kind, masses, seed, n, share):
    m = max(1, int(share * n))
    cost = COSTS[kind](seed, n, m)
    source, target = marginal(masses, seed + 2, n), marginal(masses, seed + 3, m)
    with untouched(cost, source, target):
        plan = exact_transport.exact_plan(cost, source, target, 100_000)
    scale = float(cost.abs().max())
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9, abs_tol=1e-12 * scale)
    dense = plan.to_dense()
    assert (dense >= 0).all()
    torch.testing.assert_close(dense.sum(dim=1), source, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense.sum(dim=0), target, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["weight", "activation", "uniform"])
def test_larger_problems_are_proved_on_few_arcs_in_few_rounds(kind, monkeypatch):
    priced = []
    price = exact_transport._FewArcs._price

    def spy(self, solution):
        priced.append(len(self.arcs))
        return price(self, solution)

    monkeypatch.setattr(exact_transport._FewArcs, "_price", spy)
    monkeypatch.setattr(exact_transport, "_CHUNK", 50)
    cost, source, target = COSTS[kind](0, 200, 100), probabilities(1, 200), probabilities(2, 100)
    plan = exact_transport.exact_plan(cost, source, target, 100_000)
    assert plan.is_sparse
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9)
    assert 2 <= len(priced) <= 20  # the first arcs did not do, and were mended
    assert max(priced) < cost.numel() / 4


@pytest.mark.parametrize("dead", [60, 150, 200])
def test_many_arcs_of_equal_cost_are_no_reason_to_take_them_all(dead, monkeypatch):
    candidates = []
    below = exact_transport._FewArcs._below

    def spy(self, *chunk):
        arcs = below(self, *chunk)
        candidates.extend(len(part) for part in arcs)
        return arcs

    monkeypatch.setattr(exact_transport._FewArcs, "_below", spy)
    cost = COSTS["uniform"](0, 400, 200)
    cost[:dead] = 0.0  # channels that are never active
    cost[200 : 200 + dead, 100:] = 0.5
    source, target = probabilities(1, 400), probabilities(2, 200)
    plan = exact_transport.exact_plan(cost, source, target, 100_000)
    assert plan.is_sparse
    assert sum(candidates) < cost.numel() / 4
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9, abs_tol=1e-13)


def test_mass_that_costs_nothing_where_it_is_moves_if_that_is_cheaper():
    # Channel 0 is pruned and can only go to 1; for that, 1 has to send half of its mass on to 2, which costs little.
    cost = torch.tensor([[1.0, 100.0], [0.0, 2.0], [100.0, 0.0]], dtype=torch.float64)
    source, target = torch.tensor([0.4, 0.4, 0.2]).double(), torch.tensor([0.5, 0.5]).double()
    plan = exact_transport.exact_plan(cost, source, target, 1000)
    expected = torch.tensor([[0.4, 0.0], [0.1, 0.3], [0.0, 0.2]]).double()
    torch.testing.assert_close(plan.to_dense(), expected, rtol=0, atol=1e-7)


def test_mass_that_may_stay_is_not_solved_for(monkeypatch):
    sizes = []
    solve = exact_transport.sparse_network_simplex

    def spy(rows, columns, costs, source, target, iterations):
        sizes.append((len(source), len(target)))
        return solve(rows, columns, costs, source, target, iterations)

    monkeypatch.setattr(exact_transport, "sparse_network_simplex", spy)
    vectors = torch.nn.functional.normalize(normal(0, 40, 8), dim=1)
    cost = torch.cdist(vectors, vectors[20:], p=1.0)
    even = torch.full((40,), 1 / 40, dtype=torch.float64), torch.full((20,), 1 / 20, dtype=torch.float64)
    exact_transport.exact_plan(cost, *even, 100_000)
    assert set(sizes) == {(20, 20)}


def test_potentials_that_are_rounded_are_solved_for_again(monkeypatch):
    solve = exact_transport.sparse_network_simplex
    solved = []

    def rounded(*problem):
        plan = solve(*problem)
        rough = max(float(problem[2].abs().max()), 1e-300)  # as much as the costs that it was given are large
        solved.append(rough)
        return plan._replace(source_potential=plan.source_potential + 1e-9 * rough * normal(1, len(problem[3])))

    monkeypatch.setattr(exact_transport, "_GAP", 1e-11)
    monkeypatch.setattr(exact_transport, "sparse_network_simplex", rounded)
    cost, source, target = COSTS["uniform"](0, 20, 10), probabilities(1, 20), probabilities(2, 10)
    plan = exact_transport.exact_plan(cost, source, target, 100_000)
    assert plan.is_sparse
    assert solved[-1] < 1e-6
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9)


def test_what_few_arcs_cannot_prove_is_solved_on_all_arcs(monkeypatch):
    monkeypatch.setattr(exact_transport, "_ROUNDS", 0)
    cost, source, target = COSTS["uniform"](0, 20, 10), probabilities(1, 20), probabilities(2, 10)
    plan = exact_transport.exact_plan(cost, source, target, 100_000)
    assert not plan.is_sparse
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9)


def test_masses_that_find_no_way_on_few_arcs_find_one_on_all():
    cost, source, target = COSTS["far apart"](139, 8, 7), marginal("wide", 141, 8), marginal("wide", 142, 7)
    plan = exact_transport.exact_plan(cost, source, target, 100_000)
    assert not plan.is_sparse
    assert math.isclose(plan_cost(plan, cost), rival(cost, source, target), rel_tol=1e-9)


def test_small_problems_are_solved_on_all_arcs(monkeypatch):
    monkeypatch.setattr(exact_transport, "SPARSE_FROM", 201)
    plan = exact_transport.exact_plan(
        COSTS["uniform"](0, 20, 10), probabilities(1, 20), probabilities(2, 10), iterations=100_000
    )
    assert not plan.is_sparse


def test_a_solver_that_gives_up_on_few_arcs_and_on_all_says_so():
    with pytest.raises(TransportError, match=r"The exact solver gave up \(.*Use solver='sinkhorn'"):
        exact_transport.exact_plan(COSTS["uniform"](0, 60, 30), probabilities(1, 60), probabilities(2, 30), 1)
