"""`OTPruner`: one model, one configuration, and what can be done with them."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.base_model import load_base
from optimum_otprune.checkpoints.check_loading import as_config, check_loading_options, refuse_loading_options
from optimum_otprune.checkpoints.load import hub_id, load_checkpoint, load_skeleton
from optimum_otprune.checkpoints.mixin import CheckpointMixin
from optimum_otprune.config.checks import check_count
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.recovery_options import RecoveryOptions, RecoverySettings, check_tokens
from optimum_otprune.models.changes import all_or_nothing, check_pruned, check_whole, dense_model
from optimum_otprune.models.defaults import BATCH_SIZE, HIDDEN_MEMORY, TRIALS, VALIDATION_SHARE
from optimum_otprune.models.devices import model_sizes
from optimum_otprune.models.distributed import check_launch, check_model, check_single
from optimum_otprune.models.ffn_block import ffn_blocks
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.wrappers import checked_tokenizer, model_in_memory, unwrapped
from optimum_otprune.pruning.calibration.data import (
    ModelLimits,
    TokenData,
    TokenSource,
    calibration_tokens,
    evaluation_tokens,
)
from optimum_otprune.pruning.dry_run.estimate import Skeleton, plan_pruning
from optimum_otprune.pruning.dry_run.plan import PruningPlan
from optimum_otprune.pruning.dry_run.recovery_plan import with_recovery
from optimum_otprune.pruning.evaluation import evaluation
from optimum_otprune.pruning.fingerprint import run_fingerprint
from optimum_otprune.pruning.outcome import Origin
from optimum_otprune.pruning.pipeline import prune_model
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.recovery.recover import recover_model
from optimum_otprune.pruning.recovery.samples import RecoveryData
from optimum_otprune.pruning.recovery.snapshots import resumable_recovery
from optimum_otprune.pruning.recovery_report import RecoveryReport
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.resume import resumable
from optimum_otprune.pruning.settings import pass_settings
from optimum_otprune.pruning.size_target import with_pruning_ratio
from optimum_otprune.pruning.tuning.search import tune_model
from optimum_otprune.pruning.tuning.trials import TuningResult, TuningSettings
from optimum_otprune.storage.outputs import noted_places
from optimum_otprune.storage.state_folder import state_path


class OTPruner(CheckpointMixin):
    """Prunes the feed-forward layers of a causal language model in place. Make one by `from_pretrained`.

    Attributes:
        model: The model, pruned after `prune`.
        config: The configuration that the model is, or was, pruned by.
        tokenizer: The model's tokenizer, or None.
        report: The report of `prune`, or None before; restored for a pruned folder.
        tuning: The result of `tune`, or None before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: OTPruningConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        report: PruningReport | None = None,
        base_model: str | None = None,
        base_card: Mapping[str, Any] | None = None,
    ):
        self.model = unwrapped(model)
        self.config = config or OTPruningConfig()
        self.tokenizer = checked_tokenizer(tokenizer)
        self.report = report
        self.base_model = base_model
        self.base_card = dict(base_card or {})
        self.tuning: TuningResult | None = None
        self._places = noted_places(
            source_model=self.model.name_or_path, tokenizer=getattr(tokenizer, "name_or_path", None)
        )
        self._calibrated_on: Tensor | None = None
        self._evaluations: list[Mapping[str, Any]] = list(report.evaluations) if report else []

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike | PreTrainedModel,
        config: OTPruningConfig | Mapping[str, Any] | str | os.PathLike | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **loading: Unpack[LoadingOptions],
    ) -> "OTPruner":
        """Load a model to prune, or a pruned one with its configuration and report.

        Args:
            model_name_or_path: Hub id, local folder, or a model in memory (then the loading options must be left out).
            config: A configuration, a dictionary, or where one is saved; default: the one saved with the model, else
                all defaults.
            tokenizer: A tokenizer that takes the place of the model's own, which is loaded if it has one.
            **loading: Options of `optimum_otprune.config.loading_options.LoadingOptions`, which says what each means,
                such as `dtype`, `device_map`, `trust_remote_code` and `verify`.

        Raises:
            ModelLoadError: If the model cannot be found, downloaded or read, or its weights are not all there.
            IntegrityError: If `verify` is set, and files are changed, missing or extra, or there is no manifest.
            HubError: If `verify` is set, and the Hub does not give the files.
            UnsupportedModelError: If it has no known FFN, is quantized, or has an adapter that is not merged.
            ConfigurationError: If `config` is not valid, or a loading option is unknown or wrong.
        """
        check_launch()
        options = check_loading_options(loading)
        given = None if config is None else as_config(config, options)
        model = model_in_memory(model_name_or_path)
        if model is not None:
            refuse_loading_options(options)
            ffn_blocks(model)
            return cls(model, given, tokenizer, base_model=hub_id(model.name_or_path))
        loaded = load_checkpoint(str(model_name_or_path), options)
        ffn_blocks(loaded.model)
        report = loaded.report if given is None or given == loaded.config else None
        base = (loaded.base_model, loaded.base_card)
        pruner = cls(loaded.model, given or loaded.config, tokenizer or loaded.tokenizer, report, *base)
        pruner._places |= noted_places(offload_folder=options["offload_folder"])
        return pruner

    @classmethod
    def plan(
        cls,
        model_name_or_path: str | os.PathLike | PreTrainedModel,
        config: OTPruningConfig | Mapping[str, Any] | str | os.PathLike | None = None,
        calibration_data: TokenSource | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_hidden_memory: int | str = HIDDEN_MEMORY,
        evaluate: bool = False,
        evaluation_data: TokenSource | None = None,
        recover: int | str | None = None,
        **loading: Unpack[LoadingOptions],
    ) -> PruningPlan:
        """Return within seconds what `prune` would do and take: widths, sizes, memory on each device, time.

        Of a Hub id only `config.json` is read; no weights are read, and nothing is written. Memory and time are rough.

        Args:
            model_name_or_path: The model, as `from_pretrained` takes it.
            config: The configuration, as `from_pretrained` takes it; None is the default one.
            calibration_data: The calibration samples, as `prune` takes them.
            batch_size: Number of samples per forward pass.
            max_hidden_memory: Bytes of hidden states in main memory; what is more is spilled to disk.
            evaluate: Whether the model is evaluated before and after.
            evaluation_data: The evaluation data, as in `evaluate`.
            recover: Number of tokens that `recover` is to train on afterwards, or None.
            **loading: Options of `from_pretrained`, such as `dtype`, `device_map` and `max_memory`.

        Raises:
            OTPruneError: Whatever loading and `prune` would raise before the work starts, but for damaged weights.
        """
        settings = pass_settings(check_count("batch_size", batch_size), False, max_hidden_memory, None)
        options = check_loading_options(loading)
        model = model_in_memory(model_name_or_path)
        if model is not None:
            refuse_loading_options(options)
        given = OTPruningConfig() if config is None else as_config(config, options)
        known = load_skeleton(str(model_name_or_path), options) if model is None else Skeleton.of_loaded(model)
        plan = plan_pruning(known, given, calibration_data, settings, evaluate, evaluation_data)
        if recover is None:
            return plan
        return with_recovery(plan, known.model, check_tokens("recover", recover), batch_size)

    @property
    def limits(self) -> ModelLimits:
        """Vocabulary and positions of the model."""
        return ModelLimits.of(self.model)

    def prune(
        self,
        calibration_data: TokenSource | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        progress: bool = True,
        resume_from: str | os.PathLike | None = None,
        max_hidden_memory: int | str = HIDDEN_MEMORY,
        spill_folder: str | os.PathLike | None = None,
        **functions: Any,
    ) -> PruningReport:
        """Prune the model in place; several processes share the calibration samples among them.

        If this ends early, by an error or an interruption, the model is what it was before, bit for bit. Only a model
        with offloaded weights stays half-pruned once layers were changed; every method refuses it (`HalfPrunedError`).

        Args:
            calibration_data: What `optimum_otprune.pruning.calibration.data.calibration_tokens` takes; None is the
                configuration's dataset.
            batch_size: Samples per forward pass; changes nothing but speed, memory and rounding.
            progress: Whether to show progress bars.
            resume_from: Folder that keeps every finished layer until `save_pretrained`, so that an interrupted run can
                go on: call this as before, with the dense model. The result is the same, bit for bit.
            max_hidden_memory: How much of the calibration samples' hidden states each process keeps in main memory, in
                bytes or as `"4GB"`; the rest waits in files. Changes nothing but memory and speed.
            spill_folder: Folder of those files while it runs; default: the system's folder for temporary files.
            **functions: The user's own functions, which take the place of registered ones: `importance`, `cost`,
                `source_distribution`, `target_distribution`, `statistics`, `solver`.

        Returns:
            The report, also kept as `self.report`.

        Raises:
            CalibrationDataError: If the data cannot be used.
            UnsupportedModelError: If the model was pruned already.
            CustomFunctionError: If a function of the user raises; the message names it and the layer.
            NumericalError: If weights, activations or scores are NaN or infinite; the message names the layer.
            ConfigurationError: If the configuration does not fit the model.
            StateError: If `resume_from` is in use, is damaged, or belongs to a run that differs from this one.
            OutputError: If `resume_from` cannot be written; finished layers are kept there.
        """
        settings = pass_settings(check_count("batch_size", batch_size), progress, max_hidden_memory, spill_folder)
        prunable = dense_model(self.model)
        check_model(self.model)
        if resume_from is not None:
            check_single("`resume_from`", "Leave it out, or start one.")
        recipe = Recipe.resolve(with_pruning_ratio(self.config, prunable), functions)
        state = state_path(resume_from)
        self._places |= noted_places(calibration_data=calibration_data, state=state, spill_folder=spill_folder)
        data = calibration_tokens(calibration_data, self.config, self.tokenizer, self.limits)
        before = model_sizes(self.model)
        run = {} if state is None else run_fingerprint(self.model, recipe, data.tokens, settings.batch_size)
        with all_or_nothing(self.model), resumable(state, run) as store:
            pruned = prune_model(prunable, recipe, data.tokens, settings, store)
            origin = Origin(base_model=self.base_model, base_card=self.base_card, evaluations=tuple(self._evaluations))
            report = pruned.report(self.model, self.config, recipe, data, before, **origin)
        self._unsaved_states = () if state is None else ((state, run),)
        self._calibrated_on, self.report = data.tokens, report
        return report

    def recover(
        self,
        data: TokenSource | None = None,
        *,
        base_model: str | os.PathLike | PreTrainedModel | None = None,
        heldout_data: TokenSource | None = None,
        **options: Unpack[RecoveryOptions],
    ) -> RecoveryReport:
        """Train the pruned model in place towards the dense model's own predictions; no labels are used.

        It is trained on the given samples and on samples that the dense model writes itself. Some of each are held
        out, and the weights that are kept are the best on them: on none are they worse than before, beyond noise. If
        this ends early, by an error or an interruption, the model is what it was before, bit for bit.

        Args:
            data: What `optimum_otprune.pruning.calibration.data.calibration_tokens` takes; None is what the model was
                pruned on, or the configuration's dataset where that is not in memory.
            base_model: The dense model: in memory, or its Hub id or folder; default: where this one was made from.
            heldout_data: Other text that is held out only, such as a second domain; as `evaluate` takes it.
            **options: Options of `optimum_otprune.config.recovery_options.RecoveryOptions`, which says what each
                means, such as `num_tokens`, `trained` and `learning_rate`.

        Returns:
            The report, also kept in `self.report.recoveries`.

        Raises:
            ConfigurationError: If an option is wrong, or the dense model is not known or not that of this one.
            UnsupportedModelError: If the model is not pruned, or its weights are offloaded.
            CalibrationDataError: If the data cannot be used.
            NumericalError: If predictions are NaN or infinite.
            StateError: If `resume_from` is in use, is damaged, or belongs to a run that differs from this one.
        """
        settings = RecoverySettings.of(options, self.config.seed)
        check_single("`recover`", "Start one.")
        check_pruned(self.model)
        dense = load_base(base_model, self.model, self.base_model, options.get("base_options"))
        self._places |= noted_places(calibration_data=data, evaluation_data=heldout_data)
        given = self._pruned_on() if data is None else data
        texts = RecoveryData.read(given, heldout_data, self.config, self.tokenizer, self.limits)
        state = state_path(options.get("resume_from"))
        run = {} if state is None else texts.fingerprint(self.model, dense, settings)
        with all_or_nothing(self.model), resumable_recovery(state, run) as store:
            recovery = recover_model(self.model, dense, texts, settings, store)
        self._unsaved_states += () if state is None else ((state, run),)
        recovery = dataclasses.replace(recovery, base_model=hub_id(dense.name_or_path))
        if self.report is not None:
            self.report = dataclasses.replace(self.report, recoveries=(*self.report.recoveries, recovery))
        return recovery

    def _pruned_on(self) -> TokenData | None:
        """Return the samples that the model was pruned on, if they are in memory."""
        if self._calibrated_on is None or self.report is None:
            return None
        return TokenData(self._calibrated_on, str(self.report.calibration["data"]))

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
        tokens = calibration_tokens(calibration_data, self.config, self.tokenizer, self.limits).tokens
        note = partial(self._note_trial, on_trial)
        self.config = tune_model(prunable, self.config, tokens, settings, note).best.config
        return self.config

    def _note_trial(self, on_trial: Callable[[TuningResult], None] | None, result: TuningResult) -> None:
        self.tuning = result
        if on_trial is not None:
            on_trial(result)

    def evaluate(
        self,
        data: TokenSource | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_windows: int | None = None,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Measure the model's perplexity as it is now; the report keeps every result.

        Args:
            data: What `optimum_otprune.pruning.calibration.data.evaluation_tokens` takes; None is the configuration's
                dataset.
            batch_size: Windows per forward pass; changes nothing but speed and rounding.
            max_windows: How many windows are evaluated, the first ones; None for all.
            progress: Whether to show a progress bar.

        Returns:
            `perplexity`, `nll` (nats per token), `num_tokens`, and the protocol: `num_windows`, `seqlen`, `stride`,
            `dtype`, `protocol`, `data`, and `stage` (`"dense"` or `"pruned"`); after `prune` also `seen_windows`: how
            many of the windows share a passage with the calibration samples. For a folder that was loaded it is there
            if some do, and a lower bound. `max_windows` where it was given.

        Raises:
            CalibrationDataError: If the data cannot be used.
            NumericalError: If the model's outputs are NaN.
        """
        check_whole(self.model)
        batch_size = check_count("batch_size", batch_size)
        max_windows = None if max_windows is None else check_count("max_windows", max_windows)
        self._places |= noted_places(evaluation_data=data)
        tokens = evaluation_tokens(data, self.config, self.tokenizer, self.limits, max_windows)
        metrics = evaluation(self.model, tokens, batch_size, progress, self.report, self._calibrated_on)
        metrics |= {} if max_windows is None else {"max_windows": max_windows}
        self._evaluations.append(metrics)
        if self.report is not None:
            self.report = dataclasses.replace(self.report, evaluations=tuple(self._evaluations))
        return dict(metrics)
