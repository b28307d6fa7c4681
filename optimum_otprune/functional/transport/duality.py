"""Potentials of a transport problem: reduced costs, lower bounds on the cost of any plan; in blocks of rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**19  # entries of a block: 4 MB in float64, about what a processor's cache holds


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of about `BLOCK` entries that cover all rows."""
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def reduced_costs(cost_matrix: Tensor, target_potential: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of `C_jk − v_k`, in the dtype of the potential; each is overwritten by the next."""
    n, m = cost_matrix.shape
    buffer = target_potential.new_empty(0)
    for block in row_blocks(n, m):
        part = cost_matrix[block].to(target_potential.dtype)
        if buffer.shape != part.shape:
            buffer = torch.empty_like(part)
        yield block, torch.sub(part, target_potential, out=buffer)


def c_transform(cost_matrix: Tensor, target_potential: Tensor) -> Tensor:
    """Return the largest source potential `(n,)` that a target potential allows: `u_j = min_k C_jk − v_k`."""
    return torch.cat([part.amin(dim=1) for _, part in reduced_costs(cost_matrix, target_potential)])


def lower_bound(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, potential: Tensor) -> float:
    """Return a lower bound on the cost of every plan between the marginals: the dual value of a target potential.

    The bound is `Σ a_j min_k (C_jk − v_k) + Σ b_k v_k`; for the best potential `v` it is the least cost itself.

    Args:
        cost_matrix: The cost of each source and target, `(n, m)`.
        source_marginal: The mass of each source, `(n,)`.
        target_marginal: The mass of each target, `(m,)`.
        potential: Any target potential, `(m,)`; float64 for a bound that can be trusted to the last digits.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> lower_bound(cost, half, half, torch.tensor([0.0, 1.0], dtype=torch.float64))
        0.5
    """
    return float(source_marginal @ c_transform(cost_matrix, potential) + target_marginal @ potential)
