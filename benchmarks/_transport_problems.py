"""Transport problems of the kinds that pruning poses, and harder ones: n channels to n / 2 kept ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.costs import CostInputs, activation_cost
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.marginals import MarginalInputs, marginal

_CLUSTER = 8  # channels that resemble each other, in the clustered kinds
_TOKENS = 4  # times the channels, but not more than:
_MOST_TOKENS = 4096
_HIDDEN = 256  # at most; a quarter of the channels otherwise

COSTS = ("weight", "weight_l2", "activation", "uniform", "weight-clustered", "activation-clustered")
MARGINALS = ("uniform", "importance", "lognormal")
PRUNING_COSTS, PRUNING_MARGINALS = ("weight", "weight_l2", "activation"), ("uniform", "importance")


class Problem(NamedTuple):
    """A cost `(n, n / 2)` and its marginals, float64."""

    cost: Tensor
    source: Tensor
    target: Tensor


def make_problem(cost: str, marginals: str, n: int, seed: int = 0) -> Problem:
    """Return a problem whose kept channels are the most important ones, as in the reference method.

    Args:
        cost: One of `COSTS`: the package's costs of random channels, of channels in clusters of eight, or numbers
            drawn evenly from 0 to 1.
        marginals: One of `MARGINALS`: even, those of the reference method, or drawn from a log-normal distribution.
        n: Channels.
        seed: Of everything random.
    """
    random = torch.Generator().manual_seed(seed)
    importance = torch.randn(n, generator=random)
    kept = importance.topk(n // 2).indices.sort().values
    matrix = _cost_matrix(cost, kept, n, random)
    if marginals == "lognormal":
        source, target = (torch.randn(size, generator=random).double().exp() for size in (n, n // 2))
        return Problem(matrix, source / source.sum(), target / target.sum())
    is_kept = torch.zeros(n, dtype=torch.bool).index_fill_(0, kept, True)
    inputs = MarginalInputs(importance, is_kept, {})
    names = ("uniform", "uniform") if marginals == "uniform" else ("entropy_regularized", "adaptive")
    return Problem(matrix, marginal(names[0], inputs), marginal(names[1], inputs.select(kept)))


def _cost_matrix(cost: str, kept: Tensor, n: int, random: torch.Generator) -> Tensor:
    if cost == "uniform":
        return torch.rand(n, len(kept), generator=random, dtype=torch.float64)
    hidden = max(16, min(n // 4, _HIDDEN))
    weights = [torch.randn(n, hidden, generator=random) for _ in range(3)]
    if cost.endswith("-clustered"):
        cluster = torch.randint(max(n // _CLUSTER, 1), (n,), generator=random)
        weights = [torch.randn(n, hidden, generator=random)[cluster] + 0.5 * noise for noise in weights]
    if cost.startswith("weight"):
        vectors = torch.nn.functional.normalize(torch.cat(weights, dim=1), dim=1)
        return torch.cdist(vectors, vectors[kept], p=2.0 if cost == "weight_l2" else 1.0).double()
    tokens = torch.randn(min(_TOKENS * n, _MOST_TOKENS), hidden, generator=random) / hidden**0.5
    scale = (0.5 * torch.randn(2, n, generator=random)).exp()
    activations = torch.nn.functional.silu(tokens @ weights[0].T) * (tokens @ weights[1].T) * scale[0]
    ffn = FFNWeights(up=weights[1], down=(weights[2] * scale[1][:, None]).T, gate=weights[0])
    return activation_cost(CostInputs(ffn, activations.T @ activations, len(tokens)), kept).matrix
