"""llama.cpp through llama-cpp-python, which opens a GGUF file; nothing else imports it."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np

from optimum_otprune.errors import ExportError, MissingExtraError

PACKAGE = "llama-cpp-python"
FILE = "model.gguf"


def llama_runtime() -> ModuleType:
    """Return llama-cpp-python.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError(
            "A GGUF file is compared with the folder by llama-cpp-python, which is not installed. Install it with: "
            "pip install 'optimum_otprune[gguf]' (it compiles llama.cpp, which takes some minutes)"
        ) from error
    return llama_cpp


def logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the logits of a GGUF file on the CPU, with keys and values in float32.

    Args:
        folder: The folder that holds `model.gguf`.
        ids: Token ids of one sample.

    Raises:
        ExportError: If it cannot be opened.

    Returns:
        Logits of shape (tokens, vocabulary).
    """
    library = llama_runtime()
    exact = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32, "flash_attn": False}
    try:
        opened = library.Llama(
            str(folder / FILE), n_ctx=len(ids), logits_all=True, n_gpu_layers=0, verbose=False, **exact
        )
    except ValueError as error:  # which names the file and no reason
        raise ExportError(
            f"llama.cpp cannot open {FILE!r}: an architecture, a shape or a tokenizer that this version does not know."
        ) from error
    with closing(opened) as model:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
