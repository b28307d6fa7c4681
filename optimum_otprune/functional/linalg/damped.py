"""Inverse and Cholesky factor of a Gram matrix, with as little damping as it takes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.linalg.symmetric import gather, invert, lower_factor

_MAX_DAMPING = 1e-2  # of the mean diagonal; a matrix that needs more is not a Gram matrix
_SECOND_DAMPING = 1e-12  # of the mean diagonal; tried where none was not enough, and far above float64's rounding


def damped_cholesky(matrix: Tensor, damping: float, what: str = "the Gram matrix") -> Tensor:
    """Factor a positive semidefinite matrix, adding to its diagonal as little as it takes.

    Args:
        matrix: A symmetric matrix, `(n, n)` float64.
        damping: What is added to the diagonal at first, in units of the mean diagonal; it grows tenfold until the
            factorization succeeds.
        what: What the error message calls the matrix.

    Returns:
        The lower triangular factor, `(n, n)` float64.

    Raises:
        NumericalError: If `matrix` is not finite, or not positive definite even with a hundredth of its mean diagonal
            added.
    """
    _check_finite(matrix, what)
    scale = _mean_diagonal(matrix)
    for share in _dampings(damping):
        damped = matrix
        if share > 0:
            damped = matrix.clone()
            damped.diagonal().add_(share * scale)
        factor = lower_factor(damped)
        if factor is not None:
            return factor
    raise _not_semidefinite(what)


def damped_inverse(matrix: Tensor, channels: Tensor, damping: float, what: str) -> Tensor:
    """Invert `matrix[channels][:, channels]` with its diagonal damped, in the memory of one float64 matrix.

    Args:
        matrix: A positive semidefinite matrix, `(n, n)`.
        channels: The rows and columns to take, LongTensor `(count,)`.
        damping: What is added to the diagonal at first, as in `damped_cholesky`.
        what: What the error message calls the matrix.

    Returns:
        The upper triangle of the inverse, float64 `(count, count)`.

    Raises:
        NumericalError: If no damping helps; see `damped_cholesky`.
    """
    _check_finite(matrix, what)
    for share in _dampings(damping):
        inverse = gather(matrix, channels, torch.float64)
        inverse.diagonal().add_(share * _mean_diagonal(inverse))
        if invert(inverse):
            return inverse
    raise _not_semidefinite(what)


def _check_finite(matrix: Tensor, what: str) -> None:
    if not torch.isfinite(matrix).all():
        raise NumericalError(f"{what} is NaN or infinite: activations overflowed. Load the model in float32.")


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """Return the unit of damping, a scalar tensor: the mean of the diagonal, or 1 for a matrix of zeros."""
    mean = matrix.diagonal().mean()
    return torch.where(mean > 0, mean, 1.0)


def _dampings(first: float) -> Iterator[float]:
    """Yield the dampings to try one after the other, in units of the mean diagonal."""
    damping = first
    while damping <= max(first, _MAX_DAMPING):
        yield damping
        damping = max(10 * damping, _SECOND_DAMPING)


def _not_semidefinite(what: str) -> NumericalError:
    return NumericalError(
        f"{what} is not positive semidefinite: its Cholesky factorization fails even with {_MAX_DAMPING} of "
        "the mean diagonal added. Use more calibration tokens, or load the model in float32."
    )
