"""Forward through a model block by block: each layer sees what the pruned layers below it produce."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock


class BlockPass(NamedTuple):
    """What one forward pass through one block with its dense FFN left behind, one entry per batch.

    Attributes:
        ffn_inputs: `(batch · seqlen, hidden_size)` each, on the CPU.
        outputs_energy: ‖h‖² of the hidden states behind the block `(batch · seqlen,)` each, of the dense model where
            it is tracked, else of the pruned one.
        corrections: What is missing to the dense model's hidden states behind the block, the same shape, or None when
            they are not tracked.
    """

    ffn_inputs: list[Tensor]
    outputs_energy: list[Tensor]
    corrections: list[Tensor] | None


class _FirstBlockReached(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


class CalibrationStream:
    """Hidden states of the calibration samples on their way through the blocks, kept on the CPU.

    Args:
        model: The model; blocks are changed by others between `dense_pass` and `advance`.
        blocks: All its blocks, in order.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per forward pass.
        track_dense: Whether the hidden states of the dense model are streamed beside those of the pruned one.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: list[FFNBlock], tokens: Tensor, batch_size: int, track_dense: bool
    ):
        self.model, self.blocks = model, blocks
        batches = tokens.split(batch_size)
        of_each_size = {len(batch): batch for batch in (batches[-1], batches[0])}
        self._calls = {size: self._capture_calls(batch) for size, batch in of_each_size.items()}
        self._hidden = [self._first_hidden(batch) for batch in batches]
        self._dense_hidden = list(self._hidden) if track_dense else None

    def dense_pass(self, block: FFNBlock) -> BlockPass:
        """Run a block, its FFN still dense, on the pruned model's hidden states; note the FFN's inputs."""
        ffn_inputs: list[Tensor] = []

        def note(module: nn.Module, args: tuple) -> None:
            ffn_inputs.append(args[0].detach().flatten(end_dim=-2).cpu())

        handle = block.up.register_forward_pre_hook(note)
        try:
            outputs = [self._run(block, hidden) for hidden in self._hidden]
        finally:
            handle.remove()
        if self._dense_hidden is None:
            return BlockPass(ffn_inputs, _energies(outputs), None)
        self._dense_hidden = [self._run(block, hidden) for hidden in self._dense_hidden]
        pairs = zip(self._dense_hidden, outputs)
        corrections = [(dense.float() - output.float()).flatten(end_dim=-2) for dense, output in pairs]
        return BlockPass(ffn_inputs, _energies(self._dense_hidden), corrections)

    def advance(self, block: FFNBlock) -> None:
        """Run a block as it is now, so that the next one sees its outputs."""
        self._hidden = [self._run(block, hidden) for hidden in self._hidden]

    def skip(self, block: FFNBlock) -> None:
        """Run a block that stays as it is, on the dense model's hidden states too if they are tracked."""
        self.follow_dense(block)
        self.advance(block)

    def follow_dense(self, block: FFNBlock) -> None:
        """Run a block, its FFN still dense, on the dense model's hidden states alone, if they are tracked."""
        if self._dense_hidden is not None:
            self._dense_hidden = [self._run(block, hidden) for hidden in self._dense_hidden]

    @torch.no_grad()
    def _run(self, block: FFNBlock, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[len(hidden)][block.layer]
        output = block.module(hidden.to(block.device), *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def _capture_calls(self, batch: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
        """Arguments of every block but the hidden states; without padding they depend on the batch's shape only."""
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((args[1:], rest))

        with _pre_hooks([block.module for block in self.blocks], note):
            self._forward(batch)
        return calls

    def _first_hidden(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())
            raise _FirstBlockReached

        with _pre_hooks([self.blocks[0].module], note), suppress(_FirstBlockReached):
            self._forward(batch)
        return found[0]

    @torch.no_grad()
    def _forward(self, batch: Tensor) -> None:
        self.model.base_model(input_ids=batch.to(input_device(self.model)), use_cache=False)


def _energies(hidden: list[Tensor]) -> list[Tensor]:
    return [batch.float().square().sum(dim=-1).flatten() for batch in hidden]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    weight = model.get_input_embeddings().weight  # type: ignore[union-attr]
    return model.device if weight.device.type == "meta" else weight.device  # type: ignore[union-attr, return-value]


@contextmanager
def _pre_hooks(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
