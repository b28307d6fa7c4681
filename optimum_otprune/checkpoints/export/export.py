"""Export a saved folder by the program of another format; what computes something else does not count."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from optimum_otprune.checkpoints.check_loading import check_loading_options
from optimum_otprune.checkpoints.export import llama_runtime, onnx_runtime, openvino_runtime
from optimum_otprune.checkpoints.export.tools import arguments, find_tool, run_tool
from optimum_otprune.checkpoints.load import load_checkpoint
from optimum_otprune.checkpoints.sources import check_folder, loading_class
from optimum_otprune.config.options_file import CONFIG_FILE
from optimum_otprune.errors import ExportError, UnsupportedModelError
from optimum_otprune.models.defaults import EXPORT_TYPES
from optimum_otprune.models.devices import weight_bytes
from optimum_otprune.models.tasks import CAUSAL
from optimum_otprune.pruning.report import REPORT_FILE
from optimum_otprune.storage.files import writing_folder
from optimum_otprune.storage.manifest import write_manifest
from optimum_otprune.storage.outputs import noted_places
from optimum_otprune.storage.untrusted import read_json

EXPORT_FILE = "otprune_export.json"
_TOKENS = 16  # that are compared
# The most that a logit may differ, as a share of the largest one: twice or more what rounding to such weights does to
# SmolLM2 of 30 layers (float16 0.2 %, 8 bits 4 %). A wrong rotation does more; at 8 bits, a small bias may do less.
_LIMITS: Mapping[str, float] = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 0.1, "int8": 0.1}
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class Runtime(NamedTuple):
    """How the program that runs a format is asked for logits.

    Attributes:
        package: The name of its package.
        check: Raises an error where it is not installed.
        logits: Returns the logits of the model in a folder, shape (tokens, vocabulary), for token ids.
    """

    package: str
    check: Callable[[], object]
    logits: Callable[[Path, Sequence[int]], np.ndarray]


RUNTIMES: Mapping[str, Runtime] = {
    "gguf": Runtime(llama_runtime.PACKAGE, llama_runtime.llama_runtime, llama_runtime.logits),
    "onnx": Runtime(onnx_runtime.PACKAGE, onnx_runtime.onnx_runtime, onnx_runtime.logits),
    "openvino": Runtime(openvino_runtime.PACKAGE, openvino_runtime.openvino_runtime, openvino_runtime.logits),
}


class Export(NamedTuple):
    """What was exported, and how near it is to the folder.

    Attributes:
        target: The format.
        kind: The type of the weights in it.
        runtime: The program that opened it, with its version.
        largest_difference: The largest difference of a logit from that of the folder in float32.
        largest_logit: The largest logit of the folder, without its sign.
        same_tokens: At how many positions both find the same next token the most likely.
        num_tokens: The number of positions.
    """

    target: str
    kind: str
    runtime: str
    largest_difference: float
    largest_logit: float
    same_tokens: int
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.runtime} opens it: the largest difference of a logit is {self.largest_difference:.2g} where the "
            f"largest logit is {self.largest_logit:.3g}, and {self.same_tokens} of {self.num_tokens} next tokens are "
            "the same."
        )


def export_folder(
    folder: Path, target: str, output: Path, kind: str | None = None, tool: str | None = None, overwrite: bool = False
) -> Export:
    """Write a saved folder in another format, if the program that reads that format computes the same.

    Nothing but a result that passed the comparison is left.

    Args:
        folder: A saved causal language model, pruned or not.
        target: `gguf`, `onnx` or `openvino`.
        output: The folder to write.
        kind: The type of the weights; None is the folder's own, or float32 where the format is not written with that.
        tool: The path of the program that writes the format; None looks for it.
        overwrite: Whether a folder that an earlier export wrote is replaced.

    Returns:
        What was written, with the comparison.

    Raises:
        MissingExtraError: If the program that reads the format is not installed.
        ExportError: If the one that writes it is not found or fails, or the result differs too much.
        UnsupportedModelError: If the folder holds another kind of model, layers of different widths, or weights that
            are quantized.
        ModelLoadError: If the folder cannot be loaded.
        OutputError: If the output cannot be written.
    """
    runtime = RUNTIMES[target]
    runtime.check()
    program = find_tool(target, tool)
    _check_source(folder)
    model = load_checkpoint(str(folder), check_loading_options({"dtype": "auto"})).model
    chosen = _chosen(target, kind, model.dtype)
    ids, size = _ids(model.config.get_text_config().vocab_size), weight_bytes(model)
    with torch.no_grad():
        wanted = model.float()(torch.tensor([ids])).logits[0].numpy()
    del model
    with writing_folder(output, overwrite, size, noted_places(source_model=str(folder))) as partial:
        run_tool(program, arguments(target, folder.resolve(), partial, chosen))
        found = _compared(runtime.logits(partial, ids), wanted)
        result = Export(target, chosen, f"{runtime.package} {version(runtime.package)}", *found, len(ids))
        if not result.largest_difference <= _LIMITS[chosen] * result.largest_logit:  # NaN is not either
            raise ExportError(
                f"What {program.name!r} wrote computes something else than the folder: {result} Nothing was kept. Try "
                "another version of it."
            )
        for name in (CONFIG_FILE, REPORT_FILE):
            if (folder / name).is_file():
                (partial / name).write_bytes((folder / name).read_bytes())
        text = json.dumps({"source": folder.resolve().name, **result._asdict()}, indent=2) + "\n"
        (partial / EXPORT_FILE).write_text(text, encoding="utf-8")
        write_manifest(partial)
    return result


def _check_source(folder: Path) -> None:
    """Raise an error for a folder that other programs do not read, before anything is loaded.

    Raises:
        ModelLoadError: If it is no folder of a saved model.
        UnsupportedModelError: If its model is of a kind that is not exported.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or loading_class(config) != CAUSAL:
        raise UnsupportedModelError("This is no causal language model; others are not exported.")
    if config.get("per_layer_config"):
        raise UnsupportedModelError(
            "The layers of this model have different widths, which the other programs do not read. Prune it with "
            "`non_uniform_format='pad'`, or with one width for all layers."
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError("This model is quantized already. Export the one that it was made from.")


def _chosen(target: str, kind: str | None, dtype: torch.dtype) -> str:
    own = _TYPES.get(str(dtype).removeprefix("torch."))
    if kind is not None:
        return kind
    return own if own in EXPORT_TYPES[target] else "f32"


def _ids(vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_TOKENS,), generator=generator).tolist()


def _compared(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float, int]:
    """Return the largest difference, the largest logit, and the number of equal next tokens.

    Raises:
        ExportError: If the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ExportError(
            f"The exported model's logits have shape {found.shape}; want {wanted.shape}. Nothing was kept."
        )
    difference = np.abs(found.astype(np.float64) - wanted).max()
    same = (found.argmax(-1) == wanted.argmax(-1)).sum()
    return float(difference), float(np.abs(wanted).max()), int(same)
