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
from optimum_otprune.functional.ffn import Activation, FFNWeights, ffn_forward

_CHECKS = 20  # held-out evaluations over the whole schedule: more find a better stop and cost as many forward passes
_WARM_UP = 0.05  # share of the steps in which the learning rate rises
_BETAS = (0.9, 0.95)  # of Adam, as large language models are trained with: a schedule of some hundred steps is too
# short for a longer memory of squared gradients
_BLOCK = 4096  # tokens of an evaluation at a time; bounds its memory


class TokenSet(NamedTuple):
    """Inputs of an FFN and what it should put out, on any device: they are moved to the FFN's a few at a time.

    Attributes:
        inputs: The FFN's inputs, `(num_tokens, hidden_size)`.
        targets: The outputs that it should have, `(num_tokens, hidden_size)`.
        weights: What each token's error counts, `(num_tokens,)`.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class ReconstructionSettings(NamedTuple):
    """How long and how fast an FFN is trained.

    Attributes:
        steps: Number of Adam steps.
        learning_rate: The peak of the learning rate, in units of the root mean square of each weight matrix.
        batch_tokens: Number of tokens of a minibatch.
        mixed_precision: Whether steps multiply in bfloat16; weights, their updates and errors stay float32, and so
            does the choice of what is kept.
    """

    steps: int
    learning_rate: float = 0.03
    batch_tokens: int = 1024
    mixed_precision: bool = False


class Share(NamedTuple):
    """Which of the tokens are here, where several processes train the same FFN together.

    Attributes:
        start: Index of the first token of this process among the fitted tokens of all processes.
        total: Number of fitted tokens of all processes.
        summed: A function that returns the sum of a tensor over all processes.
    """

    start: int
    total: int
    summed: Callable[[Tensor], Tensor]


class TrainingTokens(NamedTuple):
    """The tokens that an FFN is trained and judged on.

    Attributes:
        fit: The tokens to train on.
        heldout: The tokens that decide which weights are kept.
        share: Which of the tokens to train on this process has, if others have more of them; all processes take the
            same steps. None if there is one process.
    """

    fit: TokenSet
    heldout: TokenSet
    share: Share | None = None


class Reconstruction(NamedTuple):
    """The result of a reconstruction.

    Attributes:
        weights: The weights that were best on the held-out tokens.
        heldout_error_before: The mean squared output error per held-out token, before training.
        heldout_error_after: The same error with `weights`.
        best_step: The step after which the best weights were found; 0 is the start.
    """

    weights: FFNWeights
    heldout_error_before: float
    heldout_error_after: float
    best_step: int


@torch.no_grad()
def output_error(
    weights: FFNWeights,
    tokens: TokenSet,
    activation: Activation,
    metric: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Return the weighted mean of the tokens' squared output errors, summed in float64 over blocks of tokens.

    Args:
        weights: The weights of one FFN, channel-first.
        tokens: The inputs, targets and weights of the tokens.
        activation: The FFN's elementwise activation function.
        metric: A matrix `(hidden_size, hidden_size)` that errors are multiplied by before they are squared; None is
            the identity.
        summed: A function that returns the sum of a tensor over all processes; None if there is one process.
    """
    total = 0.0
    for block in zip(*(torch.split(part, _BLOCK) for part in tokens)):
        inputs, targets, counts = (part.to(weights.up.device) for part in block)
        errors = _squared_errors(ffn_forward(weights, inputs, activation), targets, metric)
        total += float((errors * counts).double().sum())
    sums = torch.tensor([total, float(tokens.weights.double().sum())], dtype=torch.float64)
    sums = sums if summed is None else summed(sums)
    return float(sums[0]) / float(sums[1])


def _squared_errors(outputs: Tensor, targets: Tensor, metric: Tensor | None) -> Tensor:
    errors = outputs - targets
    return (errors if metric is None else errors @ metric).square().sum(dim=1)


def reconstruct(
    weights: FFNWeights,
    tokens: TrainingTokens,
    activation: Activation,
    settings: ReconstructionSettings,
    generator: torch.Generator | None = None,
    metric: Tensor | None = None,
) -> Reconstruction:
    """Train all projections of an FFN on its output error.

    The learning rate warms up over a twentieth of the steps and falls to zero along a cosine; it is relative to each
    matrix, so that scaling a layer changes nothing.

    Args:
        weights: The weights to start from, float32.
        tokens: The tokens to train on, and those that decide which weights are kept.
        activation: The FFN's elementwise activation function, which must be differentiable.
        settings: How long and how fast the FFN is trained.
        generator: The random generator that draws minibatches, on the CPU.
        metric: A matrix that errors are multiplied by, as in `output_error`.

    Returns:
        The best weights on the held-out tokens, and their error.

    Raises:
        NumericalError: If the held-out error of the start is not finite.
    """
    fit, heldout, share = tokens
    share = share or Share(0, len(fit.inputs), lambda tensor: tensor)
    before = output_error(weights, heldout, activation, metric, share.summed)
    best = Reconstruction(weights, before, before, best_step=0)
    if not math.isfinite(before):
        raise NumericalError("the FFN's held-out error is NaN or infinite before reconstruction.")
    scaled = _ScaledWeights(weights)
    rate = settings.learning_rate
    optimizer = torch.optim.Adam(scaled.parameters, lr=rate, betas=_BETAS)
    schedule = OneCycleLR(optimizer, rate, settings.steps + 1, pct_start=_WARM_UP, cycle_momentum=False)
    energy = share.summed((fit.targets.square().sum(dim=1) * fit.weights).sum()) / share.total
    every, device = max(1, settings.steps // _CHECKS), weights.up.device
    energy = energy.clamp_min(torch.finfo(energy.dtype).tiny).to(device)
    for step in range(1, settings.steps + 1):
        inputs, targets, counts = _minibatch(fit, share, settings.batch_tokens, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision):
            outputs = ffn_forward(scaled.weights(), inputs, activation).float()
        error = (_squared_errors(outputs, targets, metric) * counts).sum() / settings.batch_tokens
        optimizer.zero_grad()
        torch.autograd.backward(error / energy, inputs=scaled.parameters)  # activations may have parameters, too
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
    """Draw `size` tokens from those of all processes, and return the ones that this process has."""
    chosen = torch.randint(share.total, (size,), generator=generator) - share.start
    chosen = chosen[(chosen >= 0) & (chosen < len(fit.inputs))]
    return TokenSet(*(part[chosen.to(part.device)].to(device) for part in fit))


class _ScaledWeights:
    """Weights as scale × trained tensor, so that one learning rate suits matrices of any size."""

    def __init__(self, weights: FFNWeights):
        self._start = weights
        self._scales = {
            name: part.square().mean().sqrt().clamp_min(torch.finfo(part.dtype).tiny) for name, part in weights.items()
        }
        for name in self._scales:
            if name.endswith("_bias"):  # may start at zero: it takes at least the scale of the matrix beside it
                self._scales[name] = torch.maximum(self._scales[name], self._scales[name.removesuffix("_bias")])
        self._trained = {
            name: (getattr(weights, name) / scale).detach().requires_grad_() for name, scale in self._scales.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that the optimizer changes."""
        return list(self._trained.values())

    def sum_gradients(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Replace each gradient by its sum over all processes."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad = summed(parameter.grad)

    def weights(self) -> FFNWeights:
        """Return the current weights of the FFN, differentiable by `parameters`."""
        return self._start._replace(**{name: part * self._scales[name] for name, part in self._trained.items()})
