"""What a search over configurations is bounded by, what it tried, and what came of it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.option_checks import check_option
from optimum_otprune.options import OPTIONS_BY_NAME


class TuningSettings(NamedTuple):
    """What a search is bounded by.

    Attributes:
        num_trials: Finished trials in all, those of earlier runs of the study included.
        timeout: No trial starts after so many seconds, the first one excepted; None for no limit.
        search_space: By field; None for the default.
        study: File of the study; None keeps it in memory.
        target_latency: Seconds of a forward pass, in place of the configuration's ratio.
        latency_shape: `(batch_size, seqlen)` of that forward pass; None for one calibration sample.
        validation_share: Share of the samples that the objective is measured on.
        seed: Of the split and of the sampler.
        batch_size: Samples per forward pass.
        progress: Whether to show a progress bar.
    """

    num_trials: int
    timeout: float | None
    search_space: Mapping[str, Any] | None
    study: Path | None
    target_latency: float | None
    latency_shape: tuple[int, int] | None
    validation_share: float
    seed: int
    batch_size: int
    progress: bool

    def check(self) -> None:
        """Raise a `ConfigurationError` that names what is of the wrong kind or out of range."""
        check_positive(num_trials=self.num_trials, batch_size=self.batch_size)
        _check_between(math.inf, timeout=self.timeout, target_latency=self.target_latency)
        _check_between(1, validation_share=self.validation_share)
        check_option(OPTIONS_BY_NAME["seed"], self.seed)
        shape: Any = self.latency_shape
        if shape is None:
            return
        if self.target_latency is None:
            raise ConfigurationError("`latency_shape` would be ignored without `target_latency`.")
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise ConfigurationError(f"`latency_shape` is {shape!r}; want two integers: batch size and seqlen.")
        check_positive(**dict(zip(("latency_shape[0]", "latency_shape[1]"), shape)))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        number: In the study; numbers of interrupted trials are missing.
        config: What was tried.
        perplexity: On the held-out samples; None if it failed.
        error: Why it failed, or None.
        seconds: That it took.
    """

    number: int
    config: OTPruningConfig
    perplexity: float | None
    error: str | None
    seconds: float

    def changes(self, base: OTPruningConfig) -> dict[str, Any]:
        """Fields that differ from those of another configuration."""
        values, others = self.config.to_dict(), base.to_dict()
        return {name: value for name, value in values.items() if value != others[name]}

    def describe(self, base: OTPruningConfig) -> str:
        """One line."""
        changes = ", ".join(f"{name}={_shown(value)}" for name, value in self.changes(base).items())
        outcome = f"failed: {self.error}" if self.perplexity is None else f"perplexity {self.perplexity:.3f}"
        return f"Trial {self.number}: {outcome} ({changes or 'the given configuration'}; {self.seconds:.1f} s)"


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """What a search has found so far.

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
        """Of the given configuration, which is the first trial, on the held-out samples."""
        assert self.trials[0].perplexity is not None
        return self.trials[0].perplexity

    @property
    def best_perplexity(self) -> float:
        """Of the best configuration, on the held-out samples; at most that of the given one."""
        assert self.best.perplexity is not None
        return self.best.perplexity


def plain_value(value: Any) -> Any:
    """Return a value of a field as a string or number; the names in a list joined."""
    return "+".join(value) or "none" if isinstance(value, (tuple, list)) else value


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain_value(value))


def check_positive(**counts: int | None) -> None:
    """Raise a `ConfigurationError` that names a count that is no integer >= 1; None is left out."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigurationError(f"`{name}` is {count!r}; want an integer >= 1.")


def _check_between(maximum: float, **numbers: float | None) -> None:
    for name, number in numbers.items():
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if number is not None and not (is_number and 0 < number < maximum):
            below = "" if math.isinf(maximum) else f" and < {maximum:g}"
            raise ConfigurationError(f"`{name}` is {number!r}; want a number > 0{below}.")
