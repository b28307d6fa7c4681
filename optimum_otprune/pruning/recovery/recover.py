"""Train a pruned model towards the dense one: what is kept is never worse on held-out tokens than before."""

import itertools
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.distillation import kl_divergence
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.training import Stepper, computing, recomputed, training
from optimum_otprune.pruning.recovery.heldout import Heldout, Measured, logits_of, mean_kl
from optimum_otprune.pruning.recovery.samples import RecoveryData, RecoverySamples, recovery_samples
from optimum_otprune.pruning.recovery.schedule import Schedule
from optimum_otprune.pruning.recovery.snapshots import RecoveryStore, Snapshot
from optimum_otprune.pruning.recovery_report import RecoveryReport

_BETAS = (0.9, 0.95)  # as large language models are trained with; schedules are too short for a longer memory
_LONGEST_GRADIENT = 1.0
_PATIENCE = 3  # checks without anything better, after which training stops

Weights = Mapping[str, nn.Parameter]


class BestWeights:
    """The best weights so far, on the CPU; those of the start until others are better and in no part worse.

    Args:
        weights: The weights that are trained.
        values: Their values at the start.
        measured: What was measured then.

    Attributes:
        step: The step after which they were.
        measured: What was measured with them.
        start: What was measured before the first step.
        values: The weights themselves.
    """

    def __init__(self, weights: Weights, values: Mapping[str, Tensor], measured: Mapping[str, Measured]):
        self._weights, self.start = weights, measured
        self.values = values
        self.step, self.measured = 0, measured

    def look(self, step: int, measured: Mapping[str, Measured]) -> None:
        """Keep the weights as they are now if they are the best.

        Args:
            step: The number of steps that were taken.
            measured: What was measured with them.
        """
        is_worse = any(part.is_worse_than(self.start[name]) for name, part in measured.items())
        if mean_kl(measured) < mean_kl(self.measured) and not is_worse:
            self.step, self.measured = step, measured
            self.values = {name: part.detach().cpu().clone() for name, part in self._weights.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the best weights."""
        for name, value in self.values.items():
            self._weights[name].copy_(value)


class _Recovery:
    """One run: both models, the weights that are trained, what they are trained on and how.

    Attributes:
        best: The best weights so far.
        step: Number of steps that were taken.
    """

    def __init__(
        self,
        models: tuple[PreTrainedModel, PreTrainedModel],
        weights: Weights,
        samples: RecoverySamples,
        schedule: Schedule,
        settings: RecoverySettings,
    ):
        self._model, self._dense = (model.eval() for model in models)
        self._weights, self._samples, self._schedule, self._settings = weights, samples, schedule, settings
        self._heldout = Heldout(*models, samples.heldout, settings.batch_size)
        self._optimizer = torch.optim.AdamW(weights.values(), lr=schedule.rate, betas=_BETAS, weight_decay=0.0)
        self._before = 0.0  # seconds of earlier runs
        self._began = time.perf_counter()
        self.step = 0

    def begin(self, start: Mapping[str, Tensor], store: RecoveryStore) -> None:
        """Measure the model before the first step, or go on where an earlier run was.

        Args:
            start: The weights' values before the first step.
            store: Where an earlier run may have been kept.
        """
        found = store.latest(start)
        if found is None:
            self.best = BestWeights(self._weights, start, self._heldout.measure())
            return
        self.best = BestWeights(self._weights, start, found.start)
        best = {}
        for name, kept in found.weights:
            weight = self._weights[name]
            best[name] = kept["best"]
            with torch.no_grad():
                weight.copy_(kept["value"])
            moments = {kind: kept[kind].to(weight.device) for kind in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[weight] = {"step": torch.tensor(float(found.step)), **moments}
        if found.best_step:
            self.best.step, self.best.measured, self.best.values = found.best_step, found.best, best
        self.step, self._before = found.step, found.seconds

    @property
    def seconds(self) -> float:
        """Duration so far, that of earlier runs included."""
        return self._before + time.perf_counter() - self._began

    @property
    def _is_over(self) -> bool:
        waited = self.step - self.best.step >= _PATIENCE * self._schedule.every
        return self.step >= self._schedule.steps or waited and self._schedule.is_check(self.step)

    def train(self, store: RecoveryStore) -> None:
        """Train the weights from where they are, and give the model the best of them."""
        schedule = self._schedule
        for group in self._optimizer.param_groups:
            group["initial_lr"] = schedule.rate
        rates = LambdaLR(self._optimizer, schedule.factor, last_epoch=self.step - 1)
        stepper = Stepper(self._model, self._optimizer, -(-schedule.size // schedule.together))
        every = self._samples.batches(schedule.size, seed_of(self._settings.seed, 2))
        batches = itertools.islice(every, self.step, None)
        hidden = not self._settings.progress
        with tqdm(total=schedule.steps, initial=self.step, desc="Recovery", unit="step", disable=hidden) as bar:
            bar.set_postfix_str(f"held-out KL {mean_kl(self.best.measured):.4f}")
            while not self._is_over:
                self._take_step(stepper, next(batches))
                rates.step()
                self.step += 1
                bar.update()
                if schedule.is_check(self.step):
                    measured = self._heldout.measure()
                    self.best.look(self.step, measured)
                    bar.set_postfix_str(f"held-out KL {mean_kl(measured):.4f}, best {mean_kl(self.best.measured):.4f}")
                    store.save(self._snapshot())
        stepper.end()
        self.best.put_back()

    def _snapshot(self) -> Snapshot:
        best = self.best
        return Snapshot(self.step, best.step, self.seconds, best.start, best.measured, self._kept())

    def _kept(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, weight in self._weights.items():
            state = self._optimizer.state[weight]
            moments = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}
            yield name, {"value": weight, "best": self.best.values[name].float(), **moments}

    def _take_step(self, stepper: Stepper, batch: Tensor) -> None:
        for part in batch.split(self._schedule.together):
            with torch.no_grad(), computing(self._dense):
                wanted = logits_of(self._dense, part)
            with computing(self._model):
                logits = logits_of(self._model, part)
            loss = kl_divergence(wanted.to(logits.device).flatten(0, 1), logits.flatten(0, 1)) / batch.numel()
            if not torch.isfinite(loss):
                raise NumericalError(
                    "The divergence of the models' predictions is NaN or infinite. Give a lower `learning_rate`, or "
                    "load the models in float32."
                )
            stepper.add(loss, self._weights.values(), _LONGEST_GRADIENT)


def recover_model(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    data: RecoveryData,
    settings: RecoverySettings,
    store: RecoveryStore,
) -> RecoveryReport:
    """Train a pruned model in place; the weights that are kept are the best on held-out tokens, perhaps the first.

    Args:
        model: The pruned model.
        dense: The dense model that it was made from.
        data: The text that was given; the dense model writes more.
        settings: The options.
        store: Where an interrupted run was, and where this one is noted.

    Raises:
        NumericalError: If predictions are NaN or infinite.
        UnsupportedModelError: If the model's weights are offloaded.
        MissingExtraError: If peft is needed and not installed.
    """
    samples = store.samples(lambda: recovery_samples(dense, data, settings))
    schedule = Schedule.of(model, samples.training.shape[1], settings)
    with (
        recomputed(model, settings.gradient_checkpointing),
        training(model, settings.trained, seed_of(settings.seed, 3)) as trained,
    ):
        run = _Recovery((model, dense), trained.weights, samples, schedule, settings)
        run.begin(trained.start, store)
        run.train(store)
    best = run.best
    report = RecoveryReport(
        trained=settings.trained,
        trained_parameters=sum(part.numel() for part in trained.weights.values()),
        budget=settings.num_tokens,
        num_tokens=run.step * schedule.tokens,
        steps=run.step,
        kept_step=best.step,
        seconds=run.seconds,
        learning_rate=schedule.rate,
        batch_tokens=schedule.tokens,
        seed=settings.seed,
        data=data.given.source,
        samples=samples.counts,
        heldout=tuple(part.change(best.measured[name], name, data.source(name)) for name, part in best.start.items()),
    )
    store.finish(report)
    return report
