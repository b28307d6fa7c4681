"""Entropic transport comes as close to the exact cost as its regularization lets it, in float64 and in float32."""

import math

import pytest
import torch
from hypothesis import given

from optimum_otprune.functional.solvers import solve_transport
from optimum_otprune.functional.transport import sinkhorn
from optimum_otprune.functional.transport.duality import lower_bound
from optimum_otprune.functional.transport.plans import SolverSettings, median_cost
from optimum_otprune.functional.transport.sinkhorn import _Relaxation, entropic_plan
from tests.functional.helpers import law, probabilities, seeds, untouched
from tests.functional.transport.test_exact import COSTS


@pytest.fixture(params=["float64", "float32"])
def kernel(request, monkeypatch):
    """Both precisions that the kernel is held in."""
    if request.param == "float32":
        monkeypatch.setattr(sinkhorn, "_THOROUGH", sinkhorn._THOROUGH._replace(dtype=torch.float32, error=1e-6))
    return request.param


def problem(kind, seed=0, n=60, m=30):
    return COSTS[kind](seed, n, m), probabilities(seed + 1, n), probabilities(seed + 2, m)


@pytest.mark.parametrize("kind", ["weight", "weight_l2", "activation"])
@pytest.mark.parametrize("seed", range(4))
def test_a_small_regularization_costs_at_most_a_thousandth_more_than_the_exact_plan(kernel, kind, seed):
    cost, source, target = problem(kind, seed)
    exact = solve_transport("emd", cost, source, target).cost
    plan = solve_transport("sinkhorn", cost, source, target, SolverSettings(epsilon=2e-4))
    assert exact * (1 - 1e-9) <= plan.cost <= 1.001 * exact
    assert plan.marginal_error < 1e-12


@pytest.mark.parametrize("kind", ["weight", "activation", "uniform"])
def test_the_potential_bounds_the_cost_of_every_plan_from_below(kernel, kind):
    cost, source, target = problem(kind)
    exact = solve_transport("emd", cost, source, target).cost
    found = entropic_plan(cost, source, target, 5e-4 * median_cost(cost))
    bound = lower_bound(cost, source, target, found.target_potential)
    assert 0.99 * exact <= bound <= exact * (1 + 1e-9)


@law
@given(seed=seeds)
def test_a_plan_meets_its_source_marginal_and_says_by_how_much_it_misses_its_target(seed):
    cost, source, target = problem("uniform", seed, 9, 4)
    with untouched(cost, source, target):
        found = entropic_plan(cost, source, target, 0.05)
    torch.testing.assert_close(found.matrix.sum(dim=1), source, rtol=1e-12, atol=0)
    missed = float((found.matrix.sum(dim=0) - target).abs().sum())
    assert math.isclose(found.error, missed, rel_tol=1e-3, abs_tol=1e-14)
    assert found.converged
    assert found.error < 1e-8


def test_single_precision_agrees_with_double(monkeypatch):
    cost, source, target = problem("weight")
    double = entropic_plan(cost, source, target, 0.05)
    monkeypatch.setattr(sinkhorn, "_SMALL", 0)
    single = entropic_plan(cost, source, target, 0.05)
    assert single.matrix.dtype == torch.float64
    torch.testing.assert_close(single.matrix, double.matrix, rtol=1e-2, atol=1e-6)
    assert single.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_are_read_as_they_are_and_the_plan_is_float64(kernel, dtype):
    cost, source, target = problem("weight")
    found = entropic_plan(cost.to(dtype), source, target, 0.05)
    assert found.matrix.dtype == found.target_potential.dtype == torch.float64
    exact = entropic_plan(cost.to(dtype).double(), source, target, 0.05)
    torch.testing.assert_close(found.matrix, exact.matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cost_on_a_gpu_is_solved_there():
    cost, source, target = (part.cuda() for part in problem("weight"))
    assert entropic_plan(cost, source, target, 0.05).matrix.device.type == "cuda"
    on_gpu, on_cpu = (solve_transport("sinkhorn", *parts) for parts in ((cost, source, target), problem("weight")))
    assert on_gpu.matrix.device.type == "cpu"
    torch.testing.assert_close(on_gpu.matrix, on_cpu.matrix, rtol=1e-6, atol=1e-9)


def test_channels_without_mass_send_and_receive_nothing(kernel):
    cost, source, target = problem("weight")
    source[3], target[4] = 0.0, 0.0
    found = entropic_plan(cost, source / source.sum(), target / target.sum(), 0.05)
    assert (found.matrix[3] == 0).all()
    assert (found.matrix[:, 4] == 0).all()
    assert found.converged
    assert torch.isfinite(found.target_potential).all()


def test_over_relaxation_is_what_the_rate_of_convergence_suggests():
    relaxation = _Relaxation()
    powers = [relaxation.after(0.75**count) for count in range(10)]
    assert powers[:9] == [1.0] * 9
    assert math.isclose(powers[9], 2 / (1 + math.sqrt(0.25)), rel_tol=1e-9)
    assert [relaxation.after(100.0) for _ in range(10)][-1] == pytest.approx(1 + (powers[9] - 1) / 2)


def test_over_relaxation_saves_most_of_the_iterations(monkeypatch):
    cost, source, target = problem("weight")
    epsilon = 5e-3 * median_cost(cost)
    effort = sinkhorn._THOROUGH._replace(iterations=200)
    monkeypatch.setattr(sinkhorn, "_THOROUGH", effort)
    relaxed = entropic_plan(cost, source, target, epsilon).error
    monkeypatch.setattr(_Relaxation, "after", lambda self, error: 1.0)
    assert relaxed < 0.1 * entropic_plan(cost, source, target, epsilon).error
