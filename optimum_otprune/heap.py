"""Memory that is freed goes back to the system."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # of glibc's <malloc.h>
_LARGE = 2**20  # bytes
_USUAL = 2**25  # bytes: where glibc's own adjusting ends, and is in a process that ever freed a block of that size


@contextmanager
def large_blocks_returned(is_wanted: bool = True) -> Iterator[None]:
    """A block of code in which every large block is memory of its own, which the system has back when it is freed.

    By itself glibc keeps freed blocks of up to 32 MB and, since tensors are aligned, often finds none of them fit for
    the next tensor of the same size: a run over many layers then takes more memory with every layer. Afterwards it
    keeps them again. Does nothing where the C library is another.

    Args:
        is_wanted: Whether to do anything.
    """
    if not is_wanted or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give the system back what this process has freed and glibc keeps; nothing where the C library is another."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
