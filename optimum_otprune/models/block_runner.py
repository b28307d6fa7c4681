"""Run a model piece by piece: what comes before its blocks, one block, and what comes after them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.inputs import model_inputs
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import StoredTensor, TensorSpill, mapped

_Call = tuple[tuple, dict[str, Any]]  # a block's arguments besides the hidden states


class _OwnTensor(NamedTuple):
    """A stored tensor that a block receives with one batch alone.

    Attributes:
        stored: The tensor, on the CPU or in a file.
        device: The device on which the block receives it.
    """

    stored: StoredTensor
    device: torch.device


class _ListEndedError(Exception):
    """A pass has come to a list of blocks that is not run yet."""


_LEAVES = (Tensor, _OwnTensor)


class BlockRunner:
    """Calls of a model's blocks, one at a time.

    A block's arguments besides the hidden states are recorded for each batch, since they may depend on the token ids,
    as the embeddings that some models have for each layer do. Arguments that are equal for all batches of a size, such
    as masks and positions, are kept once. Where a second list of blocks runs behind the first, as a decoder behind its
    encoder, its calls are recorded when it is entered, since they hold what the first list puts out.

    Args:
        prunable: The model whose blocks are called.
        batches: The token ids of each batch, `(batch, seqlen)`.
        spill: Where hidden states before the first block, and arguments that batches do not share, wait.
    """

    def __init__(self, prunable: PrunableModel, batches: Sequence[Tensor], spill: TensorSpill):
        self._model, self._blocks, self._spill = prunable.model, prunable.firsts, spill
        self._batches = batches
        self._lists = [list(group) for _, group in groupby(self._blocks, key=lambda block: block.spec.layers)]
        self._number = 0  # of the list that is run now
        self._forms: dict[int, tuple | None] = {}  # what blocks of a list return beside hidden states; None: nothing
        self._calls: list[list[_Call]] = [[] for _ in batches]
        self._first_hidden: list[StoredTensor] = []
        self._note_calls(None)

    def take_first_hidden(self) -> list[StoredTensor]:
        """Hand over the hidden states `(batch, seqlen, hidden_size)` before the first block, by batch, once."""
        taken, self._first_hidden = self._first_hidden, []
        return taken

    def entered(self, block: FFNBlock, hidden: list[StoredTensor]) -> list[StoredTensor]:
        """Return the hidden states before a block: those behind the one before it, or the first ones of a new list.

        Args:
            block: The block to run next.
            hidden: The hidden states behind the block before it, by batch.
        """
        if self._number + 1 == len(self._lists) or block.block != self._lists[self._number + 1][0].block:
            return hidden
        self._number += 1
        self._note_calls(hidden)
        return self.take_first_hidden()

    def run(self, block: FFNBlock, hidden: Tensor, index: int) -> Tensor:
        """Return the hidden states behind a block; differentiable where gradients are enabled.

        Args:
            block: The block to call.
            hidden: The hidden states before it, `(batch, seqlen, hidden_size)` on any device; they are not changed.
            index: The index of the batch that they belong to.
        """
        args, kwargs = mapped(self._calls[index][block.block], _loaded, _LEAVES)
        device = block.device
        # A block may add to its input in place.
        hidden = hidden.clone() if hidden.device == device else hidden.to(device)
        output = block.module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def given(self, block: FFNBlock, index: int) -> list[Tensor]:
        """Return all tensors that a block receives beside the hidden states of a batch."""
        return [_loaded(leaf) for leaf in _leaves(self._calls[index][block.block])]

    def _sharing(self, calls: list[_Call], like: list[_Call]) -> list[_Call]:
        """Return calls whose tensors are those of `like` where they are equal, and wait in the spill otherwise."""
        known: dict[int, Any] = {}  # blocks are often given the same tensor: it is compared, and kept, once
        for own, other in zip(_leaves(calls), _leaves(like)):
            if id(own) not in known and _is_equal(own, other):
                known[id(own)] = other

        def kept(tensor: Tensor) -> Any:
            if id(tensor) not in known:
                known[id(tensor)] = _OwnTensor(self._spill.put(tensor), tensor.device)
            return known[id(tensor)]

        return mapped(calls, kept, _LEAVES)

    def finish(self, batch: Tensor, hidden: Tensor, **kwargs: object) -> Any:
        """Return the model's output for the hidden states behind its last block, differentiable by them.

        Args:
            batch: Token ids `(batch, seqlen)`.
            hidden: The hidden states behind the last block, `(batch, seqlen, hidden_size)`.
            **kwargs: Other arguments of the model, such as `labels`.
        """

        def stand_in(block: FFNBlock, before: Tensor, args: tuple, rest: dict[str, Any]) -> Any:
            return self._as_output(block, hidden if block is self._blocks[-1] else before)

        with self._replaced_blocks(stand_in):
            return self._model(**model_inputs(self._model, batch), use_cache=False, **kwargs)

    def _as_output(self, block: FFNBlock, hidden: Tensor) -> object:
        beside = self._forms[self._list_of(block)]
        return hidden if beside is None else (hidden, *beside)

    def _list_of(self, block: FFNBlock) -> int:
        return next(number for number, blocks in enumerate(self._lists) if block.block <= blocks[-1].block)

    @torch.no_grad()
    def _note_calls(self, behind: list[StoredTensor] | None) -> None:
        """Record each batch's hidden states before the list that is run now, and other arguments of its blocks.

        Args:
            behind: The hidden states behind the list before it, by batch; None for the first list.
        """
        calls: list[_Call] = []
        number = self._number

        def note(block: FFNBlock, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._list_of(block) > number:
                raise _ListEndedError
            if self._list_of(block) < number:
                is_last = behind is not None and block is self._lists[number - 1][-1]
                return self._as_output(block, behind[index].load().to(hidden.device) if behind and is_last else hidden)
            if not calls:
                self._first_hidden.append(self._spill.put(hidden.clone()))
            # The first block and batch show the form of all, but for tensors, such as T5's position biases.
            if number not in self._forms or (not calls and _leaves(self._forms[number])):
                output = block.module(hidden, *args, **kwargs)
                self._forms[number] = output[1:] if isinstance(output, tuple) else None
            calls.append((args, kwargs))
            return self._as_output(block, hidden)

        first_of_size: dict[torch.Size, list[_Call]] = {}
        with self._replaced_blocks(note):
            for index, batch in enumerate(self._batches):
                with suppress(_ListEndedError):
                    self._model.base_model(**model_inputs(self._model, batch), use_cache=False)
                own, calls = calls, []
                like = first_of_size.setdefault(batch.shape, own)
                self._calls[index] += own if like is own else self._sharing(own, like)

    @contextmanager
    def _replaced_blocks(self, function: Callable[[FFNBlock, Tensor, tuple, dict[str, Any]], Any]) -> Iterator[None]:
        """Call `function(block, hidden, other args, other kwargs)` in place of each block; it may call the block."""

        def stand_in(block: FFNBlock, own: Callable | None) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                _set_forward(block.module, own)
                try:
                    return function(block, args[0] if args else kwargs["hidden_states"], args[1:], rest)
                finally:
                    _set_forward(block.module, forward)

            return forward

        # If an instance has its own `forward`, it is accelerate's, which moves weights and inputs.
        own = {block.block: block.module.__dict__.get("forward") for block in self._blocks}
        for block in self._blocks:
            _set_forward(block.module, stand_in(block, own[block.block]))
        try:
            yield
        finally:
            for block in self._blocks:
                _set_forward(block.module, own[block.block])


def _leaves(value: object) -> list[Any]:
    """Return the tensors that `mapped` finds, in order."""
    found: list[Any] = []
    mapped(value, found.append, _LEAVES)
    return found


def _loaded(leaf: Any) -> Tensor:
    return leaf.stored.load().to(leaf.device) if isinstance(leaf, _OwnTensor) else leaf


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    form = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (one, other)]
    return form[0] == form[1] and torch.equal(one, other)


def _set_forward(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
