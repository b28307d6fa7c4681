"""Local optimization of one FFN on its own output error: Adam, minibatches of tokens, held-out early stopping.

No labels and no pass through the model: the targets are what the layer should put out. The best weights on held-out
tokens are kept, those of the start included, so that a layer never gets worse on them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.ffn import FFNWeights, ffn_forward

_CHECKS = 20  # held-out evaluations over the whole schedule
_WARM_UP = 0.05  # of the steps
_BLOCK = 4096  # tokens of an evaluation at a time


class TokenSet(NamedTuple):
    """Inputs of an FFN and what it should put out, on any device: they are moved to the FFN's a few at a time.

    Attributes:
        inputs: `(num_tokens, hidden_size)`.
        targets: `(num_tokens, hidden_size)`.
        weights: What each token's error counts, `(num_tokens,)`.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class ReconstructionSettings(NamedTuple):
    """How long and how fast.

    Attributes:
        steps: Adam steps.
        learning_rate: At its peak, in units of the root mean square of each weight matrix.
        batch_tokens: Tokens of a minibatch.
        mixed_precision: Whether steps multiply in bfloat16; weights, their updates and errors stay float32, and so
            does the choice of what is kept. None: on a GPU.
    """

    steps: int
    learning_rate: float = 0.03
    batch_tokens: int = 1024
    mixed_precision: bool | None = None


class Share(NamedTuple):
    """Which of the tokens are here, where several processes train the same FFN together.

    Attributes:
        start: Number of the first of the fitted tokens that is here.
        total: Fitted tokens of all processes.
        summed: Sums a tensor over all processes.
    """

    start: int
    total: int
    summed: Callable[[Tensor], Tensor]


class Reconstruction(NamedTuple):
    """What came of it.

    Attributes:
        weights: The best on the held-out tokens.
        heldout_error_before: Mean squared output error per token before.
        heldout_error_after: The same of `weights`.
        best_step: At which it was found; 0 is the start.
    """

    weights: FFNWeights
    heldout_error_before: float
    heldout_error_after: float
    best_step: int


@torch.no_grad()
def output_error(
    weights: FFNWeights,
    tokens: TokenSet,
    activation: Callable[[Tensor], Tensor],
    metric: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Weighted mean of the tokens' squared output errors, summed in float64 over blocks of tokens.

    Args:
        weights: The FFN.
        tokens: Inputs, targets and weights.
        activation: Elementwise.
        metric: Applied to the errors before they are squared, `(hidden_size, hidden_size)`; None is the identity.
        summed: See `Share`.
    """
    total = 0.0
    for block in zip(*(part.split(_BLOCK) for part in tokens)):
        inputs, targets, counts = (part.to(weights.up.device) for part in block)
        errors = _squared_errors(ffn_forward(weights, inputs, activation), targets, metric)
        total += float((errors * counts).double().sum())
    sums = torch.tensor([total, float(tokens.weights.double().sum())], dtype=torch.float64)
    error, count = (sums if summed is None else summed(sums)).tolist()
    return error / count


def _squared_errors(outputs: Tensor, targets: Tensor, metric: Tensor | None) -> Tensor:
    errors = outputs - targets
    return (errors if metric is None else errors @ metric).square().sum(dim=1)


def reconstruct(
    weights: FFNWeights,
    fit: TokenSet,
    heldout: TokenSet,
    activation: Callable[[Tensor], Tensor],
    settings: ReconstructionSettings,
    generator: torch.Generator | None = None,
    metric: Tensor | None = None,
    share: Share | None = None,
) -> Reconstruction:
    """Train all projections of an FFN on its output error.

    The learning rate warms up over a twentieth of the steps and falls to zero along a cosine; it is relative to each
    matrix, so that scaling a layer changes nothing.

    Args:
        weights: Where to start, float32.
        fit: Tokens to train on.
        heldout: Tokens that decide which weights are kept.
        activation: Elementwise, differentiable.
        settings: How long and how fast.
        generator: Of the minibatches, on the CPU.
        metric: See `output_error`.
        share: Of the tokens, where other processes have more of them; all of them take the same steps.

    Returns:
        The best weights on the held-out tokens, and their error.

    Raises:
        NumericalError: If the error of the start is not finite.
    """
    share = share or Share(0, len(fit.inputs), lambda tensor: tensor)
    before = output_error(weights, heldout, activation, metric, share.summed)
    best = Reconstruction(weights, before, before, best_step=0)
    if not math.isfinite(before):
        raise NumericalError("the FFN's held-out error is NaN or infinite before reconstruction.")
    scaled = _ScaledWeights(weights)
    rate = settings.learning_rate
    optimizer = torch.optim.Adam(scaled.parameters, lr=rate, betas=(0.9, 0.95))
    schedule = OneCycleLR(optimizer, rate, settings.steps + 1, pct_start=_WARM_UP, cycle_momentum=False)
    energy = share.summed((fit.targets.square().sum(dim=1) * fit.weights).sum()) / share.total
    every, device = max(1, settings.steps // _CHECKS), weights.up.device
    energy = energy.clamp_min(torch.finfo(energy.dtype).tiny).to(device)
    is_mixed = settings.mixed_precision if settings.mixed_precision is not None else device.type == "cuda"
    for step in range(1, settings.steps + 1):
        inputs, targets, counts = _minibatch(fit, share, settings.batch_tokens, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            outputs = ffn_forward(scaled.weights(), inputs, activation).float()
        error = (_squared_errors(outputs, targets, metric) * counts).sum() / settings.batch_tokens
        optimizer.zero_grad()
        (error / energy).backward()
        scaled.sum_gradients(share.summed)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == settings.steps:
            current = scaled.weights().map(Tensor.detach)
            after = output_error(current, heldout, activation, metric, share.summed)
            if after < best.heldout_error_after:
                best = Reconstruction(current, before, after, step)
    return best


def _minibatch(
    fit: TokenSet, share: Share, size: int, generator: torch.Generator | None, device: torch.device
) -> TokenSet:
    """Those of `size` tokens, drawn from the tokens of all processes, that are here."""
    chosen = torch.randint(share.total, (size,), generator=generator) - share.start
    chosen = chosen[(chosen >= 0) & (chosen < len(fit.inputs))]
    return TokenSet(*(part[chosen.to(part.device)].to(device) for part in fit))


class _ScaledWeights:
    """Weights as scale × trained tensor, so that one learning rate suits matrices of any size."""

    def __init__(self, weights: FFNWeights):
        self._start = weights
        self._scales = {
            name: part.square().mean().sqrt().clamp_min(torch.finfo(part.dtype).tiny)
            for name, part in weights._asdict().items()
            if part is not None
        }
        for name in self._scales:
            if name.endswith("_bias"):  # may start at zero: it takes the scale of the matrix that it goes with
                self._scales[name] = torch.maximum(self._scales[name], self._scales[name.removesuffix("_bias")])
        self._trained = {
            name: (getattr(weights, name) / scale).detach().requires_grad_() for name, scale in self._scales.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""
        return list(self._trained.values())

    def sum_gradients(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Put the gradients' sums in their place."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad = summed(parameter.grad)

    def weights(self) -> FFNWeights:
        """The FFN as it is now, differentiable."""
        return self._start._replace(**{name: part * self._scales[name] for name, part in self._trained.items()})
