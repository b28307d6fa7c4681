"""Look into FFNs while a model runs: hooks that are gone afterwards, whatever happens."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from optimum_otprune.functional.experts import Routing
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
    """Let functions see every run of the projections of FFNs during a block of code.

    Experts that a router chooses from are one module; what goes into it is seen as that of the up projection, and
    what it puts out as that of the down projection.

    Args:
        *watchers: FFNs, each with a function of a projection's name, input and output, which is its piece of what a
            fused matrix puts out. What it returns takes the place of the output; None leaves that as it is.
    """

    def seen_together(watcher: Watcher, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        inputs, _ = experts_call(module, args, kwargs)
        watcher("up", inputs, output)
        watcher("down", inputs, output)

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

    def handle(block: FFNBlock, watcher: Watcher, module: nn.Module, names: tuple[str, ...]) -> RemovableHandle:
        if block.spec.is_stacked:
            return module.register_forward_hook(partial(seen_together, watcher), with_kwargs=True)
        return module.register_forward_hook(partial(seen, watcher, names))

    with hooked(
        handle(block, watcher, module, names) for block, watcher in watchers for module, names in block.modules.items()
    ):
        yield


def experts_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Routing]:
    """Return the inputs of a module of experts, `(num_tokens, hidden_size)`, and the router's choice for them.

    Args:
        module: The module that holds the experts of a block.
        args: What it was called with by position.
        kwargs: What it was called with by name.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).args
    inputs, experts, weights = given[:3]
    return inputs.flatten(end_dim=-2), Routing(experts, weights)


@contextmanager
def routed(block: FFNBlock) -> Iterator[list[Routing]]:
    """Yield a list that each run of a block fills with the router's choice among its experts."""
    seen: list[Routing] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(experts_call(module, args, kwargs)[1])

    with hooked([block.up.register_forward_hook(note, with_kwargs=True)] if block.spec.is_stacked else []):
        yield seen


def watch_points(blocks: Sequence[FFNBlock]) -> list[FFNBlock]:
    """Return the FFNs that can be watched for themselves; the first expert of a block stands for all of them."""
    return [block for block in blocks if not block.expert]


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
