"""Checks of what a registered function, or one of the user's own, returned."""

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError, ShapeError


def returned_tensor(value: object, shape: tuple[int, ...], what: str, want: str = "") -> Tensor:
    """Return the value, without its history of gradients, if it is a dense tensor of real numbers of a shape.

    Args:
        value: The value that the function returned.
        shape: The shape that it should have.
        what: What the message calls the function, such as `"The cost 'mine'"`.
        want: What the message says should have been returned; default: the shape.

    Raises:
        ShapeError: If the value is no such tensor.
    """
    got = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        got = f"shape {tuple(value.shape)}"
        if value.layout != torch.strided or value.is_complex():
            got = f"a tensor that is {'complex' if value.is_complex() else 'not dense'}"
        elif value.shape == shape:
            return value.detach()
    raise ShapeError(f"{what} returned {got}; want {want or shape}.")


def check_finite(value: Tensor, what: str, hint: str) -> None:
    """Raise if a vector has entries that are NaN or infinite.

    Raises:
        NumericalError: If there are such entries; the message says how many.
    """
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NumericalError(f"{what} is NaN or infinite for {bad} of {len(value)} channels. {hint}")
