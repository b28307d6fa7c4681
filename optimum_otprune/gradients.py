"""Backward passes through the dense model: weight × gradient scores, and gradients by the FFNs' outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.streaming import input_device


class GradientScores(NamedTuple):
    """Weight × gradient of one layer, on the CPU in float32.

    Attributes:
        snip: Under the language-model loss.
        fo: Under the sum of the mean singular values of all modules' outputs.
    """

    snip: WeightScores
    fo: WeightScores


def gradient_scores(
    model: PreTrainedModel, blocks: list[FFNBlock], tokens: Tensor, batch_size: int, progress: bool = True
) -> list[GradientScores]:
    """Score every FFN weight of the dense model by SNIP and FO.

    The gradient of a weight is collected from the input and the output gradient of its module, so that it is there on
    any placement of the model; both losses are averaged over batches. FO's singular values are those of a module's
    output reshaped to `(batch, -1)`, for every module of the model but the whole.

    Args:
        model: The dense model.
        blocks: Its FFN blocks.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per backward pass; FO depends on it.
        progress: Whether to show a progress bar.

    Returns:
        One entry per layer.

    Raises:
        NumericalError: If a gradient is NaN or infinite; the message names the layer.
    """
    batches = tokens.split(batch_size)
    snip = _GradientCollector(blocks)
    fo = _GradientCollector(blocks)
    was_training = model.training
    model.eval()
    for batch in tqdm(batches, desc="Scoring", unit="batch", disable=not progress):
        ids = batch.to(input_device(model))
        with _differentiable(model), snip:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with _differentiable(model), fo, _singular_values(model) as values:
            model(input_ids=ids, use_cache=False)
            torch.stack([value.cpu() for value in values]).sum().backward()
    model.train(was_training)
    return [GradientScores(*(collector.scores(block, len(batches)) for collector in (snip, fo))) for block in blocks]


def gradient_moments(
    model: PreTrainedModel, blocks: list[FFNBlock], tokens: Tensor, batch_size: int, progress: bool = True
) -> list[Tensor]:
    """Second moment of the language-model loss's gradient by each FFN's output, over all tokens.

    Args:
        model: The dense model.
        blocks: Its FFN blocks.
        tokens: LongTensor `(num_samples, seqlen)`.
        batch_size: Samples per backward pass.
        progress: Whether to show a progress bar.

    Returns:
        Σ g gᵀ `(hidden_size, hidden_size)` per layer, float64, on the CPU; up to a factor.

    Raises:
        NumericalError: If a gradient is NaN or infinite; the message names the layer.
    """
    moments = [torch.zeros(()) for _ in blocks]

    def note(layer: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            rows = gradient.flatten(end_dim=-2).double()
            rows = rows * len(rows)  # the loss is a mean over the batch's tokens
            moments[layer] = moments[layer] + (rows.T @ rows).cpu()

        def on_forward(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.register_hook(on_gradient)

        return on_forward

    handles = [
        block.projection("down").register_forward_hook(note(block.layer))  # type: ignore[union-attr]
        for block in blocks
    ]
    try:
        for batch in tqdm(tokens.split(batch_size), desc="Gradients", unit="batch", disable=not progress):
            ids = batch.to(input_device(model))
            with _differentiable(model):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    for block in reversed(blocks):  # as gradients flow: the first that is not finite is where it began
        if not torch.isfinite(moments[block.layer]).all():
            raise NumericalError(
                f"Layer {block.layer}: the gradient by the FFN's output is NaN or infinite. Load the model in float32."
            )
    return moments


class _GradientCollector:
    """Sums, per FFN projection, the gradient of its weight over backward passes, while entered."""

    def __init__(self, blocks: list[FFNBlock]):
        self._blocks = blocks
        self._sums: dict[nn.Module, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> None:
        for block in self._blocks:
            for name in ("gate", "up", "down"):
                module = block.projection(name)
                if module is not None:
                    self._handles.append(module.register_forward_hook(self._on_forward))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach().flatten(end_dim=-2)

        def on_gradient(gradient: Tensor) -> None:
            product = gradient.flatten(end_dim=-2).float().T @ inputs.float()  # (out_features, in_features)
            self._sums[module] = self._sums[module] + product.cpu() if module in self._sums else product.cpu()

        output.register_hook(on_gradient)

    def scores(self, block: FFNBlock, num_batches: int) -> WeightScores:
        """Weight × mean gradient, channel-first."""
        weights = block.read()
        result: dict[str, Tensor | None] = {"gate": None}
        for name in ("gate", "up", "down"):
            module, weight = block.projection(name), getattr(weights, name)
            if module is None:
                continue
            score = weight.float().cpu() * self._sums[module] / num_batches
            if not torch.isfinite(score).all():
                raise NumericalError(
                    f"Layer {block.layer}: the gradient of `{name}` is NaN or infinite. Load the model in float32."
                )
            result[name] = score.T if name == "down" else score
        return WeightScores(**result)  # type: ignore[arg-type]


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow to activations but not to parameters, which is all that the collectors need."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )  # type: ignore[union-attr]
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _singular_values(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the mean singular value of the output of every module but the whole model."""
    values: list[Tensor] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.ndim > 1:
            matrix = output.float().reshape(output.shape[0], -1)
            if not torch.isfinite(matrix).all():
                raise NumericalError(
                    f"The output of module {names[module]!r} is NaN or infinite on the calibration data. The weights "
                    "are damaged, or the model's dtype overflowed: load it in float32."
                )
            values.append(torch.linalg.svdvals(matrix).mean())

    handles = [module.register_forward_hook(note) for module in model.modules() if module is not model]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
