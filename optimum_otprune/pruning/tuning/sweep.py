"""The quality curve of one model: prune it in memory at each ratio, measure it, and put it back."""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from optimum_otprune.config.checks import check_count, check_option
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import BUDGET_FIELDS, OPTIONS_BY_NAME, VERSION_KEY
from optimum_otprune.errors import CalibrationDataError, ConfigurationError, NumericalError, OTPruneError, unknown_name
from optimum_otprune.models.changes import unchanged
from optimum_otprune.models.defaults import BATCH_SIZE, HIDDEN_MEMORY, SWEEP_FILE, SWEEP_PLOT
from optimum_otprune.models.devices import model_sizes
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.perplexity import evaluate_perplexity
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.data import (
    ModelLimits,
    TokenSource,
    calibration_tokens,
    evaluation_tokens,
)
from optimum_otprune.pruning.calibration.overlap import seen_windows
from optimum_otprune.pruning.calibration.self_calibration import probe_passes
from optimum_otprune.pruning.fingerprint import model_digest, tensors_digest
from optimum_otprune.pruning.layer_store import NoStore, WrittenOnce
from optimum_otprune.pruning.pipeline import prune_model
from optimum_otprune.pruning.preparation import Expected, Prepared
from optimum_otprune.pruning.prune_heads import planned_heads
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.settings import pass_settings
from optimum_otprune.pruning.tuning.sweep_file import SweepFile
from optimum_otprune.pruning.tuning.sweep_results import SweepPoint, SweepResult
from optimum_otprune.pruning.versions import versions
from optimum_otprune.pruning.widths import plan_widths
from optimum_otprune.storage.outputs import check_results_folder, output_path

logger = logging.getLogger(__name__)


class SweepTexts(NamedTuple):
    """The token ids that a quality curve is made with, the same ones at every ratio.

    Attributes:
        calibration: Calibration samples, LongTensor `(num_samples, seqlen)`.
        evaluation: Windows to measure the perplexity on, LongTensor `(num_windows, seqlen)`, by the data's name.
    """

    calibration: Tensor
    evaluation: Mapping[str, Tensor]


class SweepOptions(TypedDict, total=False):
    """The options of a sweep beside its ratios and data.

    Attributes:
        batch_size: Samples per forward pass; changes nothing but speed, memory and rounding.
        max_windows: How many windows of each data set are evaluated, the first ones; None for all.
        max_hidden_memory: Bytes of hidden states in main memory, as in `prune`.
        spill_folder: Where the other hidden states wait, as in `prune`.
        progress: Whether to show a progress bar.
        folder: A folder that keeps each point as soon as it is known, in the file `sweep.json`; the same call goes on
            with what is there.
        on_point: A function that gets the curve so far, at the start and after each ratio.
    """

    batch_size: int
    max_windows: int | None
    max_hidden_memory: int | str
    spill_folder: str | os.PathLike | None
    progress: bool
    folder: str | os.PathLike | None
    on_point: Callable[[SweepResult], None] | None


class SweepSettings(NamedTuple):
    """How a quality curve is made.

    Attributes:
        passes: How the passes over token ids are run.
        max_windows: How many windows of each data set are evaluated, the first ones; None for all.
        folder: The folder that keeps each point as soon as it is known; None keeps nothing.
        on_point: A function that gets the curve so far, at the start and after each ratio.
    """

    passes: PassSettings
    max_windows: int | None
    folder: Path | None
    on_point: Callable[[SweepResult], None]

    @classmethod
    def of(cls, options: SweepOptions) -> "SweepSettings":
        """Return the settings of options as a user gives them.

        Raises:
            ConfigurationError: If there is no such option, or one has a value that it cannot take.
            OutputError: If the folder holds something else, or something else would be harmed.
        """
        for name in options:
            if name not in SweepOptions.__annotations__:
                raise ConfigurationError(unknown_name("option", name, SweepOptions.__annotations__))
        passes = pass_settings(
            check_count("batch_size", options.get("batch_size", BATCH_SIZE)),
            options.get("progress", True),
            options.get("max_hidden_memory", HIDDEN_MEMORY),
            options.get("spill_folder"),
        )
        windows, given = options.get("max_windows"), options.get("folder")
        folder = None if given is None else output_path(given)
        if folder is not None:
            check_results_folder(folder, {}, (SWEEP_FILE, SWEEP_PLOT))
        max_windows = None if windows is None else check_count("max_windows", windows)
        return cls(passes, max_windows, folder, options.get("on_point") or (lambda result: None))


class SweepSource(NamedTuple):
    """What reads texts for a model.

    Attributes:
        config: The configuration, which names a data set and the length and number of samples.
        tokenizer: The model's tokenizer, or None.
        limits: Vocabulary and positions of the model.
    """

    config: OTPruningConfig
    tokenizer: PreTrainedTokenizerBase | None
    limits: ModelLimits

    def read(
        self,
        calibration_data: TokenSource | None,
        evaluation_data: TokenSource | Mapping[str, TokenSource] | None,
        max_windows: int | None,
    ) -> SweepTexts:
        """Return the token ids of both kinds of data.

        Args:
            calibration_data: The calibration samples, as `prune` takes them.
            evaluation_data: What to measure on, as `evaluate` takes it, or a dictionary of several such by name; None
                is the configuration's dataset.
            max_windows: How many windows of each are evaluated; None for all.

        Raises:
            CalibrationDataError: If data cannot be found or used.
        """
        if type(evaluation_data) is dict:  # and no dictionary of the splits of a data set, which is a subclass
            if not evaluation_data:
                raise CalibrationDataError("There is nothing to measure the perplexity on. Name a data set.")
            read = {name: evaluation_tokens(one, *self, max_windows) for name, one in evaluation_data.items()}
        else:
            found = evaluation_tokens(evaluation_data, *self, max_windows)
            read = {found.source: found}
        calibration = calibration_tokens(calibration_data, *self).tokens
        return SweepTexts(calibration, {str(name): found.tokens for name, found in read.items()})


def sweep_configs(base: OTPruningConfig, ratios: Sequence[float]) -> list[OTPruningConfig]:
    """Return the configuration of each ratio, in ascending order, each ratio once.

    Args:
        base: The configuration to start from; its own ratio does not count.
        ratios: Shares of every FFN's channels to remove, in [0, 1).

    Raises:
        ConfigurationError: If there is no ratio, one is out of range, or the configuration has a target of its own.
    """
    check_count("the number of ratios", len(ratios))
    for ratio in ratios:
        check_option(OPTIONS_BY_NAME["pruning_ratio"], ratio)
    given = [name for name in BUDGET_FIELDS[1:] if getattr(base, name) is not None]
    if given:
        raise ConfigurationError(
            f"`{given[0]}={getattr(base, given[0])!r}` says how much to prune, and so do the ratios. Leave it out."
        )
    return [base.replace(pruning_ratio=float(ratio)) for ratio in sorted(set(ratios))]


def sweep_model(
    prunable: PrunableModel, configs: Sequence[OTPruningConfig], texts: SweepTexts, settings: SweepSettings
) -> SweepResult:
    """Prune a model at each ratio and measure its perplexity; the model stays as it is, bit for bit.

    A ratio that fails ends itself only, unless none has succeeded yet. It is tried again when the curve is continued.

    Args:
        prunable: The dense model.
        configs: A configuration for each ratio, from `sweep_configs`.
        texts: The token ids to calibrate on and to measure on.
        settings: How it is done, and where the points are kept.

    Raises:
        ConfigurationError: If a ratio does not fit the model.
        StudyError: If the folder's curve is damaged, or of another model, data or configuration.
        OTPruneError: If the first ratio fails, of the fitting class.
    """
    for config in configs:
        plan_widths(prunable.blocks, config)  # called for its errors, before any work
    file = SweepFile(settings.folder, _fingerprint(prunable, configs[0], texts))
    result = file.read()
    if result is None:
        result = _begun(prunable, texts, settings.passes)
        file.write(result)
    settings.on_point(result)
    left = [config for config in configs if result.point(_ratio(config)) is None]
    if left:
        passes = Passes(prunable, texts.calibration, settings.passes)
        prunable = probe_passes(passes, configs[0].seed).checked().prunable
    shared = None if configs[0].allocation == "adaptive" else _SharedPreparation()
    curve = _Curve(prunable, texts, settings.passes, shared, WrittenOnce())
    for config in tqdm(left, desc="Sweeping", unit="ratio", disable=not settings.passes.progress):
        has_succeeded = any(point.error is None for point in result.points)
        result = result.with_point(curve.point_or_failure(config) if has_succeeded else curve.point(config))
        file.write(result)
        settings.on_point(result)
    return result


def _ratio(config: OTPruningConfig) -> float:
    assert config.pruning_ratio is not None
    return config.pruning_ratio


def _begun(prunable: PrunableModel, texts: SweepTexts, passes: PassSettings) -> SweepResult:
    """Return a curve without points: the dense model, and how its perplexities were measured."""
    start = time.perf_counter()
    with unchanged(prunable):  # evaluation mode included
        measured = _measured(prunable, texts, passes)
    perplexities = {name: float(metrics.pop("perplexity")) for name, metrics in measured.items()}
    for name, metrics in measured.items():
        del metrics["nll"]  # that of the dense model, like the perplexity, is none of the protocol
        metrics |= seen_windows(texts.evaluation[name], texts.calibration, None)
    parameters, _ = model_sizes(prunable.model)
    seconds = time.perf_counter() - start
    return SweepResult(SweepPoint(0.0, tuple(prunable.widths), parameters, perplexities, None, seconds), (), measured)


def _measured(prunable: PrunableModel, texts: SweepTexts, passes: PassSettings) -> dict[str, dict[str, Any]]:
    """Return what `evaluate_perplexity` says of the model as it is now, by data set."""
    found: dict[str, dict[str, Any]] = {
        name: dict(evaluate_perplexity(prunable.model, windows, passes.batch_size, progress=False))
        for name, windows in texts.evaluation.items()
    }
    for name, metrics in found.items():
        if not math.isfinite(metrics["perplexity"]):
            raise NumericalError(f"The perplexity on {name} is infinite.")
    return found


class _SharedPreparation(NoStore):
    """Keeps what the dense model was asked for, such as gradients and text of its own: it is the same at every ratio.

    Attributes:
        widths: Channels of each layer at the ratio that is pruned to next.
    """

    def __init__(self) -> None:
        self.widths: list[int] = []
        self._kept: Prepared | None = None

    def prepared(self, make: Callable[[], Prepared], expected: Callable[[], Expected], spill: TensorSpill) -> Prepared:
        """Return what was made at the first ratio, with the widths of this one."""
        if self._kept is None:
            self._kept = make()
        return self._kept._replace(widths=self.widths)


class _Curve(NamedTuple):
    """The parts of a sweep that are the same at every ratio.

    Attributes:
        prunable: The dense model, checked.
        texts: The token ids to calibrate on and to measure on.
        passes: How the passes over them are run.
        shared: What the dense model is asked for once; None where it depends on the ratio.
        text: What it wrote, which does not.
    """

    prunable: PrunableModel
    texts: SweepTexts
    passes: PassSettings
    shared: _SharedPreparation | None
    text: WrittenOnce

    def point(self, config: OTPruningConfig) -> SweepPoint:
        """Return the point of a configuration's ratio; the model is put back afterwards."""
        start = time.perf_counter()
        recipe = Recipe.resolve(config, {})
        if self.shared is not None:
            self.shared.widths = plan_widths(self.prunable.blocks, config)
        with unchanged(self.prunable, planned_heads(self.prunable, config)):
            quiet = dataclasses.replace(self.passes, progress=False)
            pruned = prune_model(self.prunable, recipe, self.texts.calibration, quiet, self.shared or self.text)
            parameters = model_sizes(self.prunable.model)[0] - pruned.padding_parameters
            measured = _measured(self.prunable, self.texts, quiet)
        widths = tuple(report.intermediate_size_after for report in pruned.reports)
        perplexities = {name: float(metrics["perplexity"]) for name, metrics in measured.items()}
        return SweepPoint(_ratio(config), widths, parameters, perplexities, None, time.perf_counter() - start)

    def point_or_failure(self, config: OTPruningConfig) -> SweepPoint:
        """Return the same, or a point that says why there is none."""
        start = time.perf_counter()
        try:
            return self.point(config)
        except OTPruneError as error:
            logger.warning("The ratio %g failed: %s", _ratio(config), error)
            return SweepPoint(_ratio(config), (), 0, {}, str(error), time.perf_counter() - start)


def _fingerprint(prunable: PrunableModel, base: OTPruningConfig, texts: SweepTexts) -> dict[str, Any]:
    """Return everything that a point depends on but its ratio, JSON-ready."""
    config = {name: value for name, value in base.to_dict().items() if name not in (VERSION_KEY, *BUDGET_FIELDS)}
    values = {
        "model": model_digest(prunable.model),
        "calibration samples": tensors_digest([texts.calibration]),
        "evaluation data": {name: tensors_digest([windows]) for name, windows in texts.evaluation.items()},
        "version of optimum_otprune": versions()["optimum_otprune"],
        **{f"`{name}` of the configuration": value for name, value in config.items()},
    }
    return json.loads(json.dumps(values))
