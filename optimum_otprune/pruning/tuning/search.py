"""Search for the configuration with the least perplexity on held-out samples. The only door to `optuna`, an extra."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import BUDGET_FIELDS
from optimum_otprune.errors import (
    CalibrationDataError,
    ConfigurationError,
    MissingExtraError,
    NumericalError,
    OTPruneError,
    StudyError,
)
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.changes import unchanged
from optimum_otprune.models.faithfulness import measured_factors
from optimum_otprune.models.find_ffns import dense_width
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.perplexity import evaluate_perplexity
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import forward_seconds
from optimum_otprune.pruning.layer_store import WrittenOnce
from optimum_otprune.pruning.pipeline import prune_model
from optimum_otprune.pruning.prune_heads import planned_heads
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.size_target import with_pruning_ratio
from optimum_otprune.pruning.tuning.latency import width_for_latency
from optimum_otprune.pruning.tuning.search_space import (
    Domain,
    Range,
    check_search_space,
    contains,
    default_search_space,
    sample_config,
)
from optimum_otprune.pruning.tuning.study_fingerprint import check_same, fingerprint
from optimum_otprune.pruning.tuning.trials import Trial, TuningResult, TuningSettings, plain_value
from optimum_otprune.pruning.widths import width_multiple
from optimum_otprune.storage.untrusted import parse_json, visible, why_no_name

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

_STUDY_NAME = "otprune"
_SEEDS = 2**32  # NumPy takes smaller seeds only, and optuna draws with it


def tune_model(
    prunable: PrunableModel,
    base: OTPruningConfig,
    tokens: Tensor,
    settings: TuningSettings,
    on_trial: Callable[[TuningResult], None],
) -> TuningResult:
    """Search for a better configuration than the given one at the same budget; the model stays as it is.

    Args:
        prunable: The dense model.
        base: The configuration to start from, which is the first trial.
        tokens: Calibration samples, LongTensor `(num_samples, seqlen)`.
        settings: The limits of the search.
        on_trial: A function called with the result so far when the search starts and after each trial.

    Raises:
        OTPruneError: If the search cannot start or the first trial fails, of the fitting class; errors of other trials
            end that trial only.
    """
    optuna = _optuna()
    _check_one_budget(base, settings.target_latency)
    factors = measured_factors(prunable, tokens)
    prunable = prunable.checked(factors)
    is_residual = prunable.spec.residual and any(factors)
    given = settings.search_space
    given = default_search_space(base, is_residual, prunable.can_hold_intercept) if given is None else given
    space = check_search_space(given, base)
    settings = settings._replace(latency_shape=settings.latency_shape or (1, tokens.shape[1]))
    fit, heldout = split_samples(tokens, settings.validation_share, settings.seed)
    if settings.target_latency is None:
        with_pruning_ratio(base, prunable)  # called for its error if the target cannot be met
    with _quiet(optuna):
        study = _open_study(optuna, settings.study)
        _check_same(study, fingerprint(prunable.model, tokens, base, space, **_conditions(settings)))
        base = _at_latency(study, prunable, base, settings)
        objective = partial(_perplexity, prunable, fit, heldout, settings.passes.batch_size, WrittenOnce())
        return _Search(optuna, study, base, space, objective).run(settings, on_trial)


def split_samples(tokens: Tensor, validation_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples that trials prune on and those that they are measured on, each in their order.

    Args:
        tokens: The samples, LongTensor `(num_samples, seqlen)`.
        validation_share: Share of the samples to measure on, in (0, 1); at least one sample goes to either side.
        seed: Seed of the split.

    Raises:
        CalibrationDataError: If there is only one sample.
    """
    count = len(tokens)
    if count < 2:
        raise CalibrationDataError(
            "Tuning needs at least 2 calibration samples: some to prune on and others to measure on. Give more text, "
            "or set a smaller `seqlen`."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    heldout = min(count - 1, max(1, round(validation_share * count)))
    return tokens[order[heldout:].sort().values], tokens[order[:heldout].sort().values]


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            "Tuning needs optuna, which is not installed. Install it with: pip install optimum_otprune[tune]"
        ) from error
    return optuna


@contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Silence optuna's own log for a while: trials are logged here."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _open_study(optuna: ModuleType, path: Path | None) -> "optuna.Study":
    """Continue the study of a file, closing trials that a killed process left unfinished, or begin one."""
    if path is None:
        return optuna.create_study()
    reason = why_no_name(str(path))
    if reason is not None:
        raise _no_study(path, reason)
    if path.is_symlink():
        raise _no_study(path, "it is a link")
    try:
        if path.exists() and path.stat().st_size > 0:
            _prepare_journal(path)
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(storage=storage, study_name=_STUDY_NAME, load_if_exists=True)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    except OSError as error:
        raise StudyError(
            f"The study file {path.name!r} cannot be read or written ({error.strerror}). Give a file in a folder that "
            "exists and is writable."
        ) from error
    except StudyError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, optuna.exceptions.OptunaError) as error:
        raise _no_study(path, f"{type(error).__name__}: {error}") from error
    return study


def _no_study(path: Path, reason: str) -> StudyError:
    return StudyError(
        f"The file {visible(path.name, 60)!r} is no study of `tune` ({reason}). Give the file of an earlier run, or "
        "the name of a new one."
    )


def _prepare_journal(path: Path) -> None:
    """Refuse a file of another kind before writing to it, and repair one that a killed process left.

    Raises:
        StudyError: If it does not begin as a study of `tune` does.
    """
    content = path.read_bytes()
    try:
        first = parse_json(content.partition(b"\n")[0])
    except ValueError as error:
        raise _no_study(path, "its first line is not JSON") from error
    if not isinstance(first, dict) or first.get("study_name") != _STUDY_NAME:
        raise _no_study(path, "it does not begin with one")
    if not content.endswith(b"\n"):  # an incomplete line, after which nothing can be appended
        os.truncate(path, content.rfind(b"\n") + 1)


def _conditions(settings: TuningSettings) -> dict[str, object]:
    """Return the settings that a trial's result depends on."""
    assert settings.latency_shape is not None
    shape = None if settings.target_latency is None else list(settings.latency_shape)
    return {
        "validation_share": settings.validation_share,
        "tuning seed": settings.seed,
        "target_latency": settings.target_latency,
        "latency_shape": shape,
    }


def _check_same(study: "optuna.Study", now: dict[str, object]) -> None:
    if "fingerprint" in study.user_attrs:
        check_same(study.user_attrs["fingerprint"], now)
    study.set_user_attr("fingerprint", now)


def _at_latency(
    study: "optuna.Study", prunable: PrunableModel, base: OTPruningConfig, settings: TuningSettings
) -> OTPruningConfig:
    """Return the base with the ratio that meets the target latency, measured once for all runs of a study."""
    if settings.target_latency is None:
        return base
    may_differ = base.allocation != "uniform" or base.skip_layers or base.layer_ratios
    if may_differ or "allocation" in (settings.search_space or {}):
        raise ConfigurationError(
            "`target_latency` is measured with all layers of one width. Use allocation='uniform' without "
            "`skip_layers` and `layer_ratios`, or a ratio in place of the latency."
        )
    if "pruning_ratio" not in study.user_attrs:
        assert settings.latency_shape is not None
        width = dense_width(prunable.blocks)
        kept = width_for_latency(
            prunable,
            settings.target_latency,
            width_multiple(width, base),
            partial(forward_seconds, shape=settings.latency_shape),
        )
        logger.info("%d of %d channels meet the target latency.", kept, width)
        study.set_user_attr("pruning_ratio", 1 - kept / width)
    return base.replace(pruning_ratio=study.user_attrs["pruning_ratio"])


def _perplexity(
    prunable: PrunableModel, fit: Tensor, heldout: Tensor, batch_size: int, store: WrittenOnce, config: OTPruningConfig
) -> float:
    """Return the perplexity of the model pruned by a configuration; the model itself stays as it is."""
    recipe = Recipe.resolve(with_pruning_ratio(config, prunable), {})
    with unchanged(prunable, planned_heads(prunable, recipe.config)):
        prune_model(prunable, recipe, fit, PassSettings(batch_size, progress=False), store)
        perplexity = float(evaluate_perplexity(prunable.model, heldout, batch_size, progress=False)["perplexity"])
    if not math.isfinite(perplexity):
        raise NumericalError("The pruned model's perplexity on the held-out samples is infinite.")
    return perplexity


class _Search(NamedTuple):
    """The state of a search.

    Attributes:
        optuna: The module `optuna`.
        study: The trials so far.
        base: The configuration to start from.
        space: The domain of each field that is searched over.
        objective: The function of a configuration that is minimized.
    """

    optuna: ModuleType
    study: "optuna.Study"
    base: OTPruningConfig
    space: Mapping[str, Domain]
    objective: Callable[[OTPruningConfig], float]

    def run(self, settings: TuningSettings, on_trial: Callable[[TuningResult], None]) -> TuningResult:
        """Try configurations until there are enough trials, or time is up."""
        deadline = math.inf if settings.timeout is None else time.monotonic() + settings.timeout
        result = self._result()
        on_trial(result)
        with tqdm(
            total=settings.num_trials,
            initial=len(result.trials),
            desc="Tuning",
            unit="trial",
            disable=not settings.passes.progress,
        ) as bar:
            while len(result.trials) < settings.num_trials and (not result.trials or time.monotonic() < deadline):
                # A sampler of its own for each trial: an interrupted study goes on as if it had not been interrupted.
                seed = seed_of(settings.seed, len(result.trials)) % _SEEDS
                self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)
                self._run_trial(is_first=not result.trials)
                result = self._result()
                trial = result.trials[-1]
                logger.log(logging.WARNING if trial.error else logging.INFO, "%s", trial.describe(self.base))
                bar.update()
                on_trial(result)
        return result

    def _run_trial(self, is_first: bool) -> None:
        """Run one trial; if anything but a failure of its configuration ends it, it does not count."""
        states, base, space = self.optuna.trial.TrialState, self.base, self.space
        if is_first and contains(space, base):
            self.study.enqueue_trial(_own_values(base, space))
        trial = self.study.ask()
        is_sampled = not is_first or contains(space, base)
        config = sample_config(base, space, partial(_suggest, trial)) if is_sampled else base
        trial.set_user_attr("config", config.to_dict())
        ended = False
        try:
            self.study.tell(trial, self.objective(config))
            ended = True
        except OTPruneError as error:
            if is_first:
                raise
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=states.PRUNED)
            ended = True
        finally:
            if not ended:
                self.study.tell(trial, state=states.FAIL)

    def _result(self) -> TuningResult:
        states = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.PRUNED)
        trials = (
            Trial(
                trial.number,
                OTPruningConfig.from_dict(trial.user_attrs["config"]),
                trial.value,
                trial.user_attrs.get("error"),
                0.0 if trial.duration is None else trial.duration.total_seconds(),
            )
            for trial in self.study.get_trials(deepcopy=False, states=states)
        )
        return TuningResult(self.base, tuple(trials))


def _own_values(base: OTPruningConfig, space: Mapping[str, Domain]) -> dict[str, object]:
    """Return the suggestions of the sampler that give the configuration of the user."""
    values: dict[str, object] = {}

    def own(name: str, label: str, domain: Domain) -> object:
        value = getattr(base, name)
        values[label] = value if isinstance(domain, Range) else plain_value(value)
        return value

    sample_config(base, space, own)
    return values


def _suggest(trial: "optuna.Trial", name: str, label: str, domain: Domain) -> object:
    if isinstance(domain, Range):
        if isinstance(domain.low, int) and isinstance(domain.high, int):
            return trial.suggest_int(label, domain.low, domain.high)
        return trial.suggest_float(label, domain.low, domain.high)
    by_name = {plain_value(value): value for value in domain.values}
    return by_name[trial.suggest_categorical(label, list(by_name))]


def _check_one_budget(config: OTPruningConfig, target_latency: float | None) -> None:
    """Raise an error if a target latency competes with another target."""
    given = [name for name in BUDGET_FIELDS[1:] if getattr(config, name) is not None]
    if target_latency is not None and given:
        raise ConfigurationError(
            f"`target_latency={target_latency!r}` and `{given[0]}={getattr(config, given[0])!r}` say in more than one "
            "way how much to prune. Give one of them."
        )
