"""What recovery would take, after pruning or of a model that is pruned already."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.flops import forward_flops, token_shares
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.low_rank import update_parameters
from optimum_otprune.models.perplexity import windows_together
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import matmul_rate
from optimum_otprune.models.training import trained_weights
from optimum_otprune.pruning.calibration.data import ExpectedSamples
from optimum_otprune.pruning.dry_run.cost_model import IMPORT_BYTES
from optimum_otprune.pruning.dry_run.estimate import Skeleton, is_here, weights_by_device
from optimum_otprune.pruning.dry_run.plan import MemoryUse, PruningPlan, memory_lines, size_text, time_line
from optimum_otprune.pruning.recovery.dense_logits import logits_bytes
from optimum_otprune.pruning.recovery.samples import Plan, heldout_tokens, plan_samples
from optimum_otprune.pruning.recovery.schedule import CHECKS, Schedule

_TRAINED_BYTES = 16  # of each trained weight: its float32 copy, the gradient, and two moments of Adam
_KEPT_BYTES = 4  # of each trained weight: the best so far, in main memory
_LOGITS = 4  # tensors of float32 logits at a time: of both models, their gradient and log-probabilities
_BACKWARD = 3  # forward passes that one forward and backward pass cost
_PARTS = 2  # kinds of text that are held out: given and written
_MEASURE_SECONDS = 0.12
_MOST_ROWS = 2048  # of the matrices that are timed
_SNAPSHOTS = 2  # one takes the place of another


def with_recovery(plan: PruningPlan, model: PreTrainedModel, num_tokens: int, batch_size: int) -> PruningPlan:
    """Return a plan of pruning that is followed by recovery of all weights; memory and time are rough.

    Args:
        plan: The plan of pruning.
        model: The dense model; its weights are not read.
        num_tokens: Number of tokens to train on.
        batch_size: The most samples of a forward pass.
    """
    prunable, seqlen, device = PrunableModel.of(model), plan.samples.seqlen, plan.computing_device
    trained, vocab_size = plan.parameters_after, vocabulary_size(model)
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
    rows, columns = min(together * seqlen, _MOST_ROWS), plan.widths_before[0]
    rate = matmul_rate(torch.device(device), model.dtype, (rows, plan.hidden_size, columns), _MEASURE_SECONDS)
    return dataclasses.replace(plan, memory=memory, seconds={**plan.seconds, "recovery": flops / rate})


@dataclasses.dataclass(frozen=True)
class RecoveryPlan:
    """The expected samples, steps, memory and time of `recover`; `str()` of it is a text for people.

    Attributes:
        trained: What is trained, and the number of its weights.
        samples: The number of samples of each kind.
        source: Where the given samples come from.
        is_exact: Whether their number was read, rather than concluded from the configuration.
        schedule: The steps.
        stages: Expected memory of each stage, of which one is over before the next begins.
        disk: Bytes of files by purpose.
        device: The device that does most of the work.
        seconds: Expected time by stage; None where the device is not on this machine.
    """

    trained: tuple[str, int]
    samples: Plan
    source: str
    is_exact: bool
    schedule: Schedule
    stages: Mapping[str, Sequence[MemoryUse]]
    disk: Mapping[str, int]
    device: str
    seconds: Mapping[str, float] | None

    def __str__(self) -> str:
        schedule, samples = self.schedule, self.samples
        most = "" if self.is_exact else "at most "
        given = f"{most}{samples.given:,} read from {self.source}, " if samples.given else ""
        disk = ", ".join(f"{purpose} {size_text(size)}" for purpose, size in self.disk.items())
        rows = [
            ("Trained", f"{self.trained[0]}, {self.trained[1]:,} weights"),
            ("Samples", f"{given}{samples.written:,} that the dense model writes, of {schedule.seqlen:,} tokens"),
            ("Held out", f"{samples.heldout:,} more of each kind, measured {CHECKS + 1} times"),
            (
                "Steps",
                f"{schedule.steps:,} of {schedule.tokens:,} tokens, {schedule.steps * schedule.tokens:,} in all; "
                f"learning rate {schedule.rate:.2g}",
            ),
            *(
                (f"Memory, {stage}" if len(self.stages) > 1 else "Memory", line)
                for stage, memory in self.stages.items()
                for line in memory_lines(memory)
            ),
            *([("Disk", disk)] if disk else []),
            ("Time", time_line(self.seconds, self.device)),
        ]
        width = max(len(name) for name, _ in rows)
        lines = ["RECOVERY PLAN (no weights were read, nothing is written; memory and time are rough)"]
        return "\n".join([*lines, *(f"{name:<{width}} {text}" for name, text in rows)])


class Files(NamedTuple):
    """What recovery would keep in files.

    Attributes:
        state: Whether an interrupted run can go on.
        logits: Whether the dense model's largest logits are kept.
    """

    state: bool
    logits: bool


def plan_recovery(
    pruned: Skeleton, dense: Skeleton, data: ExpectedSamples, settings: RecoverySettings, files: Files
) -> RecoveryPlan:
    """Return what recovery of a pruned model would take; memory and time are rough.

    Args:
        pruned: The pruned model.
        dense: The dense model.
        data: The given samples.
        settings: The options.
        files: What would be kept in files.

    Raises:
        CalibrationDataError: If there are too few samples.
        ConfigurationError: If a device map cannot be followed.
    """
    model = pruned.model
    schedule = Schedule.of(model, data.seqlen, settings)
    samples = plan_samples(data.num_samples, data.seqlen, settings.num_tokens, settings.written_per_sample)
    weights = trained_weights(model, settings.trained)
    is_low_rank = settings.trained == "lora"
    trained = update_parameters(model) if is_low_rank else sum(part.numel() for part in weights.values())
    device = next((name for name in weights_by_device(model, pruned.places) if name not in ("cpu", "disk")), "cpu")
    training = [
        *(
            MemoryUse(where, "the pruned model", size)
            for where, size in weights_by_device(model, pruned.places).items()
        ),
        MemoryUse(device, "weights, gradients and moments", _TRAINED_BYTES * trained),
        MemoryUse(device, "activations", _activations(model, schedule, settings.gradient_checkpointing)),
        MemoryUse(device, "logits", _LOGITS * 4 * schedule.together * data.seqlen * vocabulary_size(model)),
        MemoryUse("cpu", "the best weights", _KEPT_BYTES * trained),
        MemoryUse("cpu", "Python and libraries", IMPORT_BYTES),
    ]
    of_dense = weights_by_device(dense.model, dense.places).items()
    asking = [MemoryUse(where, "the dense model", size) for where, size in of_dense]
    texts = samples.given + samples.written + samples.heldout * (bool(samples.given) + bool(samples.written))
    kept = logits_bytes(texts * data.seqlen, settings.logits_per_token) if files.logits else 0
    disk = {"the dense model's logits": kept, "the state": _SNAPSHOTS * _TRAINED_BYTES * trained if files.state else 0}
    writing = [*asking, MemoryUse("cpu", "Python and libraries", IMPORT_BYTES)]
    return RecoveryPlan(
        trained=(settings.trained, trained),
        samples=samples,
        source=data.source,
        is_exact=data.is_exact,
        schedule=schedule,
        stages={"writing logits": writing, "training": training} if files.logits else {"": [*asking, *training]},
        disk={purpose: size for purpose, size in disk.items() if size},
        device=device,
        seconds=_seconds((pruned, dense), schedule, samples, device, files.logits),
    )


def _activations(model: PreTrainedModel, schedule: Schedule, is_recomputed: bool) -> int:
    """Return the bytes of what the backward pass needs of the forward pass."""
    prunable, hidden = PrunableModel.of(model), model.config.get_text_config().hidden_size
    tokens = 4 * schedule.together * schedule.seqlen
    matrices = len(prunable.spec.slots) + 1
    inside = [8.0 * tokens * hidden] * len(prunable.firsts)
    for block, share in zip(prunable.blocks, token_shares(prunable)):
        inside[block.block] += share * tokens * matrices * block.intermediate_size
    return round(max(inside) + len(inside) * tokens * hidden if is_recomputed else sum(inside))


def _seconds(
    models: tuple[Skeleton, Skeleton], schedule: Schedule, samples: Plan, device: str, keeps_logits: bool
) -> Mapping[str, float] | None:
    if not is_here(torch.device(device)):
        return None
    seqlen, block = schedule.seqlen, ffn_blocks(models[1].model)[0]
    pruned, dense = (forward_flops(PrunableModel.of(one.model), 1, seqlen, seqlen).total for one in models)
    hidden = models[0].model.config.get_text_config().hidden_size
    shape = (min(schedule.together * seqlen, _MOST_ROWS), hidden, block.intermediate_size)
    rate = matmul_rate(torch.device(device), models[0].model.dtype, shape, _MEASURE_SECONDS)
    kinds = bool(samples.given) + bool(samples.written)
    written = samples.written + (samples.heldout if samples.written else 0)
    times, checks = schedule.steps * schedule.size, (CHECKS + 1) * samples.heldout * kinds
    once = samples.given + samples.written + samples.heldout * kinds
    flops = {
        "writing samples": written * dense,
        "asking the dense model": (once if keeps_logits else times + checks) * dense,
        "training": times * _BACKWARD * pruned,
        "held-out samples": checks * pruned,
    }
    return {stage: count / rate for stage, count in flops.items() if count}
