"""How the loss feels errors of a layer's output, from the second moment of its gradients by that output.

The loss grows by about `(gᵀ e)² / 2` with an error e where g is the gradient of the loss by the output, so errors
count by `M = E[g gᵀ]`, the empirical Fisher information.
"""

import torch
from torch import Tensor

_FLOOR = 0.1  # share of the mean eigenvalue that every direction gets


def metric_root(gradient_moment: Tensor) -> Tensor:
    """Return the symmetric root of a second moment, so that `‖R e‖² = eᵀ M e`.

    Args:
        gradient_moment: The sum Σ g gᵀ over gradients g of the loss, `(hidden_size, hidden_size)`.

    Returns:
        The symmetric root R, `(hidden_size, hidden_size)` float32.

    Example:
        >>> metric_root(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        tensor([[2., 0.],
                [0., 3.]])
    """
    values, vectors = torch.linalg.eigh(gradient_moment.double())
    return _root(values.clamp_min(0), vectors)


def error_metric(gradient_moment: Tensor) -> Tensor:
    """Return the root of a second moment, a tenth of which is spread evenly so that no direction is free.

    Args:
        gradient_moment: The sum Σ g gᵀ over gradients g of the loss, `(hidden_size, hidden_size)`.

    Returns:
        A symmetric matrix with a mean squared eigenvalue of 1, `(hidden_size, hidden_size)` float32; the identity if
        all gradients are zero.
    """
    values, vectors = torch.linalg.eigh(gradient_moment.double())
    values = values.clamp_min(0)
    if values.sum() == 0:
        return torch.eye(len(values), device=values.device)
    return _root((1 - _FLOOR) * values / values.mean() + _FLOOR, vectors)


def _root(values: Tensor, vectors: Tensor) -> Tensor:
    return ((vectors * values.sqrt()) @ vectors.T).float()
