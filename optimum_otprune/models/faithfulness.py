"""Checks, on one short sample before any work, that a model computes what pruning assumes, and is finite."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError, OTPruneError, UnsupportedModelError, raised
from optimum_otprune.functional.ffn import check_weights, empty_channels
from optimum_otprune.models.block import Block
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import is_offloaded, onloaded, read_parameter
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.ffn_block import FFNBlock, named
from optimum_otprune.models.ffn_checks import ROUNDING, check_ffns, difference_of, rounding_of
from optimum_otprune.models.ffn_hooks import noted, unchunked, watch_points, watched
from optimum_otprune.models.inputs import model_inputs, vocabulary_size
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import TensorSpill

SAMPLE_TOKENS = 64  # that a model is checked on
_HANDED_ON = (
    "The block changes, or needs, what blocks hand on beside the hidden states, as layers that share keys and values "
    "do, so blocks cannot be pruned one by one. Choose a model whose layers hand on nothing but hidden states."
)
_FEW_TOKENS = 8  # number of token ids to use without a calibration sample


class _Findings(NamedTuple):
    """The result of the check in one process.

    Attributes:
        error: The error that refuses the model, or None.
        factors: The factor of each layer, as from `measured_factors`.
    """

    error: OTPruneError | None
    factors: list[float | None]


def measured_factors(prunable: PrunableModel, tokens: Tensor) -> list[float | None]:
    """Check that a model's blocks and FFNs compute what pruning assumes, and measure what FFNs add.

    Two short batches of different text are run through the whole model and block by block: the inputs of every FFN
    must be the same. Every FFN must put out `down(act(gate x) * up x)` of its own weights, on inputs of ordinary and
    of large size, and the module that holds it a multiple of that.

    Args:
        prunable: The dense model; it stays as it is.
        tokens: Calibration samples, LongTensor `(num_samples, seqlen)`; the first 64 tokens of the first are used.

    Returns:
        By layer what the block adds of its FFN's output to the hidden states, exactly 1 where that is the output as it
        is, or None where it is no plain multiple: where a norm follows, or a scale by channel.

    Raises:
        UnsupportedModelError: If a layer computes something else; the message names the first one and what differs.
        NumericalError: If inputs of an FFN, or the logits, are NaN or infinite.
    """
    modes = [(module, module.training) for module in prunable.model.modules()]
    prunable.model.eval()
    try:
        with torch.no_grad(), unchunked(prunable.model):
            found = _Findings(None, _checked(prunable, short_sample(tokens)))
    except OTPruneError as error:
        found = _Findings(error, [])
    finally:
        for module, training in modes:
            module.training = training
    found = from_main(found)  # other processes may have rounded differently
    if found.error is not None:
        raise found.error
    return found.factors


def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether a model's logits depend on tokens that follow, as those of encoders do.

    Args:
        model: The model; it is not asked where its weights are on the meta device, and False is returned.
    """
    if model.device.type == "meta" and not is_offloaded(model):
        return False
    vocab_size = vocabulary_size(model)
    ids = torch.arange(min(_FEW_TOKENS, vocab_size)).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = _output(model, ids)[:, :-1].float()
    finally:
        for module, training in modes:
            module.training = training
    return bool((logits[1] - logits[0]).norm() > ROUNDING[model.dtype] * logits[0].norm())


def check_logits(model: PreTrainedModel, tokens: Tensor | None = None) -> None:
    """Raise an error if logits on a short sample are NaN or infinite; minus infinity rules a token out.

    Args:
        model: Any model; it stays in training or evaluation mode.
        tokens: Token ids, LongTensor `(num_samples, seqlen)`, whose beginning is read; default: the first ids.

    Raises:
        NumericalError: If a logit is NaN or infinite.
    """
    if tokens is None:
        tokens = torch.arange(min(_FEW_TOKENS, vocabulary_size(model)))[None]
    with torch.no_grad():
        _check_output(_output(model, short_sample(tokens)))


def check_parameters(model: PreTrainedModel, blocks: Sequence[FFNBlock] = ()) -> int:
    """Raise an error if a parameter is NaN or infinite, or a saved buffer NaN; offloaded ones are loaded one by one.

    Args:
        model: The model, wherever its weights are.
        blocks: The blocks whose FFNs are known; their shapes are checked, too.

    Returns:
        How many channels of these FFNs hold nothing but zeros.

    Raises:
        NumericalError: If there is one; the message names the parameter, or the layer of an FFN.
        ShapeError: If the weights of an FFN do not belong together.
    """
    empty = 0
    for block in blocks:
        weights = block.read()
        with named(block):
            check_weights(weights, "the FFN")
        empty += empty_channels(weights)
    others = {module for block in blocks for module in block.modules}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point() or not parameter.numel() or module in others:
                continue
            value = read_parameter(module, name) if parameter.is_meta else parameter.detach()
            assert value is not None
            if not all(bool(torch.isfinite(bound)) for bound in value.aminmax()):  # avoids a copy of the whole tensor
                raise NumericalError(
                    f"The parameter {f'{path}.{name}'.lstrip('.')!r} holds NaN or infinity. The checkpoint is "
                    "damaged, or its dtype overflowed: reload it, or load it in float32."
                )
        for name, buffer in module._buffers.items():
            is_saved = buffer is not None and name not in module._non_persistent_buffers_set and not buffer.is_meta
            if is_saved and torch.isnan(buffer).any():  # masks may hold minus infinity
                raise NumericalError(
                    f"The buffer {f'{path}.{name}'.lstrip('.')!r} holds NaN. The checkpoint is damaged: reload it."
                )
    return empty


def short_sample(tokens: Tensor) -> Tensor:
    """Return the beginning of the first sample, `(1, at most SAMPLE_TOKENS)`, on which a model is checked."""
    return tokens[:1, :SAMPLE_TOKENS]


def _output(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return the logits, or a model's first output if it has none.

    Raises:
        UnsupportedModelError: If the model cannot be run on token ids alone.
    """
    try:
        return model(**model_inputs(model, batch), use_cache=False)[0]
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} {raised(error)} when it is run on token ids alone, of which calibration data "
            "consist. Prune a model of text, or one that takes text without pictures."
        ) from error


def _check_output(logits: Tensor) -> None:
    _check_finite("the model's logits", logits.masked_fill(logits == -math.inf, 0))  # minus infinity rules out a token


def _check_finite(what: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NumericalError(
            f"{what} are NaN or infinite on a short sample. The weights are damaged, or the model's dtype "
            "overflowed: load it in float32."
        )


def _checked(prunable: PrunableModel, sample: Tensor) -> list[float | None]:
    batches = [sample, sample.flip(1)]  # two batches of one size with different text
    whole = [_inputs_in_whole(prunable, batch) for batch in batches]
    spill = TensorSpill()
    runner = BlockRunner(prunable, batches, spill)
    stored = runner.take_first_hidden()
    factors = []
    for block, group in prunable.stack:
        with named(group[0] if group else block), onloaded(block.module):
            hidden = [states.load() for states in runner.entered(block, stored)]
            points = watch_points(group)
            behind = [_check_run(block, points, runner, *each, index) for index, each in enumerate(zip(hidden, whole))]
            factors += check_ffns(group, runner, hidden[0])
            stored = [spill.put(states) for states in behind]
    return factors


def _inputs_in_whole(prunable: PrunableModel, batch: Tensor) -> dict[int, Tensor]:
    """Return the inputs `(num_tokens, hidden_size)` of every FFN in a pass of the whole model, by layer."""
    points = watch_points(prunable.blocks)
    seen: dict[int, list[Tensor]] = {block.layer: [] for block in points}

    def note(block: FFNBlock, name: str, inputs: Tensor, outputs: Tensor) -> None:
        with named(block):
            if name == "up":
                _check_finite("the inputs of the FFN", inputs)
                seen[block.layer].append(inputs.flatten(end_dim=-2).to("cpu", copy=True))
            elif name == "down":
                _check_finite("the outputs of the FFN", outputs)

    with watched(*((block, partial(note, block)) for block in points)):
        _check_output(_output(prunable.model, batch))
    for block, calls in zip(points, seen.values()):
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"Hooks on {block.name} fire {len(calls)} times in a forward pass; want once. Layers that "
                "share weights cannot be pruned one by one; otherwise load the model without compiling it, with its "
                "plain FFN, which runs once a pass."
            )
    return {layer: calls[0] for layer, calls in seen.items()}


def _check_run(
    block: Block, points: list[FFNBlock], runner: BlockRunner, hidden: Tensor, inputs: dict[int, Tensor], index: int
) -> Tensor:
    """Run one block alone, and return the hidden states behind it."""
    before = [tensor.clone() for tensor in runner.given(block, index)]
    try:
        with ExitStack() as stack:
            seen = {point.layer: stack.enter_context(noted(point)) for point in points}
            output = runner.run(block, hidden, index)
    except LookupError as error:  # a block needs a value that another block did not pass on
        raise UnsupportedModelError(_HANDED_ON) from error
    if any(own.keys() != {"inputs", "hidden", "outputs"} for own in seen.values()):
        raise UnsupportedModelError(
            "Hooks on the FFN do not fire. Load the model without compiling it, with its plain FFN."
        )
    after = runner.given(block, index)
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        raise UnsupportedModelError(_HANDED_ON)
    if output.shape != hidden.shape or output.ndim != 3:
        raise UnsupportedModelError(
            f"Hidden states of shape {tuple(hidden.shape)} go into the block, and of shape "
            f"{tuple(output.shape)} come out; want (batch, seqlen, hidden_size). This kind of model is not supported."
        )
    for layer, own in seen.items():
        difference = difference_of(own["inputs"].cpu(), inputs[layer])
        if difference <= rounding_of(inputs[layer]):
            continue
        raise UnsupportedModelError(
            "Where the model is run block by block, its FFN gets other inputs than in a forward pass of the whole "
            f"model (relative difference {difference:.2g}), so it would be pruned for the wrong ones. Choose a model "
            "whose blocks depend on hidden states, masks, positions and token ids alone."
        )
    return output
