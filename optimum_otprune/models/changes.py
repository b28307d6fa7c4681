"""Marks of half-pruned and pruned models, and ways to put a model back as it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from optimum_otprune.errors import HalfPrunedError, UnsupportedModelError
from optimum_otprune.models.attention_heads import AttentionHeads
from optimum_otprune.models.devices import is_offloaded
from optimum_otprune.models.ffn_hooks import watch_points
from optimum_otprune.models.prunable_model import PrunableModel

_HALF_PRUNED = "_otprune_half_pruned"  # an attribute of the model, which any later pruner sees
_PRUNED_WITH, _PACKAGE = "pruned_with", "optimum_otprune"  # an entry of config.json, which every copy keeps


@contextmanager
def unchanged(prunable: PrunableModel, heads: Sequence[AttentionHeads] = ()) -> Iterator[None]:
    """Let a block of code prune the model, and put everything back afterwards, bit for bit.

    Args:
        prunable: The model; of offloaded FFN weights copies are kept on the CPU.
        heads: The attention that loses heads, of which the same is true.
    """
    put_back = [block.keep() for block in watch_points(prunable.blocks)]
    put_back += [*(own.keep() for own in heads), _kept_state(prunable.model)]
    try:
        yield
    finally:
        _run_all(put_back)


@contextmanager
def all_or_nothing(model: PreTrainedModel) -> Iterator[None]:
    """Let a block of code prune the model; if anything ends it early, put everything back, bit for bit.

    The dense parameters are kept in memory for that long. An offloaded model is left half-pruned once its weights have
    begun to change, since copies of them might not fit: every later use is refused, see `check_whole`.
    """
    put_back, is_kept = _kept_state(model), not is_offloaded(model)
    try:
        yield
        if is_marked_half_pruned(model):
            mark_pruned(model)
    except BaseException:
        if is_kept or not is_marked_half_pruned(model):
            _run_all([put_back])
        raise


def mark_half_pruned(model: PreTrainedModel) -> None:
    """Note that the model's weights begin to change; `all_or_nothing` and `unchanged` take it back."""
    setattr(model, _HALF_PRUNED, True)


def mark_pruned(model: PreTrainedModel) -> None:
    """Note that the model is pruned, in its configuration, too, so that whoever loads or saves it again knows."""
    setattr(model, _HALF_PRUNED, False)
    setattr(model.config, _PRUNED_WITH, _PACKAGE)


def is_marked_half_pruned(model: PreTrainedModel) -> bool:
    """Return whether pruning the model began, and neither ended nor was undone."""
    return getattr(model, _HALF_PRUNED, False)


def is_pruned(model: PreTrainedModel) -> bool:
    """Return whether the model was pruned, now or before it was loaded."""
    return getattr(model.config, _PRUNED_WITH, None) == _PACKAGE


def check_whole(model: PreTrainedModel) -> None:
    """Raise an error if a model is neither dense nor pruned.

    Raises:
        HalfPrunedError: If the model is half-pruned; the message says how to go on.
    """
    if is_marked_half_pruned(model):
        raise HalfPrunedError(
            "This model is half-pruned: `prune` was interrupted, and offloaded weights are not put back. Load the "
            "dense model again and prune it; layers that `resume_from` (`--resume`) kept are not done twice."
        )


def check_dense(model: PreTrainedModel) -> None:
    """Raise an error if a model cannot be pruned any more.

    Raises:
        HalfPrunedError: If it is half-pruned.
        UnsupportedModelError: If it is pruned.
    """
    check_whole(model)
    if is_pruned(model):
        raise UnsupportedModelError(
            "This model was pruned already: a ratio would be one of the channels that are left, while its "
            "configuration, report and card would give it as one of the dense model. Load the dense model and give "
            "the whole ratio: 0.75 for half of a half."
        )


def dense_model(model: PreTrainedModel) -> PrunableModel:
    """Return a model with its blocks, ready to be pruned.

    Raises:
        HalfPrunedError: If it is half-pruned.
        UnsupportedModelError: If it is pruned, or has no FFN that can be pruned and loaded again.
    """
    check_dense(model)
    return PrunableModel.loadable(model)


def check_pruned(model: PreTrainedModel) -> None:
    """Raise an error if there is nothing to recover in a model.

    Raises:
        HalfPrunedError: If it is half-pruned.
        UnsupportedModelError: If it is dense.
    """
    check_whole(model)
    if not is_pruned(model):
        raise UnsupportedModelError(
            "This model was not pruned, so there is nothing to recover. Prune it first, or load the folder of a "
            "pruned one."
        )


def _kept_state(model: PreTrainedModel) -> Callable[[], None]:
    """Return a function that gives every module and configuration of a model the attributes that it has now.

    Parameters are put back as the objects that they are now, hooks and modes with them. It may be called repeatedly.
    """
    owners: dict[int, object] = {}
    for module in model.modules():
        configs = [part for part in vars(module).values() if isinstance(part, (PreTrainedConfig, GenerationConfig))]
        owners |= {id(owner): owner for owner in (module, *configs)}
    steps = [_kept_attributes(owner) for owner in owners.values()]

    def put_back() -> None:
        for step in steps:
            step()

    return put_back


def _kept_attributes(owner: object) -> Callable[[], None]:
    attributes = dict(vars(owner))
    contents = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]

    def put_back() -> None:
        for target, kept in [(vars(owner), attributes), *contents]:
            target.update(kept)
            for name in target.keys() - kept.keys():
                del target[name]

    return put_back


def _run_all(steps: list[Callable[[], None]]) -> None:
    """Run every step; an interruption waits, and a step that it may have cut short is run again."""
    interruption: KeyboardInterrupt | None = None
    is_done = False
    while not is_done:
        try:
            for step in steps:
                step()
            is_done = True
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption
