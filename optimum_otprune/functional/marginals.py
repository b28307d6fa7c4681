"""How mass is spread over channels: source and target distributions, and the strategies that choose them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError, RegistryError, ShapeError, unknown_name
from optimum_otprune.functional.importance import standardize
from optimum_otprune.functional.registry import GRADIENTS, Entry, Presets, Registry
from optimum_otprune.functional.returned import returned_tensor

_ENTROPY_WEIGHT = 0.1


class MarginalInputs(NamedTuple):
    """What a distribution is given of the k channels that it spreads mass over.

    Attributes:
        importance: `(k,)`: the strategy's mixture of weight-level statistics, or the importance of the selection.
        is_kept: Which of the k channels stay, BoolTensor `(k,)`.
        statistics: Weight-level statistics by name, `(k,)` each; empty when no gradients were collected.
    """

    importance: Tensor
    is_kept: Tensor
    statistics: Mapping[str, Tensor]

    def select(self, channels: Tensor) -> "MarginalInputs":
        """The same of some of the channels, LongTensor `(selected,)`."""
        return MarginalInputs(
            self.importance[channels],
            self.is_kept[channels],
            {name: value[channels] for name, value in self.statistics.items()},
        )


Distribution = Callable[[MarginalInputs], Tensor]

distributions: Registry[Distribution] = Registry("distribution")
"""Functions `MarginalInputs -> (k,)` by name: non-negative masses, for sources and targets alike.

In the reference some of these can be negative or NaN; here each is a valid probability vector for any finite scores:
scores that mass is proportional to are first moved to be non-negative, and all exponentials are softmaxes.
"""

Mixture = Callable[[Mapping[str, Tensor]], Tensor]

mixtures: Registry[Mixture] = Registry("statistics")
"""Functions of the weight-level statistics by name (`(k,)` each) to one importance `(k,)`."""


class Strategy(NamedTuple):
    """What a strategy sets.

    Attributes:
        statistics: Name of a mixture.
        source_distribution: Name of a distribution.
        target_distribution: Name of a distribution.
    """

    statistics: str
    source_distribution: str
    target_distribution: str


# As the reference sets them. It leaves the distributions of `aggressive` open; they are those of `balanced` the other
# way round.
strategies: Presets[Strategy] = Presets(
    comprehensive=Strategy("comprehensive", "entropy_regularized", "adaptive"),
    conservative=Strategy("conservative", "robust", "adaptive"),
    balanced=Strategy("balanced", "adaptive", "robust"),
    aggressive=Strategy("aggressive", "robust", "adaptive"),
)


def register_strategy(name: str, strategy: Strategy) -> None:
    """Make a strategy known by name; its three parts must be registered already.

    Raises:
        RegistryError: If a part is unknown, or the name is taken.
    """
    parts = (
        mixtures.entry(strategy.statistics).name,
        distributions.entry(strategy.source_distribution).name,
        distributions.entry(strategy.target_distribution).name,
    )
    if strategies.get(name) is not None:  # registering loads no plugins, as `in` would
        raise RegistryError(f"The strategy {name!r} is registered already. Choose another name.")
    strategies[name] = Strategy(*parts)


def _non_negative(scores: Tensor) -> Tensor:
    """Move scores so that the least is a thousandth of their range above zero; constant scores become ones."""
    low, high = scores.min(), scores.max()
    return scores - low + 1e-3 * (high - low) if high > low else torch.ones_like(scores)


def _rescale(scores: Tensor) -> Tensor:
    """Map to [0, 1] by least and greatest."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def _statistic(inputs: MarginalInputs, name: str) -> Tensor:
    if name not in inputs.statistics:
        raise ShapeError(f"This distribution needs the weight-level statistic {name!r}, which was not collected.")
    return inputs.statistics[name].double()


@distributions.register("uniform")
def uniform(inputs: MarginalInputs) -> Tensor:
    """Every channel weighs the same."""
    return torch.ones_like(inputs.importance, dtype=torch.float64)


@distributions.register("importance")
def importance(inputs: MarginalInputs) -> Tensor:
    """In proportion to the importance, moved to be non-negative."""
    return _non_negative(inputs.importance.double())


@distributions.register("weight_aware", requires=(GRADIENTS,))
def weight_aware(inputs: MarginalInputs) -> Tensor:
    """In proportion to the sum of a channel's greatest score, spread and share of high scores, each in [0, 1]."""
    greatest, spread, share = (_rescale(_statistic(inputs, name)) for name in ("max", "std", "share"))
    return _non_negative(greatest + spread + share)


@distributions.register("max_preserving", requires=(GRADIENTS,))
def max_preserving(inputs: MarginalInputs) -> Tensor:
    """Softmax of the channels' greatest weight-level scores."""
    return torch.softmax(_statistic(inputs, "max"), dim=0)


@distributions.register("diversity_aware", requires=(GRADIENTS,))
def diversity_aware(inputs: MarginalInputs) -> Tensor:
    """In proportion to spread plus share of important weights, each rescaled to [0, 1]."""
    return _non_negative(_rescale(_statistic(inputs, "std")) + _rescale(_statistic(inputs, "share")))


@distributions.register("radical")
def radical(inputs: MarginalInputs) -> Tensor:
    """Kept channels weigh n/k times more than the others; uniform where all or none are kept."""
    kept = int(inputs.is_kept.sum())
    weight = len(inputs.is_kept) / kept if kept else 1.0
    return torch.where(inputs.is_kept, torch.tensor(weight, dtype=torch.float64), 1.0)


@distributions.register("entropy_regularized")
def entropy_regularized(inputs: MarginalInputs) -> Tensor:
    """Softmax of the scores plus 0.1 × the entropy term `−p ln p` of a first softmax p."""
    scores = standardize(inputs.importance.double())
    first = torch.softmax(scores, dim=0)
    return torch.softmax(scores + _ENTROPY_WEIGHT * torch.special.entr(first), dim=0)


@distributions.register("adaptive")
def adaptive(inputs: MarginalInputs) -> Tensor:
    """Softmax at a temperature of 1 + the spread of the scores, so that wide scores do not starve most channels."""
    scores = inputs.importance.double()
    return torch.softmax(scores / (1 + scores.std(correction=0)), dim=0)


@distributions.register("robust")
def robust(inputs: MarginalInputs) -> Tensor:
    """Softmax over ranks scaled to [0, 1]: outliers count no more than their place."""
    k = len(inputs.importance)
    ranks = torch.empty(k, dtype=torch.float64, device=inputs.importance.device)
    order = torch.argsort(inputs.importance, stable=True)
    ranks[order] = torch.arange(k, dtype=torch.float64, device=ranks.device)
    return torch.softmax(ranks / max(k - 1, 1), dim=0)


def marginal(name: str | Distribution | Entry, inputs: MarginalInputs) -> Tensor:
    """Evaluate a distribution and make it sum to 1.

    Args:
        name: A registered name or a function `MarginalInputs -> (k,)`.
        inputs: Statistics of the channels that the mass is spread over.

    Returns:
        Probability vector `(k,)`, float64.

    Raises:
        ShapeError: If the result has another shape.
        NumericalError: If a score is NaN or infinite, a mass is negative, NaN or infinite, or all masses are zero.
    """
    entry = distributions.entry(name)
    for label, scores in (("importance", inputs.importance), *inputs.statistics.items()):
        if not torch.isfinite(scores).all():
            raise NumericalError(
                f"The scores {label!r} that the distribution {entry.name!r} shall read are NaN or infinite. Check the "
                "weights and gradients of this layer, or load the model in float32."
            )
    mass = entry.function(inputs)
    k = len(inputs.importance)
    mass = returned_tensor(mass, (k,), f"The distribution {entry.name!r}", f"one number per channel, shape {(k,)}")
    mass = mass.to(inputs.importance.device).double()
    if not torch.isfinite(mass).all() or (mass < 0).any() or mass.sum() <= 0:
        raise NumericalError(
            f"The distribution {entry.name!r} returned negative, NaN, infinite or only zero masses. A mass must be "
            "finite and non-negative; check the scores that it was given."
        )
    return mass / mass.sum()


def _weighted(weights: Mapping[str, float]) -> Mixture:
    def mixture(statistics: Mapping[str, Tensor]) -> Tensor:
        missing = [name for name in weights if name not in statistics]
        if missing:
            raise ShapeError(unknown_name("weight-level statistic", missing[0], statistics))
        return torch.stack([weight * statistics[name] for name, weight in weights.items()]).sum(dim=0)

    mixture.__doc__ = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items()) + "."
    return mixture


_ALL = ("mean", "max", "std", "p95", "consistency", "structural", "mutual_information", "share")
for _name, _weights in {
    "comprehensive": dict.fromkeys(_ALL, 1 / len(_ALL)),
    "conservative": {"max": 0.4, "consistency": 0.3, "p95": 0.3},
    "balanced": {"max": 0.4, "mean": 0.3, "structural": 0.3},
    "aggressive": {"mean": 0.3, "structural": 0.4, "mutual_information": 0.3},
}.items():
    mixtures.register(_name, requires=(GRADIENTS,))(_weighted(_weights))
