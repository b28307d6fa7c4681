"""The report of recovery: what was trained, how long, and what it gave on held-out tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.layer_report import check_entry, known_entries

DISTILLATION = (
    "The pruned model was trained towards the dense model's own predictions (distillation, KL divergence), without "
    "labels."
)
_MOST_PARTS = 1000


@dataclasses.dataclass(frozen=True)
class HeldoutPart:
    """How far the pruned model is from the dense one on held-out tokens of one kind, before and after recovery.

    Attributes:
        part: What it is: `"given"` is held out of what was given to train on, `"written"` of what the dense model
            wrote, `"other"` is text that nothing was trained on.
        data: Where the text comes from; empty for what the dense model wrote.
        num_windows: Number of windows.
        seqlen: Number of tokens of a window; all but the first are predicted.
        kl_before: Mean divergence from the dense model's predictions before recovery, in nats per token.
        kl_after: The same after recovery.
        agreement_before: Share of tokens at which both models find the same token the most likely, before recovery.
        agreement_after: The same after recovery.
        perplexity_dense: The dense model's perplexity.
        perplexity_before: The pruned model's perplexity before recovery.
        perplexity_after: The same after recovery.
    """

    part: str
    data: str
    num_windows: int
    seqlen: int
    kl_before: float
    kl_after: float
    agreement_before: float
    agreement_after: float
    perplexity_dense: float
    perplexity_before: float
    perplexity_after: float

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return self.num_windows * (self.seqlen - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the part JSON-ready."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        what = f"{self.part} ({self.data})" if self.data else self.part
        return (
            f"{what}: KL {self.kl_before:.4f} -> {self.kl_after:.4f}, agreement {self.agreement_before:.1%} -> "
            f"{self.agreement_after:.1%}, perplexity {self.perplexity_before:.2f} -> {self.perplexity_after:.2f} "
            f"(dense {self.perplexity_dense:.2f})"
        )


@dataclasses.dataclass(frozen=True)
class RecoveryReport:
    """The result of training a pruned model towards the dense one.

    Attributes:
        trained: The weights that were trained, such as `"ffn"`.
        trained_parameters: The number of these weights.
        budget: Number of tokens that were to be trained on.
        num_tokens: Number of tokens trained on, repetitions included.
        steps: Number of steps of the optimizer that were taken.
        kept_step: The step after which the weights were the best on held-out tokens; 0 if none were better than those
            before it.
        seconds: Duration, without loading.
        learning_rate: The peak learning rate.
        batch_tokens: Number of tokens of a step.
        seed: Seed of what was written, held out and drawn.
        data: Where the given samples come from.
        samples: Number of different samples to train on, `"given"` and `"written"` by the dense model.
        heldout: What was measured on held-out tokens of each kind.
        base_model: Hub id of the dense model, or None.
        logits_per_token: Number of the dense model's logits that were known of each token, all others counting as one;
            None for all.
    """

    trained: str
    trained_parameters: int
    budget: int
    num_tokens: int
    steps: int
    kept_step: int
    seconds: float
    learning_rate: float
    batch_tokens: int
    seed: int
    data: str
    samples: Mapping[str, int]
    heldout: tuple[HeldoutPart, ...]
    base_model: str | None = None
    logits_per_token: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready."""
        return {
            **dataclasses.asdict(self),
            "samples": dict(self.samples),
            "heldout": [p.to_dict() for p in self.heldout],
        }

    @classmethod
    def read(cls, values: object, where: str, unknown: list[str]) -> "RecoveryReport":
        """Read an entry of a report that may come from anybody.

        Args:
            values: The entry.
            where: Its name, for messages.
            unknown: A list that gets the names of entries that are not known here.

        Raises:
            ReportError: If an entry is missing, of another kind, or out of range.
        """
        if isinstance(values, Mapping):
            values = {"logits_per_token": None, **values}  # all, where an earlier report says nothing
        found = known_entries(values, [field.name for field in dataclasses.fields(cls)], where, unknown)
        check_entry(f"{where}.heldout", found["heldout"], (list, tuple))
        if len(found["heldout"]) > _MOST_PARTS:
            raise ReportError(
                f"`{where}.heldout` of the report has {len(found['heldout']):,} entries; want at most {_MOST_PARTS:,}."
                " Get the folder again."
            )
        names = [field.name for field in dataclasses.fields(HeldoutPart)]
        parts = [
            HeldoutPart(**known_entries(part, names, f"{where}.heldout[{index}]", unknown))
            for index, part in enumerate(found["heldout"])
        ]
        report = cls(**{**found, "heldout": tuple(parts)})
        report.check(where)
        return report

    def check(self, where: str, is_finite: bool = True) -> None:
        """Raise an error if an entry has the wrong type or is out of range.

        Args:
            where: The name of the report's entry, for messages.
            is_finite: Whether to refuse NaN and infinity, as in files.

        Raises:
            ReportError: If there is one; the message names the first such entry.
        """
        for name in ("trained", "data"):
            check_entry(f"{where}.{name}", getattr(self, name), str)
        for name in ("trained_parameters", "budget", "num_tokens", "steps", "kept_step", "seed"):
            check_entry(f"{where}.{name}", getattr(self, name), int, 0)
        check_entry(f"{where}.batch_tokens", self.batch_tokens, int, 1)
        for name in ("seconds", "learning_rate"):
            check_entry(f"{where}.{name}", getattr(self, name), float, 0, is_finite)
        if self.base_model is not None:
            check_entry(f"{where}.base_model", self.base_model, str)
        if self.logits_per_token is not None:
            check_entry(f"{where}.logits_per_token", self.logits_per_token, int, 1)
        check_entry(f"{where}.samples", self.samples, Mapping)
        for name, count in self.samples.items():
            check_entry(f"{where}.samples", name, str)
            check_entry(f"{where}.samples.{name}", count, int, 0)
        for index, part in enumerate(self.heldout):
            _check_part(f"{where}.heldout[{index}]", part, is_finite)
        if self.kept_step > self.steps:
            raise ReportError(
                f"`{where}.kept_step` of the report is {self.kept_step}, which is not among its {self.steps} steps. "
                "Get the folder again."
            )

    def __str__(self) -> str:
        kept = f"kept after step {self.kept_step}" if self.kept_step else "the weights before it were kept"
        lines = [
            f"Recovery: {DISTILLATION}",
            f"  Trained: {self.trained} ({self.trained_parameters:,} weights), {self.num_tokens:,} tokens in "
            f"{self.steps:,} steps, {kept}, {self.seconds:,.0f} s",
        ]
        if self.logits_per_token is not None:
            lines.append(f"  KL of the dense model's {self.logits_per_token:,} likeliest tokens, all others as one")
        return "\n".join([*lines, *(f"  Held out, {part}" for part in self.heldout)])


def _check_part(where: str, part: HeldoutPart, is_finite: bool) -> None:
    for name in ("part", "data"):
        check_entry(f"{where}.{name}", getattr(part, name), str)
    check_entry(f"{where}.num_windows", part.num_windows, int, 1)
    check_entry(f"{where}.seqlen", part.seqlen, int, 2)
    for name, least in _least_numbers():
        check_entry(f"{where}.{name}", getattr(part, name), float, least, is_finite)
    for name in ("agreement_before", "agreement_after"):
        if getattr(part, name) > 1:
            raise ReportError(f"`{where}.{name}` of the report is {getattr(part, name)!r:.60}; want a share <= 1.")


def _least_numbers() -> Sequence[tuple[str, float]]:
    stages = ("before", "after")
    least = [(f"{name}_{stage}", 0.0) for name in ("kl", "agreement") for stage in stages]
    return [*least, *((f"perplexity_{stage}", 1.0) for stage in ("dense", *stages))]
