"""What a registered function, or one of a user's own, returned: checked before anything is done with it."""

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError, ShapeError


def returned_tensor(value: object, shape: tuple[int, ...], what: str, want: str = "") -> Tensor:
    """Return the value, without its history of gradients, if it is a dense tensor of real numbers of a shape.

    Args:
        value: What a function returned.
        shape: What it should have.
        what: Whose it is, for messages, such as `"The cost 'mine'"`.
        want: What it should be; default: the shape.

    Raises:
        ShapeError: If it is something else.
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
    """Raise where a vector has entries that are no numbers.

    Raises:
        NumericalError: Says how many.
    """
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NumericalError(f"{what} is NaN or infinite for {bad} of {len(value)} channels. {hint}")
