"""What a dense model in memory can be asked before it is pruned: which configuration, and which ratio."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.models.changes import dense_model
from optimum_otprune.models.defaults import BATCH_SIZE, TRIALS, VALIDATION_SHARE
from optimum_otprune.models.distributed import check_single
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.data import ModelLimits, TokenSource, calibration_tokens
from optimum_otprune.pruning.calibration.self_calibration import samples_alone
from optimum_otprune.pruning.tuning.search import tune_model
from optimum_otprune.pruning.tuning.sweep import SweepOptions, SweepSettings, SweepSource, sweep_configs, sweep_model
from optimum_otprune.pruning.tuning.sweep_results import SweepResult
from optimum_otprune.pruning.tuning.trials import TuningResult, TuningSettings


class SearchMixin:
    """Searches for a configuration, and shows what each of several ratios costs; the model stays as it is.

    Attributes:
        model: The dense model.
        config: The configuration to start from; `tune` replaces it.
        tokenizer: The model's tokenizer, or None.
        tuning: The result of `tune`, or None before.
    """

    model: PreTrainedModel
    config: OTPruningConfig
    tokenizer: PreTrainedTokenizerBase | None
    tuning: TuningResult | None

    @property
    def limits(self) -> ModelLimits:
        """Vocabulary and positions of the model."""
        return ModelLimits.of(self.model)

    def tune(
        self,
        calibration_data: TokenSource | None = None,
        *,
        num_trials: int = TRIALS,
        timeout: float | None = None,
        search_space: Mapping[str, Any] | None = None,
        study: str | os.PathLike | None = None,
        target_latency: float | None = None,
        latency_shape: tuple[int, int] | None = None,
        validation_share: float = VALIDATION_SHARE,
        seed: int | None = None,
        batch_size: int = BATCH_SIZE,
        progress: bool = True,
        on_trial: Callable[[TuningResult], None] | None = None,
    ) -> OTPruningConfig:
        """Search for a better configuration at the same budget; the model stays as it is. Needs the extra `tune`.

        The calibration samples are split once: each trial prunes on one part, is judged by perplexity on the other,
        and leaves the model bit for bit as it was. The first trial is `self.config`, so the result is never worse than
        it there. A configuration that fails ends its trial only, and is logged with the reason.

        Args:
            calibration_data: The calibration samples, as `prune` takes them.
            num_trials: How many trials are finished in the end, those of earlier runs of the study included.
            timeout: Seconds after which no trial starts; the first one always does.
            search_space: Tuples `(low, high)` or lists of choices by field; default: `default_search_space`.
            study: File of the trials; one process at a time continues an existing one of the same search.
            target_latency: Median seconds of a forward pass on the model's device, in place of the ratio, which is
                found first by bisection: FFNs are cut to a width, for speed depends on nothing else.
            latency_shape: The shape `(batch_size, seqlen)` of that forward pass; default: one calibration sample.
            validation_share: Share of the samples that trials are judged on.
            seed: The seed of the split and of the sampler; default: the configuration's.
            batch_size: Number of samples per forward pass.
            progress: Whether to show a progress bar.
            on_trial: A function that gets the result so far, `self.tuning`, at the start and after each trial.

        Returns:
            The best configuration, also kept as `self.config`.

        Raises:
            OTPruneError: If optuna is missing, or an argument, the study's file or the first trial is at fault.
        """
        check_single("`tune`", "Start one.")
        prunable = dense_model(self.model)
        settings = TuningSettings(
            num_trials=num_trials,
            timeout=timeout,
            search_space=search_space,
            study=None if study is None else Path(os.path.expanduser(study)),
            target_latency=target_latency,
            latency_shape=latency_shape,
            validation_share=validation_share,
            seed=self.config.seed if seed is None else seed,
            passes=PassSettings(batch_size, progress),
        ).checked()
        tokens = self._judged_samples(calibration_data, prunable, settings.passes)
        note = partial(self._note_trial, on_trial)
        self.config = tune_model(prunable, self.config, tokens, settings, note).best.config
        return self.config

    def _judged_samples(self, data: TokenSource | None, prunable: PrunableModel, passes: PassSettings) -> Tensor:
        """Return the samples of a search, a part of which judges the trials; the model writes them if need be."""
        tokens = calibration_tokens(data, self.config, self.tokenizer, self.limits).tokens
        return tokens if len(tokens) else samples_alone(Passes(prunable, tokens, passes), self.config)

    def _note_trial(self, on_trial: Callable[[TuningResult], None] | None, result: TuningResult) -> None:
        self.tuning = result
        if on_trial is not None:
            on_trial(result)

    def sweep(
        self,
        ratios: Sequence[float],
        calibration_data: TokenSource | None = None,
        evaluation_data: TokenSource | Mapping[str, TokenSource] | None = None,
        **options: Unpack[SweepOptions],
    ) -> SweepResult:
        """Prune at each ratio, measure the perplexity, and put the model back bit for bit: its quality curve.

        Args:
            ratios: Shares of every FFN's channels to remove, in [0, 1).
            calibration_data: The calibration samples, as `prune` takes them, drawn once for all ratios.
            evaluation_data: What to measure on, as `evaluate` takes it; several by name as a dictionary.
            **options: Options of `optimum_otprune.pruning.tuning.sweep.SweepOptions`, such as `max_windows`, `folder`.

        Raises:
            OTPruneError: If an argument, the data, the folder's curve or the first ratio is at fault.
        """
        check_single("`sweep`", "Start one.")
        prunable = dense_model(self.model)
        settings, configs = SweepSettings.of(options), sweep_configs(self.config, ratios)
        source = SweepSource(self.config, self.tokenizer, self.limits)
        texts = source.read(calibration_data, evaluation_data, settings.max_windows)
        return sweep_model(prunable, configs, texts, settings)
