"""Inverse and Cholesky factor of a Gram matrix, with as little damping as it takes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.linalg.symmetric import gather, invert

_MAX_DAMPING = 1e-2  # of the mean diagonal; beyond it the matrix is not a Gram matrix


def damped_cholesky(matrix: Tensor, damping: float, what: str = "the Gram matrix") -> Tensor:
    """Factor a positive semidefinite matrix, adding to its diagonal as little as it takes.

    Args:
        matrix: `(n, n)` float64.
        damping: First try, in units of the mean diagonal; grows tenfold until the factorization succeeds.
        what: Named in the error.

    Returns:
        Lower triangular factor `(n, n)`.

    Raises:
        NumericalError: If `matrix` is not finite, or not positive definite even with a hundredth of its mean diagonal
            added.
    """
    _check_finite(matrix, what)
    scale = _mean_diagonal(matrix)
    for share in _dampings(damping, what):
        damped = matrix
        if share > 0:
            damped = matrix.clone()
            damped.diagonal().add_(share * scale)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            break
    return factor


def damped_inverse(matrix: Tensor, channels: Tensor, damping: float, what: str) -> Tensor:
    """Invert `matrix[channels][:, channels]` with its diagonal damped; takes one float64 matrix and hardly more.

    Args:
        matrix: `(n, n)`, positive semidefinite.
        channels: LongTensor `(count,)`.
        damping: See `damped_cholesky`.
        what: Named in the error.

    Returns:
        The upper triangle of the inverse, float64 `(count, count)`.

    Raises:
        NumericalError: See `damped_cholesky`.
    """
    _check_finite(matrix, what)
    for share in _dampings(damping, what):
        inverse = gather(matrix, channels, torch.float64)
        inverse.diagonal().add_(share * _mean_diagonal(inverse))
        if invert(inverse):
            break
    return inverse


def _check_finite(matrix: Tensor, what: str) -> None:
    if not torch.isfinite(matrix).all():
        raise NumericalError(f"{what} is NaN or infinite: activations overflowed. Load the model in float32.")


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """The unit of damping; 1 for a matrix of zeros."""
    mean = matrix.diagonal().mean()
    return torch.where(mean > 0, mean, 1.0)


def _dampings(first: float, what: str) -> Iterator[float]:
    """What to try one after the other, in units of the mean diagonal."""
    damping = first
    while damping <= max(first, _MAX_DAMPING):
        yield damping
        damping = max(10 * damping, 1e-12)
    raise NumericalError(
        f"{what} is not positive semidefinite: its Cholesky factorization fails even with {_MAX_DAMPING} of "
        "the mean diagonal added. Use more calibration tokens, or load the model in float32."
    )
