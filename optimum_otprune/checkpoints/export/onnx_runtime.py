"""ONNX Runtime, which opens an exported ONNX model; nothing else imports it."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from optimum_otprune.errors import ExportError, MissingExtraError
from optimum_otprune.storage.untrusted import visible

PACKAGE = "onnxruntime"
FILE = "model.onnx"
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def onnx_runtime() -> ModuleType:
    """Return ONNX Runtime.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "An ONNX model is compared with the folder by onnxruntime, which is not installed. Install it with: "
            "pip install 'optimum_otprune[onnx]'"
        ) from error
    return onnxruntime


def logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the logits of an exported model on the CPU, with an empty cache of keys and values.

    Args:
        folder: The folder that holds `model.onnx`, as optimum-onnx names its inputs.
        ids: Token ids of one sample.

    Raises:
        ExportError: If it cannot be opened.

    Returns:
        Logits of shape (tokens, vocabulary).
    """
    library = onnx_runtime()
    errors = library.capi.onnxruntime_pybind11_state
    try:
        session = library.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    except (
        errors.Fail,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NoSuchFile,
        errors.NotImplemented,
    ) as error:
        raise ExportError(f"onnxruntime cannot open {FILE!r}: {visible(str(error), 300)}.") from error
    count = len(ids)
    known = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count)[None],
    }
    given = {
        entry.name: known[entry.name] if entry.name in known else _empty(entry.shape, _TYPES[entry.type])
        for entry in session.get_inputs()
    }
    return session.run(["logits"], given)[0][0]


def _empty(shape: Sequence[int | str], kind: type) -> np.ndarray:
    """Return keys or values of no tokens: the first dimension is the samples', other named ones are the tokens'."""
    return np.zeros(
        [1 if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(shape)], kind
    )
