"""`Block`: one block of a model, which is run by itself."""

import torch
from torch import nn

from optimum_otprune.models.devices import execution_device


class Block:
    """One block of a model; there may be no FFN in it, as in layers of attention or of a recurrence alone.

    Attributes:
        module: The module of the whole block.
        block: The index of the block, from 0, over all lists of blocks.
        layers: The path of the list that the block is in, relative to `model.base_model`.
    """

    def __init__(self, module: nn.Module, block: int, layers: str):
        self.module, self.block, self.layers = module, block, layers

    @property
    def name(self) -> str:
        """What the block is called in messages."""
        return f"block {self.block}"

    @property
    def device(self) -> torch.device:
        """The device that the block computes on."""
        return execution_device(self.module)
