"""Run a model piece by piece: what comes before its blocks, one block, and what comes after them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.devices import execution_device


class _FirstBlockReached(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


class BlockRunner:
    """Calls of a model's blocks, one at a time.

    What a block is given beside the hidden states is noted once for each size of batch: without padding it depends on
    nothing else.

    Args:
        model: The model.
        blocks: All its blocks, in order.
        batches: Token ids `(batch, seqlen)` each.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[FFNBlock], batches: Sequence[Tensor]):
        self._model, self._blocks = model, blocks
        self._form: tuple | None = None  # what a block returns beside the hidden states, in a tuple; None: not known
        self._is_tuple = False
        self._calls: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        for size, batch in sorted({len(batch): batch for batch in batches}.items()):
            self._calls[size] = self._noted_calls(batch)

    @torch.no_grad()
    def first_hidden(self, batch: Tensor) -> Tensor:
        """Hidden states `(batch, seqlen, hidden_size)` before the first block."""
        found: list[Tensor] = []

        def note(block: FFNBlock, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            found.append(hidden)
            raise _FirstBlockReached

        with self._replaced_blocks(note), suppress(_FirstBlockReached):
            self._forward(batch)
        return found[0]

    def run(self, block: FFNBlock, hidden: Tensor) -> Tensor:
        """Hidden states behind a block; differentiable where gradients are enabled.

        Args:
            block: As it is now.
            hidden: `(batch, seqlen, hidden_size)` on any device, of one of the sizes of batch.
        """
        args, kwargs = self._calls[len(hidden)][block.layer]
        output = block.module(hidden.to(block.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def finish(self, batch: Tensor, hidden: Tensor, **kwargs: Any) -> Any:
        """The model's output for the hidden states behind its last block, differentiable by them.

        Args:
            batch: Token ids `(batch, seqlen)`.
            hidden: `(batch, seqlen, hidden_size)`.
            **kwargs: Of the model, such as `labels`.
        """

        def stand_in(block: FFNBlock, before: Tensor, args: tuple, rest: dict[str, Any]) -> Any:
            return self._as_output(hidden if block is self._blocks[-1] else before)

        with self._replaced_blocks(stand_in):
            return self._model(input_ids=batch.to(input_device(self._model)), use_cache=False, **kwargs)

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden, *(self._form or ())) if self._is_tuple else hidden

    @torch.no_grad()
    def _noted_calls(self, batch: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def note(block: FFNBlock, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            calls.append((args, kwargs))
            if self._form is None:  # of the first block and the smallest batch: it is that of all
                output = block.module(hidden, *args, **kwargs)
                self._is_tuple = isinstance(output, tuple)
                self._form = output[1:] if self._is_tuple else ()
            return self._as_output(hidden)

        with self._replaced_blocks(note):
            self._forward(batch)
        return calls

    def _forward(self, batch: Tensor) -> None:
        self._model.base_model(input_ids=batch.to(input_device(self._model)), use_cache=False)

    @contextmanager
    def _replaced_blocks(self, function: Callable[[FFNBlock, Tensor, tuple, dict[str, Any]], Any]) -> Iterator[None]:
        """A function `(block, hidden, other args, other kwargs)` in place of each block; it may call the block."""

        def stand_in(block: FFNBlock, own: Callable | None) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                _set_forward(block.module, own)
                try:
                    return function(block, args[0] if args else kwargs["hidden_states"], args[1:], rest)
                finally:
                    _set_forward(block.module, forward)

            return forward

        # A forward of the instance's own is accelerate's, which moves weights and inputs.
        own = {block.layer: block.module.__dict__.get("forward") for block in self._blocks}
        for block in self._blocks:
            _set_forward(block.module, stand_in(block, own[block.layer]))
        try:
            yield
        finally:
            for block in self._blocks:
                _set_forward(block.module, own[block.layer])


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """A block of code during which modules have these hooks, and after which they do not."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set_forward(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return execution_device(model.get_input_embeddings())
