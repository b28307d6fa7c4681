"""Wherever weights and hidden states are, the result is that of a model in memory."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints.save import shard_size
from optimum_otprune.config.checks import hidden_memory
from optimum_otprune.errors import ConfigurationError, OutputError, UnsupportedModelError
from optimum_otprune.functional.importance import WeightScores
from optimum_otprune.models.devices import is_offloaded, is_spread, onloaded
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.spill import StoredList, TensorSpill, store
from tests.conftest import make_llama
from tests.passes import moments_of, scores_of

OUTSIDE = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
PLACEMENTS = ("memory", "disk", "half_disk", "auto", "cpu_offload", "hooks")
FAST = {"pruning_ratio": 0.5, "multiple_of": 1, "quality": "fast"}


def place(name, folder, offload):
    """The model of a folder where a machine without accelerators can hold it (API of accelerate 1.15)."""
    load = AutoModelForCausalLM.from_pretrained
    if name == "disk":
        return load(folder, device_map=OUTSIDE | {"model.layers": "disk"}, offload_folder=offload)
    if name == "half_disk":
        layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        return load(folder, device_map=OUTSIDE | layers, offload_folder=offload)
    if name == "auto":
        return load(folder, device_map="auto", max_memory={"cpu": "70KB"}, offload_folder=offload)
    model = load(folder)
    if name == "cpu_offload":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return dispatch_model(model, {"": "cpu"}, force_hooks=True) if name == "hooks" else model


@pytest.fixture(params=PLACEMENTS)
def placed(request, llama_folder, tmp_path):
    model = place(request.param, llama_folder, tmp_path / "offload")
    assert is_offloaded(model) == (request.param not in ("memory", "hooks"))
    assert is_spread(model) == is_offloaded(model)
    return model


RECIPES = {
    "closed_form": FAST,
    "trained": {**FAST, "reconstruction_steps": 5, "error_weighting": "gradient"},
    "gradients": {**FAST, "method": "fo_snip"},
    "fused": {**FAST, "fuse": ("gate", "up", "down")},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_placement_is_pruned_and_saved_as_a_model_in_memory(placed, recipe, tokens, tmp_path):
    for model, folder in ((placed, tmp_path / "placed"), (make_llama(), tmp_path / "plain")):
        pruner = OTPruner.from_pretrained(model, OTPruningConfig(**RECIPES[recipe]))
        pruner.prune(tokens, batch_size=5, progress=False, max_hidden_memory=0 if model is placed else "4GB")
        pruner.save_pretrained(folder)
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "placed"))
    assert plain.keys() == other.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "placed")
    with torch.no_grad():
        torch.testing.assert_close(placed(input_ids=tokens).logits, reloaded(input_ids=tokens).logits)


def test_gradients_on_every_placement_are_those_of_a_model_in_memory(placed, tokens):
    scores, expected = (scores_of(m, tokens) for m in (placed, make_llama()))
    for one, other in zip(scores, expected, strict=True):
        for found, wanted in zip((*one.snip, *one.fo), (*other.snip, *other.fo), strict=True):
            assert float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)) <= 1e-6
    moments, expected = (moments_of(m, tokens) for m in (placed, make_llama()))
    for one, other in zip(moments, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["disk", "cpu_offload"])
def test_offloaded_weights_that_are_shared_are_counted_and_saved_once(name, tokens, tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    reports = []
    for kind in ("memory", name):
        pruner = OTPruner.from_pretrained(
            place(kind, tmp_path / "dense", tmp_path / "offload"), OTPruningConfig(**FAST)
        )
        reports.append(pruner.prune(tokens, progress=False))
        pruner.save_pretrained(tmp_path / kind)
    plain, other = reports
    assert (other.parameters_before, other.parameters_after) == (plain.parameters_before, plain.parameters_after)
    assert (other.size_before, other.size_after) == (plain.size_before, plain.size_after)
    saved, expected = (load_file(tmp_path / kind / "model.safetensors") for kind in (name, "memory"))
    assert saved.keys() == expected.keys()


def test_pruned_weights_of_a_model_on_disk_go_to_disk_where_no_folder_was_given(llama_folder, tokens):
    places = OUTSIDE | {"model.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(llama_folder, device_map=places)
    pruner = OTPruner.from_pretrained(model, OTPruningConfig(**FAST, intercept="always"))
    pruner.prune(tokens, progress=False)
    store = model.model.layers[1].mlp.up_proj._hf_hook.weights_map.dataset
    assert not any("mlp" in key for key in store.state_dict)
    files = {path.name for path in Path(store.save_folder).iterdir()}
    assert {"model.layers.1.mlp.up_proj.weight.dat", "model.layers.1.mlp.down_proj.bias.dat"} <= files
    plain = OTPruner.from_pretrained(make_llama(), OTPruningConfig(**FAST, intercept="always"))
    plain.prune(tokens, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, plain.model(input_ids=tokens).logits)


def test_small_gradients_in_float16_are_not_lost():
    many = torch.randint(64, (128, 40), generator=torch.Generator().manual_seed(2))
    scores = [
        scores_of(model, many, 128)
        for model in (make_llama(initializer_range=0.02).half(), make_llama(initializer_range=0.02))
    ]
    for half, whole in zip(*scores, strict=True):
        for found, wanted in zip(half.snip, whole.snip, strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 0.005


def test_a_block_is_loaded_once_for_many_runs_and_dropped_again(llama_folder, tmp_path):
    block = ffn_blocks(place("disk", llama_folder, tmp_path / "offload"))[1]
    with onloaded(block.module):
        weights = [parameter.data_ptr() for parameter in block.module.parameters()]
        block.module(torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8)))
        assert [parameter.data_ptr() for parameter in block.module.parameters()] == weights
        assert all(parameter.device.type == "cpu" for parameter in block.module.parameters())
    assert all(parameter.device.type == "meta" for parameter in block.module.parameters())
    assert is_offloaded(block.module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32_and_keep_their_dtype(dtype, llama_folder, tokens):
    config = OTPruningConfig(**FAST, self_calibration=0)  # other samples would be written in another dtype
    for limit in (0, "1GB"):
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
        report = OTPruner.from_pretrained(model, config).prune(tokens, progress=False, max_hidden_memory=limit)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
        full = OTPruner.from_pretrained(make_llama(), OTPruningConfig(**FAST, self_calibration=0)).prune(
            tokens, progress=False
        )
        for half, whole in zip(report.layers, full.layers):
            assert half.relative_error_after_refit == pytest.approx(whole.relative_error_after_refit, abs=0.02)


def test_shards_of_offloaded_weights_are_small_unless_said_otherwise(llama, llama_folder, tmp_path):
    offloaded = place("disk", llama_folder, tmp_path / "offload")
    assert shard_size(llama, None) == "5GB"
    assert shard_size(offloaded, None) == 100_000_000
    assert shard_size(offloaded, "1GB") == 10**9


def test_tensors_above_the_limit_wait_in_files_that_go_with_them(tmp_path):
    spill = TensorSpill(limit=100, folder=tmp_path)
    tensors = [torch.randn(5, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    stored = [spill.put(tensor) for tensor in tensors]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2  # the first has 80 bytes, the second 40, the third 160
    assert spill.spilled_bytes == 40 + 160
    for entry, tensor in zip(stored, tensors):
        assert torch.equal(entry.load(), tensor)
    del stored, entry
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert spill.put(tensors[0]).load() is not None  # its memory was given back
    assert spill.spilled_bytes == 200


def test_a_stored_list_keeps_the_form_of_its_entries():
    entries = [WeightScores(torch.ones(2, 3), torch.zeros(2, 3)), WeightScores(*torch.randn(3, 2, 3))]
    for limit in (0, 10**6):
        spill = TensorSpill(limit)
        found = StoredList(store(entry, spill) for entry in entries)
        assert len(found) == 2
        assert found[0].gate is None
        assert torch.equal(found[1].gate, entries[1].gate)


def test_a_full_disk_while_spilling_is_one_error(monkeypatch, tmp_path):
    spill = TensorSpill(limit=0, folder=tmp_path / "missing")
    with pytest.raises(OutputError, match="could not be written to a temporary file .*`spill_folder`"):
        spill.put(torch.ones(3))


@pytest.mark.parametrize(
    ("limit", "message"),
    [("lots", "'lots' is no number"), (-1, "is -1; want 0 or more"), (True, "True is no number"), (0.5, "0.5 is no")],
)
def test_a_limit_that_is_no_size_is_refused(limit, message):
    with pytest.raises(ConfigurationError, match=message):
        hidden_memory(limit)


def test_a_limit_may_be_written_as_python_writes_large_numbers():
    assert hidden_memory(4e9) == hidden_memory("4GB") == 4 * 10**9


def test_layers_that_share_a_module_are_refused(llama):
    llama.model.layers[2] = llama.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="share one module"):
        ffn_blocks(llama)


def test_a_spill_folder_that_is_not_there_is_refused(llama, tokens):
    with pytest.raises(ConfigurationError, match="`spill_folder` 'nowhere' is no folder"):
        OTPruner.from_pretrained(llama, OTPruningConfig(**FAST)).prune(tokens, spill_folder="nowhere")


def test_tensors_to_be_filled_are_mapped_above_the_limit_and_leave_no_file(tmp_path):
    spill = TensorSpill(limit=50, folder=tmp_path)
    small, large = spill.empty((3, 4), torch.float32), spill.empty((10, 4), torch.float32)
    assert spill.spilled_bytes == 160
    large[:5], large[5:] = 1.0, 2.0
    assert large.sum() == 60
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    del small
    spill.empty((12,), torch.float32)
    assert spill.spilled_bytes == 160  # what the first took is free again
