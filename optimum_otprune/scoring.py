"""One pass over calibration data leaves scores and statistics behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.gram import GramStatistics, gram_statistics
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.functional.reconstruction import TokenSet
from optimum_otprune.functional.rescue import RescueEnergies, pooled, rescue_energies
from optimum_otprune.streaming import BlockPass, input_device


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


class LayerStatistics(NamedTuple):
    """Second moments of one layer, apart for tokens that are fitted and tokens that are held out.

    Attributes:
        fit: Of the tokens that are fitted.
        heldout: Of the others.
    """

    fit: GramStatistics
    heldout: GramStatistics

    @property
    def total(self) -> GramStatistics:
        """Of all tokens."""
        return self.fit + self.heldout


def heldout_mask(num_samples: int, seqlen: int, share: float, seed: int) -> Tensor:
    """Return which calibration tokens are held out: whole samples, or the ends of the samples if there are under four.

    Args:
        num_samples: Calibration samples.
        seqlen: Tokens of each.
        share: To hold out.
        seed: Of the choice.

    Returns:
        BoolTensor `(num_samples · seqlen,)`, at least one token on either side.
    """
    mask = torch.zeros(num_samples, seqlen, dtype=torch.bool)
    if num_samples >= 4:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(num_samples, generator=generator)[: max(1, round(share * num_samples))]
        mask[chosen] = True
    else:
        mask[:, seqlen - max(1, round(share * seqlen)) :] = True
    return mask.flatten()


class TokenBatch(NamedTuple):
    """One batch of calibration tokens on its way through one FFN, float32, on the FFN's device.

    Attributes:
        inputs: Of the FFN, `(num_tokens, hidden_size)`.
        hidden: Channel activations of the dense FFN `(num_tokens, intermediate_size)`.
        targets: What the FFN should put out, without its bias, `(num_tokens, hidden_size)`.
        is_heldout: BoolTensor `(num_tokens,)`.
    """

    inputs: Tensor
    hidden: Tensor
    targets: Tensor
    is_heldout: Tensor


class LayerData(NamedTuple):
    """What one layer is compressed on.

    Attributes:
        dense: The FFN before, float32, on the device to compute on.
        activation: Elementwise function.
        passed: From `CalibrationStream.dense_pass`.
        correction: Share c of the earlier layers' error that the targets `W_d h + c · (dense − pruned)` contain.
        is_heldout: BoolTensor over all tokens.
    """

    dense: FFNWeights
    activation: Callable[[Tensor], Tensor]
    passed: BlockPass
    correction: float
    is_heldout: Tensor

    def batches(self) -> Iterator[TokenBatch]:
        """The calibration tokens, a batch at a time.

        Raises:
            NumericalError: If an activation is NaN or infinite.
        """
        start = 0
        for index, inputs in enumerate(self.passed.ffn_inputs):
            device = self.dense.down.device
            inputs = inputs.to(device).float()
            hidden = channel_activations(self.dense, inputs, self.activation)
            if not torch.isfinite(hidden).all():
                raise NumericalError(
                    "the channel activations are NaN or infinite on the calibration data. The weights are damaged, or "
                    "the model's dtype overflowed: load it in float32."
                )
            targets = hidden @ self.dense.down.T
            if self.passed.corrections is not None and self.correction:
                targets = targets + self.correction * self.passed.corrections[index].to(device)
            mask = self.is_heldout[start : start + len(inputs)].to(device)
            yield TokenBatch(inputs, hidden, targets, mask)
            start += len(inputs)


def layer_statistics(data: LayerData, compressed: FFNWeights | None = None) -> LayerStatistics:
    """Sum second moments of the channels and of the targets.

    Args:
        data: Of the layer.
        compressed: An FFN whose channels are measured in place of the dense one's; the targets stay.

    Raises:
        NumericalError: If an activation is NaN or infinite.
    """
    parts: dict[bool, GramStatistics] = {}
    for batch in data.batches():
        hidden = batch.hidden
        if compressed is not None:
            hidden = channel_activations(compressed.map(Tensor.float), batch.inputs, data.activation)
        for heldout in (False, True):
            chosen = batch.is_heldout == heldout
            if chosen.any():
                sums = gram_statistics(hidden[chosen], batch.targets[chosen])
                parts[heldout] = parts[heldout] + sums if heldout in parts else sums
    return LayerStatistics(parts[False], parts[True])


def token_sets(data: LayerData) -> tuple[TokenSet, TokenSet]:
    """Return inputs and targets, the FFN's own bias included, of the fitted and of the held-out tokens."""
    batches = list(data.batches())
    inputs, targets, is_heldout = (
        torch.cat(parts) for parts in zip(*((batch.inputs, batch.targets, batch.is_heldout) for batch in batches))
    )
    if data.dense.down_bias is not None:
        targets = targets + data.dense.down_bias
    fit, heldout = (TokenSet(inputs[mask], targets[mask]) for mask in (~is_heldout, is_heldout))
    return fit, heldout


def measure_rescue(data: LayerData, compressed: FFNWeights, kept_channels: Tensor) -> RescueEnergies:
    """Compare a compressed FFN with the dense one on the held-out tokens.

    Args:
        data: Of the layer.
        compressed: The FFN after.
        kept_channels: LongTensor `(kept_size,)`.
    """
    dense, compressed = data.dense, compressed.map(Tensor.float)
    energies = []
    for batch in data.batches():
        hidden, inputs = batch.hidden[batch.is_heldout], batch.inputs[batch.is_heldout]
        energies.append(
            rescue_energies(
                outputs=torch.nn.functional.linear(hidden, dense.down, dense.down_bias),
                compressed_outputs=ffn_forward(compressed, inputs, data.activation),
                hidden=hidden,
                compressed_hidden=channel_activations(compressed, inputs, data.activation),
                down=dense.down,
                kept_channels=kept_channels,
            )
        )
    return pooled(energies)
