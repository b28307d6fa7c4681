"""What one layer is compressed on: its calibration tokens, their weights, and the statistics of them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.ffn import FFNWeights, channel_activations, ffn_forward
from optimum_otprune.functional.gram import GramStatistics, gram_statistics
from optimum_otprune.functional.reconstruction import TokenSet
from optimum_otprune.functional.rescue import RescueEnergies, pooled, rescue_energies
from optimum_otprune.streaming import BlockPass

_LEAST_ENERGY = 1e-2  # of the median


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


def residual_token_weights(outputs_energy: list[Tensor], is_heldout: Tensor) -> Tensor:
    """Weigh tokens by how much an error of the FFN disturbs the hidden state behind it: 1 / its squared norm.

    What follows a block normalizes its input first, so the same error matters less where the hidden state is long;
    tokens with massive activations, such as the first one, would else decide the whole fit. Norms below a tenth of
    the median count as that.

    Args:
        outputs_energy: Of `BlockPass`.
        is_heldout: BoolTensor `(num_tokens,)`.

    Returns:
        `(num_tokens,)` float32, of mean 1 over the fitted tokens and over the held-out ones.

    Raises:
        NumericalError: If a hidden state is NaN or infinite.
    """
    energy = torch.cat(outputs_energy)
    if not torch.isfinite(energy).all():
        raise NumericalError(
            "the hidden states behind the block are NaN or infinite on the calibration data. The weights are damaged, "
            "or the model's dtype overflowed: load it in float32."
        )
    median = energy.median()
    if median == 0:
        return torch.ones_like(energy)
    weights = 1 / energy.clamp_min(_LEAST_ENERGY * median)
    for part in (is_heldout, ~is_heldout):
        weights[part] /= weights[part].mean()
    return weights


class TokenBatch(NamedTuple):
    """One batch of calibration tokens on its way through one FFN, float32, on the FFN's device.

    Attributes:
        inputs: Of the FFN, `(num_tokens, hidden_size)`.
        hidden: Channel activations of the dense FFN `(num_tokens, intermediate_size)`.
        targets: What the FFN should put out, without its bias, `(num_tokens, hidden_size)`.
        is_heldout: BoolTensor `(num_tokens,)`.
        weights: What each token's error counts, `(num_tokens,)`.
    """

    inputs: Tensor
    hidden: Tensor
    targets: Tensor
    is_heldout: Tensor
    weights: Tensor


class LayerData(NamedTuple):
    """What one layer is compressed on.

    Attributes:
        dense: The FFN before, float32, on the device to compute on.
        activation: Elementwise function.
        passed: From `CalibrationStream.dense_pass`.
        correction: Share c of the earlier layers' error that the targets `W_d h + c · (dense − pruned)` contain.
        is_heldout: BoolTensor over all tokens.
        token_weights: What each token's error counts, over all tokens.
    """

    dense: FFNWeights
    activation: Callable[[Tensor], Tensor]
    passed: BlockPass
    correction: float
    is_heldout: Tensor
    token_weights: Tensor

    @classmethod
    def of(
        cls,
        block: FFNBlock,
        dense: FFNWeights,
        passed: BlockPass,
        is_heldout: Tensor,
        config: OTPruningConfig,
        correction: float = 0.0,
    ) -> "LayerData":
        """Of a block, its tokens weighted as the configuration says.

        Args:
            block: The block.
            dense: Its FFN.
            passed: From `CalibrationStream.dense_pass`.
            is_heldout: BoolTensor over all tokens.
            config: What is done.
            correction: See the attribute.

        Raises:
            NumericalError: If a hidden state is NaN or infinite.
        """
        weights = torch.ones(len(is_heldout))
        if config.token_weighting == "residual":
            weights = residual_token_weights(passed.outputs_energy, is_heldout)
        return cls(dense.map(Tensor.float), block.activation, passed, correction, is_heldout, weights)

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
            mask, weights = (
                part[start : start + len(inputs)].to(device) for part in (self.is_heldout, self.token_weights)
            )
            yield TokenBatch(inputs, hidden, targets, mask, weights)
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
                sums = gram_statistics(hidden[chosen], batch.targets[chosen], batch.weights[chosen])
                parts[heldout] = parts[heldout] + sums if heldout in parts else sums
    return LayerStatistics(parts[False], parts[True])


def token_sets(data: LayerData) -> tuple[TokenSet, TokenSet]:
    """Return inputs, targets (the FFN's own bias included) and weights of the fitted and of the held-out tokens.

    They are float32 and on the CPU, whatever the FFN is on: all tokens of a layer may not fit beside a model.
    """
    parts: dict[bool, list[TokenSet]] = {False: [], True: []}
    for batch in data.batches():
        targets = batch.targets if data.dense.down_bias is None else batch.targets + data.dense.down_bias
        for heldout, sets in parts.items():
            chosen = batch.is_heldout == heldout
            sets.append(TokenSet(*(part[chosen].cpu() for part in (batch.inputs, targets, batch.weights))))
    return _joined(parts[False]), _joined(parts[True])


def _joined(sets: list[TokenSet]) -> TokenSet:
    return TokenSet(*map(torch.cat, zip(*sets)))


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
