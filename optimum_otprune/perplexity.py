"""Perplexity by one protocol, as an `evaluate.Metric`. The only door to `evaluate`.

Windows of `seqlen` tokens without overlap, the tail dropped; within a window every token but the first is predicted
from the ones before it. The model runs in its own dtype, log-probabilities are taken in float32 and summed in float64.
"""

import math
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.block_runner import input_device
from optimum_otprune.errors import NumericalError
from optimum_otprune.processes import gathered, own_samples

PROTOCOL = "non-overlapping windows, tail dropped, every token but a window's first, log-softmax in float32"


class TokenPerplexity(evaluate.Metric):
    """Corpus perplexity of windows: `exp(Σ nll / Σ tokens)`.

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
        return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll, "num_tokens": num_tokens}


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel, tokens: Tensor, batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """Measure a model on windows of tokens.

    Args:
        model: Put into evaluation mode.
        tokens: LongTensor `(num_windows, seqlen)`.
        batch_size: Windows per forward pass; changes nothing but speed and rounding.
        progress: Whether to show a progress bar.

    Returns:
        `perplexity`, `nll` (nats per token), `num_tokens` (predicted), and the protocol: `num_windows`, `seqlen`,
        `stride`,
        `dtype`, `protocol`.

    Raises:
        NumericalError: If a log-likelihood is NaN.
    """
    model.eval()
    device = input_device(model)
    metric = TokenPerplexity(keep_in_memory=True)
    batches = tokens[own_samples(len(tokens), 1)].split(batch_size)
    found = []
    for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress):
        logits = model(input_ids=batch.to(device), use_cache=False).logits
        log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)  # (windows, seqlen − 1, vocab_size)
        targets = batch[:, 1:].to(log_probabilities.device)
        nll = -log_probabilities.gather(-1, targets[..., None])[..., 0].double().sum(dim=1)  # (windows,)
        if torch.isnan(nll).any():
            raise NumericalError(
                "The model's log-likelihoods are NaN: its weights are damaged or its dtype overflowed."
            )
        found += nll.tolist()
    predictions = [nll for part in gathered(found) for nll in part]
    metric.add_batch(predictions=predictions, references=[tokens.shape[1] - 1] * len(tokens))
    return {
        **metric.compute(),
        "num_windows": len(tokens),
        "seqlen": tokens.shape[1],
        "stride": tokens.shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
        "protocol": PROTOCOL,
    }
