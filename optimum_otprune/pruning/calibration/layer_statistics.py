"""The calibration data of one layer: its tokens, their weights, and their statistics."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional.ffn import Activation, FFNWeights, channel_activations
from optimum_otprune.functional.gram import GramAccumulator, GramStatistics
from optimum_otprune.functional.ratios import RescueEnergies, pooled
from optimum_otprune.functional.reconstruction import TokenSet
from optimum_otprune.functional.rescue import rescue_energies
from optimum_otprune.models.distributed import gathered, process_index, summed
from optimum_otprune.models.ffn_block import FFNBlock
from optimum_otprune.models.forward_stream import CalibrationStream, FFNTap
from optimum_otprune.models.spill import StoredTensor, TensorSpill
from optimum_otprune.pruning.calibration.block_tokens import BlockTokens, ChosenRows

_LEAST_ENERGY = 1e-2  # the least squared norm, as a share of the median


class LayerStatistics(NamedTuple):
    """Second moments of one layer, separately for tokens that are fitted and tokens that are held out.

    Attributes:
        fit: Second moments of the tokens that are fitted.
        heldout: Second moments of the tokens that are held out.
    """

    fit: GramStatistics
    heldout: GramStatistics

    @property
    def total(self) -> GramStatistics:
        """Second moments of all tokens."""
        return self.fit + self.heldout


def residual_token_weights(energy: Tensor, is_heldout: Tensor) -> tuple[Tensor, float]:
    """Weigh tokens by how much an error of the FFN disturbs the hidden state behind it: 1 / its squared norm.

    The layers behind a block normalize its output first, so the same error matters less where the hidden state is
    long; otherwise tokens with massive activations, such as the first one, would decide the whole fit. Squared norms
    below a hundredth of the median are raised to that.

    Args:
        energy: Squared norms of hidden states, `(num_tokens,)`, from `CalibrationStream.energies`.
        is_heldout: Which tokens are held out, BoolTensor `(num_tokens,)`.

    Returns:
        `(num_tokens,)` float32, of mean 1 over the fitted tokens and over the held-out ones; and what a held-out
        token's weight of 1 stands for, the mean of 1 / squared norm over them.

    Raises:
        NumericalError: If a hidden state is NaN or infinite.
    """
    if not torch.isfinite(energy).all():
        raise NumericalError(
            "the hidden states behind the block are NaN or infinite on the calibration data. The weights are damaged, "
            "or the model's dtype overflowed: load it in float32."
        )
    median = energy.median()
    if median == 0:
        return torch.ones_like(energy), 1.0
    weights = 1 / energy.clamp_min(_LEAST_ENERGY * median)
    unit = float(weights[is_heldout].mean(dtype=torch.float64))
    for part in (is_heldout, ~is_heldout):
        weights[part] /= weights[part].mean()
    return weights, unit


class TokenBatch(NamedTuple):
    """One batch of calibration tokens on its way through one FFN, float32, on the FFN's device.

    Attributes:
        inputs: The FFN's inputs, `(num_tokens, hidden_size)`.
        hidden: The channel activations of the dense FFN, `(num_tokens, intermediate_size)`.
        outputs: The dense FFN's outputs without its bias, `(num_tokens, hidden_size)`.
        correction: What is added to the outputs to get the targets, `(num_tokens, hidden_size)`, or None.
        is_heldout: Which tokens are held out, BoolTensor `(num_tokens,)`.
        weights: How much each token's error counts, `(num_tokens,)`.
    """

    inputs: Tensor
    hidden: Tensor
    outputs: Tensor
    correction: Tensor | None
    is_heldout: Tensor
    weights: Tensor

    @property
    def targets(self) -> Tensor:
        """The outputs that the FFN should have, without its bias, `(num_tokens, hidden_size)`."""
        return self.outputs if self.correction is None else self.outputs + self.correction


class LayerData(NamedTuple):
    """The calibration data of one layer that is compressed.

    Attributes:
        dense: The FFN before pruning, float32, on the device to compute on.
        activation: The FFN's elementwise activation function.
        inputs: The FFN's inputs, `(num_tokens, hidden_size)` for each batch.
        corrections: What is added to the dense FFN's own outputs to get the targets, for each batch: a share of the
            earlier layers' error; None where nothing is corrected, or `statistics` are all that is asked for.
        is_heldout: Which of all tokens are held out, BoolTensor.
        token_weights: How much the error of each of all tokens counts.
        weight_unit: What a held-out token's weight of 1 stands for: 1 / the squared norm of a hidden state, so that
            energies of layers are shares of their hidden states and can be added up; 1 where all tokens count alike.
        statistics: Second moments of the dense FFN's channels and of the targets.
    """

    dense: FFNWeights
    activation: Activation
    inputs: Sequence[StoredTensor | ChosenRows]
    corrections: Sequence[StoredTensor] | None
    is_heldout: Tensor
    token_weights: Tensor
    weight_unit: float
    statistics: LayerStatistics

    @classmethod
    def of(
        cls,
        block: FFNBlock,
        dense: FFNWeights,
        stream: CalibrationStream,
        is_heldout: Tensor,
        config: OTPruningConfig,
        correction: float = 0.0,
    ) -> "LayerData":
        """Run a block, its FFN still dense, and measure it.

        Args:
            block: The block to measure.
            dense: The weights of its FFN.
            stream: The calibration samples' hidden states before the block.
            is_heldout: Which of all tokens are held out, BoolTensor.
            config: The configuration; it decides how tokens are weighted and whether targets are read again.
            correction: Share c of the earlier layers' error that the targets `W_d h + c · (dense − pruned)` contain,
                divided by what the block adds of its FFN's output.

        Raises:
            NumericalError: If a hidden state or an activation is NaN or infinite.
        """
        exact, activation = dense.map(Tensor.float), block.activation
        token_weights, weight_unit = torch.ones(len(is_heldout)), 1.0
        if config.token_weighting == "residual":
            token_weights, weight_unit = weights_among_all(stream.energies(block), is_heldout)
        else:
            stream.follow_dense(block)
        sums = _accumulators(exact)
        keeps_corrections = bool(correction) and _reads_targets_again(config)
        inputs, corrections = [], []
        start = 0
        for tap in stream.taps(block):
            hidden, targets = _exact_activations(tap, exact, activation)
            if correction and tap.missing is not None:
                missing = correction * tap.missing
                targets = targets + missing
                if keeps_corrections:
                    corrections.append(stream.spill.put(missing))
            inputs.append(tap.stored_inputs)
            part = slice(start, start + len(hidden))
            add_tokens(sums, hidden, targets, is_heldout[part], token_weights[part])
            start += len(hidden)
        statistics = all_statistics(sums)
        kept = corrections if keeps_corrections else None
        return cls(exact, activation, inputs, kept, is_heldout, token_weights, weight_unit, statistics)

    @classmethod
    def of_one(
        cls,
        block: FFNBlock,
        dense: FFNWeights,
        tokens: BlockTokens,
        is_heldout: Tensor,
        config: OTPruningConfig,
    ) -> "LayerData":
        """Measure one FFN of a block with several on the tokens that it gets.

        Args:
            block: The FFN.
            dense: Its weights.
            tokens: The calibration tokens of the block.
            is_heldout: Which of all tokens are held out, BoolTensor.
            config: The configuration; it decides how tokens are weighted, beside the router's weights.

        Raises:
            NumericalError: If a hidden state or an activation is NaN or infinite.
        """
        exact, own = dense.map(Tensor.float), tokens.own(block, is_heldout)
        is_heldout = is_heldout[own.chosen]
        is_residual = config.token_weighting == "residual"
        energies = tokens.energies[own.chosen] if is_residual else torch.ones(len(own.chosen))
        weights, unit = weights_among_all(energies / own.weights.square(), is_heldout)
        nothing = LayerStatistics(*(part.statistics() for part in _accumulators(exact).values()))
        data = cls(exact, block.activation, own.inputs, None, is_heldout, weights, unit, nothing)
        return data._replace(statistics=remeasured_statistics(data, exact))

    def batches(self, only_heldout: bool = False) -> Iterator[TokenBatch]:
        """Yield the calibration tokens once more, a batch at a time.

        Args:
            only_heldout: Leave out the others.
        """
        start, device = 0, self.dense.down.device
        for index, stored in enumerate(self.inputs):
            inputs = stored.load()
            part = slice(start, start + len(inputs))
            start += len(inputs)
            mask, weights = self.is_heldout[part], self.token_weights[part]
            correction = None if self.corrections is None else self.corrections[index].load()
            if only_heldout:
                if not mask.any():
                    continue
                inputs, weights = inputs[mask], weights[mask]
                correction = None if correction is None else correction[mask]
                mask = mask[mask]
            inputs = inputs.to(device).float()
            hidden = channel_activations(self.dense, inputs, self.activation)
            outputs = hidden @ self.dense.down.T
            correction = None if correction is None else correction.to(device)
            yield TokenBatch(inputs, hidden, outputs, correction, mask.to(device), weights.to(device))


def _reads_targets_again(config: OTPruningConfig) -> bool:
    """Return whether targets are needed after the first statistics."""
    return bool(config.reconstruction_steps) or bool({"gate", "up"} & set(config.fuse or ()))


def _exact_activations(tap: FFNTap, dense: FFNWeights, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return activations and outputs without bias in float32, computed anew if the module's are coarser."""
    if tap.hidden.dtype != torch.float32:
        hidden = channel_activations(dense, tap.inputs.float(), activation)
        return hidden, hidden @ dense.down.T
    return tap.hidden, tap.outputs if dense.down_bias is None else tap.outputs - dense.down_bias


def _sides(is_heldout: Tensor) -> Iterator[tuple[bool, Tensor | slice]]:
    """Return the fitted and the held-out tokens of a batch, by index; a slice for all of them."""
    if is_heldout.all() or not is_heldout.any():
        yield bool(is_heldout.any()), slice(None)
        return
    yield False, ~is_heldout
    yield True, is_heldout


def weights_among_all(energy: Tensor, is_heldout: Tensor) -> tuple[Tensor, float]:
    """Return the weights of this process's tokens among those of all processes, and their unit."""
    parts = gathered(energy)
    weights, unit = residual_token_weights(torch.cat(parts), torch.cat(gathered(is_heldout)))
    return weights.split([len(part) for part in parts])[process_index()], unit


def _accumulators(weights: FFNWeights) -> dict[bool, GramAccumulator]:
    """Return an accumulator of an FFN's channels for fitted tokens and one for held-out tokens."""
    n, d, like = weights.intermediate_size, weights.hidden_size, weights.up
    return {heldout: GramAccumulator(n, d, like.dtype, like.device) for heldout in (False, True)}


def add_tokens(
    sums: Mapping[bool, GramAccumulator], hidden: Tensor, targets: Tensor, is_heldout: Tensor, weights: Tensor
) -> None:
    """Add a batch of tokens to the second moments of fitted tokens, or to those of held-out ones.

    Args:
        sums: The second moments so far, by whether tokens are held out.
        hidden: The channel activations, `(num_tokens, num_channels)`, on the device of the sums.
        targets: The targets, `(num_tokens, hidden_size)`, on the same device.
        is_heldout: Which tokens are held out, BoolTensor `(num_tokens,)`, on any device.
        weights: What each token counts, `(num_tokens,)`, on the device of `is_heldout`.
    """
    for heldout, chosen in _sides(is_heldout):
        counts = weights[chosen].to(hidden.device)
        own = chosen if isinstance(chosen, slice) else chosen.to(hidden.device)
        sums[heldout].add(hidden[own], targets[own], counts)


def all_statistics(sums: dict[bool, GramAccumulator]) -> LayerStatistics:
    """Return the statistics of the tokens of all processes."""
    statistics = LayerStatistics(*(summed(sums[heldout].statistics()) for heldout in (False, True)))
    if not all(torch.isfinite(part.gram).all() and torch.isfinite(part.cross).all() for part in statistics):
        raise NumericalError(
            "the channel activations are NaN or infinite on the calibration data. The weights are damaged, or the "
            "model's dtype overflowed: load it in float32."
        )
    return statistics


def remeasured_statistics(data: LayerData, compressed: FFNWeights) -> LayerStatistics:
    """Sum second moments of the channels of another FFN and of the targets.

    Args:
        data: What the layer is compressed on.
        compressed: An FFN whose channels are measured in place of the dense one's; the targets stay.

    Raises:
        NumericalError: If an activation is NaN or infinite.
    """
    compressed = compressed.map(Tensor.float)
    sums = _accumulators(compressed)
    for batch in data.batches():
        hidden = channel_activations(compressed, batch.inputs, data.activation)
        add_tokens(sums, hidden, batch.targets, batch.is_heldout, batch.weights)
    return all_statistics(sums)


def token_sets(data: LayerData, spill: TensorSpill) -> tuple[TokenSet, TokenSet]:
    """Return inputs, targets (the FFN's own bias included) and weights of the fitted and of the held-out tokens.

    They are float32 and on the CPU, or in files, whatever the FFN is on: all tokens of a layer may not fit beside a
    model.
    """
    d, counts = data.dense.hidden_size, {False: int((~data.is_heldout).sum()), True: int(data.is_heldout.sum())}
    sets = {
        heldout: TokenSet(*(spill.empty((count, *rest), torch.float32) for rest in ((d,), (d,), ())))
        for heldout, count in counts.items()
    }
    filled = {False: 0, True: 0}
    for batch in data.batches():
        targets = batch.targets if data.dense.down_bias is None else batch.targets + data.dense.down_bias
        for heldout, chosen in _sides(batch.is_heldout):
            parts = [part[chosen] for part in (batch.inputs, targets, batch.weights)]
            rows = slice(filled[heldout], filled[heldout] + len(parts[0]))
            for whole, part in zip(sets[heldout], parts):
                whole[rows] = part.cpu()
            filled[heldout] = rows.stop
    return sets[False], sets[True]


def measure_rescue(data: LayerData, compressed: Sequence[FFNWeights], kept_channels: Tensor) -> list[RescueEnergies]:
    """Compare compressed FFNs with the dense one on the held-out tokens, weighed as the fit weighs tokens.

    Args:
        data: What the layer was compressed on.
        compressed: The compressed FFNs, all with the same kept channels.
        kept_channels: Indices of the kept channels, LongTensor `(kept_size,)`.

    Returns:
        One entry for each of `compressed`.
    """
    dense = data.dense
    exact = [weights.map(Tensor.float) for weights in compressed]
    only_selected = [_is_selection(weights, dense.select(kept_channels)) for weights in exact]
    energies = []
    for batch in data.batches(only_heldout=True):
        outputs = batch.outputs if dense.down_bias is None else batch.outputs + dense.down_bias
        compressed_sides: list[tuple[Tensor, Tensor | None]] = []
        for weights, is_selected in zip(exact, only_selected):
            own = None if is_selected else channel_activations(weights, batch.inputs, data.activation)
            hidden = batch.hidden[:, kept_channels] if own is None else own
            compressed_sides.append((torch.nn.functional.linear(hidden, weights.down, weights.down_bias), own))
        energies.append(
            rescue_energies(outputs, batch.hidden, compressed_sides, dense.down, kept_channels, batch.weights)
        )
    found = zip(*energies) if energies else [()] * len(exact)
    return [summed(pooled(part)).scaled(data.weight_unit) for part in found]


def _is_selection(weights: FFNWeights, selected: FFNWeights) -> bool:
    """Return whether the channels are those of the dense FFN, unchanged."""
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for name, one, other in zip(FFNWeights._fields, weights, selected)
        if not name.startswith("down")
    )
