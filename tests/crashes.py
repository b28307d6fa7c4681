"""Runs of the command line in forked processes that die, or meet a full disk, at a chosen step of writing."""

import builtins
import errno
import hashlib
import io
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import transformers.modeling_utils

from optimum_otprune.commands.main import main
from optimum_otprune.storage import files

DIED = 137
TIMEOUT = 120
STEPS = (
    (os, "replace"),
    (os, "rename"),
    (files, "_exchange"),
    (os, "fsync"),
    (transformers.modeling_utils, "safe_save_file"),
)
REMOVALS = ((os, "unlink"), (os, "rmdir"))


def forked(function: Callable[[], int]) -> int:
    """Start a copy of this process that runs a function and ends with its result, or with 1 after an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the other threads of a test worker hold no lock of ours
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(TIMEOUT)
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            code = function()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    """Wait for a process; a signal that ended it is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: object) -> int:
    """The exit code of a command line, run in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def at_each_step(react: Callable[[int], None], patch, removals: bool = True) -> None:
    """Call `react` with the number of every step of writing that this process takes from now on, before it is taken.

    Steps are renaming, exchanging, flushing, removing, and opening for writing; a file that is opened is empty then.

    Args:
        react: Called with 1, 2, …
        patch: pytest's monkeypatch.
        removals: Whether removing counts.
    """
    taken, is_reacting = [0], [False]

    def step() -> None:
        if is_reacting[0]:
            return
        taken[0] += 1
        is_reacting[0] = True
        try:
            react(taken[0])
        finally:
            is_reacting[0] = False

    def before(original):
        def stepped(*args, **kwargs):
            step()
            return original(*args, **kwargs)

        return stepped

    for owner, name in (*STEPS, *(REMOVALS if removals else ())):
        patch.setattr(owner, name, before(getattr(owner, name)))
    original = io.open

    def opened(file, mode="r", *args, **kwargs):
        stream = original(file, mode, *args, **kwargs)
        if set(mode) & set("wax+"):
            try:
                step()
            except OSError:
                stream.close()
                raise
        return stream

    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)


def die_at(number: int, patch) -> None:
    """End this process at a step as `kill -9` would."""
    at_each_step(lambda step: os._exit(DIED) if step == number else None, patch)


def full_disk_at(number: int, patch) -> None:
    """Let a step fail."""

    def react(step: int) -> None:
        if step == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    at_each_step(react, patch, removals=False)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
