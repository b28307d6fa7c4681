"""Rescue and dilution as numbers and in words: plain arithmetic on energies, for which no tensors are needed."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A ratio up to a fifth is little and one above a half is much: words for readers of a card, not laws.
LIMITED, GOOD = 0.2, 0.5
_OUTLYING_MEDIANS, _OUTLYING_LEAST = 5, 0.25  # median distances from the median, and the least that counts as far

_NOTHING = 1e-12  # of the layer's output energy; below it a contribution is rounding
_ROUNDING = 1e-5  # float32 sums; plain dropping shall read 0, not −0.0000003


class RescueEnergies(NamedTuple):
    """Sums over held-out calibration tokens, from which both ratios follow; they add up over layers.

    A token counts as much as in the layer's fit: either 1 / the squared norm of the hidden state behind the layer, so
    that energies are shares of what the layer adds to, or 1.

    Attributes:
        output: The energy of the dense layer's outputs, Σ ‖y‖².
        pruned: The energy of what the pruned channels contributed, Σ ‖W_S h_S‖².
        error: The squared error of the compressed layer's outputs, Σ ‖y − ŷ‖².
        kept: The energy of the kept channels' contributions one by one, Σ_k ‖w_k‖² Σ h_k².
        shift: How far the kept channels' own activations moved, Σ_k ‖w_k‖² Σ (h'_k − h_k)².
    """

    output: float
    pruned: float
    error: float
    kept: float
    shift: float

    def __add__(self, other: tuple[object, ...]) -> "RescueEnergies":
        """Return the energies of both together."""
        assert isinstance(other, RescueEnergies)
        return RescueEnergies(*(mine + theirs for mine, theirs in zip(self, other)))

    def scaled(self, factor: float) -> "RescueEnergies":
        """Return the energies if every token counted `factor` times as much."""
        return RescueEnergies(*(factor * mine for mine in self))


def rescue_ratio(energies: RescueEnergies) -> float:
    """Return the share of the pruned channels' output energy that the compressed layer still delivers.

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
    """Return the share of the kept channels' own contribution that was given up: 0 when gate and up are untouched.

    The formula is `Σ_k ‖w_k‖² E(h'_k − h_k)² / Σ_k ‖w_k‖² E h_k²`.

    Example:
        >>> dilution_ratio(RescueEnergies(output=10.0, pruned=4.0, error=1.0, kept=9.0, shift=4.5))
        0.5
    """
    return energies.shift / energies.kept if energies.kept > 0 else 0.0


def relative_error(energies: RescueEnergies) -> float:
    """Return the output error as a share of the dense layer's output energy; 0 for a layer without output.

    The formula is `Σ ‖y − ŷ‖² / Σ ‖y‖²`.

    Example:
        >>> relative_error(RescueEnergies(output=10.0, pruned=4.0, error=1.0, kept=9.0, shift=0.0))
        0.1
    """
    return energies.error / energies.output if energies.output > 0 else 0.0


def pooled(energies: Iterable[RescueEnergies]) -> RescueEnergies:
    """Return the energies of several layers together, so that a layer counts by what it contributes."""
    return sum(energies, RescueEnergies(0.0, 0.0, 0.0, 0.0, 0.0))


def rescued_share(ratio: float) -> str:
    """Return a rescue ratio as a percentage, or as a word where a percentage would say nothing any more.

    Example:
        >>> rescued_share(0.234), rescued_share(-211.794)
        ('23.4%', 'harmful, below -100%')
    """
    return "harmful, below -100%" if ratio < -1 else f"{ratio:.1%}"


def diluted_share(ratio: float) -> str:
    """Return a dilution ratio as a percentage, or as a word where a percentage would say nothing any more.

    Example:
        >>> diluted_share(0.156), diluted_share(25.0)
        ('15.6%', 'high, above 100%')
    """
    return "high, above 100%" if ratio > 1 else f"{ratio:.1%}"


def rescue_verdict(ratio: float) -> str:
    """Return in words how good a rescue ratio is, such as "good (> 50 %)"."""
    if ratio < 0:
        return "harmful (< 0 %): the compressed layers are further from the dense ones than plain dropping"
    if ratio > GOOD:
        return "good (> 50 %)"
    return "moderate (> 20 %)" if ratio > LIMITED else "limited (<= 20 %)"


def dilution_verdict(ratio: float) -> str:
    """Return in words how large a dilution ratio is, such as "low (< 20 %)"."""
    if ratio < LIMITED:
        return "low (< 20 %)"
    return "moderate (< 50 %)" if ratio < GOOD else "high (>= 50 %)"


def outliers(ratios: Sequence[float]) -> list[int]:
    """Return the indices of ratios far from the others: negative with a positive median, or far from the median.

    Far is more than five times the median distance from the median, and more than 0.25.

    Example:
        >>> outliers([0.6, -80.2, 0.7, 0.5])
        [1]
    """
    if not ratios:
        return []
    middle = statistics.median(ratios)
    typical = statistics.median(abs(ratio - middle) for ratio in ratios)
    far = max(_OUTLYING_LEAST, _OUTLYING_MEDIANS * typical)
    return [index for index, ratio in enumerate(ratios) if ratio < 0 < middle or abs(ratio - middle) > far]
