"""A transport cost of one's own, as a plain callable and by name."""

import torch
from _demo_model import TEXTS, demo_pruner, show
from torch import Tensor

from optimum_otprune.functional.costs import CostInputs, TransportCost, costs


def uncorrelated(inputs: CostInputs, kept_channels: Tensor) -> TransportCost:
    """One minus the squared correlation of activations, with the best gain."""
    energy = inputs.gram.diagonal().clamp_min(torch.finfo(inputs.gram.dtype).tiny)
    cross = inputs.gram[:, kept_channels]
    gain = cross / energy[kept_channels]
    return TransportCost((1 - gain * cross / energy[:, None]).clamp_min(0), gain)


uncorrelated.requires = ("activations",)

pruner = demo_pruner(compensation="none")
pruner.prune(TEXTS, progress=False, cost=uncorrelated)
show("as a callable", pruner)

costs.register("uncorrelated", requires=("activations",))(uncorrelated)
pruner = demo_pruner(compensation="none", cost="uncorrelated")
pruner.prune(TEXTS, progress=False)
show("by name", pruner)
