"""Transport solvers: from a cost and two marginals to a plan that says whether to trust it. The only door to POT."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ot
import torch
from torch import Tensor

from optimum_otprune.errors import ShapeError, TransportError
from optimum_otprune.registry import Registry

_MARGINAL_TOLERANCE = 1e-6  # of the total mass
_MAX_ITERATIONS = 1_000_000
_SINKHORN_ITERATIONS, _SINKHORN_ERROR = 2_000, 1e-9
_UNBALANCED_ITERATIONS, _UNBALANCED_ERROR = 2_000, 1e-4


class SolverSettings(NamedTuple):
    """Numbers that some solvers read; in units of the median cost, so that scaling a layer changes nothing.

    Attributes:
        epsilon: Entropic regularization.
        mass_share: Share of the mass that `partial` moves.
        marginal_penalty: What `unbalanced` pays for a marginal that is not met.
    """

    epsilon: float = 0.05
    mass_share: float = 0.9
    marginal_penalty: float = 1.0


class TransportPlan(NamedTuple):
    """A transport plan and whether to trust it.

    Attributes:
        matrix: `(intermediate_size, kept_size)` float64, non-negative; entry (j, k) is the mass that channel j sends
            to kept channel k.
        cost: Σ plan · cost.
        converged: Whether the solver reached its own stopping criterion.
        marginal_error: Largest difference to a marginal that the solver had to meet, as a share of the mass.
    """

    matrix: Tensor
    cost: float
    converged: bool
    marginal_error: float


class Solved(NamedTuple):
    """What a solver returns when it can stop early.

    Attributes:
        matrix: `(n, m)`.
        converged: Whether its stopping criterion was reached.
    """

    matrix: Tensor
    converged: bool


Solver = Callable[[Tensor, Tensor, Tensor, SolverSettings], Tensor | Solved]

solvers: Registry[Solver] = Registry("solver")
"""Functions `(cost_matrix, source_marginal, target_marginal, settings) -> matrix` by name.

All tensors are float64 on the CPU: `(n, m)`, `(n,)` and `(m,)`; both marginals sum to 1. The plan is `(n, m)`; a
solver that can stop early returns `Solved`.
"""

# Which marginals each solver has to meet; solvers of one's own must meet both unless they carry `meets`.
_MEETS = {"nearest": (True, False), "partial": (False, False), "unbalanced": (False, False)}


@solvers.register("nearest")
def nearest(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Send every channel whole to its cheapest kept channel; kept channels have no capacity (semi-relaxed)."""
    del target_marginal, settings
    plan = torch.zeros_like(cost_matrix)
    return plan.scatter_(1, cost_matrix.argmin(dim=1, keepdim=True), source_marginal[:, None])


@solvers.register("emd", reference="https://doi.org/10.1145/2070781.2024192")
def emd(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Exact transport by the network simplex (Bonneel et al., 2011, through `ot.emd`)."""
    del settings
    arrays = [np.ascontiguousarray(part.numpy()) for part in (source_marginal, target_marginal, cost_matrix)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result code below says the same
        plan, log = ot.emd(*arrays, numItermax=_MAX_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise TransportError(
            f"The exact solver gave up ({log['warning']}). Use solver='sinkhorn', which always ends, or prune less "
            "at once."
        )
    return torch.from_numpy(plan)


@solvers.register("sinkhorn", reference="https://arxiv.org/abs/1306.0895")
def sinkhorn(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings
) -> Solved:
    """Entropic transport in the log domain (Cuturi, 2013, through `ot.sinkhorn`), rounded to the marginals.

    The rounding is that of Altschuler, Weed and Rigollet (2017), algorithm 2; it makes a plan that stopped early
    feasible, but not optimal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, or overflow in a factor that is not used: `log` says so
        plan, log = ot.sinkhorn(
            source_marginal,
            target_marginal,
            cost_matrix,
            reg=settings.epsilon * _median(cost_matrix),
            method="sinkhorn_log",
            numItermax=_SINKHORN_ITERATIONS,
            stopThr=_SINKHORN_ERROR,
            log=True,
        )
    converged = float(log["err"][-1]) <= _SINKHORN_ERROR
    return Solved(_round_to_marginals(plan, source_marginal, target_marginal), converged)


def _round_to_marginals(plan: Tensor, source_marginal: Tensor, target_marginal: Tensor) -> Tensor:
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (source_marginal / plan.sum(dim=1).clamp_min(tiny)).clamp_max(1)[:, None]
    plan = plan * (target_marginal / plan.sum(dim=0).clamp_min(tiny)).clamp_max(1)
    rows, columns = source_marginal - plan.sum(dim=1), target_marginal - plan.sum(dim=0)
    missing = rows.sum()
    if missing <= 0:
        return plan
    return plan + torch.outer(rows.clamp_min(0), columns.clamp_min(0)) / missing


@solvers.register("partial", reference="https://arxiv.org/abs/2002.08276")
def partial(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings) -> Tensor:
    """Exact transport of the cheapest `mass_share` of the mass (`ot.partial.partial_wasserstein`); the rest stays."""
    a, b = source_marginal.numpy(), target_marginal.numpy()
    plan = ot.partial.partial_wasserstein(
        a,
        b,
        cost_matrix.numpy() / _median(cost_matrix),
        m=min(settings.mass_share, a.sum(), b.sum()),
        numItermax=_MAX_ITERATIONS,
    )
    return torch.from_numpy(np.asarray(plan))


@solvers.register("unbalanced", reference="https://arxiv.org/abs/1607.05816")
def unbalanced(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings
) -> Solved:
    """Transport that may miss its marginals at a price (`ot.unbalanced.mm_unbalanced`, Kullback–Leibler)."""

    def iterate(times: int, start: np.ndarray | None) -> np.ndarray:
        return ot.unbalanced.mm_unbalanced(
            source_marginal.numpy(),
            target_marginal.numpy(),
            cost_matrix.numpy() / _median(cost_matrix),
            reg_m=settings.marginal_penalty,
            G0=start,
            numItermax=times,
        )

    solved = iterate(_UNBALANCED_ITERATIONS, None)
    converged = bool(np.linalg.norm(iterate(1, solved) - solved) <= _UNBALANCED_ERROR * np.linalg.norm(solved))
    # A channel cannot be handed on more than once: what rows have above their mass is cut.
    plan = torch.from_numpy(solved)
    rows = plan.sum(dim=1).clamp_min(torch.finfo(plan.dtype).tiny)
    return Solved(plan * (source_marginal / rows).clamp_max(1)[:, None], converged)


def _median(cost_matrix: Tensor) -> float:
    """Median of the positive costs; 1 if all are zero."""
    positive = cost_matrix[cost_matrix > 0]
    return float(positive.median()) if len(positive) else 1.0


def solve_transport(
    name: str | Solver,
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
        ShapeError: If cost and marginals do not fit together.
        TransportError: If cost or marginals cannot be transported, or the plan is negative, not finite, or misses a
            marginal that its solver had to meet.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> solve_transport("emd", cost, half, half).cost
        0.0
    """
    entry = solvers.entry(name)
    cost, a, b = (part.detach().to("cpu", torch.float64) for part in (cost_matrix, source_marginal, target_marginal))
    if cost.shape != (len(a), len(b)):
        raise ShapeError(f"The cost has shape {tuple(cost.shape)}, the marginals have {len(a)} and {len(b)} entries.")
    if not torch.isfinite(cost).all():
        raise TransportError("The transport cost is NaN or infinite. Check the weights and activations of this layer.")
    a, b = (check_marginal(part, side) for part, side in ((a, "source"), (b, "target")))
    solved = entry.function(cost, a, b, settings or SolverSettings())
    meets = getattr(entry.function, "meets", _MEETS.get(entry.name, (True, True)))
    return _checked(Solved(solved, True) if isinstance(solved, Tensor) else solved, cost, a, b, entry.name, meets)


def check_marginal(marginal: Tensor, side: str) -> Tensor:
    """Return the marginal rescaled to sum exactly 1.

    Raises:
        TransportError: If it is negative, not finite, or does not sum to 1 within 1e-6.
    """
    if (
        not torch.isfinite(marginal).all()
        or (marginal < 0).any()
        or abs(float(marginal.sum()) - 1) > _MARGINAL_TOLERANCE
    ):
        raise TransportError(
            f"The {side} marginal is no probability vector: sum {float(marginal.sum()):.6g}, least entry "
            f"{float(marginal.min()):.3g}. Masses must be finite, non-negative and sum to 1."
        )
    return marginal / marginal.sum()


def _checked(solved: Solved, cost: Tensor, a: Tensor, b: Tensor, name: str, meets: tuple[bool, bool]) -> TransportPlan:
    plan = solved.matrix
    if plan.shape != cost.shape or not torch.isfinite(plan).all() or (plan < -_MARGINAL_TOLERANCE).any():
        raise TransportError(
            f"The solver {name!r} returned no usable plan (wrong shape, NaN or negative mass). Use solver='emd', or "
            "raise `epsilon` if an entropic solver underflowed."
        )
    plan = plan.clamp_min(0)
    error = 0.0
    for met, marginal, dim, side in ((meets[0], a, 1, "source"), (meets[1], b, 0, "target")):
        if not met:
            continue
        error = max(error, float((plan.sum(dim=dim) - marginal).abs().max()))
        if error > _MARGINAL_TOLERANCE:
            raise TransportError(
                f"The plan of solver {name!r} misses its {side} marginal by {error:.3g}. Use solver='emd', or raise "
                "`epsilon` if an entropic solver underflowed."
            )
    if float(plan.sum()) <= 0:
        raise TransportError(f"The solver {name!r} moved no mass at all. Use solver='emd'.")
    return TransportPlan(plan, float((plan * cost).sum()), solved.converged, error)
