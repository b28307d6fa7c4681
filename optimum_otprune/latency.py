"""How long a forward pass takes, and the widest FFNs with which it takes no longer than asked."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from optimum_otprune.architectures.block import FFNBlock
from optimum_otprune.architectures.changes import unchanged
from optimum_otprune.block_runner import input_device
from optimum_otprune.errors import ConfigurationError
from optimum_otprune.functional.ffn import FFNWeights

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


def width_for_latency(
    model: PreTrainedModel,
    blocks: list[FFNBlock],
    target_latency: float,
    multiple_of: int,
    measure: Callable[[PreTrainedModel], float],
) -> int:
    """Return the largest multiple of channels with which a forward pass takes at most the target.

    Found by bisection over multiples: for speed only the width matters, so channels are just cut off, and put back
    after each measurement. Assumes that more channels never make a model faster.

    Args:
        model: The dense model; the same afterwards.
        blocks: All its FFN blocks, of one width.
        target_latency: In seconds.
        multiple_of: What the result is a multiple of.
        measure: Seconds of a model as it is.

    Raises:
        ConfigurationError: If the dense model is as fast already, or no width is fast enough.
    """
    width = blocks[0].intermediate_size

    def seconds(kept: int) -> float:
        with unchanged(model, blocks):
            for block in blocks if kept < width else []:
                block.install(first_channels(block.read(), kept))
            return measure(model)

    dense = seconds(width)
    if dense <= target_latency:
        raise ConfigurationError(
            f"`target_latency={target_latency!r}` asks for no pruning: the model takes {dense:.4g} s now. Give a "
            "shorter time."
        )
    fastest = seconds(multiple_of)
    if fastest > target_latency:
        raise ConfigurationError(
            f"`target_latency={target_latency!r}` cannot be met: with only {multiple_of} of {width} channels left in "
            f"every FFN a forward pass still takes {fastest:.4g} s. Give a longer time."
        )
    fits, too_slow = 1, -(-width // multiple_of)  # in multiples
    while too_slow - fits > 1:
        middle = (fits + too_slow) // 2
        if seconds(middle * multiple_of) <= target_latency:
            fits = middle
        else:
            too_slow = middle
    return fits * multiple_of


def first_channels(weights: FFNWeights, kept: int) -> FFNWeights:
    """Return an FFN of a smaller width, for speed only: its channels are just cut off.

    Args:
        weights: The FFN.
        kept: Channels of the result.
    """
    return weights.select(torch.arange(kept, device=weights.up.device))
