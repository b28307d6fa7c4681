"""Rescue and dilution as numbers and in words: plain arithmetic on energies, for which no tensors are needed."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LIMITED, GOOD = 0.2, 0.5  # rescue ratios up to, and from, which the verdict is so

_NOTHING = 1e-12  # of the layer's output energy
_ROUNDING = 1e-5  # float32 sums; plain dropping shall read 0, not −0.0000003


class RescueEnergies(NamedTuple):
    """Sums over held-out calibration tokens, from which both ratios follow; they add up over layers.

    A token counts as where its layer is fitted: by 1 / the squared norm of the hidden state behind the layer, so that
    energies are shares of what the layer adds to, or all tokens alike.

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

    def scaled(self, factor: float) -> "RescueEnergies":
        """Energies of tokens that count `factor` times as much."""
        return RescueEnergies(*(factor * mine for mine in self))


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


def rescued_share(ratio: float) -> str:
    """A rescue ratio as a share, or as a word where a share would say nothing any more.

    Example:
        >>> rescued_share(0.234), rescued_share(-211.794)
        ('23.4%', 'harmful, below -100%')
    """
    return "harmful, below -100%" if ratio < -1 else f"{ratio:.1%}"


def diluted_share(ratio: float) -> str:
    """A dilution ratio in the same way.

    Example:
        >>> diluted_share(0.156), diluted_share(25.0)
        ('15.6%', 'high, above 100%')
    """
    return "high, above 100%" if ratio > 1 else f"{ratio:.1%}"


def rescue_verdict(ratio: float) -> str:
    """How good a rescue ratio is, such as "good (> 50 %)"."""
    if ratio < 0:
        return "harmful (< 0 %): the compressed layers are further from the dense ones than plain dropping"
    return "good (> 50 %)" if ratio > GOOD else "moderate (> 20 %)" if ratio > LIMITED else "limited (<= 20 %)"


def dilution_verdict(ratio: float) -> str:
    """How much a dilution ratio is, such as "low (< 20 %)"."""
    return "low (< 20 %)" if ratio < 0.2 else "moderate (< 50 %)" if ratio < 0.5 else "high (>= 50 %)"


def outliers(ratios: Sequence[float]) -> list[int]:
    """Indices of ratios far from the others: negative where the median is positive, or a long way from the median.

    A long way is more than five times the median distance from the median, and more than 0.25.

    Example:
        >>> outliers([0.6, -80.2, 0.7, 0.5])
        [1]
    """
    if not ratios:
        return []
    middle = statistics.median(ratios)
    far = max(0.25, 5 * statistics.median(abs(ratio - middle) for ratio in ratios))
    return [index for index, ratio in enumerate(ratios) if ratio < 0 < middle or abs(ratio - middle) > far]
