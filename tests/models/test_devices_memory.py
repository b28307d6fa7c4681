"""Memory that is freed is the system's again."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from pathlib import Path
from optimum_otprune.models.devices import large_blocks_returned, return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def block(size):
    pointer = libc.malloc(size)
    ctypes.memset(pointer, 1, size)
    return pointer

def grown():
    before = resident()
    blocks = [block(8_000_000) for _ in range(10)]
    last = block(2_000_000)  # above them in the heap, for no hole below is as large
    for pointer in blocks:
        libc.free(pointer)
    if sys.argv[1] == "asked for":
        return_freed_memory()
    return resident() - before

libc.free(block(33_000_000))  # glibc learns that blocks of this size come and go, and keeps them
if sys.argv[1] in ("kept", "asked for"):
    print(grown())
else:
    with large_blocks_returned():
        inside = grown()
    print(inside if sys.argv[1] == "returned" else grown())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(
    ("how", "is_returned"), [("kept", False), ("returned", True), ("afterwards", False), ("asked for", True)]
)
def test_large_blocks_are_given_back_when_they_are_freed_for_as_long_as_wanted_or_when_asked_for(how, is_returned):
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10_000_000) is is_returned
