"""Potentials of a transport problem: reduced costs, lower bounds on the cost of any plan; in blocks of rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**19  # entries of a block, so that what is computed of it stays small


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
    """Return what no plan between the marginals can cost less than: the dual value of a target potential.

    `Σ a_j min_k (C_jk − v_k) + Σ b_k v_k`, which is the least cost itself for the best potential `v`.

    Args:
        cost_matrix: `(n, m)`.
        source_marginal: `(n,)`.
        target_marginal: `(m,)`.
        potential: `(m,)`, any; float64 for a bound that can be trusted to the last digits.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> lower_bound(cost, half, half, torch.tensor([0.0, 1.0], dtype=torch.float64))
        0.5
    """
    return float(source_marginal @ c_transform(cost_matrix, potential) + target_marginal @ potential)
