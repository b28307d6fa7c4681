"""The calibration tokens of a block with several FFNs: what each gets, and how much its error counts.

An expert gets the tokens that the router sends to it, and what it puts out is multiplied by the router's weight, so
its error counts by the square of that. An expert that got too few tokens to be fitted borrows some of the others,
which count little: its activations on them are at least those of a similar text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.experts import Routing
from optimum_otprune.models.distributed import gathered, process_index
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.forward_stream import CalibrationStream, FFNInputs
from optimum_otprune.models.spill import StoredTensor

_FITTED, _HELDOUT = 2.0, 0.5  # tokens for each channel, so that none are borrowed
_BORROWED = 0.1  # times the mean square of the router's weights is what a borrowed token counts
_LEAST_WEIGHT = 1e-6  # of a router


class ChosenRows:
    """Some rows of a stored tensor, taken when it is loaded.

    Args:
        stored: The tensor.
        rows: The rows, by index, LongTensor.
    """

    def __init__(self, stored: StoredTensor, rows: Tensor):
        self._stored, self._rows = stored, rows

    def load(self) -> Tensor:
        """Return the rows."""
        tensor = self._stored.load()
        return tensor[self._rows.to(tensor.device)]


class OwnTokens(NamedTuple):
    """The calibration tokens of one FFN of a block.

    Attributes:
        inputs: Its inputs, `(num_tokens, hidden_size)` for each batch.
        chosen: Which of all tokens those are, by index, LongTensor.
        weights: What the FFN's output is multiplied by for each of them, `(num_tokens,)`.
        borrowed: How many of them it does not get in the model.
    """

    inputs: list[ChosenRows]
    chosen: Tensor
    weights: Tensor
    borrowed: int


class BlockTokens(NamedTuple):
    """The calibration tokens of all FFNs of one block.

    Attributes:
        seen: What goes into the FFNs, by layer; into the first expert for all of them.
        energies: The squared norms of the hidden states behind the block, `(num_tokens,)`.
    """

    seen: dict[int, FFNInputs]
    energies: Tensor

    @classmethod
    def of(cls, group: Sequence[FFNBlock], stream: CalibrationStream) -> "BlockTokens":
        """Run a block, its FFNs still dense, and keep what goes into each.

        Args:
            group: All FFNs of the block.
            stream: The calibration samples' hidden states before the block.
        """
        energies = stream.energies(group[0])
        return cls(stream.ffn_inputs(group), energies)

    def own(self, block: FFNBlock, is_heldout: Tensor) -> OwnTokens:
        """Return the tokens of one FFN of the block.

        Args:
            block: The FFN.
            is_heldout: Which of all tokens are held out, BoolTensor.
        """
        seen = self.seen[block.layer - (block.expert or 0)]
        owners = torch.cat(seen.tokens)
        is_heldout = is_heldout[owners]
        if block.expert is None:
            shares, is_borrowed = torch.ones(len(owners)), torch.zeros(len(owners), dtype=torch.bool)
        else:
            shares = torch.cat([_shares(routing, block.expert) for routing in seen.routing])
            shares, is_borrowed = _borrowed_among_all(shares, is_heldout, block.intermediate_size)
        rows = [part.nonzero().flatten() for part in shares.split([len(part) for part in seen.tokens])]
        inputs = [ChosenRows(stored, own) for stored, own in zip(seen.inputs, rows) if len(own)]
        chosen = shares.nonzero().flatten()
        return OwnTokens(inputs, owners[chosen], shares[chosen], int(is_borrowed.sum()))


def _shares(routing: Routing, expert: int) -> Tensor:
    """Return the router's weight of an expert for every token of a batch, 0 where it gets it not, on the CPU."""
    tokens, weights = routing.of(expert)
    shares = torch.zeros(len(routing.experts))
    shares[tokens.cpu()] = weights.float().cpu().abs().clamp_min(_LEAST_WEIGHT)
    return shares


def _borrowed_among_all(shares: Tensor, is_heldout: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return what `_with_borrowed` gives this process of the tokens of all processes."""
    parts = gathered(shares)
    found = _with_borrowed(torch.cat(parts), torch.cat(gathered(is_heldout)), width)
    shares, is_borrowed = (both.split([len(part) for part in parts])[process_index()] for both in found)
    return shares, is_borrowed


def _with_borrowed(shares: Tensor, is_heldout: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Give an expert tokens of others where it has too few, evenly over all that there are.

    Args:
        shares: The router's weight for every token, `(num_tokens,)`, 0 where the expert gets it not.
        is_heldout: Which tokens are held out, BoolTensor `(num_tokens,)`.
        width: The number of channels of the expert.

    Returns:
        The weights with those of borrowed tokens, and which are borrowed.
    """
    is_own = shares > 0
    mean_square = shares[is_own].square().mean() if is_own.any() else torch.ones(())
    is_borrowed = torch.zeros_like(is_own)
    for side, each in ((~is_heldout, _FITTED), (is_heldout, _HELDOUT)):
        missing = round(each * width) - int((is_own & side).sum())
        others = (side & ~is_own).nonzero().flatten()
        if missing > 0 and len(others):
            places = torch.linspace(0, len(others) - 1, min(missing, len(others))).round().long()
            is_borrowed[others[places]] = True
    shares = torch.where(is_borrowed, (_BORROWED * mean_square).sqrt(), shares)
    return shares, is_borrowed
