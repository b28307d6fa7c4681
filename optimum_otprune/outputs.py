"""Where a result may be written; what would harm a user's files, or cannot be written, is refused before any work."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_otprune.errors import OutputError

_MAY_BE_NAMES = ("source_model", "calibration_data", "evaluation_data")  # of the Hub, if no such path exists
_CLOSED = ("source_model", "state", "offload_folder")  # a result inside would be mixed, or removed, with them
_SPACE_MARGIN = 1.1
_AROUND = len(".") + len(".partial-") + 16  # bytes that a hidden name beside the output has more than the output's
_INSIDE = 160  # bytes of the longest name in a saved folder, such as that of a chat template


def output_path(given: str | os.PathLike) -> Path:
    """Return the path that a user gave for a result, `~` expanded.

    Args:
        given: By the user.

    Raises:
        OutputError: If it is empty, or is no text that every system can write.
    """
    text = os.fspath(given)
    if not isinstance(text, str) or not text.strip():
        raise OutputError(f"The output is {text!r}, which names nothing. Give the name of a new file or folder.")
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

    The working folder, the home folder and the root of a file system are places that are always looked at.

    Args:
        output: File or folder of the result.
        places: Of `noted_places`.

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
                "replaced. Give the name of a new folder."
            )
        if what in _CLOSED and any(_is_same(above, place) for above in target.parents):
            raise OutputError(
                f"The output {target.name!r} lies inside the {words} ({place.name!r}), to which nothing may be added. "
                "Give the name of a new folder outside."
            )


def noted_places(**given: Any) -> dict[str, Path]:
    """Return the paths among what a user gave, absolute, so that they hold when the working folder changes.

    Args:
        **given: `source_model`, `calibration_data`, `evaluation_data`, `state`, `spill_folder` or `offload_folder`;
            what is no path, such as the name of a dataset on the Hub or a tensor, is left out.
    """
    found = {}
    for what, value in given.items():
        path = os.path.expanduser(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else ""
        if path and (os.path.exists(path) or what not in _MAY_BE_NAMES):
            found[what] = Path(os.path.realpath(path))
    return found


def _is_same(one: Path, other: Path) -> bool:
    """By identity where both exist: another spelling can name the same folder where case does not count."""
    if one == other:
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _check_name(target: Path) -> None:
    """In bytes, as the system counts: the hidden name beside the output, and the longest name in it, must fit."""
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


def check_output_folder(
    output: Path, overwrite: bool, needed_bytes: int = 0, places: Mapping[str, Path] | None = None
) -> None:
    """Raise when a folder could not be saved there; called before hours of work, too.

    Args:
        output: Where the result shall be.
        overwrite: Whether a folder that is not empty is replaced.
        needed_bytes: Expected size.
        places: See `check_place`.

    Raises:
        OutputError: See `check_place`; or if the folder is a file, a link, not empty, not writable, or on a disk
            without room.
    """
    check_place(output, places or {})
    folder = resolved_output(output)
    if folder.is_symlink() or os.path.ismount(folder):
        raise OutputError(
            f"The output {folder.name!r} is a link or a mounted folder, which cannot appear complete or not at all. "
            "Give a folder inside it."
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output {folder.name!r} is a file. Choose the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"The output folder {folder.name!r} is not empty. Choose another, or set `overwrite` to replace it."
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


def check_output_file(output: Path, overwrite: bool, places: Mapping[str, Path] | None = None) -> None:
    """Raise when a file could not be saved there.

    Args:
        output: Where the result shall be.
        overwrite: Whether a file is replaced.
        places: See `check_place`.

    Raises:
        OutputError: See `check_place`; or if it is a folder, exists already, or its folder is missing or not writable.
    """
    check_place(output, places or {})
    file = resolved_output(output)
    if file.is_dir():
        raise OutputError(f"The output {file.name!r} is a folder. Give the name of a file.")
    if file.exists() and not overwrite:
        raise OutputError(f"The output file {file.name!r} exists. Choose another, or set `overwrite` to replace it.")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"The folder {file.parent.name!r}, where {file.name!r} shall be written, is missing or read-only."
        )
