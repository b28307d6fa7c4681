"""Each thing that is no model to prune is named, with what to do about it."""

import json
import shutil

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DebertaV2Config, LlamaForSequenceClassification

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints import load as loading
from optimum_otprune.checkpoints.sources import explanation
from optimum_otprune.errors import ConfigurationError, ModelLoadError
from tests.conftest import make_llama
from tests.models.test_contract import build


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def without_weights(folder, *names):
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"x")


def emptied(folder, *names):
    shutil.rmtree(folder)
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")


def save(model, folder):
    shutil.rmtree(folder)
    model.save_pretrained(folder)


FOLDERS = {
    "leftovers of GPTQ": (
        lambda folder: edit(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"'dense' is quantized \(gptq\).*Prune the original model",
    ),
    "leftovers of AWQ": (
        lambda folder: edit(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        r"'dense' is quantized \(awq\)",
    ),
    "a width in words": (
        lambda folder: edit(folder, hidden_size="128"),
        r"config.json does not hold what it should: Field 'hidden_size' expected int, got str \(value: '128'\)",
    ),
    "heads that do not divide": (
        lambda folder: edit(folder, num_attention_heads=5),
        r"does not hold what it should: The hidden size \(32\) is not a multiple",
    ),
    "no heads": (lambda folder: edit(folder, num_attention_heads=0), "the code that builds it failed"),
    "an unknown activation": (lambda folder: edit(folder, hidden_act="foo"), "the code that builds it failed"),
    "no model type": (lambda folder: edit(folder, model_type=None), "names no `model_type`"),
    "an unknown model type": (lambda folder: edit(folder, model_type="foo"), "Upgrade transformers"),
    "code without trust": (
        lambda folder: edit(folder, model_type="foo", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
        "needs code that lies beside it.*`trust_remote_code=True`",
    ),
    "a model for multiple choice": (
        lambda folder: edit(folder, model_type="bert", architectures=["BertForMultipleChoice"]),
        r"cannot be pruned: its class is BertForMultipleChoice \(`AutoModelForMultipleChoice`\)",
    ),
    "deberta": (
        lambda folder: (DebertaV2Config().save_pretrained(folder), edit(folder, architectures=None)),
        "`AutoModelForCausalLM` has no class for its model type",
    ),
    "a .bin file": (
        lambda folder: without_weights(folder, "pytorch_model.bin"),
        "weights must be safetensors files.*use_safetensors=False.*save_pretrained",
    ),
    "GGUF weights": (lambda folder: without_weights(folder, "a.gguf"), "weights in a GGUF file: dequantize it"),
    "TensorFlow": (lambda folder: without_weights(folder, "tf_model.h5"), "weights of TensorFlow only"),
    "Flax": (lambda folder: without_weights(folder, "flax_model.msgpack"), "weights of Flax only"),
    "no weights": (without_weights, "has no weights in it"),
    "shards without an index": (
        lambda folder: without_weights(folder, "model-00001-of-00002.safetensors"),
        "shards of weights, but no model.safetensors.index.json",
    ),
    "a variant": (lambda folder: without_weights(folder, "model.fp16.safetensors"), "weights of a variant only"),
    "an index without shards": (
        lambda folder: (
            without_weights(folder),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        ),
        "lacks 1 of the 1 files of weights .* such as 'model-1.safetensors'",
    ),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "model.safetensors in 'dense' is a git-lfs pointer.*git lfs pull",
    ),
    "a model and an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds a model and an adapter beside it. Merge.*`merge_and_unload\(\)`",
    ),
    "an adapter only": (lambda folder: emptied(folder, "adapter_config.json"), "holds an adapter only"),
    "a GGUF file only": (lambda folder: emptied(folder, "a.gguf"), "made for llama.cpp: dequantize it"),
    "a pipeline": (lambda folder: emptied(folder, "model_index.json"), "a pipeline of diffusers"),
    "checkpoints": (lambda folder: emptied(folder, "checkpoint-5/config.json"), "checkpoints of a training"),
    "a folder above": (lambda folder: emptied(folder, "model/config.json"), "but a folder in it has"),
    "nothing": (emptied, "'dense' is empty"),
    "something": (lambda folder: emptied(folder, "thesis.tex"), "has no config.json, so it holds no model"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json in 'dense' is damaged"),
    "a list for a model type": (
        lambda folder: edit(folder, model_type=["a"]),
        r"In config.json of the folder 'dense', `model_type` is .* want a string",
    ),
    "more layers than there are": (
        lambda folder: edit(folder, num_hidden_layers=200_000),
        "`num_hidden_layers` is 200000; want 10000 at most",
    ),
    "a padding token outside the vocabulary": (
        lambda folder: edit(folder, pad_token_id=1_000_000),
        "the code that builds it failed.*Padding_idx",
    ),
    "a byte-order mark": (
        lambda folder: (folder / "config.json").write_text("{}", encoding="utf-8-sig"),
        "config.json in 'dense' begins with a byte-order mark",
    ),
    "damaged weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 2000),
        "^The weights of the folder 'dense' are damaged",
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "^The tokenizer of the folder 'dense' could not be loaded: .*such as tokenizer_config.json",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json in 'dense' is damaged"),
}


@pytest.mark.figure("R6")
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", FOLDERS)
def test_each_kind_of_folder_that_is_no_model_is_named(llama_folder, kind):
    damage, message = FOLDERS[kind]
    damage(llama_folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        OTPruner.from_pretrained(llama_folder)
    assert "/dense" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "`device_map`.* names a device that this machine"),
        (MemoryError(), "not enough memory for it"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory for it",
        ),
        (torch.OutOfMemoryError("CUDA"), "not enough memory for it"),
        (PermissionError(13, "Permission denied"), "this user may not read one of its files"),
    ],
    ids=repr,
)
def test_what_the_machine_lacks_is_not_blamed_on_the_files(llama_folder, monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loading.transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelLoadError, match=words):
        OTPruner.from_pretrained(llama_folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bogus"}, "`dtype` is 'bogus'; want 'auto'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'; want"),
        ({"dtype": 3}, "`dtype` is 3; want"),
        ({"dtype": "float8_e4m3fn"}, "`dtype` is 'float8_e4m3fn'; want 'auto', or .* of 16 bits or more"),
        ({"trust_remote_code": "yes"}, "`trust_remote_code` is 'yes'; want True or False"),
        ({"revision": 5}, "`revision` is 5; want a string or None"),
        ({"cache_dir": 5}, "`cache_dir` is 5; want a string or a path or None"),
        ({"token": ["secret"]}, "`token` is of type list; want a string or True or False or None"),
        ({"device_map": "bogus"}, "'bogus' is no device"),
        ({"device_map": {"": -1}}, "-1 is no device"),
        ({"max_memory": {"cpu": "abc"}}, r"`max_memory\['cpu'\]`"),
        ({"max_memory": 5}, "`max_memory` is 5; want a dictionary"),
        ({"devicemap": "cpu"}, "Unknown option 'devicemap'. Did you mean 'device_map'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("use", [OTPruner.from_pretrained, OTPruner.plan])
def test_a_wrong_option_is_told_as_what_it_is(llama_folder, use, options, words):
    with pytest.raises(ConfigurationError, match=words):
        use(llama_folder, **options)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="'model.gguf' is a GGUF file.*gguf_file="):
        OTPruner.from_pretrained(tmp_path / "model.gguf")


def test_a_plan_needs_no_weights_but_a_model_of_text(llama_folder):
    (llama_folder / "model.safetensors").unlink()
    assert OTPruner.plan(llama_folder, {"pruning_ratio": 0.5, "multiple_of": 1}).parameters_before > 0
    edit(llama_folder, model_type="bert", architectures=["BertForMultipleChoice"])
    with pytest.raises(ModelLoadError, match="AutoModelForMultipleChoice"):
        OTPruner.plan(llama_folder, {"pruning_ratio": 0.5, "multiple_of": 1})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NameError("name 'QuantizeConfig' is not defined"), "the code that builds it failed"),
        (AttributeError("no attribute"), "the code that builds it failed"),
        (ImportError("No module named 'flash_attn'"), "needs a library that is not installed"),
        (StrictDataclassFieldValidationError("x", TypeError("Field 'x' expected int")), "Field 'x' expected int"),
        (OSError("user/x does not appear to have a file named config.json"), "perhaps an adapter only"),
        (OSError("no file named model.safetensors found"), "save_pretrained"),
        (RuntimeError("something else"), "transformers could not read it. Compare its files"),
    ],
)
def test_causes_have_words_of_their_own_and_the_unknown_ones_honest_ones(error, words, llama_folder, monkeypatch):
    assert words in explanation(error, local=True)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loading.transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelLoadError) as caught:
        OTPruner.from_pretrained(llama_folder)
    assert words in str(caught.value)
    assert "safetensors" not in explanation(RuntimeError("something else"), local=True)


def test_a_model_of_the_hub_that_is_quantized_or_has_an_adapter_is_named(llama_folder, tmp_path):
    snapshot = tmp_path / "hub" / "models--user--dense" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    llama_folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="The model 'user/dense' holds a model and an adapter"):
        OTPruner.from_pretrained("user/dense", cache_dir=tmp_path / "hub")
    (snapshot / "adapter_config.json").unlink()
    edit(snapshot, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelLoadError, match=r"The model 'user/dense' is quantized \(gptq\)"):
        OTPruner.from_pretrained("user/dense", cache_dir=tmp_path / "hub")
    with torch.no_grad(), pytest.raises(ModelLoadError, match="is quantized"):
        OTPruner.plan("user/dense", cache_dir=tmp_path / "hub")


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForSequenceClassification(make_llama(pad_token_id=0).config),
        lambda: build("modernbert"),
        lambda: build("bart"),
        lambda: build("gemma3"),
    ],
)
def test_a_folder_is_loaded_and_saved_as_the_class_that_it_came_from(make, tokens, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "dense")
    pruner = OTPruner.from_pretrained(
        tmp_path / "dense", OTPruningConfig(pruning_ratio=0.5, multiple_of=1, quality="fast", self_calibration=0)
    )
    assert type(pruner.model) is type(model)
    auto = pruner.prune(tokens, progress=False).auto_class
    folder = pruner.save_pretrained(tmp_path / "pruned")
    assert type(getattr(transformers, auto).from_pretrained(folder)) is type(model)
    assert f"{auto}.from_pretrained(" in (folder / "README.md").read_text(encoding="utf-8")
    assert OTPruner.from_pretrained(folder).report.auto_class == auto
