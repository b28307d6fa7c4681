"""Everything that a run's result depends on, as digests and plain values, and how two such sets differ."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.models.devices import read_parameter
from optimum_otprune.models.distributed import num_processes
from optimum_otprune.models.inputs import input_device
from optimum_otprune.pruning.recipe import Recipe
from optimum_otprune.pruning.versions import versions
from optimum_otprune.storage.untrusted import visible

_SHOWN = 60
_NO_BITS = ("progress", "logits_per_token")  # options of recovery; the dense model's facts say how many


def model_digest(model: PreTrainedModel) -> str:
    """Return a digest of all weights in their dtype, wherever they are; names do not count."""
    named = ((module, name) for module in model.modules() for name in module._parameters)
    return tensors_digest(value for module, name in named if (value := read_parameter(module, name)) is not None)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a SHA-256 digest of shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_difference(known: Mapping[str, object], now: Mapping[str, object], opaque: Sequence[str]) -> str | None:
    """Return the differences in words, such as `"device type ('cpu', now 'cuda'), and model differ too"`, or None.

    Args:
        known: The fingerprint of the run that was begun.
        now: The fingerprint of the run that is asked for.
        opaque: Names of entries, such as digests, whose values say nothing to a reader.

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


def _short(values: Mapping[str, object], name: str) -> str:
    text = repr(values.get(name))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _surroundings(model: PreTrainedModel) -> dict[str, object]:
    """Return what every run's bits depend on: the model and where it is computed."""
    settings = model.config.to_json_string(use_diff=True) + str(model.config._attn_implementation)
    return {
        "model": model_digest(model),
        "model configuration": tensors_digest([torch.frombuffer(bytearray(settings.encode()), dtype=torch.uint8)]),
        "data type": str(model.dtype).removeprefix("torch."),
        "device type": model.device.type,
        "number of threads": torch.get_num_threads(),
        **({"number of processes": num_processes()} if num_processes() > 1 else {}),
        **{f"version of {name}": version for name, version in versions().items() if name != "datasets"},
    }


def dense_fingerprint(dense: PreTrainedModel) -> dict[str, object]:
    """Return everything of the dense model that its predictions depend on, JSON-ready."""
    return {
        "dense model": model_digest(dense),
        "data type of the dense model": str(dense.dtype).removeprefix("torch."),
        "device type of the dense model": input_device(dense).type,
    }


def recovery_fingerprint(
    model: PreTrainedModel, dense: Mapping[str, object], texts: Sequence[Tensor], settings: Mapping[str, object]
) -> dict[str, object]:
    """Return everything that the bits of a recovery's result depend on, JSON-ready.

    Args:
        model: The pruned model.
        dense: The fingerprint of the dense model, or of what was kept of its predictions.
        texts: The given samples, and other text if there is any, LongTensors `(num_samples, seqlen)`.
        settings: The options by name.
    """
    counted = {name: value for name, value in settings.items() if name not in _NO_BITS}
    return _json({**_surroundings(model), **logits_fingerprint(dense, texts, counted)})


def logits_fingerprint(
    dense: Mapping[str, object], texts: Sequence[Tensor], settings: Mapping[str, object]
) -> dict[str, object]:
    """Return everything that samples, and the dense model's predictions of them, depend on, JSON-ready.

    Args:
        dense: The fingerprint of the dense model, and how many of its logits are kept.
        texts: The given samples, and other text if there is any, LongTensors `(num_samples, seqlen)`.
        settings: The options that decide the samples, by name.
    """
    digests = (tensors_digest([tokens]) for tokens in texts)
    options = {f"`{name}` of recovery": value for name, value in settings.items()}
    return _json({**dense, **dict(zip(("calibration samples", "other text"), digests)), **options})


def _json(values: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(values))


def run_fingerprint(model: PreTrainedModel, recipe: Recipe, tokens: Tensor, batch_size: int) -> dict[str, object]:
    """Return everything that the bits of a run's result depend on, JSON-ready; functions count by their names.

    Args:
        model: The dense model; its weights count, not its name.
        recipe: The configuration with its functions.
        tokens: The calibration samples, LongTensor `(num_samples, seqlen)`.
        batch_size: Number of samples per forward pass, which the rounding of sums depends on.
    """
    config = {name: value for name, value in recipe.config.to_dict().items() if name != "optimum_otprune_version"}
    values = {
        **_surroundings(model),
        "calibration samples": tensors_digest([tokens]),
        "batch size": batch_size,
        **{f"function for `{field}`": entry.name for field, entry in sorted(recipe.functions.items())},
        **{f"`{name}` of the configuration": value for name, value in config.items()},
    }
    return json.loads(json.dumps(values))
