"""Checks, before any work, of where a result may be written without harm to a user's files."""

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimum_otprune.errors import IntegrityError, OutputError
from optimum_otprune.storage.manifest import INDEX_FILE, INNER_FOLDERS, MANIFEST_FILE, WEIGHTS_FILE, read_manifest
from optimum_otprune.storage.untrusted import visible, why_no_name


def partial_name(name: str, token: str) -> str:
    """Return the hidden name that a file or folder has beside its place while it is being written.

    Args:
        name: The wanted name.
        token: What tells writers apart.
    """
    return f".{name}.partial-{token}"


_MAY_BE_NAMES = (
    "source_model",
    "dense_model",
    "tokenizer",
    "calibration_data",
    "evaluation_data",
)  # of the Hub, if no such path exists
# A result inside would be mixed, or removed, with them.
_CLOSED = ("source_model", "dense_model", "state", "offload_folder")
_SPACE_MARGIN = 1.1  # times the expected size, for what is not counted: tokenizer, card, blocks of the file system
_LARGEST_JSON = 1 << 26  # bytes
TOKEN_BYTES = 8  # of the random part of a hidden folder's name
# Bytes that a hidden name beside the output has more than the output's own.
_AROUND = len(partial_name("", "0" * 2 * TOKEN_BYTES))
_INSIDE = 160  # bytes of the longest name in a saved folder, such as that of a chat template
# Mode of a hidden folder as long as it is being written. A folder that is finished has lost the sticky bit, so that an
# earlier output which took a hidden name when the new one took its place is never taken for one.
UNFINISHED_MODE = 0o1700
# What transformers writes for a model and its tokenizer, and nothing that a person or a training run does.
_MODEL_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config|"
    r"preprocessor_config|chat_template)\.json|merges\.txt|vocab\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|"
    r"chat_template\.jinja|additional_chat_templates/[^/]+\.jinja|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)
_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
_OWN_FILE = re.compile(r"otprune_\w+\.json|modeling_otprune\w*\.py|rescue\.png|README\.md")
_PARTIAL_FILE = re.compile(r"\.(.+)\.partial-\d+")  # see `partial_name`


def output_path(given: str | os.PathLike) -> Path:
    """Return the path that a user gave for a result, with `~` expanded.

    Args:
        given: The path as the user gave it.

    Raises:
        OutputError: If it is no path, is empty, or holds characters that no file name can have.
    """
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str) or not text.strip():
        raise OutputError(f"The output is {text!r:.60}, which names nothing. Give the name of a new file or folder.")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = "\0"
    if "\0" in text:
        raise OutputError("The output's name holds characters that are no text. Give a name of letters and digits.")
    return Path(os.path.expanduser(text))


def resolved_output(output: Path) -> Path:
    """Return the absolute path, links and `..` followed, except a last part that is a link itself."""
    if output.name in ("", ".."):
        return Path(os.path.realpath(output))
    return Path(os.path.realpath(output.parent)) / output.name


def check_place(output: Path, places: Mapping[str, Path]) -> None:
    """Raise where a result could replace, or would be mixed with, what is not a result.

    The working folder, the home folder and the root of a file system are always among the places.

    Args:
        output: The file or folder of the result.
        places: The places that must not be replaced, as `noted_places` returns them.

    Raises:
        OutputError: If the output is or contains one of them, lies inside one that nothing may be added to, or has a
            name that the file system cannot hold.
    """
    target = resolved_output(output)
    _check_name(target)
    if target.parent == target:
        raise OutputError("The output is the root of a file system. Give the name of a new folder.")
    everywhere = {"working_folder": Path(os.path.realpath(".")), **noted_places(home_folder="~"), **places}
    for what, place in everywhere.items():
        words = what.replace("_", " ")
        if any(_is_same(target, above) for above in (place, *place.parents)):
            raise OutputError(
                f"The output {target.name!r} is, or contains, the {words} ({place.name!r}), which must not be "
                "replaced. Choose another place."
            )
        if what in _CLOSED and any(_is_same(above, place) for above in target.parents):
            raise OutputError(
                f"The output {target.name!r} lies inside the {words} ({place.name!r}), to which nothing may be added. "
                "Choose a place outside."
            )


def noted_places(**given: object) -> dict[str, Path]:
    """Return the paths among what a user gave, absolute, so that they hold when the working folder changes.

    Args:
        **given: What the user gave as `source_model`, `dense_model`, `tokenizer`, `calibration_data`,
            `evaluation_data`, `state`, `logits`, `spill_folder` or `offload_folder`; what is no path, such as a tensor
            or the name of a dataset on the Hub, is left out.

    Raises:
        OutputError: If a name that must be a path cannot be the name of a file or folder.
    """
    found = {}
    for what, value in given.items():
        if not isinstance(value, (str, os.PathLike)):
            continue
        path = os.path.expanduser(os.fspath(value))
        reason = None if what in _MAY_BE_NAMES else why_no_name(path)
        if reason is not None:
            raise OutputError(
                f"The {what.replace('_', ' ')} is {visible(path, 60)!r}, which no file or folder can be named "
                f"({reason}). Give another name, or leave it out."
            )
        if os.path.exists(path) or what not in _MAY_BE_NAMES:
            found[what] = Path(os.path.realpath(path))
    return found


def check_outside_results(output: Path) -> None:
    """Raise where an output lies in a saved model, which then could be neither verified nor replaced as a whole.

    Args:
        output: The file or folder of the result.

    Raises:
        OutputError: If it lies in a saved model; the message names that.
    """
    for above in resolved_output(output).parents:
        is_model = os.path.isfile(above / "config.json") and any(os.path.isfile(above / name) for name in _WEIGHTS)
        if is_model or os.path.isfile(above / MANIFEST_FILE):
            raise OutputError(
                f"The output {output.name!r} lies inside {above.name!r}, which holds a saved model and would not be "
                "as it was saved any more. Choose a place outside."
            )


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same place, also if they are spelled differently."""
    if one == other:
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _check_name(target: Path) -> None:
    """Raise if the output's hidden name, or the longest path in it, has more bytes than the file system allows."""
    existing = _lowest_existing(target)
    if existing == target:
        existing = target.parent
    longest_name, longest_path = _limit(existing, "PC_NAME_MAX", 255), _limit(existing, "PC_PATH_MAX", 4096)
    names = target.relative_to(existing).parts
    for name in names:
        room = longest_name - (_AROUND if name == names[-1] else 0)
        if len(os.fsencode(name)) > room:
            raise OutputError(
                f"The name {name[:20]!r}… of the output has {len(os.fsencode(name))} bytes; this file system has room "
                f"for {room} beside what is added while it is written. Choose a shorter one."
            )
    if len(os.fsencode(target)) + _AROUND + _INSIDE >= longest_path:
        raise OutputError(
            f"The output's path has {len(os.fsencode(target))} bytes; with the files in it, it would pass the "
            f"system's limit of {longest_path}. Choose a shorter one."
        )


def _lowest_existing(path: Path) -> Path:
    return next(above for above in (path, *path.parents) if os.path.lexists(above))


def _limit(folder: Path, name: str, usual: int) -> int:
    try:
        found = os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one that does not say
        return usual
    return found if found > 0 else usual


def own_files(folder: Path, is_unfinished: bool = False) -> tuple[list[str], str | None]:
    """Say which files of a folder are ours, so that they may be replaced, and which is the first that is not.

    Ours is what the folder's manifest lists; without one, what holds a model, if it is one: configuration, weights,
    tokenizer. A link, whatever its name, a hidden file and a folder in it are not. In a hidden folder that is still
    marked as being written, every plain file is: libraries leave temporary files, and tokenizers have files of any
    name.

    Args:
        folder: The path of a folder that exists.
        is_unfinished: Whether its name is that of a folder being written, which may have no manifest yet.

    Returns:
        The names of our files, and the first name of something else, or None.
    """
    try:
        listed = {*read_manifest(folder), MANIFEST_FILE}
    except IntegrityError:
        listed = set()
    is_marked = is_unfinished and stat.S_IMODE(folder.lstat().st_mode) & 0o1777 == UNFINISHED_MODE
    own: list[str] = []
    foreign: list[str] = []
    for name, is_plain in sorted(_names(folder)):
        kept = _PARTIAL_FILE.fullmatch(name)  # of a card or report whose writing was killed
        known = kept[1] if kept else name
        if is_marked:
            is_own = True
        elif listed:
            is_own = known in listed
        else:
            is_own = bool(_MODEL_FILE.fullmatch(name) or (is_unfinished and _OWN_FILE.fullmatch(known)))
        (own if is_own and is_plain else foreign).append(name)
    is_model = "config.json" in own and any(name.endswith((".safetensors", ".bin")) for name in own)
    are_known = bool(listed) or is_unfinished or is_model
    if own and not are_known:
        return [], own[0]
    return own, foreign[0] if foreign else None


def _names(folder: Path) -> list[tuple[str, bool]]:
    """Return each name in a folder and in the folders of a saved model, and whether it is that of a plain file."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in INNER_FOLDERS and entry.is_dir(follow_symlinks=False) and not os.path.ismount(entry):
                inner = _names(folder / entry.name)
                found += [(f"{entry.name}/{name}", is_plain) for name, is_plain in inner]
            else:
                found.append((entry.name, entry.is_file(follow_symlinks=False)))
    return found


def check_output_folder(
    output: Path, overwrite: bool, needed_bytes: int = 0, places: Mapping[str, Path] | None = None
) -> None:
    """Raise if a folder could not be saved at a path; called before hours of work, too.

    Args:
        output: The folder of the result.
        overwrite: Whether a folder that is not empty is replaced.
        needed_bytes: The expected size of the folder in bytes.
        places: The places that must not be replaced, as in `check_place`.

    Raises:
        OutputError: If `check_place` or `check_outside_results` refuses the output; or if it is a file, a link, not
            empty, not writable, or on a disk without room.
    """
    check_place(output, places or {})
    check_outside_results(output)
    folder = resolved_output(output)
    if folder.is_symlink() or os.path.ismount(folder):
        raise OutputError(
            f"The output {folder.name!r} is a link or a mounted folder, which cannot appear complete or not at all. "
            "Give a folder inside it."
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output {folder.name!r} is a file. Choose the name of a folder.")
    try:
        is_empty = not folder.is_dir() or not any(folder.iterdir())
        foreign = None if is_empty else own_files(folder)[1]
    except OSError as error:
        raise OutputError(
            f"The output folder {folder.name!r} cannot be read ({error.strerror}). Choose another."
        ) from error
    if not is_empty and not overwrite:
        raise OutputError(
            f"The output folder {folder.name!r} is not empty. Choose another, or set `overwrite` "
            "(`--overwrite`) to replace it."
        )
    if foreign is not None:
        raise OutputError(
            f"The output folder {folder.name!r} holds {foreign!r}, which is no file of a saved model, so it is not "
            "replaced. Choose another folder, or move that elsewhere."
        )
    existing = _lowest_existing(folder.parent)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {existing.name!r}, where {folder.name!r} shall be written, is not writable.")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * _SPACE_MARGIN:
        raise OutputError(
            f"The disk has {free / 1e9:.1f} GB free, but the result needs about {needed_bytes / 1e9:.1f} GB. Make "
            "room, or choose another output folder."
        )


def check_results_folder(folder: Path, places: Mapping[str, Path], names: Sequence[str]) -> None:
    """Raise where a file of results and its pictures could replace, or would be mixed with, what is not theirs.

    Args:
        folder: The folder of the results, which may exist and hold other files.
        places: The places that must not be replaced, as `noted_places` returns them.
        names: Names of the files; the first is checked by its content when it is read, the others are replaced only
            beside it.

    Raises:
        OutputError: If the folder is, contains or lies in a place of the user's or a saved model, is no folder, or
            holds another file of these names.
    """
    check_place(folder, places)
    check_outside_results(folder / names[0])
    target = resolved_output(folder)
    if target.exists() and not target.is_dir():
        raise OutputError(f"The output {target.name!r} is a file. Choose the name of a folder.")
    there = [name for name in names if os.path.lexists(target / name)]
    foreign = [name for name in there if (target / name).is_symlink() or not (target / name).is_file()]
    if names[0] not in there:
        foreign = there
    if foreign:
        raise OutputError(
            f"The output folder {target.name!r} holds {foreign[0]!r}, which no earlier run of this command can have "
            "left. Choose another folder, or move that elsewhere."
        )


def check_output_file(
    output: Path, overwrite: bool, places: Mapping[str, Path] | None = None, own_keys: Sequence[str] = ()
) -> None:
    """Raise if a file could not be saved at a path.

    Args:
        output: The file of the result.
        overwrite: Whether a file that exists is replaced.
        places: The places that must not be replaced, as in `check_place`.
        own_keys: The keys of a JSON object that a file must hold to be replaced; an empty file is replaced, too.

    Raises:
        OutputError: If `check_place` refuses the output; or if it is a folder or a link, exists already, holds
            something else than may be replaced, or its folder is missing or not writable.
    """
    if os.path.isdir(output):
        raise OutputError(f"The output {resolved_output(output).name!r} is a folder. Give the name of a file.")
    check_place(output, places or {})
    file = resolved_output(output)
    if file.exists() and not overwrite:
        raise OutputError(
            f"The output file {file.name!r} exists. Choose another, or set `overwrite` (`--overwrite`) to replace it."
        )
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        raise OutputError(f"The output {file.name!r} is a link or a device. Give the name of a plain file.")
    if file.exists() and own_keys and not _holds_keys(file, own_keys):
        raise OutputError(
            f"The output file {file.name!r} holds something else than this command writes, so it is not replaced. "
            "Choose another name."
        )
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder {file.parent.name!r}, where {file.name!r} shall be written, is missing or read-only."
        )


def _holds_keys(file: Path, keys: Sequence[str]) -> bool:
    """Return whether a file is empty, or holds a JSON object with these keys."""
    if file.stat().st_size == 0:
        return True
    if file.stat().st_size > _LARGEST_JSON:
        return False
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # whatever it is, it is not ours
        return False
    return isinstance(content, dict) and all(key in content for key in keys)
