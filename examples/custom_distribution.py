"""A probability distribution of one's own for the mass that kept channels receive, as a plain callable and by name."""

import torch
from _demo_model import TEXTS, demo_pruner, show
from torch import Tensor

from optimum_otprune.functional.marginals import MarginalInputs, distributions


def square_root(inputs: MarginalInputs) -> Tensor:
    """In proportion to the root of the importance: between uniform and importance. Need not sum to 1."""
    return torch.sqrt(inputs.importance.double().clamp_min(1e-12))


square_root.requires = ()

pruner = demo_pruner(solver="emd")
pruner.prune(TEXTS, progress=False, target_distribution=square_root)
show("as a callable", pruner)

distributions.register("square_root")(square_root)
pruner = demo_pruner(solver="emd", target_distribution="square_root", source_distribution="square_root")
pruner.prune(TEXTS, progress=False)
show("by name", pruner)
