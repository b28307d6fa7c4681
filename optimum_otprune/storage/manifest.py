"""`otprune_manifest.json`: size and SHA-256 of every file of a saved folder, so that damage is not loaded."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from optimum_otprune.errors import IntegrityError
from optimum_otprune.storage.untrusted import parse_json, read_bytes

MANIFEST_FILE = "otprune_manifest.json"
CARD_FILE = "README.md"
# Any of them means that a folder has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

_FORMAT = 1
_CHUNK = 1 << 20  # bytes that are read at a time
_LONGEST_NAME = 200  # characters, which fit into the 255 bytes of a file system beside what is added while writing
_SHOWN = 80  # characters of a name from outside that a message shows
# The folders of a saved model: chat templates that a tokenizer writes, and results that the Hub reads.
INNER_FOLDERS = ("additional_chat_templates", ".eval_results")
_NAME = re.compile(rf"(({'|'.join(map(re.escape, INNER_FOLDERS))})/)?[A-Za-z0-9_][A-Za-z0-9_.\- ]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# What a loader could read although nobody listed it: it would be preferred to, or mixed with, the listed files.
_CODE = frozenset({".py", ".pyc", ".pyo", ".pyw", ".pyd", ".so", ".dll", ".dylib"})
_WEIGHT_FORMATS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".h5", ".keras", ".msgpack"}
    | {".gguf", ".ggml", ".onnx", ".onnx_data", ".data", ".ot", ".tflite", ".pt2", ".pte", ".pb", ".npy", ".joblib"}
)
_SETTINGS = frozenset({".json", ".jinja", ".model", ".tiktoken"})
_SETTINGS_NAMES = frozenset({"vocab.txt", "merges.txt"})
_NESTED_SETTINGS = re.compile(r".*(config|index|tokenizer|vocab)[^/]*\.json", re.DOTALL)
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 28  # bytes
_WEIGHTS = re.compile(r".*\.(safetensors|bin|h5|msgpack)(\.index\.json)?")


class FileEntry(NamedTuple):
    """What the manifest says of one file.

    Attributes:
        size: The file's bytes.
        sha256: Its digest in hexadecimal.
    """

    size: int
    sha256: str

    @classmethod
    def parse(cls, entry: object) -> "FileEntry | None":
        """Return the entry that a JSON value describes, or None if it is not an object with a size and a SHA-256."""
        if not isinstance(entry, dict):
            return None
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or size < 0:
            return None
        if not isinstance(sha256, str) or _DIGEST.fullmatch(sha256) is None:
            return None
        return cls(size, sha256)


def digest(file: Path) -> FileEntry:
    """Return size and SHA-256 of a file."""
    hashed, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            hashed.update(chunk)
            size += len(chunk)
    return FileEntry(size, hashed.hexdigest())


def manifest_text(entries: Mapping[str, FileEntry]) -> str:
    """Return the manifest's text, the same for the same entries."""
    content = {
        "format": _FORMAT,
        "optimum_otprune_version": version("optimum_otprune"),
        "files": {name: entries[name]._asdict() for name in sorted(entries)},
    }
    return json.dumps(content, indent=2) + "\n"


def write_manifest(folder: Path) -> Path:
    """List every file of a folder but the manifest itself.

    Args:
        folder: A folder that is complete but for the manifest.

    Returns:
        The path of the manifest.

    Raises:
        IntegrityError: If a file's name could not be listed.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = {_checked_name(name): digest(folder / name) for name in names if name != MANIFEST_FILE}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(manifest_text(entries), encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Read what a folder should hold; the file is treated as untrusted input.

    Args:
        folder: A saved folder.

    Returns:
        The entries by file name.

    Raises:
        IntegrityError: If there is no manifest, or it is damaged.
    """
    return parse_manifest(manifest_bytes(folder))


def manifest_bytes(folder: Path) -> bytes:
    """Read the manifest of a folder as it is.

    Raises:
        IntegrityError: If there is none, or it cannot be read.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise IntegrityError(
            f"There is no {MANIFEST_FILE}, so nothing can be checked. Folders that `save_pretrained` of this version "
            "wrote have one; save the model again."
        )
    with _damage_told():
        return read_bytes(file)


def parse_manifest(manifest: bytes) -> dict[str, FileEntry]:
    """Return what a manifest lists.

    Args:
        manifest: What `manifest_bytes` read.

    Returns:
        Entries by file name.

    Raises:
        IntegrityError: If it is damaged.
    """
    with _damage_told():
        content = parse_json(manifest)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or content.get("format") != _FORMAT:
        raise IntegrityError(
            f"{MANIFEST_FILE} is damaged, or of another format than {_FORMAT}. Get the folder again, or use the "
            "version of optimum_otprune that wrote it."
        )
    return {_checked_name(name): _checked_entry(name, entry) for name, entry in files.items()}


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise IntegrityError(f"{MANIFEST_FILE} is damaged: {error}. Get the folder again.") from error


def verify_folder(folder: Path) -> dict[str, FileEntry]:
    """Compare every file with the manifest.

    Files that are not listed count only where they could change how the folder loads or runs, such as a stale
    `model.safetensors`, weights of another format, code of any name, or configurations in a folder below; licenses,
    pictures, and hidden files that are no code may be added. The weights themselves must be listed.

    Args:
        folder: A saved folder.

    Returns:
        The manifest's entries.

    Raises:
        IntegrityError: If there is no manifest, it is damaged, or files are changed, missing or extra; names them.
    """
    entries = read_manifest(folder)
    problems = find_problems(folder, entries)
    if problems:
        raise IntegrityError(describe_problems(problems))
    return entries


def find_problems(folder: Path, entries: Mapping[str, FileEntry]) -> dict[str, list[str]]:
    """Return file names by what is wrong with them, which is `changed`, `missing`, `extra` or `not listed`."""
    missing = [name for name in sorted(entries) if not (folder / name).is_file()]
    changed = [
        name
        for name in sorted(entries)
        if name not in missing
        and ((folder / name).stat().st_size != entries[name].size or digest(folder / name) != entries[name])
    ]
    paths = list(folder.rglob("*"))
    extra = unlisted((path.relative_to(folder).as_posix() for path in paths if path.is_file()), entries)
    extra += [path.name for path in paths if path.is_dir() and path.is_symlink() and path.name[:1] != "."]
    not_listed = [] if missing or changed else _weights_not_listed(folder, entries)
    found = {"changed": changed, "missing": missing, "extra": extra, "not listed": not_listed}
    return {kind: names for kind, names in found.items() if names}


def _weights_not_listed(folder: Path, entries: Mapping[str, FileEntry]) -> list[str]:
    """Return weights that a loader needs and that the manifest says nothing of, whatever else it lists."""
    wanted: dict[str, set[str]] = {}
    for index in (name for name in entries if is_weights_file(name) and name.endswith(".json")):
        if entries[index].size > _LARGEST_INDEX:
            continue
        try:
            shards = json.loads((folder / index).read_bytes())["weight_map"].values()
            wanted[index] = {str(shard)[:_SHOWN] for shard in shards}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(
                f"{index} is damaged: want an object with a `weight_map` from tensors to files. Get the folder again."
            ) from error
    if not wanted.get(INDEX_FILE):
        wanted[INDEX_FILE] = {WEIGHTS_FILE}
    return sorted(set().union(*wanted.values()) - set(entries))


def check_plain(folder: Path, names: Iterable[str]) -> None:
    """Raise where a listed file is a link, or lies in a linked folder: its content would come from elsewhere.

    Args:
        folder: A saved folder.
        names: Names of files in it.

    Raises:
        IntegrityError: If a file is a link or no plain file; the message names the first one.
    """
    for name in sorted(names):
        file = folder / name
        parts = [path for path in (file, *file.parents) if path != folder and path.is_relative_to(folder)]
        if any(path.is_symlink() for path in parts) or (file.exists() and not file.is_file()):
            raise IntegrityError(
                f"{name!r} is a link or no plain file, so what it leads to could be sent. Put the file itself there."
            )


def unlisted(names: Iterable[str], entries: Mapping[str, FileEntry]) -> list[str]:
    """Return the names of files that a loader could read though the manifest does not list them."""
    return sorted(name for name in names if name not in entries and name != MANIFEST_FILE and _is_loadable(name))


def _is_loadable(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    if suffix in _CODE:
        return True
    if name.startswith("."):
        return False
    if suffix in _WEIGHT_FORMATS:
        return True
    if "/" in name and not name.startswith("additional_chat_templates/"):
        return _NESTED_SETTINGS.fullmatch(name.lower()) is not None
    return suffix in _SETTINGS or name in _SETTINGS_NAMES


def describe_problems(problems: Mapping[str, list[str]]) -> str:
    """Say in one sentence what is wrong and in one what to do."""
    parts = [
        f"{kind}: {', '.join(repr(name) for name in names[:5])}{' …' if len(names) > 5 else ''}"
        for kind, names in problems.items()
    ]
    return (
        f"The files are not those that were saved ({'; '.join(parts)}). Remove extra files, and get changed or "
        "missing ones, or a manifest that lists the weights, again."
    )


def is_weights_file(name: str) -> bool:
    """Tell whether a loader takes weights, or an index of them, from a file of this name.

    Example:
        >>> is_weights_file("model-00001-of-00002.safetensors"), is_weights_file("config.json")
        (True, False)
    """
    return "/" not in name and _WEIGHTS.fullmatch(name) is not None


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or len(name) > _LONGEST_NAME:
        raise IntegrityError(
            f"{MANIFEST_FILE} cannot list {str(name)[:_SHOWN]!r}: want the plain name of a file, without a path. Get "
            "the folder again from somebody you trust."
        )
    return name


def _checked_entry(name: str, entry: object) -> FileEntry:
    parsed = FileEntry.parse(entry)
    if parsed is None:
        raise IntegrityError(
            f"{MANIFEST_FILE} is damaged at {name!r}: want a size in bytes and a SHA-256 in hexadecimal. Get the "
            "folder again."
        )
    return parsed
