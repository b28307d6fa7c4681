"""Transport solvers: from a cost and two marginals to a plan that says whether to trust it."""

from collections.abc import Callable

import torch
from torch import Tensor

from optimum_otprune.errors import ShapeError, TransportError
from optimum_otprune.functional.references import (
    NETWORK_SIMPLEX,
    PARTIAL_TRANSPORT,
    SINKHORN,
    UNBALANCED_TRANSPORT,
)
from optimum_otprune.functional.registry import Entry, Registry
from optimum_otprune.functional.transport.exact import exact_plan
from optimum_otprune.functional.transport.plans import (
    Solved,
    SolverSettings,
    TransportPlan,
    check_marginal,
    checked_plan,
    median_cost,
    round_to_marginals,
)
from optimum_otprune.functional.transport.pot import partial_transport, unbalanced_transport
from optimum_otprune.functional.transport.sinkhorn import entropic_plan

__all__ = ["Solved", "Solver", "SolverSettings", "TransportPlan", "solve_transport", "solvers"]

_MAX_ITERATIONS = 1_000_000
_UNBALANCED_ITERATIONS, _UNBALANCED_ERROR = 2_000, 1e-4

Solver = Callable[[Tensor, Tensor, Tensor, SolverSettings], Tensor | Solved]

solvers: Registry[Solver] = Registry("solver")
"""Functions `(cost_matrix, source_marginal, target_marginal, settings) -> matrix` by name.

All tensors are float64 on the CPU: `(n, m)`, `(n,)` and `(m,)`; both marginals sum to 1. The plan is `(n, m)`, dense
or a sparse tensor; a solver that can stop early returns `Solved`. A solver registered with `takes_any=True`, or a
function with that attribute, gets the cost as it is, float32 or float64 on its device, with marginals in float64
beside it. Plans must meet both marginals, unless `meets` says otherwise.
"""


@solvers.register("nearest", reads=(), meets=(True, False))
def nearest(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Send every channel whole to its cheapest kept channel; kept channels have no capacity (semi-relaxed)."""
    del target_marginal, settings
    plan = torch.zeros_like(cost_matrix)
    return plan.scatter_(1, cost_matrix.argmin(dim=1, keepdim=True), source_marginal[:, None])


@solvers.register("emd", reference=NETWORK_SIMPLEX, reads=("target_distribution",))
def emd(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Exact transport by the network simplex (Bonneel et al., 2011, through `ot.emd`).

    Large problems are solved on few arcs, with a proof over all of them; see `exact_transport`.
    """
    del settings
    return exact_plan(cost_matrix, source_marginal, target_marginal, _MAX_ITERATIONS)


@solvers.register("sinkhorn", reference=SINKHORN, reads=("target_distribution", "epsilon"), takes_any=True)
def sinkhorn(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings
) -> Solved:
    """Entropic transport in the log domain (Cuturi, 2013), rounded to the marginals; see `entropic_plan`.

    The rounding is that of Altschuler, Weed and Rigollet (2017), algorithm 2; it makes a plan that stopped early
    feasible, but not optimal.
    """
    epsilon = settings.epsilon * median_cost(cost_matrix)
    found = entropic_plan(cost_matrix, source_marginal, target_marginal, epsilon)
    return Solved(round_to_marginals(found.matrix, source_marginal, target_marginal), found.converged)


@solvers.register(
    "partial", reference=PARTIAL_TRANSPORT, reads=("target_distribution", "mass_share"), meets=(False, False)
)
def partial(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Exact transport of the cheapest `mass_share` of the mass (`ot.partial.partial_wasserstein`); the rest stays."""
    scaled = cost_matrix / median_cost(cost_matrix)
    return partial_transport(scaled, source_marginal, target_marginal, settings.mass_share, _MAX_ITERATIONS)


@solvers.register(
    "unbalanced",
    reference=UNBALANCED_TRANSPORT,
    reads=("target_distribution", "marginal_penalty"),
    meets=(False, False),
)
def unbalanced(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings
) -> Solved:
    """Transport that may miss its marginals at a price (`ot.unbalanced.mm_unbalanced`, Kullback–Leibler)."""
    scaled = cost_matrix / median_cost(cost_matrix)

    def iterate(times: int, start: Tensor | None) -> Tensor:
        return unbalanced_transport(scaled, source_marginal, target_marginal, settings.marginal_penalty, start, times)

    plan = iterate(_UNBALANCED_ITERATIONS, None)
    converged = bool((iterate(1, plan) - plan).norm() <= _UNBALANCED_ERROR * plan.norm())
    # A channel cannot be handed on more than once: what rows have above their mass is cut.
    rows = plan.sum(dim=1).clamp_min(torch.finfo(plan.dtype).tiny)
    return Solved(plan * (source_marginal / rows).clamp_max(1)[:, None], converged)


def solve_transport(
    name: str | Solver | Entry,
    cost_matrix: Tensor,
    source_marginal: Tensor,
    target_marginal: Tensor,
    settings: SolverSettings | None = None,
) -> TransportPlan:
    """Solve a transport problem and check the plan.

    Args:
        name: A registered name, or a function of the registry's signature.
        cost_matrix: `(n, m)`, finite.
        source_marginal: `(n,)`, non-negative, sum 1.
        target_marginal: `(m,)`, non-negative, sum 1.
        settings: Numbers for solvers that read them.

    Returns:
        The plan, float64 on the CPU.

    Raises:
        ShapeError: If cost and marginals do not fit together, or what a solver returned is no plan.
        TransportError: If cost or marginals cannot be transported, or the plan is negative, not finite, or misses a
            marginal that its solver had to meet.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> solve_transport("emd", cost, half, half).cost
        0.0
    """
    entry = solvers.entry(name)
    cost = cost_matrix.detach()
    if not entry.takes_any:
        cost = cost.to("cpu", torch.float64)
    elif cost.dtype not in (torch.float32, torch.float64):
        cost = cost.float()
    a, b = (part.detach().to(cost.device, torch.float64) for part in (source_marginal, target_marginal))
    if cost.shape != (len(a), len(b)):
        raise ShapeError(f"The cost has shape {tuple(cost.shape)}, the marginals have {len(a)} and {len(b)} entries.")
    if cost.numel() and not all(abs(float(end)) < torch.inf for end in cost.aminmax()):
        raise TransportError("The transport cost is NaN or infinite. Check the weights and activations of this layer.")
    a, b = (check_marginal(part, side) for part, side in ((a, "source"), (b, "target")))
    solved = entry.function(cost, a, b, settings or SolverSettings())
    plan = checked_plan(_as_solved(solved, entry.name, cost), cost, (a, b), entry.name, entry.meets)
    return plan._replace(matrix=plan.matrix.to("cpu", torch.float64))


def _as_solved(found: object, name: str, cost: Tensor) -> Solved:
    """What a solver returned, its plan dense or of coordinates, where the cost is."""
    matrix, converged = found if isinstance(found, Solved) else (found, True)
    kinds = (torch.strided, torch.sparse_coo)
    if not isinstance(matrix, Tensor) or matrix.layout not in kinds or matrix.is_complex():
        raise ShapeError(
            f"The solver {name!r} returned a {type(matrix).__name__} that is no plan; want a tensor of shape "
            f"{tuple(cost.shape)}, dense or sparse_coo, of real numbers, or a `Solved` with one."
        )
    return Solved(matrix.detach().to(cost.device), bool(converged))
