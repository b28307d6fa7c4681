"""Whole experts removed by REAP's criterion (Lasby et al., 2025, https://arxiv.org/abs/2510.13999): a baseline.

An expert's score is the mean, over the tokens routed to it, of the router's weight times the norm of the expert's
output; the experts with the lowest scores of each layer go, with their rows of the router, and the others stay as they
are. https://github.com/CerebrasResearch/reap has the authors' code, where the same sum without the division, that is
the score times the routed frequency, is called `weighted_ean_sum`. Written anew; nothing is copied.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


class SparseLayer(NamedTuple):
    """The routed experts of one layer, with stacked weights `(num_experts, …)`, and the router beside them."""

    experts: nn.Module
    router: nn.Module

    @property
    def num_experts(self) -> int:
        return self.experts.down_proj.shape[0]


class Routed(NamedTuple):
    """What calibration tells of the experts of one layer, each `(num_experts,)` float64.

    Attributes:
        total: Sum over the tokens routed to it of the router's weight times the norm of the expert's output.
        tokens: Number of those tokens.
    """

    total: Tensor
    tokens: Tensor

    def score(self, by_frequency: bool) -> Tensor:
        """REAP's mean over the routed tokens, or that times their number; 0 for an expert that saw none."""
        return self.total if by_frequency else self.total / self.tokens.clamp(min=1)


def sparse_layers(model: PreTrainedModel) -> list[SparseLayer]:
    """The layers with routed experts, in order; empty for a dense model."""
    return list(_found(model))


def _found(model: PreTrainedModel) -> Iterator[SparseLayer]:
    for block in model.modules():
        for experts in block.children():
            down = getattr(experts, "down_proj", None)
            if isinstance(down, nn.Parameter) and down.ndim == 3:
                beside = [child for child in block.children() if _rows(child) == len(down)]
                if len(beside) != 1:
                    raise SystemExit(f"{type(block).__name__} has no router beside its experts that could be cut.")
                yield SparseLayer(experts, beside[0])


def _rows(module: nn.Module) -> int | None:
    """Rows of a module's own weight, if it is a matrix."""
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.ndim == 2 else None


@torch.no_grad()
def routed(model: PreTrainedModel, samples: Tensor, batch_size: int = 8) -> list[Routed]:
    """Run calibration samples, LongTensor `(num_samples, seqlen)`, through the model and score every expert."""
    layers = sparse_layers(model)
    empty = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
    found = [Routed(zeros.clone(), zeros.clone()) for zeros in empty]
    hooks = [layer.experts.register_forward_hook(_counting(into)) for layer, into in zip(layers, found)]
    model.eval()
    try:
        for batch in samples.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _counting(into: Routed):
    """A hook on an experts module; the expert's own output is what the module gives for that expert with weight 1."""

    def hook(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        hidden, chosen, weights = inputs  # (tokens, hidden_size), (tokens, top_k), (tokens, top_k)
        for expert in range(len(into.total)):
            tokens, place = torch.where(chosen == expert)
            if len(tokens):
                alone = torch.full((len(tokens), 1), expert, dtype=chosen.dtype, device=chosen.device)
                output = experts.forward(hidden[tokens], alone, weights.new_ones(len(tokens), 1))
                norms = output.double().norm(dim=-1)  # (routed tokens,)
                into.total[expert] += (weights[tokens, place].double() * norms).sum().cpu()
                into.tokens[expert] += len(tokens)

    return hook


def remove_experts(
    model: PreTrainedModel, samples: Tensor, ratio: float, by_frequency: bool = False
) -> list[list[int]]:
    """Remove a share of the routed experts of every layer in place.

    Args:
        model: The dense model.
        samples: Calibration samples, LongTensor `(num_samples, seqlen)`.
        ratio: The share of the experts that goes.
        by_frequency: Whether the score is multiplied by the number of routed tokens.

    Returns:
        The experts that stay, by layer.
    """
    layers, seen = sparse_layers(model), routed(model, samples)
    if not layers:
        raise SystemExit(f"{type(model).__name__} has no routed experts with stacked weights.")
    count = layers[0].num_experts
    kept = count - round(count * ratio)
    config = model.config.get_text_config()
    if kept < config.num_experts_per_tok:
        raise SystemExit(f"{kept} of {count} experts would stay, but each token goes to {config.num_experts_per_tok}.")
    if (getattr(config, "n_group", None) or 1) > 1:
        raise SystemExit("The router chooses among groups of experts; whole experts cannot be removed from them.")
    staying = [_cut(layer, scores.score(by_frequency).topk(kept).indices) for layer, scores in zip(layers, seen)]
    for owner in (config, *model.modules()):
        for key in _COUNT_KEYS:
            if isinstance(getattr(owner, key, None), int):
                setattr(owner, key, kept)
    return staying


def _cut(layer: SparseLayer, chosen: Tensor) -> list[int]:
    """Keep some experts of a layer: of whatever experts and router hold, the rows of these."""
    kept, count = chosen.sort().values, layer.num_experts
    for module in layer:
        for name, weight in list(module.named_parameters(recurse=False)):
            if len(weight) == count:
                setattr(module, name, nn.Parameter(weight[kept].detach().clone(), weight.requires_grad))
        for name, values in list(module.named_buffers(recurse=False)):
            if len(values) == count:
                setattr(module, name, values[kept].clone())
    return kept.tolist()
