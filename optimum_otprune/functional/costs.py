"""What it costs to let a kept channel stand in for another: transport costs, and gains where there are any."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from optimum_otprune.errors import NumericalError, ShapeError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.references import INTRA_FUSION
from optimum_otprune.functional.registry import ACTIVATIONS, Entry, Registry
from optimum_otprune.functional.returned import returned_tensor

_BLOCK_ROWS = 512
_CHANCE_LEVEL = 6.0  # gains below about this many times ln(n) / T in squared correlation are taken for chance


class CostInputs(NamedTuple):
    """What a cost function is given of one layer.

    Attributes:
        weights: The FFN before pruning.
        gram: Σ h hᵀ `(intermediate_size, intermediate_size)` of the channel activations, or None.
        num_tokens: Tokens summed in `gram`.
    """

    weights: FFNWeights
    gram: Tensor | None = None
    num_tokens: int = 0


class TransportCost(NamedTuple):
    """A transport cost and what a channel is multiplied by when it stands in for another.

    Attributes:
        matrix: `(intermediate_size, kept_size)`, non-negative.
        gain: The same shape, or None for gain 1.
    """

    matrix: Tensor
    gain: Tensor | None = None


CostFunction = Callable[[CostInputs, Tensor], TransportCost]

costs: Registry[CostFunction] = Registry("cost")
"""Functions `(inputs, kept_channels) -> TransportCost` by name; `kept_channels` is a LongTensor `(kept_size,)`."""


@costs.register("activation", requires=(ACTIVATIONS,))
def activation_cost(inputs: CostInputs, kept_channels: Tensor) -> TransportCost:
    """Output energy of channel j that kept channel k cannot explain with its best gain.

    `C_jk = ‖w_j‖² (G_jj − G_jk² / G_kk)`, gain `G_jk / G_kk` with its sign. Gains that chance would produce are
    shrunk by `max(0, 1 − 6 ln n (1 − ρ²) / (T ρ²))`, ρ the channels' correlation over T tokens; the factor 1 − ρ² is
    the share of the energy that is left to chance, so that an exact duplicate stands in with its full gain. A channel
    that is never active explains nothing.
    """
    if inputs.gram is None:
        raise ShapeError("The cost 'activation' needs the Gram matrix of the channel activations; give `gram`.")
    gram = inputs.gram
    n, m = gram.shape[0], len(kept_channels)
    tiny = torch.finfo(torch.float64).tiny
    energy = gram.diagonal().double()
    kept_energy = energy[kept_channels]
    norms = inputs.weights.down.double().square().sum(dim=0)  # (intermediate_size,)
    chance = _CHANCE_LEVEL * math.log(max(n, 2)) / max(inputs.num_tokens, 1)
    matrix = torch.empty(n, m, dtype=torch.float64, device=gram.device)
    gain = torch.empty_like(matrix)
    for start in range(0, n, _BLOCK_ROWS):  # whole matrices in between would be six more of this size
        rows = slice(start, start + _BLOCK_ROWS)
        cross = gram[rows][:, kept_channels].double()  # (rows, kept_size)
        best = torch.where(kept_energy > 0, cross / kept_energy.clamp_min(tiny), 0.0)
        explained = best * cross
        correlation = explained / energy[rows].clamp_min(tiny)[:, None]  # squared
        left = (1 - correlation).clamp_min(0)
        shrink = (1 - chance * left / correlation.clamp_min(tiny)).clamp_min(0)
        matrix[rows] = norms[rows][:, None] * (energy[rows][:, None] - explained).clamp_min(0)
        gain[rows] = best * shrink
    return TransportCost(matrix, gain)


def channel_vectors(weights: FFNWeights) -> Tensor:
    """Return one unit vector per channel: gate row, up row and down column, concatenated.

    Returns:
        `(intermediate_size, 3 · hidden_size)`, or 2 · without a gate; a channel of zeros stays zero.
    """
    parts = [weights.up, weights.down.T] if weights.gate is None else [weights.gate, weights.up, weights.down.T]
    return torch.nn.functional.normalize(torch.cat([part.double() for part in parts], dim=1), dim=1)


@costs.register("weight", reference=INTRA_FUSION)
def weight_cost(inputs: CostInputs, kept_channels: Tensor) -> TransportCost:
    """Sum of absolute differences (p = 1) between the unit weight vectors of two channels."""
    vectors = channel_vectors(inputs.weights)
    return TransportCost(torch.cdist(vectors, vectors[kept_channels], p=1.0))


@costs.register("weight_l2")
def weight_l2_cost(inputs: CostInputs, kept_channels: Tensor) -> TransportCost:
    """Euclidean distance (p = 2) between the unit weight vectors of two channels."""
    vectors = channel_vectors(inputs.weights)
    return TransportCost(
        torch.cdist(vectors, vectors[kept_channels], p=2.0, compute_mode="donot_use_mm_for_euclid_dist")
    )


def transport_cost(name: str | CostFunction | Entry, inputs: CostInputs, kept_channels: Tensor) -> TransportCost:
    """Evaluate a cost and check what it returned.

    Args:
        name: A registered name or a function `(inputs, kept_channels) -> TransportCost` (or a bare matrix).
        inputs: Weights and moments of the layer.
        kept_channels: Indices of the kept channels, LongTensor `(kept_size,)`.

    Raises:
        ShapeError: If matrix or gain is no tensor `(intermediate_size, kept_size)`.
        NumericalError: If an entry is NaN, infinite or negative, or a gain is not finite.
    """
    entry = costs.entry(name)
    result = entry.function(inputs, kept_channels)
    cost = TransportCost(result) if isinstance(result, Tensor) else result
    what, expected = f"The cost {entry.name!r}", (inputs.weights.intermediate_size, len(kept_channels))
    if not isinstance(cost, TransportCost):
        raise ShapeError(f"{what} returned a {type(cost).__name__}; want a tensor of shape {expected}.")
    matrix = returned_tensor(cost.matrix, expected, what).to(kept_channels.device)
    gain = None if cost.gain is None else returned_tensor(cost.gain, expected, f"{what}, as its gain,")
    if not torch.isfinite(matrix).all() or (matrix < 0).any():
        raise NumericalError(
            f"{what} returned NaN, infinite or negative entries, on which no transport can be solved. Check the "
            "weights and the activations of this layer."
        )
    if gain is not None and not all(abs(float(end)) < torch.inf for end in gain.aminmax()):  # NaN is not below
        raise NumericalError(f"{what} returned gains that are NaN or infinite. Check the activations of this layer.")
    return TransportCost(matrix, gain)


_KMEANS_ITERATIONS = 20
# Costs that centroids are compared by: p of the distance between unit weight vectors, the same as in the cost itself.
CENTROID_COSTS: Mapping[str, float] = MappingProxyType({"weight": 1.0, "weight_l2": 2.0})


def centroid_cost(weights: FFNWeights, kept_size: int, seed: int, cost: str) -> tuple[TransportCost, Tensor]:
    """Cluster the channels' unit weight vectors; centroids are what channels are transported to.

    Args:
        weights: The weights of the FFN.
        kept_size: The number of clusters.
        seed: The random seed of k-means++.
        cost: One of `CENTROID_COSTS`.

    Returns:
        Cost `(intermediate_size, kept_size)`, and for each centroid the nearest channel that no other centroid has,
        sorted: LongTensor `(kept_size,)`; columns are in that order.
    """
    vectors = channel_vectors(weights).cpu()
    rng = np.random.default_rng(seed)
    centroids, _ = kmeans2(vectors.numpy(), kept_size, minit="++", iter=_KMEANS_ITERATIONS, rng=rng)
    distance = torch.cdist(vectors, torch.from_numpy(centroids), p=CENTROID_COSTS[cost])
    taken = torch.zeros(len(vectors), dtype=torch.bool)
    representatives = torch.empty(kept_size, dtype=torch.long)
    for column in range(kept_size):
        nearest = torch.where(taken, torch.inf, distance[:, column]).argmin()
        representatives[column], taken[nearest] = nearest, True
    order = torch.argsort(representatives)
    return TransportCost(distance[:, order]), representatives[order].to(weights.up.device)
