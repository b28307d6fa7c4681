"""OpenVINO, which opens a model that was exported for it; nothing else imports it."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from optimum_otprune.errors import ExportError, MissingExtraError
from optimum_otprune.storage.untrusted import visible

PACKAGE = "openvino"
FILE = "openvino_model.xml"
# By default the CPU computes in bfloat16 where it can, and keeps keys and values in 8 bits, which would be compared.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def openvino_runtime() -> ModuleType:
    """Return OpenVINO.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            "An OpenVINO model is compared with the folder by openvino, which is not installed. Install it with: "
            "pip install 'optimum_otprune[openvino]'"
        ) from error
    return openvino


def logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the logits of an exported model on the CPU in float32, with an empty cache of keys and values.

    Args:
        folder: The folder that holds `openvino_model.xml`, as optimum-intel names its inputs.
        ids: Token ids of one sample.

    Raises:
        ExportError: If it cannot be opened.

    Returns:
        Logits of shape (tokens, vocabulary).
    """
    core = openvino_runtime().Core()
    try:
        model = core.compile_model(core.read_model(folder / FILE), "CPU", _EXACT)
    except RuntimeError as error:
        raise ExportError(f"openvino cannot open {FILE!r}: {visible(str(error), 300)}.") from error
    count = len(ids)
    given = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return model({entry.any_name: given[entry.any_name] for entry in model.inputs})["logits"][0]
