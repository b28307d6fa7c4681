"""Look into FFNs while a model runs: hooks that are gone afterwards, whatever happens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from optimum_otprune.models.ffn_block import FFNBlock

Watcher = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks on modules during a block of code and remove them afterwards."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(*watchers: tuple[FFNBlock, Watcher]) -> Iterator[None]:
    """Let functions see every run of the projections of blocks during a block of code.

    Args:
        *watchers: Blocks, each with a function of a projection's name, input and output, which is its piece of what a
            fused matrix puts out. What it returns takes the place of the output; None leaves that as it is.
    """

    def seen(
        watcher: Watcher, names: tuple[str, ...], module: nn.Module, args: tuple, output: Tensor
    ) -> Tensor | None:
        if len(names) == 1:
            return watcher(names[0], args[0], output)
        parts = output.chunk(len(names), dim=-1)
        given = [watcher(name, args[0], part) for name, part in zip(names, parts)]
        if all(part is None for part in given):
            return None
        return torch.cat([own if part is None else part for own, part in zip(parts, given)], dim=-1)

    with hooked(
        module.register_forward_hook(partial(seen, watcher, names))
        for block, watcher in watchers
        for module, names in block.modules.items()
    ):
        yield


@contextmanager
def noted(block: FFNBlock) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each run of the block fills with the FFN's inputs, activations and outputs.

    Inputs and outputs are copies: a block may add to them in place.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name == "up":
            seen["inputs"] = inputs.flatten(end_dim=-2).clone()
        elif name == "down":
            seen["hidden"], seen["outputs"] = inputs.flatten(end_dim=-2), outputs.flatten(end_dim=-2).clone()

    with watched((block, note)):
        yield seen


@contextmanager
def unchunked(model: PreTrainedModel) -> Iterator[None]:
    """Let FFNs see a whole sequence at once for a while, which takes more memory and changes no result.

    BERT and its relatives run them piece by piece where `chunk_size_feed_forward` is set: hooks would see each piece.
    """
    name = "chunk_size_feed_forward"
    chunked = [(module, size) for module in model.modules() if (size := module.__dict__.get(name))]
    for module, _ in chunked:
        setattr(module, name, 0)
    try:
        yield
    finally:
        for module, size in chunked:
            setattr(module, name, size)
