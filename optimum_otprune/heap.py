"""Memory that is freed goes back to the system."""

import ctypes
import platform


def return_freed_memory() -> None:
    """Give back what was freed so far; nothing of the process's own settings changes.

    By itself glibc keeps freed blocks of up to 32 MB and, since tensors are aligned, often finds none of them fit for
    the next tensor of the same size: a run over many layers then takes more memory with every layer. Does nothing
    where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
