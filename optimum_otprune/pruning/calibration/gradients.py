"""What gradients through the dense model say of its FFNs: weight × gradient scores, and moments at their outputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.models.backward_pass import LOSS, SINGULAR_VALUES, ReversePass
from optimum_otprune.models.distributed import summed
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.spill import StoredList, TensorSpill, store


class GradientScores(NamedTuple):
    """Weight × gradient of one layer, on the CPU in float32.

    Attributes:
        snip: Under the language-model loss.
        fo: Under the sum of the mean singular values of all modules' outputs.
    """

    snip: WeightScores
    fo: WeightScores


def gradient_scores(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    tokens: Tensor,
    batch_size: int,
    progress: bool = True,
    spill: TensorSpill | None = None,
) -> Sequence[GradientScores]:
    """Score every FFN weight of the dense model by SNIP and FO.

    Both losses are averaged over batches. FO's singular values are those of a module's output reshaped to
    `(batch, -1)`, for every module of the model but the whole.

    Args:
        model: The dense model.
        blocks: Its FFN blocks.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per backward pass; FO depends on it.
        progress: Whether to show progress bars.
        spill: Where hidden states and scores wait.

    Returns:
        One entry per layer.

    Raises:
        NumericalError: If an output or a gradient is NaN or infinite; the message names the module or layer.
    """
    spill = spill or TensorSpill()
    was_training = model.training
    objectives = {"snip": LOSS, "fo": SINGULAR_VALUES}
    walk = ReversePass(model, blocks, tokens, batch_size, list(objectives.values()), spill, progress)
    num_batches = summed(len(walk.batches))
    found = {}
    for block, batches in walk.blocks():
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in objectives}
        for batch in batches:
            for name, objective in objectives.items():
                for projection, gradient in batch.gradients[objective].items():
                    product = gradient.float().T @ batch.inputs[projection].float()  # (out_features, in_features)
                    total = sums[name].get(projection)
                    sums[name][projection] = product if total is None else total.add_(product)
        scores = GradientScores(**{name: _scores(block, sums[name], num_batches) for name in objectives})
        found[block.layer] = store(scores, spill)
    model.train(was_training)
    return StoredList(found[block.layer] for block in blocks)


def _scores(block: FFNBlock, sums: dict[str, Tensor], num_batches: int) -> WeightScores:
    """Weight × mean gradient, channel-first."""
    weights = block.read()
    result: dict[str, Tensor | None] = {"gate": None}
    for name, total in sums.items():
        score = getattr(weights, name).float() * summed(total) / num_batches
        if not torch.isfinite(score).all():
            raise NumericalError(
                f"Layer {block.layer}: the gradient of `{name}` is NaN or infinite. Load the model in float32."
            )
        result[name] = score.T if name == "down" else score
    return WeightScores(**result)  # type: ignore[arg-type]


def gradient_moments(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    tokens: Tensor,
    batch_size: int,
    progress: bool = True,
    spill: TensorSpill | None = None,
) -> Sequence[Tensor]:
    """Second moment of the language-model loss's gradient by each FFN's output, over all tokens.

    Args:
        model: The dense model.
        blocks: Its FFN blocks.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per backward pass.
        progress: Whether to show progress bars.
        spill: Where hidden states and moments wait.

    Returns:
        Σ g gᵀ `(hidden_size, hidden_size)` per layer, float64, on the CPU; up to a factor.

    Raises:
        NumericalError: If an output or a gradient is NaN or infinite; the message names the module or layer.
    """
    spill = spill or TensorSpill()
    walk = ReversePass(model, blocks, tokens, batch_size, [LOSS], spill, progress)
    found = {}
    for block, batches in walk.blocks():  # as gradients flow: the first that is not finite is where it began
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            rows = batch.gradients[LOSS]["down"].double()
            rows = rows * len(rows)  # the loss is a mean over the batch's tokens
            total = total.to(rows.device) + rows.T @ rows
        total = summed(total)
        if not torch.isfinite(total).all():
            raise NumericalError(
                f"Layer {block.layer}: the gradient by the FFN's output is NaN or infinite. Load the model in float32."
            )
        found[block.layer] = spill.put(total)
    return StoredList(found[block.layer] for block in blocks)
