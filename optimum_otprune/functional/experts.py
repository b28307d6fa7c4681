"""Experts: several FFNs of which a router chooses a few for each token, and adds up what they put out by its weights.

Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
https://arxiv.org/abs/1701.06538.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_otprune.functional.ffn import Activation, FFNWeights, ffn_forward


class Routing(NamedTuple):
    """The router's choice for a batch of tokens.

    Attributes:
        experts: The index of each chosen expert, LongTensor `(num_tokens, num_chosen)`.
        weights: What the output of each is multiplied by, `(num_tokens, num_chosen)`.
    """

    experts: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that an expert gets, by index, LongTensor `(count,)`, and the weight of each, `(count,)`.

        Example:
            >>> Routing(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])).of(1)
            (tensor([0, 1]), tensor([0.2500, 0.5000]))
        """
        tokens, place = torch.where(self.experts == expert)
        return tokens, self.weights[tokens, place]


def experts_forward(experts: Iterable[FFNWeights], inputs: Tensor, routing: Routing, activation: Activation) -> Tensor:
    """Return what all experts of a block put out together, `(num_tokens, hidden_size)`.

    Args:
        experts: The weights of each expert, in order.
        inputs: The inputs, `(num_tokens, hidden_size)`.
        routing: The router's choice for them.
        activation: The experts' elementwise activation function.
    """
    outputs = torch.zeros_like(inputs)
    for expert, weights in enumerate(experts):
        tokens, shares = routing.of(expert)
        own = ffn_forward(weights, inputs[tokens], activation) * shares[:, None]
        outputs.index_add_(0, tokens, own.to(outputs.dtype))
    return outputs
