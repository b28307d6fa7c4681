"""What recovery after pruning would take."""

import dataclasses

import torch
from transformers import PreTrainedModel

from optimum_otprune.models.flops import forward_flops
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.perplexity import windows_together
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import matmul_rate
from optimum_otprune.pruning.dry_run.plan import MemoryUse, PruningPlan
from optimum_otprune.pruning.recovery.samples import heldout_tokens
from optimum_otprune.pruning.recovery.schedule import CHECKS
from optimum_otprune.pruning.size_target import channel_cost

_TRAINED_BYTES = 16  # of each trained weight: its float32 copy, the gradient, and two moments of Adam
_KEPT_BYTES = 4  # of each trained weight: the best so far, in main memory
_LOGITS = 4  # tensors of float32 logits at a time: of both models, their gradient and log-probabilities
_BACKWARD = 3  # forward passes that one forward and backward pass cost
_PARTS = 2  # kinds of text that are held out: given and written
_MEASURE_SECONDS = 0.12


def with_recovery(plan: PruningPlan, model: PreTrainedModel, num_tokens: int, batch_size: int) -> PruningPlan:
    """Return a plan of pruning that is followed by recovery of the FFNs' weights; memory and time are rough.

    Args:
        plan: The plan of pruning.
        model: The dense model; its weights are not read.
        num_tokens: Number of tokens to train on.
        batch_size: The most samples of a forward pass.
    """
    prunable, seqlen, device = PrunableModel.of(model), plan.samples.seqlen, plan.computing_device
    costs = [channel_cost(block, "parameters") for block in prunable.blocks]
    trained = sum(width * cost for width, cost in zip(plan.widths_after, costs))
    vocab_size = vocabulary_size(model)
    together = windows_together(batch_size, seqlen, vocab_size, 4)
    memory = (
        *plan.memory,
        MemoryUse(device, "recovery: the dense model again", plan.bytes_before),
        MemoryUse(device, "recovery: weights, gradients and moments", _TRAINED_BYTES * trained),
        MemoryUse(device, "recovery: logits", _LOGITS * 4 * together * seqlen * vocab_size),
        MemoryUse("cpu", "recovery: the best weights", _KEPT_BYTES * trained),
    )
    if not plan.seconds:
        return dataclasses.replace(plan, memory=memory)
    dense = forward_flops(prunable, 1, seqlen, seqlen).total / seqlen
    pruned = dense * plan.parameters_after / plan.parameters_before
    heldout = (CHECKS + 1) * _PARTS * heldout_tokens(num_tokens)
    flops = num_tokens * (2 * dense + _BACKWARD * pruned) + heldout * (dense + pruned)  # written tokens are read once
    rows, columns = min(together * seqlen, 2048), plan.widths_before[0]
    rate = matmul_rate(torch.device(device), model.dtype, (rows, plan.hidden_size, columns), _MEASURE_SECONDS)
    return dataclasses.replace(plan, memory=memory, seconds={**plan.seconds, "recovery": flops / rate})
