"""Gradients of the dense model at its FFNs: weight × gradient scores, and moments at their outputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.models.backward_pass import LOSS, SINGULAR_VALUES, FFNGradients
from optimum_otprune.models.distributed import summed
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.passes import Passes
from optimum_otprune.models.spill import StoredList, store

_OBJECTIVES = {"snip": LOSS, "fo": SINGULAR_VALUES}


class GradientScores(NamedTuple):
    """Weight × gradient of one layer, on the CPU in float32.

    Attributes:
        snip: The scores by the gradient of the language-model loss.
        fo: The scores by the gradient of the sum of the mean singular values of all modules' outputs.
    """

    snip: WeightScores
    fo: WeightScores


class Asked(NamedTuple):
    """The results that a pass of gradients has to give.

    Attributes:
        scores: Whether to compute weight × gradient scores.
        moments: Whether to compute second moments of the gradients by the FFNs' outputs.
    """

    scores: bool
    moments: bool


class LayerGradients(NamedTuple):
    """The results of a pass of gradients, for every layer.

    Attributes:
        scores: One entry per layer, or None where they were not asked for.
        moments: Σ g gᵀ `(hidden_size, hidden_size)` per layer over all tokens, float64, on the CPU, up to a factor; g
            is the gradient of the language-model loss by the FFN's output. None where they were not asked for.
    """

    scores: Sequence[GradientScores] | None
    moments: Sequence[Tensor] | None


def layer_gradients(passes: Passes, asked: Asked) -> LayerGradients:
    """Go through the dense model and back once, and score every FFN weight by SNIP and FO, or sum second moments.

    Both objectives of the scores are averaged over batches. FO's singular values are those of a module's output
    reshaped to `(batch, -1)`, for every module of the model but the whole.

    Args:
        passes: The dense model and its samples; FO depends on the batch size.
        asked: Which scores and moments to compute.

    Raises:
        NumericalError: If an output or a gradient is NaN or infinite; the message names the module or layer.
    """
    prunable, spill = passes.prunable, passes.settings.spill
    was_training = prunable.model.training
    objectives = list(_OBJECTIVES.values()) if asked.scores else [LOSS]
    walk = passes.backward(objectives)
    num_batches = summed(len(walk.batches))
    scores, moments = {}, {}
    for block, batches in walk.blocks():  # as gradients flow: the first that is not finite is where it began
        products: dict[str, dict[str, Tensor]] = {name: {} for name in _OBJECTIVES}
        moment = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            if asked.scores:
                _add_products(products, batch)
            if asked.moments:
                moment = _moment_with(moment, batch)
        if asked.scores:
            found = GradientScores(**{name: _scores(block, products[name], num_batches) for name in _OBJECTIVES})
            scores[block.layer] = store(found, spill)
        if asked.moments:
            moments[block.layer] = spill.put(_checked_moment(block, summed(moment)))
    prunable.model.train(was_training)
    return LayerGradients(
        StoredList(scores[block.layer] for block in prunable.blocks) if asked.scores else None,
        StoredList(moments[block.layer] for block in prunable.blocks) if asked.moments else None,
    )


def _add_products(sums: dict[str, dict[str, Tensor]], batch: FFNGradients) -> None:
    for name, objective in _OBJECTIVES.items():
        for projection, gradient in batch.gradients[objective].items():
            product = gradient.float().T @ batch.inputs[projection].float()  # (out_features, in_features)
            total = sums[name].get(projection)
            sums[name][projection] = product if total is None else total.add_(product)


def _scores(block: FFNBlock, sums: dict[str, Tensor], num_batches: int) -> WeightScores:
    """Return weight × mean gradient, channel-first."""
    weights = block.read()
    result: dict[str, Tensor] = {}
    for name, total in sums.items():
        score = getattr(weights, name).float() * summed(total) / num_batches
        if not torch.isfinite(score).all():
            raise NumericalError(
                f"Layer {block.layer}: the gradient of `{name}` is NaN or infinite. Load the model in float32."
            )
        result[name] = score.T if name == "down" else score
    return WeightScores(**result)


def _moment_with(moment: Tensor, batch: FFNGradients) -> Tensor:
    rows = batch.gradients[LOSS]["down"].double()
    rows = rows * len(rows)  # the loss is a mean over the batch's tokens
    return moment.to(rows.device) + rows.T @ rows


def _checked_moment(block: FFNBlock, moment: Tensor) -> Tensor:
    if not torch.isfinite(moment).all():
        raise NumericalError(
            f"Layer {block.layer}: the gradient by the FFN's output is NaN or infinite. Load the model in float32."
        )
    return moment
