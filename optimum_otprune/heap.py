"""Memory that is freed goes back to the system."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # of glibc's <malloc.h>
_LARGE = 2**20  # bytes


def return_large_blocks() -> None:
    """From now on, every large block of this process is memory of its own, which the system has back when it is freed.

    By itself glibc keeps freed blocks of up to 32 MB and, since tensors are aligned, often finds none of them fit for
    the next tensor of the same size: a run over many layers then takes more memory with every layer. Does nothing
    where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
