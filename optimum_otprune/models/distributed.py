"""Several processes, each with the whole model and a part of the calibration samples. A door to accelerate.

Started by `accelerate launch` (or torchrun). What is summed over tokens is summed over processes too; everything else
each process does for itself, and the first one's result counts. In a run of one process nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed
from transformers import PreTrainedModel

from optimum_otprune.errors import CalibrationDataError, ConfigurationError, ProcessError
from optimum_otprune.models.devices import is_spread
from optimum_otprune.models.spill import mapped

Value = TypeVar("Value")

_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def num_processes() -> int:
    """Return the number of processes of this run."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def process_index() -> int:
    """Return the number of this process, from 0."""
    if num_processes() == 1:
        return 0
    _state()
    return distributed.get_rank()


def is_main_process() -> bool:
    """Return whether this process is the one that writes files and messages."""
    return process_index() == 0


def own_device() -> torch.device | None:
    """Return the accelerator of this process; None in a run of one process, or without accelerators."""
    if num_processes() == 1 or _state().device.type == "cpu":
        return None
    return _state().device


def check_launch() -> None:
    """Raise an error if the processes were started in a way that cuts the weights themselves into pieces.

    Raises:
        ConfigurationError: If they were; the message says what to use instead.
    """
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigurationError(
                f"{engine} cuts every weight matrix into pieces, of which none can be pruned alone. Use one process "
                "with device_map='auto' for a model larger than a device, or plain `accelerate launch` (torchrun "
                "without GPUs) for several processes with a whole model each."
            )


def check_model(model: PreTrainedModel) -> None:
    """Raise an error if several processes were started for a model that is spread or offloaded.

    Raises:
        ConfigurationError: If they were; the message says what to use instead.
    """
    check_launch()
    if num_processes() > 1 and is_spread(model):
        raise ConfigurationError(
            f"The model is spread over devices or offloaded, but {num_processes()} processes were started: each needs "
            "a whole model on one device. Use one process with device_map='auto', or several without a device map."
        )


def check_single(what: str, instead: str) -> None:
    """Raise an error if several processes run a call that needs a single one.

    Args:
        what: The name of the call, as a user writes it.
        instead: A sentence that says what to do instead.

    Raises:
        ConfigurationError: If there are several processes.
    """
    if num_processes() > 1:
        raise ConfigurationError(f"{what} works in one process, but {num_processes()} were started. {instead}")


def own_samples(num_samples: int, batch_size: int) -> slice:
    """Return the samples that this process works on: whole batches, in order, about as many for each process.

    Args:
        num_samples: Number of samples of all processes together.
        batch_size: Number of samples that must stay together.

    Raises:
        CalibrationDataError: If there are fewer batches than processes.
    """
    num_batches = -(-num_samples // batch_size)
    if num_batches < num_processes():
        batches = f" in batches of {batch_size}" if batch_size > 1 else ""
        smaller = " a smaller `score_batch_size`," if batch_size > 1 else ""
        raise CalibrationDataError(
            f"{num_samples} samples{batches} cannot be split between {num_processes()} processes. Give more samples,"
            f"{smaller} or start fewer processes."
        )
    bounds = [
        min(num_samples, index * num_batches // num_processes() * batch_size)
        for index in (process_index(), process_index() + 1)
    ]
    return slice(*bounds)


def summed(value: Value) -> Value:
    """Return the sum over all processes of a tensor, or of a named tuple of tensors and numbers, entry by entry."""
    if num_processes() == 1:
        return value
    return mapped(value, _summed, leaves=(Tensor, int, float))


def _summed(value: Any) -> Any:
    if isinstance(value, Tensor):
        total = value.to(_state().device, copy=True)
        with _among_all():
            distributed.all_reduce(total)
        return total.to(value.device)
    total = torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return type(value)(_summed(total).item())


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of processes."""
    if num_processes() == 1:
        return [value]
    _state()
    found: list[Any] = [None] * num_processes()
    with _among_all():
        distributed.all_gather_object(found, value)
    return found


def from_main(value: Value) -> Value:
    """Return the value of the main process; in the others, its tensors are on the CPU."""
    if num_processes() == 1:
        return value
    _state()
    sent: list[Any] = [_on_cpu(value) if is_main_process() else None]
    with _among_all():
        distributed.broadcast_object_list(sent, src=0)  # sent as a whole, since None here may be a tensor elsewhere
    return value if is_main_process() else sent[0]


def _on_cpu(value: Any) -> Any:
    return mapped(value, lambda part: part.cpu() if isinstance(part, Tensor) else part)


@contextmanager
def _among_all() -> Iterator[None]:
    """Enclose a block of code that all processes have to reach."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"Another process of this run stopped ({str(error).splitlines()[0]}). See its message, and start all anew."
        ) from error


def wait_for_all() -> None:
    """Return when all processes are here."""
    if num_processes() > 1:
        with _among_all():
            _state().wait_for_everyone()


def _state() -> PartialState:
    """Return where this process computes; the first call joins the other processes."""
    return PartialState(cpu=not torch.accelerator.is_available())
