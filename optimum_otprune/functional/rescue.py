"""How much of what was pruned is still there, and what the kept channels gave up for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_otprune.functional.ratios import RescueEnergies


def rescue_energies(
    outputs: Tensor,
    hidden: Tensor,
    compressed: Sequence[tuple[Tensor, Tensor | None]],
    down: Tensor,
    kept_channels: Tensor,
    token_weights: Tensor,
) -> list[RescueEnergies]:
    """Measure one batch of held-out tokens of one layer, each token with the weight that it has in the layer's fit.

    Other weights would mislead: a few tokens with massive activations, which hardly count in the fit, would decide the
    sums.

    Args:
        outputs: The dense layer's outputs, `(num_tokens, hidden_size)`.
        hidden: The dense layer's channel activations, `(num_tokens, intermediate_size)`.
        compressed: For each compressed layer its outputs `(num_tokens, hidden_size)` and its channel activations
            `(num_tokens, kept_size)`, or None where these are the kept channels' dense activations.
        down: The dense down projection, `(hidden_size, intermediate_size)`.
        kept_channels: The channels that stay, LongTensor `(kept_size,)`.
        token_weights: What each token counts, `(num_tokens,)`.

    Returns:
        The energies of each compressed layer, in the order of `compressed`.
    """
    is_pruned = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    is_pruned[kept_channels] = False
    pruned = hidden[:, is_pruned] @ down[:, is_pruned].T  # (num_tokens, hidden_size)
    norms = down[:, kept_channels].double().square().sum(dim=0)  # (kept_size,)
    kept = hidden[:, kept_channels]

    counts = token_weights[:, None]  # (num_tokens, 1)

    def energy(tensor: Tensor) -> float:
        return float(tensor.square().mul_(counts).sum(dtype=torch.float64))

    def channel_energy(tensor: Tensor) -> float:
        return float(tensor.square().mul_(counts).sum(dim=0, dtype=torch.float64) @ norms)

    of_dense = {"output": energy(outputs), "pruned": energy(pruned), "kept": channel_energy(kept)}
    return [
        RescueEnergies(
            **of_dense,
            error=energy(outputs - compressed_outputs),
            shift=0.0 if activations is None else channel_energy(activations - kept),
        )
        for compressed_outputs, activations in compressed
    ]


def transported_mass(transport_plan: Tensor, source_marginal: Tensor, pruned_channels: Tensor) -> float:
    """Return the share of the pruned channels' mass that the plan moved; 1 if no channel was pruned.

    Args:
        transport_plan: A plan over all channels, `(intermediate_size, kept_size)`.
        source_marginal: The mass of each channel, `(intermediate_size,)`.
        pruned_channels: The removed channels, LongTensor `(pruned_size,)`.
    """
    mass = float(source_marginal[pruned_channels].sum())
    return float(transport_plan[pruned_channels].sum()) / mass if mass > 0 else 1.0


def self_share(fusion_map: Tensor, kept_channels: Tensor) -> float:
    """Return the mean share of a kept channel's incoming weight that comes from itself: 1 if none is fused.

    Args:
        fusion_map: The inward map, `(kept_size, intermediate_size)`.
        kept_channels: The channels that stay, LongTensor `(kept_size,)`.
    """
    own = fusion_map[torch.arange(len(kept_channels)), kept_channels].abs()
    total = fusion_map.abs().sum(dim=1)
    return float((own / torch.where(total > 0, total, 1.0)).mean())
