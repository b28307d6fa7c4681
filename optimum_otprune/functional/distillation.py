"""How far one model's predictions are from another's, on the full vocabulary, a few positions at a time.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 2**25  # bytes of log-probabilities at a time
_FLOAT32_BYTES = 4


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the summed divergence `Σ_t KL(teacher ‖ student)` of two models' predictions, in nats, differentiable.

    It is 0 where both predict the same. Log-probabilities are float32; those of a large vocabulary are never there for
    all positions at once: the backward pass computes them anew.

    Args:
        teacher: Logits of the model that is to be followed, `(num_tokens, vocab_size)`; no gradient flows into them.
        student: Logits of the model that follows, `(num_tokens, vocab_size)`.

    Returns:
        A scalar, float32.

    Example:
        >>> kl_divergence(torch.zeros(3, 2), torch.zeros(3, 2)).item()
        0.0
    """
    size = positions_together(student.shape[-1])
    total = student.new_zeros((), dtype=torch.float32)
    for target, logits in zip(torch.split(teacher.detach(), size), torch.split(student, size)):
        total = total + checkpoint(_summed_kl, target, logits, use_reentrant=False)
    return total


def _summed_kl(teacher: Tensor, student: Tensor) -> Tensor:
    wanted = log_softmax(teacher.float(), dim=-1)
    return kl_div(log_softmax(student.float(), dim=-1), wanted, reduction="sum", log_target=True)


def positions_together(vocab_size: int) -> int:
    """Return how many positions' log-probabilities are computed at a time: 34 MB of them."""
    return max(1, _CHUNK_BYTES // (_FLOAT32_BYTES * vocab_size))


class Divergence(NamedTuple):
    """Sums over the predicted tokens of one window; float64 scalars.

    Attributes:
        kl: Divergence of the student from the teacher, in nats.
        agreement: Number of tokens at which both find the same token the most likely.
        nll: Negative log-likelihood of the student.
        teacher_nll: Negative log-likelihood of the teacher.
    """

    kl: Tensor
    agreement: Tensor
    nll: Tensor
    teacher_nll: Tensor


@torch.no_grad()
def divergence(teacher: Tensor, student: Tensor, targets: Tensor) -> Divergence:
    """Measure how far a student is from a teacher on one window.

    Args:
        teacher: The teacher's logits, `(num_tokens, vocab_size)`.
        student: The student's logits, `(num_tokens, vocab_size)`.
        targets: The ids of the tokens that follow, LongTensor `(num_tokens,)`.
    """
    size = positions_together(student.shape[-1])
    found = [
        torch.stack(
            [
                _summed_kl(wanted, logits).double(),
                (wanted.argmax(-1) == logits.argmax(-1)).sum().double(),
                cross_entropy(logits.float(), ids, reduction="sum").double(),
                cross_entropy(wanted.float(), ids, reduction="sum").double(),
            ]
        )
        for wanted, logits, ids in zip(*(torch.split(rows, size) for rows in (teacher, student, targets)))
    ]
    return Divergence(*torch.stack(found).sum(0))
