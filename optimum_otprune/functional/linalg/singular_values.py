"""Mean singular value of a wide matrix and its gradient, by way of the small matrix of its rows' products."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_COLUMNS = 2**18  # converted to float64 at a time, which takes 2 MB for each row
_NOTHING = 1e-6  # of the largest singular value: squares that float64 rounds to 1e-16 are noise up to 1e-8


class _Context(Protocol):
    """What the forward pass hands on to the backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _MeanSingularValue(torch.autograd.Function):
    """`Σ σ / min(rows, columns)`, with the gradient `U Vᵀ / min(rows, columns) = (M Mᵀ)^(−1/2) M / min(…)`."""

    @staticmethod
    def forward(ctx: _Context, matrix: Tensor) -> Tensor:
        products = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        for part in torch.split(matrix, _COLUMNS, dim=1):
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
        mean: Tensor = values.sum() / count
        return mean.to(matrix.dtype)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> Tensor:
        matrix, mixing = ctx.saved_tensors
        return (gradients[0] * mixing) @ matrix


def mean_singular_value(matrix: Tensor) -> Tensor:
    """Return the mean of a matrix's singular values, differentiable.

    Like `torch.linalg.svdvals(matrix).mean()`, but for the few rows and many columns of a batch of hidden states many
    times faster. Where singular values are zero, the gradient is the least of those that are possible.

    Args:
        matrix: A matrix of few rows, `(rows, columns)`.

    Returns:
        A scalar; NaN where an entry is NaN or infinite.

    Example:
        >>> mean_singular_value(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(2.)
    """
    apply: Callable[[Tensor], Tensor] = _MeanSingularValue.apply
    return apply(matrix)
