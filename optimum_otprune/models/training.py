"""Train some of a model's weights: float32 copies take their places, and become weights of the model's dtype again.

A door to accelerate, which runs the steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.devices import is_offloaded
from optimum_otprune.models.ffn_block import ffn_blocks
from optimum_otprune.models.low_rank import low_rank_updates


class TrainedWeights(NamedTuple):
    """The weights that are trained, by name.

    Attributes:
        weights: The weights in the model, float32.
        start: Their values before the first step, in the model's dtype or float32.
    """

    weights: dict[str, nn.Parameter]
    start: Mapping[str, Tensor]


@contextmanager
def training(model: PreTrainedModel, which: str, seed: int) -> Iterator[TrainedWeights]:
    """Make weights of a model ready to be trained, the only ones with gradients; afterwards all have the old dtype.

    The weights that were in the model are not changed, so that putting them back undoes everything.

    Args:
        model: The model, pruned.
        which: `"ffn"` for all weights and biases of the FFNs, `"all"` for every weight of the model, `"lora"` for
            low-rank updates of the FFNs' weight matrices, which are added to them at the end.
        seed: Seed of what low-rank updates begin with.

    Raises:
        UnsupportedModelError: If the model's weights are offloaded, or it has no known FFN.
        MissingExtraError: If `"lora"` is asked for, and peft is not installed.
    """
    weights = trained_weights(model, "ffn" if which == "lora" else which)
    if which != "lora":
        with trained_copies(model, weights) as copies:
            yield TrainedWeights(copies, weights)
        return
    with trained_copies(model, weights, masters=False), low_rank_updates(model, seed) as updates:
        yield TrainedWeights(updates, {name: part.detach().clone() for name, part in updates.items()})


def trained_weights(model: PreTrainedModel, which: str) -> dict[str, nn.Parameter]:
    """Return the weights that are to be trained, by name; shared ones once.

    Args:
        model: The model, pruned.
        which: `"ffn"` for all weights and biases of the FFNs, `"all"` for every weight of the model.

    Raises:
        UnsupportedModelError: If the model's weights are offloaded, or it has no known FFN.
    """
    if is_offloaded(model):
        raise UnsupportedModelError(
            "Weights of the model are offloaded, so that they cannot be trained. Load the pruned model where it fits "
            "whole, or give device_map='auto' with enough memory on the GPUs; the dense model may be offloaded."
        )
    every = dict(model.named_parameters())
    if which == "all":
        return every
    ffn = {id(part) for block in ffn_blocks(model) for module in block.modules for part in module.parameters()}
    return {name: part for name, part in every.items() if id(part) in ffn}


@contextmanager
def trained_copies(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], masters: bool = True
) -> Iterator[dict[str, nn.Parameter]]:
    """Put float32 copies of weights into the model, the only ones with gradients; afterwards they get the old dtype.

    The old weights are not changed, so that putting them back undoes everything.

    Args:
        model: The model.
        weights: Those of its parameters that are copied, by name.
        masters: Whether the copies are float32; otherwise they keep their dtype, and have no gradients.
    """
    copies = {
        id(old): nn.Parameter(old.detach().float().clone() if masters else old.detach().clone(), masters)
        for old in weights.values()
    }
    needed = [(part, part.requires_grad) for part in model.parameters()]
    was_needed = {id(part): is_needed for part, is_needed in needed}
    try:
        for part, _ in needed:
            part.requires_grad_(False)
        _exchange(model, copies)
        yield {name: copies[id(old)] for name, old in weights.items()}
        back = {
            id(copies[id(old)]): nn.Parameter(copies[id(old)].detach().to(old.dtype), was_needed[id(old)])
            for old in weights.values()
        }
        _exchange(model, back)
    finally:
        for part, is_needed in needed:
            part.requires_grad_(is_needed)


def _exchange(model: PreTrainedModel, by_id: Mapping[int, nn.Parameter]) -> None:
    """Replace parameters wherever they are, shared ones in each of their places."""
    for module in model.modules():
        for name, part in module._parameters.items():
            if part is not None and id(part) in by_id:
                module._parameters[name] = by_id[id(part)]


@contextmanager
def recomputed(model: PreTrainedModel, is_wanted: bool) -> Iterator[None]:
    """Let each block forget what is inside it after the forward pass, and compute that anew for the backward pass.

    Args:
        model: The model.
        is_wanted: Whether to do anything.
    """
    blocks = [block.module for block in ffn_blocks(model)] if is_wanted else []
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def computing(model: PreTrainedModel) -> AbstractContextManager:
    """Return a context in which float32 weights multiply in bfloat16 if the rest of the model is of 16 bits."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, torch.bfloat16, enabled=model.dtype.itemsize < torch.float32.itemsize)


class Stepper:
    """Steps of an optimizer over batches that are cut into parts, run by accelerate.

    Args:
        model: The model.
        optimizer: The optimizer of its weights.
        parts: Number of parts of each batch.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, parts: int):
        self._accelerator = Accelerator(
            gradient_accumulation_steps=parts,
            mixed_precision="no",
            device_placement=False,
            cpu=not torch.accelerator.is_available(),
        )
        self._parts = parts
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)

    def add(self, loss: Tensor, weights: Iterable[Tensor], most: float) -> None:
        """Add the gradients of one part; after the last one of a batch take a step.

        Args:
            loss: The part's share of the batch's loss, a scalar.
            weights: The weights that are trained.
            most: The largest norm of the gradient; a longer one is shortened.
        """
        with self._accelerator.accumulate(self._model):
            self._accelerator.backward(loss * self._parts)  # which divides by their number
            if self._accelerator.sync_gradients:
                self._accelerator.clip_grad_norm_(weights, most)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def end(self) -> None:
        """Let go of the model, which keeps no mark of accelerate."""
        self._accelerator.free_memory()
        vars(self._model).pop("_is_accelerate_prepared", None)
