"""The only door to POT: its network simplex on dense and sparse costs, partial and unbalanced transport."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimum_otprune.errors import TransportError

_Array = TypeVar("_Array", NDArray[np.float64], Tensor)


class SparsePlan(NamedTuple):
    """A plan that the network simplex found, entry by entry, and the potentials that prove it.

    Attributes:
        rows: The source of each entry, LongTensor `(k,)`.
        columns: The target of each entry, LongTensor `(k,)`.
        masses: The mass that each entry moves, `(k,)`.
        source_potential: The potential of each source, `(n,)`.
        target_potential: The potential of each target, `(m,)`; plus the source's, it is nowhere above the cost of an
            arc that was given.
    """

    rows: Tensor
    columns: Tensor
    masses: Tensor
    source_potential: Tensor
    target_potential: Tensor


def network_simplex(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, iterations: int) -> Tensor:
    """Return the cheapest plan `(n, m)`; all arguments float64 on the CPU.

    Raises:
        TransportError: If the network simplex gives up.
    """
    plan, _ = _emd(source_marginal.numpy(), target_marginal.numpy(), cost_matrix.contiguous().numpy(), iterations)
    return torch.from_numpy(plan)


def sparse_network_simplex(
    rows: Tensor,
    columns: Tensor,
    costs: Tensor,
    source_marginal: Tensor,
    target_marginal: Tensor,
    iterations: int,
) -> SparsePlan:
    """Return the cheapest plan that uses only some arcs.

    Args:
        rows: The source of each arc, LongTensor `(k,)`; arcs are sorted by row, then column, and none is given twice.
        columns: The target of each arc, LongTensor `(k,)`.
        costs: The cost of each arc, `(k,)`.
        source_marginal: The mass of each source, `(n,)`, positive.
        target_marginal: The mass of each target, `(m,)`, positive.
        iterations: The largest number of pivots.

    Raises:
        TransportError: If the network simplex gives up, or the arcs cannot carry the mass.
    """
    shape = (len(source_marginal), len(target_marginal))
    arcs = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), costs, shape, check_invariants=False, is_coalesced=True
    )
    plan, log = _emd(source_marginal, target_marginal, arcs, iterations)
    plan = plan.coalesce()
    return SparsePlan(plan.indices()[0], plan.indices()[1], plan.values(), log["u"], log["v"])


def _emd(
    source_marginal: _Array, target_marginal: _Array, cost_matrix: _Array, iterations: int
) -> tuple[_Array, Mapping[str, _Array]]:
    """Return the plan, sparse if the cost is, and a log with the potentials `u` and `v`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result code below says the same
        plan, log = ot.emd(source_marginal, target_marginal, cost_matrix, numItermax=iterations, log=True)
    if log["warning"] is not None:
        raise TransportError(
            f"The exact solver gave up ({log['warning']}). Use solver='sinkhorn', which always ends, or prune less "
            "at once."
        )
    return plan, log


def partial_transport(
    cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, mass: float, iterations: int
) -> Tensor:
    """Return the cheapest plan `(n, m)` that moves `mass` (`ot.partial.partial_wasserstein`)."""
    a, b = source_marginal.numpy(), target_marginal.numpy()
    plan = ot.partial.partial_wasserstein(
        a, b, cost_matrix.numpy(), m=min(mass, a.sum(), b.sum()), numItermax=iterations
    )
    return torch.from_numpy(np.asarray(plan))


def unbalanced_transport(
    cost_matrix: Tensor,
    source_marginal: Tensor,
    target_marginal: Tensor,
    penalty: float,
    start: Tensor | None,
    iterations: int,
) -> Tensor:
    """Return a plan `(n, m)` that pays for missed marginals (`ot.unbalanced.mm_unbalanced`), going on from `start`."""
    plan = ot.unbalanced.mm_unbalanced(
        source_marginal.numpy(),
        target_marginal.numpy(),
        cost_matrix.numpy(),
        reg_m=penalty,
        G0=None if start is None else start.numpy(),
        numItermax=iterations,
    )
    return torch.from_numpy(plan)
