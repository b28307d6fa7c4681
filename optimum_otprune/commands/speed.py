"""What pruning gains in speed and memory: models taking turns on the same token ids, in one run.

Prefill is the forward pass over a prompt that fills the KV cache and gives the logits of its last token, so its time
is the time to the first token; decode is greedy generation of the tokens that follow, one at a time.
"""

import copy
import inspect
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from optimum_otprune.config.quantities import LARGEST_COUNT, whole_number
from optimum_otprune.errors import UsageError
from optimum_otprune.functional.selection import kept_width
from optimum_otprune.models.devices import weight_bytes
from optimum_otprune.models.ffn_block import FFNBlock, cut_all
from optimum_otprune.models.find_ffns import dense_width, ffn_blocks
from optimum_otprune.models.flops import forward_flops
from optimum_otprune.models.inputs import input_device
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.models.timing import devices_of, wait_for_devices
from optimum_otprune.pruning.calibration.data import ModelLimits


class BenchmarkSettings(NamedTuple):
    """The settings of a speed measurement.

    Attributes:
        batch_sizes: Sequences at a time.
        seqlens: Tokens of a prompt.
        new_tokens: Generated after each prompt; with 0 or 1 decode is not measured.
        warm_up: Rounds that are not counted.
        repeats: Rounds that are counted.
    """

    batch_sizes: tuple[int, ...] = (1,)
    seqlens: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    warm_up: int = 2
    repeats: int = 5


class Speed(NamedTuple):
    """Medians over the repeats of one model at one shape.

    Attributes:
        first_token_seconds: Seconds from the prompt to its first token.
        prefill_tokens_per_second: Tokens of the prompts divided by that time.
        decode_tokens_per_second: Speed of all sequences together from the second generated token on; None without one.
        peak_bytes: Largest memory of the device while it ran: its weights and what came on top. None on a CPU, which
            keeps no such record.
        cache_bytes: Size of the KV cache at its end.
        flops: Operations of the prefill, as `optimum_otprune.models.flops` counts them.
    """

    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    peak_bytes: int | None
    cache_bytes: int
    flops: int


class SpeedComparison(NamedTuple):
    """A dense and a smaller model at one shape.

    Attributes:
        batch_size: Number of sequences at a time.
        seqlen: Number of tokens of a prompt.
        dense: The speed of the dense model.
        pruned: The speed of the smaller model.
    """

    batch_size: int
    seqlen: int
    dense: Speed
    pruned: Speed

    @property
    def prefill_speedup(self) -> float:
        """How many times faster the prefill is."""
        return self.dense.first_token_seconds / self.pruned.first_token_seconds

    @property
    def promised_speedup(self) -> float:
        """The speedup of the prefill if time were proportional to the operations of matrix products."""
        return self.dense.flops / self.pruned.flops

    @property
    def share_reached(self) -> float:
        """Measured speed-up of the prefill in units of the promised one."""
        return self.prefill_speedup / self.promised_speedup

    @property
    def share_of_time_saved(self) -> float | None:
        """The share of the promised saving that the prefill reaches; None if no operations were removed.

        This is the stricter of two possible measures: a model that became no faster reaches 0.
        """
        promised = 1 - 1 / self.promised_speedup
        return (1 - 1 / self.prefill_speedup) / promised if promised else None

    @property
    def decode_speedup(self) -> float | None:
        """How many times faster generation is."""
        dense, pruned = self.dense.decode_tokens_per_second, self.pruned.decode_tokens_per_second
        return None if dense is None or pruned is None else pruned / dense

    def to_dict(self) -> dict[str, object]:
        """Return all results, ratios included, JSON-ready."""
        ratios = ("prefill_speedup", "promised_speedup", "share_reached", "share_of_time_saved", "decode_speedup")
        return {
            "batch_size": self.batch_size,
            "seqlen": self.seqlen,
            "dense": self.dense._asdict(),
            "pruned": self.pruned._asdict(),
            **{name: getattr(self, name) for name in ratios},
        }


def check_numbers(settings: BenchmarkSettings, multiples: Sequence[int] = ()) -> None:
    """Raise an error if a number is out of range for all models.

    Args:
        settings: The settings of the measurement.
        multiples: The multiples that `widths_by_multiple` takes.

    Raises:
        UsageError: If there is such a number; the message names it.
    """
    least = {"batch_sizes": 1, "seqlens": 1, "repeats": 1, "new_tokens": 0, "warm_up": 0}
    for name, bound in least.items():
        given = getattr(settings, name)
        numbers = [whole_number(number) for number in (given if isinstance(given, tuple) else (given,))]
        if not numbers or any(number is None or not bound <= number <= LARGEST_COUNT for number in numbers):
            raise UsageError(f"`{name}` is {given}; want integers of at least {bound} and at most {LARGEST_COUNT}.")
    if min(multiples, default=1) < 1:
        raise UsageError(f"`multiple_of` is {min(multiples)}; want integers of at least 1.")


def check_settings(models: Mapping[str, PreTrainedModel], settings: BenchmarkSettings) -> None:
    """Raise an error if a shape cannot be run.

    Args:
        models: The models by the name that the message gives them.
        settings: The settings of the measurement.

    Raises:
        UsageError: If a number is too small, or prompts with what follows them are longer than a model's positions.
    """
    check_numbers(settings)
    longest = max(settings.seqlens) + settings.new_tokens
    for name, model in models.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise UsageError(
                f"Prompts of {max(settings.seqlens)} tokens and {settings.new_tokens} new ones do not fit into the "
                f"{positions} positions of the {name} model. Give smaller `seqlens` or `new_tokens`."
            )


def check_comparable(dense: list[FFNBlock], pruned: list[FFNBlock]) -> None:
    """Raise an error unless one model is the other with narrower FFNs, or the same.

    Args:
        dense: All FFN blocks of the dense model.
        pruned: All FFN blocks of the pruned one.

    Raises:
        UsageError: If it is not; the message says what differs.
    """
    if len(dense) != len(pruned):
        raise UsageError(
            f"The models have {len(dense)} and {len(pruned)} layers, so one is not a pruning of the other. Give the "
            "dense model that was pruned."
        )
    for before, after in zip(dense, pruned):
        if after.intermediate_size > before.intermediate_size:
            raise UsageError(
                f"Layer {before.layer} has {before.intermediate_size} channels in the first model and "
                f"{after.intermediate_size} in the second. Give the dense model first."
            )


def compare(dense: PreTrainedModel, pruned: PreTrainedModel, settings: BenchmarkSettings) -> list[SpeedComparison]:
    """Measure two models at every shape, taking turns, so that what slows the machine down slows both.

    Args:
        dense: The model before, put into evaluation mode.
        pruned: The model after, the same, on the same device.
        settings: The settings of the measurement.

    Raises:
        UsageError: If a shape cannot be run.
    """
    models = {"dense": dense.eval(), "pruned": pruned.eval()}
    check_settings(models, settings)
    found = []
    for batch_size, seqlen in itertools.product(settings.batch_sizes, settings.seqlens):
        speeds = _measure(models, batch_size, seqlen, settings)
        found.append(SpeedComparison(batch_size, seqlen, speeds["dense"], speeds["pruned"]))
    return found


def cut_copy(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """Return a model that shares all weights but the FFNs', which are cut to their first channels.

    For speed nothing matters but the width. The given model stays as it is.

    Args:
        model: The model, which must not be offloaded.
        width: Number of channels of every FFN, at most as many as there are.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    copied = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    cut_all(ffn_blocks(copied), width)
    return copied


def widths_by_multiple(dense: list[FFNBlock], pruned: list[FFNBlock], multiples: Sequence[int]) -> dict[int, int]:
    """Return the width that the share of channels which `pruned` kept gives when it is rounded to each multiple.

    Args:
        dense: All FFN blocks of the dense model, of one width.
        pruned: All FFN blocks of the pruned one.
        multiples: Multiples in the order of the result.

    Raises:
        ConfigurationError: If a multiple is larger than the dense width.
        UnsupportedModelError: If the dense layers differ in width.
    """
    if not multiples:
        return {}
    width = dense_width(dense)
    ratio = 1 - sum(block.intermediate_size for block in pruned) / (width * len(pruned))
    check_numbers(BenchmarkSettings(), multiples)
    return {multiple: kept_width(width, ratio, multiple) for multiple in multiples}


def _measure(
    models: Mapping[str, PreTrainedModel], batch_size: int, seqlen: int, settings: BenchmarkSettings
) -> dict[str, Speed]:
    """Measure all models at one shape: each round runs all of them, every second round in reverse order."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(ModelLimits.of(model).vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (batch_size, seqlen), generator=generator)
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    for number in range(settings.warm_up + settings.repeats):
        names = list(models) if number % 2 == 0 else list(reversed(list(models)))
        for name in names:
            run = _generate(models[name], ids, settings.new_tokens)
            if number >= settings.warm_up:
                runs[name].append(run)
    return {name: _speed(models[name], ids, runs[name], settings) for name in models}


class _Run(NamedTuple):
    first_token_seconds: float
    decode_seconds: float
    peak_bytes: int | None
    cache_bytes: int


@torch.no_grad()
def _generate(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> _Run:
    """Generate a fixed number of tokens greedily, with the cache of transformers."""
    device = input_device(model)
    token = ids.to(device)
    cache: Any = DynamicCache(config=model.config)
    arguments = {_cache_argument(model): cache, "use_cache": True}
    if _keeps_logits(model):
        arguments["logits_to_keep"] = 1
    before = _start_of_peak(device)
    times: list[float] = []
    devices = devices_of(model)
    wait_for_devices(devices)
    start = time.perf_counter()
    for _ in range(max(1, new_tokens)):
        output = model(input_ids=token, **arguments)
        token = output.logits[:, -1:].argmax(dim=-1)
        if not times:
            wait_for_devices(devices)
            times.append(time.perf_counter())
    wait_for_devices(devices)
    end = time.perf_counter()
    if new_tokens > 1 and not _cache_bytes(cache):
        raise UsageError(
            f"A {type(model).__name__} keeps no KV cache, so it cannot generate text step by step. Give "
            "`new_tokens=0` to measure its prefill alone."
        )
    peak = None if before is None else torch.cuda.max_memory_allocated(device) - before + weight_bytes(model)
    return _Run(times[0] - start, end - times[0], peak, _cache_bytes(cache))


def _start_of_peak(device: torch.device) -> int | None:
    """Return the bytes in use at the start, other models' included; None if no peak is recorded."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _speed(model: PreTrainedModel, ids: Tensor, runs: list[_Run], settings: BenchmarkSettings) -> Speed:
    batch_size, seqlen = ids.shape
    first = statistics.median(run.first_token_seconds for run in runs)
    following = batch_size * (settings.new_tokens - 1)
    decode = statistics.median(run.decode_seconds for run in runs)
    logits = 1 if _keeps_logits(model) else seqlen
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Speed(
        first_token_seconds=first,
        prefill_tokens_per_second=ids.numel() / first,
        decode_tokens_per_second=following / decode if following > 0 else None,
        peak_bytes=max(peaks) if peaks else None,
        cache_bytes=max(run.cache_bytes for run in runs),
        flops=forward_flops(PrunableModel.of(model), batch_size, seqlen, logits).total,
    )


def _keeps_logits(model: PreTrainedModel) -> bool:
    """Return whether the head may skip all tokens but the last, as in `generate`."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the model's argument for its cache: `cache` or, before 5.24, `past_key_values`."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _cache_bytes(cache: DynamicCache) -> int:
    parts = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
