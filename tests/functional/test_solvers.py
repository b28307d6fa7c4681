"""Transport solvers, checked against linear programming, assignment, POT and by hand."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from optimum_otprune.errors import RegistryError, ShapeError, TransportError
from optimum_otprune.functional.solvers import SolverSettings, check_marginal, solve_transport, solvers
from optimum_otprune.functional.transport import sinkhorn
from optimum_otprune.functional.transport.plans import Solved
from tests.functional.helpers import law, permutation, probabilities, random_numbers, seeds, untouched

MEETS_SOURCE = [name for name in solvers.names() if name not in ("partial", "unbalanced")]
MEETS_TARGET = [name for name in MEETS_SOURCE if name != "nearest"]


def problem(seed, n=9, m=4):
    cost = torch.rand(n, m, generator=random_numbers(seed), dtype=torch.float64)
    return cost, probabilities(seed + 1, n), probabilities(seed + 2, m)


def linear_program(cost, source, target, mass=None):
    """Least transport cost by SciPy, of all mass or of `mass` of it."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    both, marginals = np.vstack([rows, columns]), np.concatenate([source, target])
    if mass is None:
        return linprog(cost.numpy().ravel(), A_eq=both[:-1], b_eq=marginals[:-1]).fun
    return linprog(cost.numpy().ravel(), A_ub=both, b_ub=marginals, A_eq=np.ones((1, n * m)), b_eq=[mass]).fun


# Laws over every registered solver


@pytest.mark.parametrize("name", solvers.names())
@law
@given(seed=seeds, n=st.integers(1, 12), m=st.integers(1, 6))
def test_every_plan_meets_the_marginals_that_it_has_to(name, seed, n, m):
    cost, source, target = problem(seed, n, m)
    with untouched(cost, source, target):
        plan = solve_transport(name, cost, source, target)
    assert plan.matrix.shape == (n, m)
    assert plan.matrix.dtype == torch.float64
    assert plan.matrix.device.type == "cpu"
    assert (plan.matrix >= 0).all()
    assert math.isclose(plan.cost, float((plan.matrix * cost).sum()), rel_tol=1e-12)
    errors = [0.0]
    if name in MEETS_SOURCE:
        errors.append(float((plan.matrix.sum(dim=1) - source).abs().max()))
    if name in MEETS_TARGET:
        errors.append(float((plan.matrix.sum(dim=0) - target).abs().max()))
    assert math.isclose(plan.marginal_error, max(errors), abs_tol=1e-15)
    assert plan.marginal_error < 1e-9
    assert (plan.matrix.sum(dim=1) <= source + 1e-9).all()  # no channel hands on more than it has


@pytest.mark.parametrize("name", solvers.names())
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_every_solver_copes_with_costs_of_any_size_and_without_any(name, scale):
    cost, source, target = problem(0)
    assert solve_transport(name, scale * cost, source, target).marginal_error < 1e-9


@pytest.mark.parametrize("name", solvers.names())
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@law
@given(seed=seeds)
def test_the_scale_of_the_cost_changes_no_plan(name, scale, seed):
    cost, source, target = problem(seed)
    plain, scaled = (solve_transport(name, factor * cost, source, target) for factor in (1.0, scale))
    torch.testing.assert_close(scaled.matrix, plain.matrix, rtol=1e-6, atol=1e-8)
    assert math.isclose(scaled.cost, scale * plain.cost, rel_tol=1e-6)


@pytest.mark.parametrize("name", solvers.names())
@law
@given(seed=seeds)
def test_permuting_channels_permutes_every_plan(name, seed):
    cost, source, target = problem(seed)
    rows, columns = permutation(seed, 9), permutation(seed + 1, 4)
    plain = solve_transport(name, cost, source, target).matrix
    permuted = solve_transport(name, cost[rows][:, columns], source[rows], target[columns]).matrix
    torch.testing.assert_close(permuted, plain[rows][:, columns], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", solvers.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_costs_are_solved_in_float64(name, dtype):
    cost, source, target = problem(1)
    low = cost.to(dtype)
    with untouched(low):
        plan = solve_transport(name, low, source.float(), target.float())
    exact = solve_transport(name, low.double(), source, target)
    assert plan.matrix.dtype == torch.float64
    torch.testing.assert_close(plan.matrix, exact.matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", solvers.names())
def test_a_cost_with_a_gradient_is_solved_without_one(name):
    cost, source, target = problem(1)
    plan = solve_transport(name, cost.clone().requires_grad_(), source, target)
    assert not plan.matrix.requires_grad
    assert torch.equal(plan.matrix, solve_transport(name, cost, source, target).matrix)


@pytest.mark.parametrize("name", solvers.names())
def test_channels_without_mass_send_none(name):
    cost, _, target = problem(2)
    source = torch.tensor([0.5, 0.0, 0.5, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    plan = solve_transport(name, cost, source, target)
    assert float(plan.matrix[[1, 3, 4, 5, 6, 7, 8]].sum()) <= 1e-12


# Each solver


def test_nearest_by_hand_of_equal_costs_takes_the_first():
    cost = torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.0, 5.0]])
    source, target = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.5, 0.5])
    plan = solve_transport("nearest", cost, source, target)
    expected = torch.tensor([[0.0, 0.5], [0.3, 0.0], [0.2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(plan.matrix, expected, rtol=1e-6, atol=0)
    assert math.isclose(plan.cost, 0.5 * 1 + 0.3 * 2, rel_tol=1e-6)


@law
@given(seed=seeds)
def test_nearest_agrees_with_a_loop_and_no_plan_is_cheaper(seed):
    cost, source, target = problem(seed)
    nearest = solve_transport("nearest", cost, source, target)
    expected = torch.zeros(9, 4, dtype=torch.float64)
    for j, row in enumerate(cost.tolist()):
        expected[j, row.index(min(row))] = source[j]
    torch.testing.assert_close(nearest.matrix, expected, rtol=1e-12, atol=0)
    assert nearest.cost <= solve_transport("emd", cost, source, target).cost + 1e-12


def test_emd_by_hand():
    cost = torch.tensor([[0.0, 1.0], [0.0, 3.0]])  # both want target 0; the one that minds less gives way
    half = torch.tensor([0.5, 0.5])
    plan = solve_transport("emd", cost, half, half)
    assert torch.equal(plan.matrix, torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64))
    assert (plan.cost, plan.converged, plan.marginal_error) == (0.5, True, 0.0)


@law
@given(seed=seeds)
def test_emd_costs_what_a_linear_program_says(seed):
    cost, source, target = problem(seed)
    plan = solve_transport("emd", cost, source, target)
    assert math.isclose(plan.cost, linear_program(cost, source, target), rel_tol=1e-7)
    assert math.isclose(plan.cost, ot.emd2(source.numpy(), target.numpy(), cost.numpy()), rel_tol=1e-9)


@law
@given(seed=seeds)
def test_emd_between_equal_masses_is_an_assignment(seed):
    cost, _, _ = problem(seed, 6, 6)
    sixth = torch.full((6,), 1 / 6, dtype=torch.float64)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[linear_sum_assignment(cost.numpy())] = 1 / 6
    torch.testing.assert_close(solve_transport("emd", cost, sixth, sixth).matrix, expected, rtol=1e-9, atol=1e-9)


def test_emd_that_gives_up_says_so(monkeypatch):
    monkeypatch.setattr("optimum_otprune.functional.solvers._MAX_ITERATIONS", 1)
    with pytest.raises(TransportError, match=r"The exact solver gave up \(.*Use solver='sinkhorn'"):
        solve_transport("emd", *problem(0, 30, 20))


@law
@given(seed=seeds)
def test_sinkhorn_agrees_with_scaling_by_hand(seed):
    cost, source, target = problem(seed)
    kernel = torch.exp(-cost / (0.5 * cost.flatten().sort().values[17]))  # the lower median of 36
    left, right = torch.ones(9).double(), torch.ones(4).double()
    for _ in range(500):
        left = source / (kernel @ right)
        right = target / (kernel.T @ left)
    plan = solve_transport("sinkhorn", cost, source, target, SolverSettings(epsilon=0.5))
    torch.testing.assert_close(plan.matrix, left[:, None] * kernel * right, rtol=1e-5, atol=1e-8)


@law
@given(seed=seeds)
def test_sinkhorn_costs_more_with_more_entropy_and_never_less_than_the_exact_plan(seed):
    cost, source, target = problem(seed)
    exact = solve_transport("emd", cost, source, target).cost
    costs = [
        solve_transport("sinkhorn", cost, source, target, SolverSettings(epsilon=epsilon)).cost
        for epsilon in (0.02, 0.2, 2.0, 1e4)
    ]
    assert exact - 1e-9 <= costs[0] <= 1.1 * exact
    assert costs == sorted(costs)
    assert math.isclose(costs[-1], float(source @ cost @ target), rel_tol=1e-3)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-4, 1e-2])
def test_sinkhorn_meets_its_marginals_even_where_it_did_not_converge(epsilon):
    plan = solve_transport("sinkhorn", *problem(0, 20, 6), SolverSettings(epsilon=epsilon))
    assert plan.marginal_error < 1e-12


def test_a_plan_whose_solver_stopped_early_does_not_claim_to_have_converged(monkeypatch):
    cost, source, target = problem(0, 20, 6)
    effort = sinkhorn._THOROUGH._replace(iterations=1, step_iterations=1)
    with monkeypatch.context() as impatient:
        impatient.setattr(sinkhorn, "_THOROUGH", effort)
        plan = solve_transport("sinkhorn", cost, source, target, SolverSettings(epsilon=1e-6))
    assert plan.cost > 1.1 * solve_transport("emd", cost, source, target).cost  # nowhere near the regularized optimum
    assert not plan.converged
    assert solve_transport("sinkhorn", cost, source, target, SolverSettings(epsilon=0.5)).converged


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@law
@given(seed=seeds)
def test_partial_moves_the_cheapest_share_and_costs_what_a_linear_program_says(share, seed):
    cost, source, target = problem(seed)
    plan = solve_transport("partial", cost, source, target, SolverSettings(mass_share=share))
    assert math.isclose(float(plan.matrix.sum()), share, rel_tol=1e-7)
    assert (plan.matrix.sum(dim=0) <= target + 1e-9).all()
    assert math.isclose(plan.cost, linear_program(cost, source, target, share), rel_tol=1e-6, abs_tol=1e-9)


@law
@given(seed=seeds)
def test_partial_of_all_mass_is_exact_transport(seed):
    cost, source, target = problem(seed)
    plan = solve_transport("partial", cost, source, target, SolverSettings(mass_share=1.0))
    torch.testing.assert_close(plan.matrix, solve_transport("emd", cost, source, target).matrix, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_unbalanced_of_one_channel_by_hand(penalty, scale):
    # least of p + 2 · penalty · (p ln p − p + 1), the cost being its own median: p = exp(−1 / (2 · penalty))
    one = torch.ones(1)
    plan = solve_transport("unbalanced", torch.full((1, 1), scale), one, one, SolverSettings(marginal_penalty=penalty))
    assert math.isclose(float(plan.matrix), math.exp(-1 / (2 * penalty)), rel_tol=1e-6)


@law
@given(seed=seeds)
def test_unbalanced_moves_more_mass_the_more_a_missed_marginal_costs(seed):
    cost, source, target = problem(seed)
    moved = [
        float(
            solve_transport("unbalanced", cost, source, target, SolverSettings(marginal_penalty=penalty)).matrix.sum()
        )
        for penalty in (0.1, 1.0, 10.0)
    ]
    assert moved == sorted(moved)
    assert 0 < moved[0] < moved[-1] <= 1 + 1e-9


# The door


def test_a_function_of_ones_own_is_a_solver():
    def independent(cost_matrix, source_marginal, target_marginal, settings):
        return torch.outer(source_marginal, target_marginal)

    cost, source, target = problem(0)
    plan = solve_transport(independent, cost, source, target)
    torch.testing.assert_close(plan.matrix, torch.outer(source, target))


@pytest.mark.parametrize(
    ("factors", "side"), [((0.9, 1.0), "source"), ((1.0, 0.9), "target")], ids=["source", "target"]
)
def test_a_solver_of_ones_own_that_misses_a_marginal_is_refused_unless_it_says_so(factors, side):
    def loose(cost_matrix, source_marginal, target_marginal, settings):
        plan = torch.outer(source_marginal, target_marginal)
        if side == "source":  # rows move to row 0; columns stay as they are
            plan[0] += 0.1 * plan[1:].sum(dim=0)
            plan[1:] *= 0.9
        else:
            plan[:, 0] += 0.1 * plan[:, 1:].sum(dim=1)
            plan[:, 1:] *= 0.9
        return plan

    with pytest.raises(TransportError, match=f"'loose' misses its {side} marginal by 0.0[0-9]*. Use solver='emd'"):
        solve_transport(loose, *problem(0))
    loose.meets = (side == "target", side == "source")
    assert solve_transport(loose, *problem(0)).marginal_error < 1e-12


@pytest.mark.parametrize(
    "result", [torch.ones(4, 9), torch.full((9, 4), float("nan")), torch.full((9, 4), -1.0)], ids=str
)
def test_a_plan_that_is_none_is_refused(result):
    def broken(cost_matrix, source_marginal, target_marginal, settings):
        return result

    with pytest.raises(
        TransportError, match=r"'broken' returned no usable plan \(wrong shape, NaN or negative mass\)"
    ):
        solve_transport(broken, *problem(0))


@pytest.mark.parametrize("result", [None, [1.0], Solved([1.0], True), torch.ones(9, 4) * 1j], ids=str)
def test_what_is_no_plan_at_all_is_refused(result):
    with pytest.raises(ShapeError, match=r"returned a \w+ that is no plan; want a tensor of shape \(9, 4\)"):
        solve_transport(lambda *inputs: result, *problem(0))


def test_a_plan_that_moves_nothing_is_refused():
    def lazy(cost_matrix, source_marginal, target_marginal, settings):
        return torch.zeros_like(cost_matrix)

    lazy.meets = (False, False)
    with pytest.raises(TransportError, match="'lazy' moved no mass at all"):
        solve_transport(lazy, *problem(0))


def test_masses_a_rounding_error_below_zero_count_as_zero():
    def rounded(cost_matrix, source_marginal, target_marginal, settings):
        plan = torch.outer(source_marginal, target_marginal)
        plan[0, 0] = -1e-9
        return plan

    rounded.meets = (False, False)
    assert solve_transport(rounded, *problem(0)).matrix[0, 0] == 0


def test_marginals_of_another_length_are_refused():
    cost, source, target = problem(0)
    with pytest.raises(ShapeError, match=r"The cost has shape \(9, 4\), the marginals have 4 and 9 entries"):
        solve_transport("emd", cost, target, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_is_refused(value):
    cost, source, target = problem(0)
    cost[2, 3] = value
    with pytest.raises(TransportError, match="The transport cost is NaN or infinite"):
        solve_transport("emd", cost, source, target)


@pytest.mark.parametrize(
    ("masses", "message"),
    [
        ([0.5, 0.6], "sum 1.1, least entry 0.5"),
        ([-0.5, 1.5], "sum 1, least entry -0.5"),
        ([float("nan"), 1.0], "sum nan"),
        ([0.0, 0.0], "sum 0"),
    ],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_marginal_that_is_no_probability_vector_is_refused_by_its_side(masses, message, side):
    masses, half = torch.tensor(masses), torch.tensor([0.5, 0.5])
    pair = (masses, half) if side == "source" else (half, masses)
    with pytest.raises(TransportError, match=f"The {side} marginal is no probability vector: {message}"):
        solve_transport("emd", torch.ones(2, 2), *pair)


def test_a_marginal_that_sums_to_one_but_for_rounding_is_rescaled():
    masses = torch.tensor([0.5, 0.5 + 4e-7], dtype=torch.float64)
    with untouched(masses):
        assert abs(float(check_marginal(masses, "source").sum()) - 1) < 1e-15


def test_an_unknown_solver_suggests_the_nearest():
    with pytest.raises(RegistryError, match="Unknown solver 'sinkhron'. Did you mean 'sinkhorn'"):
        solve_transport("sinkhron", *problem(0))
