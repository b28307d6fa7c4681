"""How far a pruned model is from the dense one on held-out tokens, and which weights are the best on them."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.distillation import Divergence, divergence
from optimum_otprune.models.inputs import input_device, vocabulary_size
from optimum_otprune.models.perplexity import windows_together
from optimum_otprune.models.training import computing
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
        return Divergence(*(self.sums.sum(0) / (len(self.sums) * (self.seqlen - 1))))

    @property
    def kl(self) -> float:
        """Mean divergence in nats per token."""
        return max(0.0, self.per_token.kl.item())

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
            agreement_before=old.agreement.item(),
            agreement_after=new.agreement.item(),
            perplexity_dense=old.teacher_nll.exp().item(),
            perplexity_before=old.nll.exp().item(),
            perplexity_after=new.nll.exp().item(),
        )


class Heldout:
    """Held-out windows of several kinds of text, and both models.

    Args:
        model: The pruned model.
        dense: The dense model.
        parts: Windows by what they are, LongTensors `(num_windows, seqlen)`.
        batch_size: The most windows of a forward pass.
    """

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel, parts: Mapping[str, Tensor], batch_size: int):
        self._model, self._dense, self._parts, self._batch_size = model, dense, parts, batch_size

    def measure(self) -> dict[str, Measured]:
        """Measure the model as it is now.

        Raises:
            NumericalError: If predictions are NaN.
        """
        return {name: self._part(name, tokens) for name, tokens in self._parts.items()}

    @torch.no_grad()
    def _part(self, name: str, tokens: Tensor) -> Measured:
        together = windows_together(self._batch_size, tokens.shape[1], vocabulary_size(self._model), 4)
        rows = []
        for batch in tokens.split(together):
            wanted = logits_of(self._dense, batch)
            with computing(self._model):
                logits = logits_of(self._model, batch)
            for window in range(len(batch)):
                ids = batch[window, 1:].to(logits.device)
                found = divergence(wanted[window, :-1].to(logits.device), logits[window, :-1], ids)
                rows.append(torch.stack(list(found)).cpu())
        sums = torch.stack(rows)
        if torch.isnan(sums).any():
            raise NumericalError(
                f"Predictions on held-out tokens ({name}) are NaN: a learning rate that is too high, damaged weights, "
                "or a dtype that overflowed. Give a lower `learning_rate`, or load the model in float32."
            )
        return Measured(sums, tokens.shape[1])


def logits_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return a model's logits `(samples, seqlen, vocab_size)` on its device.

    Args:
        model: The model.
        batch: Token ids, LongTensor `(samples, seqlen)`.
    """
    return model(input_ids=batch.to(input_device(model)), use_cache=False).logits


def mean_kl(measured: Mapping[str, Measured]) -> float:
    """Return the divergence as a mean over parts, each counting the same."""
    return sum(part.kl for part in measured.values()) / len(measured)
