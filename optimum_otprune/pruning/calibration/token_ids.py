"""Token ids that somebody has already: arrays, tensors, lists and files of them, as NumPy arrays that stay on disk."""

import os
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from optimum_otprune.errors import CalibrationDataError

TOKEN_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")


def local_path(name: str | os.PathLike) -> Path:
    """Return the path that a name stands for, `~` expanded.

    Raises:
        CalibrationDataError: If no file can have that name; a long one is likely a text.
    """
    try:
        text = os.fspath(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError("it is empty")
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except PermissionError as error:
        raise CalibrationDataError(
            f"{path.name!r} cannot be read: permission denied. Check who may read the data."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationDataError(
            f"{str(name)!r:.60} is the name of no file ({getattr(error, 'strerror', None) or error}). Give a path, "
            "the name of a dataset, or, if it is text, a list of texts: [text]."
        ) from error
    return path


def is_id_row(value: object) -> bool:
    """Return whether a value is one row of token ids: a list or array of integers, not empty.

    Example:
        >>> is_id_row([1, 2]), is_id_row([True]), is_id_row([]), is_id_row("12")
        (True, False, False, False)
    """
    if isinstance(value, (np.ndarray, Tensor)):
        return _why_unreadable(value) is None and value.ndim == 1 and len(value) > 0 and _dtype_kind(value) in "iu"
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(entry, (int, np.integer)) and not isinstance(entry, bool) for entry in value)


def id_row(value: object, where: str) -> np.ndarray:
    """Return one row of token ids as an array `(num_tokens,)`.

    Raises:
        CalibrationDataError: If an id is beyond 64 bits.
    """
    try:
        return np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.int64)
    except OverflowError as error:
        raise CalibrationDataError(f"{where} holds a token id beyond 64 bits. Give ids of the vocabulary.") from error


def given_ids(data: object) -> np.ndarray | None:
    """Return token ids that were given as such, a matrix or a stream, in their own integer type; None for other data.

    Args:
        data: An array, tensor, or file of ids; a list of ids, or a list of lists of ids of one length.

    Raises:
        CalibrationDataError: If they are no integers, of another shape, or their file is missing or damaged.
    """
    if isinstance(data, (str, os.PathLike)):
        path = local_path(data)
        return _checked(_read(path)) if _is_token_file(path) else None
    if isinstance(data, Tensor) or (isinstance(data, np.ndarray) and data.dtype.kind not in "OUS"):
        return _checked(data)
    if isinstance(data, (list, tuple)):
        if is_id_row(data):
            return id_row(data, "The list")
        if data and all(is_id_row(row) for row in data) and len({len(row) for row in data}) == 1:
            return np.stack([id_row(row, f"Row {number}") for number, row in enumerate(data, start=1)])
    return None


def _is_token_file(path: Path) -> bool:
    return path.suffix.lower() in TOKEN_SUFFIXES and not path.is_dir()


def _dtype_kind(ids: np.ndarray | Tensor) -> str:
    """Return NumPy's letter for a kind of number: `i` and `u` are integers."""
    if isinstance(ids, np.ndarray):
        return ids.dtype.kind
    if ids.is_floating_point() or ids.is_complex() or ids.is_quantized:
        return "f"
    return "b" if ids.dtype == torch.bool else "i"


def _why_unreadable(ids: np.ndarray | Tensor) -> str | None:
    """Return the reason why an array's numbers cannot be read as they are, or None if they can."""
    if isinstance(ids, np.ndarray):
        return "masked" if isinstance(ids, np.ma.MaskedArray) else None
    if ids.is_meta:
        return "on the meta device, without values"
    return None if ids.layout == torch.strided else f"of the layout {ids.layout}"


def _checked(ids: np.ndarray | Tensor) -> np.ndarray:
    if (reason := _why_unreadable(ids)) is not None:
        raise CalibrationDataError(f"Token ids are {reason}. Give a plain array or tensor of integers.")
    if _dtype_kind(ids) not in "iu":
        raise CalibrationDataError(f"Token ids are {ids.dtype}; want integers.")
    if ids.ndim not in (1, 2) or 0 in ids.shape:
        raise CalibrationDataError(
            f"Token ids have shape {tuple(ids.shape)}; want (num_samples, seqlen), or one stream of ids, not empty."
        )
    return ids if isinstance(ids, np.ndarray) else ids.detach().cpu().numpy()


def _read(path: Path) -> np.ndarray | Tensor:
    if not path.exists():
        raise CalibrationDataError(f"The file {path.name!r} does not exist. Check the path of the calibration data.")
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        loaded = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise CalibrationDataError(
            f"{path.name} cannot be read as token ids ({type(error).__name__}: {reason}). Save "
            "one integer array or tensor; pickled objects are refused."
        ) from error
    if isinstance(loaded, dict):
        if "input_ids" not in loaded and len(loaded) != 1:
            raise CalibrationDataError(
                f"{path.name} holds the tensors {', '.join(sorted(map(str, loaded)))}; want one, or one named "
                "'input_ids'."
            )
        loaded = loaded["input_ids"] if "input_ids" in loaded else next(iter(loaded.values()))
    if not isinstance(loaded, Tensor):
        raise CalibrationDataError(f"{path.name} holds a {type(loaded).__name__}; want one tensor of token ids.")
    return loaded
