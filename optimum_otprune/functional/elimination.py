"""Greedy elimination of channels (OBS), one at a time, in products of matrices.

With `P = G⁻¹` and `K = WᵀW`, removing channel j costs `K_jj / P_jj`, and afterwards

    P ← P − u uᵀ                    with u = P_j / √P_jj
    K ← K − u sᵀ − s uᵀ             with s = (K_j − ½ K_jj P_j / P_jj) / √P_jj

because the down projection becomes `W − w_j P_jᵀ / P_jj`. As in a blocked Cholesky factorization, both updates wait
until a block of channels is removed: only the diagonals, which decide, and the rows of removed channels stay current.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.linalg.damped import damped_inverse
from optimum_otprune.functional.linalg.symmetric import add_product, compact, row

_DAMPING = 1e-3  # of the mean diagonal of the Gram matrix
_BLOCK = 128  # channels removed between two updates; times with 32 to 256 are within 5 %, at 1,536 channels
_MOST_DEAD = 1 / 16  # share of rows of removed channels from which both matrices are compacted; hardly matters there


class Elimination(NamedTuple):
    """Channels in the order in which they were removed.

    Attributes:
        channels: The removed channels, LongTensor `(num_removed,)`.
        costs: The error that each removal added, float64 `(num_removed,)`; the cumulative sum is the removal curve.
    """

    channels: Tensor
    costs: Tensor


class _Block(NamedTuple):
    """Removals that are not yet subtracted from the two matrices.

    Attributes:
        rows: The rows of the removed channels in both matrices, LongTensor `(count,)`.
        costs: The error that each removal added, float64 `(count,)`.
        inverse: The vectors u of the removals, `(count, size)`.
        products: The vectors s of the removals, `(count, size)`.
    """

    rows: Tensor
    costs: Tensor
    inverse: Tensor
    products: Tensor


def eliminate(gram: Tensor, down: Tensor, num_removed: int, order: Tensor) -> Elimination:
    """Remove channels one after the other, each time the one that costs the least.

    It takes the memory of two float64 matrices of the size of the Gram matrix.

    Args:
        gram: The second moment of the channel activations, `(intermediate_size, intermediate_size)`.
        down: The down projection, `(hidden_size, intermediate_size)`.
        num_removed: Number of channels to remove, at most all.
        order: All channels, LongTensor `(intermediate_size,)`; of several that cost the same, the one that comes first
            here is removed first.

    Raises:
        NumericalError: If the Gram matrix is not finite.
    """
    inverse = damped_inverse(gram, order, _DAMPING, "the Gram matrix of the channels")
    columns = down.double()[:, order]
    products = torch.zeros_like(inverse)
    add_product(products, columns, columns)
    del columns
    alive = torch.ones(len(order), dtype=torch.bool, device=order.device)
    channels, costs = [order[:0]], [inverse.new_zeros(0)]
    left = num_removed
    while left > 0:
        block = _remove_block(inverse, products, alive, min(left, _BLOCK))
        channels.append(order[block.rows])
        costs.append(block.costs)
        left -= len(block.rows)
        if left == 0:
            break
        alive[block.rows] = False
        if float(alive.double().mean()) < 1 - _MOST_DEAD:
            living = alive.nonzero().flatten()
            inverse, products, order = compact(inverse, living), compact(products, living), order[living]
            block = block._replace(inverse=block.inverse[:, living], products=block.products[:, living])
            alive = alive[living]
        add_product(inverse, block.inverse, block.inverse, alpha=-1.0)
        both = torch.cat([block.inverse, block.products])
        add_product(products, both, torch.cat([block.products, block.inverse]), alpha=-1.0)
    return Elimination(torch.cat(channels), torch.cat(costs).clamp_min(0.0))


def _remove_block(inverse: Tensor, products: Tensor, alive: Tensor, count: int) -> _Block:
    size = len(alive)
    rows, costs = [], inverse.new_empty(count)
    us, ss = inverse.new_empty(count, size), inverse.new_empty(count, size)
    pivots = torch.where(alive, inverse.diagonal(), 1.0)
    energies = torch.where(alive, products.diagonal(), torch.inf)
    for step in range(count):
        quotients = energies / pivots
        index = int(quotients.argmin())
        costs[step] = quotients[index]
        u, s, earlier_u, earlier_s = row(inverse, index), row(products, index), us[:step], ss[:step]
        if step:
            u = torch.addmv(u, earlier_u.T, earlier_u[:, index], alpha=-1.0)
            s = torch.addmv(s, earlier_s.T, earlier_u[:, index], alpha=-1.0)
            s = torch.addmv(s, earlier_u.T, earlier_s[:, index], alpha=-1.0)
        pivot = u[index]
        scale = pivot.rsqrt()
        torch.mul(u, scale, out=us[step])
        torch.mul(torch.sub(s, u, alpha=float(s[index] / (2 * pivot))), scale, out=ss[step])
        pivots.addcmul_(us[step], us[step], value=-1.0)
        energies.addcmul_(us[step], ss[step], value=-2.0)
        pivots[index], energies[index] = 1.0, torch.inf
        rows.append(index)
    return _Block(torch.tensor(rows, device=alive.device), costs, us, ss)
