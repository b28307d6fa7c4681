"""One feed-forward network (FFN) as tensors, channel-first."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimum_otprune.errors import NumericalError, ShapeError


class Gating(NamedTuple):
    """What a gated FFN makes of its gate and its up projection, where that is more than `act(gate) * up`.

    Attributes:
        function: A function of both, `(num_tokens, intermediate_size)` each, that returns the channel activations.
    """

    function: Callable[[Tensor, Tensor], Tensor]


Activation = Callable[[Tensor], Tensor] | Gating


class FFNWeights(NamedTuple):
    """The weights of one FFN; a channel is row j of `gate` and `up` and column j of `down`.

    Attributes:
        up: The up projection, `(intermediate_size, hidden_size)`.
        down: The down projection, `(hidden_size, intermediate_size)`.
        gate: The gate projection, `(intermediate_size, hidden_size)`, or None for an FFN that is not gated.
        up_bias: The bias of the up projection, `(intermediate_size,)`, or None.
        gate_bias: The bias of the gate projection, `(intermediate_size,)`, or None.
        down_bias: The bias of the down projection, `(hidden_size,)`, or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def intermediate_size(self) -> int:
        """The number of channels."""
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        """The width of inputs and outputs."""
        return self.down.shape[0]

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of what is there.

        Example:
            >>> [name for name, _ in FFNWeights(up=torch.ones(2, 3), down=torch.ones(3, 2)).items()]
            ['up', 'down']
        """
        return [(name, tensor) for name, tensor in zip(self._fields, self) if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "FFNWeights":
        """Return the FFN with a function applied to every tensor that it has."""
        return self._replace(**{name: function(tensor) for name, tensor in self.items()})

    def select(self, channels: Tensor) -> "FFNWeights":
        """Return the FFN with some channels only, in the given order.

        Args:
            channels: The channels to keep, LongTensor `(kept_size,)`.
        """
        return FFNWeights(
            up=self.up[channels],
            down=self.down[:, channels],
            gate=None if self.gate is None else self.gate[channels],
            up_bias=None if self.up_bias is None else self.up_bias[channels],
            gate_bias=None if self.gate_bias is None else self.gate_bias[channels],
            down_bias=self.down_bias,
        )

    def padded(self, width: int) -> "FFNWeights":
        """Add channels of zeros up to a width; the outputs of the FFN stay as they are.

        Args:
            width: The number of channels of the result, at least as many as now.

        Example:
            >>> FFNWeights(up=torch.ones(2, 3), down=torch.ones(3, 2)).padded(4).down[0]
            tensor([1., 1., 0., 0.])
        """
        missing = width - self.intermediate_size

        def longer(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else pad(bias, (0, missing))

        return FFNWeights(
            up=pad(self.up, (0, 0, 0, missing)),
            down=pad(self.down, (0, missing)),
            gate=None if self.gate is None else pad(self.gate, (0, 0, 0, missing)),
            up_bias=longer(self.up_bias),
            gate_bias=longer(self.gate_bias),
            down_bias=self.down_bias,
        )


def check_weights(weights: FFNWeights, where: str = "the FFN") -> None:
    """Raise when shapes disagree or a value is not finite.

    Args:
        weights: The weights of one FFN, channel-first.
        where: What the message calls the FFN, such as `"layer 3"`.

    Raises:
        ShapeError: If the tensors do not belong to one FFN.
        NumericalError: If a tensor holds NaN or infinity.
    """
    n, d = weights.up.shape
    shapes: tuple[tuple[int, ...], ...] = ((n, d), (d, n), (n, d), (n,), (n,), (d,))
    for name, tensor, shape in zip(FFNWeights._fields, weights, shapes):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"`{name}` of {where} has shape {tuple(tensor.shape)}, but `up` of shape {(n, d)} wants {shape}. "
                "Give weights channel-first: gate and up (intermediate_size, hidden_size), down the other way round."
            )
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(
                f"`{name}` of {where} holds {bad} values that are NaN or infinite, so no channel can be scored. "
                "The checkpoint is damaged, or its dtype overflowed: reload it, or load it in float32."
            )


def empty_channels(weights: FFNWeights) -> int:
    """Return how many channels have nothing but zeros in gate row, up row and down column, as padding leaves them.

    Example:
        >>> empty_channels(FFNWeights(up=torch.tensor([[1.0], [0.0]]), down=torch.tensor([[2.0, 0.0]])))
        1
    """
    used = weights.up.any(dim=1) | weights.down.any(dim=0)
    if weights.gate is not None:
        used = used | weights.gate.any(dim=1)
    return int((~used).sum())


def channel_activations(weights: FFNWeights, inputs: Tensor, activation: Activation) -> Tensor:
    """Return what every channel hands to the down projection: `act(W_g x) * (W_u x)`, or `act(W_u x)` without a gate.

    Args:
        weights: The weights of one FFN, channel-first.
        inputs: The inputs of the FFN, `(num_tokens, hidden_size)`.
        activation: The FFN's elementwise activation function, or what joins gate and up.

    Returns:
        The channel activations, `(num_tokens, intermediate_size)`.
    """
    up = torch.nn.functional.linear(inputs, weights.up, weights.up_bias)
    gate = None if weights.gate is None else torch.nn.functional.linear(inputs, weights.gate, weights.gate_bias)
    if isinstance(activation, Gating):
        assert gate is not None
        return activation.function(gate, up)
    return activation(up) if gate is None else activation(gate) * up


def ffn_forward(weights: FFNWeights, inputs: Tensor, activation: Activation) -> Tensor:
    """Return the FFN's outputs `(num_tokens, hidden_size)` for inputs of the same shape."""
    hidden = channel_activations(weights, inputs, activation)
    return torch.nn.functional.linear(hidden, weights.down, weights.down_bias)


def first_channels(weights: FFNWeights, kept: int) -> FFNWeights:
    """Return an FFN of a smaller width, to measure speed with: it keeps the first channels, whatever they are worth.

    Args:
        weights: The weights of one FFN, channel-first.
        kept: Number of channels of the result.
    """
    return weights.select(torch.arange(kept, device=weights.up.device))
