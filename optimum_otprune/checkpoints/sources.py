"""Name each kind of folder or configuration that cannot be pruned, with what to do about it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto

from optimum_otprune.errors import ModelLoadError
from optimum_otprune.models.auto_classes import auto_classes
from optimum_otprune.models.tasks import CAUSAL, HEADLESS, TASKS
from optimum_otprune.storage.manifest import INDEX_FILE, WEIGHTS_FILE
from optimum_otprune.storage.untrusted import visible

ADAPTER_FILE = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 10_000  # the most layers that a report may have
_SMALL = 1024  # bytes; a pointer has fewer
_DEQUANTIZE = "dequantize it by `AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)`, save that, and prune it"
_CONVERT = (
    "If you trust whoever made it, load it once by `AutoModelForCausalLM.from_pretrained(folder, "
    "use_safetensors=False)` and save it by `save_pretrained`, which writes safetensors"
)

# What names a kind of folder that has no config.json.
_OTHER_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        ADAPTER_FILE,
        "holds an adapter only. Load its base model, put the adapter in by peft, save what `merge_and_unload()` "
        "returns, and prune that",
    ),
    ("*.gguf", f"holds a GGUF file, which is made for llama.cpp: {_DEQUANTIZE}"),
    ("model_index.json", "holds a pipeline of diffusers, which is no language model"),
    ("params.json", "holds weights in their maker's own format; convert them for transformers first"),
    ("checkpoint-*", "holds checkpoints of a training. Give one of the folders in it"),
    ("*/config.json", "has no config.json, but a folder in it has. Give that one"),
)
# What stands for weights where there are no safetensors files.
_OTHER_WEIGHTS: tuple[tuple[str, str], ...] = (
    (
        "pytorch_model*.bin*",
        "has its weights in .bin files, which could run code when loaded; weights must be safetensors files. "
        + _CONVERT,
    ),
    ("*.gguf", f"has its weights in a GGUF file: {_DEQUANTIZE}"),
    ("tf_model*.h5", "has weights of TensorFlow only. Convert them with transformers 4 (`from_tf=True`)"),
    ("flax_model*.msgpack", "has weights of Flax only. Convert them with transformers 4 (`from_flax=True`)"),
    (
        "model-*-of-*.safetensors",
        f"has shards of weights, but no {INDEX_FILE} that says what is where. Download it again",
    ),
    ("model.*.safetensors", f"has weights of a variant only. Rename them to {WEIGHTS_FILE}"),
    ("adapter_model.safetensors", "has weights of an adapter only. Merge them into the base model first"),
    ("*.pt*", f"has its weights in files of torch, which could run code when loaded. {_CONVERT}"),
)


def check_folder(folder: Path, needs_weights: bool = True, may_be_quantized: bool = False) -> None:
    """Raise an error if a folder holds no model of text in safetensors files.

    Args:
        folder: A folder of this machine.
        needs_weights: Whether weights must be there besides the configuration.
        may_be_quantized: Whether they may be quantized.

    Raises:
        ModelLoadError: If there is none; the message says what the folder holds, and what to do.
    """
    if not (folder / "config.json").is_file():
        _raise_other_folder(folder)
    _check_pointers(folder)
    config = _json(folder / "config.json")
    check_config(f"The folder {folder.name!r}", config, (folder / ADAPTER_FILE).is_file(), may_be_quantized)
    if not needs_weights:
        return
    if (folder / INDEX_FILE).is_file():
        _check_shards(folder)
    elif not (folder / WEIGHTS_FILE).is_file():
        found = _first(folder, _OTHER_WEIGHTS) or "has no weights in it. Download it again"
        raise ModelLoadError(f"The folder {folder.name!r} {found}.")


def check_file(file: Path) -> None:
    """Raise an error that says that a folder is needed in place of a file.

    Raises:
        ModelLoadError: In every case; the message says what kind of file it is.
    """
    if file.suffix.lower() == ".gguf":
        raise ModelLoadError(f"{file.name!r} is a GGUF file, which is made for llama.cpp: {_DEQUANTIZE}.")
    raise ModelLoadError(f"{file.name!r} is a file. Give the folder that holds it, with its config.json.")


def check_config(what: str, config: Mapping[str, object], has_adapter: bool, may_be_quantized: bool = False) -> None:
    """Raise an error if a configuration is not of a model of text with plain weights.

    Args:
        what: The words for the model in messages.
        config: The content of config.json.
        has_adapter: Whether `ADAPTER_FILE` lies beside it.
        may_be_quantized: Whether a model is taken that is only to be run.

    Raises:
        ModelLoadError: If it is of another kind; the message names the kind, and what to do.
    """
    if has_adapter:
        raise ModelLoadError(
            f"{what} holds a model and an adapter beside it. Merge the adapter into the model (`merge_and_unload()` "
            "of peft) and prune the result, or leave the adapter's files out to prune the model without it."
        )
    _check_values(what, config)
    quantization = config.get("quantization_config")
    if quantization and not may_be_quantized:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ModelLoadError(
            f"{what} is quantized{f' ({visible(method, 60)})' if isinstance(method, str) else ''}, as its "
            "`quantization_config` says; packed weights cannot be pruned. Prune the original model, save it, and "
            "quantize the pruned one; `otprune compare` measures what that gives."
        )
    auto = loading_class(config)
    if auto not in TASKS:
        raise ModelLoadError(
            f"{what} cannot be pruned: its class is {_class_names(config)[0]} (`{auto}`), and only what one of "
            f"{', '.join(TASKS)} loads can be. Give the language model that it was made from."
        )


def loading_class(config: Mapping[str, object]) -> str:
    """Return the name of the auto class that a model is loaded by: the causal one where it fits, else its own.

    Args:
        config: The content of config.json.
    """
    auto_map = config.get("auto_map")
    if isinstance(auto_map, Mapping):
        named = [auto for auto in TASKS if auto in auto_map]
        if named:
            return named[0]
    model_type = config.get("model_type")
    found = {name: autos[0] for name in _class_names(config) if (autos := auto_classes(name))}
    can_be_causal = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    own = [auto for auto in found.values() if auto != CAUSAL and not (can_be_causal and auto in HEADLESS)]
    return own[0] if own else CAUSAL


def _class_names(config: Mapping[str, object]) -> list[str]:
    architectures = config.get("architectures")
    return [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []


def _check_values(what: str, config: Mapping[str, object]) -> None:
    """Raise an error for values that would fail deep inside Python, or build layers without an end."""
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ModelLoadError(
            f"In config.json of {what[0].lower()}{what[1:]}, `model_type` is {str(model_type)[:60]!r}; want a string "
            "such as 'llama'. Get the original file."
        )
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in _LAYER_COUNTS:
            count = part.get(name)
            if isinstance(count, (int, float)) and count > _MOST_LAYERS:
                raise ModelLoadError(
                    f"In config.json of {what[0].lower()}{what[1:]}, `{name}` is {count}; want {_MOST_LAYERS} at "
                    "most. Get the original file."
                )


def explanation(error: BaseException, local: bool, is_tokenizer: bool = False) -> str:
    """Return the reason why loading failed, and what to do, in words.

    Args:
        error: The error, from transformers, torch or code of the model's own.
        local: Whether a folder was loaded.
        is_tokenizer: Whether the tokenizer was loaded, not the model.
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return _NO_MEMORY
    if isinstance(error, PermissionError):
        return _NO_PERMISSION
    for pattern, words in _CAUSES:
        if re.search(pattern, text):
            return words
    if isinstance(error, StrictDataclassError):
        return f"its config.json does not hold what it should: {_field(text)}. Mend that field, or download it again"
    if isinstance(error, ImportError):
        return "it needs a library that is not installed. Install it, or give a model that needs none"
    if is_tokenizer and (local or not isinstance(error, OSError)):
        return (
            "one of its files, such as tokenizer_config.json or tokenizer.json, is damaged, or made for another "
            "version of transformers. Compare them with the original's, or download them again"
        )
    if isinstance(error, (NameError, AttributeError, LookupError, TypeError, ZeroDivisionError, AssertionError)):
        return (
            "the code that builds it failed, as it does where config.json holds a value that it does not know, or "
            "where a library is missing or of another version. Compare config.json with the original's"
        )
    if local:
        return "transformers could not read it. Compare its files with the original's, or download it again"
    return (
        "either it does not exist (or is private and needs `token`), or the Hub cannot be reached. Offline, give a "
        "local folder, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
    )


_TRUST = "Read it, then pass `trust_remote_code=True` (`--trust-remote-code`)"
_NO_MEMORY = (
    "there is not enough memory for it. Give a smaller `dtype`, or `device_map='auto'` with `max_memory` and "
    "`offload_folder`, or take a machine with more"
)
_NO_PERMISSION = "this user may not read one of its files. Change the file's permissions, or copy it"
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"out of memory|not enough memory|[Cc]an(?:no|')t allocate memory", _NO_MEMORY),
    (r"Permission denied", _NO_PERMISSION),
    (
        r"not compiled with \w+ enabled|[Nn]o NVIDIA driver|[Nn]o \w+ GPUs|invalid device ordinal|"
        r"not linked with support|[Cc]annot access accelerator device",
        "`device_map` (`--device`) names a device that this machine, or its build of torch, does not have. Leave it "
        "out, or give one that is there",
    ),
    (
        "per-layer attribute",
        "its layers differ in width, which the code of transformers cannot build. Read the modeling file in it, then "
        "pass `trust_remote_code=True` (`--trust-remote-code`)",
    ),
    (r"trust_remote_code|custom code", f"it needs code that lies beside it. {_TRUST}"),
    (
        "Unrecognized configuration class",
        f"it is no causal language model: `{CAUSAL}` has no class for its model type. Only causal language models "
        "can be pruned",
    ),
    (
        r"[Ss]hould have a `model_type`|model type `None`",
        "its config.json names no `model_type`. Get the original one",
    ),
    (
        "does not recognize this architecture",
        "its `model_type` is unknown to this version of transformers. Upgrade transformers, or give a model that it "
        "knows",
    ),
    (
        "have a file named config.json",
        "it has no config.json, so it is no model of transformers: perhaps an adapter only (merge it into its base "
        f"model first), or a GGUF file ({_DEQUANTIZE})",
    ),
    (
        r"pytorch_model\.bin|no file named model\.safetensors|does not appear to have a file named model",
        f"it has no weights in safetensors files, and others could run code when loaded. {_CONVERT}",
    ),
)


def _field(text: str) -> str:
    """Return the field that a type check complains of, and its message, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return visible(re.sub(r"^\w*Error: ", "", lines[1] if len(lines) > 1 else lines[0]))


def _raise_other_folder(folder: Path) -> None:
    if not any(folder.iterdir()):
        raise ModelLoadError(f"The folder {folder.name!r} is empty, so it holds no model. Download it again.")
    found = _first(folder, _OTHER_FOLDERS)
    if found is None:
        found = "has no config.json, so it holds no model. Give the folder that `save_pretrained` wrote"
    raise ModelLoadError(f"The folder {folder.name!r} {found}.")


def _first(folder: Path, kinds: tuple[tuple[str, str], ...]) -> str | None:
    """Return the words for the first kind of file that is in the folder, or None."""
    return next((words for pattern, words in kinds if any(folder.glob(pattern))), None)


def _check_pointers(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".model") and file.is_file() and file.stat().st_size < _SMALL:
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise ModelLoadError(
                        f"{file.name} in {folder.name!r} is a git-lfs pointer, not the file itself. Run `git lfs "
                        "pull` there, or download it by `hf download`."
                    )


def _check_shards(folder: Path) -> None:
    """Raise an error if a shard is missing or outside the folder: the loader would follow `../other`."""
    weight_map = _json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelLoadError(
            f"{INDEX_FILE} in {folder.name!r} is damaged: want an object with a `weight_map` from tensors to files. "
            "Download it again."
        )
    shards = sorted(set(weight_map.values()))
    strange = [shard for shard in shards if Path(shard).name != shard or "\\" in shard]
    if strange:
        raise ModelLoadError(
            f"{INDEX_FILE} in {folder.name!r} names a file outside the folder: {strange[0][:60]!r}. Get the model "
            "from somebody you trust."
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelLoadError(
            f"The folder {folder.name!r} lacks {len(missing)} of the {len(shards)} files of weights that {INDEX_FILE} "
            f"lists, such as {missing[0][:60]!r}. Download it again."
        )


def _json(file: Path) -> dict[str, object]:
    blob = file.read_bytes()
    if blob.startswith(_BYTE_ORDER_MARK):
        raise ModelLoadError(
            f"{file.name} in {file.parent.name!r} begins with a byte-order mark, which transformers does not read. "
            "Save it as UTF-8 without one."
        )
    try:
        values = json.loads(blob.decode("utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ModelLoadError(
            f"{file.name} in {file.parent.name!r} is damaged: it is no JSON object. Download it again."
        )
    return values
