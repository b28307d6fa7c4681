"""`PrunableModel`: a model and its FFN blocks, as one value."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from optimum_otprune.models.ffn_block import FFNBlock, by_block
from optimum_otprune.models.ffn_spec import FFNSpec
from optimum_otprune.models.find_ffns import check_dense, ffn_blocks, known_blocks
from optimum_otprune.models.loadable import check_loadable, check_resizable


@dataclasses.dataclass(frozen=True)
class PrunableModel:
    """A model with its FFN blocks.

    Attributes:
        model: The model that the blocks belong to.
        blocks: All of its FFN blocks, in the order of the forward pass.
        factors: The multiple of its FFN's output that each block adds to the hidden states, or None where it is no
            plain multiple; None as a whole until the model is checked, see `measured_factors`.
    """

    model: PreTrainedModel
    blocks: list[FFNBlock]
    factors: Sequence[float | None] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "PrunableModel":
        """Find the blocks of a model.

        Raises:
            UnsupportedModelError: If there are none; see `ffn_blocks`.
        """
        return cls(model, ffn_blocks(model))

    @classmethod
    def loadable(cls, model: PreTrainedModel) -> "PrunableModel":
        """Find the blocks of a model that can be loaded again once it is saved.

        Raises:
            UnsupportedModelError: See `ffn_blocks`, `check_dense`, `check_loadable` and `check_resizable`.
        """
        found = cls.of(model)
        check_dense(found.blocks)
        check_loadable(model)
        check_resizable(model, found.blocks)
        return found

    @property
    def spec(self) -> FFNSpec:
        """The place of the FFNs, and the name of their width in the model's configuration."""
        return self.blocks[0].spec

    @property
    def firsts(self) -> list[FFNBlock]:
        """The first FFN of each block of the model, which stands for its block."""
        return [group[0] for group in by_block(self.blocks)]

    @property
    def has_experts(self) -> bool:
        """Whether a router chooses from some of the FFNs."""
        return any(block.expert is not None for block in self.blocks)

    @property
    def widths(self) -> list[int]:
        """Channels of each FFN now."""
        return [block.intermediate_size for block in self.blocks]

    @functools.cached_property
    def can_hold_intercept(self) -> bool:
        """Whether the architecture can hold a bias on the down projection, so that plain loading finds it.

        This is found by building the model from its configuration, with biases switched on, on the meta device.
        """
        if self.has_experts:
            return False
        if getattr(self.blocks[0].down, "bias", None) is not None:
            return True
        key = self.spec.bias_key
        if key is None or not hasattr(self.spec.fields_of(self.model.config), key):
            return False
        config = copy.deepcopy(self.model.config)
        setattr(self.spec.fields_of(config), key, True)
        with torch.device("meta"):
            probe = type(self.model)(config)
        return getattr(known_blocks(probe, self.spec)[0].down, "bias", None) is not None

    def checked(self, factors: Sequence[float | None]) -> "PrunableModel":
        """Return the same model with its factors, after the check in `measured_factors`."""
        return dataclasses.replace(self, factors=factors)
