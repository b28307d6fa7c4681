"""The limits, the trials and the result of a search over configurations."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optimum_otprune.config.checks import check_count, check_option
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.options import OPTIONS_BY_NAME
from optimum_otprune.config.quantities import real_number
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.models.defaults import VALIDATION_SHARE
from optimum_otprune.models.pass_settings import PassSettings


class TuningSettings(NamedTuple):
    """The limits of a search.

    Attributes:
        num_trials: Number of finished trials in all, those of earlier runs of the study included.
        timeout: Seconds after which no trial but the first one starts; None for no limit.
        seed: Seed of the split and of the sampler.
        passes: Number of samples per forward pass, and whether to show a progress bar.
        target_latency: Seconds that a forward pass may take, in place of the configuration's ratio.
        latency_shape: The shape `(batch_size, seqlen)` of that forward pass; None for one calibration sample.
        search_space: A domain for each field; None for the default.
        study: The file of the study; None keeps it in memory.
        validation_share: Share of the samples that the objective is measured on.
    """

    num_trials: int
    timeout: float | None
    seed: int
    passes: PassSettings
    target_latency: float | None = None
    latency_shape: tuple[int, int] | None = None
    search_space: Mapping[str, object] | None = None
    study: Path | None = None
    validation_share: float = VALIDATION_SHARE

    def checked(self) -> "TuningSettings":
        """Return the same settings with plain numbers.

        Raises:
            ConfigurationError: If a setting has the wrong type or is out of range; the message names it.
        """
        return self._replace(
            num_trials=check_count("num_trials", self.num_trials),
            passes=self.passes.by(check_count("batch_size", self.passes.batch_size)),
            timeout=None if self.timeout is None else _between("timeout", self.timeout),
            target_latency=None if self.target_latency is None else _between("target_latency", self.target_latency),
            validation_share=_between("validation_share", self.validation_share, 1),
            seed=check_option(OPTIONS_BY_NAME["seed"], self.seed),
            latency_shape=self._checked_shape(),
        )

    def _checked_shape(self) -> tuple[int, int] | None:
        shape: object = self.latency_shape
        if shape is None:
            return None
        if self.target_latency is None:
            raise ConfigurationError("`latency_shape` would be ignored without `target_latency`.")
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise ConfigurationError(f"`latency_shape` is {shape!r}; want two integers: batch size and seqlen.")
        return check_count("latency_shape[0]", shape[0]), check_count("latency_shape[1]", shape[1])


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        number: The trial's number in the study; numbers of interrupted trials are missing.
        config: The configuration that was tried.
        perplexity: The perplexity on the held-out samples; None if the trial failed.
        error: The reason why it failed, or None.
        seconds: The seconds that it took.
    """

    number: int
    config: OTPruningConfig
    perplexity: float | None
    error: str | None
    seconds: float

    def changes(self, base: OTPruningConfig) -> dict[str, object]:
        """Return the fields that differ from those of another configuration."""
        values, others = self.config.to_dict(), base.to_dict()
        return {name: value for name, value in values.items() if value != others[name]}

    def describe(self, base: OTPruningConfig) -> str:
        """Return one line about the trial."""
        changes = ", ".join(f"{name}={_shown(value)}" for name, value in self.changes(base).items())
        outcome = f"failed: {self.error}" if self.perplexity is None else f"perplexity {self.perplexity:.3f}"
        return f"Trial {self.number}: {outcome} ({changes or 'the given configuration'}; {self.seconds:.1f} s)"


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """The result of a search so far.

    Attributes:
        base: The configuration that it started from, with the ratio that a target latency led to.
        trials: Finished ones, oldest first.
    """

    base: OTPruningConfig
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the least perplexity; of equal ones the first."""
        return min(self.trials, key=lambda trial: math.inf if trial.perplexity is None else trial.perplexity)

    @property
    def base_perplexity(self) -> float:
        """The perplexity of the given configuration, the first trial, on the held-out samples."""
        assert self.trials[0].perplexity is not None
        return self.trials[0].perplexity

    @property
    def best_perplexity(self) -> float:
        """The perplexity of the best configuration on the held-out samples, at most `base_perplexity`."""
        assert self.best.perplexity is not None
        return self.best.perplexity


def plain_value(value: object) -> Any:
    """Return a value of a field as a string or number; the names in a list joined."""
    return "+".join(value) or "none" if isinstance(value, (tuple, list)) else value


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain_value(value))


def _between(name: str, value: object, maximum: float = math.inf) -> float:
    """Return a number above 0 and below the maximum as a float."""
    number = real_number(value)
    if number is None or not 0 < number < maximum:
        below = "" if math.isinf(maximum) else f" and < {maximum:g}"
        raise ConfigurationError(f"`{name}` is {value!r}; want a number > 0{below}.")
    return number
