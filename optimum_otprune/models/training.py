"""Train some of a model's weights: float32 copies take their places, and become weights of the model's dtype again.

A door to accelerate, which runs the steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.models.architectures import find_spec
from optimum_otprune.models.devices import execution_device, is_offloaded, multiplies_bfloat16
from optimum_otprune.models.distributed import summed
from optimum_otprune.models.ffn_block import by_block
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.inputs import check_predicts_next
from optimum_otprune.models.low_rank import low_rank_updates, peft_module


class TrainedWeights(NamedTuple):
    """The weights that are trained, by name.

    Attributes:
        weights: The weights in the model, float32.
        start: Their values before the first step, in the model's dtype or float32.
    """

    weights: dict[str, nn.Parameter]
    start: Mapping[str, Tensor]


def check_trainable(model: PreTrainedModel, which: str) -> None:
    """Raise an error if a model cannot be trained.

    Args:
        model: The model.
        which: What is to be trained, as in `training`.

    Raises:
        UnsupportedModelError: If it does not predict the next token of a text, or its weights are offloaded.
        MissingExtraError: If `"lora"` is asked for, and peft is not installed.
    """
    check_predicts_next(model)
    if is_offloaded(model):
        raise UnsupportedModelError(
            "Weights of the model are offloaded, so that they cannot be trained. Load the pruned model where it fits "
            "whole, or give device_map='auto' with enough memory on the GPUs; the dense model may be offloaded."
        )
    if which == "lora":
        peft_module()
        if find_spec(model)[1].is_stacked:
            raise UnsupportedModelError(
                "Low-rank updates are not made for experts, whose matrices are stacked in one parameter. Train 'all' "
                "weights, or 'ffn' alone."
            )


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
    weights = trained_weights(model, which)
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
        which: What is trained, as in `training`; low-rank updates change the FFNs' weights.

    Raises:
        UnsupportedModelError: If the model's weights are offloaded, or it has no known FFN.
    """
    check_trainable(model, which)
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


def put_back(model: PreTrainedModel, weights: Mapping[str, nn.Parameter]) -> None:
    """Give a model parameters that it had before, shared ones in each of their places.

    Args:
        model: The model.
        weights: The parameters by name.
    """
    _exchange(model, {id(model.get_parameter(name)): part for name, part in weights.items()})


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
    blocks = [group[0].module for group in by_block(ffn_blocks(model))] if is_wanted else []
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
    """Return a context in which a model multiplies in bfloat16 where its device has instructions for it.

    Elsewhere only a model of 16 bits does, since the weights that are trained are float32 and the others are not.
    """
    device = execution_device(model)
    is_small = model.dtype.itemsize < torch.float32.itemsize
    return torch.autocast(device.type, torch.bfloat16, enabled=is_small or multiplies_bfloat16(device))


class Stepper:
    """Steps of an optimizer over batches that are cut into parts, run by accelerate.

    Each of several processes adds the gradients of its own parts, and takes the same step.

    Args:
        model: The model.
        optimizer: The optimizer of its weights.
        parts: Number of parts of each batch, of this process.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, parts: int):
        self._is_first = not is_initialized()
        self._accelerator = Accelerator(
            gradient_accumulation_steps=parts,
            mixed_precision="no" if self._is_first else None,  # the process may have chosen another one before
            device_placement=False,
            cpu=not torch.accelerator.is_available(),
        )
        self._parts, self._model = parts, model
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)

    def add(self, loss: Tensor, weights: Iterable[nn.Parameter], most: float) -> None:
        """Add the gradients of one part; after the last one of a batch take a step.

        Args:
            loss: The part's share of the batch's loss, a scalar.
            weights: The weights that are trained.
            most: The largest norm of the gradient; a longer one is shortened.
        """
        with self._accelerator.accumulate(self._model):
            self._accelerator.backward(loss * self._parts)  # which divides by their number
            if self._accelerator.sync_gradients:
                for weight in weights:
                    weight.grad = None if weight.grad is None else summed(weight.grad)
                self._accelerator.clip_grad_norm_(weights, most)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def end(self) -> None:
        """Let go of the optimizer; the process may choose how accelerate computes afterwards."""
        self._accelerator.free_memory()
        if self._is_first:
            AcceleratorState._reset_state()
