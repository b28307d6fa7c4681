"""The passes of the whole dense model before any layer is pruned, and their results as named tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import StateError
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.functional.seeds import seed_of
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.passes import Passes
from optimum_otprune.pruning.calibration.gradients import Asked, GradientScores, LayerGradients, layer_gradients
from optimum_otprune.pruning.calibration.samples import Samples
from optimum_otprune.pruning.calibration.self_calibration import written_samples
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.widths import adaptive_widths

_WRITTEN_TOO = 2  # part of a run, of which splits of samples are the first ones: what is written beside given samples


class Prepared(NamedTuple):
    """The results of the whole dense model's passes before any layer is pruned.

    Attributes:
        widths: Channels of each layer after pruning.
        samples: The samples of all processes; those that the model wrote itself follow the given ones.
        scores: The gradient scores of each layer, or None where nothing reads them.
        moments: For each layer, the second moments of the loss's gradients by the FFN's outputs, `(hidden_size,
            hidden_size)`, or None where nothing reads them.
    """

    widths: list[int]
    samples: Samples
    scores: Sequence[GradientScores] | None
    moments: Sequence[Tensor] | None

    def part(self, layer: int) -> "LayerPart":
        """Return what one layer needs of it beside its width."""
        return LayerPart(
            None if self.scores is None else self.scores[layer], None if self.moments is None else self.moments[layer]
        )


class LayerPart(NamedTuple):
    """What one layer needs of the dense model's passes; None where nothing reads it.

    Attributes:
        scores: The gradient scores of the layer.
        moments: The second moments of the loss's gradients by the FFN's outputs.
    """

    scores: GradientScores | None
    moments: Tensor | None


def shared_tensors(prepared: Prepared) -> dict[str, Tensor]:
    """Return the tensors of all layers together by name, for a safetensors file."""
    samples = prepared.samples
    return {"widths": torch.tensor(prepared.widths), "tokens": samples.tokens, "is_heldout": samples.is_heldout}


def layer_tensors(part: LayerPart) -> dict[str, Tensor]:
    """Return the tensors of one layer by name, for a safetensors file."""
    tensors = {} if part.moments is None else {"moments": part.moments}
    for kind, weights in ({} if part.scores is None else part.scores._asdict()).items():
        parts = weights._asdict().items()
        tensors |= {f"scores.{kind}.{name}": value for name, value in parts if value is not None}
    return tensors


class WrittenText(NamedTuple):
    """What samples that the model writes depend on beside the model.

    Attributes:
        num_samples: Number of samples.
        seqlen: Number of tokens of each.
        vocab_size: Token ids are below this.
        seed: Seed of what is written.
    """

    num_samples: int
    seqlen: int
    vocab_size: int
    seed: int

    @classmethod
    def beside(cls, passes: Passes, num_samples: int, seed: int) -> "WrittenText":
        """Describe the samples that the model writes beside the given ones of a run with that seed."""
        # Given samples may be those that the model writes by the seed itself, see `samples_alone`.
        seed = seed_of(seed, _WRITTEN_TOO) if len(passes.tokens) else seed
        return cls(num_samples, passes.tokens.shape[1], vocabulary_size(passes.prunable.model), seed)

    def fits(self, tokens: Tensor) -> bool:
        """Return whether tokens have the right shape and kind, and belong to the vocabulary."""
        is_right = tuple(tokens.shape) == (self.num_samples, self.seqlen) and tokens.dtype == torch.int64
        return is_right and bool(((tokens >= 0) & (tokens < self.vocab_size)).all())


class Expected(NamedTuple):
    """The part of a run's preparation that is known before it is computed.

    Attributes:
        sizes: Channels of each layer before pruning.
        tokens: The given calibration samples.
        written: The samples that follow them.
        shapes: For each layer, the shapes of its scores and moments, by the names that `layer_tensors` gives them.
    """

    sizes: list[int]
    tokens: Tensor
    written: WrittenText
    shapes: list[Mapping[str, tuple[int, ...]]]

    @classmethod
    def of(
        cls, dense: Iterable[FFNWeights], tokens: Tensor, written: WrittenText, has_scores: bool, has_moments: bool
    ) -> "Expected":
        """Compute the expected shapes from the dense FFNs, in order."""
        sizes: list[int] = []
        shapes: list[Mapping[str, tuple[int, ...]]] = []
        for weights in dense:
            n, d = weights.intermediate_size, weights.hidden_size
            own: dict[str, tuple[int, ...]] = {"moments": (d, d)} if has_moments else {}
            if has_scores:
                parts = [part for part in WeightScores._fields if getattr(weights, part) is not None]
                own |= {f"scores.{kind}.{part}": (n, d) for kind in GradientScores._fields for part in parts}
            sizes.append(n)
            shapes.append(own)
        return cls(sizes, tokens, written, shapes)


def from_shared(tensors: Mapping[str, Tensor], expected: Expected) -> Prepared:
    """Return what `shared_tensors` wrote, without scores and moments.

    Raises:
        StateError: If a tensor is missing, too many, or of another shape or kind.
    """
    _check_names(tensors, {"widths", "tokens", "is_heldout"})
    widths, tokens, is_heldout = (tensors[name] for name in ("widths", "tokens", "is_heldout"))
    given = expected.tokens
    is_right = (
        widths.dtype == tokens.dtype == torch.int64
        and is_heldout.dtype == torch.bool
        and (widths.ndim, tokens.ndim, is_heldout.shape) == (1, 2, (tokens.numel(),))
        and len(widths) == len(expected.sizes)
        and all(1 <= width <= size for width, size in zip(widths.tolist(), expected.sizes))
        and torch.equal(tokens[: len(given)], given)
        and expected.written.fits(tokens[len(given) :])
    )
    _check_kinds(is_right)
    return Prepared(widths.tolist(), Samples(tokens, is_heldout), None, None)


def from_layer(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> LayerPart:
    """Return what `layer_tensors` wrote.

    Args:
        tensors: The tensors of a file by name.
        shapes: The shapes that they must have, from `Expected`.

    Raises:
        StateError: If a tensor is missing, too many, or of another shape or kind.
    """
    _check_names(tensors, set(shapes))
    _check_kinds(
        all(
            tuple(tensors[name].shape) == shape and tensors[name].is_floating_point() for name, shape in shapes.items()
        )
    )
    has_scores = any(name.startswith("scores.") for name in shapes)
    return LayerPart(_scores(tensors) if has_scores else None, tensors.get("moments"))


def _check_names(tensors: Mapping[str, Tensor], names: set[str]) -> None:
    if set(tensors) != names:
        raise StateError(f"It lacks {sorted(names ^ set(tensors))[0][:80]!r}, or has it too many.")


def _check_kinds(is_right: bool) -> None:
    if not is_right:
        raise StateError("It holds a tensor of another shape or kind than this run writes.")


def _scores(tensors: Mapping[str, Tensor]) -> GradientScores:
    parts = {
        kind: WeightScores(
            **{part: tensors[name] for part in WeightScores._fields if (name := f"scores.{kind}.{part}") in tensors}
        )
        for kind in GradientScores._fields
    }
    return GradientScores(**parts)


Keep = Callable[[Callable[[], Tensor], WrittenText], Tensor]  # returns what an earlier call kept, or makes it


def prepare(passes: Passes, widths: list[int], recipe: Recipe, written: WrittenText, keep: Keep) -> Prepared:
    """Compute gradients, widths and samples with the whole dense model, before its first layer is pruned.

    Args:
        passes: The dense model and the given calibration samples.
        widths: Channels of each layer after pruning, from `plan_widths`.
        recipe: The configuration with its functions.
        written: The samples that the model writes itself, none or more.
        keep: A function that keeps them before anything else is asked.
    """
    config = recipe.config
    samples = _samples(passes, config, written, keep)
    passes = passes.of(samples.tokens)
    asked = Asked(recipe.needs_gradients, recipe.needs_moments)
    batch_size = config.score_batch_size
    found = LayerGradients(None, None)
    if any(asked):
        own = passes.own(batch_size)
        found = layer_gradients(own.by(batch_size), asked)
        if config.allocation == "adaptive":
            assert found.moments is not None
            shared = adaptive_widths(own, samples.own(batch_size).is_heldout, config, widths, found.moments)
            widths = from_main(shared)  # other processes may have rounded differently
    return Prepared(widths, samples, found.scores, found.moments if recipe.weighs_errors else None)


def _samples(passes: Passes, config: OTPruningConfig, text: WrittenText, keep: Keep) -> Samples:
    """Return the given samples, and those that the model writes after them; some of each are held out."""
    samples = Samples.split(passes.tokens, config.holdout_share, config.seed)
    if not text.num_samples:
        return samples
    # Other processes may have rounded differently.
    written = from_main(keep(lambda: written_samples(passes, text.num_samples, text.seed), text))
    return samples.followed_by(Samples.split(written, config.holdout_share, seed_of(config.seed, 1)))
