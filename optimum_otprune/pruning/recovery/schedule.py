"""How many steps recovery takes, of how many samples, and how large they are."""

import math
from typing import NamedTuple

from transformers import PreTrainedModel

from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.perplexity import windows_together

_RATE = 0.1  # times 1 / hidden size
_WARM_UP = 0.05  # share of the steps in which the learning rate rises
CHECKS = 8  # of the held-out tokens over the whole schedule
_FLOAT32_BYTES = 4


def learning_rate(hidden_size: int) -> float:
    """Return the default of the peak learning rate: 0.1 over the hidden size.

    Steps of Adam have the size of the learning rate, whatever the gradient is, and a layer adds up as many of them as
    it is wide.

    Source: Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466, table 3.

    Args:
        hidden_size: The model's hidden size.

    Example:
        >>> learning_rate(4096)
        2.44140625e-05
    """
    return _RATE / hidden_size


class Schedule(NamedTuple):
    """How many steps there are, of how many samples.

    Attributes:
        steps: Number of steps of the optimizer.
        size: Number of samples of a step.
        seqlen: Number of tokens of a sample.
        together: Number of samples that go through the models at once.
        every: Number of steps between two checks of the held-out tokens.
        rate: The peak learning rate.
    """

    steps: int
    size: int
    seqlen: int
    together: int
    every: int
    rate: float

    @classmethod
    def of(cls, model: PreTrainedModel, seqlen: int, settings: RecoverySettings) -> "Schedule":
        """Plan the steps for a budget of tokens; there is at least one.

        Args:
            model: The pruned model.
            seqlen: Number of tokens of each sample.
            settings: The options.
        """
        size = max(1, round(min(settings.batch_tokens, settings.num_tokens) / seqlen))
        steps = max(1, round(settings.num_tokens / (size * seqlen)))
        together = min(size, windows_together(settings.batch_size, seqlen, vocabulary_size(model), _FLOAT32_BYTES))
        default = learning_rate(model.config.get_text_config().hidden_size)
        rate = default if settings.learning_rate is None else settings.learning_rate
        return cls(steps, size, seqlen, together, -(-steps // CHECKS), rate)

    @property
    def tokens(self) -> int:
        """Number of tokens of a step."""
        return self.size * self.seqlen

    def is_check(self, step: int) -> bool:
        """Return whether the held-out tokens are looked at after a step, counted from 1."""
        return step % self.every == 0 or step == self.steps

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by in a step, counted from 0: a rise, then half a cosine.

        Example:
            >>> [round(Schedule(4, 1, 1, 1, 1, 1.0).factor(step), 2) for step in range(4)]
            [1.0, 1.0, 0.75, 0.25]
        """
        rise = max(1, round(_WARM_UP * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))
