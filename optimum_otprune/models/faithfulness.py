"""Checks, on one short sample before any work, that a model computes what pruning assumes, and is finite."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_otprune.errors import NumericalError, OTPruneError, UnsupportedModelError, raised
from optimum_otprune.functional.experts import experts_forward
from optimum_otprune.functional.ffn import check_weights, empty_channels, ffn_forward
from optimum_otprune.models.architectures import submodule
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import is_offloaded, onloaded, read_parameter
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.ffn_block import FFNBlock, by_block, named
from optimum_otprune.models.ffn_hooks import hooked, noted, routed, unchunked, watch_points, watched
from optimum_otprune.models.inputs import model_inputs, vocabulary_size
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import TensorSpill

SAMPLE_TOKENS = 64  # that a model is checked on
_HANDED_ON = (
    "The block changes, or needs, what blocks hand on beside the hidden states, as layers that share keys and values "
    "do, so blocks cannot be pruned one by one. Choose a model whose layers hand on nothing but hidden states."
)
_FEW_TOKENS = 8  # number of token ids to use without a calibration sample
_AMPLIFIED = 16.0  # clamps of activations lie where the sample does not reach
_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the norm


class _Findings(NamedTuple):
    """The result of the check in one process.

    Attributes:
        error: The error that refuses the model, or None.
        factors: The factor of each layer, as from `measured_factors`.
    """

    error: OTPruneError | None
    factors: list[float | None]


class _Probe(NamedTuple):
    """The outputs of one run of a block with given FFN outputs.

    Attributes:
        block: The output of the block, `(num_tokens, hidden_size)`.
        holder: The output of the module inside the block that holds the whole FFN, or None where there is none.
    """

    block: Tensor
    holder: Tensor | None


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
            found = _Findings(None, _checked(prunable, _sample(tokens)))
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
    return bool((logits[1] - logits[0]).norm() > _ROUNDING[model.dtype] * logits[0].norm())


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
        _check_output(_output(model, _sample(tokens)))


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


def _sample(tokens: Tensor) -> Tensor:
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
    for group in by_block(prunable.blocks):
        block = group[0]
        with named(block), onloaded(block.module):
            hidden = [states.load() for states in runner.entered(block, stored)]
            behind = [_check_run(group, runner, *each, index) for index, each in enumerate(zip(hidden, whole))]
            factors += _check_ffns(group, runner, hidden[0])
            stored = [spill.put(states) for states in behind]
    return factors


def _check_ffns(group: list[FFNBlock], runner: BlockRunner, hidden: Tensor) -> list[float | None]:
    """Check all FFNs of one block, and return the factor of each; of one among several it is not measured."""
    found = [_check_ffn(group, block, runner, hidden) for block in watch_points(group)]
    if len(group) > 1:
        return [None] * len(group)
    ordinary, outputs = found[0]
    return [_factor(group[0], runner, hidden, ordinary, outputs)]


def _inputs_in_whole(prunable: PrunableModel, batch: Tensor) -> dict[int, Tensor]:
    """Return the inputs `(num_tokens, hidden_size)` of every FFN in a pass of the whole model, by layer, on the CPU."""
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
    group: list[FFNBlock], runner: BlockRunner, hidden: Tensor, inputs: dict[int, Tensor], index: int
) -> Tensor:
    """Run one block alone, and return the hidden states behind it."""
    block, points = group[0], watch_points(group)
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
    difference = max(_difference(own["inputs"].cpu(), inputs[layer]) for layer, own in seen.items())
    if difference > _rounding(inputs[points[0].layer]):
        raise UnsupportedModelError(
            "Where the model is run block by block, its FFN gets other inputs than in a forward pass of the whole "
            f"model (relative difference {difference:.2g}), so it would be pruned for the wrong ones. Choose a model "
            "whose blocks depend on hidden states, masks, positions and token ids alone."
        )
    return output


def _check_ffn(group: list[FFNBlock], block: FFNBlock, runner: BlockRunner, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Check one FFN of a block, or all its experts, and return the block's output and the FFN's."""
    weights = [one.read() for one in group if one.expert is not None] if block.spec.is_stacked else [block.read()]
    for scale in (1.0, _AMPLIFIED):
        with _amplified(block, scale), noted(block) as seen, routed(block) as routing:
            output = runner.run(block, hidden, 0)
        if routing:
            expected = experts_forward(weights, seen["inputs"], routing[0], block.activation)
        else:
            expected = ffn_forward(weights[0], seen["inputs"], block.activation)
        difference = _difference(seen["outputs"], expected)
        if difference > _rounding(expected):
            size = "" if scale == 1 else f", on inputs {scale:g} times as large as the sample's"
            raise UnsupportedModelError(
                "The down projection puts out something else than down(act(gate x) * up x), or down(act(up x)) "
                f"without a gate, of the weights there (relative difference {difference:.2g}{size}): a norm, a "
                "multiplier, a clamp or the like is in between. Such FFNs cannot be pruned."
            )
        if scale == 1:
            ordinary, outputs = output, seen["outputs"]
    return ordinary, outputs


def _factor(block: FFNBlock, runner: BlockRunner, hidden: Tensor, ordinary: Tensor, outputs: Tensor) -> float | None:
    """Return the multiple of its FFN's output that a block adds, found by replacing that output.

    Args:
        block: The block to measure.
        runner: Runs the block on the sample.
        hidden: The hidden states before the block, `(batch, seqlen, hidden_size)`.
        ordinary: The block's unchanged output.
        outputs: The unchanged outputs of its down projection, `(num_tokens, hidden_size)`.
    """
    probe = _probe_outputs(outputs, ordinary)
    silent, loud = (_probed(block, runner, hidden, given) for given in (torch.zeros_like(probe), probe))
    if loud.holder is not None and (loud.holder.shape != probe.shape or _multiple(loud.holder, probe) is None):
        raise UnsupportedModelError(
            "The module that holds the FFN puts out something else than the down projection, or a multiple of that: "
            "something else adds to it, as experts beside a dense FFN do, or a norm follows. Such FFNs cannot be "
            "pruned."
        )
    return _multiple(loud.block - silent.block, probe) if loud.block.shape == probe.shape else None


def _probe_outputs(outputs: Tensor, ordinary: Tensor) -> Tensor:
    """Return noise of the output's size, another size for each token, since a norm would undo a common one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    sizes = torch.linspace(0.5, 2.0, len(outputs)).to(outputs)[:, None]
    return noise * sizes * ordinary.float().square().mean().sqrt().to(outputs)


def _probed(block: FFNBlock, runner: BlockRunner, hidden: Tensor, given: Tensor) -> _Probe:
    """Run a block whose down projection puts out given values."""
    holder = _holder(block)
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).flatten(end_dim=-2).clone())

    handles = [block.down.register_forward_hook(lambda module, args, output: given.view_as(output).clone())]
    if holder is not None:
        handles.append(holder.register_forward_hook(note))
    with hooked(handles):
        output = runner.run(block, hidden, 0)
    return _Probe(output.flatten(end_dim=-2), found[-1] if found else None)


def _holder(block: FFNBlock) -> nn.Module | None:
    """Return the smallest module inside a block that holds all projections."""
    paths = [slot.path.split(".")[:-1] for slot in block.spec.slots.values()]
    common = os.path.commonprefix(paths)
    return submodule(block.module, ".".join(common)) if common else None


@contextmanager
def _amplified(block: FFNBlock, scale: float) -> Iterator[None]:
    """Multiply the inputs of a block's FFN during a block of code."""

    def enlarge(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (args[0] * scale, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

    modules = [module for module in block.modules if block.spec.is_stacked or module is not block.down]
    handles = [module.register_forward_pre_hook(enlarge, with_kwargs=True) for module in modules if scale != 1]
    with hooked(handles):
        yield


def _multiple(found: Tensor, of: Tensor) -> float | None:
    """Return the factor between two tensors, or None if there is none; 1 is returned for 1 within rounding."""
    rounding = _rounding(found)
    found, of = found.double(), of.double()
    factor = float((found * of).sum() / of.square().sum())
    if not math.isfinite(factor) or abs(factor) <= rounding:
        return None
    if float((found - factor * of).norm()) > rounding * float(found.norm()):
        return None
    return 1.0 if abs(factor - 1) <= rounding else factor


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference divided by the norm, over entries that are finite in both."""
    found, wanted = found.double(), wanted.to(found.device).double()
    finite = torch.isfinite(found) & torch.isfinite(wanted)
    found, wanted = found[finite], wanted[finite]
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    if size:
        return difference / size
    return math.inf if difference else 0.0


def _rounding(like: Tensor) -> float:
    return _ROUNDING[like.dtype]
