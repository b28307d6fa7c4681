"""A run goes on with its own state only, and to the same bits whatever its method asks of the dense model first."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.errors import StateError
from optimum_otprune.pruning import fingerprint, pipeline, preparation
from tests.conftest import make_llama
from tests.models.test_contract import build
from tests.models.test_distributed import run_two


class Stopped(Exception):
    """Stands for whatever ends a process."""


def make_pruner(model=None, **options):
    fast = {"quality": "fast", "reconstruction_steps": 0, "pruning_ratio": 0.5, "multiple_of": 1}
    return OTPruner.from_pretrained(make_llama() if model is None else model, OTPruningConfig(**{**fast, **options}))


def prune(pruner, tokens, folder, functions=None, **arguments):
    pruner.prune(tokens, progress=False, resume_from=folder, **arguments, **(functions or {}))
    return pruner


def stop_before(layer):
    """Replaces what prunes one layer."""
    original = pipeline.prune_layer

    def stopped(block, *arguments, **options):
        if block.layer == layer:
            raise Stopped
        return original(block, *arguments, **options)

    return stopped


def interrupt(pruner, tokens, folder, layer, functions=None):
    """End a run before a layer, if that one is pruned at all."""
    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(pipeline, "prune_layer", stop_before(layer))
        prune(pruner, tokens, folder, functions)


def assert_same(one, other):
    assert one.report == other.report
    states = one.model.state_dict(), other.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def importance_of_ones_own(statistics):
    return statistics.weights.down.square().sum(dim=0).flip(0)


importance_of_ones_own.requires = ("activations",)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "functions"),
    [
        ({"allocation": "adaptive"}, {}),
        ({"allocation": "adaptive", "non_uniform_format": "per_layer_config", "skip_layers": [1]}, {}),
        ({"reconstruction_steps": 5, "error_weighting": "gradient"}, {}),
        ({"self_calibration": 4}, {}),
        ({"method": "fo_snip", "aggregation": "absolute"}, {}),
        ({"method": "structured_afr_with_intrafusion"}, {}),
        ({"method": "random"}, {}),
        ({"intercept": "always", "method": "flap"}, {}),
        ({"selection": "top"}, {"importance": "custom"}),
    ],
    ids=lambda value: ",".join(f"{name}={part}" for name, part in value.items()),
)
def test_an_interrupted_run_ends_in_the_same_bits_as_a_straight_one(
    options, functions, layer, tokens, tmp_path, monkeypatch, record_figure
):
    model = "gpt2" if options.get("method") == "flap" else "llama"
    functions = dict.fromkeys(functions, importance_of_ones_own)

    def pruner():
        return make_pruner(build(model), **options)

    straight = pruner()
    straight.prune(tokens, progress=False, **functions)
    interrupt(pruner(), tokens, tmp_path / "state", layer, functions)
    for name in ("layer_gradients", "adaptive_widths", "written_samples"):
        monkeypatch.setattr(preparation, name, None)  # what the dense model was asked for is not asked again
    assert_same(prune(pruner(), tokens, tmp_path / "state", functions), straight)
    record_figure("R9, resumed against straight")


def test_what_the_dense_model_wrote_is_kept_before_it_is_asked_for_gradients(tokens, tmp_path, monkeypatch):
    def pruner():
        return make_pruner(method="fo_snip", self_calibration=0.5)

    straight = prune(pruner(), tokens, tmp_path / "straight")

    def stopped(*arguments):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "layer_gradients", stopped)
        with pytest.raises(Stopped):
            prune(pruner(), tokens, tmp_path / "state")
    assert (tmp_path / "state" / "written.safetensors").is_file()
    shutil.copytree(tmp_path / "state", tmp_path / "damaged")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "written_samples", None)
        assert_same(prune(pruner(), tokens, tmp_path / "state"), straight)
    assert not (tmp_path / "state" / "written.safetensors").exists()  # it is part of the preparation
    (tmp_path / "damaged" / "written.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="wrote in the interrupted run are damaged and written again"):
        assert_same(prune(pruner(), tokens, tmp_path / "damaged"), straight)


def test_a_resumed_run_does_not_save_what_it_found_again_and_saving_removes_the_state(tokens, tmp_path, monkeypatch):
    prune(make_pruner(), tokens, tmp_path / "state")
    monkeypatch.setattr(pipeline, "prune_layer", stop_before(0))
    monkeypatch.setattr("optimum_otprune.storage.state_folder.StateFolder.write", None)
    pruner = prune(make_pruner(), tokens, tmp_path / "state")
    pruner.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_preparation_that_is_damaged_is_made_again(tokens, tmp_path):
    straight = prune(make_pruner(allocation="adaptive"), tokens, tmp_path / "state")
    (tmp_path / "state" / "prepared.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="'prepared.safetensors' of the interrupted run is damaged and made again"):
        again = prune(make_pruner(allocation="adaptive"), tokens, tmp_path / "state")
    assert_same(again, straight)


def _bfloat16(patch):
    return make_pruner(make_llama().bfloat16())


def _other_weight(patch):
    model = make_llama()
    model.model.embed_tokens.weight.data[0, 0] += 1
    return make_pruner(model)


def _other_threads(patch):
    torch.set_num_threads(2)
    return make_pruner()


def _other_device(patch):
    patch.setattr(LlamaForCausalLM, "device", property(lambda model: SimpleNamespace(type="cuda")))
    return make_pruner()


def _other_version(patch):
    versions = {**fingerprint.versions(), "torch": "1.0"}
    patch.setattr(fingerprint, "versions", lambda: versions)
    return make_pruner()


REFUSALS = {
    "weight": (_other_weight, {}, r"another model\. Go on with what it was begun with \(the model as it was before"),
    "settings": (lambda patch: make_pruner(make_llama(rms_norm_eps=0.1)), {}, r"another model configuration\. Go on"),
    "dtype": (_bfloat16, {}, r"another model, and data type differ too"),
    "tokens": (None, {"flip": True}, r"another calibration samples\. Go on"),
    "threads": (_other_threads, {}, r"another number of threads \(1, now 2\)\. Go on"),
    "device": (_other_device, {}, r"another device type \('cpu', now 'cuda'\)\. Go on"),
    "batch size": (None, {"batch_size": 4}, r"another batch size \(8, now 4\)\. Go on"),
    "version": (_other_version, {}, r"another version of torch \('[^']*', now '1.0'\)\. Go on"),
    "ratio": (
        lambda patch: make_pruner(pruning_ratio=0.25),
        {},
        r"another `pruning_ratio` of the configuration \(0.5, now 0.25",
    ),
    "seed": (lambda patch: make_pruner(seed=1), {}, r"another `seed` of the configuration \(0, now 1\)\. Go on"),
    "function": (
        None,
        {"functions": {"importance": importance_of_ones_own}},
        r"another function for `importance` \('fluctuation', now 'importance_of_ones_own'\)\. Go on",
    ),
}


@pytest.mark.parametrize("part", REFUSALS)
def test_the_state_of_another_run_is_refused_with_the_difference_and_left_as_it_is(
    part, tokens, tmp_path, monkeypatch, record_figure
):
    straight = prune(make_pruner(), tokens, tmp_path / "state")
    make, arguments, message = REFUSALS[part]
    pruner = make_pruner() if make is None else make(monkeypatch)
    arguments = dict(arguments)
    data = tokens.flip(0) if arguments.pop("flip", False) else tokens
    with pytest.raises(StateError, match="'state' was begun with " + message):
        prune(pruner, data, tmp_path / "state", **arguments)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert_same(prune(make_pruner(), tokens, tmp_path / "state"), straight)
    record_figure("R9, states of another run refused")


def test_a_run_goes_on_with_the_model_that_was_put_back(tokens, tmp_path):
    pruner = make_pruner(layer_ratios={0: 0.25})
    interrupt(pruner, tokens, tmp_path / "state", 1)
    straight = prune(make_pruner(layer_ratios={0: 0.25}), tokens, None)
    assert_same(prune(pruner, tokens, tmp_path / "state"), straight)


def test_whatever_ends_a_run_leaves_what_was_finished(tokens, tmp_path, monkeypatch):
    straight = prune(make_pruner(), tokens, None)
    interrupt(make_pruner(), tokens, tmp_path / "state", 2)
    monkeypatch.setattr(pipeline, "prune_layer", stop_before(1))  # which is not asked for again
    assert_same(prune(make_pruner(), tokens, tmp_path / "state"), straight)


def test_a_model_that_is_offloaded_to_disk_is_gone_on_with(llama_folder, tokens, tmp_path):
    placement = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placement |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}

    def pruner(name):
        config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1, reconstruction_steps=0)
        return OTPruner.from_pretrained(
            str(llama_folder), config, device_map=placement, offload_folder=str(tmp_path / name)
        )

    straight = prune(pruner("first"), tokens, None)
    interrupt(pruner("second"), tokens, tmp_path / "state", 2)
    assert prune(pruner("third"), tokens, tmp_path / "state").report == straight.report


def test_a_state_that_cannot_be_removed_is_a_warning_for_the_model_is_saved(tokens, tmp_path):
    pruner = prune(make_pruner(), tokens, tmp_path / "state")
    (tmp_path / "state" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="The model is saved, but the state of the run was not removed"):
        pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_state_of_another_run_outlives_a_save(tokens, tmp_path):
    pruner = prune(make_pruner(), tokens, tmp_path / "state")
    prune(make_pruner(seed=1), tokens, tmp_path / "other")
    pruner._unsaved_states = ((tmp_path / "other", pruner._unsaved_states[0][1]),)
    pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "other" / "state.json").is_file()


def test_several_processes_go_on_to_the_same_bits(tokens, tmp_path):
    torch.save(tokens, tmp_path / "tokens.pt")
    recipes = {
        "plain": {},
        "gradients": {"method": "fo_snip", "score_batch_size": 2},
        "written": {"self_calibration": 0.5},
    }
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    run_two(str(Path(__file__).with_name("resume_worker.py")), tmp_path)


def test_the_state_of_one_process_is_not_that_of_two(tokens, tmp_path, monkeypatch):
    interrupt(make_pruner(), tokens, tmp_path, layer=1)
    monkeypatch.setattr(fingerprint, "num_processes", lambda: 2)
    with pytest.raises(StateError, match=r"begun with another number of processes \(None, now 2\)"):
        prune(make_pruner(), tokens, tmp_path)
