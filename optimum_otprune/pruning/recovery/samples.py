"""What recovery trains on and what it is judged on: given samples, samples that the dense model writes, other text."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.errors import CalibrationDataError, ConfigurationError
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.devices import offloaded_bytes
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.data import (
    ModelLimits,
    TokenData,
    TokenSource,
    calibration_tokens,
    evaluation_tokens,
)
from optimum_otprune.pruning.calibration.self_calibration import why_it_cannot_write, written_samples
from optimum_otprune.pruning.fingerprint import recovery_fingerprint

TRAINING = "training"
KINDS = GIVEN, WRITTEN, OTHER = "given", "written", "other"  # of text, in the order of reports
_SHARE = 1 / 8  # of the given samples that is held out
_LEAST_TOKENS, _MOST_TOKENS = 1024, 8192  # of each kind of text that are held out
_MOST_WRITTEN = 2**22  # tokens that are written where nothing is given; then they are repeated
_TRAINED_PER_HELD_OUT = 64  # tokens: each check of the weights reads all that is held out, with both models


class RecoveryData(NamedTuple):
    """The text that a user gave.

    Attributes:
        given: The samples to train on, of which some are held out.
        other: Windows that are held out only, or None.
    """

    given: TokenData
    other: TokenData | None = None

    def source(self, part: str) -> str:
        """Return where a kind of text comes from; empty for what the dense model writes."""
        found = {GIVEN: self.given, OTHER: self.other}.get(part)
        return "" if found is None else found.source

    @property
    def tokens(self) -> list[Tensor]:
        """The token ids of all that was given."""
        return [part.tokens for part in (self.given, self.other) if part is not None]

    def fingerprint(
        self, model: PreTrainedModel, dense: Mapping[str, object], settings: RecoverySettings
    ) -> dict[str, object]:
        """Return everything that the bits of a recovery with these texts depend on; see `recovery_fingerprint`."""
        return recovery_fingerprint(model, dense, self.tokens, dataclasses.asdict(settings))

    @classmethod
    def read(
        cls,
        given: TokenSource | TokenData | None,
        other: TokenSource | None,
        config: OTPruningConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        limits: ModelLimits,
    ) -> "RecoveryData":
        """Read the samples and windows; see `calibration_tokens` and `evaluation_tokens`.

        Args:
            given: The samples to train on, of which some are held out, or where they come from; None for the
                configuration's dataset.
            other: Windows that are held out only, or None.
            config: The configuration, which names the dataset and the number and length of samples.
            tokenizer: The tokenizer; only text needs one.
            limits: The vocabulary size and the longest sequence of the model.

        Raises:
            CalibrationDataError: If the data cannot be found or used.
        """
        samples = given if isinstance(given, TokenData) else calibration_tokens(given, config, tokenizer, limits)
        if other is None:
            return cls(samples)
        most = max(1, _MOST_TOKENS // limits.seqlen(config))
        return cls(samples, evaluation_tokens(other, config, tokenizer, limits, most))


class Plan(NamedTuple):
    """How many samples of each kind there will be.

    Attributes:
        given: Given samples to train on.
        written: Written samples to train on.
        heldout: Samples of each kind that are held out.
    """

    given: int
    written: int
    heldout: int


def plan_samples(num_given: int, seqlen: int, num_tokens: int, written_per_sample: float) -> Plan:
    """Plan the samples for a budget: all given ones, and as many written ones as fit, at most so many for each.

    If the budget is below two samples for each given one, half of it is written; if nothing is given, all of it.

    Args:
        num_given: Number of given samples, which may be 0.
        seqlen: Number of tokens of each sample.
        num_tokens: Number of tokens to train on.
        written_per_sample: The most written samples for each given one.

    Raises:
        CalibrationDataError: If there are too few samples to hold any out.

    Example:
        >>> plan_samples(128, 256, 1_228_800, 4.0)
        Plan(given=112, written=448, heldout=16)
        >>> plan_samples(128, 256, 25_600, 4.0)
        Plan(given=50, written=50, heldout=4)
    """
    held_out = heldout_tokens(num_tokens) // seqlen
    if not num_given:
        return Plan(0, max(1, min(num_tokens, _MOST_WRITTEN) // seqlen), max(1, held_out))
    if num_given < 2:
        raise CalibrationDataError(
            f"Recovery has {num_given} sample, and holds some out. Give two or more: shorter ones (`seqlen`), or more "
            "text."
        )
    heldout = max(1, min(round(_SHARE * num_given), held_out))
    left = num_given - heldout
    wanted = max(1, num_tokens // seqlen)
    written = min(int(written_per_sample * left), max(wanted - left, wanted // 2))
    return Plan(min(left, max(1, wanted - written)), written, heldout)


def heldout_tokens(num_tokens: int) -> int:
    """Return how many tokens of each kind of text are held out, where there is so much of it.

    Args:
        num_tokens: Number of tokens to train on.
    """
    return max(_LEAST_TOKENS, min(num_tokens // _TRAINED_PER_HELD_OUT, _MOST_TOKENS))


class RecoverySamples(NamedTuple):
    """The samples of a recovery.

    Attributes:
        training: Samples to train on, LongTensor `(num_samples, seqlen)`.
        counts: Number of them by what they are.
        heldout: Held-out windows by what they are.
    """

    training: Tensor
    counts: Mapping[str, int]
    heldout: Mapping[str, Tensor]

    def part(self, name: str) -> Tensor:
        """Return the samples to train on (`TRAINING`), or a kind of held-out ones."""
        return self.training if name == TRAINING else self.heldout[name]

    @property
    def parts(self) -> dict[str, Tensor]:
        """All samples by what they are: those to train on first."""
        return {TRAINING: self.training, **self.heldout}

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield the numbers of samples to train on without end; none comes again before all others came as often.

        Args:
            size: Number of samples of a batch.
            seed: Seed of the order.
        """
        generator = torch.Generator().manual_seed(seed)
        waiting = torch.empty(0, dtype=torch.long)
        while True:
            while len(waiting) < size:
                waiting = torch.cat([waiting, torch.randperm(len(self.training), generator=generator)])
            taken, waiting = waiting[:size], waiting[size:]
            yield taken


def recovery_samples(dense: PreTrainedModel, data: RecoveryData, settings: RecoverySettings) -> RecoverySamples:
    """Return what recovery trains on, and what it is judged on.

    Args:
        dense: The dense model, which writes.
        data: What a user gave.
        settings: The options, which say how much of it there is to be.

    Returns:
        The samples; those of the first of several processes.

    Raises:
        CalibrationDataError: If too little was given.
        ConfigurationError: If the dense model cannot write.
    """
    given, seed = data.given.tokens, settings.seed
    plan = plan_samples(len(given), given.shape[1], settings.num_tokens, settings.written_per_sample)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed_of(seed, 0)))
    held, kept = order[: plan.heldout].sort().values, order[plan.heldout :][: plan.given].sort().values
    heldout: dict[str, Tensor] = {GIVEN: given[held]} if plan.given else {}
    training, counts = [given[kept]], {GIVEN: plan.given}
    if plan.written:
        written = _written(dense, plan.written + plan.heldout, given.shape[1], settings)
        heldout[WRITTEN] = written[: plan.heldout]
        training.append(written[plan.heldout :])
        counts[WRITTEN] = plan.written
    if data.other is not None:
        windows = data.other.tokens
        heldout[OTHER] = windows[: max(1, heldout_tokens(settings.num_tokens) // windows.shape[1])]
    return from_main(RecoverySamples(torch.cat(training), counts, heldout))


def _written(dense: PreTrainedModel, num_samples: int, seqlen: int, settings: RecoverySettings) -> Tensor:
    """Return samples that the dense model writes.

    Raises:
        ConfigurationError: If it cannot.
    """
    reason = why_it_cannot_write(dense, num_samples, seqlen, offloaded_bytes(dense))
    if reason is not None:
        raise ConfigurationError(
            f"The dense model is to write samples that recovery trains on, but {reason}. Set `written_per_sample=0` "
            "(`--written-per-sample 0`) and give text of several kinds."
        )
    passes = PassSettings(settings.batch_size, settings.progress)
    lengths = torch.empty(0, seqlen, dtype=torch.long)
    prunable = PrunableModel(dense, [])  # no block of it is touched, so that it may be quantized
    return written_samples(Passes(prunable, lengths, passes), num_samples, seed_of(settings.seed, 1))
