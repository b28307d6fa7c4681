"""What a search over configurations tried, and what came of it."""

import dataclasses
import math
from typing import Any

from optimum_otprune.configuration import OTPruningConfig


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
