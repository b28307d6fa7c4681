"""A transport solver of one's own, as a plain callable and by name."""

from _demo_model import TEXTS, demo_pruner, show
from torch import Tensor

from optimum_otprune.functional.solvers import SolverSettings, solvers


def two_nearest(cost_matrix: Tensor, source_marginal: Tensor, target_marginal: Tensor, settings: SolverSettings):
    """Each channel sends half of its mass to either of its two nearest kept channels."""
    plan = cost_matrix.new_zeros(cost_matrix.shape)
    nearest = cost_matrix.topk(2, dim=1, largest=False).indices
    return plan.scatter(1, nearest, (source_marginal / 2)[:, None].expand(-1, 2))


two_nearest.requires = ()
two_nearest.meets = (True, False)  # the plan meets its source marginal, not the target's: there are no capacities

pruner = demo_pruner(compensation="none")
pruner.prune(TEXTS, progress=False, solver=two_nearest)
show("as a callable", pruner)

solvers.register("two_nearest")(two_nearest)
pruner = demo_pruner(compensation="none", solver="two_nearest")
pruner.prune(TEXTS, progress=False)
show("by name", pruner)
