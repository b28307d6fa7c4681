"""The main job, end to end, and what it refuses."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.config.presets import METHODS
from optimum_otprune.errors import (
    CalibrationDataError,
    ConfigurationError,
    ModelLoadError,
    NumericalError,
    OutputError,
    StateError,
    UnsupportedModelError,
)
from optimum_otprune.pruning.report import PruningReport
from tests.conftest import VOCAB_SIZE, make_llama
from tests.models.test_contract import build


def prune(model, tokens, functions=None, **options):
    """Prune a model to half its width, unless told otherwise."""
    config = OTPruningConfig(**{"pruning_ratio": 0.5, "multiple_of": 1, **options})
    pruner = OTPruner.from_pretrained(model, config)
    pruner.prune(tokens, progress=False, **(functions or {}))
    return pruner


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


FRESH_PROCESS = """
import json, sys
sys.modules["optimum_otprune"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor(json.loads(sys.argv[2]))
torch.set_num_threads(1)
print(json.dumps(model(input_ids=tokens).logits.tolist()))
"""


@pytest.mark.parametrize("method", ["otprune", "structured_afr_with_intrafusion"])
def test_a_saved_folder_loads_in_a_process_without_this_package_and_gives_equal_logits(
    llama, tokens, tmp_path, method
):
    pruner = prune(llama, tokens, method=method)
    pruner.save_pretrained(tmp_path / "out")
    arguments = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "out"), json.dumps(tokens[:2].tolist())]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    loaded = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(loaded, logits(pruner.model, tokens[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_to_the_width_and_reports_every_layer(llama, tokens, method):
    pruner = prune(llama, tokens, method=method)
    report = pruner.report
    assert pruner.model.config.intermediate_size == 24
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    for layer in report.layers:
        assert (layer.intermediate_size_before, layer.intermediate_size_after) == (48, 24)
        assert list(layer.kept_channels) == sorted(set(layer.kept_channels))
        assert layer.rescue_ratio <= 1
    assert torch.isfinite(logits(pruner.model, tokens)).all()
    assert PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_ratio_zero_is_the_identity_bit_for_bit(llama, tokens, tmp_path):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    pruner = prune(llama, tokens, pruning_ratio=0.0)
    after = pruner.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert pruner.model.config.intermediate_size == 48
    assert (pruner.report.rescue_ratio, pruner.report.dilution_ratio) == (1.0, 0.0)
    pruner.save_pretrained(tmp_path / "out")


def test_exact_duplicates_are_pruned_without_any_change_of_output(tokens):
    model = make_llama().double()
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            for projection in (mlp.gate_proj, mlp.up_proj):
                projection.weight[24:] = projection.weight[:24]
    before = logits(model, tokens)
    pruner = prune(model, tokens, compensation="none")  # transport alone
    torch.testing.assert_close(logits(pruner.model, tokens), before, rtol=1e-4, atol=1e-4)
    assert pruner.report.rescue_ratio > 0.999


def test_permuting_channels_permutes_the_result(tokens):
    plain, permuted = make_llama(), make_llama()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in permuted.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    first, second = prune(plain, tokens), prune(permuted, tokens)
    for one, other in zip(first.report.layers, second.report.layers):
        assert sorted(order[list(other.kept_channels)].tolist()) == list(one.kept_channels)
    torch.testing.assert_close(logits(first.model, tokens), logits(second.model, tokens), rtol=1e-3, atol=1e-3)


def test_a_refit_never_does_worse_on_held_out_tokens_than_what_it_shrinks_towards(llama, tokens):
    report = prune(llama, tokens, target_correction=0.0, intercept="never").report
    for layer in report.layers:
        assert layer.relative_error_after_refit <= layer.relative_error_before_refit * (1 + 1e-6)
    assert report.rescue_ratio > 0


def test_plain_dropping_rescues_nothing_and_dilutes_nothing(llama, tokens):
    report = prune(llama, tokens, compensation="none", fuse=[], quality="fast").report
    assert (report.rescue_ratio, report.dilution_ratio) == (0.0, 0.0)


@pytest.mark.figure("R9")
def test_two_runs_give_the_same_bits_and_another_seed_may_not(tokens):
    runs = [prune(make_llama(), tokens, method="random", seed=seed) for seed in (0, 0, 1)]
    kept = [[layer.kept_channels for layer in run.report.layers] for run in runs]
    assert kept[0] == kept[1] != kept[2]
    assert len(set(kept[0])) > 1  # every layer draws for itself
    assert torch.equal(logits(runs[0].model, tokens), logits(runs[1].model, tokens))


def test_the_batch_size_of_a_pass_changes_rounding_only(tokens):
    results = []
    for batch_size in (12, 5):
        pruner = OTPruner.from_pretrained(make_llama(), OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
        pruner.prune(tokens, batch_size=batch_size, progress=False)
        results.append(logits(pruner.model, tokens))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_pruned_folder_restores_model_config_and_report(llama_folder, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama_folder, OTPruningConfig(pruning_ratio=0.5, multiple_of=1), dtype="float32")
    pruner.evaluate(tokens, progress=False)
    pruner.prune(tokens, progress=False)
    pruner.evaluate(tokens, progress=False)
    pruner.save_pretrained(tmp_path / "out")
    restored = OTPruner.from_pretrained(tmp_path / "out")
    assert restored.config == pruner.config
    assert restored.report == pruner.report
    assert [metrics["stage"] for metrics in restored.report.evaluations] == ["dense", "pruned"]
    assert restored.tokenizer is not None
    assert torch.equal(logits(restored.model, tokens), logits(pruner.model, tokens))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_disk_offloaded_model_is_pruned_and_saved_like_a_plain_one(llama_folder, tokens, tmp_path):
    config = OTPruningConfig(pruning_ratio=0.5, multiple_of=1)
    plain = OTPruner.from_pretrained(llama_folder, config)
    plain.prune(tokens, progress=False)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = OTPruner.from_pretrained(
        llama_folder, config, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    offloaded.prune(tokens, progress=False)
    torch.testing.assert_close(logits(offloaded.model, tokens), logits(plain.model, tokens), rtol=1e-5, atol=1e-5)
    offloaded.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded, tokens), logits(plain.model, tokens), rtol=1e-5, atol=1e-5)


def test_an_intercept_is_stored_natively_and_only_where_one_was_wanted(tokens, tmp_path, caplog):
    without = prune(make_llama(), tokens, intercept="never")
    assert not without.model.config.mlp_bias
    assert without.model.model.layers[0].mlp.down_proj.bias is None
    assert not without.report.added_biases
    assert "SGLang" not in str(without.report) + caplog.text
    with_one = prune(make_llama(), tokens, intercept="always")
    assert with_one.model.config.mlp_bias
    assert with_one.report.added_biases
    assert "SGLang and TGI drop them without a word" in str(with_one.report)
    assert "SGLang and TGI drop them without a word" in caplog.text
    assert not prune(make_llama(mlp_bias=True), tokens, intercept="always").report.added_biases
    assert all(layer.intercept for layer in with_one.report.layers)
    with_one.save_pretrained(tmp_path / "out")
    assert "SGLang and TGI drop them" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded, tokens), logits(with_one.model, tokens))


def test_bfloat16_stays_bfloat16(tokens):
    pruner = prune(make_llama().bfloat16(), tokens)
    assert {parameter.dtype for parameter in pruner.model.parameters()} == {torch.bfloat16}


def test_gpt2_with_its_transposed_weights_is_pruned(tokens, tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=1)
    pruner = prune(GPT2LMHeadModel(config).eval(), tokens)
    assert pruner.model.config.n_inner == 64
    pruner.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded, tokens), logits(pruner.model, tokens))


def test_text_needs_a_tokenizer_without_padding_or_beginning(llama_folder):
    pruner = OTPruner.from_pretrained(llama_folder, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, seqlen=16))
    assert pruner.tokenizer.pad_token is None
    assert pruner.tokenizer.bos_token is None
    texts = [" ".join(f"w{(7 * i + j) % 60}" for i in range(40)) for j in range(8)]
    assert pruner.prune(texts, progress=False).calibration["seqlen"] == 16
    assert pruner.evaluate(texts, progress=False)["perplexity"] > 1


def test_a_model_without_a_tokenizer_is_saved_without_one_and_the_card_says_so(llama, tokens, tmp_path):
    folder = prune(llama, tokens).save_pretrained(tmp_path / "out")
    assert not (folder / "tokenizer.json").exists()
    assert "no tokenizer" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_line_per_layer_is_logged(llama, tokens, caplog):
    with caplog.at_level(logging.INFO, logger="optimum_otprune"):
        report = prune(llama, tokens).report
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Layer")]
    assert lines == [str(layer) for layer in report.layers]
    assert lines[0].startswith("Layer 00: Rescued ")


def test_functions_of_ones_own_replace_names_and_are_reported(llama, tokens):
    def last_first(statistics):
        return torch.arange(statistics.weights.intermediate_size, dtype=torch.float32)

    pruner = prune(llama, tokens, {"importance": last_first, "cost": None}, selection="top")
    assert pruner.report.layers[0].kept_channels == tuple(range(24, 48))
    assert pruner.report.custom_functions == {"importance": "last_first"}


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ({"importnce": min}, {}, "`importnce` takes no function"),
        ({"solver": min}, {"method": "wanda_sp"}, "would be ignored"),
        ({"importance": "wnda"}, {}, "Did you mean 'wanda'"),
    ],
)
def test_functions_that_nothing_calls_are_refused(llama, tokens, functions, options, message):
    with pytest.raises(ValueError, match=message):
        prune(llama, tokens, functions, **options)


@pytest.mark.figure("R6")
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_nan_in_the_weights_names_the_layer_before_anything_is_changed(llama, tokens, part):
    with torch.no_grad():
        getattr(llama.model.layers[1].mlp, part).weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"^Layer 1: `\w+` of the FFN holds 1 values that are NaN"):
        prune(llama, tokens)
    assert llama.model.layers[0].mlp.up_proj.out_features == 48


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("token_weighting", "what"), [("residual", "hidden states behind the block"), ("uniform", "channel activations")]
)
def test_a_nan_in_the_activations_names_the_layer(llama, tokens, token_weighting, what):
    def overflow(module, args, output):  # but not on the one sample that is tried before
        return output if len(output) == 1 else output.fill_(float("inf"))

    llama.model.layers[1].post_attention_layernorm.register_forward_hook(overflow)
    with pytest.raises(NumericalError, match=f"^Layer 1: the {what} are NaN or infinite"):
        prune(llama, tokens, token_weighting=token_weighting)


def test_a_nan_in_the_scores_names_the_layer(llama, tokens):
    def broken(statistics):
        return torch.full((48,), float("nan"))

    with pytest.raises(NumericalError, match="^Layer 0: The importance 'broken' is NaN"):
        prune(llama, tokens, {"importance": broken})


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.empty(0, 5, dtype=torch.long), "not empty"),
        (torch.zeros(2, 41, dtype=torch.long), "only 40 positions"),
        (torch.full((2, 8), VOCAB_SIZE), "vocabulary has 64"),
        (torch.zeros(10, dtype=torch.long), "fewer than one window of 40"),
        ([], "empty list"),
        (["   "], "no tokenizer"),
        (torch.zeros(2, 8), "want integers"),
        (3.5, "not understood"),
    ],
)
def test_calibration_data_that_cannot_be_used_are_refused_and_the_model_is_untouched(llama, data, message):
    with pytest.raises(CalibrationDataError, match=message):
        prune(llama, data)
    assert llama.config.intermediate_size == 48


def test_a_multiple_that_cannot_be_met_is_refused(llama, tokens):
    with pytest.raises(ConfigurationError, match="`multiple_of` is 96, but the layer has only 48 channels"):
        prune(llama, tokens, multiple_of=96)


def test_the_default_multiple_is_lowered_with_a_warning_for_a_small_layer(llama, tokens):
    with pytest.warns(UserWarning, match="`multiple_of` is lowered from 128 to 2"):
        prune(llama, tokens, multiple_of=128)


def test_a_ratio_that_rounds_to_nothing_says_so(llama, tokens):
    with pytest.warns(UserWarning, match="Nothing is pruned"):
        assert prune(llama, tokens, pruning_ratio=0.001).report.layers[0].pruned_channels == 0


def test_an_architecture_without_a_known_ffn_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="No known FFN was found in MambaForCausalLM"):
        OTPruner.from_pretrained(MambaForCausalLM(config))


def test_a_quantized_model_is_refused(llama):
    llama.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        OTPruner.from_pretrained(llama)


def test_loading_options_with_a_model_in_memory_are_refused(llama):
    with pytest.raises(ConfigurationError, match="nothing to load with `revision`"):
        OTPruner.from_pretrained(llama, revision="main")


def test_a_config_of_another_kind_is_refused(llama):
    with pytest.raises(ConfigurationError, match="`config` is a float"):
        OTPruner.from_pretrained(llama, 0.5)


@pytest.mark.figure("R6")
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_model_that_cannot_be_reached_says_both_possibilities_and_what_to_do(name):
    with pytest.raises(
        ModelLoadError, match="does not exist .* or the Hub cannot be reached. Offline, give a local folder"
    ):
        OTPruner.from_pretrained(name)


def test_a_folder_that_is_not_empty_is_only_replaced_when_told_so(llama, tokens, tmp_path):
    pruner = prune(llama, tokens)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="'out' is not empty"):
        pruner.save_pretrained(tmp_path / "out")
    with pytest.raises(OutputError, match=r"'out' holds 'precious.txt', which is no file of a saved model"):
        pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    (tmp_path / "out" / "precious.txt").rename(tmp_path / "precious.txt")
    for _ in range(2):
        pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious.txt"]


def test_reconstruction_lowers_the_error_and_is_reproducible(tokens, tmp_path):
    plain = prune(make_llama(), tokens, target_correction=0.0)
    first, second = (prune(make_llama(), tokens, reconstruction_steps=60, target_correction=0.0) for _ in range(2))
    for layer in first.report.layers:
        assert layer.relative_error_after_reconstruction <= layer.relative_error_after_refit
    assert first.report.rescue_ratio > plain.report.rescue_ratio
    assert first.report.dilution_ratio > 0  # gate and up were trained
    assert torch.equal(logits(first.model, tokens), logits(second.model, tokens))
    reloaded = AutoModelForCausalLM.from_pretrained(first.save_pretrained(tmp_path / "out"))
    assert torch.equal(logits(reloaded, tokens), logits(first.model, tokens))


@pytest.mark.parametrize("options", [{"method": "flap"}, {"intercept": "always"}])
def test_an_intercept_that_the_architecture_cannot_hold_is_refused(tokens, options):
    model = build("mistral")
    with pytest.raises(ConfigurationError, match="needs an output bias, which this architecture cannot hold"):
        prune(model, tokens, **options)
    assert model.config.intermediate_size == 48
    assert prune(model, tokens).model.config.intermediate_size == 24  # "auto" goes without


@pytest.mark.figure("R6")
@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_counts_that_are_no_positive_integers_are_refused(llama, tokens, count):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    for call in (
        lambda: pruner.prune(tokens, batch_size=count),
        lambda: pruner.evaluate(tokens, batch_size=count),
        lambda: pruner.evaluate(tokens, max_windows=count),
    ):
        with pytest.raises(ConfigurationError, match="want an integer >= 1"):
            call()


def test_evaluation_counts_the_windows_that_were_calibrated_on(llama, tokens):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    assert "seen_windows" not in pruner.evaluate(tokens, progress=False)
    pruner.prune(tokens[:8], progress=False)
    assert pruner.evaluate(tokens, progress=False)["seen_windows"] == 8
    assert pruner.evaluate(tokens[8:], progress=False)["seen_windows"] == 0
    assert pruner.evaluate(tokens[:, 5:15], progress=False)["seen_windows"] == 8  # of another length


def test_a_report_has_the_bytes_of_the_weights_and_the_architecture(llama, tokens):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    report = pruner.prune(tokens, progress=False)
    assert (report.size_before, report.size_after) == (4 * report.parameters_before, 4 * report.parameters_after)
    assert report.model_type == "llama"


def test_arguments_of_numpy_and_the_largest_seed_do_as_plain_ones(tokens):
    found = []
    for whole, real in ((int, float), (np.int64, np.float32)):
        options = {"method": "random", "seed": whole(2**63 - 1), "pruning_ratio": real(0.5), "multiple_of": whole(1)}
        pruner = OTPruner(make_llama(), OTPruningConfig(**options))
        pruner.prune(tokens, batch_size=whole(4), max_hidden_memory=whole(10**6), progress=False)
        metrics = pruner.evaluate(tokens, batch_size=whole(4), max_windows=whole(3), progress=False)
        found.append((metrics, json.dumps(pruner.report.to_dict())))
    assert found[0][0] == found[1][0]
    assert json.loads(found[0][1])["config"] == json.loads(found[1][1])["config"]


@pytest.mark.figure("R6")
@pytest.mark.parametrize("size", ["5 cows", 0, -1, 1.5, float("nan"), True])
def test_a_shard_size_that_is_none_is_an_error_that_leaves_nothing(llama, tmp_path, size):
    with pytest.raises(
        ConfigurationError, match="`max_shard_size` .*(Give bytes, or such as '4GB'|want 1 or more bytes)"
    ):
        OTPruner(llama).save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokenizer", [5, "user/name"])
def test_what_is_no_tokenizer_is_refused(llama, tokenizer):
    kind = type(tokenizer).__name__
    with pytest.raises(ConfigurationError, match=f"`tokenizer` is of type {kind}; want a tokenizer"):
        OTPruner.from_pretrained(llama, tokenizer=tokenizer)


def test_overwriting_is_wanted_or_not(llama, tmp_path):
    with pytest.raises(ConfigurationError, match="`overwrite` is 'no'; want True or False"):
        OTPruner(llama).save_pretrained(tmp_path / "out", overwrite="no")


@pytest.mark.parametrize("state", [5, "", " "])
def test_a_state_that_names_no_folder_is_refused(llama, tokens, state):
    with pytest.raises(StateError, match=f"The state is {state!r}, which names no folder"):
        OTPruner(llama, OTPruningConfig(pruning_ratio=0.5)).prune(tokens, resume_from=state)
