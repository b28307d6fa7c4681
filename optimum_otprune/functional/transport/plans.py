"""Transport plans: what solvers return, rounding to the marginals, and the check before anything is done with one."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import TransportError
from optimum_otprune.functional.transport.duality import row_blocks

_MARGINAL_TOLERANCE = 1e-6  # of the total mass: what summing many float32 masses may lose
_SMALL = 2**22  # entries of a cost up to which a float64 copy (32 MB) does not matter


class SolverSettings(NamedTuple):
    """Numbers that some solvers read, in units of the median cost, so that scaling a layer changes nothing.

    Attributes:
        epsilon: The entropic regularization. On costs of pruning a plan costs 2–6 % more than the exact one at 0.05,
            and at most 0.1 % more at 0.0005.
        mass_share: The share of the mass that the solver `partial` moves.
        marginal_penalty: The price that the solver `unbalanced` pays for mass that misses a marginal.
    """

    epsilon: float = 0.05
    mass_share: float = 0.9
    marginal_penalty: float = 1.0


class TransportPlan(NamedTuple):
    """A transport plan and whether to trust it.

    Attributes:
        matrix: The plan, `(intermediate_size, kept_size)` float64, non-negative; entry (j, k) is the mass that channel
            j sends to kept channel k.
        cost: The plan's cost, Σ plan · cost.
        converged: Whether the solver reached its own stopping criterion.
        marginal_error: The largest difference to a marginal that the solver had to meet, as a share of the mass.
    """

    matrix: Tensor
    cost: float
    converged: bool
    marginal_error: float


class Solved(NamedTuple):
    """What a solver returns when it can stop early.

    Attributes:
        matrix: The plan, `(n, m)`.
        converged: Whether the solver's stopping criterion was reached.
    """

    matrix: Tensor
    converged: bool


def median_cost(cost_matrix: Tensor) -> float:
    """Return the median of the positive costs, of a large matrix in float32; 1 if all are zero."""
    dtype = cost_matrix.dtype if cost_matrix.numel() <= _SMALL else torch.float32
    positive = torch.empty(cost_matrix.numel(), dtype=dtype, device=cost_matrix.device)
    count = 0
    for block in row_blocks(*cost_matrix.shape):
        found = cost_matrix[block].masked_select(cost_matrix[block] > 0)
        positive[count : count + len(found)] = found
        count += len(found)
    return float(positive[:count].median()) if count else 1.0


def check_marginal(marginal: Tensor, side: str) -> Tensor:
    """Return the marginal rescaled to sum exactly 1.

    Raises:
        TransportError: If it is negative, not finite, or does not sum to 1 within 1e-6.
    """
    are_masses = torch.isfinite(marginal).all() and (marginal >= 0).all()
    if not are_masses or abs(float(marginal.sum()) - 1) > _MARGINAL_TOLERANCE:
        raise TransportError(
            f"The {side} marginal is no probability vector: sum {float(marginal.sum()):.6g}, least entry "
            f"{float(marginal.min()):.3g}. Masses must be finite, non-negative and sum to 1."
        )
    return marginal / marginal.sum()


def checked_plan(
    solved: Solved, cost: Tensor, marginals: tuple[Tensor, Tensor], name: str, meets: tuple[bool, bool]
) -> TransportPlan:
    """Return the plan, dense, if it can be used.

    Args:
        solved: What the solver returned, with a plan `(n, m)` that is dense or sparse.
        cost: The cost matrix, `(n, m)`.
        marginals: The source marginal `(n,)` and the target marginal `(m,)`.
        name: The solver's name, for messages.
        meets: For either marginal, whether the solver had to meet it.

    Raises:
        TransportError: If the plan is negative, not finite, moves nothing, or misses a marginal that it had to meet.
    """
    plan = solved.matrix.coalesce() if solved.matrix.is_sparse else solved.matrix
    masses = plan.values() if plan.is_sparse else plan
    least, largest = (float(end) for end in masses.aminmax()) if masses.numel() else (0.0, 0.0)
    finite = least > -torch.inf and largest < torch.inf  # NaN is neither
    if plan.shape != cost.shape or not finite or least < -_MARGINAL_TOLERANCE:
        raise TransportError(
            f"The solver {name!r} returned no usable plan (wrong shape, NaN or negative mass). Use solver='emd', or "
            "raise `epsilon` if an entropic solver underflowed."
        )
    if least < 0:
        plan = plan.to_dense().clamp_min(0)
    sums = (torch.sum(plan, dim=1), torch.sum(plan, dim=0))
    error = 0.0
    for met, marginal, found, side in zip(meets, marginals, sums, ("source", "target")):
        if not met:
            continue
        error = max(error, float((found.to_dense() - marginal).abs().max()))
        if error > _MARGINAL_TOLERANCE:
            raise TransportError(
                f"The plan of solver {name!r} misses its {side} marginal by {error:.3g}. Use solver='emd', or raise "
                "`epsilon` if an entropic solver underflowed."
            )
    if float(sums[0].to_dense().sum()) <= 0:
        raise TransportError(f"The solver {name!r} moved no mass at all. Use solver='emd'.")
    return TransportPlan(plan.to_dense(), plan_cost(plan, cost), solved.converged, error)


def plan_cost(plan: Tensor, cost: Tensor) -> float:
    """Return Σ plan · cost, of a dense or sparse plan, in float64."""
    if plan.is_sparse:
        plan = plan.coalesce()
        return float(plan.values().double() @ cost[tuple(plan.indices())].double())
    blocks = row_blocks(*plan.shape)
    return sum(float(torch.sum(plan[block].double() * cost[block].double())) for block in blocks)


def round_to_marginals(plan: Tensor, source_marginal: Tensor, target_marginal: Tensor) -> Tensor:
    """Return a plan that meets both marginals, by Altschuler, Weed and Rigollet (2017), algorithm 2; in place."""
    tiny = torch.finfo(plan.dtype).tiny
    plan *= (source_marginal / plan.sum(dim=1).clamp_min(tiny)).clamp_max(1)[:, None]
    plan *= (target_marginal / plan.sum(dim=0).clamp_min(tiny)).clamp_max(1)
    rows, columns = source_marginal - plan.sum(dim=1), target_marginal - plan.sum(dim=0)
    missing = rows.sum()
    if missing <= 0:
        return plan
    return plan.addr_(rows.clamp_min(0), columns.clamp_min(0) / missing)
