"""Look into FFNs while a model runs: hooks that are gone afterwards, whatever happens."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

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

    def seen_together(
        watcher: Watcher, is_sorted: bool, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> None:
        call = experts_call(module, is_sorted, args, kwargs)
        watcher("up", call.inputs, call.of(output))
        watcher("down", call.inputs, call.of(output))

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
            together = partial(seen_together, watcher, block.spec.is_sorted)
            return module.register_forward_hook(together, with_kwargs=True)
        return module.register_forward_hook(partial(seen, watcher, names))

    with hooked(
        handle(block, watcher, module, names) for block, watcher in watchers for module, names in block.modules.items()
    ):
        yield


class ExpertsCall(NamedTuple):
    """What a module of experts was called with.

    Attributes:
        inputs: The inputs, `(num_rows, hidden_size)`: one row for each token, or for each expert that it is sent to,
            in the order of tokens.
        routing: The router's choice for each row.
        rows: Which rows of the module's own inputs and outputs these are; None for all.
    """

    inputs: Tensor
    routing: Routing
    rows: Tensor | None = None

    def of(self, output: Tensor) -> Tensor:
        """Return what the module puts out for these rows, `(num_rows, hidden_size)`."""
        output = output.flatten(end_dim=-2)
        return output if self.rows is None else output[self.rows]


def experts_call(module: nn.Module, is_sorted: bool, args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
    """Return what goes into a module of experts.

    Args:
        module: The module that holds the experts of a block.
        is_sorted: Whether it gets copies of all tokens for each expert; see `FFNSpec.is_sorted`.
        args: What it was called with by position.
        kwargs: What it was called with by name.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).args
    inputs = given[0].flatten(end_dim=-2)
    if not is_sorted:
        return ExpertsCall(inputs, Routing(*given[1:3]))
    stack = next(iter(module.parameters(recurse=False)))
    is_sent = inputs.ne(0).any(dim=-1).view(len(stack), -1).T  # (num_tokens, num_experts)
    most = int(is_sent.sum(dim=1).max())  # if a weight was rounded to 0, a row of zeros takes the place
    experts = is_sent.int().topk(most, dim=1).indices.sort(dim=1).values
    rows = (experts * len(is_sent) + torch.arange(len(is_sent), device=experts.device)[:, None]).flatten()
    chosen = experts.flatten()[:, None]
    return ExpertsCall(inputs[rows], Routing(chosen, inputs.new_ones(chosen.shape)), rows)


@contextmanager
def routed(block: FFNBlock) -> Iterator[list[Routing]]:
    """Yield a list that each run of a block fills with the router's choice among its experts."""
    seen: list[Routing] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(experts_call(module, block.spec.is_sorted, args, kwargs).routing)

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
