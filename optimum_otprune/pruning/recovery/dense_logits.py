"""The dense model's predictions of all samples of a recovery, written to files once and read back while it trains.

So the dense model need not be in memory together with the pruned one and the state of its optimizer.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_otprune.config.recovery_options import RecoverySettings
from optimum_otprune.errors import NumericalError, StateError, warn_user
from optimum_otprune.functional.distillation import TopLogits
from optimum_otprune.models.devices import return_freed_memory
from optimum_otprune.models.inputs import vocabulary_size
from optimum_otprune.models.perplexity import windows_together
from optimum_otprune.pruning.fingerprint import dense_fingerprint, logits_fingerprint
from optimum_otprune.pruning.layer_store import to_blob
from optimum_otprune.pruning.recovery.kept_samples import SAMPLES_FILE, kept_samples, read_samples
from optimum_otprune.pruning.recovery.samples import RecoveryData, RecoverySamples, recovery_samples
from optimum_otprune.pruning.recovery.snapshots import RecoveryStore
from optimum_otprune.pruning.recovery.teacher import DenseTeacher, Teacher, logits_of
from optimum_otprune.pruning.resume import check_same, opened_state
from optimum_otprune.storage.state_folder import StateFolder

_FILE_BYTES = 2**26
_NUMBER_BYTES = 4
_WORDS = "the same dense model, text and number of tokens"


class DenseLogits(NamedTuple):
    """The place where the dense model's predictions are kept, and what they were made of.

    Attributes:
        folder: The folder of the files.
        dense: The fingerprint of the dense model, and how many logits of each token are kept.
        fingerprint: Everything that they depend on.
        logits_per_token: Number of logits of each token.
        name_or_path: Where the dense model came from.
    """

    folder: Path
    dense: Mapping[str, object]
    fingerprint: Mapping[str, object]
    logits_per_token: int
    name_or_path: str | None


def logits_bytes(num_tokens: int, logits_per_token: int) -> int:
    """Return the size of the files: log-probability and id of each logit, and two numbers more for each token.

    Args:
        num_tokens: Number of tokens of all samples.
        logits_per_token: Number of logits that are kept of each.

    Example:
        >>> logits_bytes(1_000_000, 64)
        520000000
    """
    return 2 * _NUMBER_BYTES * (logits_per_token + 1) * num_tokens


def write_logits(folder: Path, dense: PreTrainedModel, data: RecoveryData, settings: RecoverySettings) -> DenseLogits:
    """Write the dense model's largest logits of all samples; what an earlier run wrote is not written again.

    Args:
        folder: The folder, new, or of an earlier run with the same model and text.
        dense: The dense model.
        data: The text that was given; the dense model writes more.
        settings: The options, which say how many samples there are, and how many logits are kept.

    Raises:
        StateError: If the folder is in use, or of another model or text; names what differs.
        OutputError: If it cannot be written.
        NumericalError: If predictions are NaN.
    """
    dense.eval()
    most = min(settings.logits_per_token, vocabulary_size(dense) - 1)
    of_dense = {**dense_fingerprint(dense), "number of logits": most}
    fingerprint = _fingerprint(of_dense, data, settings)
    with opened_state(folder, fingerprint, _WORDS) as state:
        samples = kept_samples(state, lambda: recovery_samples(dense, data, settings))
        every = _shards(samples, most)
        hidden = not settings.progress
        for number, shard in enumerate(tqdm(every, desc="Writing logits", unit="file", disable=hidden)):
            if not _is_whole(state, _file(number)):
                windows = samples.part(shard.part)[shard.start : shard.stop]
                state.write({_file(number): to_blob(_top_logits(dense, windows, most, settings.batch_size))})
    return DenseLogits(folder, of_dense, fingerprint, most, dense.name_or_path)


def facts(dense: PreTrainedModel | DenseLogits) -> Mapping[str, object]:
    """Return the fingerprint of the dense model, or of what was kept of it."""
    return dense.dense if isinstance(dense, DenseLogits) else dense_fingerprint(dense)


@contextmanager
def asked(
    dense: PreTrainedModel | DenseLogits, data: RecoveryData, settings: RecoverySettings, store: RecoveryStore
) -> Iterator[Teacher]:
    """Yield what tells the dense model's predictions.

    Args:
        dense: The dense model, or what was kept of it.
        data: The text that was given.
        settings: The options.
        store: Where the samples of an interrupted run may be.

    Raises:
        StateError: If what was kept is not there, damaged, or of other text; names what differs.
        CalibrationDataError: If too little was given.
        ConfigurationError: If the dense model cannot write.
    """
    if isinstance(dense, PreTrainedModel):
        yield DenseTeacher(dense, store.samples(lambda: recovery_samples(dense, data, settings)))
        return
    gc.collect()  # the dense model, which was in memory until now
    return_freed_memory()
    with StateFolder.opened(dense.folder) as state:
        if state.fingerprint is None:
            raise StateError(f"The folder {dense.folder.name!r} holds no logits of the dense model. Write them again.")
        check_same(dense.folder, state.fingerprint, _fingerprint(dense.dense, data, settings), _WORDS)
        samples = read_samples(state) if SAMPLES_FILE in state.names else None
        shards = [] if samples is None else _shards(samples, dense.logits_per_token)
        if samples is None or not all(_is_whole(state, _file(number)) for number in range(len(shards))):
            raise StateError(
                f"The logits of the dense model in {dense.folder.name!r} are incomplete or damaged. Write them "
                "again into the same folder."
            )
        yield _KeptTeacher(dense, samples, shards)


class _Shard(NamedTuple):
    """The samples of one file.

    Attributes:
        part: What they are, as in `RecoverySamples.part`.
        start: The first of them.
        stop: The one behind the last.
    """

    part: str
    start: int
    stop: int


class _KeptTeacher:
    """Reads the dense model's largest logits from files, sample by sample."""

    def __init__(self, kept: DenseLogits, samples: RecoverySamples, shards: list[_Shard]):
        self.samples = samples
        self.logits_per_token: int | None = kept.logits_per_token
        self._folder = kept.folder
        self._places: dict[tuple[str, int], tuple[int, int]] = {
            (shard.part, row): (number, row - shard.start)
            for number, shard in enumerate(shards)
            for row in range(shard.start, shard.stop)
        }

    def says(self, part: str, rows: Tensor) -> TopLogits:
        """Return the largest logits behind every token of some samples; see `Teacher.says`."""
        found = [self._sample(*self._places[part, row]) for row in rows.tolist()]
        return TopLogits(*(torch.cat(parts) for parts in zip(*found)))

    def _sample(self, number: int, place: int) -> TopLogits:
        with safe_open(self._folder / _file(number), framework="pt") as file:
            return TopLogits(*(file.get_slice(name)[place : place + 1][0] for name in TopLogits._fields))


def _fingerprint(dense: Mapping[str, object], data: RecoveryData, settings: RecoverySettings) -> dict[str, object]:
    options = {name: getattr(settings, name) for name in ("num_tokens", "written_per_sample", "seed")}
    return logits_fingerprint(dense, data.tokens, options)


def _shards(samples: RecoverySamples, logits_per_token: int) -> list[_Shard]:
    found = []
    for part, tokens in samples.parts.items():
        size = max(1, _FILE_BYTES // logits_bytes(tokens.shape[1], logits_per_token))
        bounds = [(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]
        found += [_Shard(part, *pair) for pair in bounds]
    return found


def _file(number: int) -> str:
    return f"logits-{number:05d}.safetensors"


def _is_whole(state: StateFolder, name: str) -> bool:
    if name not in state.names:
        return False
    try:
        state.read(name)
    except StateError as error:
        warn_user(f"A file of the dense model's logits is damaged: {error}")
        return False
    return True


@torch.no_grad()
def _top_logits(dense: PreTrainedModel, tokens: Tensor, most: int, batch_size: int) -> dict[str, Tensor]:
    """Return the largest logits of some samples, each `(samples, seqlen, …)`."""
    seqlen = tokens.shape[1]
    targets = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    together = windows_together(batch_size, seqlen, vocabulary_size(dense), 4)
    found = []
    for batch, ids in zip(tokens.split(together), targets.split(together)):
        logits = logits_of(dense, batch).flatten(0, 1)
        found.append(TopLogits.of(logits, ids.flatten().to(logits.device), most).to(torch.device("cpu")))
    kept = TopLogits(*(torch.cat(parts) for parts in zip(*found)))
    if any(part.is_floating_point() and bool(torch.isnan(part).any()) for part in kept):
        raise NumericalError(
            "Predictions of the dense model are NaN: its weights are damaged, or its dtype overflowed. Load it in "
            "float32 (`base_options`)."
        )
    return {name: part.unflatten(0, (len(tokens), seqlen)) for name, part in kept._asdict().items()}
