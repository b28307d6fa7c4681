"""From a transport plan to fusion maps, and their application: `W_fused = map @ W`."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import ShapeError, TransportError
from optimum_otprune.functional.ffn import FFNWeights


class FusionMaps(NamedTuple):
    """Two maps from all channels to the kept ones, `(kept_size, intermediate_size)` float64 each.

    Attributes:
        inward: The map for gate and up, `W_fused = inward @ W`; None where they are not fused.
        outward: The map for down, `W_fused = W @ outward.T`.
    """

    inward: Tensor | None
    outward: Tensor


def barycentric_projection(transport_plan: Tensor) -> Tensor:
    """Return the map whose incoming weights sum to 1 for each kept channel: an average, right for gate and up.

    Args:
        transport_plan: A plan over all channels, `(intermediate_size, kept_size)`, non-negative.

    Returns:
        The fusion map `(kept_size, intermediate_size)`, in which every row sums to 1.

    Raises:
        TransportError: If a kept channel receives no mass.

    Example:
        >>> barycentric_projection(torch.tensor([[0.2, 0.0], [0.2, 0.0], [0.0, 0.6]]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    return (transport_plan / _received(transport_plan)).T


def _received(transport_plan: Tensor) -> Tensor:
    """Return the mass that each kept channel receives, `(kept_size,)`; raise where one receives none."""
    received = transport_plan.sum(dim=0)
    if (received <= 0).any():
        empty = torch.nonzero(received <= 0).flatten().tolist()
        raise TransportError(
            f"{len(empty)} of {len(received)} kept channels receive no mass (first: {empty[:5]}). Their fused weights "
            "would be 0 / 0. Check that the target marginal is positive everywhere, or raise `epsilon` if the "
            "entropic solver underflowed."
        )
    return received


def mass_projection(transport_plan: Tensor, source_marginal: Tensor | None = None) -> Tensor:
    """Return the map that hands on each channel in full: columns sum to 1, right for down.

    Args:
        transport_plan: A plan over all channels, `(intermediate_size, kept_size)`, non-negative.
        source_marginal: The mass that each channel had, `(intermediate_size,)`. With it, what a partial or unbalanced
            plan left behind stays behind; without it every channel counts as handed on in full.

    Returns:
        The fusion map `(kept_size, intermediate_size)`.

    Raises:
        TransportError: If a channel sends no mass and no marginal is given.

    Example:
        >>> mass_projection(torch.tensor([[0.2, 0.0], [0.1, 0.1], [0.0, 0.6]]))
        tensor([[1.0000, 0.5000, 0.0000],
                [0.0000, 0.5000, 1.0000]])
    """
    if source_marginal is None:
        sent = transport_plan.sum(dim=1)  # (intermediate_size,)
        if (sent <= 0).any():
            empty = torch.nonzero(sent <= 0).flatten().tolist()
            raise TransportError(
                f"{len(empty)} of {len(sent)} channels send no mass (first: {empty[:5]}), so their share is 0 / 0. "
                "Check that the source marginal is positive everywhere, or give `source_marginal` to leave them "
                "behind."
            )
    else:
        sent = torch.where(source_marginal > 0, source_marginal, 1.0)
    return (transport_plan / sent[:, None]).T


def with_identity(
    transport_plan: Tensor, kept_channels: Tensor, pruned_channels: Tensor, shares: tuple[float, float]
) -> Tensor:
    """Return a plan over all channels in which kept channels keep their own mass.

    Args:
        transport_plan: A plan for the pruned channels only, `(pruned_size, kept_size)`, of a total mass of at most 1.
        kept_channels: The channels that stay, LongTensor `(kept_size,)`.
        pruned_channels: The channels that are removed, LongTensor `(pruned_size,)`.
        shares: The mass of all kept channels together, and that of all pruned ones.

    Returns:
        The plan over all channels, `(intermediate_size, kept_size)`.
    """
    kept_share, pruned_share = shares
    m = len(kept_channels)
    plan = transport_plan.new_zeros(m + len(pruned_channels), m)
    plan[kept_channels, torch.arange(m)] = kept_share / m
    plan[pruned_channels] = transport_plan * pruned_share
    return plan


def fusion_maps(
    transport_plan: Tensor,
    normalization: str,
    gain: Tensor | None = None,
    source_marginal: Tensor | None = None,
    inward: bool = True,
) -> FusionMaps:
    """Turn a plan over all channels into the two fusion maps.

    Barycentric inwards and mass-preserving outwards is the only pair that leaves a network of duplicated channels as
    it was. `"source"` divides both by the source sums, as the reference is coded: fused gate and up rows are then
    sums, not averages, of about n/m channels, and the layer's output is far too large.

    Args:
        transport_plan: A plan over all channels, `(intermediate_size, kept_size)`.
        normalization: `"identity"` or `"corrected"` (barycentric and mass-preserving), or `"source"`.
        gain: Factors for the entries of the outward map, `(intermediate_size, kept_size)`, or None for 1.
        source_marginal: The mass that each channel had, `(intermediate_size,)`; see `mass_projection`.
        inward: Whether to make the inward map, too; each map takes as much memory as the plan.

    Raises:
        TransportError: If a channel that is to be divided by receives, or sends, no mass.
    """
    outward = mass_projection(transport_plan, source_marginal)
    inward_map = outward.clone() if inward and normalization == "source" else None
    if normalization != "source":
        _received(transport_plan)
        inward_map = barycentric_projection(transport_plan) if inward else None
    return FusionMaps(inward_map, outward if gain is None else outward.mul_(gain.T))


def selection_map(kept_channels: Tensor, intermediate_size: int) -> Tensor:
    """Return the map that only selects, `(kept_size, intermediate_size)` float64: plain dropping.

    Args:
        kept_channels: The channels to select, LongTensor `(kept_size,)`.
        intermediate_size: Number of channels before selection.
    """
    selected = torch.zeros(len(kept_channels), intermediate_size, dtype=torch.float64)
    return selected.scatter_(1, kept_channels.cpu()[:, None], 1.0)


def fuse(weights: FFNWeights, maps: FusionMaps, kept_channels: Tensor, projections: Collection[str]) -> FFNWeights:
    """Apply the maps to some projections, and select the kept channels of the others.

    Args:
        weights: The weights of the dense FFN, channel-first.
        maps: The two maps that `fusion_maps` returns.
        kept_channels: The channels that stay, LongTensor `(kept_size,)`.
        projections: The names of the projections to fuse, out of `"gate"`, `"up"` and `"down"`.

    Returns:
        The weights of the fused FFN, in the dtype and on the device of `weights`; `down_bias` is unchanged.

    Raises:
        ShapeError: If a map does not fit the weights.
    """
    n, m = weights.intermediate_size, len(kept_channels)
    for fusion_map in maps:
        if fusion_map is not None and fusion_map.shape != (m, n):
            raise ShapeError(f"A fusion map has shape {tuple(fusion_map.shape)}; want (kept, all) = {(m, n)}.")
    fused = weights.select(kept_channels)._asdict()
    for name in projections:
        chosen = maps.outward if name == "down" else maps.inward
        assert chosen is not None
        fusion_map = chosen.to(weights.up.device)
        for part in (name, f"{name}_bias"):
            tensor = getattr(weights, part)
            if tensor is None or part == "down_bias":
                continue
            product = tensor.double() @ fusion_map.T if name == "down" else fusion_map @ tensor.double()
            fused[part] = product.to(tensor.dtype)
    return FFNWeights(**fused)
