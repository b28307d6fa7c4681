"""What a run's result depends on, as digests and plain values, and how two of them differ."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.devices import read_parameter
from optimum_otprune.untrusted import visible

_SHOWN = 60


def model_digest(model: PreTrainedModel) -> str:
    """Of all weights, wherever they are, in their dtype; names do not count."""
    named = ((module, name) for module in model.modules() for name in module._parameters)
    return tensors_digest(value for module, name in named if (value := read_parameter(module, name)) is not None)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_difference(known: Mapping[str, Any], now: Mapping[str, Any], opaque: Sequence[str]) -> str | None:
    """Return what differs, such as `"device type ('cpu', now 'cuda'), and model differ too"`, or None.

    Args:
        known: Of what was begun.
        now: Of what is asked for.
        opaque: Names whose values say nothing to a reader.

    Example:
        >>> describe_difference({"threads": 1, "model": "3f"}, {"threads": 2, "model": "a0"}, ["model"])
        'threads (1, now 2), and model differ too'
    """
    different = [name for name in {**known, **now} if known.get(name) != now.get(name)]
    if not different:
        return None
    first = different[0]
    shown = visible(first, _SHOWN)
    if first not in opaque:
        shown += f" ({_short(known, first)}, now {_short(now, first)})"
    others = ", ".join(visible(name, _SHOWN) for name in different[1:])
    return shown + (f", and {others} differ too" if others else "")


def _short(values: Mapping[str, Any], name: str) -> str:
    text = repr(values.get(name))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
