"""The samples of a recovery in a state folder: made once, and read back by a run that goes on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from optimum_otprune.errors import StateError, warn_user
from optimum_otprune.pruning.layer_store import from_blob, to_blob
from optimum_otprune.pruning.recovery.samples import KINDS, TRAINING, RecoverySamples
from optimum_otprune.storage.state_folder import StateFolder

SAMPLES_FILE = "samples.safetensors"
_HELDOUT, _COUNTS = "heldout.", "counts."


def kept_samples(state: StateFolder, make: Callable[[], RecoverySamples]) -> RecoverySamples:
    """Return the samples in a folder, or make them and put them there; damaged ones are made again, with a warning.

    Args:
        state: The folder, begun with a fingerprint of what the samples depend on.
        make: A function that makes the samples.
    """
    if SAMPLES_FILE in state.names:
        try:
            return read_samples(state)
        except StateError as error:
            warn_user(f"The samples of the interrupted run are damaged and made again: {error}")
    made = make()
    counts = {f"{_COUNTS}{name}": torch.tensor(count) for name, count in made.counts.items()}
    heldout = {f"{_HELDOUT}{name}": windows for name, windows in made.heldout.items()}
    state.write({SAMPLES_FILE: to_blob({TRAINING: made.training, **heldout, **counts})})
    return made


def read_samples(state: StateFolder) -> RecoverySamples:
    """Return the samples in a folder that has some.

    Raises:
        StateError: If they are damaged.
    """
    return _parsed(from_blob(state.read(SAMPLES_FILE)))


def _parsed(found: Mapping[str, Tensor]) -> RecoverySamples:
    heldout, counts = (
        {kind: found[f"{prefix}{kind}"] for kind in KINDS if f"{prefix}{kind}" in found}
        for prefix in (_HELDOUT, _COUNTS)
    )
    matrices = [found.get(TRAINING), *heldout.values()]
    if not heldout or any(part is None or part.ndim != 2 or part.dtype != torch.int64 for part in matrices):
        raise StateError(f"{SAMPLES_FILE!r} holds no samples.")
    return RecoverySamples(found[TRAINING], {name: int(part) for name, part in counts.items()}, heldout)
