"""Entropic transport: potentials in the log domain, the regularization lowered in steps, on any device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.transport.duality import reduced_costs

# Iterations were counted on the costs and marginals of pruning of benchmarks/transport.py, with 1,024 channels.
_STEP = 0.5  # factor by which the regularization is lowered: 0.7 takes half as many again, with 0.25 two of six fail
_FIRST = 0.1  # of the spread of the costs; about the first regularization. From 0.03 to 1 it makes no difference
_SMALL = 2**22  # entries up to which the kernel is held in float64 (32 MB)
_CHECK_EVERY = 10  # iterations between two measurements of the rate of convergence: 6 take an eighth more, 20 as many
# Of the logarithm of a scaling factor, before it is absorbed into the potentials: e²⁰ = 5e8, so that no product of two
# factors and the kernel leaves the range of float32 (3e38) before the next check.
_LARGEST_LOG = 20.0
_LARGEST_RELAXATION = 1.95  # below 2, where it diverges: 1.8 takes a quarter more, and with 1 all six fail
# The best power multiplies errors by itself less 1. It is raised if the measured rate is more than 0.02 above that,
# that is, above the power less 0.98: any number from 0.9 to 0.99 takes the same iterations within 2 %, while without
# raising one problem of six converges.
_BEST_RATE = 0.98
_CONVERGED = 2e-6  # of the mass; so little may be left to rounding, since it is twice what float32 scaling stops at


class _Effort(NamedTuple):
    """When scaling stops.

    Attributes:
        dtype: The dtype of the kernel and the factors.
        error: The error Σ |column sum − target mass| at which scaling stops.
        iterations: The largest number of iterations with the last regularization.
        step_iterations: The largest number of iterations with each earlier one, of which only a start is wanted.
    """

    dtype: torch.dtype
    error: float
    iterations: int
    step_iterations: int


# A small problem can wait for more iterations; a large one stops at what float32 can reach, and is rounded after that.
_THOROUGH = _Effort(torch.float64, 1e-9, 2_000, 500)
_FAST = _Effort(torch.float32, 1e-6, 100, 60)


class Entropic(NamedTuple):
    """An entropic plan.

    Attributes:
        matrix: The plan, `(n, m)` float64, which meets the source marginal, and the target marginal up to `error`.
        target_potential: The potential of each target, `(m,)` float64, which gives a lower bound on the cost of any
            plan (`duality.lower_bound`).
        error: The sum Σ |column sum − target mass|, as a share of the mass.
        converged: Whether `error` is so small (2e-6) that rounding the plan to its marginals changes next to nothing.
    """

    matrix: Tensor
    target_potential: Tensor
    error: float
    converged: bool


def entropic_plan(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, epsilon: float) -> Entropic:
    """Return the plan that minimizes `Σ P C + epsilon Σ P (ln P − 1)`.

    Potentials are float64. Between two of them, scaling factors act on the kernel `exp((u + v − C) / epsilon)`, which
    is held in float64 for small problems and in float32 for large ones (Schmitzer, 2019, "Stabilized sparse scaling
    algorithms"). Factors are over-relaxed as far as the rate of convergence suggests (Thibault et al., 2021,
    "Overrelaxed Sinkhorn–Knopp algorithm"). The plan is made from the potentials in float64.

    Args:
        cost_matrix: The cost of each source and target, `(n, m)`, float32 or float64, on any device.
        source_marginal: The mass of each source, `(n,)` float64, on the same device.
        target_marginal: The mass of each target, `(m,)` float64, on the same device.
        epsilon: The regularization in units of the cost, positive.
    """
    rows, columns = source_marginal.nonzero()[:, 0], target_marginal.nonzero()[:, 0]
    if len(rows) < len(source_marginal) or len(columns) < len(target_marginal):
        part = entropic_plan(cost_matrix[rows][:, columns], source_marginal[rows], target_marginal[columns], epsilon)
        matrix = part.matrix.new_zeros(cost_matrix.shape)
        matrix[rows[:, None], columns] = part.matrix
        potential = torch.full_like(target_marginal, part.target_potential.min().item())
        return part._replace(matrix=matrix, target_potential=potential.index_copy_(0, columns, part.target_potential))
    scaling = _Scaling(cost_matrix, source_marginal, target_marginal)
    for level in scaling.levels(epsilon):
        scaling.run(level, last=level == epsilon)
    return scaling.plan(epsilon)


class _Scaling:
    """Sinkhorn's iteration on a kernel, which is recomputed whenever the factors leave the range of its precision."""

    def __init__(self, cost: Tensor, source: Tensor, target: Tensor) -> None:
        self.cost, self.source, self.target = cost, source, target
        self.potential = torch.zeros_like(target)
        self.effort = _THOROUGH if cost.numel() <= _SMALL else _FAST
        self.kernel = torch.empty(0)

    def levels(self, epsilon: float) -> list[float]:
        """Return the regularizations to solve with in turn, from about the spread of the costs down to `epsilon`."""
        least, largest = (float(end) for end in self.cost.aminmax())
        steps = math.ceil(math.log(max(_FIRST * (largest - least) / epsilon, 1)) / -math.log(_STEP))
        return [epsilon / _STEP**step for step in range(steps, -1, -1)]

    def run(self, epsilon: float, last: bool) -> None:
        """Scale until the target marginal is met, or until the iterations of this effort are used up."""
        dtype = self.effort.dtype
        self._make_kernel(epsilon, torch.empty(self.cost.shape, dtype=dtype, device=self.cost.device))
        a, b, tiny = self.source.to(dtype), self.target.to(dtype), torch.finfo(dtype).tiny
        x, y = torch.ones_like(a), torch.ones_like(b)
        relaxation = _Relaxation()
        for count in range(self.effort.iterations if last else self.effort.step_iterations):
            sums = self.kernel.T @ x
            error = float((y * sums - b).abs().sum())
            if error <= self.effort.error:
                break
            power = relaxation.after(error)
            y = y * (b / sums.clamp_min(tiny) / y) ** power
            x = x * (a / (self.kernel @ y).clamp_min(tiny) / x) ** power
            if count % _CHECK_EVERY == 0 and max(float(part.log().abs().max()) for part in (x, y)) > _LARGEST_LOG:
                self.potential += epsilon * y.double().log()
                self._make_kernel(epsilon, self.kernel)
                x, y = torch.ones_like(a), torch.ones_like(b)
        self.potential += epsilon * y.double().log()

    def _make_kernel(self, epsilon: float, out: Tensor) -> Tensor:
        """Fill `out` with the plan of the potentials, whose rows have their masses; return the sums of its columns."""
        sums = torch.zeros_like(self.target)
        for block, part in reduced_costs(self.cost, self.potential):
            rows = out[block].copy_(part.sub_(part.amin(dim=1, keepdim=True)).mul_(-1 / epsilon)).exp_()
            rows.mul_((self.source[block] / rows.sum(dim=1))[:, None])
            sums += rows.sum(dim=0)
        self.kernel = out
        return sums

    def plan(self, epsilon: float) -> Entropic:
        """Return the plan of the potentials in float64."""
        self.kernel = torch.empty(0)
        matrix = torch.empty(self.cost.shape, dtype=torch.float64, device=self.cost.device)
        error = float((self._make_kernel(epsilon, matrix) - self.target).abs().sum())
        return Entropic(matrix, self.potential, error, error <= _CONVERGED)


class _Relaxation:
    """The power to which the next factors are raised, between 1 (plain scaling) and 2.

    Where plain scaling multiplies the error by ρ in each iteration, the best power is `2 / (1 + √(1 − ρ))`, which
    multiplies it by that power less 1. The power is raised while errors shrink more slowly, and halved towards 1 where
    they grow.
    """

    def __init__(self) -> None:
        self.power = 1.0
        self.errors: list[float] = []

    def after(self, error: float) -> float:
        """Return the power for the next iteration, given the error of this one."""
        self.errors.append(error)
        if len(self.errors) % _CHECK_EVERY == 0:
            before = self.errors[:-_CHECK_EVERY]
            rate = (error / self.errors[-1 - _CHECK_EVERY // 2]) ** (2 / _CHECK_EVERY)
            if before and error > 2 * min(before):
                self.power = 1 + (self.power - 1) / 2
            elif self.power == 1.0 and rate < 1:
                self.power = min(2 / (1 + math.sqrt(1 - rate)), _LARGEST_RELAXATION)
            elif self.power - _BEST_RATE < rate < 1:
                self.power = 1 + (self.power - 1 + _LARGEST_RELAXATION - 1) / 2
        return self.power
