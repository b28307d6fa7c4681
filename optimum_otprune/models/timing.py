"""Measure how long a forward pass takes, and how fast a device multiplies matrices."""

import statistics
import time
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from optimum_otprune.models.inputs import input_device, model_inputs

_WARM_UP = 2  # passes that are not counted: the first ones choose kernels and allocate memory
_REPEATS = 9  # an odd number, so that the median is one pass and disturbed ones do not count


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, shape: tuple[int, int]) -> float:
    """Return the median time of a forward pass on the model's device, in seconds.

    Args:
        model: The model, which is put into evaluation mode.
        shape: The shape `(batch_size, seqlen)` of the token ids; which ids does not matter.
    """
    model.eval()
    ids = torch.zeros(shape, dtype=torch.long, device=input_device(model))
    devices = devices_of(model)
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        wait_for_devices(devices)
        start = time.perf_counter()
        model(**model_inputs(model, ids), use_cache=False)
        wait_for_devices(devices)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    """Return how many floating-point operations per second a matrix product reaches at best.

    Args:
        device: The device to measure on.
        dtype: The dtype of both matrices.
        shape: The sizes `(rows, inner, columns)` of a product of a `(rows, inner)` and an `(inner, columns)` matrix.
        seconds: How long to measure, in seconds.
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
    """Return when accelerators have finished their work, which they do while Python goes on.

    Args:
        devices: The devices to wait for; those that are no accelerators have nothing left to do.
    """
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
