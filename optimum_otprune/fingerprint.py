"""Whether a study of an earlier run can go on: what its trials' results depend on."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_otprune.configuration import OTPruningConfig
from optimum_otprune.devices import read_parameter
from optimum_otprune.errors import StudyError
from optimum_otprune.search_space import Domain, Range
from optimum_otprune.trials import plain_value


def fingerprint(
    model: PreTrainedModel, tokens: Tensor, base: OTPruningConfig, space: Mapping[str, Domain], **others: Any
) -> dict[str, Any]:
    """Return everything that a trial's result depends on, JSON-ready.

    Args:
        model: Its weights count, not its name.
        tokens: Calibration samples.
        base: The start.
        space: What is searched over.
        **others: Plain values by name.
    """
    config = {name: value for name, value in base.to_dict().items() if name != "optimum_otprune_version"}
    return {
        "model": _model_digest(model),
        "calibration samples": _digest([tokens.cpu()]),
        **others,
        "search space": {
            name: {"range": list(domain)}
            if isinstance(domain, Range)
            else {"choices": [plain_value(value) for value in domain.values]}
            for name, domain in space.items()
        },
        **{f"`{name}` of the configuration": value for name, value in config.items()},
    }


def _model_digest(model: PreTrainedModel) -> str:
    """Of all weights, wherever they are, in their dtype."""
    named = ((module, name) for module in model.modules() for name in module._parameters)
    return _digest(value for module, name in named if (value := read_parameter(module, name)) is not None)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same(known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where two fingerprints differ.

    Args:
        known: Of the study.
        now: Of what was asked for.

    Raises:
        StudyError: Names everything that differs.
    """
    different = [name for name in {**known, **now} if known.get(name) != now.get(name)]
    if different:
        raise StudyError(
            f"The study was begun with another {_difference(different[0], known, now)}"
            + (f", and {', '.join(different[1:])} differ too" if len(different) > 1 else "")
            + ". Go on with what it was begun with, or give the name of a new file."
        )


def _difference(name: str, known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name in ("model", "calibration samples"):
        return name
    return f"{name} ({known.get(name)!r}, now {now.get(name)!r})"
