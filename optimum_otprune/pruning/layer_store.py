"""Finished layers: kept nowhere, or in a state folder from which an interrupted run goes on."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from optimum_otprune.errors import ReportError, StateError, warn_user
from optimum_otprune.functional.ffn import FFNWeights
from optimum_otprune.models.distributed import from_main
from optimum_otprune.models.spill import StoredList, TensorSpill, store
from optimum_otprune.pruning.preparation import (
    Expected,
    LayerPart,
    Prepared,
    WrittenText,
    from_layer,
    from_shared,
    layer_tensors,
    shared_tensors,
)
from optimum_otprune.pruning.report import LayerReport
from optimum_otprune.storage.state_folder import StateFolder, strict_json

Value = TypeVar("Value")
Shapes = Mapping[str, tuple[int, ...]]

PREPARED_FILE, WRITTEN_FILE = "prepared.safetensors", "written.safetensors"
_WRITTEN = "input_ids"


class FinishedLayer(NamedTuple):
    """The result of pruning one layer.

    Attributes:
        weights: The weights to install.
        report: The report of the layer.
    """

    weights: FFNWeights
    report: LayerReport


class LayerStore(Protocol):
    """The place where a run finds layers that an earlier one finished, and puts its own."""

    def prepared(self, make: Callable[[], Prepared], expected: Callable[[], Expected], spill: TensorSpill) -> Prepared:
        """Return the preparation of an earlier run, or make it now."""
        ...

    def written(self, make: Callable[[], Tensor], text: WrittenText) -> Tensor:
        """Return the samples that the model wrote in an earlier run, or let it write them now."""
        ...

    def finished(self, layer: int, dense: FFNWeights, width: int) -> FinishedLayer | None:
        """Return a layer that was pruned to this width before, or None."""
        ...

    def save(self, finished: FinishedLayer) -> None:
        """Keep a layer."""
        ...


class NoStore:
    """Keeps nothing."""

    def prepared(self, make: Callable[[], Prepared], expected: Callable[[], Expected], spill: TensorSpill) -> Prepared:
        """Make the preparation, which is not kept."""
        return make()

    def written(self, make: Callable[[], Tensor], text: WrittenText) -> Tensor:
        """Let the model write; the samples are not kept."""
        return make()

    def finished(self, layer: int, dense: FFNWeights, width: int) -> FinishedLayer | None:
        """Return None, since no layer is kept."""
        return None

    def save(self, finished: FinishedLayer) -> None:
        """Do nothing."""


class WrittenOnce(NoStore):
    """Keeps, in memory, nothing but what the dense model wrote, for several runs from the same model."""

    def __init__(self) -> None:
        self._texts: dict[WrittenText, Tensor] = {}

    def written(self, make: Callable[[], Tensor], text: WrittenText) -> Tensor:
        """Return the samples of an earlier run, or let the model write them now."""
        if text not in self._texts:
            self._texts[text] = make()
        return self._texts[text]


class FolderStore:
    """Keeps everything in a state folder; damaged results are computed again, with a warning.

    Of several processes, the main one has the folder, and the others get from it what it finds there.

    Args:
        state: Opened, and begun with this run's fingerprint; None in processes that are not the main one.
    """

    def __init__(self, state: StateFolder | None):
        self._state = state

    def prepared(self, make: Callable[[], Prepared], expected: Callable[[], Expected], spill: TensorSpill) -> Prepared:
        """Return the preparation in the folder, or make it and put it there."""
        found = self._prepared(expected, spill)
        if found is not None:
            return found
        made = make()
        if self._state is not None:
            self._state.write(_prepared_files(made), instead_of=(WRITTEN_FILE,))  # which it contains
        return made

    def _prepared(self, expected: Callable[[], Expected], spill: TensorSpill) -> Prepared | None:
        """Return the preparation in the folder, whose layers wait as those of a new one would."""
        if not from_main(self._state is not None and PREPARED_FILE in self._state.names):
            return None
        wanted, problem = expected(), "is damaged and made again"

        def read(state: StateFolder) -> Prepared:
            return from_shared(from_blob(state.read(PREPARED_FILE)), wanted)

        found, parts = self._found(read, {PREPARED_FILE}, f"The file {PREPARED_FILE!r} of", problem), []
        for layer, shapes in enumerate(wanted.shapes if found is not None else ()):
            if not shapes:
                continue
            name = prepared_file(layer)

            def read_layer(state: StateFolder, name: str = name, shapes: Shapes = shapes) -> LayerPart:
                return from_layer(from_blob(state.read(name)), shapes)

            part = self._found(read_layer, {name}, f"The file {name!r} of", problem)
            if part is None:
                return None
            parts.append(store(part, spill))
        if found is None or not parts:
            return found
        has_scores, has_moments = parts[0].scores is not None, parts[0].moments is not None
        return found._replace(
            scores=StoredList(part.scores for part in parts) if has_scores else None,
            moments=StoredList(part.moments for part in parts) if has_moments else None,
        )

    def written(self, make: Callable[[], Tensor], text: WrittenText) -> Tensor:
        """Return the samples in the folder, or let the model write them and put them there."""

        def read(state: StateFolder) -> Tensor:
            found = from_blob(state.read(WRITTEN_FILE)).get(_WRITTEN)
            if found is None or not text.fits(found):
                raise StateError(f"{WRITTEN_FILE!r} holds other samples than this run writes.")
            return found

        what = "Samples that the model wrote in"
        found = self._found(read, {WRITTEN_FILE}, what, "are damaged and written again")
        if found is not None:
            return found
        made = make()
        if self._state is not None:
            self._state.write({WRITTEN_FILE: to_blob({_WRITTEN: made})})
        return made

    def finished(self, layer: int, dense: FFNWeights, width: int) -> FinishedLayer | None:
        """Return a layer's weights and report, or None where they are not there or damaged."""
        weights_file, report_file = layer_files(layer)

        def read(state: StateFolder) -> FinishedLayer:
            weights = _weights(from_blob(state.read(weights_file)), dense, width)
            report = _report(strict_json(state.read(report_file), report_file), layer, dense, width)
            return FinishedLayer(weights, report)

        return self._found(read, {weights_file, report_file}, f"Layer {layer} of", "is damaged and done again")

    def save(self, finished: FinishedLayer) -> None:
        """Write a layer's weights and report."""
        if self._state is None:
            return
        weights_file, report_file = layer_files(finished.report.layer)
        report = json.dumps(finished.report.to_dict(), sort_keys=True, allow_nan=False) + "\n"
        self._state.write({weights_file: to_blob(dict(finished.weights.items())), report_file: report.encode()})

    def _found(self, read: Callable[[StateFolder], Value], files: set[str], what: str, problem: str) -> Value | None:
        """Return, in all processes, what the main one reads; None, with a warning if it is damaged."""
        found = None
        if self._state is not None and files <= self._state.names:
            try:
                found = read(self._state)
            except StateError as error:
                warn_user(f"{what} the interrupted run {problem}: {error}")
        return from_main(found)


def _prepared_files(prepared: Prepared) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of the files of a preparation: what is shared, then each layer's own, one at a time."""
    yield PREPARED_FILE, to_blob(shared_tensors(prepared))
    for layer in range(len(prepared.widths)):
        tensors = layer_tensors(prepared.part(layer))
        if tensors:
            yield prepared_file(layer), to_blob(tensors)


def prepared_file(layer: int) -> str:
    """Return the name of the file of a layer's gradient scores and moments.

    Example:
        >>> prepared_file(17)
        'prepared-00017.safetensors'
    """
    return f"prepared-{layer:05d}.safetensors"


def layer_files(layer: int) -> tuple[str, str]:
    """Return the names of the files of a layer's weights and report.

    Example:
        >>> layer_files(17)
        ('layer-00017.safetensors', 'layer-00017.json')
    """
    return f"layer-{layer:05d}.safetensors", f"layer-{layer:05d}.json"


def to_blob(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    # Cloned because safetensors refuses tensors that share memory.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def from_blob(blob: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        StateError: If the bytes are none.
    """
    try:
        return load(blob)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StateError("It is no safetensors file that this version can read.") from error


def _weights(tensors: Mapping[str, Tensor], dense: FFNWeights, width: int) -> FFNWeights:
    """Return the weights, checked against the dense layer; a bias may have been added."""
    n, d = width, dense.hidden_size
    shapes = {"up": (n, d), "down": (d, n), "gate": (n, d), "up_bias": (n,), "gate_bias": (n,), "down_bias": (d,)}
    needed = {name for name, _ in dense.items()}
    if not needed <= set(tensors) <= set(shapes) or ("gate" in tensors) != (dense.gate is not None):
        raise StateError("It lacks weights of this layer, or has others.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise StateError(f"{name!r} has the shape {tuple(tensor.shape)} or is no floating-point tensor.")
        if not torch.isfinite(tensor).all():
            raise StateError(f"{name!r} is not finite.")
    return FFNWeights(**tensors)


def _report(values: object, layer: int, dense: FFNWeights, width: int) -> LayerReport:
    """Return the report, checked to hold the right kinds of numbers for this layer and these widths."""
    unknown: list[str] = []
    try:
        report = LayerReport.read(values, "layer", unknown)
    except ReportError as error:
        raise StateError("It is no report of a layer.") from error
    sizes = (report.layer, report.intermediate_size_before, report.intermediate_size_after)
    if unknown or sizes != (layer, dense.intermediate_size, width):
        raise StateError("It is no report of this layer.")
    return report
