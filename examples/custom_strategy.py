"""A strategy of one's own: a mixture of weight-level statistics with the distributions that read it."""

from collections.abc import Mapping

from _demo_model import TEXTS, demo_pruner, show
from torch import Tensor

from optimum_otprune.functional.marginals import Strategy, mixtures, register_strategy


def peaks(statistics: Mapping[str, Tensor]) -> Tensor:
    """Channels with a few very important weights count most."""
    return 0.7 * statistics["max"] + 0.3 * statistics["share"]


peaks.requires = ("gradients",)

options = {"method": "structured_afr_with_intrafusion", "normalization": "corrected"}
pruner = demo_pruner(**options)
pruner.prune(TEXTS, progress=False, statistics=peaks)
show("the mixture as a callable", pruner)

mixtures.register("peaks", requires=("gradients",))(peaks)
register_strategy("peaks", Strategy(statistics="peaks", source_distribution="robust", target_distribution="adaptive"))
pruner = demo_pruner(strategy="peaks", **options)
pruner.prune(TEXTS, progress=False)
show("the strategy by name", pruner)
