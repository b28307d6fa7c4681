"""How far a model's predictions are from the dense model's: mean KL divergence, and agreement on the next token.

Perplexity looks at the probability of one token alone, and where it rises for some and falls for others, the mean
hides both; the dense model's whole distribution does not. See Dutta et al., "Accuracy is Not All You Need" (NeurIPS
2024), https://arxiv.org/abs/2407.09141. Windows and protocol are those of `optimum_otprune.models.perplexity`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.errors import ConfigurationError, NumericalError, UnsupportedModelError
from optimum_otprune.functional.distillation import Divergence, divergence
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.changes import is_pruned
from optimum_otprune.models.defaults import HIDDEN_MEMORY
from optimum_otprune.models.distributed import gathered, own_samples
from optimum_otprune.models.inputs import check_predicts_next, input_device, vocabulary_size
from optimum_otprune.models.perplexity import (
    Perplexity,
    corpus_perplexity,
    evaluate_perplexity,
    windows_together,
)
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import StoredTensor, TensorSpill

_LogitsOf = Callable[[int, Tensor], Tensor]  # of the windows from a number on, `(windows, seqlen, vocab_size)`
_SAME_HEAD = 0.01  # relative distance of logits that another device or batch size stays far below


class DenseOutputs:
    """What the dense model says of the evaluation text, kept while the model is pruned.

    Pruning changes FFNs alone. So the hidden states behind the last block say all: the pruned model's own head makes
    the dense model's logits of them, exactly, and no second model is needed. They take
    `num_windows * seqlen * hidden_size` numbers.

    Args:
        max_memory: The bytes of them that are kept in memory; the others wait in files.
        folder: The folder of those files; default: the system's folder for temporary files.

    Example:
        `kept = DenseOutputs()`, `pruner.evaluate(data, dense=kept)`, `pruner.prune(...)`, and again
        `pruner.evaluate(data, dense=kept)`, which then has `kl` and `agreement`.
    """

    def __init__(self, max_memory: int = HIDDEN_MEMORY, folder: Path | None = None):
        self._spill = TensorSpill(max_memory, folder)
        self._hidden: list[StoredTensor] = []
        self._tokens: Tensor | None = None
        self._logits = torch.empty(0)  # of one token, by which the head is known again

    @property
    def is_empty(self) -> bool:
        """Whether no model was evaluated with it yet."""
        return self._tokens is None

    @contextmanager
    def keeping(self, prunable: PrunableModel, tokens: Tensor) -> Iterator[None]:
        """Keep what a model says while a block of code runs it on windows, in order.

        Args:
            prunable: The dense model.
            tokens: The windows of all processes, LongTensor `(num_windows, seqlen)`.
        """

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._hidden += [self._spill.put(window.clone()) for window in hidden]

        handle = prunable.stack[-1][0].module.register_forward_hook(keep)
        try:
            yield
            handle.remove()  # what follows runs the last block's hooks, too
            self._tokens = tokens.clone()
            self._logits = _last_logits(self._logits_by(prunable, tokens), tokens)
        except BaseException:
            self._hidden, self._tokens = [], None
            raise
        finally:
            handle.remove()

    def logits_by(self, prunable: PrunableModel, tokens: Tensor) -> _LogitsOf:
        """Return a function that gives the dense model's logits, computed by the head of the pruned model.

        Args:
            prunable: The pruned model.
            tokens: The windows of all processes, LongTensor `(num_windows, seqlen)`.

        Raises:
            ConfigurationError: If what was kept is of other windows, or of a model with another head.
        """
        if self._tokens is None or not torch.equal(self._tokens, tokens):
            raise ConfigurationError(
                "The outputs of the dense model were kept for other windows of text. Evaluate both models on the same "
                "data, with the same `seqlen` and `max_windows`."
            )
        logits_of = self._logits_by(prunable, tokens)
        found = _last_logits(logits_of, tokens)
        if not float((found - self._logits).norm()) <= _SAME_HEAD * float(self._logits.norm()):
            raise ConfigurationError(
                "The outputs of the dense model were kept of a model with another head, or the head was changed "
                "since. Give the dense model itself."
            )
        return logits_of

    def _logits_by(self, prunable: PrunableModel, tokens: Tensor) -> _LogitsOf:
        runner = BlockRunner(prunable, [tokens[:1]], TensorSpill())
        device = prunable.stack[-1][0].device

        def logits(start: int, batch: Tensor) -> Tensor:
            kept = [stored.load() for stored in self._hidden[start : start + len(batch)]]
            return runner.finish(batch, torch.stack(kept).to(device)).logits

        return logits


@torch.no_grad()
def _last_logits(logits_of: _LogitsOf, tokens: Tensor) -> Tensor:
    """Return the logits behind the first of this process's windows, `(vocab_size,)` on the CPU."""
    first = tokens[own_samples(len(tokens), 1)][:1]
    return logits_of(0, first)[0, -1].float().cpu()


class Evaluation(Perplexity, total=False):
    """The perplexity of a model, and what it shares with the dense model where that is there.

    Attributes:
        dense_perplexity: The perplexity of the dense model.
        kl: The mean of KL(dense || model), in nats per predicted token.
        agreement: Share of the predicted tokens for which both models find the same token most likely.
    """

    dense_perplexity: float
    kl: float
    agreement: float


def evaluate_model(
    model: PreTrainedModel,
    dense: PreTrainedModel | DenseOutputs | None,
    tokens: Tensor,
    batch_size: int,
    progress: bool,
) -> Evaluation:
    """Measure a model on windows of tokens, against the dense model where it is there.

    Args:
        model: The model, which is put into evaluation mode.
        dense: The dense model, on any device, or what was kept of it; None measures perplexity alone. If it is empty
            outputs, they are filled with what the model itself says.
        tokens: The windows' token ids, LongTensor `(num_windows, seqlen)`.
        batch_size: Number of windows per forward pass, fewer if the vocabulary is large.
        progress: Whether to show a progress bar.

    Returns:
        What `evaluate_perplexity` returns; against a dense model also `dense_perplexity`, `kl`, the mean of
        KL(dense || model) in nats per predicted token, and `agreement`, the share of predicted tokens for which both
        models find the same token most likely.

    Raises:
        NumericalError: If a log-likelihood is NaN.
        ConfigurationError: If what was kept of the dense model is of other windows.
        UnsupportedModelError: If outputs of a model that is pruned are to be kept as the dense one's.
    """
    if dense is None:
        return Evaluation(**evaluate_perplexity(model, tokens, batch_size, progress))
    if isinstance(dense, PreTrainedModel):
        return _evaluate_against(model, _asked(dense), tokens, batch_size, progress)
    if dense.is_empty:
        if is_pruned(model):
            raise UnsupportedModelError(
                "The outputs of the dense model are to be kept, but this model is pruned. Evaluate the dense model "
                "with them first."
            )
        with dense.keeping(PrunableModel.of(model), tokens):
            return Evaluation(**evaluate_perplexity(model, tokens, batch_size, progress))
    dense_logits = dense.logits_by(PrunableModel.of(model), tokens)
    return _evaluate_against(model, dense_logits, tokens, batch_size, progress)


def _asked(dense: PreTrainedModel) -> _LogitsOf:
    dense.eval()
    device = input_device(dense)
    return lambda start, batch: dense(input_ids=batch.to(device), use_cache=False).logits


@torch.no_grad()
def _evaluate_against(
    model: PreTrainedModel, dense_logits: _LogitsOf, tokens: Tensor, batch_size: int, progress: bool
) -> Evaluation:
    """Run both models over the windows once, and reduce the logits of each batch to sums."""
    check_predicts_next(model)
    model.eval()
    device, seqlen = input_device(model), tokens.shape[1]
    # Logits of both models are there at the same time.
    together = windows_together(batch_size, seqlen, 2 * vocabulary_size(model), model.dtype.itemsize)
    batches = tokens[own_samples(len(tokens), 1)].split(together)
    found: list[Divergence] = []
    for batch in tqdm(batches, desc="Comparing", unit="batch", disable=not progress):
        found += _batch_sums(
            dense_logits(len(found), batch), model(input_ids=batch.to(device), use_cache=False).logits, batch
        )
    sums = [window for part in gathered(found) for window in part]
    metrics = corpus_perplexity(model, tokens, [window.nll for window in sums])
    teacher = corpus_perplexity(model, tokens, [window.teacher_nll for window in sums])
    return Evaluation(
        **metrics,
        dense_perplexity=teacher["perplexity"],
        # Rounding may leave a mean below zero where the models hardly differ.
        kl=max(0.0, math.fsum(window.kl for window in sums) / metrics["num_tokens"]),
        agreement=sum(window.agreement for window in sums) / metrics["num_tokens"],
    )


def _batch_sums(dense_logits: Tensor, logits: Tensor, batch: Tensor) -> list[Divergence]:
    """Return the sums of each window of a batch.

    Args:
        dense_logits: The dense model's logits, `(windows, seqlen, vocab_size)`, on any device.
        logits: The model's logits, the same.
        batch: The windows' token ids, LongTensor `(windows, seqlen)`.

    Raises:
        NumericalError: If a log-likelihood is NaN.
    """
    targets = batch[:, 1:].to(logits.device)
    found = [divergence(dense[:-1], own[:-1], ids) for dense, own, ids in zip(dense_logits, logits, targets)]
    for name, field in (("dense model", "teacher_nll"), ("model", "nll")):
        if any(math.isnan(getattr(window, field)) for window in found):
            raise NumericalError(
                f"The {name}'s log-likelihoods are NaN: its weights are damaged or its dtype overflowed."
            )
    return found
