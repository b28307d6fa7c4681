"""Check, on a short sample, that FFNs compute what pruning assumes, and measure what their blocks add of them."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_otprune.errors import UnsupportedModelError
from optimum_otprune.functional.experts import experts_forward
from optimum_otprune.functional.ffn import ffn_forward
from optimum_otprune.models.architectures import submodule
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.ffn_block import FFNBlock, is_alone
from optimum_otprune.models.ffn_hooks import hooked, noted, routed, watch_points

_AMPLIFIED = 16.0  # clamps of activations lie where the sample does not reach
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the norm


class _Probe(NamedTuple):
    """The outputs of one run of a block with given FFN outputs.

    Attributes:
        block: The output of the block, `(num_tokens, hidden_size)`.
        holder: The output of the module inside the block that holds the whole FFN, or None where there is none.
    """

    block: Tensor
    holder: Tensor | None


def check_ffns(group: list[FFNBlock], runner: BlockRunner, hidden: Tensor) -> list[float | None]:
    """Check all FFNs of one block, and return the factor of each; of one among several it is not measured."""
    found = [_check_ffn(group, block, runner, hidden) for block in watch_points(group)]
    if not is_alone(group):
        return [None] * len(group)
    ordinary, outputs = found[0]
    return [_factor(group[0], runner, hidden, ordinary, outputs)]


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
        difference = difference_of(seen["outputs"], expected)
        if difference > rounding_of(expected):
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
    rounding = rounding_of(found)
    found, of = found.double(), of.double()
    factor = float((found * of).sum() / of.square().sum())
    if not math.isfinite(factor) or abs(factor) <= rounding:
        return None
    if float((found - factor * of).norm()) > rounding * float(found.norm()):
        return None
    return 1.0 if abs(factor - 1) <= rounding else factor


def difference_of(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference divided by the norm, over entries that are finite in both."""
    found, wanted = found.double(), wanted.to(found.device).double()
    finite = torch.isfinite(found) & torch.isfinite(wanted)
    found, wanted = found[finite], wanted[finite]
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    if size:
        return difference / size
    return math.inf if difference else 0.0


def rounding_of(like: Tensor) -> float:
    """Return the relative difference that rounding explains in tensors of the dtype of one."""
    return ROUNDING[like.dtype]
