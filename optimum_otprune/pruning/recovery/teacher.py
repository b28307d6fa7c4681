"""What the dense model says of the samples of a recovery, asked when it is needed."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from optimum_otprune.functional.distillation import Teacher as Says
from optimum_otprune.models.inputs import model_inputs
from optimum_otprune.models.training import computing
from optimum_otprune.pruning.recovery.samples import RecoverySamples


class Teacher(Protocol):
    """What a pruned model is trained towards.

    Attributes:
        samples: The samples.
        logits_per_token: Number of logits that are known of each token; None for all.
    """

    samples: RecoverySamples
    logits_per_token: int | None

    def says(self, part: str, rows: torch.Tensor) -> Says:
        """Return the dense model's predictions behind every token of some samples, one sample after another.

        Args:
            part: The samples that are meant: `TRAINING`, or a kind of held-out text.
            rows: Which of them, LongTensor.
        """
        ...


class DenseTeacher:
    """The dense model itself.

    Args:
        dense: The dense model.
        samples: The samples.
    """

    def __init__(self, dense: PreTrainedModel, samples: RecoverySamples):
        self._dense, self.samples = dense.eval(), samples
        self.logits_per_token: int | None = None

    @torch.no_grad()
    def says(self, part: str, rows: torch.Tensor) -> Says:
        """Return the dense model's logits, `(rows * seqlen, vocab_size)`."""
        return logits_of(self._dense, self.samples.part(part)[rows]).flatten(0, 1)


def logits_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return a model's logits `(samples, seqlen, vocab_size)` on its device, multiplied as `computing` says.

    Args:
        model: The model.
        batch: Token ids, LongTensor `(samples, seqlen)`.
    """
    with computing(model):
        return model(**model_inputs(model, batch), use_cache=False).logits
