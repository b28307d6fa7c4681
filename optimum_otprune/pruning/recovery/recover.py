"""Train a pruned model towards the dense one: what is kept is never worse on held-out tokens than before."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.distillation import kl_divergence
from optimum_otprune.models.block_runner import vocabulary_size
from optimum_otprune.models.perplexity import windows_together
from optimum_otprune.models.training import Stepper, computing, trained_copies, trained_weights
from optimum_otprune.pruning.recovery.heldout import Heldout, Measured, logits_of, mean_kl
from optimum_otprune.pruning.recovery.samples import RecoveryData, RecoverySamples, recovery_samples
from optimum_otprune.pruning.recovery_report import RecoveryReport
from optimum_otprune.pruning.seeds import seed_of

_RATE = 0.1  # times 1 / hidden size: wider layers take smaller steps (see `learning_rate`)
_WARM_UP = 0.05  # share of the steps in which the learning rate rises
_BETAS = (0.9, 0.95)  # as large language models are trained with; schedules are too short for a longer memory
_LONGEST_GRADIENT = 1.0
_CHECKS = 8  # of the held-out tokens over the whole schedule
_PATIENCE = 3  # checks without anything better, after which training stops


Weights = Mapping[str, nn.Parameter]


def learning_rate(model: PreTrainedModel) -> float:
    """Return the default of the peak learning rate: 0.1 over the hidden size.

    Steps of Adam have the size of the learning rate, whatever the gradient is, and a layer adds up as many of them as
    it is wide.

    Source: Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466, table 3.
    """
    return _RATE / model.config.get_text_config().hidden_size


class _Schedule(NamedTuple):
    """How many steps there are, of how many samples.

    Attributes:
        steps: Number of steps of the optimizer.
        size: Number of samples of a step.
        together: Number of samples that go through the models at once.
        every: Number of steps between two checks of the held-out tokens.
        rate: The peak learning rate.
    """

    steps: int
    size: int
    together: int
    every: int
    rate: float

    @classmethod
    def of(cls, model: PreTrainedModel, seqlen: int, settings: RecoverySettings) -> "_Schedule":
        size = max(1, round(min(settings.batch_tokens, settings.num_tokens) / seqlen))
        steps = max(1, round(settings.num_tokens / (size * seqlen)))
        together = min(size, windows_together(settings.batch_size, seqlen, vocabulary_size(model), 4))
        rate = learning_rate(model) if settings.learning_rate is None else settings.learning_rate
        return cls(steps, size, together, -(-steps // _CHECKS), rate)


class _Best:
    """The best weights so far, on the CPU; those of the start until others are better and in no part worse.

    Args:
        weights: The weights that are trained.
        values: Their values at the start.
        measured: What was measured then.

    Attributes:
        step: The step after which they were.
        measured: What was measured with them.
        start: What was measured before the first step.
    """

    def __init__(self, weights: Weights, values: Mapping[str, Tensor], measured: dict[str, Measured]):
        self._weights, self.start = weights, measured
        self._values = values
        self.step, self.measured = 0, measured

    def look(self, step: int, measured: dict[str, Measured]) -> None:
        is_worse = any(part.is_worse_than(self.start[name]) for name, part in measured.items())
        if mean_kl(measured) < mean_kl(self.measured) and not is_worse:
            self.step, self.measured = step, measured
            self._values = {name: part.detach().cpu().clone() for name, part in self._weights.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for name, value in self._values.items():
            self._weights[name].copy_(value)


class _Recovery:
    """One run: both models, what is trained on and how."""

    def __init__(
        self, model: PreTrainedModel, dense: PreTrainedModel, samples: RecoverySamples, settings: RecoverySettings
    ):
        self._model, self._dense, self._samples, self._settings = model.eval(), dense.eval(), samples, settings
        self.schedule = _Schedule.of(model, samples.training.shape[1], settings)
        self._heldout = Heldout(model, dense, samples.heldout, settings.batch_size)

    def train(self, weights: Weights, start: Mapping[str, Tensor]) -> tuple[int, _Best]:
        """Train the weights, whose values are those of `start`; return the number of steps and the best weights."""
        schedule = self.schedule
        optimizer = torch.optim.AdamW(weights.values(), lr=schedule.rate, betas=_BETAS, weight_decay=0.0)
        rates = OneCycleLR(
            optimizer, schedule.rate, total_steps=schedule.steps + 1, pct_start=_WARM_UP, cycle_momentum=False
        )
        stepper = Stepper(self._model, optimizer, -(-schedule.size // schedule.together))
        best = _Best(weights, start, self._heldout.measure())
        batches = self._samples.batches(schedule.size, seed_of(self._settings.seed, 2))
        with tqdm(total=schedule.steps, desc="Recovery", unit="step", disable=not self._settings.progress) as bar:
            for step in range(1, schedule.steps + 1):
                self._step(stepper, next(batches), weights)
                rates.step()
                bar.update()
                if step % schedule.every == 0 or step == schedule.steps:
                    measured = self._heldout.measure()
                    best.look(step, measured)
                    bar.set_postfix_str(f"held-out KL {mean_kl(measured):.4f}")
                    if step - best.step >= _PATIENCE * schedule.every:
                        break
        stepper.end()
        best.put_back()
        return step, best

    def _step(self, stepper: Stepper, batch: Tensor, weights: Weights) -> None:
        for part in batch.split(self.schedule.together):
            with torch.no_grad():
                wanted = logits_of(self._dense, part)
            with computing(self._model):
                logits = logits_of(self._model, part)
            loss = kl_divergence(wanted.to(logits.device).flatten(0, 1), logits.flatten(0, 1)) / batch.numel()
            if not torch.isfinite(loss):
                raise NumericalError(
                    "The divergence of the models' predictions is NaN or infinite. Give a lower `learning_rate`, or "
                    "load the models in float32."
                )
            stepper.add(loss, weights.values(), _LONGEST_GRADIENT)


def recover_model(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    data: RecoveryData,
    settings: RecoverySettings,
) -> RecoveryReport:
    """Train a pruned model in place; the weights that are kept are the best on held-out tokens, perhaps the first.

    Args:
        model: The pruned model.
        dense: The dense model that it was made from.
        data: The text that was given; the dense model writes more.
        settings: The options.

    Raises:
        NumericalError: If predictions are NaN or infinite.
        UnsupportedModelError: If the model's weights are offloaded.
    """
    start = time.perf_counter()
    weights = trained_weights(model, settings.trained)
    samples = recovery_samples(dense, data, settings)
    run = _Recovery(model, dense, samples, settings)
    with trained_copies(model, weights) as copies:
        steps, best = run.train(copies, weights)
        before = best.start
    schedule = run.schedule
    return RecoveryReport(
        trained=settings.trained,
        trained_parameters=sum(part.numel() for part in weights.values()),
        budget=settings.num_tokens,
        num_tokens=steps * schedule.size * samples.training.shape[1],
        steps=steps,
        kept_step=best.step,
        seconds=time.perf_counter() - start,
        learning_rate=schedule.rate,
        batch_tokens=schedule.size * samples.training.shape[1],
        seed=settings.seed,
        data=data.given.source,
        samples=samples.counts,
        heldout=tuple(part.change(best.measured[name], name, data.source(name)) for name, part in before.items()),
    )
