"""Where a recovery was: kept nowhere, or in a state folder from which an interrupted one goes on, bit for bit."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optimum_otprune.errors import StateError, warn_user
from optimum_otprune.pruning.layer_store import from_blob, to_blob
from optimum_otprune.pruning.recovery.heldout import Measured
from optimum_otprune.pruning.recovery.kept_samples import kept_samples
from optimum_otprune.pruning.recovery.samples import RecoverySamples
from optimum_otprune.pruning.recovery_report import RecoveryReport
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.pruning.resume import forget_where, opened_state
from optimum_otprune.storage.state_folder import StateFolder, strict_json

_REPORT = "recovered.json"
_KINDS = ("value", "exp_avg", "exp_avg_sq", "best")


class Snapshot(NamedTuple):
    """Where a recovery is between two steps.

    Attributes:
        step: Number of steps that were taken.
        best_step: The step after which the weights were the best.
        seconds: Duration so far.
        start: What was measured before the first step, by part.
        best: What was measured with the best weights, by part.
        weights: Names of weights, each with its `value`, Adam's `exp_avg` and `exp_avg_sq`, and its value when it was
            the best as `best`; read once.
    """

    step: int
    best_step: int
    seconds: float
    start: Mapping[str, Measured]
    best: Mapping[str, Measured]
    weights: Iterable[tuple[str, Mapping[str, Tensor]]]


class RecoveryStore(Protocol):
    """The place where a recovery finds where an earlier one was, and notes where it is."""

    def samples(self, make: Callable[[], RecoverySamples]) -> RecoverySamples:
        """Return the samples of an earlier run, or make them now."""
        ...

    def latest(self, weights: Mapping[str, Tensor]) -> Snapshot | None:
        """Return where the earlier run was, or None; its weights have the given names and shapes."""
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Note where the run is, in place of where it was."""
        ...

    def finish(self, report: RecoveryReport) -> None:
        """Note the report of a run that is over, by which a saved result is known to be its."""
        ...


class NoRecoveryStore:
    """Keeps nothing."""

    def samples(self, make: Callable[[], RecoverySamples]) -> RecoverySamples:
        """Make the samples, which are not kept."""
        return make()

    def latest(self, weights: Mapping[str, Tensor]) -> Snapshot | None:
        """Return None, since nothing is kept."""
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Do nothing."""

    def finish(self, report: RecoveryReport) -> None:
        """Do nothing."""


class RecoveryFolder:
    """Keeps everything in a state folder; what is damaged is done again, with a warning.

    Args:
        state: Opened, and begun with this run's fingerprint.
    """

    def __init__(self, state: StateFolder):
        self._state = state

    def samples(self, make: Callable[[], RecoverySamples]) -> RecoverySamples:
        """Return the samples in the folder, or make them and put them there."""
        return kept_samples(self._state, make)

    def latest(self, weights: Mapping[str, Tensor]) -> Snapshot | None:
        """Return where the earlier run was, or None if it is not known or damaged."""
        index = max(
            (name for name in self._state.names if name.startswith("step-") and name.endswith(".json")), default=None
        )
        if index is None:
            return None
        try:
            found = _parsed(strict_json(self._state.read(index), index))
            read = [
                (name, self._weight(found.step, number, like)) for number, (name, like) in enumerate(weights.items())
            ]
        except StateError as error:
            warn_user(f"What the interrupted recovery kept is damaged, and it begins anew: {error}")
            return None
        return found._replace(weights=read)

    def _weight(self, step: int, number: int, like: Tensor) -> dict[str, Tensor]:
        name = _weight_file(step, number)
        if name not in self._state.names:
            raise StateError(f"{name!r} is missing.")
        found = from_blob(self._state.read(name))
        fits = set(found) == set(_KINDS) and all(
            part.shape == like.shape and part.dtype == torch.float32 and bool(torch.isfinite(part).all())
            for part in found.values()
        )
        if not fits:
            raise StateError(f"{name!r} is of another weight, or not finite.")
        return found

    def save(self, snapshot: Snapshot) -> None:
        """Write where the run is; what was kept before is removed only when that is done."""
        measured = {
            stage: {name: {"sums": part.sums.tolist(), "seqlen": part.seqlen} for name, part in parts.items()}
            for stage, parts in (("start", snapshot.start), ("best", snapshot.best))
        }
        values = {"step": snapshot.step, "best_step": snapshot.best_step, "seconds": snapshot.seconds, **measured}
        files = ((_weight_file(snapshot.step, n), to_blob(kept)) for n, (_, kept) in enumerate(snapshot.weights))
        index = (f"step-{snapshot.step:07d}.json", (json.dumps(values, allow_nan=False) + "\n").encode())
        old = {name for name in self._state.names if name.startswith("step-")}
        self._state.write(_followed_by(files, index), instead_of=old)

    def finish(self, report: RecoveryReport) -> None:
        """Write the report."""
        self._state.write({_REPORT: (json.dumps(report.to_dict(), sort_keys=True) + "\n").encode()})


def forget_recovery_if_saved(folder: Path, report: PruningReport) -> bool:
    """Remove the state of a recovery whose result is known to be saved, because its process ended before it could.

    Args:
        folder: The folder of the state.
        report: The report of the saved model.

    Returns:
        Whether it was so: the state is of the last recovery of the report, or was being removed.

    Raises:
        StateError: If the state is in use or damaged.
        OutputError: If it cannot be removed.
    """
    return forget_where(folder, lambda state: _is_of(state, report))


def _is_of(state: StateFolder, report: PruningReport) -> bool:
    if _REPORT not in state.names or not report.recoveries:
        return False
    known = strict_json(state.read(_REPORT), _REPORT)
    saved = json.loads(json.dumps(report.recoveries[-1].to_dict()))
    return isinstance(known, dict) and {**known, "base_model": None} == {**saved, "base_model": None}


@contextmanager
def resumable_recovery(folder: Path | None, fingerprint: Mapping[str, object]) -> Iterator[RecoveryStore]:
    """Yield the store that keeps where a recovery is; without a folder, it keeps nothing.

    Args:
        folder: The state folder, or None.
        fingerprint: What the result depends on.

    Raises:
        StateError: If the folder is in use, damaged, or of another run; names what differs.
        OutputError: If it cannot be written.
    """
    if folder is None:
        yield NoRecoveryStore()
        return
    with opened_state(folder, fingerprint, "the model as it was before recovery") as state:
        yield RecoveryFolder(state)


def _weight_file(step: int, number: int) -> str:
    return f"step-{step:07d}-{number:05d}.safetensors"


def _followed_by(files: Iterable[tuple[str, bytes]], last: tuple[str, bytes]) -> Iterator[tuple[str, bytes]]:
    yield from files
    yield last


def _parsed(values: object) -> Snapshot:
    """Return a snapshot without weights."""
    problem = StateError("The file of the last step is of another form than any run writes.")
    if not isinstance(values, dict):
        raise problem
    try:
        start, best = (
            {
                name: Measured(torch.tensor(part["sums"], dtype=torch.float64).reshape(-1, 4), part["seqlen"])
                for name, part in values[stage].items()
            }
            for stage in ("start", "best")
        )
        steps = (int(values["step"]), int(values["best_step"]))
        return Snapshot(*steps, seconds=float(values["seconds"]), start=start, best=best, weights=())
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise problem from error
