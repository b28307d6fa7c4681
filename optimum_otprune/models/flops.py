"""Count the floating-point operations of a forward pass from shapes; works on the meta device."""

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_otprune.models.prunable_model import PrunableModel


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
    ffn_modules = {module for block in prunable.blocks for module in block.projections.values()}
    ffn = others = 0
    for module in model.base_model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            if module in ffn_modules:
                ffn += module.weight.numel()
            else:
                others += module.weight.numel()
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = batch_size * seqlen * (seqlen + 1) // 2
    tokens = batch_size * seqlen
    return ForwardFlops(
        ffn=2 * tokens * ffn,
        projections=2 * tokens * others,
        scores=4 * pairs * heads * head_size * len(prunable.blocks),
        head=2 * batch_size * num_logits * _entries(model.get_output_embeddings()),
    )


def cache_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the keys and values that all layers keep for one token while a model writes."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * groups * size * model.dtype.itemsize


def _entries(head: nn.Module | None) -> int:
    if head is None:
        return 0
    assert isinstance(head.weight, Tensor)
    return head.weight.numel()
