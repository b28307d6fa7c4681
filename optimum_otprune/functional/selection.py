"""Which channels stay: width rounding, top importance, and greedy elimination (OBS)."""

import torch
from torch import Tensor

from optimum_otprune.errors import ConfigurationError, NumericalError, ShapeError
from optimum_otprune.functional.elimination import Elimination, eliminate
from optimum_otprune.functional.linalg.damped import damped_cholesky

_SIXTEENTHS = 16  # the share of a layer that a multiple may be
_PREFERRED = (256, 64, 32)  # of GGUF's k-quants, of tensor cores, of blocks of 4 and 8 bits
_GROUP_DAMPING = 1e-3  # of the mean diagonal of the Gram matrix


def kept_width(intermediate_size: int, pruning_ratio: float, multiple_of: int = 1) -> int:
    """Return how many channels stay: the multiple nearest to `(1 − pruning_ratio) · intermediate_size`.

    At least one multiple stays and a layer never grows; ratio 0 keeps the width whatever the multiple. Halves are
    rounded up.

    Args:
        intermediate_size: Number of channels before pruning.
        pruning_ratio: Share of the channels to remove, in [0, 1).
        multiple_of: The result is a multiple of this number.

    Raises:
        ConfigurationError: If the layer has fewer channels than one multiple.

    Example:
        >>> kept_width(576, 0.5), kept_width(576, 0.5, 128), kept_width(576, 0.9, 128), kept_width(576, 0.0, 128)
        (288, 256, 128, 576)
    """
    if pruning_ratio == 0:
        return intermediate_size
    if multiple_of > intermediate_size:
        raise ConfigurationError(
            f"`multiple_of` is {multiple_of}, but the layer has only {intermediate_size} channels, so no multiple of "
            f"it can be kept. Choose a divisor of the width you want, such as {_largest_multiple(intermediate_size)}."
        )
    wanted = (1 - pruning_ratio) * intermediate_size / multiple_of
    return min(intermediate_size // multiple_of, max(1, int(wanted + 0.5))) * multiple_of


def sensible_multiple(intermediate_size: int, multiple_of: int) -> int:
    """Halve `multiple_of` until rounding moves the width by at most a thirty-second of the layer.

    Example:
        >>> sensible_multiple(8192, 128), sensible_multiple(576, 128), sensible_multiple(48, 128)
        (128, 32, 2)
    """
    while multiple_of > _largest_multiple(intermediate_size):
        multiple_of //= 2
    return multiple_of


def rounded_multiple(intermediate_size: int, pruning_ratio: float, multiple_of: int) -> int:
    """Return `sensible_multiple`, or one that more programs like, where it is lowered and the width can have that.

    Preferred are 256 (k-quants of GGUF), 64 (tensor cores) and 32 (blocks of 4 and 8 bits), in this order, where
    rounding to it moves the width by at most a thirty-second of the layer, too.

    Args:
        intermediate_size: Number of channels before pruning.
        pruning_ratio: Share of the channels to remove, in [0, 1).
        multiple_of: The multiple that was asked for.

    Example:
        >>> rounded_multiple(8192, 0.5, 128), rounded_multiple(1536, 0.5, 128), rounded_multiple(1536, 0.3, 128)
        (128, 256, 64)
    """
    lowered = sensible_multiple(intermediate_size, multiple_of)
    if lowered == multiple_of:
        return lowered
    wanted = (1 - pruning_ratio) * intermediate_size
    for preferred in _PREFERRED:
        if lowered < preferred <= intermediate_size:
            moved = kept_width(intermediate_size, pruning_ratio, preferred) - wanted
            if abs(moved) * _SIXTEENTHS * 2 <= intermediate_size:
                return preferred
    return lowered


def _largest_multiple(intermediate_size: int) -> int:
    """Return a sixteenth of the layer: rounding to the nearest multiple moves a width by at most half of it."""
    return max(1, intermediate_size // _SIXTEENTHS)


def top_channels(importance: Tensor, kept_size: int) -> Tensor:
    """Return the channels with the highest importance; of equally important ones, the first.

    Args:
        importance: The importance of each channel, `(intermediate_size,)`.
        kept_size: Number of channels to keep.

    Returns:
        The kept channels, LongTensor `(kept_size,)`, sorted.

    Raises:
        NumericalError: If an importance is NaN or infinite.
        ShapeError: If `importance` is not a vector of at least `kept_size` entries.

    Example:
        >>> top_channels(torch.tensor([0.1, 3.0, 2.0, 2.0]), 2)
        tensor([1, 2])
    """
    if importance.ndim != 1 or not 1 <= kept_size <= len(importance):
        raise ShapeError(f"Cannot keep {kept_size} channels by an importance of shape {tuple(importance.shape)}.")
    if not torch.isfinite(importance).all():
        raise NumericalError("The importance of a channel is NaN or infinite. Check the weights and the activations.")
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:kept_size].sort().values


def obs_elimination(gram: Tensor, down: Tensor, num_removed: int, importance: Tensor | None = None) -> Elimination:
    """Eliminate channels greedily, each time the one whose loss the others can best make up for.

    With `G` the Gram matrix of the channels that are left, removing j and refitting the others costs
    `‖w_j‖² / [G⁻¹]_jj`; `G⁻¹` and the down projection are downdated after each removal (Hassibi and Stork, "Optimal
    Brain Surgeon", 1993, applied to whole columns). The updates wait until 128 channels are removed (`elimination`),
    which changes nothing but rounding: the order is that of one removal at a time, at every width.

    Args:
        gram: The second moment of the channel activations, `(intermediate_size, intermediate_size)`.
        down: The down projection, `(hidden_size, intermediate_size)`, or the root of a metric times it, so that errors
            are measured by that metric.
        num_removed: Number of channels to remove, at most all.
        importance: The importance of each channel, `(intermediate_size,)`, which breaks ties: of channels that cost
            the same, the least important is removed first.

    Raises:
        ShapeError: If the Gram matrix does not fit the down projection.
        NumericalError: If the Gram matrix is not finite.
    """
    n = down.shape[1]
    if gram.shape != (n, n):
        raise ShapeError(f"The Gram matrix has shape {tuple(gram.shape)}, but `down` has {n} channels: want {(n, n)}.")
    order = torch.arange(n) if importance is None else torch.argsort(importance.cpu(), stable=True)
    return eliminate(gram, down, num_removed, order.to(gram.device))


def obs_channels(gram: Tensor, down: Tensor, kept_size: int, importance: Tensor | None = None) -> Tensor:
    """Return the channels that greedy elimination leaves.

    Args:
        gram: The second moment of the channel activations, `(intermediate_size, intermediate_size)`.
        down: The down projection, `(hidden_size, intermediate_size)`.
        kept_size: Number of channels to keep.
        importance: The importance of each channel, which breaks ties, as in `obs_elimination`.

    Returns:
        The kept channels, LongTensor `(kept_size,)`, sorted.

    Raises:
        NumericalError: If the Gram matrix is not finite.
    """
    n = down.shape[1]
    removed = obs_elimination(gram, down, n - kept_size, importance).channels
    kept = torch.ones(n, dtype=torch.bool, device=removed.device)
    kept[removed] = False
    return kept.nonzero().flatten()


def obs_groups(gram: Tensor, down: Tensor, num_groups: int, kept_groups: int) -> Tensor:
    """Return the groups of channels that greedy elimination of whole groups leaves.

    Removing the group S and refitting the others costs `tr(W_S [G⁻¹]_SS⁻¹ W_Sᵀ)`, as `obs_elimination` has it for one
    channel.

    Args:
        gram: The second moment of the channels, `(num_channels, num_channels)`.
        down: The matrix that reads them, `(hidden_size, num_channels)`.
        num_groups: Number of groups, all of one size, one behind the other.
        kept_groups: Number of groups to keep.

    Returns:
        The kept groups, LongTensor `(kept_groups,)`, sorted.

    Raises:
        NumericalError: If the Gram matrix is not finite.

    Example:
        >>> obs_groups(torch.diag(torch.tensor([1.0, 1.0, 9.0, 9.0])), torch.ones(3, 4), num_groups=2, kept_groups=1)
        tensor([1])
    """
    size = down.shape[1] // num_groups
    inverse = torch.cholesky_inverse(damped_cholesky(gram.double(), _GROUP_DAMPING))
    columns, alive = down.double().clone(), list(range(num_groups))
    while len(alive) > kept_groups:
        costs = []
        for group in alive:
            own = slice(group * size, (group + 1) * size)
            costs.append(float((columns[:, own].T * torch.linalg.solve(inverse[own, own], columns[:, own].T)).sum()))
        group = alive.pop(costs.index(min(costs)))
        own = slice(group * size, (group + 1) * size)
        update = torch.linalg.solve(inverse[own, own], inverse[own])
        columns = columns - columns[:, own] @ update
        inverse = inverse - inverse[:, own] @ update
    return torch.tensor(alive, device=down.device)
