"""`PruningPlan`: the expected result and needs of `prune`."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optimum_otprune.models.save_formats import save_format, saved_widths
from optimum_otprune.pruning.calibration.data import ExpectedSamples
from optimum_otprune.pruning.dry_run.purposes import purpose_text

_MINUTE, _HOUR = 60, 3600


class MemoryUse(NamedTuple):
    """Bytes that one purpose takes on one device.

    Attributes:
        device: The device, such as `"cuda:0"`; `"cpu"` is main memory, `"disk"` what is offloaded or spilled.
        purpose: The purpose in words.
        bytes: The number of bytes.
    """

    device: str
    purpose: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """The expected widths, sizes, memory and time of `prune`; `str()` of it is a text for people.

    Attributes:
        config: The configuration to prune by; a target in parameters or bytes is resolved to a ratio.
        architecture: Name of the layout that was found.
        model_class: Name of the model's class in transformers.
        dtype: The dtype of the weights.
        hidden_size: The hidden size of the model.
        widths_before: Channels of each layer before pruning.
        widths_after: Channels of each layer after pruning; for `adaptive_layers` their mean.
        adaptive_layers: Indices of the layers whose own width is only found by measuring.
        parameters_before: Parameters of the model before pruning.
        parameters_after: Parameters after pruning, without biases and zeros that only fill up.
        bytes_before: Bytes of the weights before pruning.
        bytes_after: Bytes of the saved weights, zeros that fill up layers included where they are known.
        bias_parameters: Parameters of output biases that may be added if held-out tokens show a benefit.
        samples: Calibration samples that are read.
        written_samples: Calibration samples that the model writes itself.
        memory: Expected memory by device and purpose.
        computing_device: The device that does most of the work.
        seconds: Expected time by stage, empty if nothing is pruned; None where the device is not on this machine.
        kinds: What each FFN is in its block, where some are experts; empty where every layer has one.
        heads: Groups of heads of attention in every block before and after; None where none are removed.
    """

    config: Mapping[str, Any]
    architecture: str
    model_class: str
    dtype: str
    hidden_size: int
    widths_before: tuple[int, ...]
    widths_after: tuple[int, ...]
    adaptive_layers: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    bias_parameters: int
    samples: ExpectedSamples
    written_samples: int
    memory: tuple[MemoryUse, ...]
    computing_device: str
    seconds: Mapping[str, float] | None
    heads: tuple[int, int] | None = None
    kinds: tuple[str, ...] = ()

    @property
    def memory_by_device(self) -> dict[str, int]:
        """Expected peak of each device, in bytes."""
        return _by_device(self.memory)

    def __str__(self) -> str:
        rows = (
            ("Model", self._model()),
            ("Method", f"{self.config['method']}, quality {self.config['quality']}"),
            ("Widths", "; ".join(self._widths())),
            *([("Attention", f"{self.heads[0]} -> {self.heads[1]} groups of heads a block")] if self.heads else []),
            *([("Made for", made_for)] if (made_for := self._made_for()) else []),
            ("Parameters", self._parameters()),
            ("Weights", self._weights()),
            ("Calibration", self._calibration()),
            *(("Memory", line) for line in memory_lines(self.memory)),
            (
                "Time",
                "none: nothing is pruned" if self.seconds == {} else time_line(self.seconds, self.computing_device),
            ),
        )
        lines = ["PRUNING PLAN (no weights were read, nothing is written; memory and time are rough)"]
        return "\n".join([*lines, *(f"{name:<12} {text}" for name, text in rows)])

    def _model(self) -> str:
        layers, what = len(self.widths_before), "FFNs" if self.kinds else "layers"
        return (
            f"{self.model_class} (layout {self.architecture!r}), {layers} {what}, hidden size {self.hidden_size:,}, "
            f"{self.dtype}"
        )

    def _widths(self) -> list[str]:
        if self.kinds:
            counts = Counter(zip(self.kinds, self.widths_before, self.widths_after))
            return [f"{before:,} -> {after:,} in {n} {kind}" for (kind, before, after), n in counts.items()]
        by_change: dict[tuple[int, int, bool], list[int]] = {}
        for layer, change in enumerate(zip(self.widths_before, self.widths_after)):
            by_change.setdefault((*change, layer in self.adaptive_layers), []).append(layer)
        return [
            f"{before:,} -> {'about ' if adaptive else ''}{after:,}{' on average' if adaptive else ''} in "
            f"{_layers(layers, len(self.widths_before))}"
            for (before, after, adaptive), layers in by_change.items()
        ]

    def _made_for(self) -> str:
        """Return which purposes the new widths serve; nothing where widths are not known yet, or none is new."""
        changes = {(old, new) for old, new in zip(self.widths_before, self.widths_after) if old != new}
        if self.adaptive_layers or not changes:
            return ""
        removed = sum(self.widths_before) - sum(self.widths_after)
        share = 0.0 if self.heads else (self.parameters_before - self.parameters_after) / removed
        count = sum(old != new for old, new in zip(self.widths_before, self.widths_after))
        return purpose_text(sorted({new for _, new in changes}), share * count, self.parameters_after)

    def _parameters(self) -> str:
        share = self.parameters_after / self.parameters_before
        biases = f", and up to {self.bias_parameters:,} of biases" if self.bias_parameters else ""
        return f"{self.parameters_before:,} -> {self.parameters_after:,} ({share:.1%}){biases}"

    def _weights(self) -> str:
        name = self.config["non_uniform_format"]
        is_filled = saved_widths(name, self.widths_after, self.widths_before) != list(self.widths_after)
        may_grow = self.adaptive_layers and save_format(name).fills_up
        more = ", more by as much as the widest layer exceeds the average" if may_grow else ""
        filled = " (filled up to the widest layer)" if is_filled else ""
        return f"{size_text(self.bytes_before)} -> {size_text(self.bytes_after)}{filled}{more}"

    def _calibration(self) -> str:
        samples = self.samples
        if not samples.num_samples:
            return f"{self.written_samples:,} samples of {samples.seqlen:,} tokens that the model writes itself"
        most = "" if samples.is_exact else "at most "
        written = f"; {self.written_samples:,} more that the model writes itself" if self.written_samples else ""
        return (
            f"{most}{samples.num_samples:,} samples of {samples.seqlen:,} tokens, read from {samples.source}{written}"
        )


def _by_device(memory: Sequence[MemoryUse]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for use in memory:
        total[use.device] += use.bytes
    return dict(total)


def memory_lines(memory: Sequence[MemoryUse]) -> list[str]:
    """Return a line for people for each device: the sum, and what it is made of.

    Args:
        memory: The uses of memory at the same time.
    """
    lines = []
    for device, total in _by_device(memory).items():
        parts = [f"{use.purpose} {size_text(use.bytes)}" for use in memory if use.device == device]
        name = {"cpu": "main memory"}.get(device, device)
        lines.append(f"{name}: {size_text(total)} ({', '.join(parts)})")
    return lines


def time_line(seconds: Mapping[str, float] | None, device: str) -> str:
    """Return the expected time for people.

    Args:
        seconds: Time by stage, empty if there is nothing to do; None if it is not known.
        device: The device that does most of the work.
    """
    if seconds is None:
        return f"not known: there is no {device} on this machine to measure the speed of"
    if not seconds:
        return "none: nothing is pruned"
    stages = ", ".join(f"{stage} {time_text(taken)}" for stage, taken in seconds.items())
    return f"about {time_text(sum(seconds.values()))} on {device} ({stages}), besides loading and saving"


def _layers(layers: Sequence[int], count: int) -> str:
    """Return a phrase such as `"all 4 layers"`, `"layers 0, 3"` or `"28 layers"`."""
    if len(layers) == count:
        return f"all {count} layers"
    if len(layers) > 8:
        return f"{len(layers)} layers"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def size_text(count: int) -> str:
    """Return a number of bytes for people; GB is 10⁹.

    Example:
        >>> size_text(16_060_000_000), size_text(2_500_000), size_text(700)
        ('16.1 GB', '2.5 MB', '0.0 MB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def time_text(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> time_text(0.2), time_text(59), time_text(600), time_text(9000)
        ('under 1 s', '59 s', '10 min', '2.5 h')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE:.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.1f} h"
