"""Perplexity by one protocol, as an `evaluate.Metric`. The only door to `evaluate`.

Windows of `seqlen` tokens without overlap, the tail dropped; within a window every token but the first is predicted
from the ones before it. The model runs in its own dtype, log-probabilities are taken in float32 and summed in float64.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.distillation import CHUNK_BYTES, positions_together
from optimum_otprune.models.defaults import BATCH_SIZE
from optimum_otprune.models.distributed import gathered, own_samples
from optimum_otprune.models.inputs import check_predicts_next, input_device, vocabulary_size

_LOGIT_BYTES = 2**28  # of one forward pass, as far as whole windows allow
_CHUNKS = 6  # that many at once, where two models are compared
_FLOAT32_BYTES = 4
LARGEST_EXPONENT = 700  # nats; `math.exp` overflows from 710 on

PROTOCOL = "non-overlapping windows, tail dropped, every token but a window's first, log-softmax in float32"


class Perplexity(TypedDict):
    """One measurement and its protocol.

    Attributes:
        perplexity: The perplexity, `exp(nll)`.
        nll: Nats per predicted token.
        num_tokens: Number of predicted tokens.
        num_windows: Number of windows.
        seqlen: Number of tokens of a window.
        stride: Number of tokens from the beginning of a window to that of the next.
        dtype: The data type of the model.
        protocol: The rest of the protocol, in words.
    """

    perplexity: float
    nll: float
    num_tokens: int
    num_windows: int
    seqlen: int
    stride: int
    dtype: str
    protocol: str


class TokenPerplexity(evaluate.Metric):
    """The perplexity of windows as one corpus: `exp(Σ nll / Σ tokens)`.

    Predictions are summed negative log-likelihoods (nats) of windows, references their numbers of predicted tokens.

    Example:
        >>> metric = TokenPerplexity(keep_in_memory=True)
        >>> metric.compute(predictions=[0.0, 0.0], references=[3, 5])
        {'perplexity': 1.0, 'nll': 0.0, 'num_tokens': 8}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=self.__class__.__doc__ or "",
            citation="",
            inputs_description="predictions: summed NLL per window; references: predicted tokens per window",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Iterable[float], references: Iterable[int]) -> dict[str, float | int]:
        num_tokens = sum(references)
        nll = math.fsum(predictions) / num_tokens
        perplexity = math.exp(nll) if nll < LARGEST_EXPONENT else math.inf
        return {"perplexity": perplexity, "nll": nll, "num_tokens": num_tokens}


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel, tokens: Tensor, batch_size: int = BATCH_SIZE, progress: bool = True
) -> Perplexity:
    """Measure a model on windows of tokens.

    Args:
        model: The model, which is put into evaluation mode.
        tokens: The windows' token ids, LongTensor `(num_windows, seqlen)`.
        batch_size: Number of windows per forward pass, fewer if the vocabulary is large (see `windows_together`); it
            changes nothing but speed and rounding.
        progress: Whether to show a progress bar.

    Returns:
        The perplexity, and the protocol.

    Raises:
        NumericalError: If a log-likelihood is NaN.
    """
    check_predicts_next(model)
    model.eval()
    device = input_device(model)
    together = windows_together(batch_size, tokens.shape[1], vocabulary_size(model), model.dtype.itemsize)
    batches = tokens[own_samples(len(tokens), 1)].split(together)
    found = []
    for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress):
        # No name holds the logits, so that those of the next batch do not come beside them.
        nll = _summed_nll(model(input_ids=batch.to(device), use_cache=False).logits, batch)  # (windows,)
        if torch.isnan(nll).any():
            raise NumericalError(
                "The model's log-likelihoods are NaN: its weights are damaged or its dtype overflowed."
            )
        found += nll.tolist()
    return corpus_perplexity(model, tokens, [nll for part in gathered(found) for nll in part])


def corpus_perplexity(model: PreTrainedModel, tokens: Tensor, nlls: Sequence[float]) -> Perplexity:
    """Return the perplexity of windows as one corpus, and the protocol.

    Args:
        model: The model that was measured.
        tokens: The windows' token ids, LongTensor `(num_windows, seqlen)`.
        nlls: The summed negative log-likelihood of each window, in nats.

    Returns:
        What `evaluate_perplexity` returns.
    """
    metric = TokenPerplexity(keep_in_memory=True)
    metric.add_batch(predictions=nlls, references=[tokens.shape[1] - 1] * len(tokens))
    measured = metric.compute()
    return Perplexity(
        perplexity=measured["perplexity"],
        nll=measured["nll"],
        num_tokens=measured["num_tokens"],
        num_windows=len(tokens),
        seqlen=tokens.shape[1],
        stride=tokens.shape[1],
        dtype=str(model.dtype).removeprefix("torch."),
        protocol=PROTOCOL,
    )


def windows_together(batch_size: int, seqlen: int, vocab_size: int, element_size: int) -> int:
    """Return how many windows go through the model at once: their logits are at most 268 MB, or those of one window.

    Args:
        batch_size: The largest number of windows.
        seqlen: Number of tokens of a window.
        vocab_size: Number of logits of a token.
        element_size: Number of bytes of a logit.

    Example:
        >>> windows_together(8, 2048, 49152, 4), windows_together(8, 512, 49152, 4), windows_together(8, 256, 2048, 4)
        (1, 2, 8)
    """
    return max(1, min(batch_size, _LOGIT_BYTES // (seqlen * vocab_size * element_size)))


def evaluation_bytes(batch_size: int, seqlen: int, vocab_size: int, element_size: int) -> int:
    """Return the bytes that logits and log-probabilities take where a model is compared with the dense one.

    Args:
        batch_size: The largest number of windows per forward pass.
        seqlen: Number of tokens of a window.
        vocab_size: Number of logits of a token.
        element_size: Number of bytes of a logit.
    """
    of_both = 2 * vocab_size
    windows = windows_together(batch_size, seqlen, of_both, element_size)
    return windows * seqlen * of_both * element_size + _CHUNKS * CHUNK_BYTES


def _summed_nll(logits: Tensor, batch: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of each window's tokens but the first, `(windows,)` float64.

    Log-probabilities of a large vocabulary take many times the memory of the hidden states, hence a few positions are
    computed at a time.

    Args:
        logits: The model's logits, `(windows, seqlen, vocab_size)`.
        batch: The windows' token ids, LongTensor `(windows, seqlen)`.
    """
    targets = batch[:, 1:].to(logits.device)
    positions = positions_together(logits.shape[-1])
    return torch.stack([_window_nll(rows[:-1], ids, positions) for rows, ids in zip(logits, targets)])


def _window_nll(logits: Tensor, targets: Tensor, positions: int) -> Tensor:
    parts = zip(logits.split(positions), targets.split(positions))
    nll = [cross_entropy(rows.float(), ids, reduction="none").double().sum() for rows, ids in parts]
    return torch.stack(nll).sum()
