"""Tensors that wait on the CPU: in memory up to a limit, beyond it in files that are mapped when they are read."""

import copy
import itertools
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_otprune.errors import OutputError
from optimum_otprune.models.defaults import HIDDEN_MEMORY

_CHUNK = 2**24  # bytes


class StoredTensor:
    """One tensor, in memory or in a file, until the last reference to it is gone."""

    def __init__(self, tensor: Tensor, spill: "TensorSpill"):
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._spill = spill  # the object that owns the folder, kept alive by this reference
        size = tensor.numel() * tensor.element_size()
        self._tensor: Tensor | None = tensor
        self._path: Path | None = None
        if spill.reserve(size):
            weakref.finalize(self, spill.free, size)
        elif size:
            self._tensor, self._path = None, spill.write(tensor)
            weakref.finalize(self, self._path.unlink, missing_ok=True)

    def load(self) -> Tensor:
        """Return the tensor; one from a file is mapped, and takes memory only while it is referred to."""
        if self._path is None:
            assert self._tensor is not None
            return self._tensor
        mapped = torch.from_file(str(self._path), shared=False, size=self._shape.numel(), dtype=self._dtype)
        return mapped.view(self._shape)


class TensorSpill:
    """A place where tensors wait, in memory or in files.

    Args:
        limit: Bytes of all tensors together that are kept in memory.
        folder: The folder in which a temporary folder is made for the other tensors; default: the system's.
    """

    def __init__(self, limit: int = HIDDEN_MEMORY, folder: Path | None = None):
        self.limit = self._left = limit
        self._parent = folder
        self._folder: Path | None = None
        self._names = itertools.count()
        self.spilled_bytes = 0

    def put(self, tensor: Tensor) -> StoredTensor:
        """Keep a tensor; it may be on any device.

        Raises:
            OutputError: If it has to be written and cannot be.
        """
        return StoredTensor(tensor.detach().cpu().contiguous(), self)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor to be filled, in memory or mapped to a file that goes with it.

        Raises:
            OutputError: If there is no room for the file.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self.reserve(size) or not size:
            tensor = torch.empty(tuple(shape), dtype=dtype)
            weakref.finalize(tensor, self.free, size)
            return tensor
        # Zeros are written first: on a full disk that is an error, but filling a mapping is a signal that kills.
        path = self._file(bytes(min(_CHUNK, size - start)) for start in range(0, size, _CHUNK))
        mapped_file = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        path.unlink()
        self.spilled_bytes += size
        return mapped_file.view(tuple(shape))

    def reserve(self, size: int) -> bool:
        """Take bytes of the memory that is left, if there are as many."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def free(self, size: int) -> None:
        """Give bytes of memory back."""
        self._left += size

    def write(self, tensor: Tensor) -> Path:
        """Write a tensor's bytes into a new file."""
        self.spilled_bytes += tensor.numel() * tensor.element_size()
        return self._file([tensor.flatten().view(torch.uint8).numpy().data])

    def _file(self, parts: Iterable[bytes | memoryview]) -> Path:
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="otprune-", dir=self._parent))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            path = self._folder / str(next(self._names))
            with path.open("wb") as file:
                for part in parts:
                    file.write(part)
        except OSError as error:
            raise OutputError(
                f"Hidden states could not be written to a temporary file ({error.strerror}). Make room, choose "
                "another `spill_folder`, or raise `max_hidden_memory`."
            ) from error
        return path


class StoredList(Sequence):
    """A list of tensors, or of named tuples of them, whose entries are read when they are asked for.

    Args:
        entries: The entries, made by `store`.
    """

    def __init__(self, entries: Iterable[Any]):
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return mapped(self._entries[index], lambda part: part.load())


def store(value: Any, spill: TensorSpill) -> Any:
    """Return a tensor, or a named tuple of tensors, with each replaced by where it is stored."""
    return mapped(value, spill.put)


def mapped(value: Any, function: Callable[[Any], Any], leaves: tuple[type, ...] = (Tensor, StoredTensor)) -> Any:
    """Return nested containers with a function applied to the leaves in them; other objects stay the same.

    Mappings other than dictionaries are copied, so that later writes do not reach the given ones.

    Args:
        value: A leaf, or tuples, named ones too, lists and dictionaries of leaves.
        function: The function to apply to each leaf.
        leaves: The types that count as leaves.
    """
    if isinstance(value, leaves):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, function, leaves) for part in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(part, function, leaves) for part in value)
    if type(value) is dict:
        return {name: mapped(part, function, leaves) for name, part in value.items()}
    return copy.copy(value) if isinstance(value, Mapping) else value
