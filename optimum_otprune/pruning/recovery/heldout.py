"""How far a pruned model is from the dense one on held-out tokens, and which weights are the best on them."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.distillation import Divergence, divergence, positions_of
from optimum_otprune.models.distributed import gathered, num_processes, process_index
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.perplexity import LARGEST_EXPONENT, windows_together
from optimum_otprune.pruning.recovery.teacher import Teacher, logits_of
from optimum_otprune.pruning.recovery_report import HeldoutPart

_ERRORS = 2.0  # standard errors of a paired difference that count as noise


class Measured(NamedTuple):
    """What was measured on the windows of one part.

    Attributes:
        sums: Sums over each window's tokens, `(num_windows, 4)` float64, in the order of `Divergence`.
        seqlen: Number of tokens of a window.
    """

    sums: Tensor
    seqlen: int

    @property
    def per_token(self) -> Divergence:
        """Means over all predicted tokens."""
        return Divergence(*(self.sums.sum(0) / (len(self.sums) * (self.seqlen - 1))).tolist())

    @property
    def kl(self) -> float:
        """Mean divergence in nats per token."""
        return max(0.0, self.per_token.kl)

    def is_worse_than(self, other: "Measured") -> bool:
        """Return whether the divergence is larger by more than noise: two standard errors of the paired difference."""
        differences = (self.sums - other.sums)[:, 0] / (self.seqlen - 1)  # (num_windows,)
        count = len(differences)
        noise = _ERRORS * differences.std().item() / math.sqrt(count) if count > 1 else 0.0
        return differences.mean().item() > noise

    def change(self, after: "Measured", part: str, data: str) -> HeldoutPart:
        """Return the entry of the report for these windows before, and `after` recovery.

        Args:
            after: What was measured on the same windows after it.
            part: What kind of text it is.
            data: Where it comes from.
        """
        old, new = self.per_token, after.per_token
        return HeldoutPart(
            part=part,
            data=data,
            num_windows=len(self.sums),
            seqlen=self.seqlen,
            kl_before=self.kl,
            kl_after=after.kl,
            agreement_before=old.agreement,
            agreement_after=new.agreement,
            perplexity_dense=_perplexity(old.teacher_nll),
            perplexity_before=_perplexity(old.nll),
            perplexity_after=_perplexity(new.nll),
        )


class Heldout:
    """Held-out windows of several kinds of text, of which each of several processes measures some.

    Args:
        model: The pruned model.
        teacher: What the dense model says of the windows.
        batch_size: The most windows of a forward pass.
    """

    def __init__(self, model: PreTrainedModel, teacher: Teacher, batch_size: int):
        self._model, self._teacher, self._batch_size = model, teacher, batch_size

    def measure(self) -> dict[str, Measured]:
        """Measure the model as it is now.

        Raises:
            NumericalError: If predictions are NaN.
        """
        return {name: self._part(name, tokens) for name, tokens in self._teacher.samples.heldout.items()}

    def _part(self, name: str, tokens: Tensor) -> Measured:
        together = windows_together(self._batch_size, tokens.shape[1], vocabulary_size(self._model), 4)
        every, processes = torch.arange(len(tokens)), num_processes()
        own = [self._windows(name, rows) for rows in every[process_index() :: processes].split(together) if len(rows)]
        sums = torch.empty(len(tokens), 4, dtype=torch.float64)
        for process, found in enumerate(gathered([window for batch in own for window in batch])):
            sums[process::processes] = torch.tensor(found, dtype=torch.float64).reshape(-1, 4)
        if torch.isnan(sums).any():
            raise NumericalError(
                f"Predictions on held-out tokens ({name}) are NaN: a learning rate that is too high, damaged weights, "
                "or a dtype that overflowed. Give a lower `learning_rate`, or load the model in float32."
            )
        return Measured(sums, tokens.shape[1])

    @torch.no_grad()
    def _windows(self, name: str, rows: Tensor) -> list[Divergence]:
        tokens = self._teacher.samples.part(name)[rows]
        seqlen = tokens.shape[1]
        said = self._teacher.says(name, rows)
        logits = logits_of(self._model, tokens)
        targets = tokens[:, 1:].to(logits.device)
        return [
            divergence(positions_of(said, place * seqlen, (place + 1) * seqlen - 1), window[:-1], ids)
            for place, (window, ids) in enumerate(zip(logits, targets))
        ]


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, LARGEST_EXPONENT))


def mean_kl(measured: Mapping[str, Measured]) -> float:
    """Return the divergence as a mean over parts, each counting the same."""
    return sum(part.kl for part in measured.values()) / len(measured)
