"""How much of what was pruned is still there, and what the kept channels gave up for it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NOTHING = 1e-12  # of the layer's output energy
_ROUNDING = 1e-5  # float32 sums; plain dropping shall read 0, not −0.0000003


class RescueEnergies(NamedTuple):
    """Sums over held-out calibration tokens, from which both ratios follow; they add up over layers.

    Attributes:
        output: Σ ‖y‖² of the dense layer.
        pruned: Σ ‖W_S h_S‖², what the pruned channels contributed.
        error: Σ ‖y − ŷ‖² of the compressed layer.
        kept: Σ_k ‖w_k‖² Σ h_k² over kept channels.
        shift: Σ_k ‖w_k‖² Σ (h'_k − h_k)², how far the kept channels' own activations moved.
    """

    output: float
    pruned: float
    error: float
    kept: float
    shift: float

    def __add__(self, other: "RescueEnergies") -> "RescueEnergies":  # type: ignore[override]
        """Energies of both together."""
        return RescueEnergies(*(mine + theirs for mine, theirs in zip(self, other)))


def rescue_energies(
    outputs: Tensor,
    hidden: Tensor,
    compressed: Sequence[tuple[Tensor, Tensor | None]],
    down: Tensor,
    kept_channels: Tensor,
) -> list[RescueEnergies]:
    """Measure one batch of held-out tokens of one layer.

    Args:
        outputs: Dense outputs `(num_tokens, hidden_size)`.
        hidden: Dense channel activations `(num_tokens, intermediate_size)`.
        compressed: Of each compressed layer the outputs `(num_tokens, hidden_size)`, and its channel activations
            `(num_tokens, kept_size)`, or None where they are those of the kept channels.
        down: Dense down projection `(hidden_size, intermediate_size)`.
        kept_channels: LongTensor `(kept_size,)`.

    Returns:
        One entry for each of `compressed`.
    """
    is_pruned = torch.ones(down.shape[1], dtype=torch.bool, device=down.device)
    is_pruned[kept_channels] = False
    pruned = hidden[:, is_pruned] @ down[:, is_pruned].T  # (num_tokens, hidden_size)
    norms = down[:, kept_channels].double().square().sum(dim=0)  # (kept_size,)
    kept = hidden[:, kept_channels]

    def energy(tensor: Tensor) -> float:
        return float(tensor.square().sum(dtype=torch.float64))

    def channel_energy(tensor: Tensor) -> float:
        return float(tensor.square().sum(dim=0, dtype=torch.float64) @ norms)

    of_dense = {"output": energy(outputs), "pruned": energy(pruned), "kept": channel_energy(kept)}
    return [
        RescueEnergies(
            **of_dense,
            error=energy(outputs - compressed_outputs),
            shift=0.0 if activations is None else channel_energy(activations - kept),
        )
        for compressed_outputs, activations in compressed
    ]


def rescue_ratio(energies: RescueEnergies) -> float:
    """Share of the pruned channels' output energy that the compressed layer still delivers.

    `1 − Σ ‖y − ŷ‖² / Σ ‖W_S h_S‖²`: plain dropping scores 0, a perfect layer 1, a harmful fusion is negative. Where
    the pruned channels contributed nothing, there was nothing to lose: 1 if the output is intact, else 0.

    Example:
        >>> rescue_ratio(RescueEnergies(output=10.0, pruned=4.0, error=1.0, kept=9.0, shift=0.0))
        0.75
    """
    nothing = _NOTHING * energies.output
    if energies.pruned <= nothing:
        return 1.0 if energies.error <= nothing else 0.0
    ratio = 1.0 - energies.error / energies.pruned
    return 0.0 if abs(ratio) < _ROUNDING else ratio


def dilution_ratio(energies: RescueEnergies) -> float:
    """Share of the kept channels' own contribution that was given up: 0 when gate and up are untouched.

    `Σ_k ‖w_k‖² E(h'_k − h_k)² / Σ_k ‖w_k‖² E h_k²`.

    Example:
        >>> dilution_ratio(RescueEnergies(output=10.0, pruned=4.0, error=1.0, kept=9.0, shift=4.5))
        0.5
    """
    return energies.shift / energies.kept if energies.kept > 0 else 0.0


def relative_error(energies: RescueEnergies) -> float:
    """Output error as a share of the dense layer's output energy, `Σ ‖y − ŷ‖² / Σ ‖y‖²`; 0 for a layer without output.

    Example:
        >>> relative_error(RescueEnergies(output=10.0, pruned=4.0, error=1.0, kept=9.0, shift=0.0))
        0.1
    """
    return energies.error / energies.output if energies.output > 0 else 0.0


def pooled(energies: Iterable[RescueEnergies]) -> RescueEnergies:
    """Energies of several layers together, so that a layer counts by what it contributes."""
    return sum(energies, RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0))


def transported_mass(transport_plan: Tensor, source_marginal: Tensor, pruned_channels: Tensor) -> float:
    """Share of the pruned channels' mass that the plan moved.

    Args:
        transport_plan: `(intermediate_size, kept_size)` over all channels.
        source_marginal: `(intermediate_size,)`.
        pruned_channels: LongTensor `(pruned_size,)`; of none, the share is 1.
    """
    mass = float(source_marginal[pruned_channels].sum())
    return float(transport_plan[pruned_channels].sum()) / mass if mass > 0 else 1.0


def self_share(fusion_map: Tensor, kept_channels: Tensor) -> float:
    """Mean share of a kept channel's incoming weight that comes from itself: 1 when kept channels are untouched.

    Args:
        fusion_map: The inward map `(kept_size, intermediate_size)`.
        kept_channels: LongTensor `(kept_size,)`.
    """
    own = fusion_map[torch.arange(len(kept_channels)), kept_channels].abs()
    total = fusion_map.abs().sum(dim=1)
    return float((own / torch.where(total > 0, total, 1.0)).mean())
