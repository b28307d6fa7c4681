"""Mean singular value of a wide matrix and its gradient, by way of the small matrix of its rows' products."""

from typing import Any

import torch
from torch import Tensor

_COLUMNS = 2**18  # converted to float64 at a time
_NOTHING = 1e-6  # of the largest singular value


class _MeanSingularValue(torch.autograd.Function):
    """`Σ σ / min(rows, columns)`, with the gradient `U Vᵀ / min(rows, columns) = (M Mᵀ)^(−1/2) M / min(…)`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:  # type: ignore[override]
        products = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        for part in matrix.split(_COLUMNS, dim=1):
            exact = part.double()
            products += exact @ exact.T
        if not torch.isfinite(products).all():
            return matrix.new_full((), torch.nan)
        squares, vectors = torch.linalg.eigh(products)
        values = squares.clamp_min(0).sqrt()
        count = min(matrix.shape)
        # What is zero but for rounding has no direction: it takes no part in the gradient.
        inverse = torch.where(values > _NOTHING * values[-1], 1 / values, 0.0)
        ctx.save_for_backward(matrix, ((vectors * inverse) @ vectors.T / count).to(matrix.dtype))
        return (values.sum() / count).to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        matrix, mixing = ctx.saved_tensors
        return (gradient * mixing) @ matrix


def mean_singular_value(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix's singular values, differentiable.

    Like `torch.linalg.svdvals(matrix).mean()`, but for the few rows and many columns of a batch of hidden states many
    times faster. Where singular values are zero, the gradient is the least of those that are possible.

    Args:
        matrix: `(rows, columns)`, of few rows.

    Returns:
        A scalar; NaN where an entry is NaN or infinite.

    Example:
        >>> mean_singular_value(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(2.)
    """
    return _MeanSingularValue.apply(matrix)
