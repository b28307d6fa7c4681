"""Count the floating-point operations of a forward pass from shapes; works on the meta device."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_otprune.models.ffn_block import by_block
from optimum_otprune.models.prunable_model import PrunableModel

_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


class ForwardFlops(NamedTuple):
    """Multiplications and additions of the matrix products of a forward pass; everything else is not counted.

    Attributes:
        ffn: The operations of the FFNs' projections.
        projections: The operations of all other linear layers but the head, which belong to attention.
        scores: The operations of queries times keys and of scores times values, for the pairs of tokens that a causal
            model attends to.
        head: The operations of the head, from hidden states to logits.
    """

    ffn: int
    projections: int
    scores: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


def forward_flops(prunable: PrunableModel, batch_size: int, seqlen: int, num_logits: int = 1) -> ForwardFlops:
    """Count the operations of one forward pass.

    A product of a `(rows, a)` and an `(a, b)` matrix counts `2 · rows · a · b`. A token attends to itself and those
    before it, `(seqlen + 1) / 2` on average; windows of attention shorter than `seqlen` are not regarded.

    Args:
        prunable: The model; its weights are not read.
        batch_size: Number of sequences.
        seqlen: Number of tokens of each sequence.
        num_logits: Number of positions of each sequence that the head is applied to.
    """
    model = prunable.model
    ffn_modules = {module for block in prunable.blocks for module in block.modules}
    ffn = others = 0
    for block, share in zip(prunable.blocks, token_shares(prunable)):
        if block.expert == 0:
            ffn += round(share * sum(weight.numel() for weight, _ in block.stored))
    for module in model.base_model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            if module in ffn_modules:
                ffn += module.weight.numel()
            else:
                others += module.weight.numel()
    pairs = batch_size * seqlen * (seqlen + 1) // 2
    tokens = batch_size * seqlen
    return ForwardFlops(
        ffn=2 * tokens * ffn,
        projections=2 * tokens * others,
        scores=4 * pairs * sum(heads * size for heads, _, size in _attention(model.config)),
        head=2 * batch_size * num_logits * _entries(model.get_output_embeddings()),
    )


def token_shares(prunable: PrunableModel) -> list[float]:
    """Return the share of all tokens that each FFN gets on average: 1, or that of the experts that a router chooses.

    Args:
        prunable: The model; its weights are not read.
    """
    shares: list[float] = []
    for group in by_block(prunable.blocks):
        experts = [block for block in group if block.expert is not None]
        config = group[0].spec.fields_of(prunable.model.config)
        chosen = next((value for key in _CHOSEN_KEYS if type(value := getattr(config, key, None)) is int), 1)
        shares += [1.0 if block.expert is None else min(1.0, chosen / len(experts)) for block in group]
    return shares


def cache_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the keys and values that all layers keep for one token while a model writes."""
    return 2 * sum(groups * size for _, groups, size in _attention(model.config)) * model.dtype.itemsize


def _attention(config: PreTrainedConfig) -> Iterator[tuple[int, int, int]]:
    """Yield the number of heads, of groups of keys and values, and the size of a head, of each layer."""
    text = config.get_text_config()
    is_uneven = getattr(text, "is_heterogeneous", False)
    for layer in text.per_layer_config if is_uneven else [text] * text.num_hidden_layers:
        heads = layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        yield heads, getattr(layer, "num_key_value_heads", None) or heads, size


def _entries(head: nn.Module | None) -> int:
    if head is None:
        return 0
    assert isinstance(head.weight, Tensor)
    return head.weight.numel()
