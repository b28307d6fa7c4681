"""Runs that can be resumed: checking that a state belongs to the same run, continuing and removing it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from optimum_otprune.errors import OutputError, StateError, warn_user
from optimum_otprune.models.distributed import is_main_process
from optimum_otprune.pruning.fingerprint import describe_difference
from optimum_otprune.pruning.layer_store import FolderStore, LayerStore, NoStore, layer_files
from optimum_otprune.pruning.report import PruningReport
from optimum_otprune.storage.state_folder import StateFolder, strict_json

logger = logging.getLogger(__name__)

_OPAQUE = ("model", "model configuration", "dense model", "calibration samples", "other text")


@contextmanager
def resumable(folder: Path | None, fingerprint: Mapping[str, object]) -> Iterator[LayerStore]:
    """Yield the store that keeps the layers of a running run; without a folder, it keeps nothing.

    Of several processes, the main one opens the folder.

    Raises:
        StateError: If the folder is in use, damaged, or of another run; names what differs.
        OutputError: If it cannot be written.
    """
    if folder is None:
        yield NoStore()
        return
    if not is_main_process():
        yield FolderStore(None)
        return
    with opened_state(folder, fingerprint, "the model as it was before pruning") as state:
        finished = sum(name.endswith(".json") for name in state.names)
        if finished:
            logger.info("Going on with a run of which %d layers are finished.", finished)
        yield FolderStore(state)


@contextmanager
def opened_state(folder: Path, fingerprint: Mapping[str, object], model: str) -> Iterator[StateFolder]:
    """Open the state of a run, new or interrupted.

    Args:
        folder: The folder.
        fingerprint: What the run's result depends on.
        model: The words for the model that an interrupted run goes on with.

    Raises:
        StateError: If the folder is in use, damaged, or of another run; names what differs.
        OutputError: If it cannot be written.
    """
    with StateFolder.opened(folder) as state:
        if state.fingerprint is None or state.is_saved:
            state.begin(fingerprint)
        check_same(folder, state.fingerprint or {}, fingerprint, model)
        yield state


def check_same(folder: Path, known: Mapping[str, object], now: Mapping[str, object], model: str) -> None:
    """Raise an error if a state was begun with something else.

    Args:
        folder: The folder of the state.
        known: The fingerprint that it was begun with.
        now: The fingerprint of the run that is asked for.
        model: The words for what an interrupted run goes on with.

    Raises:
        StateError: If they differ; names what does.
    """
    difference = describe_difference(known, now, _OPAQUE)
    if difference is not None:
        raise StateError(
            f"The state in {folder.name!r} was begun with another {difference}. Go on with what it was begun with "
            f"({model}), or remove the folder to begin anew."
        )


def forget(folder: Path, fingerprint: Mapping[str, object]) -> None:
    """Remove the state of a run whose result was saved; another run's state, or one in use, stays.

    Args:
        folder: The folder of the state.
        fingerprint: The fingerprint of the run.
    """
    try:
        with StateFolder.opened(folder) as state:
            if state.fingerprint == fingerprint:
                state.discard()
    except (StateError, OutputError) as error:
        warn_user(f"The model is saved, but the state of the run was not removed. {error}")


def forget_if_saved(folder: Path, report: PruningReport) -> bool:
    """Remove a state whose result is known to be saved, because its process ended before it could.

    Args:
        folder: The folder of the state.
        report: The report of the saved folder.

    Returns:
        Whether it was so: every layer of the report is finished in the state, with the same numbers, or the state was
        being removed.

    Raises:
        StateError: If the state is in use or damaged.
        OutputError: If it cannot be removed.
    """
    return forget_where(folder, lambda state: _has_layers(state, report))


def forget_where(folder: Path, is_result: Callable[[StateFolder], bool]) -> bool:
    """Remove the state of a run whose result is known to be saved, and return whether it was so.

    Args:
        folder: The folder of the state.
        is_result: A function that tells whether what is saved is the result of a state.

    Raises:
        StateError: If the state is in use or damaged.
        OutputError: If it cannot be removed.
    """
    with StateFolder.opened(folder) as state:
        is_begun = state.fingerprint is not None
        is_saved = not is_begun or state.is_saved or is_result(state)
        if is_begun and is_saved:
            state.discard()
    return is_saved


def _has_layers(state: StateFolder, report: PruningReport) -> bool:
    pruned = [layer for layer in report.layers if layer.pruned_channels]
    files = {layer_files(layer.layer)[1]: layer for layer in pruned}
    return set(files) <= state.names and all(
        strict_json(state.read(name), name) == json.loads(json.dumps(layer.to_dict())) for name, layer in files.items()
    )
