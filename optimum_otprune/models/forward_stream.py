"""Forward through a model block by block: each layer sees what the pruned layers below it produce."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_otprune.functional.experts import Routing
from optimum_otprune.functional.ffn import ffn_forward
from optimum_otprune.models.block import Block
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import onloaded
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.ffn_hooks import hooked, noted, routed, watch_points
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import StoredTensor


class FFNTap(NamedTuple):
    """One batch of tokens on its way through the dense FFN of a block, on the FFN's device.

    Attributes:
        inputs: The FFN's inputs, `(num_tokens, hidden_size)`.
        stored_inputs: The same inputs, in memory or in a file.
        hidden: The channel activations, `(num_tokens, intermediate_size)`.
        outputs: The outputs of the down projection, its bias included, `(num_tokens, hidden_size)`.
        missing: The dense model's output of the block minus the block's own, float32 `(num_tokens, hidden_size)`, or
            None when the dense model's hidden states are not tracked.
    """

    inputs: Tensor
    stored_inputs: StoredTensor
    hidden: Tensor
    outputs: Tensor
    missing: Tensor | None


class FFNInputs(NamedTuple):
    """What goes into one FFN of a block with several, or into all its experts, for all calibration tokens.

    Attributes:
        inputs: The inputs, `(num_tokens, hidden_size)` for each batch.
        tokens: Which of all tokens each input is, LongTensor for each batch; experts that get their tokens sorted have
            one input for each expert that a token is sent to.
        routing: The router's choice among the experts, for each batch; empty for another FFN.
    """

    inputs: list[StoredTensor]
    tokens: list[Tensor]
    routing: list[Routing]


class CalibrationStream:
    """Hidden states of the calibration samples on their way through the blocks, kept on the CPU or in files.

    Args:
        prunable: The model; its blocks are changed by others between `taps` and `advance`.
        tokens: Token ids, LongTensor `(num_samples, seqlen)`.
        settings: How the pass is run.
        track_dense: Whether the hidden states of the dense model are streamed beside those of the pruned one.
        stays_dense: Whether blocks are never changed, so that the outputs of `taps` serve `advance` as well.
    """

    def __init__(
        self,
        prunable: PrunableModel,
        tokens: Tensor,
        settings: PassSettings,
        track_dense: bool = False,
        stays_dense: bool = False,
    ):
        self.spill, self._stays_dense = settings.spill, stays_dense
        batches = tokens.split(settings.batch_size)
        self._runner = BlockRunner(prunable, batches, self.spill)
        self._runner.check_lengths()
        self._factors = prunable.factors or [None] * len(prunable.blocks)
        self._hidden = self._runner.take_first_hidden()
        self._dense_hidden = list(self._hidden) if track_dense else None
        self._dense_runner = self._runner
        if track_dense and len(prunable.spec.lists) > 1:  # the dense decoder reads what the dense encoder puts out
            self._dense_runner = BlockRunner(prunable, batches, self.spill)
            self._dense_hidden = self._dense_runner.take_first_hidden()
        self._energies: dict[int, Tensor] = {}  # of blocks whose attention was looked at before their FFNs
        self._ffn_inputs: list[StoredTensor] | None = None  # if set, `_hidden` is a block's output without its FFN

    @torch.no_grad()
    def energies(self, block: Block) -> Tensor:
        """Run a block with its dense FFN, and return the squared norms of the hidden states behind it.

        If the dense model is tracked, its hidden states are measured, and they are behind the block afterwards.

        Returns:
            ‖h‖² `(num_tokens,)`, float32, on the CPU.
        """
        if block.block in self._energies:
            return self._energies.pop(block.block)
        found = []
        self._enter(block)
        with onloaded(block.module):
            for index, hidden in enumerate(self._hidden if self._dense_hidden is None else self._dense_hidden):
                output = self._dense_runner.run(block, hidden.load(), index)
                found.append(output.float().square().sum(dim=-1).flatten().cpu())
                if self._dense_hidden is not None:
                    self._dense_hidden[index] = self.spill.put(output)
        return torch.cat(found)

    @torch.no_grad()
    def head_taps(self, block: Block, output: nn.Module) -> Iterator[Tensor]:
        """Run a block, still dense, on the pruned model's hidden states, and look at its attention; before its FFNs.

        `attention_energies` comes first.

        Args:
            block: The block.
            output: The module that reads all heads of its attention.

        Yields:
            The inputs of that module, `(num_tokens, num_heads * head_dim)`, batch by batch.
        """
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple) -> None:
            seen.append(args[0].flatten(end_dim=-2))

        with onloaded(block.module):
            for index, stored in enumerate(self._hidden):
                with hooked([output.register_forward_pre_hook(note)]):
                    self._runner.run(block, stored.load(), index)
                yield seen.pop()

    def attention_energies(self, block: Block) -> Tensor:
        """Return what `energies` returns, which it will return once more for the FFNs of the block, then changed."""
        self._energies[block.block] = self.energies(block)
        return self._energies[block.block]

    @torch.no_grad()
    def taps(self, block: FFNBlock) -> Iterator[FFNTap]:
        """Run a block, its FFN still dense, on the pruned model's hidden states; after `energies`."""
        self._enter(block)
        factor = None if self._stays_dense else self._exact_factor(block)
        ffn_inputs = []
        with onloaded(block.module):
            for index, stored in enumerate(self._hidden):
                with noted(block) as seen:
                    output = self._runner.run(block, stored.load(), index)
                missing = None
                if self._dense_hidden is not None:
                    dense = self._dense_hidden[index].load().to(output.device)
                    missing = (dense.float() - output.float()).flatten(end_dim=-2)
                inputs = self.spill.put(seen["inputs"])
                if factor is not None:
                    ffn_inputs.append(inputs)
                    beside = output.sub(seen["outputs"].view_as(output), alpha=factor)
                    self._hidden[index] = self.spill.put(beside)
                elif self._stays_dense:
                    self._hidden[index] = self.spill.put(output)
                yield FFNTap(**seen, stored_inputs=inputs, missing=missing)
        self._ffn_inputs = None if factor is None else ffn_inputs

    @torch.no_grad()
    def ffn_inputs(self, group: Sequence[FFNBlock]) -> dict[int, FFNInputs]:
        """Run a block with several FFNs, all still dense, on the pruned model's hidden states; after `energies`.

        Args:
            group: All FFNs of the block.

        Returns:
            What goes into each, by layer; into the first expert for all of them.
        """
        block, points = group[0], watch_points(group)
        self._enter(block)
        found = {point.layer: FFNInputs([], [], []) for point in points}
        start = 0
        with onloaded(block.module):
            for index, stored in enumerate(self._hidden):
                with ExitStack() as stack:
                    seen = [
                        (point, stack.enter_context(noted(point)), stack.enter_context(routed(point)))
                        for point in points
                    ]
                    output = self._runner.run(block, stored.load(), index)
                owners = torch.arange(start, start + output.shape[:-1].numel())
                start += len(owners)
                kept: list[tuple[Tensor, StoredTensor]] = []  # experts and what is beside them mostly get the same
                for point, parts, routing in seen:
                    inputs = parts["inputs"]
                    same = [waiting for other, waiting in kept if torch.equal(other, inputs)]
                    waiting = same[0] if same else self.spill.put(inputs)
                    kept.append((inputs, waiting))
                    own = found[point.layer]
                    own.inputs.append(waiting)
                    own.tokens.append(owners.repeat_interleave(len(inputs) // len(owners)))
                    own.routing.extend(Routing(*(part.cpu() for part in one)) for one in routing)
        return found

    @torch.no_grad()
    def advance(self, block: FFNBlock) -> None:
        """Run a block as it is now, so that the next one sees its outputs; behind `taps` its FFN alone, if it can be.

        Where the block adds a multiple of the FFN's output, that is done in float32; otherwise rounding would add up.
        """
        factor = self._exact_factor(block)
        if self._ffn_inputs is None or factor is None:
            self._advance_whole(block)
            return
        weights = block.read()
        for index, (beside, inputs) in enumerate(zip(self._hidden, self._ffn_inputs)):
            outputs = ffn_forward(weights, inputs.load().to(weights.up.device), block.activation)
            states = beside.load().to(outputs.device)
            self._hidden[index] = self.spill.put(states.add(outputs.view_as(states), alpha=factor))
        self._ffn_inputs = None

    def _exact_factor(self, block: FFNBlock) -> float | None:
        return self._factors[block.layer] if block.dtype == torch.float32 else None

    def skip(self, block: Block) -> None:
        """Run a block that stays as it is, on the dense model's hidden states too if they are tracked."""
        with onloaded(block.module):
            self.follow_dense(block)
            self._advance_whole(block)

    def _advance_whole(self, block: Block) -> None:
        self._enter(block)
        self._run_all(block, self._hidden, self._runner)

    def replay(self, block: FFNBlock) -> None:
        """Change the hidden states as measuring a block with a dense FFN would, to the bit."""
        self.follow_dense(block)
        for _ in self.taps(block):
            pass

    def follow_dense(self, block: Block) -> None:
        """Run a block, its FFN still dense, on the dense model's hidden states alone, if they are tracked."""
        if self._energies.pop(block.block, None) is not None:
            return  # done when its attention was looked at
        self._enter(block)
        if self._dense_hidden is not None:
            self._run_all(block, self._dense_hidden, self._dense_runner)

    def _enter(self, block: Block) -> None:
        """Begin a decoder where the block is its first one, with what the encoder has put out."""
        self._hidden = self._runner.entered(block, self._hidden)
        if self._dense_hidden is not None and self._dense_runner is not self._runner:
            self._dense_hidden = self._dense_runner.entered(block, self._dense_hidden)

    @torch.no_grad()
    def _run_all(self, block: Block, hidden: list[StoredTensor], runner: BlockRunner) -> None:
        with onloaded(block.module):
            for index, states in enumerate(hidden):  # one by one, so that the old ones make room for the new ones
                hidden[index] = self.spill.put(runner.run(block, states.load(), index))
