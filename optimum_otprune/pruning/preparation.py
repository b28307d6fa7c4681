"""What the dense model is asked for before any layer is touched, and the same as named tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import StateError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.spill import TensorSpill
from optimum_otprune.pruning.calibration.gradients import GradientScores, gradient_moments, gradient_scores
from optimum_otprune.pruning.calibration.samples import heldout_mask, own_part
from optimum_otprune.pruning.calibration.self_calibration import self_calibration_tokens
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.settings import PassSettings
from optimum_otprune.pruning.widths import adaptive_widths


class Prepared(NamedTuple):
    """What the dense model is asked for before any layer is touched.

    Attributes:
        widths: Of the layers after.
        tokens: Calibration samples, those that the model wrote itself after the given ones.
        is_heldout: BoolTensor over all their tokens; no token that the model wrote is held out.
        scores: One entry per layer, or None where nothing reads them.
        moments: Second moments of the loss's gradients by the FFNs' outputs, or None where nothing reads them.
    """

    widths: list[int]
    tokens: Tensor
    is_heldout: Tensor
    scores: Sequence[GradientScores] | None
    moments: Sequence[Tensor] | None


def to_tensors(prepared: Prepared) -> dict[str, Tensor]:
    """Everything by name, for a safetensors file."""
    tensors = {
        "widths": torch.tensor(prepared.widths),
        "tokens": prepared.tokens,
        "is_heldout": prepared.is_heldout,
    }
    for layer, scores in enumerate(prepared.scores or ()):
        for kind, weights in scores._asdict().items():
            parts = weights._asdict().items()
            tensors |= {f"scores.{layer}.{kind}.{part}": value for part, value in parts if value is not None}
    return tensors | {f"moments.{layer}": moment for layer, moment in enumerate(prepared.moments or ())}


class Expected(NamedTuple):
    """What a run knows of its preparation beforehand.

    Attributes:
        sizes: Channels of the dense layers.
        tokens: The given calibration samples.
        shapes: Of scores and moments, by name as in `to_tensors`.
    """

    sizes: list[int]
    tokens: Tensor
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, dense: Iterable[FFNWeights], tokens: Tensor, has_scores: bool, has_moments: bool) -> "Expected":
        """Work it out from the dense FFNs, in order."""
        sizes: list[int] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, weights in enumerate(dense):
            n, d = weights.intermediate_size, weights.hidden_size
            sizes.append(n)
            if has_moments:
                shapes[f"moments.{layer}"] = (d, d)
            if has_scores:
                parts = [part for part in WeightScores._fields if getattr(weights, part) is not None]
                shapes |= {
                    f"scores.{layer}.{kind}.{part}": (n, d) for kind in GradientScores._fields for part in parts
                }
        return cls(sizes, tokens, shapes)


def from_tensors(tensors: Mapping[str, Tensor], expected: Expected) -> Prepared:
    """The inverse of `to_tensors`.

    Raises:
        StateError: If a tensor is missing, too many, or of another shape or kind.
    """
    names = {"widths", "tokens", "is_heldout", *expected.shapes}
    if set(tensors) != names:
        raise StateError(f"It lacks {sorted(names ^ set(tensors))[0][:80]!r}, or has it too many.")
    widths, tokens, is_heldout = (tensors[name] for name in ("widths", "tokens", "is_heldout"))
    given = expected.tokens
    is_right = (
        widths.dtype == tokens.dtype == torch.int64
        and is_heldout.dtype == torch.bool
        and (widths.ndim, tokens.ndim, is_heldout.shape) == (1, 2, (tokens.numel(),))
        and len(widths) == len(expected.sizes)
        and all(1 <= width <= size for width, size in zip(widths.tolist(), expected.sizes))
        and torch.equal(tokens[: len(given)], given)
        and all(
            tuple(tensors[name].shape) == shape and tensors[name].is_floating_point()
            for name, shape in expected.shapes.items()
        )
    )
    if not is_right:
        raise StateError("It holds a tensor of another shape or kind than this run writes.")
    scores = moments = None
    layers = range(len(widths))
    if any(name.startswith("scores.") for name in expected.shapes):
        scores = [_scores(tensors, layer) for layer in layers]
    if any(name.startswith("moments.") for name in expected.shapes):
        moments = [tensors[f"moments.{layer}"] for layer in layers]
    return Prepared(widths.tolist(), tokens, is_heldout, scores, moments)


def _scores(tensors: Mapping[str, Tensor], layer: int) -> GradientScores:
    parts = {
        kind: WeightScores(
            **{
                part: tensors[name]
                for part in WeightScores._fields
                if (name := f"scores.{layer}.{kind}.{part}") in tensors
            }
        )
        for kind in GradientScores._fields
    }
    return GradientScores(**parts)


def prepare(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    widths: list[int],
    recipe: Recipe,
    tokens: Tensor,
    settings: PassSettings,
    spill: TensorSpill,
) -> Prepared:
    """Return what is found out with the whole dense model before its first layer is pruned."""
    config = recipe.config
    is_heldout = heldout_mask(tokens.shape[0], tokens.shape[1], config.holdout_share, config.seed)
    scores = moments = None
    together = config.score_batch_size if recipe.needs_gradients or recipe.needs_moments else 1
    own_tokens, own_heldout = own_part(tokens, is_heldout, together)
    passes = (config.score_batch_size, settings.progress, spill)
    if recipe.needs_gradients:
        scores = gradient_scores(model, blocks, own_tokens, *passes)
    if recipe.needs_moments:
        moments = gradient_moments(model, blocks, own_tokens, *passes)
        if config.allocation == "adaptive":
            stream = CalibrationStream(model, blocks, own_tokens, settings.batch_size, track_dense=False, spill=spill)
            found = adaptive_widths(blocks, widths, config, stream, own_heldout, moments, settings.progress)
            widths = from_main(found)  # others may have rounded otherwise
    if config.self_calibration:
        written = from_main(
            self_calibration_tokens(
                model, tokens, config.self_calibration, config.score_batch_size, config.seed, settings.progress
            )
        )
        tokens = torch.cat([tokens, written])
        is_heldout = torch.cat([is_heldout, torch.zeros(written.numel(), dtype=torch.bool)])
    return Prepared(widths, tokens, is_heldout, scores, moments if recipe.weighs_errors else None)
