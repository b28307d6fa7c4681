"""What is saved is what is in memory, for every loader; saving changes nothing there."""

import copy
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaTokenizer,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints import model_files
from optimum_otprune.errors import ConfigurationError, UnsupportedModelError
from optimum_otprune.models.compatibility import reads_in_older_versions, with_older_names
from optimum_otprune.storage.manifest import verify_folder
from tests.conftest import make_llama

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
HALF = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast")


def saved(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize(
    "decoding",
    [
        {"temperature": 0.5, "top_p": 0.9},
        {"do_sample": False, "top_k": 7, "min_p": 0.1, "typical_p": 0.9},
        {"num_beams": 1, "length_penalty": 0.3},
        {"do_sample": True, "temperature": 0.5},
    ],
)
def test_saving_changes_nothing_in_memory_and_the_folder_decodes_alike(llama, tokenizer, tokens, tmp_path, decoding):
    for name, value in decoding.items():
        setattr(llama.generation_config, name, value)
    pruner = OTPruner.from_pretrained(llama, HALF, tokenizer=tokenizer)
    generation, tokenizer_state = llama.generation_config, copy.deepcopy(tokenizer.__dict__)
    before = (dict(llama.config.__dict__), dict(generation.__dict__), llama.state_dict())
    folder = pruner.save_pretrained(tmp_path / "out")
    assert llama.generation_config is generation
    assert (dict(llama.config.__dict__), dict(generation.__dict__)) == before[:2]
    assert {key: str(value) for key, value in tokenizer.__dict__.items()} == {
        key: str(value) for key, value in tokenizer_state.items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in decoding.items():
        assert getattr(loaded.generation_config, name) == value
    assert bool(loaded.generation_config.do_sample) is bool(decoding.get("do_sample"))
    if not decoding.get("do_sample"):
        made = [model.generate(tokens[:1], max_new_tokens=8) for model in (llama, loaded, llama)]
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])


def test_generation_parameters_in_the_models_configuration_are_no_obstacle(llama, tmp_path):
    llama.config.temperature = 0.5
    folder = OTPruner.from_pretrained(llama).save_pretrained(tmp_path / "out")
    assert llama.config.temperature == 0.5
    assert "temperature" not in saved(folder, "config.json")


def test_a_module_put_into_the_model_after_loading_is_refused_before_anything_is_written(llama, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama, HALF)
    llama.lm_head = torch.nn.Sequential(llama.lm_head)
    message = "^The weight 'lm_head.0.weight' is of shape .* could not be loaded"
    with pytest.raises(UnsupportedModelError, match=message):
        pruner.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModelError, match=message):
        OTPruner.plan(llama, HALF)
    with pytest.raises(UnsupportedModelError, match=message):
        pruner.tune(tokens, num_trials=1, progress=False)


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 20,
            },
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 20,
                },
            },
        ),
    ],
)
def test_rotary_embeddings_are_saved_under_their_older_names_too(tokens, tmp_path, rope, older):
    model = make_llama(rope_parameters=copy.deepcopy(rope))
    folder = OTPruner.from_pretrained(model).save_pretrained(tmp_path / "out")
    config = saved(folder, "config.json")
    assert config["rope_parameters"] == rope
    assert {name: config[name] for name in older} == older
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_two_rotary_embeddings_are_saved_under_their_older_names_too(tokens, tmp_path):
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 77777.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5555.0},
    }
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=copy.deepcopy(ropes),
    )
    model = Gemma3ForCausalLM(config).eval()
    folder = OTPruner.from_pretrained(model).save_pretrained(tmp_path / "out")
    config = saved(folder, "config.json")
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (77777.0, 5555.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_architectures_with_names_of_their_own_get_those():
    neox = with_older_names(GPTNeoXConfig(rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 0.5}).to_dict())
    assert (neox["rotary_emb_base"], neox["rotary_pct"], neox["rope_scaling"]) == (5e5, 0.5, None)
    long = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": [1.0], "long_factor": [2.0]}
    long["original_max_position_embeddings"] = 7
    phi3 = with_older_names({"model_type": "phi3", "rope_parameters": long})
    assert phi3["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert phi3["original_max_position_embeddings"] == 7
    assert (
        with_older_names({"text_config": {"rope_parameters": {"rope_theta": 5e5}}})["text_config"]["rope_theta"] == 5e5
    )
    unknown = {"rope_parameters": {"some": {"rope_theta": 5e5}}}
    assert with_older_names(unknown) == unknown


@pytest.mark.parametrize(
    ("make", "rope"),
    [
        (
            lambda rope: Phi3ForCausalLM(Phi3Config(**TINY, **IDS, rope_parameters=rope)),
            {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "attention_factor": 1.7}
            | {"factor": 3.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
        (
            lambda rope: ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**TINY, **IDS, rope_parameters=rope)),
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 77777.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5555.0},
            },
        ),
    ],
    ids=["phi3", "modernbert-decoder"],
)
def test_older_names_are_left_out_where_they_would_be_misread_here(tokens, tmp_path, make, rope):
    model = make(copy.deepcopy(rope)).eval()
    folder = OTPruner(model).save_pretrained(tmp_path / "out")
    assert "rope_scaling" not in saved(folder, "config.json")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not reads_in_older_versions(folder)


@pytest.mark.parametrize("adds", [False, True])
def test_the_tokenizers_class_and_fields_are_those_that_older_versions_know(llama, tokenizer, tmp_path, adds):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    folder = OTPruner.from_pretrained(llama, tokenizer=tokenizer).save_pretrained(tmp_path / "plain")
    config = saved(folder, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<extra>"]
    assert "extra_special_tokens" not in config
    text = "w1 <extra> w2"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    letters = {"<unk>": 2, "<s>": 0, "</s>": 1, "a": 3, "b": 4, "▁": 5}
    own = LlamaTokenizer(vocab=letters, merges=[], add_bos_token=adds)
    folder = OTPruner.from_pretrained(llama, tokenizer=own).save_pretrained(tmp_path / "llama")
    config = saved(folder, "tokenizer_config.json")
    assert (config["tokenizer_class"], config["add_bos_token"], config["add_eos_token"]) == (
        "LlamaTokenizer",
        adds,
        False,
    )
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == own("ab").input_ids


SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def letters_folder(folder, llama, named, kind="", **changes):
    """A dense model with a tokenizer of bytes, whose configuration names a class as older transformers wrote it."""
    vocabulary = {name: index for index, name in enumerate(["<s>", "</s>", "<unk>", "a", "b", "Ġ"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL).save_pretrained(folder)
    place = "config.json" if kind == "of the model" else "tokenizer_config.json"
    tokenizer_config = saved(folder, "tokenizer_config.json")
    tokenizer_config.pop("tokenizer_class")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / place).write_text(json.dumps({**saved(folder, place), "tokenizer_class": named, **changes}))
    return folder


@pytest.mark.parametrize(
    ("named", "kind", "changes", "expected"),
    [
        ("LlamaTokenizerFast", "", {}, "LlamaTokenizerFast"),
        ("LlamaTokenizer", "of the model", {}, "LlamaTokenizer"),
        ("LlamaTokenizer", "", {"add_prefix_space": False}, "PreTrainedTokenizerFast"),  # made anew by older versions
        ("GPT2Tokenizer", "plain", {}, "PreTrainedTokenizerFast"),  # made anew by this one, without the beginning
        ("NllbTokenizer", "plain", {}, "PreTrainedTokenizerFast"),  # older versions add languages
        ("NobodysTokenizer", "", {}, "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "", {}, "PreTrainedTokenizerFast"),
    ],
)
def test_the_class_that_the_source_names_stays_where_it_gives_the_same_token_ids(
    llama, tmp_path, named, kind, changes, expected
):
    folder = letters_folder(tmp_path / "dense", llama, named, kind, **changes)
    loader = PreTrainedTokenizerFast if kind == "plain" else AutoTokenizer
    tokenizer = loader.from_pretrained(folder)
    assert type(tokenizer).__name__ == "TokenizersBackend"
    out = OTPruner(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer).save_pretrained(tmp_path / "out")
    config = saved(out, "tokenizer_config.json")
    assert config["tokenizer_class"] == expected
    assert AutoTokenizer.from_pretrained(out)("ab a").input_ids == tokenizer("ab a").input_ids == [0, 3, 4, 5, 3]
    if named == expected:
        assert (config["add_bos_token"], config["add_eos_token"], config["pad_token"]) == (True, False, None)


def test_the_class_of_a_repository_is_read_in_the_cache_and_one_of_a_folder_that_is_gone_is_not_known(
    llama, tmp_path, monkeypatch
):
    folder = letters_folder(tmp_path / "dense", llama, "LlamaTokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = []

    def cached(repository, name, revision):
        asked.append((repository, name, revision))
        return str(folder / name)

    monkeypatch.setattr(model_files, "try_to_load_from_cache", cached)
    tokenizer.name_or_path = llama.config.name_or_path = "some/model"
    llama.config._commit_hash = "c0ffee"
    out = OTPruner(llama, tokenizer=tokenizer).save_pretrained(tmp_path / "out")
    assert saved(out, "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"
    assert asked == [("some/model", "tokenizer_config.json", "c0ffee")]
    monkeypatch.undo()
    tokenizer.name_or_path = str(tmp_path / "gone")
    out = OTPruner(llama, tokenizer=tokenizer).save_pretrained(tmp_path / "other")
    assert saved(out, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


CODE = """
from transformers import {base}
class Mine({base}):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


@pytest.fixture
def with_code(llama_folder, tmp_path, monkeypatch):
    """A folder that loads with the library's code, or with code beside it that gives other logits."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (llama_folder / "modeling_mine.py").write_text(CODE.format(base="LlamaForCausalLM"))
    config = saved(llama_folder, "config.json")
    config["auto_map"] = {
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "AutoModel": "somebody/else--modeling_other.Other",
    }
    (llama_folder / "config.json").write_text(json.dumps(config))
    tokenizer = saved(llama_folder, "tokenizer_config.json")
    tokenizer["auto_map"] = {"AutoTokenizer": ["somebody/else--tokenization_mine.Mine", None]}
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return llama_folder


def test_what_runs_on_library_code_points_to_no_other_code(with_code, tokens, tmp_path):
    pruner = OTPruner(AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=False), HALF, None)
    pruner.model.config.custom_pipelines = {"task": {"impl": "somebody/else--pipeline.Mine"}}
    pruner.prune(tokens, progress=False)
    folder = pruner.save_pretrained(tmp_path / "out")
    assert {"auto_map", "custom_pipelines"}.isdisjoint(saved(folder, "config.json"))
    for trust in (True, False):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(loaded) is type(pruner.model)
        assert torch.equal(logits(loaded, tokens), logits(pruner.model, tokens))


def test_what_runs_on_other_code_has_that_code_in_its_folder(with_code, tokens, tmp_path):
    (with_code / "tokenizer_config.json").unlink()
    (with_code / "tokenizer.json").unlink()
    pruner = OTPruner.from_pretrained(with_code, HALF, trust_remote_code=True)
    assert type(pruner.model).__name__ == "Mine"
    pruner.prune(tokens, progress=False)
    folder = pruner.save_pretrained(tmp_path / "out")
    assert saved(folder, "config.json")["auto_map"] == {"AutoModelForCausalLM": "modeling_mine.Mine"}
    assert "modeling_mine.py" in verify_folder(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(loaded, tokens), logits(pruner.model, tokens))


def test_code_that_could_not_be_saved_is_refused_before_any_work(with_code):
    model = AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True)
    type(model)._auto_class = None
    with pytest.raises(UnsupportedModelError, match="Mine is code of a repository that would not be saved"):
        OTPruner.from_pretrained(model)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [compiled, torch.nn.DataParallel, lambda model: compiled(torch.nn.DataParallel(model))],
    ids=["compiled", "parallel", "both"],
)
def test_wrapped_models_are_unwrapped(llama, wrap):
    wrapped = wrap(llama)
    assert OTPruner.from_pretrained(wrapped).model is llama
    assert OTPruner(wrapped).model is llama
    assert OTPruner.plan(wrapped, HALF).parameters_before == llama.num_parameters()


class Adapted(torch.nn.Module):
    """As peft wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.peft_config = model, {}


class Lora(torch.nn.Module):
    """As peft wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, torch.nn.ModuleDict()


def test_adapters_that_are_not_merged_are_refused(llama):
    for model in (Adapted(llama), compiled(Adapted(llama))):
        with pytest.raises(UnsupportedModelError, match=r"The model is of type Adapted, .* Merge the adapter first"):
            OTPruner.from_pretrained(model)
    llama.model.layers[1].mlp.up_proj = Lora(llama.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedModelError, match=r"first in 'model.layers.1.mlp.up_proj'.*merge_and_unload"):
        OTPruner.from_pretrained(llama)


@pytest.mark.parametrize("thing", [None, 3, b"x", ["a"], (1, 2)])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ConfigurationError, match="The model is of type .*; want a `PreTrainedModel`"):
        OTPruner.from_pretrained(thing)
    with pytest.raises(ConfigurationError, match="The model is of type"):
        OTPruner(thing)
    with pytest.raises(UnsupportedModelError, match="The model is of type Linear; want a `PreTrainedModel`"):
        OTPruner.from_pretrained(torch.nn.Linear(2, 2))
