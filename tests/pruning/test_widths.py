"""Layers of different widths: who decides them, and that what is saved is what is in memory."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig, register_architecture
from optimum_otprune.commands.main import main
from optimum_otprune.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from optimum_otprune.models.architectures import ARCHITECTURES, FFNSpec, find_spec
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.modeling_code import MODELING_FILE, modeling_code
from optimum_otprune.pruning.calibration.samples import heldout_mask
from optimum_otprune.pruning.widths import adaptive_widths, plan_widths
from tests.conftest import make_llama
from tests.passes import moments_of, passes_of, stream_of

FAST = {"pruning_ratio": 0.5, "multiple_of": 2, "quality": "fast", "self_calibration": 0}


def prune(model, tokens, **options) -> OTPruner:
    pruner = OTPruner.from_pretrained(model, OTPruningConfig(**{**FAST, **options}))
    pruner.prune(tokens, progress=False)
    return pruner


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def make_uneven_llama():
    """A Llama whose middle layer hardly matters."""
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 0.01
    return model


def test_a_layer_that_the_loss_hardly_feels_gives_up_more_channels_at_the_same_budget(tokens):
    report = prune(make_uneven_llama(), tokens, allocation="adaptive").report
    assert sum(report.widths) == 3 * 24
    assert report.widths[1] == 2  # one multiple stays
    assert all(width % 2 == 0 for width in report.widths)


def test_a_layer_whose_outputs_no_later_layer_reads_is_cheap_only_to_the_loss(tokens):
    model = make_llama()
    with torch.no_grad():  # layer 1 writes much, but only where the norms that follow read nothing
        model.model.layers[1].mlp.down_proj.weight[4:] = 0
        model.model.layers[1].mlp.down_proj.weight[:4] *= 4
        last = model.model.layers[2]
        for norm in (last.input_layernorm, last.post_attention_layernorm, model.model.norm):
            norm.weight[:4] = 0
    dense, config = passes_of(model, tokens, 4), OTPruningConfig(**FAST, allocation="adaptive")
    felt = moments_of(model, tokens, 4)
    alike = [torch.eye(32, dtype=torch.float64)] * 3
    is_heldout = heldout_mask(*tokens.shape, 0.25, 0)
    widths, unweighed = (adaptive_widths(dense, is_heldout, config, [24] * 3, moments) for moments in (felt, alike))
    assert sum(widths) == sum(unweighed) == 72
    assert widths[1] < widths[0]
    assert widths[1] < unweighed[1]


def test_layers_behind_a_skipped_one_know_what_the_dense_model_does(llama, tokens):
    blocks = ffn_blocks(llama)
    with torch.no_grad():
        expected = llama(input_ids=tokens, output_hidden_states=True).hidden_states[2]
    stream = stream_of(llama, tokens, 5, track_dense=True)
    with torch.no_grad():
        stream.energies(blocks[0])
        llama.model.layers[0].mlp.down_proj.weight *= 0.5  # as pruned
        stream.advance(blocks[0])
    stream.skip(blocks[1])
    dense, pruned = (torch.cat([stored.load() for stored in part]) for part in (stream._dense_hidden, stream._hidden))
    torch.testing.assert_close(dense, expected)
    assert not torch.allclose(pruned, expected)


def test_a_model_that_padding_makes_as_large_as_before_is_warned_of(llama, tokens):
    with pytest.warns(UserWarning, match="as large as the dense one: .* non_uniform_format='per_layer_config'"):
        prune(llama, tokens, skip_layers=[0])


def test_a_multiple_that_cannot_be_met_is_refused_for_given_ratios_too(llama, tokens):
    for ratios in (dict.fromkeys(range(3), 0.5), {0: 0.5}):
        with pytest.raises(ConfigurationError, match="`multiple_of` is 100"):
            prune(llama, tokens, multiple_of=100, pruning_ratio=0.0, layer_ratios=ratios)


def test_a_ratio_of_a_layer_is_given_once_on_the_command_line(capsys):
    for text, message in (("0=0.5 0=0.75", "names layer 0 twice"), ("0:0.5", "not of the form LAYER=X")):
        with pytest.raises(SystemExit) as caught:
            main(["prune", "model", "-o", "out", "--layer-ratios", *text.split()])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_untouched_layers_are_left_out_of_the_statistics_of_a_report(llama, tokens):
    report = prune(llama, tokens, skip_layers=[0], non_uniform_format="per_layer_config").report
    assert report.layers[0].rescue_ratio == 1.0
    assert "to 1.000" not in str(report)


def test_scaling_a_layer_inversely_in_up_and_down_changes_no_width(tokens):
    plain, scaled = make_uneven_llama(), make_uneven_llama()
    with torch.no_grad():
        scaled.model.layers[0].mlp.up_proj.weight *= 8
        scaled.model.layers[0].mlp.down_proj.weight /= 8
    widths = [prune(model, tokens, allocation="adaptive").report.widths for model in (plain, scaled)]
    assert widths[0] == widths[1]


def test_adaptive_widths_do_not_depend_on_the_batch_size(tokens):
    reports = []
    for batch_size in (8, 5):
        pruner = OTPruner.from_pretrained(make_uneven_llama(), OTPruningConfig(**FAST, allocation="adaptive"))
        reports.append(pruner.prune(tokens, batch_size=batch_size, progress=False))
    assert reports[0].widths == reports[1].widths


def test_skipped_layers_keep_their_bits_and_given_ratios_are_met(llama, tokens):
    before = llama.model.layers[2].mlp.down_proj.weight.clone()
    pruner = prune(llama, tokens, skip_layers=[2], layer_ratios={0: 0.75}, non_uniform_format="per_layer_config")
    assert pruner.report.widths == (12, 24, 48)
    assert torch.equal(llama.model.layers[2].mlp.down_proj.weight, before)
    assert pruner.report.layers[2].pruned_channels == 0


def test_other_layers_see_no_difference_between_a_skipped_layer_and_one_of_ratio_zero(tokens):
    own = {"non_uniform_format": "per_layer_config"}
    skipped = prune(make_llama(), tokens, skip_layers=[1], **own).report
    zero = prune(make_llama(), tokens, layer_ratios={1: 0.0}, **own).report
    assert skipped.layers == zero.layers


def test_adaptive_allocation_leaves_given_layers_alone(tokens):
    report = prune(make_uneven_llama(), tokens, allocation="adaptive", layer_ratios={1: 0.25}).report
    assert report.widths[1] == 36
    assert report.widths[0] + report.widths[2] == 48


def test_a_padded_model_loads_plainly_and_puts_out_what_the_narrow_one_does(tokens, tmp_path):
    narrow = prune(make_uneven_llama(), tokens, allocation="adaptive", non_uniform_format="per_layer_config")
    padded = prune(make_uneven_llama(), tokens, allocation="adaptive")
    torch.testing.assert_close(logits(padded.model, tokens), logits(narrow.model, tokens), rtol=1e-5, atol=1e-5)
    assert padded.model.config.intermediate_size == max(padded.report.widths)
    padded.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, tokens), logits(padded.model, tokens))
    assert not (tmp_path / "out" / MODELING_FILE).exists()


def test_padding_is_not_counted_as_parameters_but_reported(tokens):
    padded = prune(make_uneven_llama(), tokens, allocation="adaptive")
    narrow = prune(make_uneven_llama(), tokens, allocation="adaptive", non_uniform_format="per_layer_config")
    report = padded.report
    assert report.parameters_after == narrow.model.num_parameters() == narrow.report.parameters_after
    assert report.padding_parameters == padded.model.num_parameters() - narrow.model.num_parameters() > 0
    assert narrow.report.padding_parameters == 0
    assert "zeros that fill up" in str(report)
    assert "(2 to " in str(report)


def test_layers_that_end_up_equal_are_saved_as_a_uniform_model(llama, tokens, tmp_path):
    pruner = prune(llama, tokens, layer_ratios={0: 0.5}, non_uniform_format="per_layer_config")
    pruner.save_pretrained(tmp_path / "out")
    assert "per_layer_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / MODELING_FILE).exists()


FRESH = """
import sys
sys.modules["optimum_otprune"] = None
import torch
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[2], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(input_ids=tokens, use_cache=False).logits, sys.argv[3])
print(model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape)
"""


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=40, bos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def make_opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_opt])
def test_a_per_layer_model_loads_with_remote_code_in_a_process_without_this_package(make, tokens, tmp_path):
    pruner = prune(make(), tokens, layer_ratios={0: 0.75}, non_uniform_format="per_layer_config")
    pruner.save_pretrained(tmp_path / "out")
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "out", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 7])" in done.stdout
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(pruner.model, tokens))


def test_a_per_layer_model_fails_closed_without_remote_code(llama, tokens, tmp_path):
    pruner = prune(llama, tokens, layer_ratios={0: 0.75}, non_uniform_format="per_layer_config")
    pruner.save_pretrained(tmp_path / "out")
    with pytest.raises(ModelLoadError, match=r"layers differ in width.*`trust_remote_code=True`"):
        OTPruner.from_pretrained(tmp_path / "out")


def test_a_per_layer_model_is_read_evaluated_and_saved_again(llama, tokens, tmp_path):
    pruner = prune(llama, tokens, layer_ratios={0: 0.75}, non_uniform_format="per_layer_config")
    pruner.save_pretrained(tmp_path / "out")
    again = OTPruner.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again.report == pruner.report
    measured = [of.evaluate(tokens, progress=False)["perplexity"] for of in (again, pruner)]
    assert measured[0] == measured[1]
    again.save_pretrained(tmp_path / "again")
    third = OTPruner.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(third.model, tokens), logits(pruner.model, tokens))
    with pytest.raises(UnsupportedModelError, match="was pruned already"):
        again.prune(tokens, progress=False)


def test_a_model_that_something_else_pruned_to_different_widths_is_refused(llama, tokens):
    block = ffn_blocks(llama)[1]
    block.install(block.read().select(torch.arange(12)))
    with pytest.raises(UnsupportedModelError, match=r"different FFN widths \(12 to 48\): it was pruned already"):
        prune(llama, tokens)


def test_modeling_code_holds_nothing_of_a_users_own(llama):
    template = files("optimum_otprune.models").joinpath("modeling_otprune.py.txt").read_text()
    code = modeling_code(llama, find_spec(llama)[1], template)
    assert code.auto_map == {"AutoModelForCausalLM": "modeling_otprune.OTPrunedLlamaForCausalLM"}
    own = FFNSpec(layers="layers", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn")
    with pytest.raises(UnsupportedModelError, match="non_uniform_format='pad'"):
        modeling_code(llama, own, template)

    class Mine(type(llama)):
        pass

    mine = Mine(llama.config)
    assert "Mine" not in modeling_code(mine, find_spec(mine)[1], template).text


def test_an_architecture_of_a_users_own_is_refused_before_any_work(llama, tokens, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "own", ARCHITECTURES["llama"])
    monkeypatch.delitem(ARCHITECTURES, "own")
    spec = FFNSpec("layers", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj")
    register_architecture("own", spec)
    try:
        with pytest.raises(UnsupportedModelError, match="layouts that this package knows"):
            prune(llama, tokens, layer_ratios={0: 0.75}, non_uniform_format="per_layer_config")
        assert ffn_blocks(llama)[0].intermediate_size == 48
    finally:
        del ARCHITECTURES["own"]


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": [3]}, r"`skip_layers` names layer 3, but the model has 3 layers, 0 to 2"),
        ({"layer_ratios": {7: 0.5}}, r"`layer_ratios` names layer 7"),
        ({"allocation": "adaptive", "skip_layers": [0, 1]}, r"has nothing to share out: .* decide 2 of 3 layers"),
        (
            {"pruning_ratio": None, "target_parameters": 10_000, "skip_layers": [0]},
            "cannot be met by layers of different widths that are filled up",
        ),
        (
            {
                "pruning_ratio": None,
                "target_parameters": 10_000,
                "skip_layers": [0, 1, 2],
                "non_uniform_format": "per_layer_config",
            },
            "`target_parameters=10000` would be ignored",
        ),
        (
            {"pruning_ratio": 0.3, "skip_layers": [0], "layer_ratios": {1: 0.5, 2: 0.5}},
            "`pruning_ratio=0.3` would be ignored: `skip_layers` and `layer_ratios` decide the width of every layer",
        ),
    ],
)
def test_layers_that_do_not_fit_the_model_are_an_error(llama, tokens, options, message):
    with pytest.raises(ConfigurationError, match=message):
        prune(llama, tokens, **options)
    assert ffn_blocks(llama)[0].intermediate_size == 48


@pytest.mark.figure("R6")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": "0"}, "`skip_layers` is '0'; want a list of integers"),
        ({"skip_layers": [-1]}, "`skip_layers` is"),
        ({"skip_layers": [True]}, "`skip_layers` is"),
        ({"layer_ratios": {0: 1.0}}, "`layer_ratios` is .* want a dictionary of numbers by layer"),
        ({"layer_ratios": {0: float("nan")}}, "`layer_ratios` is"),
        ({"layer_ratios": {"x": 0.5}}, "`layer_ratios` is"),
        ({"layer_ratios": {0: 0.5, "0": 0.6}}, "`layer_ratios` is"),
        ({"layer_ratios": [0.5]}, "`layer_ratios` is"),
        ({"layer_ratios": {0: 0.5}, "skip_layers": [0]}, "`skip_layers` leaves as it is"),
    ],
)
def test_what_is_said_of_layers_is_checked(options, message):
    with pytest.raises(ConfigurationError, match=message):
        OTPruningConfig(**options)


def test_what_is_said_of_layers_survives_a_file(tmp_path):
    config = OTPruningConfig(skip_layers=[5, 3], layer_ratios={10: 0.5, 2: 0.25}, allocation="adaptive")
    config.save_pretrained(tmp_path)
    again = OTPruningConfig.from_pretrained(tmp_path)
    assert again == config
    assert (again.skip_layers, again.layer_ratios) == ((3, 5), {2: 0.25, 10: 0.5})


def test_a_target_counts_layers_whose_width_is_given(llama, tokens):
    dense = llama.num_parameters()
    target = dense - 1000
    pruner = prune(
        llama,
        tokens,
        pruning_ratio=None,
        target_parameters=target,
        skip_layers=[0],
        intercept="never",
        non_uniform_format="per_layer_config",
        multiple_of=1,
    )
    after = llama.num_parameters()
    assert target - 2 * 3 * 32 < after <= target
    assert pruner.report.widths[0] == 48


def test_the_multiple_of_a_purpose_is_never_lowered_and_a_number_is():
    model = make_llama(intermediate_size=512)
    named = plan_widths(ffn_blocks(model), OTPruningConfig(multiple_of="gguf", pruning_ratio=0.4))
    assert named == [256] * 3
    with pytest.warns(UserWarning, match="`multiple_of` is lowered from 256 to 32"):
        numbers = plan_widths(ffn_blocks(model), OTPruningConfig(multiple_of=256, pruning_ratio=0.4))
    assert numbers == [320] * 3
    with pytest.raises(ConfigurationError, match="`multiple_of` is 256, but the layer has only 48 channels"):
        plan_widths(ffn_blocks(make_llama()), OTPruningConfig(multiple_of="gguf"))


def test_the_default_lowered_for_small_layers_gives_widths_that_programs_like():
    model = make_llama(intermediate_size=400)
    with pytest.warns(UserWarning, match="`multiple_of` is lowered from 128 to 16"):
        assert plan_widths(ffn_blocks(model), OTPruningConfig(pruning_ratio=0.5)) == [192] * 3
