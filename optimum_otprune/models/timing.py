"""How long a forward pass takes, and the widest FFNs with which it takes no longer than asked."""

import statistics
import time
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from optimum_otprune.models.block_runner import input_device

_WARM_UP = 2
_REPEATS = 9


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, shape: tuple[int, int]) -> float:
    """Return the median time of a forward pass on the model's device, in seconds.

    Args:
        model: Put into evaluation mode.
        shape: `(batch_size, seqlen)` of the token ids; which ids does not matter.
    """
    model.eval()
    ids = torch.zeros(shape, dtype=torch.long, device=input_device(model))
    devices = devices_of(model)
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        wait_for_devices(devices)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        wait_for_devices(devices)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    """Return how many floating-point operations a second a matrix product reaches, at best.

    Args:
        device: To measure on.
        dtype: Of the matrices.
        shape: `(rows, inner, columns)`: a `(rows, inner)` by an `(inner, columns)` matrix.
        seconds: To measure for.
    """
    rows, inner, columns = shape
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)
    least, end = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < end:
        wait_for_devices([device])
        start = time.perf_counter()
        left @ right
        wait_for_devices([device])
        least = min(least, time.perf_counter() - start)
    return 2 * rows * inner * columns / least


def devices_of(model: PreTrainedModel) -> set[torch.device]:
    """Return every device that a model computes on, or has weights on."""
    return {input_device(model), *(parameter.device for parameter in model.parameters())}


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """Return when accelerators have finished what was asked of them: they work on while Python goes on.

    Args:
        devices: Others than accelerators are done already.
    """
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
