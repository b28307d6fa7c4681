"""Calibration samples: which tokens are held out, and which samples belong to this process."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.models.distributed import own_samples


class Samples(NamedTuple):
    """Calibration samples, and which of their tokens are held out.

    Attributes:
        tokens: The token ids, LongTensor `(num_samples, seqlen)`.
        is_heldout: Whether each token is held out, BoolTensor `(num_samples · seqlen,)`.
    """

    tokens: Tensor
    is_heldout: Tensor

    @classmethod
    def split(cls, tokens: Tensor, share: float, seed: int) -> "Samples":
        """Hold out a share of the tokens; see `heldout_mask`."""
        return cls(tokens, heldout_mask(len(tokens), tokens.shape[1], share, seed))

    def own(self, together: int = 1) -> "Samples":
        """Return the samples of this process.

        Args:
            together: Samples that must stay in one process.
        """
        own = own_samples(len(self.tokens), together)
        return Samples(self.tokens[own], self.is_heldout.view(self.tokens.shape)[own].flatten())

    def followed_by(self, others: "Samples") -> "Samples":
        """Return these samples and others of the same length."""
        return Samples(*(torch.cat(parts) for parts in zip(self, others)))


def heldout_mask(num_samples: int, seqlen: int, share: float, seed: int) -> Tensor:
    """Return which calibration tokens are held out: whole samples, or the ends of the samples if there are under four.

    Args:
        num_samples: Number of calibration samples.
        seqlen: Number of tokens of each sample.
        share: Share of the tokens to hold out.
        seed: Seed of the random choice.

    Returns:
        BoolTensor `(num_samples · seqlen,)`, at least one token on either side if there are any.
    """
    mask = torch.zeros(num_samples, seqlen, dtype=torch.bool)
    if num_samples >= 4:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(num_samples, generator=generator)[: max(1, round(share * num_samples))]
        mask[chosen] = True
    else:
        mask[:, seqlen - max(1, round(share * seqlen)) :] = True
    return mask.flatten()
