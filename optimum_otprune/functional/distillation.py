"""How far one model's predictions are from another's, a few positions at a time.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**25  # of log-probabilities at a time
_FLOAT32_BYTES = 4


class TopLogits(NamedTuple):
    """The most likely tokens of a model's predictions, and what all others have together.

    Attributes:
        logprobs: Log-probabilities of the most likely tokens, the likeliest first, `(num_tokens, k)` float32.
        ids: These tokens, integers `(num_tokens, k)`.
        rest: Log-probability of all other tokens together, `(num_tokens,)` float32.
        nll: Negative log-probability of the token that follows in the text, `(num_tokens,)` float32.
    """

    logprobs: Tensor
    ids: Tensor
    rest: Tensor
    nll: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, k: int) -> "TopLogits":
        """Return what is kept of logits, computed a few positions at a time.

        Args:
            logits: The logits, `(num_tokens, vocab_size)`.
            targets: The ids of the tokens that follow, LongTensor `(num_tokens,)`.
            k: Number of tokens that are kept, smaller than the vocabulary.
        """
        size = positions_together(logits.shape[-1])
        found = [_top(rows, ids, k) for rows, ids in zip(torch.split(logits, size), torch.split(targets, size))]
        return cls(*(torch.cat(parts) for parts in zip(*found)))

    def to(self, device: torch.device) -> "TopLogits":
        """Return them on a device."""
        return TopLogits(*(part.to(device) for part in self))


Teacher = Tensor | TopLogits  # logits `(num_tokens, vocab_size)`, or what was kept of them


def positions_of(teacher: Teacher, start: int, stop: int) -> Teacher:
    """Return what a teacher says at some positions.

    Args:
        teacher: What it says at all of them.
        start: The first position.
        stop: The one behind the last.
    """
    return teacher[start:stop] if isinstance(teacher, Tensor) else TopLogits(*(part[start:stop] for part in teacher))


def kl_divergence(teacher: Teacher, student: Tensor) -> Tensor:
    """Return the summed divergence `Σ_t KL(teacher ‖ student)` of two models' predictions, in nats, differentiable.

    It is 0 where both predict the same, and a token that the teacher rules out adds nothing. Log-probabilities are
    float32; those of a large vocabulary are never there for all positions at once: the backward pass computes them
    anew.

    Of the teacher's k most likely tokens S, with `p` and `q` the two models' probabilities, the divergence is
    `Σ_{i in S} p_i log(p_i / q_i) + r log(r / s)` with `r = 1 - Σ_{i in S} p_i` and `s = 1 - Σ_{i in S} q_i`: all
    other tokens count as one. That is never more than the divergence on the full vocabulary (the log sum inequality),
    and equal to it where the student shares out the rest as the teacher does.

    Args:
        teacher: Logits of the model that is to be followed, `(num_tokens, vocab_size)`, or the largest of them; no
            gradient flows into them.
        student: Logits of the model that follows, `(num_tokens, vocab_size)`.

    Returns:
        A scalar, float32.

    Example:
        >>> kl_divergence(torch.zeros(3, 2), torch.zeros(3, 2)).item()
        0.0
    """
    total = student.new_zeros((), dtype=torch.float32)
    for target, logits in zip(_chunks(teacher, student), torch.split(student, positions_together(student.shape[-1]))):
        total = total + checkpoint(_summed_kl, target, logits, use_reentrant=False)
    return total


def positions_together(vocab_size: int) -> int:
    """Return how many positions' log-probabilities are computed at a time: they take 34 MB, or are those of one.

    Args:
        vocab_size: Number of logits of a token.
    """
    return max(1, CHUNK_BYTES // (_FLOAT32_BYTES * vocab_size))


class Divergence(NamedTuple):
    """Sums over the predicted tokens of one window.

    Attributes:
        kl: Divergence of the student from the teacher, in nats.
        agreement: Number of tokens at which both find the same token the most likely.
        nll: Negative log-likelihood of the student.
        teacher_nll: Negative log-likelihood of the teacher.
    """

    kl: float
    agreement: float
    nll: float
    teacher_nll: float


@torch.no_grad()
def divergence(teacher: Teacher, student: Tensor, targets: Tensor) -> Divergence:
    """Measure how far a student is from a teacher on one window.

    Args:
        teacher: The teacher's logits, `(num_tokens, vocab_size)`, or the largest of them, on any device.
        student: The student's logits, `(num_tokens, vocab_size)`.
        targets: The ids of the tokens that follow, LongTensor `(num_tokens,)`.
    """
    size = positions_together(student.shape[-1])
    parts = zip(_chunks(teacher, student), torch.split(student, size), torch.split(targets, size))
    found = [torch.stack(_sums(wanted.to(student.device), logits, ids)) for wanted, logits, ids in parts]
    return Divergence(*torch.stack(found).sum(0).tolist())


def _chunks(teacher: Teacher, student: Tensor) -> Iterator[Teacher]:
    size = positions_together(student.shape[-1])
    for start in range(0, len(student), size):
        yield positions_of(teacher, start, start + size)


def _sums(teacher: Teacher, student: Tensor, targets: Tensor) -> list[Tensor]:
    if isinstance(teacher, Tensor):
        likeliest, nll = teacher.argmax(-1), cross_entropy(teacher.float(), targets, reduction="none")
    else:
        likeliest, nll = teacher.ids[:, 0], teacher.nll
    sums = (
        _kl(teacher, student),
        likeliest == student.argmax(-1),
        cross_entropy(student.float(), targets, reduction="none"),
        nll,
    )
    return [entries.double().sum() for entries in sums]


def _summed_kl(teacher: Teacher, student: Tensor) -> Tensor:
    wanted = teacher.detach() if isinstance(teacher, Tensor) else teacher
    return _kl(wanted, student).sum()


def _kl(teacher: Teacher, student: Tensor) -> Tensor:
    """Return the divergence at each position, `(num_tokens,)`."""
    found = log_softmax(student.float(), dim=-1)
    if isinstance(teacher, Tensor):
        return _weighted(log_softmax(teacher.float(), dim=-1), found).sum(-1)
    ids = teacher.ids.long()
    rest = found.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return _weighted(teacher.logprobs, found.gather(-1, ids)).sum(-1) + _weighted(teacher.rest, rest)


def _weighted(wanted: Tensor, found: Tensor) -> Tensor:
    probabilities = wanted.exp()
    # A token that the teacher rules out adds nothing, and -inf times 0 would be NaN.
    return torch.where(probabilities > 0, probabilities * (wanted - found), 0.0)


def _top(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, ...]:
    logprobs = log_softmax(logits.float(), dim=-1)
    top, ids = logprobs.topk(k, dim=-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return top, ids.int(), rest, -logprobs.gather(-1, targets[:, None])[:, 0]
