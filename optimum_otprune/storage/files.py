"""Files and folders that appear complete or not at all, in one step, and that replace nothing but what is ours."""

import ctypes
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from optimum_otprune.errors import IntegrityError, OTPruneError, OutputError, warn_user
from optimum_otprune.storage.manifest import MANIFEST_FILE, verify_folder
from optimum_otprune.storage.outputs import (
    TOKEN_BYTES,
    UNFINISHED_MODE,
    check_output_file,
    check_output_folder,
    check_place,
    own_files,
    partial_name,
    resolved_output,
)

if sys.platform != "win32":
    import fcntl

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_HERE = -100  # AT_FDCWD: paths are as they are
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # by system, file system or sandbox
_TOKEN = f"[0-9a-f]{{{2 * TOKEN_BYTES}}}"


def why_not_written(error: OSError) -> str:
    """Return the reason of a failed write in a few words."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or type(error).__name__


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write a temporary file, flush it to the disk, and give it the file's name.

    The temporary file is always a new one: a file of its name, which a killed process left or somebody planted as a
    link to a file of the user's, is removed and never written through. If the file to replace is a link, the link is
    replaced, not what it leads to.

    Args:
        file: The file to write or replace.
        content: The bytes that it shall hold.
        temporary: The temporary file, in the same folder; by default a hidden file of this process.

    Raises:
        OSError: If the file cannot be written; no temporary file stays.
    """
    temporary = temporary or file.with_name(partial_name(file.name, str(os.getpid())))
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_text(output: Path, text: str, overwrite: bool, own_keys: Sequence[str] = ()) -> None:
    """Write a text file that is complete or not there.

    Args:
        output: The file to write.
        text: The text that it shall hold.
        overwrite: Whether a file that exists is replaced.
        own_keys: The keys that a file must hold to be replaced, as in `check_output_file`.

    Raises:
        OutputError: If `check_output_file` refuses the output, or writing fails.
    """
    save_bytes(output, text.encode(), overwrite, own_keys)


def save_bytes(output: Path, content: bytes, overwrite: bool = False, own_keys: Sequence[str] = ()) -> None:
    """Write a file of any kind as `save_text` writes one of text."""
    check_output_file(output, overwrite, own_keys=own_keys)
    file = resolved_output(output)
    try:
        replace_file(file, content)
    except OSError as error:
        raise OutputError(f"The output file {file.name!r} could not be written: {error.strerror}.") from error


@contextmanager
def writing_folder(
    output: Path, overwrite: bool, needed_bytes: int, places: Mapping[str, Path] | None = None
) -> Iterator[Path]:
    """A hidden folder beside the wanted one that takes its name when everything is written, and is gone otherwise.

    Nobody sees the output half-written, and where there was one before, it is exchanged for the new one in one step.
    The folder is locked as long as this process writes it, so that no other removes it.

    Args:
        output: The wanted folder.
        overwrite: Whether a folder that holds nothing but files of ours is replaced.
        needed_bytes: The expected size of the folder in bytes.
        places: The places that must not be replaced, as in `check_place`.

    Raises:
        OutputError: If `check_output_folder` refuses the output, another process has written it meanwhile, or writing
            fails. Nothing new stays then.
    """
    check_place(output, places or {})
    recover(output)
    check_output_folder(output, overwrite, needed_bytes, places)
    target = resolved_output(output)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _new_partial(target)
    made = partial.lstat()
    try:
        with _explained(target):
            yield partial
            _make_durable(partial)
            _put_in_place(partial, target, overwrite)
    finally:
        if os.path.lexists(partial) and os.path.samestat(partial.lstat(), made):  # else it has become the output
            _remove(partial, _all_files(partial))
        if lock is not None:
            os.close(lock)


def recover(output: Path) -> None:
    """Clean up the hidden folders that a killed process left beside an output; only files of ours are removed.

    If the process died between two renames, so that there is no folder of the output's name, the new folder takes its
    place if it is complete, and the old one otherwise.

    Args:
        output: The folder that the process was to write.

    Raises:
        OutputError: If the folders cannot be renamed or removed.
    """
    target = resolved_output(output)
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(?:partial|old)-({_TOKEN})")
    with _explained(target):
        found = (pattern.fullmatch(name) for name in os.listdir(target.parent))
        tokens = sorted({match[1] for match in found if match is not None})
    for token in tokens:
        with _explained(target):
            _recover_pair(target, *(target.with_name(f".{target.name}.{kind}-{token}") for kind in ("partial", "old")))


def _recover_pair(target: Path, partial: Path, old: Path) -> None:
    try:
        lock = _lock(partial)
    except BlockingIOError:
        return  # its process is alive
    if lock is None and os.path.lexists(partial):
        return  # the file system cannot say
    try:
        if old.is_dir() and not os.path.lexists(target):
            os.rename(partial if _is_complete(partial) else old, target)
            sync(target.parent)
        for folder in (partial, old):
            if folder.is_dir() and not folder.is_symlink():
                _remove(folder, own_files(folder, is_unfinished=True)[0])
    finally:
        if lock is not None:
            os.close(lock)


def _is_complete(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except IntegrityError:
        return False
    return True


def _new_partial(target: Path) -> tuple[Path, int | None]:
    while True:
        partial = target.with_name(partial_name(target.name, secrets.token_hex(TOKEN_BYTES)))
        partial.mkdir(mode=UNFINISHED_MODE)
        try:
            lock = _lock(partial)
        except BlockingIOError:
            continue  # another process took it for abandoned before it was locked, and removes it
        if lock is not None or partial.is_dir():
            return partial, lock  # without a lock, the file system knows none, and nobody takes it for abandoned


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends; None if it cannot be locked.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # there is none, or it is a link
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.lexists(folder):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # the file system knows no locks
        pass
    os.close(descriptor)
    return None


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Give a complete folder the output's name, and take it back if the names cannot be flushed to the disk."""
    if overwrite and target.is_dir() and any(target.iterdir()):
        names, foreign = own_files(target)
        if foreign is not None:
            raise OutputError(
                f"The output folder {target.name!r} got {foreign!r} meanwhile, which is not ours, and stays as it is. "
                "Save again elsewhere; the model in memory is unharmed."
            )
        old = _replace(partial, target)
        try:
            sync(target.parent)
        except BaseException:
            if old == partial:
                _exchange(partial, target)
            else:
                _rename_both(old, target, partial)
            raise
        _remove(old, names)
        return
    if sys.platform == "win32" and target.is_dir():
        target.rmdir()
    try:
        os.rename(partial, target)  # takes the place of an empty folder, and of no other
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputError(
            f"The output folder {target.name!r} was written by somebody else meanwhile, and stays as it is. Save "
            "again elsewhere; the model in memory is unharmed."
        ) from error
    try:
        sync(target.parent)
    except BaseException:
        os.rename(target, partial)
        raise


def _replace(partial: Path, target: Path) -> Path:
    """Exchange two folders, in one step if the system can; return the path where the old one is now."""
    if _exchange(partial, target):
        return partial
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    _rename_both(partial, target, old)
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def _rename_both(new: Path, target: Path, old: Path) -> None:
    """Exchange two folders in two steps; `recover` cleans up after a process that is killed between them."""
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if not os.path.lexists(target):
            os.rename(old, target)
        raise


def _all_files(folder: Path) -> list[str]:
    """Return the names of all files in a folder that this process made."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove these files, the manifest last, and the folders that are empty then; everything else stays."""
    try:
        for name in sorted(names, key=lambda name: (name == MANIFEST_FILE, name)):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
        left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        if not left:
            folder.rmdir()
    except FileNotFoundError:
        return  # another process removes it, too
    except OSError as error:
        warn_user(f"The folder {folder.name!r} could not be removed: {error.strerror}.")
        return
    if left:
        warn_user(f"{folder.name!r} was not removed, since {left[0]!r} in it is not ours.")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OTPruneError:  # some of which are errors of the system, too
        raise
    except OSError as error:
        raise OutputError(
            f"The output folder {folder.name!r} could not be written: {why_not_written(error)}. Nothing was left "
            "there; the model in memory is unharmed, so save it again elsewhere."
        ) from error


def _make_durable(folder: Path) -> None:
    """Flush a folder to the disk, its files with the permissions of new ones (safetensors writes 0600)."""
    file_mode, folder_mode = _usual_modes(folder)
    for file in folder.rglob("*"):
        if stat.S_ISREG(file.lstat().st_mode):
            file.chmod(file_mode)
            sync(file)
    folder.chmod(folder_mode)
    sync(folder)


def _usual_modes(folder: Path) -> tuple[int, int]:
    """Return the permissions of a new file and a new folder; asking for the umask would change it in all threads."""
    file, inner = folder / f".{secrets.token_hex(8)}", folder / f".{secrets.token_hex(8)}"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.close(descriptor)
    inner.mkdir()
    modes = stat.S_IMODE(file.lstat().st_mode), stat.S_IMODE(inner.lstat().st_mode)
    file.unlink()
    inner.rmdir()
    return modes
