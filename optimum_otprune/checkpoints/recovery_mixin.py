"""What a pruned model in memory can do with the dense one: be trained towards its predictions."""

import dataclasses
import os
from pathlib import Path
from typing import Unpack

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.checkpoints.dense import Compared, base_skeleton, load_base
from optimum_otprune.checkpoints.load import hub_id
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.recovery_options import RecoveryOptions, RecoverySettings
from optimum_otprune.models.changes import all_or_nothing, check_pruned
from optimum_otprune.models.distributed import check_model, check_single
from optimum_otprune.models.training import check_trainable
from optimum_otprune.pruning.calibration.data import (
    ExpectedSamples,
    ModelLimits,
    TokenData,
    TokenSource,
    expected_samples,
)
from optimum_otprune.pruning.dry_run.estimate import Skeleton
from optimum_otprune.pruning.dry_run.recovery_plan import Files, RecoveryPlan, plan_recovery
from optimum_otprune.pruning.recovery.dense_logits import DenseLogits, asked, facts, write_logits
from optimum_otprune.pruning.recovery.recover import recover_model
from optimum_otprune.pruning.recovery.samples import RecoveryData
from optimum_otprune.pruning.recovery.snapshots import resumable_recovery
from optimum_otprune.pruning.recovery_report import RecoveryReport
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.storage.outputs import noted_places
from optimum_otprune.storage.state_folder import state_path


class RecoveryMixin:
    """Trains a pruned model towards the dense one.

    Attributes:
        model: The model, pruned.
        config: The configuration that it was pruned by.
        tokenizer: The model's tokenizer, or None.
        report: The report of pruning, or None.
        base_model: The Hub id of the dense model, or None if that is not known.
    """

    model: PreTrainedModel
    config: OTPruningConfig
    tokenizer: PreTrainedTokenizerBase | None
    report: PruningReport | None
    base_model: str | None
    _places: dict[str, Path]
    _unsaved_states: tuple
    _calibrated_on: Tensor | None

    def recover(
        self,
        data: TokenSource | None = None,
        *,
        base_model: str | os.PathLike | PreTrainedModel | DenseLogits | None = None,
        heldout_data: TokenSource | None = None,
        **options: Unpack[RecoveryOptions],
    ) -> RecoveryReport:
        """Train the pruned model in place towards the dense model's own predictions; no labels are used.

        It is trained on the given samples and on samples that the dense model writes itself. Some of each are held
        out, and the weights that are kept are the best on them: on none are they worse than before, beyond noise. If
        this ends early, by an error or an interruption, the model is what it was before, bit for bit. Several
        processes share each step's samples among them.

        Args:
            data: What `optimum_otprune.pruning.calibration.data.calibration_tokens` takes; None is what the model was
                pruned on, or the configuration's dataset where that is not in memory.
            base_model: The dense model: in memory, or its Hub id or folder, or what `keep_logits` kept of it for the
                same data; default: where this one was made from.
            heldout_data: Other text that is held out only, such as a second domain; as `evaluate` takes it.
            **options: Options of `optimum_otprune.config.recovery_options.RecoveryOptions`, which says what each
                means, such as `num_tokens`, `trained` and `learning_rate`.

        Returns:
            The report, also kept in `self.report.recoveries`.

        Raises:
            ConfigurationError: If an option is wrong, or the dense model is not known.
            UnsupportedModelError: If the model is not pruned, or offloaded, or was not made from the dense one.
            CalibrationDataError: If the data cannot be used.
            NumericalError: If predictions are NaN or infinite.
            StateError: If `resume_from` is in use, is damaged, or belongs to a run that differs from this one.
        """
        settings, texts = self._recovery(data, heldout_data, options)
        check_trainable(self.model, settings.trained)
        state, kept = state_path(options.get("resume_from")), options.get("cache_logits")
        dense: PreTrainedModel | DenseLogits
        if isinstance(base_model, DenseLogits):
            check_single("`recover` with logits in files", "Start one, or give the dense model itself.")
            dense = base_model
        elif kept is None:
            dense = self._base(base_model, options)
        else:
            dense = self.keep_logits(kept, data, base_model=base_model, heldout_data=heldout_data, **options)
        run = {} if state is None else texts.fingerprint(self.model, facts(dense), settings)
        with (
            all_or_nothing(self.model),
            resumable_recovery(state, run) as store,
            asked(dense, texts, settings, store) as teacher,
        ):
            recovery = recover_model(self.model, teacher, texts, settings, store)
        self._unsaved_states += () if state is None else ((state, run),)
        recovery = dataclasses.replace(recovery, base_model=hub_id(dense.name_or_path))
        if self.report is not None:
            self.report = dataclasses.replace(self.report, recoveries=(*self.report.recoveries, recovery))
        return recovery

    def keep_logits(
        self,
        folder: str | os.PathLike,
        data: TokenSource | None = None,
        *,
        base_model: str | os.PathLike | PreTrainedModel | None = None,
        heldout_data: TokenSource | None = None,
        **options: Unpack[RecoveryOptions],
    ) -> DenseLogits:
        """Write the dense model's largest logits of all samples that `recover` would train on and be judged on.

        An interrupted call goes on with what is in the folder. `recover` with the same data and the returned value as
        its `base_model` needs no dense model; this model's weights are not read.

        Args:
            folder: The folder, new, or of a call with the same dense model and data.
            data: The data, as in `recover`.
            base_model: The dense model, as in `recover`.
            heldout_data: Other text, as in `recover`.
            **options: The options of `recover`; `num_tokens`, `written_per_sample`, `seed` and `logits_per_token`
                count.

        Raises:
            StateError: If the folder is in use, or of another model or data; names what differs.
            OTPruneError: Whatever `recover` raises before it begins to train.
        """
        check_single("`keep_logits`", "Start one.")
        settings, texts = self._recovery(data, heldout_data, options)
        where = state_path(folder)
        assert where is not None
        return write_logits(where, self._base(base_model, options), texts, settings)

    def plan_recovery(
        self,
        data: TokenSource | None = None,
        *,
        base_model: str | os.PathLike | PreTrainedModel | None = None,
        skeleton: Skeleton | None = None,
        **options: Unpack[RecoveryOptions],
    ) -> RecoveryPlan:
        """Return within seconds what `recover` would take: samples, steps, memory on each device, disk, time.

        No weights are read, and nothing is written; memory and time are rough.

        Args:
            data: The data, as in `recover`; text is not read.
            base_model: The dense model, as in `recover`; of a name only the configuration is read.
            skeleton: This model where it is not loaded; default: where it is now.
            **options: The options of `recover`.

        Raises:
            OTPruneError: Whatever `recover` raises before it loads the dense model.
        """
        settings = self._checked(options)
        dense = base_skeleton(base_model, self._compared, self.base_model, options.get("base_options"))
        known = Skeleton.of_loaded(self.model) if skeleton is None else skeleton
        given = self._pruned_on() if data is None else None
        if given is not None:
            samples = ExpectedSamples(len(given.tokens), given.tokens.shape[1], given.source, is_exact=True)
        else:
            has_tokenizer = self.tokenizer is not None
            samples = expected_samples(data, self.config, ModelLimits.of(self.model), has_tokenizer)
        kept = Files(options.get("resume_from") is not None, options.get("cache_logits") is not None)
        return plan_recovery(known, dense, samples, settings, kept)

    def _recovery(
        self, data: TokenSource | None, other: TokenSource | None, options: RecoveryOptions
    ) -> tuple[RecoverySettings, RecoveryData]:
        """Return checked options and the text of a recovery."""
        settings = self._checked(options)
        self._places |= noted_places(calibration_data=data, evaluation_data=other)
        given = self._pruned_on() if data is None else data
        return settings, RecoveryData.read(given, other, self.config, self.tokenizer, ModelLimits.of(self.model))

    def _checked(self, options: RecoveryOptions) -> RecoverySettings:
        settings = RecoverySettings.of(options, self.config.seed)
        check_model(self.model)
        for name in ("resume_from", "cache_logits"):
            if options.get(name) is not None:
                check_single(f"`{name}`", "Leave it out, or start one.")
        check_pruned(self.model)
        return settings

    @property
    def _compared(self) -> Compared:
        return Compared(self.model, self.tokenizer)

    def _base(self, given: str | os.PathLike | PreTrainedModel | None, options: RecoveryOptions) -> PreTrainedModel:
        return load_base(given, self._compared, self.base_model, options.get("base_options"))

    def _pruned_on(self) -> TokenData | None:
        """Return the samples that the model was pruned on, if they are in memory."""
        if self._calibrated_on is None or self.report is None:
            return None
        return TokenData(self._calibrated_on, str(self.report.calibration["data"]))
