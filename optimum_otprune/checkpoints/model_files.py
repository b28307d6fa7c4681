"""The files of a model and of its tokenizer: they hold what is in memory, for every loader, and nothing beyond it."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optimum_otprune.models.compatibility import usable_class, with_older_names, with_older_tokenizer
from optimum_otprune.models.modeling_code import MODELING_FILE, needed_modeling_code
from optimum_otprune.models.wrappers import has_own_code
from optimum_otprune.storage.untrusted import read_json

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"


def save_model_files(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, max_shard_size: int | str
) -> None:
    """Write weights, configurations, tokenizer and the code they need; the objects in memory do not change.

    Args:
        folder: An empty folder.
        model: The model, pruned or not.
        tokenizer: The model's tokenizer, or None.
        max_shard_size: The most bytes of one safetensors file.
    """
    with _copied_settings(model) as generation:
        _save_model(model, folder, max_shard_size)
    if generation is not None and (folder / _GENERATION).is_file():
        text = generation.to_json_string(keys_to_pop=["compile_config"])
        (folder / _GENERATION).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    of_class = {"AutoConfig": model.config, "AutoTokenizer": tokenizer, "AutoModel": model}
    custom = tuple(auto for auto, made in of_class.items() if made is not None and has_own_code(made))
    if (folder / MODELING_FILE).is_file():
        custom += ("AutoModel",)
    _edit(
        folder / _CONFIG,
        lambda values: with_readable_names(_with_code_of_its_own(values, folder, custom), type(model.config)),
    )
    _edit(folder / _TOKENIZER, lambda values: _with_code_of_its_own(values, folder, custom))
    if tokenizer is not None:
        _write_older_tokenizer(folder, tokenizer, model)


def _write_older_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Change a saved tokenizer's configuration so that older transformers read it, as the source's class if they can.

    Newer versions may build a tokenizer of that class differently than from its source. The class is therefore only
    written if it gives the very same tokenizer here, too.
    """
    file, plain = folder / _TOKENIZER, folder / "tokenizer.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    added = _added(tokenizer) if plain.is_file() else {}
    own = usable_class(_source_class(tokenizer, model), config) if plain.is_file() else None
    _edit(file, lambda _: with_older_tokenizer(config, added))
    if own is None:
        return
    wanted = _content(folder)
    _edit(file, lambda _: with_older_tokenizer(config, added, own))
    if _content(folder) != wanted:
        _edit(file, lambda _: with_older_tokenizer(config, added))


def _content(folder: Path) -> tuple[object, ...] | None:
    """Return everything in a saved tokenizer that token ids depend on, or None if it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError):  # raised by a class that does not fit tokenizer.json
        return None
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, len(tokenizer)


def _source_class(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> object:
    """Return the name of the tokenizer's class in its source, a folder or a cached repository, or None."""
    source = tokenizer.name_or_path
    revision = getattr(model.config, "_commit_hash", None) if source == model.config.name_or_path else None
    for name in (_TOKENIZER, _CONFIG):
        path = Path(source) / name
        if not Path(source).is_dir():
            try:
                cached = try_to_load_from_cache(source, name, revision=revision)
            except HFValidationError:  # a folder that is gone, or a tokenizer that was made in memory
                return None
            if not isinstance(cached, str):
                continue
            path = Path(cached)
        try:
            values = read_json(path) if path.is_file() else None
        except ValueError:
            continue  # the source was damaged since it was loaded
        if isinstance(values, dict) and values.get("tokenizer_class") is not None:
            return values["tokenizer_class"]
    return None


def _added(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bool]:
    """Return whether a tokenizer puts a beginning and an end around a text, found by tokenizing one."""
    ids = [] if tokenizer is None else tokenizer("a", verbose=False)["input_ids"]
    if tokenizer is None or not ids:
        return {}
    return {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }


def _save_model(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    """Save the model, with a modeling file if its save format needs one."""
    code = needed_modeling_code(model)
    if code is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    model.config.auto_map = code.auto_map
    # Tensors named as the modeling file has them: transformers converts older names for its own classes only.
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    (folder / MODELING_FILE).write_text(code.text, encoding="utf-8")


@contextmanager
def _copied_settings(model: PreTrainedModel) -> Iterator[GenerationConfig | None]:
    """Give a model copies of its configurations, which saving may change; yield its generation settings.

    The model gets a valid copy of the generation settings meanwhile: transformers loads sampling parameters without
    sampling, as many models have them, but refuses to save them.
    """
    config, generation = model.config, getattr(model, "generation_config", None)
    model.config = copy.deepcopy(config)
    # These have had no effect since transformers 5, which refuses to save them.
    for name in getattr(config, "_get_generation_parameters", dict)():
        model.config.__dict__.pop(name, None)
    if generation is not None:
        model.generation_config = GenerationConfig()
    try:
        yield generation
    finally:
        model.config = config
        if generation is not None:
            model.generation_config = generation


def with_readable_names(config: Mapping[str, object], kind: type[PreTrainedConfig]) -> dict[str, object]:
    """Return a model's configuration with the older names, or without, where the present transformers would misread.

    It lets `rope_scaling` replace `rope_parameters`, although that of some architectures holds less.

    Args:
        config: The content of config.json.
        kind: Class of the configuration.
    """
    older = with_older_names(config)
    wanted = _ropes(kind.from_dict(_with_floats(config)).to_dict())
    try:
        found = _ropes(kind.from_dict(_with_floats(older)).to_dict())
    except (StrictDataclassError, ValueError, TypeError, LookupError):  # what it refuses, it cannot read either
        found = None
    return older if found == wanted else dict(config)


def _with_floats(config: Mapping[str, object]) -> dict[str, Any]:
    """Return a copy with the infinities and NaN that transformers writes as `{"__float__": "Infinity"}`."""

    def with_floats(value: object) -> object:
        if isinstance(value, Mapping):
            return float(value["__float__"]) if value.keys() == {"__float__"} else _with_floats(value)
        return [with_floats(part) for part in value] if isinstance(value, list) else copy.deepcopy(value)

    return {name: with_floats(value) for name, value in config.items()}


def _ropes(config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of rotary embeddings of a configuration and of its parts."""
    parts = {
        name: _ropes(value) for name, value in config.items() if name.endswith("_config") and isinstance(value, dict)
    }
    return {**parts, "rope_parameters": config.get("rope_parameters")}


def _edit(file: Path, change: Callable[[dict[str, object]], Mapping[str, object]]) -> None:
    """Change a JSON file if it exists."""
    if file.is_file():
        values = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_code_of_its_own(values: dict[str, object], folder: Path, custom: tuple[str, ...]) -> dict[str, object]:
    """Return a configuration that points to code in its folder only, and only for classes that code defines.

    Without this, a model of a transformers class that is loaded with `trust_remote_code=True` would run the code of
    the repository that it once came from.

    Args:
        values: The content of a configuration file.
        folder: The folder of that file and of the code that was saved.
        custom: Beginnings of the names of auto classes whose object has a class of its own.
    """
    rest = {name: value for name, value in values.items() if name not in ("auto_map", "custom_pipelines")}
    auto_map = values.get("auto_map")
    kept = {}
    for auto, reference in auto_map.items() if isinstance(auto_map, dict) else ():
        several = isinstance(reference, (list, tuple))  # a slow and a fast tokenizer
        names = [
            name if name is None else str(name).rpartition("--")[2] for name in (reference if several else [reference])
        ]
        files = [folder / f"{name.split('.')[0]}.py" for name in names if name is not None]
        if auto.startswith(custom) and files and all(file.is_file() for file in files):
            kept[auto] = names if several else names[0]
    return {**rest, "auto_map": kept} if kept else rest
