"""Entropic transport: potentials in the log domain, the regularization lowered in steps, on any device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.duality import reduced_costs

_STEP = 0.25  # by which the regularization is lowered
_STEP_ITERATIONS = 20  # before it is lowered again
_CHECK_EVERY = 10
_SMALL = 2**22  # entries up to which the kernel is held in float64
_DOUBLE_ERROR, _SINGLE_ERROR = 1e-9, 1e-6  # of the mass; where scaling stops, by the precision of the kernel
_LARGEST_LOG = 20.0  # of a scaling factor, before it is absorbed into the potentials


class Entropic(NamedTuple):
    """An entropic plan.

    Attributes:
        matrix: `(n, m)` float64; meets the source marginal, and the target marginal but for `error`.
        target_potential: `(m,)` float64; gives a lower bound on the cost of any plan (`duality.lower_bound`).
        error: Σ |column sum − target mass|, as a share of the mass.
        converged: Whether the error is as small as the precision of the kernel allows.
    """

    matrix: Tensor
    target_potential: Tensor
    error: float
    converged: bool


def entropic_plan(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, epsilon: float, iterations: int
) -> Entropic:
    """Return the plan that minimizes `Σ P C + epsilon Σ P (ln P − 1)`.

    Potentials are float64. Between two of them, scaling factors act on the kernel `exp((u + v − C) / epsilon)`, which
    is held in float64 for small problems and in float32 for large ones (Schmitzer, 2019, "Stabilized sparse scaling
    algorithms"); the plan is made from the potentials in float64.

    Args:
        cost_matrix: `(n, m)`, float32 or float64, on any device.
        source_marginal: `(n,)` float64, on the same device.
        target_marginal: `(m,)`.
        epsilon: In units of the cost, positive.
        iterations: At most so many at the final regularization.
    """
    rows, columns = source_marginal.nonzero()[:, 0], target_marginal.nonzero()[:, 0]
    if len(rows) < len(source_marginal) or len(columns) < len(target_marginal):
        part = entropic_plan(
            cost_matrix[rows][:, columns], source_marginal[rows], target_marginal[columns], epsilon, iterations
        )
        matrix = part.matrix.new_zeros(cost_matrix.shape)
        matrix[rows[:, None], columns] = part.matrix
        potential = torch.full_like(target_marginal, part.target_potential.min().item())
        return part._replace(matrix=matrix, target_potential=potential.index_copy_(0, columns, part.target_potential))
    scaling = _Scaling(cost_matrix, source_marginal, target_marginal)
    for level in scaling.levels(epsilon):
        scaling.run(level, iterations if level == epsilon else _STEP_ITERATIONS)
    return scaling.plan(epsilon)


class _Scaling:
    """Sinkhorn's iteration on a kernel that is made anew whenever its factors leave the range of its precision."""

    def __init__(self, cost: Tensor, source: Tensor, target: Tensor) -> None:
        self.cost, self.source, self.target = cost, source, target
        self.potential = torch.zeros_like(target)
        small = cost.numel() <= _SMALL
        self.dtype, self.error = (torch.float64, _DOUBLE_ERROR) if small else (torch.float32, _SINGLE_ERROR)
        self.kernel = torch.empty(0)

    def levels(self, epsilon: float) -> list[float]:
        """Regularizations from the spread of the costs down to `epsilon`."""
        least, largest = (float(end) for end in self.cost.aminmax())
        steps = math.ceil(math.log(max((largest - least) / epsilon, 1)) / -math.log(_STEP))
        return [epsilon / _STEP**step for step in range(max(steps - 1, 0), -1, -1)]

    def run(self, epsilon: float, iterations: int) -> None:
        """Scale until the marginals are met, or so many times."""
        self._make_kernel(epsilon, torch.empty(self.cost.shape, dtype=self.dtype, device=self.cost.device))
        a, b = self.source.to(self.dtype), self.target.to(self.dtype)
        tiny = torch.finfo(self.dtype).tiny
        x, y = torch.ones_like(a), torch.ones_like(b)
        for count in range(1, iterations + 1):
            sums = self.kernel.T @ x
            if count % _CHECK_EVERY == 0 and float((y * sums - b).abs().sum()) <= self.error:
                break
            y = b / sums.clamp_min(tiny)
            x = a / (self.kernel @ y).clamp_min(tiny)
            if count % _CHECK_EVERY == 0 or count == 1:
                largest = max(float(factor.log().abs().max()) for factor in (x, y))
                if largest > _LARGEST_LOG:
                    self.potential += epsilon * y.double().log()
                    self._make_kernel(epsilon, self.kernel)
                    x, y = torch.ones_like(a), torch.ones_like(b)
        self.potential += epsilon * y.double().log()

    def _make_kernel(self, epsilon: float, out: Tensor) -> Tensor:
        """Fill `out` with the plan of the potentials; every row sums to its mass. Returns the sums of its columns."""
        sums = torch.zeros_like(self.target)
        for block, part in reduced_costs(self.cost, self.potential):
            part.sub_(part.amin(dim=1, keepdim=True)).mul_(-1 / epsilon).exp_()
            part.mul_((self.source[block] / part.sum(dim=1))[:, None])
            sums += part.sum(dim=0)
            out[block] = part
        self.kernel = out
        return sums

    def plan(self, epsilon: float) -> Entropic:
        """The plan of the potentials."""
        self.kernel = torch.empty(0)
        matrix = torch.empty(self.cost.shape, dtype=torch.float64, device=self.cost.device)
        error = float((self._make_kernel(epsilon, matrix) - self.target).abs().sum())
        return Entropic(matrix, self.potential, error, error <= 2 * self.error)
