"""Exact gradients through a whole model, one block at a time: forward once, then each block again, the last one first.

Every block is run anew from the hidden states before it, so that no more than one block's weights and activations are
needed at once, wherever the model is. The gradients are those of the whole model's backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_otprune.errors import NumericalError, UnsupportedModelError
from optimum_otprune.functional.linalg.singular_values import mean_singular_value
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import onloaded, return_freed_memory
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.ffn_hooks import hooked, watched
from optimum_otprune.models.pass_settings import PassSettings
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.spill import StoredTensor

LOSS = "loss"  # the language-model loss, a mean over a batch's tokens
SINGULAR_VALUES = "singular values"  # the sum of the mean singular values of all modules' outputs


class FFNGradients(NamedTuple):
    """The gradients of one batch of tokens in one FFN, by projection, on the FFN's device.

    Attributes:
        inputs: The inputs of each projection, `(num_tokens, in_features)`.
        gradients: The gradient by each projection's outputs, by objective, `(num_tokens, out_features)`.
    """

    inputs: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]


class ReversePass:
    """Gradients of one or both objectives by the outputs of every FFN projection.

    Args:
        prunable: The dense model.
        tokens: Token ids, LongTensor `(num_samples, seqlen)`.
        settings: How the pass is run; the value of an objective on a batch depends on the batch size.
        objectives: The objectives to differentiate, from `LOSS` and `SINGULAR_VALUES`.
    """

    def __init__(self, prunable: PrunableModel, tokens: Tensor, settings: PassSettings, objectives: Sequence[str]):
        model, blocks = prunable.model, prunable.blocks
        if prunable.has_experts:
            raise UnsupportedModelError(
                f"{type(model).__name__} has experts, and gradients are not led to what a router chooses. Choose "
                "options that need no gradients, such as quality='balanced'."
            )
        if len(prunable.spec.lists) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder and a decoder, and gradients are not led from one to the "
                "other. Choose options that need no gradients, such as quality='balanced'."
            )
        model.eval()  # dropout would make gradients random
        self.batches = tokens.split(settings.batch_size)
        self._blocks, self._objectives = blocks, objectives
        self._spill, self._progress = settings.spill, settings.progress
        self._names = {module: name for name, module in model.named_modules()}
        inside = {module for block in blocks for module in block.module.modules()}
        self._around = [module for module in model.modules() if module is not model and module not in inside]
        self._runner = BlockRunner(prunable, self.batches, self._spill)

    def blocks(self) -> Iterator[tuple[FFNBlock, Iterator[FFNGradients]]]:
        """Yield every block, the last one first, with its batches' gradients, which must be read in this order.

        Raises:
            NumericalError: If an output is NaN or infinite; names the module.
        """
        before = self._forward()
        hidden = before.pop()
        gradients = {
            objective: [
                self._spill.put(self._head_gradient(objective, batch, states.load()))
                for batch, states in zip(self.batches, hidden)
            ]
            for objective in self._objectives
        }
        del hidden
        for block in tqdm(self._blocks[::-1], desc="Backward", unit="layer", disable=not self._progress):
            with onloaded(block.module):
                yield block, self._backward(block, before.pop(), gradients)
            return_freed_memory()

    @torch.no_grad()
    def _forward(self) -> list[list[StoredTensor]]:
        """Return the hidden states before every block and behind the last one, by block and batch."""
        hidden = [self._runner.take_first_hidden()]
        for block in tqdm(self._blocks, desc="Forward", unit="layer", disable=not self._progress):
            outputs = []
            with onloaded(block.module):
                for index, states in enumerate(hidden[-1]):
                    output = self._runner.run(block, states.load(), index)
                    if not torch.isfinite(output).all():
                        self._raise_at_module(block, states.load(), index)
                    outputs.append(self._spill.put(output))
            hidden.append(outputs)
            return_freed_memory()
        return hidden

    def _raise_at_module(self, block: FFNBlock, hidden: Tensor, index: int) -> None:
        with _singular_values(list(block.module.modules()), self._names, every_output=True):
            self._runner.run(block, hidden, index)
        raise _not_finite(self._names[block.module])

    def _head_gradient(self, objective: str, batch: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient by the hidden states behind the last block."""
        with torch.enable_grad():
            hidden = hidden.to(self._blocks[-1].device).detach().requires_grad_(True)
            if objective == LOSS:
                value = self._runner.finish(batch, hidden, labels=batch).loss * self._loss_scale(batch)
            else:
                with _singular_values(self._around, self._names) as values:
                    self._runner.finish(batch, hidden)
                value = _summed(values)
            return torch.autograd.grad(value, hidden)[0]

    def _loss_scale(self, batch: Tensor) -> int:
        """Return the factor that scales the loss in float16, where gradients of a mean over many tokens underflow."""
        return 2 ** (batch.numel().bit_length() - 1) if self._blocks[0].dtype == torch.float16 else 1

    def _backward(
        self, block: FFNBlock, before: list[StoredTensor], gradients: dict[str, list[StoredTensor]]
    ) -> Iterator[FFNGradients]:
        """Go back through one block: replace the gradients by its outputs by those by its inputs."""
        for index, states in enumerate(before):
            above = {objective: parts[index].load() for objective, parts in gradients.items()}
            found, below = self._through(block, states.load(), index, above)
            for objective, gradient in below.items():
                gradients[objective][index] = self._spill.put(gradient)
            scale = self._loss_scale(self.batches[index])
            if scale > 1:
                scaled = found.gradients[LOSS]
                found.gradients[LOSS] = {name: part.float() / scale for name, part in scaled.items()}
            yield found

    def _through(
        self, block: FFNBlock, hidden: Tensor, index: int, above: dict[str, Tensor]
    ) -> tuple[FFNGradients, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        below: dict[str, Tensor] = {}
        values: list[Tensor] = []
        with torch.enable_grad(), ExitStack() as stack:
            seen: dict[str, tuple[Tensor, Tensor]] = {}

            def note(name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
                seen[name] = (inputs, outputs)
                return outputs.clone()  # what a block adds in place is then not added to what was noted

            stack.enter_context(watched((block, note)))
            if SINGULAR_VALUES in above:
                values = stack.enter_context(_singular_values(list(block.module.modules()), self._names))
            hidden = hidden.to(block.device).detach().requires_grad_(True)
            output = self._runner.run(block, hidden, index)
            left = len(above)
            for objective, gradient in above.items():
                left -= 1
                sources, weights = [output], [gradient.to(output.device)]
                if objective == SINGULAR_VALUES and values:
                    sources, weights = [*sources, _summed(values)], [*weights, torch.ones((), device=output.device)]
                wanted = [hidden, *(outputs for _, outputs in seen.values())]
                below[objective], *rest = torch.autograd.grad(sources, wanted, weights, retain_graph=left > 0)
                found[objective] = {name: part.flatten(end_dim=-2) for name, part in zip(seen, rest)}
        inputs = {name: part.detach().flatten(end_dim=-2) for name, (part, _) in seen.items()}
        return FFNGradients(inputs, found), below


def _not_finite(name: str) -> NumericalError:
    return NumericalError(
        f"The output of module {name!r} is NaN or infinite on the calibration data. The weights are damaged, or the "
        "model's dtype overflowed: load it in float32."
    )


def _summed(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum()


@contextmanager
def _singular_values(
    modules: list[nn.Module], names: dict[nn.Module, str], every_output: bool = False
) -> Iterator[list[Tensor]]:
    """Collect the mean singular value of each output, reshaped to `(batch, -1)`, that gradients flow through."""
    values: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2 or not (output.requires_grad or every_output):
            return
        # A copy, since a block may add to the output in place.
        matrix = output.to(torch.float32, copy=True).reshape(output.shape[0], -1)
        value = mean_singular_value(matrix)
        if torch.isnan(value):
            raise _not_finite(names[module])
        values.append(value)

    with hooked(module.register_forward_hook(note) for module in modules):
        yield values
