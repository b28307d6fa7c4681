"""Importance of FFN channels: one score per channel from weights, activations and gradients."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from optimum_otprune.errors import ShapeError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.references import FLAP, SNIP, WANDA
from optimum_otprune.functional.registry import ACTIVATIONS, GRADIENTS, Entry, Registry
from optimum_otprune.functional.returned import check_finite, returned_tensor


class WeightScores(NamedTuple):
    """One score per weight, channel-first.

    Attributes:
        up: Scores of the up projection, `(intermediate_size, hidden_size)`.
        down: Scores of the down projection, `(intermediate_size, hidden_size)`, transposed, so that every row belongs
            to one channel.
        gate: Scores of the gate projection, `(intermediate_size, hidden_size)`, or None without one.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None

    def matrices(self) -> list[Tensor]:
        """The matrices that are there, gate first."""
        return [matrix for matrix in (self.gate, self.up, self.down) if matrix is not None]


class ChannelStatistics(NamedTuple):
    """What a calibration pass leaves behind of one layer; an importance function reads what it needs.

    Attributes:
        weights: The weights of the FFN.
        hidden_mean: Mean activation of each channel `(intermediate_size,)`, or None if not collected.
        hidden_second_moment: Mean squared activation `(intermediate_size,)`, or None.
        num_tokens: Tokens behind both.
        snip: Weight × gradient of the language-model loss, or None if not collected.
        fo: Weight × gradient of the mean singular values of all modules' outputs, or None.
        aggregation: `"absolute"` or `"signed"`: how weight scores are summed.
        generator: Source of randomness.
    """

    weights: FFNWeights
    hidden_mean: Tensor | None = None
    hidden_second_moment: Tensor | None = None
    num_tokens: int = 0
    snip: WeightScores | None = None
    fo: WeightScores | None = None
    aggregation: str = "absolute"
    generator: torch.Generator | None = None


_T = TypeVar("_T")

Importance = Callable[[ChannelStatistics], Tensor]

importances: Registry[Importance] = Registry("importance")
"""Functions `ChannelStatistics -> (intermediate_size,)` by name; channels with the highest values are kept."""


def standardize(scores: Tensor) -> Tensor:
    """Shift and scale to zero mean and unit variance (of the population); constant scores become zeros.

    Example:
        >>> standardize(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """
    values = scores.double()
    centred = values - values.mean()
    spread = centred.square().mean().sqrt()
    # Rounding of the mean leaves constants a spread of some ulps. NaN is no constant: it must come out as NaN.
    constant = spread <= 4 * torch.finfo(torch.float64).eps * values.abs().max()
    result = torch.zeros_like(values) if constant else centred / spread
    return result if scores.dtype == torch.float64 else result.float()


def aggregate(scores: WeightScores, aggregation: str) -> Tensor:
    """Sum the scores of a channel's gate row, up row and down column.

    Args:
        scores: The scores of one layer.
        aggregation: `"absolute"` sums magnitudes. `"signed"` sums the values, as the reference does: they cancel, and
            the result selects no better than chance (kept for fidelity).

    Returns:
        `(intermediate_size,)`.
    """
    matrices = scores.matrices()
    if aggregation == "absolute":
        matrices = [matrix.abs() for matrix in matrices]
    return torch.stack([matrix.float().sum(dim=1) for matrix in matrices]).sum(dim=0)


def _required(value: _T | None, name: str, importance: str) -> _T:
    if value is None:
        raise ShapeError(f"The importance {importance!r} needs `{name}`, which this calibration pass did not collect.")
    return value


@importances.register("random", reads=())
def random(statistics: ChannelStatistics) -> Tensor:
    """Uniform random numbers: the baseline that every importance must beat."""
    n = statistics.weights.intermediate_size
    return torch.rand(n, generator=statistics.generator).to(statistics.weights.up.device)


@importances.register("magnitude", reads=("aggregation",))
def magnitude(statistics: ChannelStatistics) -> Tensor:
    """Sum of the channel's weights, in magnitude or signed."""
    weights = statistics.weights
    return aggregate(WeightScores(weights.up, weights.down.T, weights.gate), statistics.aggregation)


@importances.register("wanda", reference=WANDA, requires=(ACTIVATIONS,), reads=())
def wanda(statistics: ChannelStatistics) -> Tensor:
    """Sum of `|W_d[:, j]|` times the root mean square activation of j: Wanda (Sun et al., 2024) by columns."""
    second_moment = _required(statistics.hidden_second_moment, "hidden_second_moment", "wanda")
    return statistics.weights.down.float().abs().sum(dim=0) * second_moment.float().sqrt()


@importances.register("fluctuation", reference=FLAP, requires=(ACTIVATIONS,), reads=())
def fluctuation(statistics: ChannelStatistics) -> Tensor:
    """Variance of the activation times `‖w_j‖²`: the loss when a constant stands in for j (FLAP, An et al., 2024)."""
    second_moment = _required(statistics.hidden_second_moment, "hidden_second_moment", "fluctuation")
    mean = _required(statistics.hidden_mean, "hidden_mean", "fluctuation")
    variance = (second_moment.double() - mean.double().square()).clamp_min(0)
    return (statistics.weights.down.double().square().sum(dim=0) * variance).float()


@importances.register("snip", reference=SNIP, requires=(GRADIENTS,), reads=("aggregation",))
def snip(statistics: ChannelStatistics) -> Tensor:
    """Sum of weight × gradient of the language-model loss (SNIP, Lee et al., 2019)."""
    return aggregate(_required(statistics.snip, "snip", "snip"), statistics.aggregation)


@importances.register("fo", requires=(GRADIENTS,), reads=("aggregation",))
def fo(statistics: ChannelStatistics) -> Tensor:
    """Sum of weight × gradient of the summed mean singular values of all modules' outputs (FO)."""
    return aggregate(_required(statistics.fo, "fo", "fo"), statistics.aggregation)


@importances.register("fo_snip", reference=SNIP, requires=(GRADIENTS,), reads=("aggregation",))
def fo_snip(statistics: ChannelStatistics) -> Tensor:
    """FO and SNIP, each standardized over the layer, added."""
    return standardize(fo(statistics)) + standardize(snip(statistics))


def channel_importance(name: str | Importance | Entry, statistics: ChannelStatistics) -> Tensor:
    """Evaluate an importance and check what it returned.

    Args:
        name: A registered name or a function `ChannelStatistics -> (intermediate_size,)`.
        statistics: The statistics of one layer.

    Returns:
        `(intermediate_size,)` on the device of the weights.

    Raises:
        ShapeError: If the result has another shape.
        NumericalError: If a score is NaN or infinite.
    """
    entry = importances.entry(name)
    n, what = statistics.weights.intermediate_size, f"The importance {entry.name!r}"
    found = entry.function(statistics)
    importance = returned_tensor(found, (n,), what, f"one score per channel, shape {(n,)}")
    check_finite(importance, what, "Check the activations and gradients of this layer, or load the model in float32.")
    return importance.to(statistics.weights.up.device)


def weight_level_statistics(scores: WeightScores) -> dict[str, Tensor]:
    """Return the eight statistics of each channel's weight scores.

    Args:
        scores: Signed scores of one layer; a channel has a `matrices × hidden_size` block.

    Returns:
        By name, `(intermediate_size,)` each: `mean`, `max`, `std`, `p95` (95th percentile), `consistency` (minus the
        standard deviation of the matrices' sums), `structural` (largest singular value of the channel's block),
        `mutual_information` (mean absolute correlation with the other channels) and `share` (of scores above the
        layer's mean + one standard deviation).
    """
    matrices = [matrix.float() for matrix in scores.matrices()]
    blocks = torch.stack(matrices, dim=1)  # (intermediate_size, matrices, hidden_size)
    flat = blocks.flatten(start_dim=1)  # (intermediate_size, matrices · hidden_size)
    n = flat.shape[0]
    centred = torch.nn.functional.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)
    correlation = (centred @ centred.T).abs()
    others = correlation.sum(dim=1) - correlation.diagonal()
    return {
        "mean": flat.mean(dim=1),
        "max": flat.amax(dim=1),
        "std": flat.std(dim=1, correction=0),
        "p95": torch.quantile(flat, 0.95, dim=1),
        "consistency": -blocks.sum(dim=2).std(dim=1, correction=0),
        "structural": torch.linalg.matrix_norm(blocks, ord=2),
        "mutual_information": others / max(n - 1, 1),
        "share": (flat > flat.mean() + flat.std(correction=0)).float().mean(dim=1),
    }


def combined_statistics(snip_scores: WeightScores, fo_scores: WeightScores) -> dict[str, Tensor]:
    """Weight-level statistics of SNIP and FO, each standardized over the layer, added name by name."""
    of_snip, of_fo = weight_level_statistics(snip_scores), weight_level_statistics(fo_scores)
    return {name: standardize(of_snip[name]) + standardize(of_fo[name]) for name in of_snip}
