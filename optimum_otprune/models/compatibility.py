"""Names that older versions of transformers read in the files of a model and newer ones no longer write."""

from collections.abc import Mapping
from pathlib import Path

from optimum_otprune.storage.untrusted import read_json

# Versions between which logits and token ids of saved folders were compared (benchmarks/compatibility.py).
OLDER_VERSION, NEWER_VERSION = "4.57", "5.23"

# `model_type` of the models that were compared.
# fmt: off
COMPARED = frozenset({
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma",
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "helium", "hunyuan_v1_dense",
    "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "opt",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
})
# fmt: on

# Layers of these attend in one of two ways, each with a base: names of the full one's and of the sliding one's.
_TWO_BASES: Mapping[str, tuple[str, str]] = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
# Architectures with names of their own for the base and for the share of each head that is rotated.
_OWN_NAMES: Mapping[str, tuple[str, str]] = dict.fromkeys(
    ("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct")
)
_ADD_BY_FIELDS = frozenset(
    {"CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer", "GPTNeoXTokenizer", "LlamaTokenizer"}
)
_CONFIG_FILE = "config.json"
# Classes that read tokenizer.json as it is in transformers 4, but for what the fields above say: others make parts of
# it anew, or add tokens of languages.
_READ_AS_IT_IS = _ADD_BY_FIELDS | {"BloomTokenizer", "CodeGenTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"}
_REMAKE_WITH_A_PREFIX = frozenset({"CodeLlamaTokenizer", "LlamaTokenizer"})  # where `add_prefix_space` is given
_NEW_CLASS, _PLAIN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # one class in newer versions
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_THREE_FIELDS = ("type", "short_factor", "long_factor")  # all that Phi-3 allowed


def with_older_names(config: Mapping[str, object]) -> dict[str, object]:
    """Return a model's configuration that also describes its rotary embedding by the names of transformers 4.

    Versions before 5 do not read `rope_parameters` and silently assume a base of 10,000. Newer ones read both, and do
    not always find the same values: see `optimum_otprune.checkpoints.model_files`.

    Args:
        config: The content of config.json, with the configurations of parts, such as `text_config`, in it.

    Example:
        >>> new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
        >>> with_older_names(new)["rope_theta"], with_older_names(new)["rope_scaling"]
        (500000.0, {'rope_type': 'linear', 'factor': 2.0})
    """
    whole = {
        name: with_older_names(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
    }
    rope, model_type = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, Mapping) or not rope:
        return whole
    if model_type in _TWO_BASES:
        return {**_of_two(rope, *_TWO_BASES[model_type]), **whole}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return whole  # no older version knows this kind
    return {**_of_one(rope, model_type, config), **whole}


def has_older_names(config: Mapping[str, object]) -> bool:
    """Return whether a saved configuration means the same to older versions as to newer ones."""
    return with_older_names(config) == config


def _of_one(rope: Mapping[str, object], model_type: str, config: Mapping[str, object]) -> dict[str, object]:
    """Return the older names and values of a rotary embedding that all layers share."""
    names = _OWN_NAMES.get(model_type, ("rope_theta", "partial_rotary_factor"))
    older = {
        name: rope[own]
        for name, own in zip(names, ("rope_theta", "partial_rotary_factor"), strict=True)
        if rope.get(own) is not None
    }
    return older | _scaling(rope, model_type, config)


def _of_two(rope: Mapping[str, object], full_name: str, sliding_name: str) -> dict[str, object]:
    """Return the older names and values where full and sliding attention differ; only the full one can be scaled."""
    full, sliding = _part(rope, "full_attention"), _part(rope, "sliding_attention")
    bases = {sliding_name: sliding.get("rope_theta"), full_name: full.get("rope_theta")}
    return {name: base for name, base in bases.items() if base is not None} | _scaling(full, "", {})


def _part(rope: Mapping[str, object], kind: str) -> Mapping[str, object]:
    part = rope.get(kind)
    return part if isinstance(part, Mapping) else {}


def _scaling(rope: Mapping[str, object], model_type: str, config: Mapping[str, object]) -> dict[str, object]:
    """Return `rope_scaling` in the form that the architecture had."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {"rope_scaling": None}  # some architectures scaled where it was left out
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if model_type == "phi3":
        trained = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        short = {"type": kind, **scaling}
        return {
            "rope_scaling": {name: short[name] for name in _THREE_FIELDS if name in short},
            "original_max_position_embeddings": trained,
        }
    return {"rope_scaling": scaling}


def with_older_tokenizer(
    config: Mapping[str, object], added: Mapping[str, bool], own_class: str | None = None
) -> dict[str, object]:
    """Return a tokenizer's configuration with a class and with fields that transformers 4 has, too.

    Args:
        config: The content of tokenizer_config.json.
        added: The fields that say whether a token is added at the beginning and at the end of a text. Some older
            classes follow these fields, or a default, where newer ones follow tokenizer.json.
        own_class: The name that replaces that of the class which only newer versions have; default: a class that
            belongs to no model.
    """
    older = dict(config)
    if older.get("tokenizer_class") == _NEW_CLASS:
        older["tokenizer_class"] = own_class or _PLAIN_CLASS
        if own_class is not None:  # by default older classes add tokens that the model may not have
            older = {**dict.fromkeys(_SPECIAL), **older}
    if str(older.get("tokenizer_class")).removesuffix("Fast") in _ADD_BY_FIELDS:
        older |= added
    if isinstance(older.get("extra_special_tokens"), list):  # a mapping before 5, where a list is an error
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older


def reads_in_older_versions(folder: Path) -> bool:
    """Return whether older versions of transformers read a saved configuration in full; True if there is none."""
    if not (folder / _CONFIG_FILE).is_file():
        return True
    try:
        config = read_json(folder / _CONFIG_FILE)
    except ValueError:
        return False  # the file is damaged
    return isinstance(config, dict) and has_older_names(config)


def usable_class(name: object, config: Mapping[str, object]) -> str | None:
    """Return the name of a tokenizer's class if transformers 4 reads tokenizer.json with it as newer versions do.

    Args:
        name: The name of the tokenizer's class in the folder that it was loaded from.
        config: The content of tokenizer_config.json, as newer versions wrote it.
    """
    if config.get("tokenizer_class") != _NEW_CLASS or not isinstance(name, str):
        return None
    kind = name.removesuffix("Fast")
    remakes = kind in _REMAKE_WITH_A_PREFIX and config.get("add_prefix_space") is not None
    return name if kind in _READ_AS_IT_IS and not remakes else None


def tested_versions(model_type: str | None, needed: str | None, saved_with: str | None, older_names: bool) -> str:
    """Return a sentence on which versions of transformers load a folder.

    Args:
        model_type: The `model_type` of the model's configuration.
        needed: The oldest version that the save format of its layers can do with, where that sets a limit.
        saved_with: The version of transformers that wrote the folder, according to the report.
        older_names: Whether the configuration has the names that older versions read.
    """
    if needed is not None:
        return f"It needs transformers {needed} or newer."
    if model_type in COMPARED and older_names:
        return (
            f"It loads with transformers {OLDER_VERSION} and newer: models of this type gave equal logits in "
            f"{OLDER_VERSION} and {NEWER_VERSION}."
        )
    untested = (
        "models of this type were not tested with older versions"
        if older_names
        else "older versions do not read all of its configuration"
    )
    return f"It was saved with transformers {saved_with or '5'}; {untested}."
