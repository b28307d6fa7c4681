"""`OTPruner`: one model, one configuration, and what can be done with them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.check_loading import as_config, check_loading_options, refuse_loading_options
from optimum_otprune.checkpoints.dense import dense_reference
from optimum_otprune.checkpoints.load import hub_id, load_checkpoint, load_skeleton
from optimum_otprune.checkpoints.mixin import CheckpointMixin
from optimum_otprune.checkpoints.recovery_mixin import RecoveryMixin
from optimum_otprune.config.checks import check_count
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.loading_options import LoadingOptions
from optimum_otprune.config.options import WRITTEN
from optimum_otprune.config.recovery_options import check_tokens
from optimum_otprune.models.agreement import DenseOutputs
from optimum_otprune.models.changes import all_or_nothing, check_whole, dense_model
from optimum_otprune.models.defaults import BATCH_SIZE, HIDDEN_MEMORY
from optimum_otprune.models.devices import model_sizes
from optimum_otprune.models.distributed import check_launch, check_model, check_single, is_main_process
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.wrappers import checked_tokenizer, model_in_memory, unwrapped
from optimum_otprune.pruning.calibration.data import (
    TokenSource,
    calibration_tokens,
    evaluation_tokens,
)
from optimum_otprune.pruning.calibration.self_calibration import samples_alone
from optimum_otprune.pruning.dry_run.estimate import Skeleton, plan_pruning
from optimum_otprune.pruning.dry_run.plan import PruningPlan
from optimum_otprune.pruning.dry_run.recovery_plan import with_recovery
from optimum_otprune.pruning.evaluation import evaluation
from optimum_otprune.pruning.fingerprint import run_fingerprint
from optimum_otprune.pruning.outcome import Origin
from optimum_otprune.pruning.pipeline import prune_model
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.resume import resumable
from optimum_otprune.pruning.settings import pass_settings
from optimum_otprune.pruning.size_target import with_pruning_ratio
from optimum_otprune.pruning.tuning.mixin import SearchMixin
from optimum_otprune.pruning.tuning.trials import TuningResult
from optimum_otprune.storage.outputs import noted_places
from optimum_otprune.storage.state_folder import state_path


class OTPruner(SearchMixin, RecoveryMixin, CheckpointMixin):
    """Prunes the feed-forward layers of a language model in place. Make one by `from_pretrained`.

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
        self._unsaved_states = () if state is None or not is_main_process() else ((state, run),)
        self._calibrated_on, self.report = data.tokens, report
        return report

    def write_calibration(self, *, max_hidden_memory: int | str = HIDDEN_MEMORY, progress: bool = True) -> Tensor:
        """Let the dense model write `num_samples` calibration samples of `seqlen` tokens, by `seed`.

        Args:
            max_hidden_memory: How much memory the keys and values of samples that are written at once may take.
            progress: Whether to show a progress bar.

        Returns:
            Token ids, LongTensor `(num_samples, seqlen)`, on the CPU; `prune` takes them as calibration data.

        Raises:
            ConfigurationError: If the model cannot write.
            CalibrationDataError: If it takes shorter samples only.
            NumericalError: If its weights or outputs are NaN or infinite.
            UnsupportedModelError: If the model was pruned already, or cannot be.
        """
        check_single("`write_calibration`", "Start one.")
        prunable = dense_model(self.model)
        settings = pass_settings(BATCH_SIZE, progress, max_hidden_memory, None)
        nothing = calibration_tokens(WRITTEN, self.config, None, self.limits).tokens
        return samples_alone(Passes(prunable, nothing, settings), self.config)

    def evaluate(
        self,
        data: TokenSource | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_windows: int | None = None,
        progress: bool = True,
        dense: PreTrainedModel | DenseOutputs | str | os.PathLike | None = None,
    ) -> dict[str, Any]:
        """Measure the model's perplexity as it is now, and how far it is from a dense one; the report keeps it all.

        Args:
            data: What `optimum_otprune.pruning.calibration.data.evaluation_tokens` takes; None is the configuration's
                dataset.
            batch_size: Windows per forward pass; changes nothing but speed and rounding.
            max_windows: How many windows are evaluated, the first ones; None for all.
            progress: Whether to show a progress bar.
            dense: The dense model, its folder or Hub id, or `optimum_otprune.models.agreement.DenseOutputs` of it.

        Returns:
            `perplexity`, `nll` (nats per token), `num_tokens`, and the protocol: `num_windows`, `seqlen`, `stride`,
            `dtype`, `protocol`, `data`, and `stage` (`"dense"` or `"pruned"`); after `prune` also `seen_windows`: how
            many of the windows share a passage with the calibration samples. For a folder that was loaded it is there
            if some do, and a lower bound. `max_windows` where it was given. Against `dense` also `dense_perplexity`,
            `kl` and `agreement`, as `optimum_otprune.models.agreement.evaluate_model` returns them.

        Raises:
            CalibrationDataError: If the data cannot be used.
            UnsupportedModelError: If `dense` is pruned, or has another vocabulary or tokenizer.
            NumericalError: If a model's outputs are NaN.
        """
        check_whole(self.model)
        batch_size = check_count("batch_size", batch_size)
        max_windows = None if max_windows is None else check_count("max_windows", max_windows)
        self._places |= noted_places(evaluation_data=data, dense_model=dense)
        reference = dense_reference(dense, self.model, self.tokenizer)
        tokens = evaluation_tokens(data, self.config, self.tokenizer, self.limits, max_windows)
        passes = PassSettings(batch_size, progress)
        metrics = evaluation(self.model, reference, tokens, passes, self.report, self._calibrated_on)
        metrics |= {} if max_windows is None else {"max_windows": max_windows}
        self._evaluations.append(metrics)
        if self.report is not None:
            self.report = dataclasses.replace(self.report, evaluations=tuple(self._evaluations))
        return dict(metrics)
