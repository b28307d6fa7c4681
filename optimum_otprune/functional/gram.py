"""Second moments of one FFN's channels and targets: all that selection, transport and refit need of the data."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.linalg.symmetric import add_product, gather, mirror


class GramStatistics(NamedTuple):
    """Sums over tokens of products of channel activations h and targets y.

    Attributes:
        gram: The Gram matrix Σ h hᵀ, `(intermediate_size, intermediate_size)`.
        cross: The cross moment Σ y hᵀ, `(hidden_size, intermediate_size)`.
        hidden_sum: The sum Σ h, `(intermediate_size,)`.
        target_sum: The sum Σ y, `(hidden_size,)`.
        target_energy: The sum Σ ‖y‖², a scalar tensor.
        num_tokens: Number of tokens that were summed.
    """

    gram: Tensor
    cross: Tensor
    hidden_sum: Tensor
    target_sum: Tensor
    target_energy: Tensor
    num_tokens: int

    def __add__(self, other: tuple[object, ...]) -> "GramStatistics":
        """Return the statistics of both sets of tokens together."""
        assert isinstance(other, GramStatistics)
        return GramStatistics(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            hidden_sum=self.hidden_sum + other.hidden_sum,
            target_sum=self.target_sum + other.target_sum,
            target_energy=self.target_energy + other.target_energy,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> "GramStatistics":
        """Return the statistics with a function applied to every sum; the number of tokens stays."""
        return GramStatistics(
            gram=function(self.gram),
            cross=function(self.cross),
            hidden_sum=function(self.hidden_sum),
            target_sum=function(self.target_sum),
            target_energy=function(self.target_energy),
            num_tokens=self.num_tokens,
        )

    def select(self, channels: Tensor) -> "GramStatistics":
        """Return the statistics of some channels only.

        Args:
            channels: The channels to keep, LongTensor `(kept_size,)`.
        """
        gram = gather(self.gram, channels, self.gram.dtype)
        mirror(gram)
        return self._replace(
            gram=gram,
            cross=self.cross[:, channels],
            hidden_sum=self.hidden_sum[channels],
        )

    def double(self) -> "GramStatistics":
        """Return the same statistics in float64."""
        return self._map(Tensor.double)

    def scaled(self, factor: float) -> "GramStatistics":
        """Return all sums times a factor, as if each token weighed so much more; the number of tokens stays."""
        return self._map(lambda part: part * factor)

    def shifted(self, hidden_shift: Tensor, target_shift: Tensor) -> "GramStatistics":
        """Return the statistics of `h − hidden_shift` and `y − target_shift`: centered if the shifts are the means.

        They have the dtype of the shifts if that is the more precise one. Beside the result, this takes the memory of
        one more matrix.
        """
        count, h, y = self.num_tokens, hidden_shift, target_shift
        outer = torch.outer(self.hidden_sum - count / 2 * h, h)
        gram = self.gram.to(outer.dtype, copy=True).sub_(outer).sub_(outer.T)
        outer = torch.outer(self.target_sum - count * y, h)
        cross = self.cross.to(outer.dtype, copy=True).sub_(outer).sub_(torch.outer(y, self.hidden_sum.to(y.dtype)))
        return GramStatistics(
            gram=gram,
            cross=cross,
            hidden_sum=self.hidden_sum - count * h,
            target_sum=self.target_sum - count * y,
            target_energy=self.target_energy - 2 * (y @ self.target_sum.to(y.dtype)) + count * (y @ y),
            num_tokens=count,
        )

    def error(self, down: Tensor) -> Tensor:
        """Return the squared error Σ ‖y − down h‖² over the tokens, a scalar tensor.

        Args:
            down: A down projection, `(hidden_size, intermediate_size)`.
        """
        return self.target_energy - 2 * (down * self.cross).sum() + ((down @ self.gram) * down).sum()


class GramAccumulator:
    """Sums second moments batch by batch, in place: one Gram matrix, whatever the number of tokens.

    Only the block rows of the upper triangle are summed, 56 % of the work in a wide layer.

    Example:
        >>> sums = GramAccumulator(2, 1)
        >>> sums.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
        >>> sums.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0]]))
        >>> sums.statistics().gram.tolist(), sums.num_tokens
        ([[1.0, 2.0], [2.0, 5.0]], 2)
    """

    def __init__(
        self,
        intermediate_size: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start from nothing.

        Args:
            intermediate_size: Number of channels.
            hidden_size: Number of entries of a target.
            dtype: The dtype of the sums, and of every batch.
            device: The device of the sums, and of every batch.
        """
        self._gram = torch.zeros(intermediate_size, intermediate_size, dtype=dtype, device=device)
        self._cross = torch.zeros(hidden_size, intermediate_size, dtype=dtype, device=device)
        self._hidden_sum = torch.zeros(intermediate_size, dtype=dtype, device=device)
        self._target_sum = torch.zeros(hidden_size, dtype=dtype, device=device)
        self._target_energy = torch.zeros((), dtype=dtype, device=device)
        self.num_tokens = 0

    def add(self, hidden: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> None:
        """Add one batch of tokens.

        Args:
            hidden: The channel activations h, `(num_tokens, intermediate_size)`.
            targets: The targets y, `(num_tokens, hidden_size)`.
            token_weights: What each token counts, `(num_tokens,)`, with mean 1 over all batches together; None counts
                every token the same.
        """
        weighted_hidden, weighted_targets = hidden, targets
        if token_weights is not None:
            weighted_hidden, weighted_targets = hidden * token_weights[:, None], targets * token_weights[:, None]
        add_product(self._gram, hidden, weighted_hidden)
        self._cross.addmm_(targets.T, weighted_hidden)
        self._hidden_sum += weighted_hidden.sum(dim=0)
        self._target_sum += weighted_targets.sum(dim=0)
        self._target_energy += (targets * weighted_targets).sum()
        self.num_tokens += len(hidden)

    def statistics(self) -> GramStatistics:
        """Return the sums so far; the tensors are the accumulator's own, so that later batches change them."""
        mirror(self._gram)
        sums = (self._gram, self._cross, self._hidden_sum, self._target_sum, self._target_energy)
        return GramStatistics(*sums, self.num_tokens)


def gram_statistics(hidden: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> GramStatistics:
    """Return the second moments of one batch of tokens, in the dtype of `hidden`.

    Args:
        hidden: The channel activations h, `(num_tokens, intermediate_size)`.
        targets: The targets y, `(num_tokens, hidden_size)`.
        token_weights: What each token counts, `(num_tokens,)`, with mean 1; None counts every token the same.
    """
    sums = GramAccumulator(hidden.shape[1], targets.shape[1], hidden.dtype, hidden.device)
    sums.add(hidden, targets, token_weights)
    return sums.statistics()
