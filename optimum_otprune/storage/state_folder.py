"""The folder that an interrupted run leaves behind: files that are whole or not there, each with its SHA-256.

What is in it is input like any other: names are checked, JSON is read strictly, and no file is opened that is not a
plain one. One process at a time has it.
"""

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from optimum_otprune.errors import OutputError, StateError
from optimum_otprune.storage.files import replace_file, sync, why_not_written
from optimum_otprune.storage.manifest import FileEntry
from optimum_otprune.storage.untrusted import parse_json

if sys.platform != "win32":
    import fcntl

STATE_FILE = "state.json"
LOCK_FILE = "state.lock"

_FORMAT = 1
_NAME = re.compile(
    r"(layer-[0-9]{5}\.(safetensors|json)|prepared-[0-9]{5}\.safetensors|(prepared|written|samples)\.safetensors"
    r"|recovered\.json"
    r"|step-[0-9]{7}(-[0-9]{5}\.safetensors|\.json)|logits-[0-9]{5}\.safetensors)"
)
# Files that others take the place of, or that are written anew as a whole.
_SUPERSEDED = re.compile(r"step-[0-9]{7}.*|written\.safetensors|prepared-[0-9]{5}\.safetensors")
_TEMPORARY = re.compile(r"\.[a-z0-9-]+\.(safetensors|json)\.tmp")
_LARGEST_JSON = 1 << 26


def default_state_folder(output: Path) -> Path:
    """Return the path of a hidden folder beside the output.

    Example:
        >>> default_state_folder(Path("models/llama-half")).as_posix()
        'models/.llama-half.otprune-state'
    """
    named = output if output.name not in ("", "..") else Path(os.path.abspath(output))
    return named.parent / f".{named.name}.otprune-state"


def default_logits_folder(output: Path) -> Path:
    """Return the path of a hidden folder beside the output for the dense model's predictions.

    Example:
        >>> default_logits_folder(Path("models/llama-half")).as_posix()
        'models/.llama-half.otprune-logits'
    """
    state = default_state_folder(output)
    return state.with_name(f"{state.name.removesuffix('-state')}-logits")


def state_path(given: str | os.PathLike | None) -> Path | None:
    """Return the folder that a user gave for the state of a run, with `~` expanded, or None if none was given.

    Raises:
        StateError: If it is no path, or is empty.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)) or not str(given).strip():
        raise StateError(f"The state is {given!r}, which names no folder. Give the name of one, new or of a run.")
    return Path(os.path.expanduser(given))


def has_state(folder: Path) -> bool:
    """Return whether a folder holds the state of a run."""
    return os.path.isfile(folder / STATE_FILE)


def strict_json(blob: bytes, name: str) -> object:
    """Parse JSON of a state.

    Args:
        blob: The bytes of the file.
        name: The name of the file, for the message.

    Raises:
        StateError: If the bytes are not what `parse_json` takes.
    """
    try:
        return parse_json(blob)
    except ValueError as error:
        raise StateError(f"{name!r} is damaged: {error}.") from error


class StateFolder:
    """Files by name, and a fingerprint of the run that they belong to; made by `opened`.

    Attributes:
        folder: The path of the folder.
        fingerprint: What identifies the run, or None before `begin`.
        is_saved: Whether the run's result was saved, so that nothing in the folder is needed any more.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprint: dict[str, object] | None = None
        self.is_saved = False
        self._entries: dict[str, FileEntry] = {}

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator["StateFolder"]:
        """Open a folder, made if it is not there, for this process alone; one without a run is removed at the end.

        Raises:
            StateError: If it is in use, damaged, or holds other things.
            OutputError: If it cannot be made or written.
        """
        if os.path.exists(folder) and not folder.is_dir():
            raise StateError(
                f"The state {folder.name!r} is a file. Give the name of a folder, new or of an earlier run."
            )
        if folder.is_symlink():
            raise StateError(f"The state {folder.name!r} is a link. Give the name of the folder that it leads to.")
        state = cls(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_files(folder)
        with _locked(folder):
            state._load()
            try:
                yield state
            finally:
                if state.fingerprint is None:
                    state._remove_folder()

    @property
    def names(self) -> frozenset[str]:
        """The names of the files that were written."""
        return frozenset(self._entries)

    def begin(self, fingerprint: Mapping[str, object]) -> None:
        """Write down the run that later files belong to; files of an earlier run are removed."""
        self._remove_files()
        self.fingerprint = dict(fingerprint)
        self._write_index()
        with _writing(self.folder):
            sync(self.folder.absolute().parent)

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            StateError: If it is missing or not what was written.
        """
        entry, blob = self._entries[name], _read_plain_file(self.folder / name, self._entries[name].size)
        if blob is None:
            raise StateError(f"{name!r} is missing.")
        if FileEntry(len(blob), hashlib.sha256(blob).hexdigest()) != entry:
            raise StateError(f"{name!r} has other bytes than were written.")
        return blob

    def write(self, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], instead_of: Iterable[str] = ()) -> None:
        """Write files, then note all of them at once: after a crash in between, none counts.

        Args:
            files: Bytes by name, or pairs of both, of which one is in memory at a time.
            instead_of: Names of files that are no longer needed when all are written; they are removed.

        Raises:
            OutputError: If the disk is full or the folder not writable; earlier files stay.
        """
        entries = {}
        for name, blob in files.items() if isinstance(files, Mapping) else files:
            assert _NAME.fullmatch(name), name
            self._replace(name, blob)
            entries[name] = FileEntry(len(blob), hashlib.sha256(blob).hexdigest())
        old = set(instead_of) - set(entries)
        self._entries = {name: entry for name, entry in self._entries.items() if name not in old} | entries
        self._write_index()
        with _writing(self.folder):
            for name in old:
                (self.folder / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the run's files; `opened` removes the folder if nothing else is in it."""
        self.is_saved = True
        self._write_index()  # what a crash leaves from here on is known to be of no use
        self._remove_files()

    def _remove_files(self) -> None:
        with _writing(self.folder):
            for name in (*sorted(self._entries), STATE_FILE):
                (self.folder / name).unlink(missing_ok=True)
        self.fingerprint, self.is_saved, self._entries = None, False, {}

    def _remove_folder(self) -> None:
        with _writing(self.folder):
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _load(self) -> None:
        with _writing(self.folder):
            names = {path.name for path in self.folder.iterdir()}
            for name in names:
                if _TEMPORARY.fullmatch(name):
                    (self.folder / name).unlink()
        if STATE_FILE not in names:
            return
        with self._explained():
            self._parse(strict_json(self._index_bytes(), STATE_FILE))
        with _writing(self.folder):
            for name in names - self.names:  # a crash left them before or after the index was written
                if _NAME.fullmatch(name) and _SUPERSEDED.fullmatch(name):
                    (self.folder / name).unlink()

    def _index_bytes(self) -> bytes:
        blob = _read_plain_file(self.folder / STATE_FILE, _LARGEST_JSON)
        if blob is None or len(blob) > _LARGEST_JSON:
            raise StateError(f"{STATE_FILE!r} is no plain file of a reasonable size.")
        return blob

    def _parse(self, content: object) -> None:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise StateError(f"{STATE_FILE!r} is damaged, or of another format than {_FORMAT}.")
        fingerprint, files, is_saved = (content.get(name) for name in ("fingerprint", "files", "saved"))
        if not isinstance(fingerprint, dict) or not isinstance(files, dict) or not isinstance(is_saved, bool):
            raise StateError(f"{STATE_FILE!r} is damaged: fingerprint, files or saved is of another kind.")
        self._entries = {_checked_name(name): _checked_entry(name, entry) for name, entry in files.items()}
        self.fingerprint, self.is_saved = fingerprint, is_saved

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StateError as error:
            raise StateError(
                f"The state in {self.folder.name!r} cannot be used: {error} Remove the folder to begin anew."
            ) from error

    def _write_index(self) -> None:
        content = {
            "format": _FORMAT,
            "saved": self.is_saved,
            "fingerprint": self.fingerprint,
            "files": {name: self._entries[name]._asdict() for name in sorted(self._entries)},
        }
        self._replace(STATE_FILE, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def _replace(self, name: str, blob: bytes) -> None:
        """Write to a temporary, flush it to the disk, give it its name, flush that."""
        temporary = self.folder / f".{name}.tmp"
        with _writing(self.folder):
            replace_file(self.folder / name, blob, temporary)
            sync(self.folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The state in {folder.name!r} could not be written: {why_not_written(error)}. Finished layers are kept; "
            "put that right and run again, or give another folder."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it when the process ends, however that ends."""
    if sys.platform == "win32":
        raise StateError("Interrupted runs can be resumed on POSIX systems only. Prune without `resume_from`.")
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    lock = folder / LOCK_FILE
    while True:
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StateError(
                f"The state in {folder.name!r} is in use by another process. Wait for it to end, or give another "
                "folder."
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise OutputError(
                f"The state in {folder.name!r} cannot be locked ({error.strerror}): its file system knows no locks. "
                "Give a folder on a local disk."
            ) from error
        if _is_still_named(descriptor, lock):
            return descriptor
        os.close(descriptor)  # another process has just removed the folder; what is locked has no name any more


def _is_still_named(descriptor: int, path: Path) -> bool:
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def _read_plain_file(path: Path, size: int) -> bytes | None:
    """Read at most one byte more than expected; None if the file is missing, a link, a pipe or the like."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with path.open("rb") as stream:
            return stream.read(min(size, path.lstat().st_size) + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path.name!r} cannot be read ({error.strerror}).") from error


def _refuse_other_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name != LOCK_FILE and not _TEMPORARY.fullmatch(name)]
    if others and STATE_FILE not in others:
        raise StateError(
            f"The folder {folder.name!r} holds {others[0][:80]!r} but no {STATE_FILE}, so it is not the state of a "
            "run. Give a folder that is new or empty."
        )


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise StateError(f"{STATE_FILE!r} lists {name[:80]!r}, which no run writes.")
    return name


def _checked_entry(name: str, entry: object) -> FileEntry:
    parsed = FileEntry.parse(entry)
    if parsed is None:
        raise StateError(f"{STATE_FILE!r} is damaged at {name!r}: want a size in bytes and a SHA-256 in hexadecimal.")
    return parsed
