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
from optimum_otprune.errors import ConfigurationError, NumericalError
from optimum_otprune.functional.distillation import kl_divergence
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.distributed import num_processes, own_samples
from optimum_otprune.models.training import Stepper, put_back, recomputed, trained_weights, training
from optimum_otprune.pruning.recovery.heldout import Heldout, Measured, mean_kl
from optimum_otprune.pruning.recovery.samples import TRAINING, RecoveryData
from optimum_otprune.pruning.recovery.schedule import Schedule
from optimum_otprune.pruning.recovery.snapshots import RecoveryStore, Snapshot
from optimum_otprune.pruning.recovery.teacher import Teacher, logits_of
from optimum_otprune.pruning.recovery_report import RecoveryReport

_BETAS = (0.9, 0.95)  # as large language models are trained with; schedules are too short for a longer memory
_LONGEST_GRADIENT = 1.0
_SAVE_SECONDS = 600.0  # after which a run is noted that has not come to a check

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
        if self.is_better(measured, self.measured):
            self.step, self.measured = step, measured
            self.values = {name: part.detach().cpu().clone() for name, part in self._weights.items()}

    def is_better(self, measured: Mapping[str, Measured], other: Mapping[str, Measured]) -> bool:
        """Return whether weights are better than others, and in no part worse than at the start."""
        is_worse = any(part.is_worse_than(self.start[name]) for name, part in measured.items())
        return mean_kl(measured) < mean_kl(other) and not is_worse

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the best weights."""
        for name, value in self.values.items():
            self._weights[name].copy_(value)


class _Recovery:
    """One run: the model, the weights that are trained, what they are trained towards and how.

    Attributes:
        best: The best weights so far.
        heldout: The held-out windows.
        step: Number of steps that were taken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        weights: Weights,
        schedule: Schedule,
        settings: RecoverySettings,
    ):
        self._model, self._teacher, self._weights = model.eval(), teacher, weights
        self._schedule, self._settings = schedule, settings
        self.heldout = Heldout(model, teacher, settings.batch_size)
        self._optimizer = torch.optim.AdamW(weights.values(), lr=schedule.rate, betas=_BETAS, weight_decay=0.0)
        self._before = 0.0  # seconds of earlier runs
        self._began = self._saved = time.perf_counter()
        self.step = 0

    def begin(self, start: Mapping[str, Tensor], store: RecoveryStore) -> None:
        """Measure the model before the first step, or go on where an earlier run was.

        Args:
            start: The weights' values before the first step.
            store: Where an earlier run may have been kept.
        """
        found = store.latest(start)
        if found is None:
            self.best = BestWeights(self._weights, start, self.heldout.measure())
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

    def train(self, store: RecoveryStore) -> None:
        """Train the weights from where they are, and give the model the best of them."""
        schedule = self._schedule
        for group in self._optimizer.param_groups:
            group["initial_lr"] = schedule.rate
        rates = LambdaLR(self._optimizer, schedule.factor, last_epoch=self.step - 1)
        own = len(range(schedule.size)[own_samples(schedule.size, 1)])
        stepper = Stepper(self._model, self._optimizer, -(-own // schedule.together))
        try:
            self._take_steps(stepper, rates, store)
        finally:
            stepper.end()
        self.best.put_back()

    def _take_steps(self, stepper: Stepper, rates: LambdaLR, store: RecoveryStore) -> None:
        schedule = self._schedule
        every = self._teacher.samples.batches(schedule.size, seed_of(self._settings.seed, 2))
        batches = itertools.islice(every, self.step, None)
        hidden = not self._settings.progress
        with tqdm(total=schedule.steps, initial=self.step, desc="Recovery", unit="step", disable=hidden) as bar:
            bar.set_postfix_str(f"held-out KL {mean_kl(self.best.measured):.4f}")
            # Not until the rate has fallen is it seen what steps were worth, so that nothing ends them early.
            while self.step < schedule.steps:
                self._take_step(stepper, next(batches))
                rates.step()
                self.step += 1
                bar.update()
                if schedule.is_check(self.step):
                    measured = self.heldout.measure()
                    self.best.look(self.step, measured)
                    bar.set_postfix_str(f"held-out KL {mean_kl(measured):.4f}, best {mean_kl(self.best.measured):.4f}")
                if schedule.is_check(self.step) or time.perf_counter() - self._saved > _SAVE_SECONDS:
                    store.save(self._snapshot())
                    self._saved = time.perf_counter()

    def _snapshot(self) -> Snapshot:
        best = self.best
        return Snapshot(self.step, best.step, self.seconds, best.start, best.measured, self._kept())

    def _kept(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, weight in self._weights.items():
            state = self._optimizer.state.get(weight, {})  # empty for a weight that no prediction depends on
            moments = {kind: state.get(kind, torch.zeros_like(weight)) for kind in ("exp_avg", "exp_avg_sq")}
            yield name, {"value": weight, "best": self.best.values[name].float(), **moments}

    def _take_step(self, stepper: Stepper, batch: Tensor) -> None:
        training = self._teacher.samples.training
        for rows in batch[own_samples(len(batch), 1)].split(self._schedule.together):
            said = self._teacher.says(TRAINING, rows)
            logits = logits_of(self._model, training[rows])
            loss = kl_divergence(said.to(logits.device), logits.flatten(0, 1)) / (len(batch) * training.shape[1])
            if not torch.isfinite(loss):
                raise NumericalError(
                    "The divergence of the models' predictions is NaN or infinite. Give a lower `learning_rate`, or "
                    "load the models in float32."
                )
            stepper.add(loss, self._weights.values(), _LONGEST_GRADIENT)

    def as_it_is_kept(self, model: PreTrainedModel, before: Weights) -> tuple[int, Mapping[str, Measured]]:
        """Measure the model with its trained weights in their own dtype; if that is worse, it gets the old ones.

        Args:
            model: The model, whose weights have their dtype again, and low-rank updates added.
            before: Its weights before recovery.

        Returns:
            The step after which the weights that it has now were made, and what was measured with them.
        """
        best = self.best
        is_exact = self._settings.trained != "lora" and all(part.dtype == torch.float32 for part in before.values())
        if not best.step or is_exact:
            return best.step, best.measured
        measured = self.heldout.measure()
        if not best.is_better(measured, best.start):
            put_back(model, before)
            return 0, best.start
        return best.step, measured


def recover_model(
    model: PreTrainedModel, teacher: Teacher, data: RecoveryData, settings: RecoverySettings, store: RecoveryStore
) -> RecoveryReport:
    """Train a pruned model in place; the weights that are kept are the best on held-out tokens, perhaps the first.

    Args:
        model: The pruned model.
        teacher: What the dense model that it was made from says of the samples.
        data: The text that was given; the dense model writes more.
        settings: The options.
        store: Where an interrupted run was, and where this one is noted.

    Raises:
        NumericalError: If predictions are NaN or infinite.
        UnsupportedModelError: If the model's weights are offloaded.
        MissingExtraError: If peft is needed and not installed.
        ConfigurationError: If there are more processes than samples of a step.
    """
    samples = teacher.samples
    schedule = Schedule.of(model, samples.training.shape[1], settings)
    if schedule.size < num_processes():
        raise ConfigurationError(
            f"A step has {schedule.size} samples of {samples.training.shape[1]:,} tokens, which cannot be shared "
            f"among {num_processes()} processes. Give a larger `batch_tokens`, or start fewer processes."
        )
    before = trained_weights(model, settings.trained)
    with (
        recomputed(model, settings.gradient_checkpointing),
        training(model, settings.trained, seed_of(settings.seed, 3)) as trained,
    ):
        run = _Recovery(model, teacher, trained.weights, schedule, settings)
        run.begin(trained.start, store)
        run.train(store)
    kept_step, measured = run.as_it_is_kept(model, before)
    report = RecoveryReport(
        trained=settings.trained,
        trained_parameters=sum(part.numel() for part in trained.weights.values()),
        budget=settings.num_tokens,
        num_tokens=run.step * schedule.tokens,
        steps=run.step,
        kept_step=kept_step,
        seconds=run.seconds,
        learning_rate=schedule.rate,
        batch_tokens=schedule.tokens,
        seed=settings.seed,
        data=data.given.source,
        samples=samples.counts,
        heldout=tuple(part.change(measured[name], name, data.source(name)) for name, part in run.best.start.items()),
        logits_per_token=teacher.logits_per_token,
    )
    store.finish(report)
    return report
