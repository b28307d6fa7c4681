"""An importance measure of one's own, as a plain callable and by name: no line of the package is edited."""

from _demo_model import TEXTS, demo_pruner, show
from torch import Tensor

from optimum_otprune.functional.importance import ChannelStatistics, importances


def output_energy(statistics: ChannelStatistics) -> Tensor:
    """Mean energy that a channel sends into the residual stream: `‖w_j‖² E h_j²`."""
    return statistics.weights.down.square().sum(dim=0) * statistics.hidden_second_moment


output_energy.requires = ("activations",)  # without this line the gradients of SNIP and FO are collected too

pruner = demo_pruner(selection="top")
pruner.prune(TEXTS, progress=False, importance=output_energy)
show("as a callable", pruner)

importances.register("output_energy", requires=("activations",))(output_energy)
pruner = demo_pruner(selection="top", importance="output_energy")
pruner.prune(TEXTS, progress=False)
show("by name", pruner)
