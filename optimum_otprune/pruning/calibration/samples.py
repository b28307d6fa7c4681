"""Calibration samples: which tokens are held out, and which samples belong to this process."""

import torch
from torch import Tensor

from optimum_otprune.models.distributed import own_samples


def heldout_mask(num_samples: int, seqlen: int, share: float, seed: int) -> Tensor:
    """Return which calibration tokens are held out: whole samples, or the ends of the samples if there are under four.

    Args:
        num_samples: Calibration samples.
        seqlen: Tokens of each.
        share: To hold out.
        seed: Of the choice.

    Returns:
        BoolTensor `(num_samples · seqlen,)`, at least one token on either side.
    """
    mask = torch.zeros(num_samples, seqlen, dtype=torch.bool)
    if num_samples >= 4:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(num_samples, generator=generator)[: max(1, round(share * num_samples))]
        mask[chosen] = True
    else:
        mask[:, seqlen - max(1, round(share * seqlen)) :] = True
    return mask.flatten()


def own_part(tokens: Tensor, is_heldout: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Samples of this process, and which of their tokens are held out."""
    own = own_samples(len(tokens), batch_size)
    return tokens[own], is_heldout.view(tokens.shape)[own].flatten()
