"""Forward through a model block by block: each layer sees what the pruned layers below it produce."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.block_runner import BlockRunner, hooked
from optimum_otprune.devices import onloaded
from optimum_otprune.functional.ffn import ffn_forward
from optimum_otprune.spill import StoredTensor, TensorSpill

_ROUNDING = 1e-5  # of the norm


class FFNTap(NamedTuple):
    """What one batch of tokens left behind on its way through the dense FFN of a block, on the FFN's device.

    Attributes:
        inputs: Of the FFN, `(num_tokens, hidden_size)`.
        stored_inputs: The same, where they wait.
        hidden: Channel activations `(num_tokens, intermediate_size)`.
        outputs: Of the down projection, its bias included, `(num_tokens, hidden_size)`.
        missing: From the block's output to the dense model's, float32 `(num_tokens, hidden_size)`, or None when the
            dense model's hidden states are not tracked.
    """

    inputs: Tensor
    stored_inputs: StoredTensor
    hidden: Tensor
    outputs: Tensor
    missing: Tensor | None


class CalibrationStream:
    """Hidden states of the calibration samples on their way through the blocks, kept on the CPU or in files.

    Args:
        model: The model; blocks are changed by others between `taps` and `advance`.
        blocks: All its blocks, in order.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per forward pass.
        track_dense: Whether the hidden states of the dense model are streamed beside those of the pruned one.
        spill: Where hidden states wait; default: in memory up to its default limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[FFNBlock],
        tokens: Tensor,
        batch_size: int,
        track_dense: bool,
        spill: TensorSpill | None = None,
    ):
        self.spill = spill or TensorSpill()
        batches = tokens.split(batch_size)
        self._runner = BlockRunner(model, blocks, [*batches, tokens[:1]])
        self._hidden = [self.spill.put(self._runner.first_hidden(batch)) for batch in batches]
        self._dense_hidden = list(self._hidden) if track_dense else None
        self._ffn_inputs: list[StoredTensor] | None = None  # then `_hidden` is what a block puts out beside its FFN

    @torch.no_grad()
    def energies(self, block: FFNBlock) -> Tensor:
        """Run a block, its FFN still dense, and return what the hidden states behind it amount to.

        Where the dense model is tracked, its hidden states are those, and they are then behind the block.

        Returns:
            ‖h‖² `(num_tokens,)`, float32, on the CPU.
        """
        found = []
        with onloaded(block.module):
            for index, hidden in enumerate(self._hidden if self._dense_hidden is None else self._dense_hidden):
                output = self._runner.run(block, hidden.load())
                found.append(output.float().square().sum(dim=-1).flatten().cpu())
                if self._dense_hidden is not None:
                    self._dense_hidden[index] = self.spill.put(output)
        return torch.cat(found)

    @torch.no_grad()
    def taps(self, block: FFNBlock, advance: bool = False) -> Iterator[FFNTap]:
        """Run a block, its FFN still dense, on the pruned model's hidden states; after `energies`.

        Args:
            block: The block.
            advance: Whether it stays as it is, so that its outputs are what the next block sees.
        """
        adds = False
        ffn_inputs = []
        with onloaded(block.module):
            for index, stored in enumerate(self._hidden):
                hidden = stored.load()
                with _noted(block) as seen:
                    output = self._runner.run(block, hidden)
                if index == 0 and not advance:
                    adds = self._adds_its_ffn(block, hidden[:1], output[:1], seen["outputs"])
                missing = None
                if self._dense_hidden is not None:
                    dense = self._dense_hidden[index].load().to(output.device)
                    missing = (dense.float() - output.float()).flatten(end_dim=-2)
                inputs = self.spill.put(seen["inputs"])
                if adds:
                    ffn_inputs.append(inputs)
                    self._hidden[index] = self.spill.put(output - seen["outputs"].view_as(output))
                elif advance:
                    self._hidden[index] = self.spill.put(output)
                yield FFNTap(**seen, stored_inputs=inputs, missing=missing)
        self._ffn_inputs = ffn_inputs if adds else None

    @torch.no_grad()
    def advance(self, block: FFNBlock) -> None:
        """Run a block as it is now, so that the next one sees its outputs; behind `taps` its FFN alone, if it can be.

        That is where the block adds the FFN's output as it is, in float32: else rounding would add up.
        """
        if self._ffn_inputs is None:
            self._run_all(block, self._hidden)
            return
        weights = block.read()
        for index, (beside, inputs) in enumerate(zip(self._hidden, self._ffn_inputs)):
            outputs = ffn_forward(weights, inputs.load().to(weights.up.device), block.activation)
            states = beside.load().to(outputs.device)
            self._hidden[index] = self.spill.put(states + outputs.view_as(states))
        self._ffn_inputs = None

    def _adds_its_ffn(self, block: FFNBlock, hidden: Tensor, output: Tensor, ffn_outputs: Tensor) -> bool:
        """Whether a block's output is something plus the FFN's output: tried on one sample, for names do not tell."""
        if block.up.weight.dtype != torch.float32:
            return False
        beside = output - ffn_outputs[: output.shape[1]].view_as(output)
        with _without_output(block):
            found = self._runner.run(block, hidden)
        return bool((found - beside).norm() <= _ROUNDING * output.norm())

    def skip(self, block: FFNBlock) -> None:
        """Run a block that stays as it is, on the dense model's hidden states too if they are tracked."""
        with onloaded(block.module):
            self.follow_dense(block)
            self.advance(block)

    def replay(self, block: FFNBlock) -> None:
        """Do what measuring a block, its FFN still dense, does to the hidden states, to the bit."""
        self.follow_dense(block)
        for _ in self.taps(block):
            pass

    def follow_dense(self, block: FFNBlock) -> None:
        """Run a block, its FFN still dense, on the dense model's hidden states alone, if they are tracked."""
        if self._dense_hidden is not None:
            self._run_all(block, self._dense_hidden)

    @torch.no_grad()
    def _run_all(self, block: FFNBlock, hidden: list[StoredTensor]) -> None:
        with onloaded(block.module):
            for index, states in enumerate(hidden):  # one by one, so that the old ones make room for the new ones
                hidden[index] = self.spill.put(self._runner.run(block, states.load()))


@contextmanager
def _without_output(block: FFNBlock) -> Iterator[None]:
    """A block whose down projection puts out zeros."""
    down = block.projection("down")
    assert down is not None
    with hooked([down.register_forward_hook(lambda module, args, output: torch.zeros_like(output))]):
        yield


@contextmanager
def _noted(block: FFNBlock) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each run of the block fills with the FFN's inputs, activations and outputs."""
    seen: dict[str, Tensor] = {}

    def before_up(module: nn.Module, args: tuple) -> None:
        seen["inputs"] = args[0].flatten(end_dim=-2)

    def after_down(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["hidden"], seen["outputs"] = args[0].flatten(end_dim=-2), output.flatten(end_dim=-2)

    down = block.projection("down")
    assert down is not None
    with hooked([block.up.register_forward_pre_hook(before_up), down.register_forward_hook(after_down)]):
        yield seen
